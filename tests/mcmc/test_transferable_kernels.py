"""Kernels of the transferable flow on a molecule whose internal coordinates are independent: averages by quadrature."""

import functools
import math
from dataclasses import replace

import four_atom_chain
import numpy as np
import openmm
import pytest
import torch
from four_atom_chain import ANGLE, ANGLE_WIDTH, BOND, BOND_WIDTH, KT, SYSTEM
from openmm import app

from longstride.flows.torsion_network import TorsionArchitecture, TorsionNetwork
from longstride.flows.transferable import BoundMolecule, TorsionMoves, TransferableProposal, bind
from longstride.mcmc.metropolis import boltzmann, metropolis, start_chains
from longstride.mcmc.partial import partial_refresh
from longstride.potentials.amber import AmberPotential
from longstride.state import State
from longstride.systems import Prepared


def prepared():
    """Return the chain with its potential as an OpenMM System."""
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


def deviations(kernel, count=500):
    states = molecule().states[torch.arange(count) % len(molecule().states)]
    chains = start_chains(boltzmann(molecule().gaussian.target.potential, KT), State(positions=states))
    return four_atom_chain.deviations(kernel, chains, steps=100, burn_in=30)


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
