"""Kernels of the transferable flow on a molecule whose internal coordinates are independent: averages by quadrature."""

import functools
from dataclasses import replace

import pytest
import torch

import four_atom_chain
from four_atom_chain import KT
from longstride.flows.torsion_network import TorsionArchitecture, TorsionNetwork
from longstride.flows.transferable import BoundMolecule, TorsionMoves, TransferableProposal, bind, bind_all
from longstride.mcmc.metropolis import boltzmann, metropolis, start_chains
from longstride.mcmc.partial import partial_refresh
from longstride.mcmc.timewarp import MOVES, timewarp
from longstride.potentials.amber import AmberPotential
from longstride.stages.chains import peptide_kernel
from longstride.state import State


@functools.cache
def molecule():
    chain = four_atom_chain.prepared()
    potential = AmberPotential.from_openmm(chain.openmm_system, chain.system, name="chain", dtype=torch.float64)
    found = BoundMolecule.of(chain, potential, kT=KT, fitted_states=30)
    # an imperfect density of the stiff coordinates: wrong centre, wrong widths
    gaussian = replace(found.gaussian, centre=found.gaussian.centre * 1.02, lower=found.gaussian.lower * 1.15)
    return replace(found, gaussian=gaussian)


@functools.cache
def network():
    torch.manual_seed(0)
    model = TorsionNetwork(TorsionArchitecture(lags_ps=(1.0,), width=16, heads=2, layers=1, message_rounds=1, components=3))
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.2 * torch.randn(value.shape))
        model.out.bias[0] = 3.0  # mostly uniform torsions
    return model.eval().requires_grad_(requires_grad=False)


def deviations(kernel, count=500):
    states = molecule().states[torch.arange(count) % len(molecule().states)]
    chains = start_chains(boltzmann(molecule().gaussian.target.potential, KT), State(positions=states))
    return four_atom_chain.deviations(kernel, chains, steps=100, burn_in=30)


def flow_kernel(label, kind=TransferableProposal):
    proposal = bind(network(), molecule(), label=label)
    proposal = kind(**{name: getattr(proposal, name) for name in ("network", "molecule", "tokens", "label")})
    return metropolis(boltzmann(molecule().gaussian.target.potential, KT), proposal)


def moves_kernel(kind=TorsionMoves):
    return metropolis(boltzmann(molecule().gaussian.target.potential, KT), kind(molecule=molecule()))


@pytest.mark.parametrize("label", [0, 1])
def test_flow_proposals_are_exact(label):
    found, accepted = deviations(flow_kernel(label))
    assert accepted > 0.1
    assert max(map(abs, found.values())) < 5, found


@pytest.mark.parametrize("batch", [1, 2])
def test_labels_mixed_with_torsion_moves_are_exact(batch):
    potential = molecule().gaussian.target.potential
    options = {"kT": KT, "independent_probability": 0.3, "moves_probability": 0.3, "batch": batch}
    kernel = timewarp(bind_all(network(), molecule()), potential, **options)
    assert set(kernel.labels) == {"1 ps", "independent", MOVES}
    assert kernel.invariance == "exact"
    found, accepted = deviations(kernel)
    assert accepted > 0.1
    assert max(map(abs, found.values())) < 5, found


def test_chains_of_a_flow_with_a_lag_are_exact():
    log_density = boltzmann(molecule().gaussian.target.potential, KT)
    kernel = peptide_kernel(molecule(), network(), log_density, flow_probability=0.6)
    assert set(kernel.labels) == {"1 ps", "independent", MOVES}
    found, accepted = deviations(kernel)
    assert accepted > 0.1
    assert max(map(abs, found.values())) < 5, found


def test_torsion_moves_are_exact():
    found, accepted = deviations(moves_kernel())
    assert accepted > 0.1
    assert max(map(abs, found.values())) < 5, found


@pytest.mark.parametrize("correlation", [0.5, 0.95])
def test_flow_proposals_that_keep_latent_noise_are_exact(correlation):
    proposal = bind(network(), molecule(), label=1)
    log_density = boltzmann(molecule().gaussian.target.potential, KT)
    found, accepted = deviations(partial_refresh(log_density, proposal, correlation=correlation))
    assert accepted > 0.1
    assert max(map(abs, found.values())) < 5, found


class NoVolume(TransferableProposal):
    """The volume factor left out on both sides."""

    def propose_noted(self, x, notes, generator):
        drawn = super().propose_noted(x, notes, generator)
        return replace(
            drawn, log_forward=drawn.log_forward + log_volume(drawn.y), log_backward=drawn.log_backward + log_volume(x)
        )


class NoReverse(TransferableProposal):
    """log q(x | y) dropped."""

    def propose_noted(self, x, notes, generator):
        drawn = super().propose_noted(x, notes, generator)
        return replace(drawn, log_backward=torch.zeros_like(drawn.log_backward))


class ReverseOfAnotherLabel(TransferableProposal):
    """log q(x | y) of another label than the one that drew y."""

    def propose_noted(self, x, notes, generator):
        drawn = super().propose_noted(x, notes, generator)
        return replace(drawn, log_backward=replace(self, label=1 - self.label).log_prob(x, drawn.y))


class StaleNotes(TransferableProposal):
    """Notes on y that are those on x."""

    def propose_noted(self, x, notes, generator):
        drawn = super().propose_noted(x, notes, generator)
        return replace(drawn, at_y=drawn.at_x)


class MovesWithoutVolume(TorsionMoves):
    """The volume factor left out on both sides."""

    def propose_noted(self, x, notes, generator):
        drawn = super().propose_noted(x, notes, generator)
        return replace(
            drawn, log_forward=drawn.log_forward + log_volume(drawn.y), log_backward=drawn.log_backward + log_volume(x)
        )


class MovesWithoutReference(TorsionMoves):
    """The autoregression of the latent values taken for a symmetric move."""

    def propose_noted(self, x, notes, generator):
        drawn = super().propose_noted(x, notes, generator)
        return replace(drawn, log_forward=drawn.log_forward * 0, log_backward=drawn.log_backward * 0)


def log_volume(x):
    target = molecule().gaussian.target
    return target.zmatrix.log_measure(target.zmatrix.from_cartesian(x.positions), x.positions)


@pytest.mark.parametrize(
    "broken",
    [
        lambda: flow_kernel(1, NoVolume),
        lambda: flow_kernel(1, NoReverse),
        lambda: flow_kernel(0, ReverseOfAnotherLabel),
        lambda: flow_kernel(1, StaleNotes),
        lambda: moves_kernel(MovesWithoutVolume),
        lambda: moves_kernel(MovesWithoutReference),
    ],
    ids=[
        "no volume",
        "no reverse",
        "reverse of another label",
        "stale notes",
        "moves without volume",
        "moves without reference",
    ],
)
def test_broken_densities_are_detected(broken):
    found, _ = deviations(broken())
    assert max(map(abs, found.values())) > 5, found


def test_notes_agree_with_a_fresh_analysis():
    """Along a mixed chain what travels with it is what its positions give; another molecule's notes are not read."""
    log_density = boltzmann(molecule().gaussian.target.potential, KT)
    kernel = peptide_kernel(molecule(), network(), log_density, flow_probability=0.6)
    chains = start_chains(log_density, State(positions=molecule().states[:8]))
    generator = torch.Generator().manual_seed(3)
    named = set()
    for _ in range(30):
        chains, _ = kernel(chains, generator)
        values = chains.notes.of(molecule())
        fresh = molecule().encode(chains.state.positions)
        for name in ("torsions", "latent", "log_stiff"):
            assert torch.allclose(values[name], getattr(fresh, name), atol=1e-8), name
        named |= set(values)
        for name in set(values) - {"torsions", "latent", "log_stiff"}:
            independent = bind(network(), molecule(), label=1).log_prob(chains.state, chains.state) - fresh.log_stiff
            assert torch.allclose(values[name], independent, atol=1e-4), name
    assert len(named) == 4
    assert not chains.notes.of(replace(molecule()))
