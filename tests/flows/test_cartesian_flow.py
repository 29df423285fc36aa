"""The Cartesian flow: sizes, densities, padding, and exactness of the chain that it drives, each with a negative control."""

import dataclasses
import functools
import math
from typing import ClassVar

import numpy as np
import pytest
import torch

from longstride.errors import DataError
from longstride.flows import cartesian
from longstride.flows.cartesian import (
    PRESETS,
    CartesianArchitecture,
    CartesianFlow,
    CartesianProposal,
    element_indices,
    handedness,
    log_normal,
    to_data,
    to_latent,
)
from longstride.flows.kernel_attention import attention_weights
from longstride.mcmc.metropolis import boltzmann, metropolis, start_chains
from longstride.state import State, System

SMALL = CartesianArchitecture(couplings=4, layers=2, embedding=4, width=12, feed_forward=20, hidden=16, lags_ps=(10.0,))
ATOMS = 5


def make(architecture=SMALL, *, seed=0, dtype=torch.float64):
    """Return a flow with random weights everywhere."""
    torch.manual_seed(seed)
    flow = CartesianFlow(architecture).to(dtype).eval().requires_grad_(requires_grad=False)
    flow.log_scale_positions.fill_(-1.3)
    flow.log_scale_auxiliaries.fill_(0.2)
    return flow


def random_inputs(batch, atoms=ATOMS, *, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x, y, v = (torch.randn(3, batch, atoms, 3, generator=generator, dtype=torch.float64)).unbind()
    elements = torch.randint(0, 5, (batch, atoms), generator=generator)
    return 0.3 * x, 0.3 * x + 0.2 * y, v, elements


@pytest.mark.parametrize(("preset", "parameters"), [("ad", 35_971_282), ("2aa", 106_251_658), ("4aa", 396_370_338)])
def test_presets_have_the_published_number_of_parameters(preset, parameters, monkeypatch):
    for layer in (torch.nn.Linear, torch.nn.Embedding, torch.nn.LayerNorm):
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)
    with torch.device("meta"):
        flow = CartesianFlow(PRESETS[preset])
    assert sum(value.numel() for value in flow.parameters()) == parameters


def test_attention_weights_follow_the_definition():
    x = random_inputs(2)[0]
    lengthscales = torch.tensor([0.1, 0.7], dtype=torch.float64)
    weights = attention_weights(x, lengthscales).unflatten(1, (ATOMS, 2))
    for i in range(ATOMS):
        for h in range(2):
            kernel = torch.exp(-((x[0, i] - x[0]).norm(dim=-1) ** 2) / lengthscales[h] ** 2)
            torch.testing.assert_close(weights[0, i, h], kernel / (kernel.sum() + 1e-5))
    assert ((weights.sum(-1) < 1) & (weights.sum(-1) > 0.99)).all()  # the self term counts, the regulariser shows


@pytest.mark.parametrize("layout", ["plain", "packed"])
def test_inverse_undoes_the_forward_pass_and_both_give_the_same_logdet(layout):
    flow = make()
    networks = flow.networks if layout == "plain" else flow.pack()
    x, y, v, elements = random_inputs(3)
    condition = flow.condition(x, elements)
    z_d, z_v, logdet = to_latent(networks, y - x, v, condition)
    d, v_back, logdet_back = to_data(networks, z_d, z_v, condition)
    assert (z_d - (y - x)).abs().max() > 0.05  # the flow does something
    torch.testing.assert_close(d, y - x)
    torch.testing.assert_close(v_back, v)
    torch.testing.assert_close(logdet_back, logdet)


def test_logdet_agrees_with_autograd_and_a_dropped_layer_is_noticed():
    flow = make()
    x, y, v, elements = random_inputs(1, atoms=3)
    condition = flow.condition(x, elements)

    def flat(u):
        d, w = u.view(2, 1, 3, 3)
        z_d, z_v, _ = to_latent(flow.networks, d, w, condition)
        return torch.stack([z_d, z_v]).flatten()

    jacobian = torch.autograd.functional.jacobian(flat, torch.stack([y - x, v]).flatten())
    truth = torch.linalg.slogdet(jacobian)[1]
    logdet = to_latent(flow.networks, y - x, v, condition)[2]
    torch.testing.assert_close(logdet[0], truth)
    short = to_latent(flow.networks[:-1], y - x, v, condition)[2]
    assert (short[0] - truth).abs() > 1e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_log_q_of_sampling_is_log_q_of_the_density_pass(dtype, tolerance):
    proposal = bound(make(dtype=dtype))
    x = State(positions=random_inputs(6)[0])
    y, log_q = proposal.sample(x, torch.Generator().manual_seed(3))
    again = proposal.log_prob(y, x)
    assert log_q.std() > 0.5
    torch.testing.assert_close(log_q, again, rtol=0, atol=tolerance)
    flipped = again - 2 * to_latent(proposal.networks, *latent_inputs(proposal, x, y))[2]
    assert (log_q - flipped).abs().max() > 0.1  # a log-determinant of the wrong sign


def latent_inputs(proposal, x, y):
    condition = proposal.flow.condition(x.positions, proposal.elements)
    dtype = proposal.flow.embedding.weight.dtype
    return (y.positions - x.positions).to(dtype), y.velocities.to(dtype), condition


def molecule(atoms=ATOMS):
    return System(
        name="toy",
        atomic_numbers=np.array([6, 1, 7, 8, 16])[np.arange(atoms) % 5],
        masses=np.ones(atoms),
        bonds=np.zeros((0, 2), dtype=np.int64),
        atom_names=("X",) * atoms,
        residue_names=("RES",) * atoms,
        residue_indices=np.zeros(atoms, dtype=np.int64),
    )


def bound(flow, atoms=ATOMS):
    return flow.bind(molecule(atoms))


def test_packed_networks_agree_with_plain_ones_in_single_precision():
    flow = make(dtype=torch.float32)
    x, y, v, elements = random_inputs(4)
    condition = flow.condition(x, elements)
    torch.testing.assert_close(flow.log_prob(y, v, condition, flow.pack()), flow.log_prob(y, v, condition), rtol=0, atol=1e-4)


def test_translations_and_relabelling_change_nothing_but_rotations_do():
    flow = make()
    x, y, v, elements = random_inputs(3)
    log_q = flow.log_prob(y, v, flow.condition(x, elements))
    shift = torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(flow.log_prob(y + shift, v, flow.condition(x + shift, elements)), log_q)
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(flow.log_prob(y[:, order], v[:, order], flow.condition(x[:, order], elements[:, order])), log_q)
    turned = [value.flip(-1) for value in (x, y)]  # a rotation and a reflection
    assert (flow.log_prob(turned[1], v, flow.condition(turned[0], elements)) - log_q).abs().max() > 1e-3


def padded(sizes, *, fill):
    """Return molecules of different sizes, alone and padded into one batch with `fill` in the padding."""
    alone = [tuple(value[0] for value in random_inputs(1, atoms=size, seed=size)) for size in sizes]
    most = max(sizes)
    mask = torch.arange(most) < torch.tensor(sizes)[:, None]
    together = []
    for index in range(3):
        value = torch.full((len(sizes), most, 3), fill, dtype=torch.float64)
        for row, inputs in enumerate(alone):
            value[row, : sizes[row]] = inputs[index]
        together.append(value)
    elements = torch.full((len(sizes), most), 4)
    for row, inputs in enumerate(alone):
        elements[row, : sizes[row]] = inputs[3]
    return alone, (*together, elements, mask)


@pytest.mark.parametrize("fill", [0.0, 1.0, math.nan, 1e30])
@pytest.mark.parametrize("layout", ["plain", "packed"])
def test_padding_changes_nothing(fill, layout):
    flow = make()
    sizes = (5, 3, 7)
    alone, (x, y, v, elements, mask) = padded(sizes, fill=fill)
    batched = flow.log_prob(y, v, flow.condition(x, elements, mask), flow.pack() if layout == "packed" else None)
    for row, (x_i, y_i, v_i, elements_i) in enumerate(alone):
        single = flow.log_prob(y_i[None], v_i[None], flow.condition(x_i[None], elements_i[None]))
        torch.testing.assert_close(batched[row], single[0])


@pytest.mark.parametrize("broken", ["attention", "base", "logdet", "centring"])
def test_a_forgotten_mask_is_noticed(broken, monkeypatch):
    flow = make()
    alone, (x, y, v, elements, mask) = padded((5, 3), fill=0.4)
    truth = flow.log_prob(alone[1][1][None], alone[1][2][None], flow.condition(alone[1][0][None], alone[1][3][None]))[0]
    networks = None
    if broken == "attention":
        monkeypatch.setattr(cartesian, "attention_weights", lambda x, lengthscales, mask: attention_weights(x, lengthscales))
    if broken == "base":
        monkeypatch.setattr(cartesian, "log_normal", lambda value, mask, log_scale: log_normal(value, None, log_scale))
    condition = flow.condition(x, elements, mask)
    if broken == "logdet":
        networks = flow.networks
        monkeypatch.setattr(cartesian, "_coefficients", lambda net, kept, c: net(torch.cat([c.context, kept], -1), c.weights))
    if broken == "centring":
        condition = flow.condition(x + 1.0, elements, mask)
        plain = flow.condition(torch.where(mask[..., None], x + 1.0, 0.0), elements)
        condition = cartesian.Condition(x=condition.x, context=plain.context, weights=plain.weights * mask[:, None], mask=mask)
        y = y + 1.0
    assert (flow.log_prob(y, v, condition, networks)[1] - truth).abs() > 1e-3


def test_sampling_with_padding_scores_what_it_draws():
    flow = make()
    _, (x, _, _, elements, mask) = padded((5, 3, 7), fill=math.nan)
    condition = flow.condition(x, elements, mask)
    y, v, log_q = flow.sample(condition, torch.Generator().manual_seed(1))
    assert y.isfinite().all()
    torch.testing.assert_close(flow.log_prob(y, v, condition), log_q)


@pytest.mark.parametrize("rows", [1024, 40, 15])  # all chains in one block, one chain a block, a chain in several blocks
def test_many_proposals_from_one_x_are_scored_as_single_ones(rows, monkeypatch):
    monkeypatch.setattr(cartesian, "BLOCK_ROWS", rows)
    proposal = Recording(**fields(bound(make())))
    x = State(positions=random_inputs(2)[0])
    proposal.drawn.clear()
    y, forward, backward = proposal.propose_many(x, 7, torch.Generator().manual_seed(5))
    assert y.positions.shape == (14, ATOMS, 3)
    assert len(torch.unique(y.positions[:, 0, 0])) == 14
    v_y, v_x = (torch.cat(values) for values in zip(*proposal.drawn, strict=True))
    assert len(torch.unique(v_y[:, 0, 0])) == len(torch.unique(v_x[:, 0, 0])) == 14
    for row in range(14):
        here, there = State(positions=x.positions[row // 7 :][:1]), State(positions=y.positions[row : row + 1])
        ahead = proposal.log_prob(State(positions=there.positions, velocities=v_y[row : row + 1]), here)
        back = proposal.log_prob(State(positions=here.positions, velocities=v_x[row : row + 1]), there)
        torch.testing.assert_close(forward[row : row + 1], ahead - log_normal(v_y[row : row + 1]))
        torch.testing.assert_close(backward[row : row + 1], back - log_normal(v_x[row : row + 1]))


class Recording(CartesianProposal):
    """Keeps the auxiliaries that it drew, of y and of x."""

    drawn: ClassVar[list] = []

    def _sample(self, x, generator, *, count=1):
        found = super()._sample(x, generator, count=count)
        self.drawn.append([found[1]])
        return found

    def _log_prob(self, y, v, x):
        if len(self.drawn[-1:]) and len(self.drawn[-1]) == 1:
            self.drawn[-1].append(v)
        return super()._log_prob(y, v, x)


def test_unknown_elements_and_missing_auxiliaries_are_one_clear_line():
    with pytest.raises(DataError, match="atomic number 15"):
        element_indices(np.array([6, 15, 1]))
    proposal = bound(make())
    x = State(positions=random_inputs(2)[0])
    with pytest.raises(DataError, match="auxiliaries"):
        proposal.log_prob(x, x)


# Exactness: three atoms in an anisotropic Gaussian trap, so that mean and variance of every coordinate are known.
TRAP = torch.tensor([[0.0, 0.0, 0.0], [0.3, 0.0, 0.0], [0.0, 0.4, 0.1]], dtype=torch.float64)
WIDTH = torch.tensor([[0.2, 0.15, 0.25], [0.18, 0.2, 0.15], [0.25, 0.15, 0.2]], dtype=torch.float64)


class Trap:
    """U = sum (x - a)^2 / 2 w^2, in kT."""

    system, name = molecule(3), "trap"

    def energy(self, x):
        return ((x.positions - TRAP) / WIDTH).square().sum((1, 2)) / 2


@functools.cache
def trap_flow():
    """Return a flow whose proposals are about right in size, biased towards nowhere, and depend strongly on x and v."""
    sizes = {"couplings": 4, "layers": 1, "embedding": 2, "width": 8, "feed_forward": 8, "hidden": 8}
    flow = make(CartesianArchitecture(**sizes, lengthscales_nm=(0.2, 0.5)), seed=4)
    for index, coupling in enumerate(flow.couplings):
        for network, spread in ((coupling.scale, (0.3, 0.8)), (coupling.shift, (0.08, 1.0))):
            network.leave[2].weight.mul_(spread[index % 2])
            network.leave[2].bias.zero_()
    flow.log_scale_positions.fill_(math.log(0.07))
    flow.log_scale_auxiliaries.fill_(0.0)
    return flow


def deviations(proposal, *, chains=800, steps=60, burn_in=20):
    """Return the largest |mean - truth| / MCSE over first and second moments, and the acceptance."""
    generator = torch.Generator().manual_seed(6)
    noise = torch.randn(chains, 3, 3, generator=generator, dtype=torch.float64)
    kernel = metropolis(boltzmann(Trap(), 1.0), proposal, propose=proposal.propose)
    state = start_chains(boltzmann(Trap(), 1.0), State(positions=TRAP + WIDTH * noise))
    first, second, accepted = 0.0, 0.0, 0.0
    for step in range(burn_in + steps):
        state, info = kernel(state, generator)
        if step >= burn_in:
            scaled = (state.state.positions - TRAP) / WIDTH
            first, second = first + scaled / steps, second + scaled.square() / steps
            accepted += info.accepted.double().mean().item() / steps
    scores = [(value.mean(0) - truth) / (value.std(0) / chains**0.5) for value, truth in ((first, 0.0), (second, 1.0))]
    return torch.stack(scores).abs().max().item(), accepted


def test_the_chain_keeps_a_gaussian_target():
    worst, accepted = deviations(trap_flow().bind(molecule(3)))
    assert accepted > 0.08
    assert worst < 5


def fields(proposal):
    return {field.name: getattr(proposal, field.name) for field in dataclasses.fields(proposal)}


class NoAuxiliaryTerm(CartesianProposal):
    """log N(v_x) - log N(v_y) left out of the ratio."""

    def _propose(self, x, generator, *, count=1):
        y, v_y, forward = self._sample(x, generator)
        v_x = torch.randn(v_y.shape, generator=generator, dtype=v_y.dtype)
        return y, forward, self._log_prob(x, v_x, y)


class FrozenAuxiliary(CartesianProposal):
    """The same v_x for every proposal instead of a fresh one."""

    def _propose(self, x, generator, *, count=1):
        y, v_y, forward = self._sample(x, generator)
        v_x = torch.zeros_like(v_y)
        return y, forward - log_normal(v_y), self._log_prob(x, v_x, y) - log_normal(v_x)


class WrongDirection(CartesianProposal):
    """log q(y, v_x | x) in place of log q(x, v_x | y)."""

    def _propose(self, x, generator, *, count=1):
        y, v_y, forward = self._sample(x, generator)
        v_x = torch.randn(v_y.shape, generator=generator, dtype=v_y.dtype)
        return y, forward - log_normal(v_y), self._log_prob(y, v_x, x) - log_normal(v_x)


@pytest.mark.parametrize(
    ("wrong", "chains"),
    [(NoAuxiliaryTerm, 400), (WrongDirection, 400), pytest.param(FrozenAuxiliary, 1600, marks=pytest.mark.slow)],
)
def test_a_broken_ratio_is_detected(wrong, chains):
    exact = trap_flow().bind(molecule(3))
    assert deviations(wrong(**fields(exact)), chains=chains)[0] > 5


class SometimesNaN(CartesianProposal):
    """Every third draw is not a number."""

    def _propose(self, x, generator, *, count=1):
        y, forward, backward = super()._propose(x, generator, count=count)
        bad = torch.arange(len(y)) % 3 == 0
        return torch.where(bad[:, None, None], torch.nan, y), torch.where(bad, torch.nan, forward), backward


def test_a_proposal_that_is_not_a_number_is_rejected_and_the_state_repeated():
    exact = trap_flow().bind(molecule(3))
    proposal = SometimesNaN(**fields(exact))
    kernel = metropolis(boltzmann(Trap(), 1.0), proposal, propose=proposal.propose)
    before = start_chains(boltzmann(Trap(), 1.0), State(positions=TRAP.repeat(90, 1, 1)))
    after, info = kernel(before, torch.Generator().manual_seed(0))
    assert info.accepted.any()
    assert not info.accepted[::3].any()
    assert torch.equal(after.state.positions[::3], before.state.positions[::3])
    assert after.state.positions.isfinite().all()


def test_mirror_images_of_a_centre_are_invalid_draws(alanine):
    torch.manual_seed(0)
    flow = CartesianFlow(SMALL).eval().requires_grad_(requires_grad=False)
    proposal = flow.bind(alanine.system)
    names = np.array(alanine.system.atom_names)
    assert names[proposal.centres[:, 0].numpy()].tolist() == ["CA"]
    x = torch.from_numpy(alanine.positions)[None]
    mirrored = x * torch.tensor([1.0, 1.0, -1.0])
    assert handedness(x, proposal.centres) != handedness(mirrored, proposal.centres)
    turned = x[..., [1, 2, 0]] + 0.3  # a rotation and a translation
    assert handedness(x, proposal.centres) == handedness(turned, proposal.centres)
    v = torch.zeros_like(x)
    here = State(positions=x)
    assert proposal.log_prob(State(positions=turned, velocities=v), here).isfinite()
    assert proposal.log_prob(State(positions=mirrored, velocities=v), here) == -torch.inf
    # this untrained flow draws clouds, half of which are inverted
    y, log_q = proposal.sample(State(positions=x.repeat(64, 1, 1)), torch.Generator().manual_seed(0))
    same = (handedness(y.positions, proposal.centres) == handedness(x, proposal.centres))[:, 0]
    assert 0 < same.sum() < 64
    assert torch.equal(log_q.isfinite(), same)
