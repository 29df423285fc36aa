"""Stationarity by linear algebra: kernels enumerated on a finite space, transition probabilities from the kernels themselves.

The space has three sites; site is the first coordinate. A chain in these tests carries its own script (second coordinate:
its number), so that one call enumerates every history of a speculative kernel. No random number decides anything here.
"""

import itertools

import numpy as np
import pytest
import torch

from longstride.errors import LongstrideError
from longstride.mcmc.kernel import cycle, mixture
from longstride.mcmc.metropolis import accept, metropolis, start_chains
from longstride.mcmc.speculative import speculative
from longstride.state import State

TARGET = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
N = len(TARGET)
LOCAL = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.1, 0.4], [0.7, 0.2, 0.1]], dtype=torch.float64)
GLOBAL = torch.tensor([[0.2, 0.2, 0.6]] * 3, dtype=torch.float64)


def at(sites, numbers=None):
    positions = torch.zeros(len(sites), 1, 3, dtype=torch.float64)
    positions[:, 0, 0] = torch.as_tensor(sites, dtype=torch.float64)
    if numbers is not None:
        positions[:, 0, 1] = torch.as_tensor(numbers, dtype=torch.float64)
    return State(positions=positions)


def site(state):
    return state.positions[:, 0, 0].long()


def log_target(state):
    return TARGET[site(state)].log()


class Planned:
    """q from a table; every draw is prescribed."""

    def __init__(self, table, planned, *, reverse=True, sign=1.0):
        self.table, self.planned, self.reverse, self.sign = table, planned, reverse, sign

    def sample(self, x, generator):
        return at(self.planned), self.sign * self.table[site(x), self.planned].log()

    def log_prob(self, y, x):
        return self.table[site(x), site(y)].log() * float(self.reverse)


def one_step(table, groups=1, **broken):
    """Return the transition matrix of `metropolis`, its pairs enumerated in `groups` separate calls."""
    pairs = torch.tensor(list(itertools.product(range(N), repeat=2)))
    matrix = torch.zeros(N, N, dtype=torch.float64)
    for i, j in (part.T for part in pairs.tensor_split(groups)):
        seen = {}

        def decide(log_alpha, generator, seen=seen):
            seen["alpha"] = log_alpha.clamp(max=0).exp()
            return torch.ones_like(log_alpha, dtype=torch.bool)

        kernel = metropolis(log_target, Planned(table, j, **broken), decide=decide)
        chains, _ = kernel(start_chains(log_target, at(i)), torch.Generator())
        assert torch.equal(site(chains.state), j)
        matrix[i, j] = table[i, j] * seen["alpha"]
    matrix.fill_diagonal_(0)
    return matrix + torch.diag(1 - matrix.sum(1))


class Script:
    """Proposals and decisions of many chains at once: chain k follows its own list of outcomes.

    Outcome j < N: propose j and accept; outcome N: propose whatever and reject. Which entries a chain has used is worked out
    from the decisions alone, so a kernel that counts its steps otherwise runs out of line with its script.
    """

    def __init__(self, outcomes, table, *, steps):
        self.outcomes, self.table, self.steps = outcomes, table, steps
        self.done = torch.zeros(len(outcomes), dtype=torch.long)
        self.log_alpha = torch.full(outcomes.shape, torch.nan, dtype=torch.float64)

    def propose_many(self, x, count, generator):
        self.numbers = x.positions[:, 0, 1].long()
        slots = self.done[self.numbers][:, None] + torch.arange(count)
        self.now = torch.cat([self.outcomes, torch.full((len(self.outcomes), count), N)], 1)[self.numbers].gather(1, slots)
        drawn = torch.where(self.now < N, self.now, 0).flatten()
        i = site(x).repeat_interleave(count)
        y = at(drawn, self.numbers.repeat_interleave(count))
        return y, self.table[i, drawn].log(), self.table[drawn, i].log()

    def decide(self, log_alpha, generator):
        taken = self.now < N
        for row, number in enumerate(self.numbers.tolist()):
            done = int(self.done[number])
            used = min(log_alpha.shape[1], self.steps - done)
            first = next((k for k in range(used) if taken[row, k]), used - 1)
            self.log_alpha[number, done : done + first + 1] = log_alpha[row, : first + 1]
            self.done[number] += first + 1
        return taken


def speculative_matrix(batch, steps, groups=1, *, table=LOCAL, sabotage=None):
    """Return the transition matrix of one call of `speculative` by running every history of outcomes through it."""
    outcomes = torch.tensor(list(itertools.product(range(N + 1), repeat=steps)))
    total = torch.zeros(N, N, dtype=torch.float64)
    single = one_step(table)
    moved = (single - torch.diag(single.diag())).clone()  # accepted moves to another site; self-moves are added below
    accepted = moved + torch.diag(table.diag())  # proposing the own site is always accepted
    for start in range(N):
        for part in outcomes.tensor_split(groups):
            script = Script(part, table, steps=steps)
            kernel = speculative(log_target, script, batch=batch, steps=steps, decide=script.decide)
            begin = at([start] * len(part), range(len(part)))
            chains, info = kernel(start_chains(log_target, begin), torch.Generator())
            assert (script.done == steps).all()
            assert torch.equal(info.accepted, (part < N).sum(1))
            here, weight = torch.full((len(part),), start), torch.ones(len(part), dtype=torch.float64)
            for k in range(steps):
                j = part[:, k]
                to = torch.where(j < N, j, here)
                alpha = script.log_alpha[:, k].clamp(max=0).exp()  # the ratio the kernel worked out for this very step
                weight = weight * torch.where(j < N, table[here, to] * alpha, 1 - accepted[here].sum(1))
                here = to
            ended = site(chains.state) if sabotage is None else sabotage(part, site(chains.state), start)
            total[start].index_add_(0, ended, weight)
    return total


def defect(matrix):
    return (TARGET @ matrix - TARGET).abs().max().item()


@pytest.mark.parametrize("groups", [1, 2, 9])
def test_metropolis_is_stationary_and_reversible_for_every_chain_count(groups):
    matrix = one_step(LOCAL, groups)
    assert defect(matrix) < 1e-12
    flow = TARGET[:, None] * matrix
    assert torch.allclose(flow, flow.T, atol=1e-14)


@pytest.mark.parametrize("broken", [{"reverse": False}, {"sign": -1.0}])
def test_a_dropped_or_flipped_density_is_detected(broken):
    matrix = one_step(LOCAL, **broken)
    assert defect(matrix) > 1e-2
    flow = TARGET[:, None] * matrix
    assert (flow - flow.T).abs().max() > 1e-2


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("batch", "steps"), [(1, 1), (1, 3), (2, 2), (3, 3), (2, 5), (3, 5), (10, 5)])
def test_speculative_batches_are_the_sequential_chain(batch, steps, groups):
    matrix = speculative_matrix(batch, steps, groups)
    assert defect(matrix) < 1e-12
    assert torch.allclose(matrix.sum(1), torch.ones(N, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(matrix, torch.linalg.matrix_power(one_step(LOCAL), steps), atol=1e-12)


@pytest.mark.slow
def test_ten_proposals_for_ten_steps_are_the_sequential_chain():
    """Two sites, so that all 3^10 histories fit."""
    outcomes = list(itertools.product((0, 1, N), repeat=10))
    table = torch.tensor([[0.3, 0.7, 0.0], [0.6, 0.4, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    outcomes = torch.tensor(outcomes)
    two = torch.zeros(2, 2, dtype=torch.float64)
    for start in (0, 1):
        script = Script(outcomes, table, steps=10)
        kernel = speculative(log_target, script, batch=10, decide=script.decide)
        chains, _ = kernel(start_chains(log_target, at([start] * len(outcomes), range(len(outcomes)))), torch.Generator())
        single = one_step(table)
        stay = 1 - (single.fill_diagonal_(0) + torch.diag(table.diag()))[:2, :2].sum(1)
        here, weight = torch.full((len(outcomes),), start), torch.ones(len(outcomes), dtype=torch.float64)
        for k in range(10):
            j = outcomes[:, k]
            to = torch.where(j < N, j, here)
            alpha = script.log_alpha[:, k].clamp(max=0).exp()
            weight = weight * torch.where(j < N, table[here, to] * alpha, stay[here])
            here = to
        two[start].index_add_(0, site(chains.state), weight)
    pi = TARGET[:2] / TARGET[:2].sum()
    assert (pi @ two - pi).abs().max() < 1e-12


def test_forgetting_the_repeats_before_an_acceptance_is_detected():
    """Negative control: a batch that ends at its first acceptance and is recorded as one step."""
    matrix = one_step(LOCAL)
    moves = matrix - torch.diag(matrix.diag())
    stay = matrix.diag()
    hurried = moves * ((1 - stay**10) / (1 - stay))[:, None] + torch.diag(stay**10)
    assert torch.allclose(hurried.sum(1), torch.ones(N, dtype=torch.float64))
    assert defect(hurried) > 1e-2


def test_a_batch_that_forgets_its_last_move_is_detected():
    def sabotage(part, ended, start):
        late = (part[:, -1] < N) & (part[:, :-1] == N).all(1)
        return torch.where(late, start, ended)

    assert defect(speculative_matrix(3, 3, sabotage=sabotage)) > 1e-2


def matrices():
    return one_step(LOCAL), one_step(GLOBAL)


def tabulated(matrix):
    """A kernel that moves each chain by a transition matrix with the cell prescribed: what mixture and cycle combine."""
    from longstride.mcmc.kernel import ChainState, Info, Kernel

    def step(chains, generator):
        there = torch.multinomial(matrix[site(chains.state)], 1, generator=generator)[:, 0]
        state = at(there)
        moved = ChainState(state=state, log_density=log_target(state))
        return moved, Info(accepted=torch.ones(len(there), dtype=torch.bool), log_alpha=there * 0.0, label="t", energy_calls=0)

    return Kernel(step=step, invariance="exact", labels=("t",))


def test_mixture_and_cycle_are_stationary_and_the_cycle_is_not_reversible():
    first, second = matrices()
    for combined in (0.3 * first + 0.7 * second, first @ second, second @ first):
        assert defect(combined) < 1e-12
    flow = TARGET[:, None] * (first @ second)
    assert (flow - flow.T).abs().max() > 1e-4
    # what mixture and cycle do, counted, is these matrices
    generator = torch.Generator().manual_seed(3)
    count = 60000
    begin = start_chains(log_target, at(torch.arange(N).repeat_interleave(count // N)))
    for kernel, expected in (
        (cycle(tabulated(first), tabulated(second)), first @ second),
        (mixture([tabulated(first), tabulated(second)], [0.3, 0.7]), None),
    ):
        if expected is None:
            # one choice for all chains: the mean over many steps is the mixture
            found = torch.zeros(N, N, dtype=torch.float64)
            for _ in range(400):
                moved, _ = kernel(start_chains(log_target, at(torch.arange(N).repeat_interleave(100))), generator)
                found.index_put_(
                    (torch.arange(N).repeat_interleave(100), site(moved.state)), torch.tensor(1.0).double(), accumulate=True
                )
            assert torch.allclose(found / 40000, 0.3 * first + 0.7 * second, atol=0.03)
            continue
        moved, _ = kernel(begin, generator)
        found = torch.zeros(N, N, dtype=torch.float64)
        found.index_put_((site(begin.state), site(moved.state)), torch.tensor(1.0).double(), accumulate=True)
        error = (expected * (1 - expected) * N / count).sqrt()
        assert ((found * N / count - expected).abs() < 5 * error + 1e-9).all()


def test_probabilities_that_depend_on_the_state_are_detected():
    """Negative control of the mixture: choosing the kernel by where the chain is biases it."""
    first, second = matrices()
    weights = torch.tensor([0.9, 0.1, 0.5], dtype=torch.float64)[:, None]
    assert defect(weights * first + (1 - weights) * second) > 1e-3


def test_decisions_are_made_with_the_right_probability():
    log_alpha = torch.tensor([0.5, 0.0, -0.5, -3.0, -torch.inf], dtype=torch.float64).repeat(40000, 1)
    taken = accept(log_alpha, torch.Generator().manual_seed(0)).double().mean(0)
    expected = log_alpha[0].clamp(max=0).exp()
    assert ((taken - expected).abs() <= 5 * (expected * (1 - expected) / 40000).sqrt()).all()


# the released sampler's scheme


def toy():
    """A 3 x 3 chain of a variable x and an auxiliary v: target, weights of v, q(y, w | x).

    Chosen so that the shared scheme occupies x as PUBLISHED_BIAS says, the figures noted for the released sampler.
    """
    propose = np.array(
        [
            [[0.0068, 0.0197, 0.0208], [0.0120, 0.5013, 0.2980], [0.0234, 0.0875, 0.0305]],
            [[0.0032, 0.0656, 0.1710], [0.0952, 0.1003, 0.1154], [0.3234, 0.0879, 0.0380]],
            [[0.0134, 0.0516, 0.1272], [0.0278, 0.2181, 0.1236], [0.0370, 0.1133, 0.2878]],
        ]
    )
    propose /= propose.sum((1, 2), keepdims=True)
    return np.array([0.5, 0.3, 0.2]), np.array([0.631, 0.043, 0.326]), propose


PUBLISHED_BIAS = {
    1: (0.500, 0.300, 0.200),
    2: (0.487, 0.328, 0.185),
    10: (0.512, 0.351, 0.136),
    60: (0.670, 0.235, 0.095),
}


def occupation(batch, *, shared, chain=None):
    """Return the exact long-run distribution of x when B proposals stop at the first acceptance.

    `shared`: one v for the whole batch, drawn when the batch begins, as the released sampler does; otherwise a fresh v for
    each proposal. Recorded is x after every proposal, repeats included.
    """
    target, weights, propose = chain or toy()
    joint = target[:, None] * weights
    accepted = np.zeros((3, 3, 3))  # [x, v, y]
    for x, v, y, w in np.ndindex(3, 3, 3, 3):
        ratio = joint[y, w] * propose[y, x, v] / (joint[x, v] * propose[x, y, w])
        accepted[x, v, y] += propose[x, y, w] * min(1.0, ratio)
    if not shared:
        accepted = np.repeat(np.einsum("v,xvy->xy", weights, accepted)[:, None], 3, axis=1)
    reject = 1 - accepted.sum(-1)
    ends = np.einsum("v,xvy->xy", weights, accepted / (1 - reject)[..., None] * (1 - reject**batch)[..., None])
    step = ends + np.diag(1 - ends.sum(1))
    system = np.vstack([step.T - np.eye(3), np.ones(3)])
    start = np.linalg.lstsq(system, np.array([0, 0, 0, 1.0]), rcond=None)[0]
    repeats = np.einsum("v,xvb->x", weights, np.stack([reject**count for count in range(1, batch + 1)], -1))
    visits = start * repeats + start @ ends
    return visits / visits.sum()


@pytest.mark.parametrize("batch", [1, 2, 3, 10, 60])
def test_fresh_auxiliaries_are_exact_for_every_batch(batch):
    assert np.abs(occupation(batch, shared=False) - toy()[0]).max() < 1e-12


@pytest.mark.parametrize(("batch", "published"), PUBLISHED_BIAS.items())
def test_an_auxiliary_shared_by_a_batch_is_biased_by_the_published_amount(batch, published):
    found = occupation(batch, shared=True)
    assert np.abs(found - published).max() < 6e-4
    assert (np.abs(found - toy()[0]).max() < 1e-12) == (batch == 1)


def test_speculation_needs_positive_numbers():
    with pytest.raises(LongstrideError, match="positive numbers"):
        speculative(log_target, Planned(LOCAL, None), batch=0)
