"""Reading sample sets and the reference a part at a time: what the analysis needs of every frame, coordinates dropped at once.

Files are read in parts of at most `features.CHUNK` frames, so memory holds one part of coordinates beside the results.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from longstride.analysis.energies import kinetic_temperature
from longstride.analysis.features import CHUNK, Torsions, find_torsions, load_topology, torsion_angles
from longstride.analysis.frames import STRUCTURES, FrameLayout, Frames, concatenate, cut, find_layout, frames_of, pick_frames
from longstride.data.manifest import MANIFEST, read_manifest
from longstride.errors import DataError
from longstride.units import BOLTZMANN_KJ_PER_MOL_K

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import mdtraj


@dataclass(frozen=True, kw_only=True)
class Molecule:
    """What the analysis needs to know of a prepared system.

    Attributes:
        manifest: of the prepare stage.
        topology: MDTraj topology.
        torsions: its backbone torsions.
        elements: [atom] element symbols.
        masses: [atom] Da, without hydrogen mass repartitioning.
        layout: which atoms the features of a frame are made of; None keeps torsions and energies only.
    """

    manifest: dict[str, Any]
    topology: mdtraj.Topology
    torsions: Torsions
    elements: np.ndarray
    masses: np.ndarray
    layout: FrameLayout | None = None


def load_molecule(prepared: Path) -> Molecule:
    """Read a prepare folder.

    Raises:
        DataError: the manifest or structure.pdb is missing or unreadable.
    """
    manifest = read_manifest(prepared, kind="prepare")
    topology = load_topology(prepared / "structure.pdb")
    atoms = list(topology.atoms)
    return Molecule(
        manifest=manifest,
        topology=topology,
        torsions=find_torsions(topology),
        elements=np.array([atom.element.symbol for atom in atoms]),
        masses=np.array([float(atom.element.mass) for atom in atoms]),
        layout=find_layout(topology, load_positions(prepared / "structure.pdb")),
    )


def load_positions(structure: Path) -> np.ndarray:
    """Return the coordinates of a PDB file, [atom, 3] nm.

    Raises:
        DataError: the file is missing or unreadable.
    """
    import mdtraj

    try:
        return np.asarray(mdtraj.load(str(structure)).xyz[0], dtype=np.float64)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"cannot read the structure {structure} ({error}); run the prepare stage again") from error


@dataclass(frozen=True, kw_only=True)
class SampleSet:
    """One method's samples of one target.

    Attributes:
        manifest: of the sample (or reference) stage.
        angles: [time, chain, torsion] rad.
        energy: [time, chain] kJ/mol of the target.
        temperature: name ("all", "H", "C", ...) to [time, chain] K; empty without velocities.
        temperature_note: why there is no temperature per element.
        log_weights: [time, chain] ln of the weights of biased samples, up to a constant; None where all weigh the same.
        frames: what is kept of the coordinates; None for sets that were put together from others.
    """

    manifest: dict[str, Any]
    angles: np.ndarray
    energy: np.ndarray
    temperature: dict[str, np.ndarray]
    temperature_note: str
    log_weights: np.ndarray | None = None
    frames: Frames | None = None

    @property
    def size(self) -> int:
        """Number of samples: times * chains."""
        return int(self.energy.size)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of the plan, whether or not it was filled.

    Attributes:
        method: name of the method.
        seed: its repeat number.
        status: "complete", or why there are no samples.
        samples: the samples, or None.
    """

    method: str
    seed: int
    status: str
    samples: SampleSet | None


def load_cell(folder: Path, molecule: Molecule) -> Cell:
    """Read one sample folder .../<method>/seed<k>; a missing manifest gives a cell with status "absent".

    Raises:
        DataError: files are altered, or were sampled from another potential or temperature.
    """
    method, name = folder.parent.name, folder.name
    seed = int(name.removeprefix("seed")) if name.removeprefix("seed").isdigit() else 0
    if not (folder / MANIFEST).exists():
        return Cell(method=method, seed=seed, status="absent: not sampled", samples=None)
    manifest = read_manifest(folder, kind="samples")
    _check_origin(folder, manifest, molecule)
    path = folder / "samples.safetensors"
    with _open(path, single=False) as arrays:
        _require(arrays, path, stage="sample")
        shape, energies = arrays.shape("positions"), arrays.shape("potential_energy")
        if len(shape) != 4 or energies != shape[:2]:
            raise DataError(
                f"{folder}: positions {shape} and energies {energies} are not [save, chain, ...]; run the sample stage again"
            )
        if 0 in shape:
            return Cell(method=method, seed=seed, status="empty: no saved state", samples=None)
        found, finite = _build(manifest, arrays, molecule, structures=STRUCTURES, literature=False)
    status = "complete" if finite else "not finite: some positions or energies are NaN or infinite"
    return Cell(method=str(manifest["method"]), seed=int(manifest.get("repeat", seed)), status=status, samples=found)


def load_reference(folder: Path, molecule: Molecule) -> SampleSet:
    """Read reference trajectories as one SampleSet, chains = trajectories (cut to the shortest).

    Raises:
        DataError: files are missing or altered, or belong to another potential.
    """
    manifest = read_manifest(folder, kind="reference")
    _check_origin(folder, manifest, molecule)
    names = sorted(name for name in manifest["files"] if name.endswith(".safetensors"))
    if not names:
        raise DataError(f"{folder} names no trajectory; run the reference stage again")
    parts = []
    for name in names:
        with _open(folder / name, single=True) as arrays:
            _require(arrays, folder / name, stage="reference")
            part, _ = _build(manifest, arrays, molecule, structures=-(-STRUCTURES // len(names)), literature=True)
        parts.append(part)
    length = min(len(part.energy) for part in parts)
    frames = [cut(part.frames, length) for part in parts if part.frames is not None]
    return SampleSet(
        manifest=manifest,
        angles=np.concatenate([part.angles[:length] for part in parts], axis=1),
        energy=np.concatenate([part.energy[:length] for part in parts], axis=1),
        temperature={
            key: np.concatenate([part.temperature[key][:length] for part in parts], axis=1)
            for key in parts[0].temperature
            if all(key in part.temperature for part in parts)
        },
        temperature_note=parts[0].temperature_note,
        frames=concatenate(frames, axis=1) if frames else None,
    )


@dataclass(frozen=True)
class _Arrays:
    """The arrays of one file, read by rows; those of a single trajectory get a chain axis of length one."""

    handle: Any
    single: bool

    def __contains__(self, name: str) -> bool:
        return name in self.handle.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(self.handle.get_slice(name).get_shape())
        return (shape[0], 1, *shape[1:]) if self.single and shape else shape

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        part = self.handle.get_slice(name)
        values = part[start : min(stop, part.get_shape()[0])]
        return values[:, None] if self.single else values

    def whole(self, name: str) -> np.ndarray:
        return self.rows(name, 0, self.shape(name)[0])


@contextmanager
def _open(path: Path, *, single: bool) -> Iterator[_Arrays]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as handle:
            yield _Arrays(handle, single)
    except (SafetensorError, OSError) as error:
        raise DataError(f"cannot read {path}: {error}; delete it and run the stage that writes it again") from error


def _require(arrays: _Arrays, path: Path, *, stage: str) -> None:
    for field in ("positions", "potential_energy"):
        if field not in arrays:
            raise DataError(f"{path} has no {field}; run the {stage} stage again")


def _check_origin(folder: Path, manifest: dict[str, Any], molecule: Molecule) -> None:
    for key, meaning in (("system_hash", "potential"), ("temperature_K", "temperature")):
        expected = molecule.manifest.get(key)
        if expected is not None and manifest.get(key) != expected:
            raise DataError(f"{folder} was made with another {meaning} than the prepared system; delete it and run again")


def _build(
    manifest: dict[str, Any], arrays: _Arrays, molecule: Molecule, *, structures: int, literature: bool
) -> tuple[SampleSet, bool]:
    """Return the samples of one file and whether all positions and energies are finite."""
    shape = arrays.shape("positions")
    if shape[2:] != (len(molecule.masses), 3):
        raise DataError(
            f"positions have shape {shape}, the prepared topology has {len(molecule.masses)} atoms; delete the samples"
        )
    times, chains = shape[:2]
    energy = np.asarray(arrays.whole("potential_energy"), dtype=np.float64)
    finite = bool(np.isfinite(energy).all())
    picked = pick_frames(times * chains, structures, np.random.default_rng(0))
    step = max(1, CHUNK // max(chains, 1))
    angles, kept = [], []
    for start in range(0, times, step):
        positions = arrays.rows("positions", start, start + step)
        finite = finite and bool(np.isfinite(positions).all())
        angles.append(torsion_angles(positions, molecule.topology, molecule.torsions))
        if molecule.layout is not None:
            kept.append(
                frames_of(positions, molecule.layout, molecule.topology, first=start, picked=picked, literature=literature)
            )
    temperature, note = _temperatures(manifest, arrays, molecule, step=step)
    found = SampleSet(
        manifest=manifest,
        angles=np.concatenate(angles),
        energy=energy,
        temperature=temperature,
        temperature_note=note,
        log_weights=np.asarray(arrays.whole("log_weights"), dtype=np.float64) if "log_weights" in arrays else None,
        frames=concatenate(kept, axis=0) if kept else None,
    )
    return found, finite


def _temperatures(
    manifest: dict[str, Any], arrays: _Arrays, molecule: Molecule, *, step: int
) -> tuple[dict[str, np.ndarray], str]:
    kinetic = np.asarray(arrays.whole("kinetic_energy")) if "kinetic_energy" in arrays else None
    freedom = 3 * len(molecule.masses)  # Langevin dynamics thermalises the centre of mass too
    total = None if kinetic is None else {"all": 2 * kinetic / (freedom * BOLTZMANN_KJ_PER_MOL_K)}
    if "velocities" not in arrays:
        return ({}, "no velocities stored") if total is None else (total, "no velocities stored, only kinetic energies")
    masses = np.asarray(manifest.get("masses_Da") or molecule.masses, dtype=float)
    members = {"all": np.ones(len(masses), dtype=bool)}
    members |= {element: molecule.elements == element for element in sorted(set(molecule.elements.tolist()))}
    parts: dict[str, list[np.ndarray]] = {name: [] for name in members}
    own = 0.0
    times, chains = arrays.shape("velocities")[:2]
    for start in range(0, times, step):
        velocities = arrays.rows("velocities", start, start + step)
        own += float(0.5 * np.einsum("...ax,...ax,a->...", velocities, velocities, masses, optimize=True).sum())
        for name, inside in members.items():
            parts[name].append(kinetic_temperature(velocities, masses, inside))
    # the two may differ by half a step of a leap-frog scheme, but not by a repartitioned hydrogen mass
    if kinetic is not None and total is not None:
        if abs(own / max(times * chains, 1) / max(float(kinetic.mean()), 1e-12) - 1) > 0.1:
            return total, "the manifest does not give the masses of the dynamics (masses_Da)"
    return {name: np.concatenate(values) for name, values in parts.items()}, ""
