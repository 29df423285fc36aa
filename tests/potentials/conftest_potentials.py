"""Molecules and distorted geometries for the tests of potentials."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from openmm import app, unit

from longstride.potentials.amber import AmberPotential
from longstride.stages.bench import thermal_configurations
from longstride.state import State
from longstride.systems import backbone_torsions, prepare_sequence, set_torsion

TEMPERATURE_K = 310.0


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def molecule(sequence: str):
    """A prepared peptide without cutoff; `parametrise` makes variants of its force field."""
    return prepare_sequence(sequence, name=sequence, force_field=("amber14-all.xml", "implicit/obc1.xml"), cutoff_nm=None)


def parametrise(sequence: str, force_field: tuple[str, ...], cutoff: float | None, **options):
    """A fresh OpenMM System of the peptide, free to be changed by a test."""
    method = app.NoCutoff if cutoff is None else app.CutoffNonPeriodic
    extra = {} if cutoff is None else {"nonbondedCutoff": cutoff * unit.nanometer}
    return app.ForceField(*force_field).createSystem(
        molecule(sequence).topology, nonbondedMethod=method, constraints=None, rigidWater=False, **extra, **options
    )


@functools.cache
def distorted(sequence: str, count: int = 6) -> torch.Tensor:
    """Thermal distortions of several backbone conformations without clashes, [count, atom, 3] float64.

    Clashes would drown every other force, and a comparison relative to the largest force would see nothing else.
    """
    made = molecule(sequence)
    exact = AmberPotential.from_openmm(made.openmm_system, made.system, name="amber14-obc1")
    generator = torch.Generator().manual_seed(11)
    tried = 4 * count
    thermal = thermal_configurations(exact, made.positions, count=tried, temperature_K=TEMPERATURE_K, generator=generator)
    torsions = backbone_torsions(made.system)
    angles = (2 * torch.rand(tried, len(torsions), generator=generator) - 1) * torch.pi
    turned = torch.from_numpy(
        np.stack([_turn(made.system, x, torsions, a) for x, a in zip(thermal.numpy(), angles, strict=True)])
    )
    return turned[exact.energy(State(positions=turned)).argsort()[:count]]


def many(sequence: str, count: int) -> torch.Tensor:
    """`distorted`, repeated with a little noise, [count, atom, 3] float64."""
    few = distorted(sequence)
    generator = torch.Generator().manual_seed(12)
    repeated = few.repeat(-(-count // len(few)), 1, 1)[:count]
    return repeated + 1e-3 * torch.randn(repeated.shape, generator=generator, dtype=torch.float64)


def _turn(system, x, torsions, angles):
    for (_, atoms), angle in zip(torsions, angles.tolist(), strict=True):
        x = set_torsion(system, x, atoms, angle)
    return x
