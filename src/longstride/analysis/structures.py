"""Representative structures: of every basin the reference frame nearest to its centre, ready to be drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from longstride.analysis.features import circular_features
from longstride.analysis.free_energy import BASINS, basin_of, basin_populations
from longstride.data.atomic import atomic_path, read_arrays
from longstride.units import ANGSTROM_NM

if TYPE_CHECKING:
    from pathlib import Path

    from longstride.analysis.reference_model import ReferenceModel
    from longstride.analysis.samples import Molecule

MAX_STATES = 12


def nearest_frames(features: np.ndarray, state: np.ndarray, weights: np.ndarray | None = None) -> dict[int, int]:
    """Return of every state the index of the frame that lies nearest to its weighted mean in feature space.

    Args:
        features: [frame, feature].
        state: [frame] state of every frame; negative ones belong to none.
        weights: [frame], or None for equal ones.
    """
    found = {}
    for one in np.unique(state[state >= 0]):
        members = np.flatnonzero(state == one)
        own = None if weights is None or weights[members].sum() <= 0 else weights[members]
        centre = np.average(features[members], axis=0, weights=own)
        found[int(one)] = int(members[((features[members] - centre) ** 2).sum(axis=1).argmin()])
    return found


def principal_frame(positions: np.ndarray) -> np.ndarray:
    """Return positions [atom, 3] about their centroid, turned so that the longest extent lies along x and the shortest along z.

    A proper rotation: chirality is kept.
    """
    centred = np.asarray(positions, dtype=np.float64) - positions.mean(axis=0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    axes = axes[:, ::-1]
    largest = axes[np.abs(axes).argmax(axis=0), np.arange(3)]
    axes = axes * np.where(largest < 0, -1.0, 1.0)
    if np.linalg.det(axes) < 0:
        axes[:, 2] *= -1
    return centred @ axes


def representatives(molecule: Molecule, reference: ReferenceModel, folder: Path) -> dict[str, Any] | None:
    """Return a structure of every visited macrostate, or Ramachandran basin where there are no macrostates, as JSON values.

    Of the reference's frames, the nearest to the mean of (cos, sin) of all torsions over its state. Coordinates are in
    Angstrom with two decimals, about the centroid, along the principal axes.

    Args:
        molecule: the prepared system.
        reference: the analysed reference.
        folder: of the reference, whose trajectories hold the coordinates.

    Returns:
        {"elements", "bonds", "kind", "states": [{"name", "population", "trajectory", "frame", "positions_A"}]}, or None for a
        molecule without torsions.
    """
    samples = reference.samples
    if molecule.torsions.pair is None:
        return None
    times, chains = samples.energy.shape
    kind, state, names, population = _states(molecule, reference)
    weights = reference.frame_weights
    features = circular_features(samples.angles).reshape(times * chains, -1)
    frames = nearest_frames(features, state.ravel(), None if weights is None else weights.ravel())
    files = sorted(name for name in samples.manifest["files"] if name.endswith(".safetensors"))
    shown = []
    for one in sorted(frames, key=lambda key: -population.get(names[key], 0.0))[:MAX_STATES]:
        time, chain = divmod(frames[one], chains)
        arrays, _ = read_arrays(folder / files[chain])
        x = principal_frame(arrays["positions"][time]) / ANGSTROM_NM
        degrees = np.round(np.degrees(samples.angles[time, chain]), 1).tolist()
        torsions = dict(zip(molecule.torsions.names, degrees, strict=True))
        shown.append(
            {
                "name": names[one], "population": population.get(names[one]), "trajectory": files[chain], "frame": time,
                "torsions_degrees": torsions, "positions_A": np.round(x, 2).tolist(),
            }
        )  # fmt: skip
    bonds = [sorted((a.index, b.index)) for a, b in molecule.topology.bonds]
    return {"kind": kind, "elements": molecule.elements.tolist(), "bonds": sorted(bonds), "states": shown}


def _states(molecule: Molecule, reference: ReferenceModel) -> tuple[str, np.ndarray, dict[int, str], dict[str, float]]:
    """Return what the states are called, the state of every frame [time, chain], their names and their populations."""
    from longstride.analysis.method_analysis import state_paths

    samples, pair = reference.samples, molecule.torsions.pair
    weights = reference.frame_weights
    paths = state_paths(samples.angles, reference)
    if paths is not None:
        share = np.ones(samples.energy.shape) if weights is None else weights
        total = share.sum()
        names = {k: f"macrostate {k}" for k in range(paths.count)}
        return (
            "macrostates",
            paths.index,
            names,
            {names[k]: float(share[paths.index == k].sum() / total) for k in range(paths.count)},
        )
    phi, psi = (samples.angles[..., k] for k in pair or (0, 0))
    names = {k: name for k, (name, _, _) in enumerate(BASINS)}
    populations = basin_populations(phi, psi, weights)
    return "basins", np.asarray(basin_of(phi, psi)), names, populations


def write_states_pdb(path: Path, molecule: Molecule, structures: dict[str, Any]) -> None:
    """Write the structures as one PDB file, one model per state in the order of `states`."""
    import mdtraj

    positions = np.array([one["positions_A"] for one in structures["states"]], dtype=np.float32) * ANGSTROM_NM
    with atomic_path(path) as temporary:
        mdtraj.Trajectory(positions, molecule.topology).save_pdb(str(temporary))
