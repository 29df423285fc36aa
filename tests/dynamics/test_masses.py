"""Hydrogen mass repartitioning."""

import dataclasses

import numpy as np
import pytest

from longstride.dynamics.masses import hydrogen_parents, repartitioned_masses
from longstride.errors import LongstrideError


def test_total_mass_is_conserved_and_comes_from_the_bonded_parent(alanine):
    system = alanine.system
    masses = repartitioned_masses(system, 3.024)
    assert abs(masses.sum() - system.masses.sum()) < 1e-9
    assert np.allclose(masses[system.atomic_numbers == 1], 3.024)
    for hydrogen, parent in hydrogen_parents(system):
        assert masses[parent] > masses[hydrogen]
    counts = np.bincount([parent for _, parent in hydrogen_parents(system)], minlength=22)
    heavy = system.atomic_numbers > 1
    moved = (3.024 - system.masses[system.atomic_numbers == 1][0]) * counts
    assert np.allclose(masses[heavy], (system.masses - moved)[heavy])


def test_none_keeps_the_masses(alanine):
    assert np.array_equal(repartitioned_masses(alanine.system, None), alanine.system.masses)


def test_refusals(alanine):
    with pytest.raises(LongstrideError, match="heavier than their hydrogens"):
        repartitioned_masses(alanine.system, 4.0)
    loose = dataclasses.replace(alanine.system, bonds=alanine.system.bonds[1:])
    with pytest.raises(LongstrideError, match="0 bonds"):
        repartitioned_masses(loose, 3.024)
