"""The reference stage in a periodic box: unwrapped frames, the box in every file, the same bits after a kill."""

from __future__ import annotations

import mdtraj
import numpy as np
import pytest
import torch

from longstride.config import PhysicsConfig, ReferenceConfig
from longstride.data.checkpoint import open_state
from longstride.data.frames import read_box, read_trajectories, start_positions
from longstride.data.manifest import read_manifest
from longstride.data.shards import write_shards
from longstride.dynamics import openmm_md
from longstride.dynamics.openmm_md import MDPlan
from longstride.errors import LongstrideError
from longstride.potentials.openmm import OpenMMPotential
from longstride.stages import reference
from longstride.state import State
from longstride.systems import prepare_water, save_prepared

PHYSICS = PhysicsConfig(temperature_K=298.15, force_field=("amber14-all.xml", "amber14/tip3p.xml"), cutoff_nm=0.5)
SECTION = ReferenceConfig(
    trajectories=2,
    length_ps=0.4,
    equilibration_ps=0.1,
    timestep_fs=1.0,
    friction_per_ps=5.0,
    hydrogen_mass_Da=None,
    save_every_ps=0.05,
    checkpoint_every_ps=0.2,
)


@pytest.fixture(scope="module")
def water():
    return prepare_water(64, name="water", force_field=PHYSICS.force_field, cutoff_nm=PHYSICS.cutoff_nm)


@pytest.fixture(scope="module")
def prepared_folder(water, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    save_prepared(folder, water, {})
    return folder


@pytest.fixture(scope="module")
def made(prepared_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    out, state = folder / "reference", folder / "state"
    reference.run(SECTION, physics=PHYSICS, prepared=prepared_folder, out=out, state=state, seed=3, threads=1)
    return out


def test_the_box_is_in_the_manifest_the_dcd_and_the_shards(made, water, prepared_folder, tmp_path):
    assert np.array_equal(read_box(made), water.box)
    assert read_manifest(prepared_folder, kind="prepare")["box_nm"] == water.box.tolist()
    trajectory = mdtraj.load(str(made / "trajectory_00.dcd"), top=str(prepared_folder / "structure.pdb"))
    assert trajectory.n_frames == 8
    assert np.allclose(trajectory.unitcell_vectors, water.box, atol=1e-6)
    shards = tmp_path / "shards"
    write_shards(made, shards, lags_ps=(0.1,), validation_fraction=0.5, frames_per_shard=100)
    assert read_manifest(shards, kind="shards")["box_nm"] == water.box.tolist()


def test_stored_energies_and_forces_are_those_of_the_stored_positions_in_the_box(made, water):
    frames = read_trajectories(made)[1]
    potential = OpenMMPotential(water.openmm_system, water.system, name=water.target, platform="Reference")
    x, box = torch.from_numpy(frames["positions"]).double(), torch.from_numpy(water.box)
    energy, forces = potential.energy_forces(State(positions=x, box=box.expand(len(x), 3, 3)))
    # positions and forces are stored in single precision, and the engine sums in it: bonds of 4e5 kJ/mol/nm^2 times 1e-7 nm
    assert np.allclose(energy, frames["potential_energy"], atol=0.5)
    assert np.abs(forces.numpy() - frames["forces"]).max() < 2.0
    wider = potential.energy(State(positions=x, box=1.05 * box.expand(len(x), 3, 3)))
    assert np.abs(wider.numpy() - frames["potential_energy"]).min() > 50.0  # control: the box matters


def test_molecules_are_whole_in_every_frame(made, water):
    bonds = water.system.bonds
    x = np.concatenate([frames["positions"] for frames in read_trajectories(made, fields=("positions",))])
    lengths = np.linalg.norm(x[:, bonds[:, 0]] - x[:, bonds[:, 1]], axis=2)
    assert lengths.max() < 0.13
    edge = water.box[0, 0]
    wrapped = x % edge
    assert np.linalg.norm(wrapped[:, bonds[:, 0]] - wrapped[:, bonds[:, 1]], axis=2).max() > edge / 2  # control


def test_trajectories_start_alike_and_part(made, water):
    first, second = (frames["positions"][0] for frames in read_trajectories(made, fields=("positions",)))
    assert np.abs(first - second).max() > 0.01
    starts = start_positions(made, count=3, seed=1)
    assert starts.shape == (3, water.system.n_atoms, 3)


def test_a_continued_trajectory_in_a_box_equals_the_uninterrupted_one(water, tmp_path):
    plan = MDPlan.of(SECTION, water, temperature_K=298.15, seed=7)
    short = MDPlan.of(SECTION.model_copy(update={"length_ps": 0.2}), water, temperature_K=298.15, seed=7)
    openmm_md._run_one(plan, water.positions, tmp_path / "whole", "key", 11)
    openmm_md._run_one(short, water.positions, tmp_path / "part", "key", 11)  # as if killed after one of two segments
    openmm_md._run_one(plan, water.positions, tmp_path / "part", "key", 11)
    openmm_md._run_one(plan, water.positions, tmp_path / "other", "key", 12)
    blocks = []
    for name in ("whole", "part", "other"):
        with open_state(tmp_path / name, "key") as store:
            blocks.append(store.read_block(1))
    whole, part, other = blocks
    assert all(np.array_equal(whole[key], part[key]) for key in whole)
    assert not np.array_equal(whole["positions"], other["positions"])  # control: another seed


def test_the_batched_engine_refuses_a_box(prepared_folder, tmp_path):
    section = SECTION.model_copy(update={"engine": "batched"})
    folders = {"prepared": prepared_folder, "out": tmp_path / "out", "state": tmp_path / "state"}
    with pytest.raises(
        LongstrideError, match=r"batched handles isolated molecules, 'water' lies in a periodic box; set"
    ) as caught:
        reference.run(section, physics=PHYSICS, seed=3, threads=1, **folders)
    assert "\n" not in str(caught.value)
