"""Kernels of the transferable flow on a molecule whose internal coordinates are independent: averages by quadrature."""

import functools
import math
from dataclasses import replace

import numpy as np
import openmm
import pytest
import torch
from openmm import app

from longstride.flows.torsion_network import TorsionArchitecture, TorsionNetwork
from longstride.flows.transferable import BoundMolecule, TorsionMoves, TransferableProposal, bind
from longstride.mcmc.metropolis import boltzmann, metropolis, start_chains
from longstride.mcmc.partial import partial_refresh
from longstride.potentials.amber import AmberPotential
from longstride.state import State, System
from longstride.systems import Prepared

KT = 1.0
BOND, BOND_WIDTH = 0.1, 0.012  # soft, so that a dropped b^2 shifts the mean by many standard errors
ANGLE, ANGLE_WIDTH = 1.1, 0.15
SYSTEM = System(
    name="chain",
    atomic_numbers=np.array([6, 6, 6, 8]),
    masses=np.ones(4),
    bonds=np.array([(0, 1), (1, 2), (2, 3)]),
    atom_names=("A", "B", "C", "D"),
    residue_names=("RES",) * 4,
    residue_indices=np.zeros(4, dtype=np.int64),
)


def prepared():
    """U = sum (b-b0)^2/2w^2 + sum (theta-theta0)^2/2w^2 + 1.5 cos(phi) + 0.8 sin(2 phi), in kT."""
    system = openmm.System()
    bonds, angles, torsions = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce(), openmm.PeriodicTorsionForce()
    for _ in range(4):
        system.addParticle(1.0)
    for first in range(3):
        bonds.addBond(first, first + 1, BOND, 1 / BOND_WIDTH**2)
    for first in range(2):
        angles.addAngle(first, first + 1, first + 2, ANGLE, 1 / ANGLE_WIDTH**2)
    torsions.addTorsion(0, 1, 2, 3, 1, 0.0, 1.5)
    torsions.addTorsion(0, 1, 2, 3, 2, math.pi / 2, 0.8)
    for force in (bonds, angles, torsions):
        system.addForce(force)
    x = np.array([[0.0, 0.1, 0.0], [0, 0, 0], [0.1, 0, 0], [0.13, 0.06, 0.07]])
    return Prepared(system=SYSTEM, openmm_system=system, topology=app.Topology(), positions=x, system_hash="", target="chain")


def truth():
    """Return the exact means of b, cos(theta), cos(phi) and sin(phi)."""

    def average(grid, log_p, f):
        p = torch.exp(log_p - log_p.max())
        return ((p * f).sum() / p.sum()).item()

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
def molecule():
    chain = prepared()
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


def deviations(kernel, chains=500, steps=100):
    """Return (mean - truth) / MCSE of each observable, over independent chains, and the acceptance."""
    generator = torch.Generator().manual_seed(2)
    target = molecule().gaussian.target
    state = start_chains(
        boltzmann(target.potential, KT), State(positions=molecule().states[torch.arange(chains) % len(molecule().states)])
    )
    sums, accepted = dict.fromkeys(truth(), 0.0), 0.0
    for step in range(steps + 30):
        state, info = kernel(state, generator)
        if step < 30:
            continue
        accepted += info.accepted.double().mean().item() / steps
        internals = target.zmatrix.from_cartesian(state.state.positions)
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


def flow_kernel(label, kind=TransferableProposal):
    proposal = bind(network(), molecule(), label=label)
    proposal = kind(**{name: getattr(proposal, name) for name in ("network", "molecule", "tokens", "label")})
    return metropolis(boltzmann(molecule().gaussian.target.potential, KT), proposal, propose=proposal.propose)


def moves_kernel(kind=TorsionMoves):
    return metropolis(boltzmann(molecule().gaussian.target.potential, KT), None, propose=kind(molecule=molecule()).propose)


@pytest.mark.parametrize("label", [0, 1])
def test_flow_proposals_are_exact(label):
    found, accepted = deviations(flow_kernel(label))
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

    def propose(self, x, generator):
        y, forward, backward = super().propose(x, generator)
        return y, forward + log_volume(y), backward + log_volume(x)


class NoReverse(TransferableProposal):
    """log q(x | y) dropped."""

    def propose(self, x, generator):
        y, forward, backward = super().propose(x, generator)
        return y, forward, torch.zeros_like(backward)


class MovesWithoutVolume(TorsionMoves):
    """The volume factor left out on both sides."""

    def propose(self, x, generator):
        y, forward, backward = super().propose(x, generator)
        return y, forward + log_volume(y), backward + log_volume(x)


class MovesWithoutReference(TorsionMoves):
    """The autoregression of the latent values taken for a symmetric move."""

    def propose(self, x, generator):
        y, forward, backward = super().propose(x, generator)
        return y, forward * 0, backward * 0


def log_volume(x):
    target = molecule().gaussian.target
    return target.zmatrix.log_measure(target.zmatrix.from_cartesian(x.positions), x.positions)


@pytest.mark.parametrize(
    "broken",
    [
        lambda: flow_kernel(1, NoVolume),
        lambda: flow_kernel(1, NoReverse),
        lambda: moves_kernel(MovesWithoutVolume),
        lambda: moves_kernel(MovesWithoutReference),
    ],
    ids=["no volume", "no reverse", "moves without volume", "moves without reference"],
)
def test_broken_densities_are_detected(broken):
    found, _ = deviations(broken())
    assert max(map(abs, found.values())) > 5, found
