"""Training shards: windows of trajectories with lagged pairs, split by trajectory.

A shard holds frames [start, stop + longest lag) of one trajectory and, for every lag, the rows (x, y) of the
pairs whose x lies in [start, stop). Pairs never cross trajectories, and a trajectory is either training or
validation, so no validation frame is a near-duplicate of a training frame.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from longstride.data.atomic import read_arrays, write_arrays
from longstride.data.frames import read_trajectories
from longstride.data.manifest import read_manifest, write_manifest
from longstride.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

Split = Literal["train", "validation"]
_STORED = ("positions", "velocities", "forces", "potential_energy")


def write_shards(
    reference: Path, out: Path, *, lags_ps: tuple[float, ...], validation_fraction: float, frames_per_shard: int
) -> dict[str, Any]:
    """Cut reference trajectories into shards and write the manifest (kind "shards").

    Args:
        reference: folder of the reference stage.
        out: where the shards go.
        lags_ps: time lags of the pairs; each a multiple of the frame spacing and shorter than a trajectory.
        validation_fraction: fraction of trajectories held out, at least one and never all.
        frames_per_shard: pair starts per shard file.

    Returns:
        the manifest's content.

    Raises:
        DataError: a lag does not fit the trajectories.
    """
    source = read_manifest(reference, kind="reference")
    trajectories = read_trajectories(reference, fields=_STORED)
    spacing = source["frame_spacing_ps"]
    shortest = min(len(t["positions"]) for t in trajectories)
    lags = [lag_in_frames(lag, spacing, shortest, key="shard.lags_ps") for lag in lags_ps]
    held_out = held_out_trajectories(len(trajectories), validation_fraction)
    splits: dict[str, list[str]] = {"train": [], "validation": []}
    counts: dict[str, list[int]] = {"train": [0] * len(lags), "validation": [0] * len(lags)}
    out.mkdir(parents=True, exist_ok=True)
    for index, frames in enumerate(trajectories):
        split = "validation" if index in held_out else "train"
        for start in range(0, len(frames["positions"]) - min(lags), frames_per_shard):
            name = f"shard_{sum(map(len, splits.values())):05d}.safetensors"
            pairs = _write_window(out / name, frames, start=start, stop=start + frames_per_shard, lags=lags)
            splits[split].append(name)
            counts[split] = [old + new for old, new in zip(counts[split], pairs, strict=True)]
    content = {
        **{key: source[key] for key in ("system", "target", "system_hash", "temperature_K")},
        "lags_ps": list(lags_ps),
        "frame_spacing_ps": spacing,
        "box_nm": source.get("box_nm"),
        "splits": splits,
        "counts": counts,
    }
    write_manifest(out, kind="shards", files=[*splits["train"], *splits["validation"]], content=content)
    return content


def held_out_trajectories(count: int, fraction: float) -> set[int]:
    """Return which of `count` trajectories are validation: evenly spaced, at least one, never all.

    Trajectories are started in basins in turn, so an even spacing from the middle of each stretch holds out
    different basins instead of only the last ones.
    """
    held = min(max(1, round(count * fraction)), count - 1)
    return {math.floor((k + 0.5) * count / held) for k in range(held)}


def lag_in_frames(lag_ps: float, spacing_ps: float, shortest: int, *, key: str) -> int:
    """Return a time lag as a number of frames.

    Args:
        lag_ps: the lag.
        spacing_ps: time between two frames, `reference.save_every_ps`.
        shortest: frames of the shortest trajectory.
        key: configuration key of the lag, for messages.

    Raises:
        DataError: not a whole number of frames, or not shorter than the trajectories.
    """
    frames = round(lag_ps / spacing_ps)
    if frames < 1 or abs(frames * spacing_ps - lag_ps) > 1e-6 * lag_ps:
        raise DataError(
            f"{key}: {lag_ps:g} ps is not a whole multiple of the frame spacing {spacing_ps:g} ps (reference.save_every_ps)"
        )
    if frames >= shortest:
        raise DataError(
            f"{key}: {lag_ps:g} ps is not shorter than the shortest trajectory ({shortest * spacing_ps:g} ps);"
            " shorten the lag or lengthen the trajectories (reference.length_ps)"
        )
    return frames


def _write_window(path: Path, frames: dict[str, np.ndarray], *, start: int, stop: int, lags: list[int]) -> list[int]:
    end = min(stop + max(lags), len(frames["positions"]))
    arrays = {key: value[start:end] for key, value in frames.items()}
    counts = []
    for index, lag in enumerate(lags):
        x = np.arange(0, min(stop, len(frames["positions"]) - lag) - start, dtype=np.int64)
        arrays[f"pairs_{index}"] = np.stack([x, x + lag], axis=1)
        counts.append(len(x))
    write_arrays(path, arrays)
    return counts


def load_pairs(folder: Path, *, split: Split, lag_index: int = 0) -> dict[str, np.ndarray]:
    """Return all pairs of one lag and split: x and y, [pair, atom, 3] nm float32.

    Raises:
        DataError: shards missing, truncated or altered (checksums), another lag asked for, or no pairs.
    """
    manifest = read_manifest(folder, kind="shards")
    if not 0 <= lag_index < len(manifest["lags_ps"]):
        raise DataError(f"{folder} has {len(manifest['lags_ps'])} lags, none with index {lag_index}")
    x, y = [], []
    for name in manifest["splits"][split]:
        arrays, _ = read_arrays(folder / name)
        rows = arrays[f"pairs_{lag_index}"]
        x.append(arrays["positions"][rows[:, 0]])
        y.append(arrays["positions"][rows[:, 1]])
    if not x or not sum(map(len, x)):
        raise DataError(f"{folder} holds no {split} pairs at {manifest['lags_ps'][lag_index]:g} ps; lengthen the reference")
    return {"x": np.concatenate(x), "y": np.concatenate(y)}
