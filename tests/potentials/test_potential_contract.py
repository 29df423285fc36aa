"""Every potential of this package fulfils the contract in tests/contracts.py."""

from __future__ import annotations

import pytest
import torch
from conftest_potentials import distorted, molecule

from contracts import Tolerance, check_potential
from longstride.potentials.amber import AmberPotential
from longstride.potentials.analytic import DifferencePotential, DoubleWell, HarmonicWell, ScaledPotential, SumPotential
from longstride.potentials.openmm import OpenMMPotential

SEQUENCE = "ACE-ALA-NME"


def amber(dtype=torch.float64):
    made = molecule(SEQUENCE)
    return AmberPotential.from_openmm(made.openmm_system, made.system, name="amber14-obc1", dtype=dtype)


def well(k=1000.0):
    center = torch.from_numpy(molecule(SEQUENCE).positions)
    return HarmonicWell(molecule(SEQUENCE).system, center=center, k=k)


def openmm_potential(platform):
    made = molecule(SEQUENCE)
    return OpenMMPotential(made.openmm_system, made.system, name="amber14-obc1", platform=platform)


IMPLEMENTATIONS = {
    "amber": (amber, {}),
    "openmm-reference": (lambda: openmm_potential("Reference"), {}),
    # single precision: differences need a long step and leave a coarse slope
    "openmm-cpu": (lambda: openmm_potential("CPU"), {"tolerance": Tolerance(energy=1e-5, force=2e-2, step=2e-4)}),
    "harmonic-well": (well, {"invariant": False}),
    "double-well": (
        lambda: DoubleWell(molecule(SEQUENCE).system, barrier=10.0, half_width=0.1, k=300.0, atom=4, axis=1),
        {"invariant": False},
    ),
    "sum": (lambda: SumPotential(amber(), well()), {"invariant": False}),
    "difference": (lambda: DifferencePotential(amber(), well()), {"invariant": False}),
    "scaled": (lambda: ScaledPotential(amber(), factor=0.5), {}),
}


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
def test_contract(kind):
    make, options = IMPLEMENTATIONS[kind]
    check_potential(make(), distorted(SEQUENCE)[:4], **options)


def test_amber_float32_fulfils_the_contract():
    tolerance = Tolerance(energy=1e-5, force=2e-2, step=2e-4)
    check_potential(amber(torch.float32), distorted(SEQUENCE)[:4].float(), tolerance=tolerance)


@pytest.mark.parametrize("broken", ["sign", "batch"])
def test_the_contract_notices_broken_potentials(broken):
    class Broken(AmberPotential):
        def energy_forces(self, x):
            energy, forces = super().energy_forces(x)
            return (energy, -forces) if broken == "sign" else (energy, forces.roll(1, dims=0))

    made = molecule(SEQUENCE)
    potential = Broken.from_openmm(made.openmm_system, made.system, name="broken")
    with pytest.raises(AssertionError):
        check_potential(potential, distorted(SEQUENCE)[:4])
