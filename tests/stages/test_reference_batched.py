"""The reference stage with engine `batched`: same files as OpenMM's, accepted by shard and compare, killed at any moment."""

import json

import numpy as np
import pytest
import torch

from longstride.config import CompareConfig, PhysicsConfig, ReferenceConfig, ShardConfig
from longstride.data.frames import FIELDS, read_trajectories
from longstride.data.manifest import read_manifest
from longstride.data.shards import load_pairs
from longstride.dynamics.starts import basin_starts
from longstride.errors import NumericsError
from longstride.potentials.amber import AmberPotential
from longstride.stages import compare, reference, shard
from longstride.state import State

SECTION = ReferenceConfig(
    engine="batched",
    trajectories=6,
    length_ps=0.64,
    equilibration_ps=0.16,
    timestep_fs=4.0,
    save_every_ps=0.016,
    checkpoint_every_ps=0.16,
    compile_energy=False,
)


def make(folder, alanine_folder, *, section=SECTION):
    reference.run(
        section,
        physics=PhysicsConfig(),
        prepared=alanine_folder,
        out=folder / "reference",
        state=folder / "state",
        seed=3,
        threads=1,
    )
    return folder / "reference"


@pytest.fixture(scope="module", autouse=True)
def starts(alanine):
    """Minimise the starts once for all tests."""
    found = basin_starts(alanine, SECTION.trajectories)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "basin_starts", lambda molecule, count: found[:count])
        yield


@pytest.fixture(scope="module")
def made(alanine_folder, tmp_path_factory):
    return make(tmp_path_factory.mktemp("made"), alanine_folder)


def test_the_files_are_those_of_the_other_engine(made, alanine):
    manifest = read_manifest(made, kind="reference")
    assert (manifest["engine"], manifest["trajectories"], manifest["threads"]) == ("batched", 6, 1)
    assert manifest["counts"]["force_calls"] == 6 * 160
    assert len([name for name in manifest["files"] if name.endswith(".dcd")]) == 6
    assert not list((made.parent / "state").glob("group_*"))
    trajectories = read_trajectories(made, fields=FIELDS)
    assert len(trajectories) == 6
    exact = AmberPotential.from_openmm(alanine.openmm_system, alanine.system, name="amber")
    for frames in trajectories:
        assert frames["positions"].shape == frames["forces"].shape == (40, 22, 3)
        assert frames["positions"].dtype == frames["velocities"].dtype == frames["forces"].dtype == np.float32
        assert np.allclose(frames["time"], 0.016 * np.arange(1, 41))
        energy, forces = exact.energy_forces(State(positions=torch.from_numpy(frames["positions"]).double()))
        assert np.allclose(frames["potential_energy"], energy, atol=0.05)  # positions are stored in float32
        assert np.abs(frames["forces"] - forces.numpy()).max() < 2.0
    assert len({tuple(frames["positions"][-1, 0]) for frames in trajectories}) == 6


def test_shard_and_compare_accept_it(made, alanine_folder, tmp_path):
    shard.run(ShardConfig(lags_ps=(0.16,), frames_per_shard=25), reference=made, out=tmp_path / "shards")
    pairs = load_pairs(tmp_path / "shards", split="train")
    assert len(pairs["x"]) == 4 * 30
    section = CompareConfig(
        bins=12, tica_lag_ps=0.032, msm_lag_ps=0.032, msm_lags_ps=(0.032,), msm_states=10, bootstrap=20, max_free_energy_kT=5.0
    )
    out = tmp_path / "compare"
    compare.run(section, prepared=alanine_folder, reference=made, samples=[], out=out, seed=1, threads=1)
    entry = json.loads((out / "comparison.json").read_text())["reference"]
    assert (entry["n_chains"], entry["n_saves"]) == (6, 40)
    assert entry["throughput_ps_per_s"] > 0
    elements = entry["temperature"]["elements"]
    assert set(elements) == {"all", "C", "H", "N", "O"}, "the manifest gives the masses of the dynamics"
    assert abs(elements["all"]["value"] - 310) < 40  # six trajectories of two correlation times


class Kill(BaseException):
    """Stands for kill -9."""


def test_a_killed_stage_continues_bitwise(made, alanine_folder, tmp_path, monkeypatch):
    whole, calls = AmberPotential.energy_forces, [0]

    def mortal(self, x):
        calls[0] += 1
        if calls[0] == 120:
            raise Kill
        return whole(self, x)

    monkeypatch.setattr(AmberPotential, "energy_forces", mortal)
    with pytest.raises(Kill):
        make(tmp_path, alanine_folder)
    parts = read_trajectories(make(tmp_path, alanine_folder))
    assert calls[0] < 120 + 160  # the second attempt did not begin again
    for one, two in zip(read_trajectories(made), parts, strict=True):
        assert all(np.array_equal(one[name], two[name]) for name in FIELDS)


def test_too_long_a_step_is_one_line(alanine_folder, tmp_path):
    section = SECTION.model_copy(update={"timestep_fs": 16.0, "trajectories": 2})
    with pytest.raises(NumericsError, match=r"replica \d.*use a shorter reference\.timestep_fs") as caught:
        make(tmp_path, alanine_folder, section=section)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "reference").exists()
