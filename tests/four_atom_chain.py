"""A chain of four atoms whose internal coordinates are independent, so that every average is a quadrature.

U = sum (b - b0)^2 / 2 w_b^2 + sum (theta - theta0)^2 / 2 w_theta^2 + 1.5 cos(phi) + 0.8 sin(2 phi), in kT
"""

import functools
import math

import numpy as np
import openmm
import torch
from openmm import app

from longstride.flows.zmatrix import build_zmatrix
from longstride.state import System
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
ZMATRIX = build_zmatrix(SYSTEM)


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


def deviations(kernel, chains, *, steps, burn_in):
    """Return (mean - truth) / MCSE of each observable, over independent chains, and the acceptance."""
    generator = torch.Generator().manual_seed(2)
    sums, accepted = dict.fromkeys(truth(), 0.0), 0.0
    for step in range(burn_in + steps):
        chains, info = kernel(chains, generator)
        if step < burn_in:
            continue
        accepted += info.accepted.double().mean().item() / steps
        internals = ZMATRIX.from_cartesian(chains.state.positions)
        phi = internals.dihedrals[:, 0]
        sums["bond"] = sums["bond"] + internals.bonds.mean(-1)
        sums["cos_angle"] = sums["cos_angle"] + internals.angles.cos().mean(-1)
        sums["cos_phi"] = sums["cos_phi"] + phi.cos()
        sums["sin_phi"] = sums["sin_phi"] + phi.sin()
    found = {}
    for name, exact in truth().items():
        means = sums[name] / steps
        found[name] = ((means.mean() - exact) / (means.std() / len(means) ** 0.5)).item()
    return found, accepted
