"""Published Timewarp trajectories, `<name>-traj-arrays.npz`, read without pickle and cut to a uniform grid of times.

A file holds `step` [frame], `time` [frame] ps, `energies` [frame, 2] kJ/mol (potential, kinetic), and `positions` nm,
`velocities` nm/ps and `forces` kJ/mol/nm, each [frame, atom, 3]. Frames are not always evenly spaced: some sets store a frame
every so many steps (anchors) and frames 1, 10, 100, ... steps after each. Time therefore comes from `step`, never from a
frame's index.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from longstride.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

_SHAPES = {"step": 1, "time": 1, "energies": 2, "positions": 3, "velocities": 3, "forces": 3}


@dataclass(frozen=True, kw_only=True)
class PublishedTrajectory:
    """One file.

    Attributes:
        frames: positions, velocities, forces [frame, atom, 3], potential_energy, kinetic_energy, time [frame], as in
            `longstride.data.frames`.
        step: [frame] integration steps, strictly increasing.
        timestep_ps: time per step.
    """

    frames: dict[str, np.ndarray]
    step: np.ndarray
    timestep_ps: float


def read_published_trajectory(path: Path) -> PublishedTrajectory:
    """Read and check one file.

    Raises:
        DataError: missing, damaged, with objects in it, arrays missing or of other shapes, values that are not finite, or steps
            and times that do not fit each other.
    """
    arrays = _read(path)
    n_frames, n_atoms = arrays["positions"].shape[:2]
    shapes = {"step": (n_frames,), "time": (n_frames,), "energies": (n_frames, 2)}
    for name, value in arrays.items():
        expected = shapes.get(name, (n_frames, n_atoms, 3))
        if value.shape != expected:
            raise DataError(f"{path}: {name} has the shape {value.shape}, expected {expected}; download it again")
        if not np.isfinite(value).all():
            raise DataError(f"{path}: {name} holds values that are not finite; download it again")
    step, time = arrays["step"].astype(np.int64), arrays["time"].astype(np.float64)
    if n_frames < 2 or (np.diff(step) <= 0).any():
        raise DataError(f"{path}: the steps of its frames do not increase; it is not a trajectory")
    timestep = float((time[-1] - time[0]) / (step[-1] - step[0]))
    if timestep <= 0 or np.abs(time - time[0] - timestep * (step - step[0])).max() > 0.5 * timestep:
        raise DataError(f"{path}: its times do not follow its steps")
    frames: dict[str, np.ndarray] = {name: arrays[name].astype(np.float32) for name in ("positions", "velocities", "forces")}
    potential, kinetic = arrays["energies"].astype(np.float64).T
    frames |= {"potential_energy": potential, "kinetic_energy": kinetic, "time": time}
    return PublishedTrajectory(frames=frames, step=step, timestep_ps=timestep)


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = sorted(set(_SHAPES) - set(archive.files))
            if missing:
                raise DataError(f"{path} holds no array {missing[0]}; it is not a published Timewarp trajectory")
            arrays = {name: archive[name] for name in _SHAPES}
    except FileNotFoundError:
        raise DataError(f"trajectory {path} does not exist") from None
    except DataError:
        raise
    except Exception as error:  # damaged archives raise much else than BadZipFile
        raise DataError(f"cannot read {path} as plain arrays ({' '.join(str(error).split())}); download it again") from error
    for name, dimensions in _SHAPES.items():
        if arrays[name].ndim != dimensions or arrays[name].dtype.kind not in "iuf":
            raise DataError(f"{path}: {name} is not an array of numbers with {dimensions} axes")
    return arrays


def uniform_grid(step: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the frames on the finest uniform grid of steps through the first frame, and its spacing in steps.

    The grid step[0] + k * spacing has a frame for every k up to the last step. In a log-spaced file these are the anchors;
    frames in between are left out, since each is a near-duplicate of its anchor.

    Args:
        step: [frame] int64, strictly increasing.

    Raises:
        DataError: no such grid with at least three frames.
    """
    offsets = step - step[0]
    for spacing in offsets[1:]:
        count = int(offsets[-1] // spacing) + 1
        if count < 3:
            break
        chosen = np.searchsorted(offsets, spacing * np.arange(count))
        if np.array_equal(offsets[chosen], spacing * np.arange(count)):
            return chosen, int(spacing)
    raise DataError("the steps of the frames hold no uniform grid of three or more; the file cannot be used as a trajectory")
