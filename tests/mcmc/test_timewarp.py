"""The Timewarp kernel on a four-atom molecule whose internal coordinates are independent: every average by quadrature."""

import functools
import math

import pytest
import torch

import four_atom_chain
from four_atom_chain import ANGLE, ANGLE_WIDTH, BOND, BOND_WIDTH, KT, SYSTEM, ZMATRIX
from longstride.flows.internal import FlowArchitecture, FlowProposal, InternalFlow
from longstride.flows.zmatrix import Internals
from longstride.mcmc.explore import explore
from longstride.mcmc.metropolis import boltzmann, metropolis, start_chains
from longstride.mcmc.timewarp import timewarp
from longstride.state import State


class Springs:
    """The potential of the chain."""

    system, name = SYSTEM, "springs"

    def energy(self, x):
        internals = ZMATRIX.from_cartesian(x.positions.double())
        bonds = ((internals.bonds - BOND) / BOND_WIDTH).square().sum(-1) / 2
        angles = ((internals.angles - ANGLE) / ANGLE_WIDTH).square().sum(-1) / 2
        phi = internals.dihedrals[:, 0]
        return bonds + angles + 1.5 * phi.cos() + 0.8 * (2 * phi).sin()


@functools.cache
def flow():
    """Return an imperfect flow: right in scale, with random weights everywhere."""
    torch.manual_seed(0)
    network = InternalFlow(ZMATRIX, FlowArchitecture(lags_ps=(1.0,), hidden=8, couplings=2, torsion_components=3))
    noise = torch.Generator().manual_seed(1)
    internals = Internals(
        bonds=1.03 * BOND + BOND_WIDTH * torch.randn(4000, 3, generator=noise, dtype=torch.float64),
        angles=ANGLE + 1.1 * ANGLE_WIDTH * torch.randn(4000, 2, generator=noise, dtype=torch.float64),
        dihedrals=2 * math.pi * (torch.rand(4000, 1, generator=noise, dtype=torch.float64) - 0.5),
    )
    network.set_statistics(internals)
    with torch.no_grad():
        for value in network.transforms.parameters():
            value.add_(0.3 * torch.randn(value.shape, generator=noise))
        network.torsion_network.biases[-1][..., 0] = 2.0  # mostly uniform torsions
    return network


def starts(count):
    internals = Internals(
        bonds=torch.full((count, 3), BOND, dtype=torch.float64),
        angles=torch.full((count, 2), ANGLE, dtype=torch.float64),
        dihedrals=torch.linspace(-3, 3, count, dtype=torch.float64)[:, None],
    )
    return State(positions=ZMATRIX.to_cartesian(internals))


def deviations(kernel, steps=200):
    chains = start_chains(boltzmann(Springs(), KT), starts(600))
    return four_atom_chain.deviations(kernel, chains, steps=steps, burn_in=50)


def test_every_average_of_the_exact_kernel_is_right():
    kernel = timewarp(flow().bound(SYSTEM), Springs(), kT=KT, independent_probability=0.3)
    assert kernel.invariance == "exact"
    found, accepted = deviations(kernel)
    assert accepted > 0.1
    assert max(map(abs, found.values())) < 5, found


class NoMeasure(FlowProposal):
    """Prod b^2 sin(theta) left out: densities of internal instead of Cartesian volume."""

    def sample(self, x, generator):
        y, log_q = super().sample(x, generator)
        return y, log_q + ZMATRIX.log_measure(ZMATRIX.from_cartesian(y.positions), y.positions)

    def log_prob(self, y, x):
        return super().log_prob(y, x) + ZMATRIX.log_measure(ZMATRIX.from_cartesian(y.positions), y.positions)


class NoReverse(FlowProposal):
    """log q(x | y) dropped."""

    def log_prob(self, y, x):
        return torch.zeros_like(super().log_prob(y, x))


class FlippedLogdet(FlowProposal):
    """The log-determinant of the stiff transforms with the wrong sign."""

    def _flipped(self, state, log_q):
        torsions, stiff = self.flow.encode(ZMATRIX.from_cartesian(state.positions))
        z, total = (stiff.double() @ self.flow.whiten.T).float(), 0.0
        with torch.no_grad():
            for transform in self.flow.transforms:
                z, logdet = transform(z, self.flow_context(torsions))
                total = total + logdet.double()
        return log_q - 2 * total

    def flow_context(self, torsions):
        from longstride.flows.internal import torsion_features

        return torsion_features(torsions.float())

    def sample(self, x, generator):
        y, log_q = super().sample(x, generator)
        return y, self._flipped(y, log_q)

    def log_prob(self, y, x):
        return self._flipped(y, super().log_prob(y, x))


@pytest.mark.parametrize("wrong", [NoMeasure, NoReverse, FlippedLogdet])
def test_broken_densities_are_detected(wrong):
    proposal = wrong(flow=flow(), system=SYSTEM, label=1)
    found, _ = deviations(metropolis(boltzmann(Springs(), KT), proposal))
    assert max(map(abs, found.values())) > 5, found


def test_exploration_declares_its_bias_and_is_biased():
    kernel = explore(flow().bound(SYSTEM), Springs(), kT=KT, independent_probability=1.0, max_energy_rise=300.0)
    assert kernel.invariance == "biased"
    found, accepted = deviations(kernel, steps=50)
    assert accepted > 0.9
    assert max(map(abs, found.values())) > 5
