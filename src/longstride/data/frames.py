"""Reference trajectories on disk: one safetensors and one DCD file each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from mdtraj.formats import DCDTrajectoryFile
from mdtraj.utils import box_vectors_to_lengths_and_angles

from longstride.data.atomic import atomic_path, read_arrays, write_arrays
from longstride.data.manifest import read_manifest
from longstride.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FIELDS = ("positions", "velocities", "forces", "potential_energy", "kinetic_energy", "time")


def write_trajectory(folder: Path, index: int, frames: Mapping[str, np.ndarray], *, box: np.ndarray | None = None) -> list[str]:
    """Write trajectory_<index>.safetensors (everything) and .dcd (positions, for MDTraj) and return their names.

    Args:
        folder: where to write.
        index: number of the trajectory.
        frames: positions [frame, atom, 3] nm, velocities nm/ps, forces kJ/mol/nm, potential_energy and
            kinetic_energy [frame] kJ/mol, time [frame] ps. In a periodic box positions are unwrapped: molecules are whole
            and leave the box as they diffuse.
        box: [3, 3] nm (rows are box vectors), the same for all frames, or None. The folder's manifest holds it as box_nm.
    """
    stem = f"trajectory_{index:02d}"
    write_arrays(folder / f"{stem}.safetensors", frames)
    with atomic_path(folder / f"{stem}.dcd") as temporary, DCDTrajectoryFile(str(temporary), "w") as handle:
        handle.write(frames["positions"] * 10.0, **_cell(box, count=len(frames["positions"])))  # DCD holds Å
    return [f"{stem}.safetensors", f"{stem}.dcd"]


def _cell(box: np.ndarray | None, *, count: int) -> dict[str, np.ndarray]:
    """Return the unit cell of `count` frames as DCD holds it: lengths in Å, angles in degrees."""
    if box is None:
        return {}
    a, b, c, alpha, beta, gamma = box_vectors_to_lengths_and_angles(*box)
    return {
        "cell_lengths": np.tile(np.array([a, b, c]) * 10.0, (count, 1)),
        "cell_angles": np.tile([alpha, beta, gamma], (count, 1)),
    }


def read_box(folder: Path) -> np.ndarray | None:
    """Return the constant box of a reference folder, [3, 3] nm (rows are box vectors); None without one.

    Raises:
        DataError: no manifest, or a file of it is missing or truncated.
    """
    manifest = read_manifest(folder, kind="reference", verify=False)
    box = manifest.get("box_nm")
    return None if box is None else np.array(box, dtype=np.float64)


def read_trajectories(folder: Path, *, fields: tuple[str, ...] = FIELDS) -> list[dict[str, np.ndarray]]:
    """Read all reference trajectories of a folder, verified against its manifest.

    Raises:
        DataError: a file is missing, altered, or lacks a field.
    """
    manifest = read_manifest(folder, kind="reference")
    found = []
    for name in sorted(manifest["files"]):
        if name.endswith(".safetensors"):
            arrays, _ = read_arrays(folder / name)
            missing = [field for field in fields if field not in arrays]
            if missing:
                raise DataError(f"{folder / name} has no {missing[0]}; run the reference stage again")
            found.append({field: arrays[field] for field in fields})
    return found


def start_positions(folder: Path, *, count: int, seed: int) -> np.ndarray:
    """Return `count` reference frames, [count, atom, 3] nm float64, spread evenly over the trajectories.

    Chain c starts from trajectory c mod n at a random time, so that every basin the reference was started in
    is represented.
    """
    trajectories = read_trajectories(folder, fields=("positions",))
    generator = np.random.default_rng(seed)
    starts = []
    for chain in range(count):
        positions = trajectories[chain % len(trajectories)]["positions"]
        starts.append(positions[generator.integers(len(positions))])
    return np.stack(starts).astype(np.float64)
