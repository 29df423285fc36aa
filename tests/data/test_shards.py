"""Shards: pairs are real lagged pairs, splits never mix trajectories, damage is refused."""

from __future__ import annotations

import numpy as np
import pytest

from longstride.data.frames import read_trajectories, start_positions, write_trajectory
from longstride.data.manifest import read_manifest, write_manifest
from longstride.data.shards import held_out_trajectories, load_pairs, write_shards
from longstride.errors import DataError

FRAMES, ATOMS, TRAJECTORIES, SPACING = 50, 3, 4, 0.5


@pytest.fixture
def reference(tmp_path):
    """Trajectories in which every coordinate says which trajectory and frame it is."""
    folder = tmp_path / "reference"
    folder.mkdir()
    files = []
    for index in range(TRAJECTORIES):
        label = (1000 * index + np.arange(FRAMES, dtype=np.float32))[:, None, None]
        positions = np.broadcast_to(label, (FRAMES, ATOMS, 3)).copy()
        frames = {
            "positions": positions,
            "velocities": positions,
            "forces": positions,
            "potential_energy": np.arange(FRAMES, dtype=np.float64),
            "kinetic_energy": np.arange(FRAMES, dtype=np.float64),
            "time": SPACING * np.arange(1, FRAMES + 1),
        }
        files += write_trajectory(folder, index, frames)
    content = {"system": "toy", "target": "t", "system_hash": "h", "temperature_K": 300.0, "frame_spacing_ps": SPACING}
    write_manifest(folder, kind="reference", files=files, content=content)
    return folder


@pytest.mark.parametrize("frames_per_shard", [7, 20, 1000])
def test_pairs_are_lagged_within_one_trajectory(reference, tmp_path, frames_per_shard):
    out = tmp_path / "shards"
    write_shards(reference, out, lags_ps=(5.0, 2.0), validation_fraction=0.25, frames_per_shard=frames_per_shard)
    for index, lag in enumerate((10, 4)):
        starts = []
        for split in ("train", "validation"):
            pairs = load_pairs(out, split=split, lag_index=index)
            x, y = pairs["x"][:, 0, 0], pairs["y"][:, 0, 0]
            assert np.array_equal(y - x, np.full(len(x), lag))
            assert np.array_equal(x // 1000, y // 1000)
            starts.append(x)
        everything = np.concatenate(starts)
        assert len(everything) == len(set(everything)) == TRAJECTORIES * (FRAMES - lag)  # each start once, none lost
        assert not set(starts[0] // 1000) & set(starts[1] // 1000)


def test_held_out_trajectories_are_spread():
    assert held_out_trajectories(8, 0.25) == {2, 6}
    assert len(held_out_trajectories(2, 0.9)) == 1
    assert len(held_out_trajectories(10, 0.01)) == 1


def test_lag_longer_than_the_trajectory_is_refused(reference, tmp_path):
    with pytest.raises(DataError, match="not shorter than the shortest trajectory"):
        write_shards(reference, tmp_path / "s", lags_ps=(25.0,), validation_fraction=0.25, frames_per_shard=10)
    with pytest.raises(DataError, match="not a whole multiple"):
        write_shards(reference, tmp_path / "s", lags_ps=(0.7,), validation_fraction=0.25, frames_per_shard=10)
    assert not (tmp_path / "s" / "manifest.json").exists()


@pytest.mark.parametrize("damage", ["truncate", "empty", "flip", "remove"])
def test_damaged_shards_are_refused(reference, tmp_path, damage):
    out = tmp_path / "shards"
    write_shards(reference, out, lags_ps=(5.0,), validation_fraction=0.25, frames_per_shard=20)
    victim = out / read_manifest(out, kind="shards")["splits"]["train"][0]
    content = bytearray(victim.read_bytes())
    if damage == "truncate":
        victim.write_bytes(content[:-10])
    elif damage == "empty":
        victim.write_bytes(b"")
    elif damage == "flip":
        content[-5] ^= 1
        victim.write_bytes(content)
    else:
        victim.unlink()
    with pytest.raises(DataError, match=victim.name):
        load_pairs(out, split="train")


def test_starts_come_from_every_trajectory(reference):
    starts = start_positions(reference, count=8, seed=1)
    assert sorted(set(starts[:, 0, 0] // 1000)) == [0, 1, 2, 3]
    assert np.array_equal(starts, start_positions(reference, count=8, seed=1))
    assert not np.array_equal(starts, start_positions(reference, count=8, seed=2))


def test_mdtraj_reads_the_same_positions(reference):
    from mdtraj.formats import DCDTrajectoryFile

    with DCDTrajectoryFile(str(reference / "trajectory_02.dcd")) as handle:
        angstrom = handle.read()[0]
    expected = read_trajectories(reference, fields=("positions",))[2]["positions"]
    assert np.allclose(angstrom / 10, expected, rtol=1e-6)
