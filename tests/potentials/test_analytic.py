"""Potentials with known answers: closed forms, and equilibrium averages by exact sampling."""

from __future__ import annotations

import pytest
import torch
from conftest_potentials import molecule

from longstride.errors import LongstrideError
from longstride.potentials.analytic import DifferencePotential, DoubleWell, HarmonicWell, ScaledPotential, SumPotential
from longstride.state import State

KT = 2.5
SYSTEM = "ACE-ALA-NME"


def well(k=400.0):
    system = molecule(SYSTEM).system
    return HarmonicWell(system, center=torch.zeros(system.n_atoms, 3, dtype=torch.float64), k=k)


def gaussian(count, k=400.0):
    generator = torch.Generator().manual_seed(5)
    n = molecule(SYSTEM).system.n_atoms
    return State(positions=(KT / k) ** 0.5 * torch.randn(count, n, 3, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize(("k", "agrees"), [(400.0, True), (420.0, False)])
def test_harmonic_well_obeys_equipartition(k, agrees):
    energy = well(k).energy(gaussian(4000))
    truth = 1.5 * molecule(SYSTEM).system.n_atoms * KT
    error = energy.std() / len(energy) ** 0.5
    assert bool((energy.mean() - truth).abs() < 5 * error) is agrees


def test_double_well_minima_and_barrier():
    potential = DoubleWell(molecule(SYSTEM).system, barrier=12.0, half_width=0.2, k=100.0, atom=3, axis=2)
    x = torch.zeros(3, molecule(SYSTEM).system.n_atoms, 3, dtype=torch.float64)
    x[0, 3, 2], x[1, 3, 2] = -0.2, 0.2
    energy, forces = potential.energy_forces(State(positions=x))
    torch.testing.assert_close(energy, torch.tensor([0.0, 0.0, 12.0], dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(forces, torch.zeros_like(forces), atol=1e-10, rtol=0)


def test_arithmetic_of_potentials():
    state = gaussian(3)
    one, two = well(100.0), well(250.0)
    for combined, k in (
        (SumPotential(one, two), 350.0),
        (DifferencePotential(two, one), 150.0),
        (ScaledPotential(one, factor=3.0), 300.0),
        (SumPotential(one, two, ScaledPotential(one, factor=-1.0)), 250.0),
    ):
        expected = well(k).energy_forces(state)
        torch.testing.assert_close(combined.energy(state), expected[0])
        torch.testing.assert_close(combined.energy_forces(state), expected)
    assert SumPotential(one, two).name == "harmonic-well+harmonic-well"


def test_potentials_of_different_molecules_cannot_be_combined():
    other = molecule("AS").system
    stranger = HarmonicWell(other, center=torch.zeros(other.n_atoms, 3), k=1.0)
    with pytest.raises(LongstrideError, match="AS"):
        SumPotential(well(), stranger)
    with pytest.raises(LongstrideError, match="center"):
        HarmonicWell(other, center=torch.zeros(3, 3), k=1.0)
