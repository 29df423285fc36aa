import pytest
import torch

from longstride.errors import DataError, LongstrideError
from longstride.mcmc.explore import filtered
from longstride.mcmc.kernel import ChainState, cycle, mixture
from longstride.mcmc.metropolis import metropolis, start_chains
from longstride.state import State

TARGET = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
FORWARD = torch.tensor(
    [[0.1, 0.6, 0.2, 0.1], [0.25, 0.25, 0.4, 0.1], [0.7, 0.1, 0.1, 0.1], [0.3, 0.3, 0.2, 0.2]], dtype=torch.float64
)


def at(sites):
    """Return a State whose first coordinate is the site of each chain."""
    positions = torch.zeros(len(sites), 1, 3, dtype=torch.float64)
    positions[:, 0, 0] = sites
    return State(positions=positions)


def site(state):
    return state.positions[:, 0, 0].long()


def log_target(state):
    return TARGET[site(state)].log()


class Table:
    """q(j | i) from a matrix; `planned` fixes the next proposals, so that a kernel can be enumerated."""

    def __init__(self, matrix, planned=None):
        self.matrix, self.planned = matrix, planned

    def sample(self, x, generator):
        rows = self.matrix[site(x)]
        drawn = torch.multinomial(rows, 1, generator=generator)[:, 0] if self.planned is None else self.planned
        return at(drawn), rows.gather(1, drawn[:, None])[:, 0].log()

    def log_prob(self, y, x):
        return self.matrix[site(x), site(y)].log()


class Forgetful(Table):
    """The negative control: log q(x | y) dropped."""

    def log_prob(self, y, x):
        return torch.zeros(len(y.positions), dtype=torch.float64)


class Mirrored(Table):
    """Another negative control: the forward density has the wrong sign, as after a flipped log-determinant."""

    def sample(self, x, generator):
        y, log_q = super().sample(x, generator)
        return y, -log_q


def transition_matrix(kind, batch):
    """Enumerate the kernel: every (i, j) pair, `batch` chains at a time, from its own acceptance ratios."""
    n = len(TARGET)
    pairs = [(i, j) for i in range(n) for j in range(n)]
    matrix = torch.zeros(n, n, dtype=torch.float64)
    for start in range(0, len(pairs), batch):
        i, j = torch.tensor(pairs[start : start + batch]).T
        proposal = kind(FORWARD, planned=j)
        chains = start_chains(log_target, at(i))
        _, info = metropolis(log_target, proposal)(chains, torch.Generator().manual_seed(0))
        matrix[i, j] = FORWARD[i, j] * info.log_alpha.clamp(max=0).exp()
    matrix.fill_diagonal_(0)
    return matrix + torch.diag(1 - matrix.sum(1))


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_the_enumerated_kernel_is_invariant_and_reversible(batch):
    matrix = transition_matrix(Table, batch)
    assert torch.allclose(TARGET @ matrix, TARGET, atol=1e-14)
    flow = TARGET[:, None] * matrix
    assert torch.allclose(flow, flow.T, atol=1e-14)


@pytest.mark.parametrize("wrong", [Forgetful, Mirrored])
def test_a_wrong_density_is_detected(wrong):
    matrix = transition_matrix(wrong, 16)
    assert (TARGET @ matrix - TARGET).abs().max() > 1e-2


@pytest.mark.parametrize("batch", [4, 64])
def test_drawn_transitions_follow_the_enumerated_matrix(batch):
    matrix = transition_matrix(Table, 16)
    generator = torch.Generator().manual_seed(1)
    kernel = metropolis(log_target, Table(FORWARD))
    counts = torch.zeros(4, 4, dtype=torch.float64)
    start = torch.arange(4).repeat(batch // 4)
    for _ in range(4000 if batch == 64 else 2000):
        chains, _ = kernel(start_chains(log_target, at(start)), generator)
        counts.index_put_((start, site(chains.state)), torch.ones(batch, dtype=torch.float64), accumulate=True)
    trials = counts.sum(1, keepdim=True)
    error = (matrix * (1 - matrix) / trials).sqrt()
    assert ((counts / trials - matrix).abs() < 5 * error + 1e-9).all()


class Drift:
    """y = x/2 + 1 + 1.2 noise: far from symmetric, so that the Hastings factor matters."""

    scale = 1.2

    def sample(self, x, generator):
        noise = torch.randn(x.positions.shape, generator=generator, dtype=torch.float64)
        y = State(positions=0.5 * x.positions + 1.0 + self.scale * noise)
        return y, self.log_prob(y, x)

    def log_prob(self, y, x):
        z = (y.positions - 0.5 * x.positions - 1.0) / self.scale
        return -0.5 * z.square().sum((1, 2))


class DriftForgetful(Drift):
    def log_prob(self, y, x):
        return torch.zeros(len(y.positions), dtype=torch.float64)


def gaussian(x):
    return -0.5 * x.positions.square().sum((1, 2))


def double_well(x):
    q = x.positions[:, 0, 0]
    return -4 * (q.square() - 1).square() - 0.7 * q - 0.5 * x.positions[:, 0, 1:].square().sum(-1)


def well_mean():
    q = torch.linspace(-4, 4, 40001, dtype=torch.float64)
    p = torch.exp(-4 * (q.square() - 1).square() - 0.7 * q)
    return ((p * q).sum() / p.sum()).item()


def chain_means(log_density, proposal, seed=0, chains=400, steps=500):
    """Return the mean of the first coordinate per chain after a burn-in."""
    kernel = metropolis(log_density, proposal)
    generator = torch.Generator().manual_seed(seed)
    state = start_chains(log_density, State(positions=torch.zeros(chains, 1, 3, dtype=torch.float64)))
    total = torch.zeros(chains, dtype=torch.float64)
    for step in range(steps + 100):
        state, _ = kernel(state, generator)
        if step >= 100:
            total += state.state.positions[:, 0, 0]
    return total / steps


@pytest.mark.parametrize(("density", "mean"), [(gaussian, 0.0), (double_well, well_mean())])
def test_long_chains_have_the_target_s_mean(density, mean):
    means = chain_means(density, Drift())
    mcse = means.std() / len(means) ** 0.5
    assert abs(means.mean() - mean) < 5 * mcse
    wrong = chain_means(density, DriftForgetful())
    assert abs(wrong.mean() - mean) > 5 * wrong.std() / len(wrong) ** 0.5  # negative control


class Broken(Table):
    """Every proposal to site 3 is invalid."""

    def sample(self, x, generator):
        y, log_q = super().sample(x, generator)
        return y, torch.where(site(y) == 3, torch.nan, log_q)


def test_invalid_proposals_and_energies_are_rejections():
    def overflowing(state):
        return torch.where(site(state) == 2, torch.nan, log_target(state))

    chains = start_chains(log_target, at(torch.zeros(2000)))
    for density, proposal, never in ((log_target, Broken(FORWARD), 3), (overflowing, Table(FORWARD), 2)):
        moved, info = metropolis(density, proposal)(chains, torch.Generator().manual_seed(0))
        assert not (site(moved.state) == never).any()
        assert moved.log_density.isfinite().all()
        assert torch.equal(site(moved.state)[~info.accepted], site(chains.state)[~info.accepted])
    with pytest.raises(DataError, match="no finite energy"):
        start_chains(overflowing, at(torch.full((3,), 2.0)))


def test_mixtures_and_cycles_keep_the_target_and_declare_the_weakest_invariance():
    exact = metropolis(log_target, Table(FORWARD), label="a")
    other = metropolis(log_target, Table(torch.full((4, 4), 0.25, dtype=torch.float64)), label="b")
    biased = filtered(log_target, Table(FORWARD), max_drop=1.0, label="c")
    assert mixture([exact, other], [0.3, 0.7]).invariance == "exact"
    assert mixture([exact, biased], [0.3, 0.7]).invariance == "biased"
    assert cycle(exact, biased).invariance == "biased"
    generator = torch.Generator().manual_seed(0)
    start = torch.multinomial(TARGET, 4000, replacement=True, generator=generator)
    for kernel in (mixture([exact, other], [0.3, 0.7]), cycle(exact, other)):
        chains, seen, counts = start_chains(log_target, at(start)), set(), torch.zeros(4, dtype=torch.float64)
        for _ in range(20):
            chains, info = kernel(chains, generator)
            seen.update(part.label for part in info.parts or (info,))
        counts = torch.bincount(site(chains.state), minlength=4) / 4000
        assert ((counts - TARGET).abs() < 5 * (TARGET * (1 - TARGET) / 4000).sqrt()).all()
        assert seen == set(kernel.labels)
    with pytest.raises(LongstrideError, match="sum to 1"):
        mixture([exact, other], [0.5, 0.6])


def test_exploration_refuses_what_falls_too_far():
    kernel = filtered(log_target, Table(FORWARD), max_drop=1.0, label="x")
    chains, _ = kernel(start_chains(log_target, at(torch.zeros(500))), torch.Generator().manual_seed(0))
    assert set(site(chains.state).tolist()) <= {0, 1}  # log(0.15/0.5) is below -1
    assert isinstance(chains, ChainState)
