"""OpenMM trajectories: the right temperature, the same bits after a kill, and a clear word on a blow-up."""

from __future__ import annotations

import numpy as np
import openmm
import pytest
from openmm import unit

from longstride.data.checkpoint import open_state
from longstride.dynamics import openmm_md
from longstride.dynamics.masses import repartitioned_masses
from longstride.dynamics.openmm_md import MDPlan, run_trajectories
from longstride.errors import NumericsError
from longstride.units import thermal_energy


def _plan(prepared, **changes) -> MDPlan:
    settings = {
        "system_xml": openmm.XmlSerializer.serialize(prepared.openmm_system),
        "temperature_K": 310.0,
        "timestep_fs": 1.0,
        "friction_per_ps": 5.0,
        "equilibration_ps": 0.2,
        "length_ps": 1.2,
        "save_every_ps": 0.1,
        "checkpoint_every_ps": 0.3,
        "seed": 7,
    }
    return MDPlan(**{**settings, **changes})


def test_continued_trajectory_equals_the_uninterrupted_one(alanine, tmp_path):
    plan = _plan(alanine)
    whole = tmp_path / "whole"
    openmm_md._run_one(plan, alanine.positions, whole, "key", 11)
    part = tmp_path / "part"
    short = _plan(alanine, length_ps=0.6)
    openmm_md._run_one(short, alanine.positions, part, "key", 11)  # as if killed after two of four segments
    openmm_md._run_one(plan, alanine.positions, part, "key", 11)
    for index in range(plan.segments):
        with open_state(whole, "key") as first, open_state(part, "key") as second:
            one, two = first.read_block(index), second.read_block(index)
        assert all(np.array_equal(one[name], two[name]) for name in one)


def test_lost_checkpoint_changes_the_numbers(alanine, tmp_path):
    """Negative control: the comparison above can fail."""
    plan = _plan(alanine, length_ps=0.3)
    openmm_md._run_one(plan, alanine.positions, tmp_path / "a", "key", 11)
    openmm_md._run_one(plan, alanine.positions, tmp_path / "b", "key", 12)
    with open_state(tmp_path / "a", "key") as first, open_state(tmp_path / "b", "key") as second:
        assert not np.array_equal(first.read_block(0)["positions"], second.read_block(0)["positions"])


def test_temperature_and_energy_are_recorded(alanine, tmp_path):
    plan = _plan(alanine, length_ps=10.0, save_every_ps=0.2, checkpoint_every_ps=10.0, equilibration_ps=2.0)
    starts = np.stack([alanine.positions, alanine.positions])
    result = run_trajectories(plan, starts, state=tmp_path, key="k", workers=2, label="test")
    kinetic = np.concatenate([frames["kinetic_energy"] for frames in result.trajectories])
    degrees = 3 * alanine.system.n_atoms  # no constraints, no centre-of-mass remover
    kT = thermal_energy(310.0)
    # kinetic energy is Gamma(degrees / 2, kT) with sd sqrt(degrees / 2) kT per frame; velocities decorrelate in
    # 1/friction = 0.2 ps, that is in about two frames
    error = np.sqrt(degrees / 2) * kT / np.sqrt(len(kinetic) / 2)
    assert abs(kinetic.mean() - degrees * kT / 2) < 5 * error
    assert abs(kinetic.mean() - degrees * thermal_energy(400.0) / 2) > 5 * error  # negative control: another temperature
    frame = result.trajectories[0]
    momentum = (alanine.system.masses[:, None] * frame["positions"][-1]).sum(axis=0)
    assert np.allclose(momentum / alanine.system.masses.sum(), 0, atol=1e-6)
    assert frame["time"][-1] == pytest.approx(10.0)


def test_hydrogen_mass_comes_from_the_bonded_atom(alanine):
    heavy = openmm_md.with_masses(alanine.openmm_system, repartitioned_masses(alanine.system, 3.024))
    masses = np.array([heavy.getParticleMass(i).value_in_unit(unit.dalton) for i in range(heavy.getNumParticles())])
    assert masses.sum() == pytest.approx(alanine.system.masses.sum(), abs=1e-9)
    assert np.allclose(masses[alanine.system.atomic_numbers == 1], 3.024)
    oxygen = alanine.system.atomic_numbers == 8
    assert np.array_equal(masses[oxygen], alanine.system.masses[oxygen])  # carries no hydrogen


def test_blow_up_is_one_line(alanine, tmp_path):
    with pytest.raises(NumericsError, match="use a shorter timestep_fs") as caught:
        openmm_md._run_one(_plan(alanine, timestep_fs=25.0, length_ps=100.0), alanine.positions, tmp_path, "key", 1)
    assert "\n" not in str(caught.value)
