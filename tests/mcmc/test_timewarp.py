"""The Timewarp kernel on a four-atom molecule whose internal coordinates are independent: every average by quadrature."""

import functools
import math

import numpy as np
import pytest
import torch

from longstride.flows.internal import FlowArchitecture, FlowProposal, InternalFlow
from longstride.flows.zmatrix import Internals, build_zmatrix
from longstride.mcmc.explore import explore
from longstride.mcmc.metropolis import boltzmann, metropolis, start_chains
from longstride.mcmc.timewarp import timewarp
from longstride.state import State, System

KT = 1.0
BOND, BOND_WIDTH = 0.1, 0.012  # soft, so that a dropped b^2 shifts the mean by many standard errors
ANGLE, ANGLE_WIDTH = 1.1, 0.15
SYSTEM = System(
    name="chain",
    atomic_numbers=np.array([6, 6, 6, 6]),
    masses=np.ones(4),
    bonds=np.array([(0, 1), (1, 2), (2, 3)]),
    atom_names=("A", "B", "C", "D"),
    residue_names=("RES",) * 4,
    residue_indices=np.zeros(4, dtype=np.int64),
)
ZMATRIX = build_zmatrix(SYSTEM)


class Springs:
    """U = sum (b-b0)^2/2w^2 + sum (theta-theta0)^2/2w^2 + 1.5 cos(phi) + 0.8 sin(2 phi), in kT."""

    system, name = SYSTEM, "springs"

    def energy(self, x):
        internals = ZMATRIX.from_cartesian(x.positions.double())
        bonds = ((internals.bonds - BOND) / BOND_WIDTH).square().sum(-1) / 2
        angles = ((internals.angles - ANGLE) / ANGLE_WIDTH).square().sum(-1) / 2
        phi = internals.dihedrals[:, 0]
        return bonds + angles + 1.5 * phi.cos() + 0.8 * (2 * phi).sin()


def average(grid, log_p, f):
    p = torch.exp(log_p - log_p.max())
    return ((p * f).sum() / p.sum()).item()


def truth():
    """Return the exact means of b, cos(theta), cos(phi) and sin(phi)."""
    b = torch.linspace(0.02, 0.2, 20001, dtype=torch.float64)
    theta = torch.linspace(1e-3, math.pi - 1e-3, 20001, dtype=torch.float64)
    phi = torch.linspace(-math.pi, math.pi, 20001, dtype=torch.float64)[:-1]
    log_phi = -1.5 * phi.cos() - 0.8 * (2 * phi).sin()
    return {
        "bond": average(b, -(((b - BOND) / BOND_WIDTH).square()) / 2 + 2 * b.log(), b),
        "cos_angle": average(theta, -(((theta - ANGLE) / ANGLE_WIDTH).square()) / 2 + theta.sin().log(), theta.cos()),
        "cos_phi": average(phi, log_phi, phi.cos()),
        "sin_phi": average(phi, log_phi, phi.sin()),
    }


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


def deviations(kernel, chains=600, steps=200):
    """Return (mean - truth) / MCSE of each observable, over independent chains."""
    generator = torch.Generator().manual_seed(2)
    state = start_chains(boltzmann(Springs(), KT), starts(chains))
    sums = dict.fromkeys(truth(), 0.0)
    accepted = 0.0
    for step in range(steps + 50):
        state, info = kernel(state, generator)
        if step < 50:
            continue
        accepted += info.accepted.double().mean().item() / steps
        internals = ZMATRIX.from_cartesian(state.state.positions)
        phi = internals.dihedrals[:, 0]
        sums["bond"] = sums["bond"] + internals.bonds.mean(-1)
        sums["cos_angle"] = sums["cos_angle"] + internals.angles.cos().mean(-1)
        sums["cos_phi"] = sums["cos_phi"] + phi.cos()
        sums["sin_phi"] = sums["sin_phi"] + phi.sin()
    found = {}
    for name, exact in truth().items():
        means = sums[name] / steps
        found[name] = ((means.mean() - exact) / (means.std() / chains**0.5)).item()
    return found, accepted


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
