"""TICA of coordinates: the literature's features, fitted to the reference file by file, kept with the comparison."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mdtraj
import numpy as np

from longstride.analysis.features import CHUNK, Torsions, circular_features, find_torsions, torsion_angles
from longstride.analysis.tica_msm import TICAModel, fit_tica_pairs
from longstride.data.atomic import read_arrays, write_arrays, write_json
from longstride.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

KINDS = ("literature", "heavy")
LITERATURE_ELEMENTS = frozenset({"C", "N", "S"})  # the released code of the literature leaves out O, its text does not
COMPONENTS = 10
PAIRS = 100_000
ARRAYS, DESCRIPTION = "tica.safetensors", "tica.json"


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """Features of coordinates.

    Attributes:
        kind: "literature" or "heavy".
        pairs: [pair, 2] atoms whose distance in nm is a feature.
        torsions: torsions whose cosine and sine are features; none for "heavy".
        names: one per feature, in the order of `values`.
    """

    kind: str
    pairs: np.ndarray
    torsions: Torsions
    names: tuple[str, ...]

    def values(self, positions: np.ndarray, topology: mdtraj.Topology) -> np.ndarray:
        """Return the features of positions [..., atom, 3] nm, [..., feature] float64: distances, cosines, sines."""
        first, second = (positions[..., self.pairs[:, k], :].astype(np.float64) for k in (0, 1))
        distances = np.sqrt(((first - second) ** 2).sum(axis=-1))
        if not self.torsions.names:
            return distances
        angles = circular_features(torsion_angles(positions, topology, self.torsions))
        return np.concatenate([distances, angles], axis=-1)


def _omega(topology: mdtraj.Topology) -> tuple[list[str], np.ndarray]:
    frame = mdtraj.Trajectory(np.zeros((1, topology.n_atoms, 3), dtype=np.float32), topology)
    table = np.asarray(mdtraj.compute_omega(frame)[0], dtype=int).reshape(-1, 4)
    residues = [topology.atom(int(quartet[2])).residue for quartet in table]
    return [f"omega {residue.name}{residue.index + 1}" for residue in residues], table


def feature_set(topology: mdtraj.Topology, kind: str) -> FeatureSet:
    """Return the features of a kind.

    "literature": all distances between C, N and S atoms with cosine and sine of every phi, psi and omega, as Timewarp and the
    code after it (there psi is computed as phi a second time; here it is psi). "heavy": all distances between atoms other than
    hydrogen, as its text says.

    Raises:
        DataError: the kind is unknown.
    """
    if kind not in KINDS:
        raise DataError(f"unknown TICA features {kind!r}; choose torsions, literature or heavy")
    atoms = list(topology.atoms)
    chosen = [
        atom.index
        for atom in atoms
        if (atom.element.symbol in LITERATURE_ELEMENTS if kind == "literature" else atom.element.symbol != "H")
    ]
    pairs = np.array([(a, b) for k, a in enumerate(chosen) for b in chosen[k + 1 :]], dtype=int).reshape(-1, 2)
    torsions = Torsions(names=(), indices=np.zeros((0, 4), dtype=int), pair=None)
    if kind == "literature":
        backbone, (omega, table) = find_torsions(topology), _omega(topology)
        indices = np.concatenate([backbone.indices, table])
        torsions = Torsions(names=(*backbone.names, *omega), indices=indices, pair=None)
    names = [f"distance {atoms[a]} {atoms[b]}" for a, b in pairs]
    names += [f"{part} {name}" for part in ("cos", "sin") for name in torsions.names]
    return FeatureSet(kind=kind, pairs=pairs, torsions=torsions, names=tuple(names))


@dataclass(frozen=True, kw_only=True)
class Projection:
    """TICA of a feature set, fitted to a reference.

    Attributes:
        features: what is projected.
        tica: the model.
        spacing_ps: time between frames of the reference.
        stride: every how many frames a pair started in the fit.
    """

    features: FeatureSet
    tica: TICAModel
    spacing_ps: float
    stride: int = 1

    def project(self, positions: np.ndarray, topology: mdtraj.Topology, *, components: int = COMPONENTS) -> np.ndarray:
        """Return the slowest components of positions [..., atom, 3] nm, unit variance in the reference, [..., component]."""
        return self._in_parts(positions, topology, self.tica.axes[:, :components])

    def kinetic_map(self, positions: np.ndarray, topology: mdtraj.Topology, *, components: int = 2) -> np.ndarray:
        """Return the slowest components times their eigenvalues, as TICA-W2 of the literature takes them, [..., component]."""
        return self._in_parts(positions, topology, (self.tica.axes * self.tica.eigenvalues)[:, :components])

    def _in_parts(self, positions: np.ndarray, topology: mdtraj.Topology, axes: np.ndarray) -> np.ndarray:
        leading = positions.shape[:-2]
        flat = positions.reshape(-1, *positions.shape[-2:])
        found = np.empty((len(flat), axes.shape[1]))
        for start in range(0, len(flat), CHUNK):
            part = self.features.values(flat[start : start + CHUNK], topology)
            found[start : start + len(part)] = (part - self.tica.mean) @ axes
        return found.reshape(*leading, axes.shape[1])


def fit_projection(
    folder: Path, manifest: dict[str, Any], topology: mdtraj.Topology, *, kind: str, lag: int
) -> Projection | None:
    """Fit TICA of coordinates to a whole reference, reading one part of one file at a time.

    Every trajectory takes part from end to end; beyond 100 000 pairs of frames, neighbours being alike, only every so many
    (`stride`) start a pair. None where no trajectory is longer than twice the lag or there is no feature.

    Args:
        folder: of the reference.
        manifest: its manifest.
        topology: of the molecule.
        kind: "literature" or "heavy".
        lag: lag time in frames.

    Raises:
        DataError: a trajectory cannot be read, or the kind is unknown.
    """
    features = feature_set(topology, kind)
    names = sorted(name for name in manifest["files"] if name.endswith(".safetensors"))
    lengths = {name: _frames(folder / name) for name in names}
    usable = {name: length for name, length in lengths.items() if length > 2 * lag}
    if not features.names or not usable:
        return None
    stride = max(1, sum(length - lag for length in usable.values()) // PAIRS)

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for name, length in usable.items():
            for x, y in _lagged(folder / name, length, lag=lag, stride=stride):
                yield features.values(x, topology), features.values(y, topology)

    return Projection(
        features=features,
        tica=fit_tica_pairs(pairs, lag=lag),
        spacing_ps=float(manifest["frame_spacing_ps"]),
        stride=stride,
    )


@contextmanager
def _positions(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as handle:
            yield handle.get_slice("positions")
    except (SafetensorError, OSError) as error:
        raise DataError(f"cannot read {path} ({error}); run the reference stage again") from error


def _frames(path: Path) -> int:
    with _positions(path) as positions:
        return int(positions.get_shape()[0])


def _lagged(path: Path, length: int, *, lag: int, stride: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield positions [frame, atom, 3] at t and at t + lag, t every `stride` frames, in parts."""
    part = CHUNK // stride * stride or stride
    with _positions(path) as positions:
        for start in range(0, length - lag, part):
            stop = min(start + part, length - lag)
            stretch = positions[start : stop + lag]
            yield stretch[: stop - start : stride], stretch[lag::stride]


def describe(name: str, tica: TICAModel, names: tuple[str, ...], spacing_ps: float) -> dict[str, Any]:
    """Return what a reader needs to use a stored TICA model, as JSON values."""
    return {
        "features": name,
        "lag_frames": tica.lag,
        "lag_ps": tica.lag * spacing_ps,
        "frame_spacing_ps": spacing_ps,
        "feature_names": list(names),
        "timescales_ps": [float(value) for value in tica.timescales * spacing_ps],
        "eigenvalues": [float(value) for value in tica.eigenvalues],
        "reweighting": tica.reweighting,
        "note": tica.note,
        "arrays": {part: f"{name}.{part}" for part in ("mean", "axes", "timescales")},
        "equation": "component = (feature - mean) @ axes; unit variance in the reference; times eigenvalue: kinetic map",
    }


def save_tica(out: Path, models: dict[str, tuple[TICAModel, tuple[str, ...], float]]) -> list[str]:
    """Write tica.safetensors and tica.json and return their names.

    Args:
        out: folder of the comparison.
        models: name ("torsions", "literature", "heavy") to model, feature names and time between frames in ps.
    """
    arrays = {
        f"{name}.{part}": np.ascontiguousarray(getattr(tica, part))
        for name, (tica, _, _) in models.items()
        for part in ("mean", "axes", "timescales")
    }
    write_arrays(out / ARRAYS, arrays)
    write_json(out / DESCRIPTION, [describe(name, *parts) for name, parts in models.items()])
    return [ARRAYS, DESCRIPTION]


def load_tica(folder: Path, name: str) -> tuple[TICAModel, tuple[str, ...]]:
    """Return a stored TICA model and the names of its features.

    Raises:
        DataError: the folder has no such model.
    """
    arrays, _ = read_arrays(folder / ARRAYS)
    try:
        described = {one["features"]: one for one in json.loads((folder / DESCRIPTION).read_text())}
        one = described[name]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder} holds no TICA of {name} features; run the compare stage again") from error
    parts = {part: arrays[f"{name}.{part}"] for part in ("mean", "axes", "timescales")}
    tica = TICAModel(lag=one["lag_frames"], reweighting=one["reweighting"], note=one["note"], **parts)
    return tica, tuple(one["feature_names"])


def load_projection(folder: Path, topology: mdtraj.Topology, name: str) -> Projection:
    """Return a stored projection of coordinates.

    Raises:
        DataError: there is none, or it belongs to another molecule.
    """
    tica, names = load_tica(folder, name)
    features = feature_set(topology, name)
    if features.names != names:
        raise DataError(f"the TICA in {folder} has other features than this molecule; run the compare stage again")
    described = {one["features"]: one for one in json.loads((folder / DESCRIPTION).read_text())}
    return Projection(features=features, tica=tica, spacing_ps=described[name]["frame_spacing_ps"])
