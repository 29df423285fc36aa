"""Reading sample sets and the reference: torsions, energies and temperatures, coordinates dropped at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from longstride.analysis.energies import kinetic_temperature
from longstride.analysis.features import Torsions, find_torsions, load_topology, torsion_angles
from longstride.data.atomic import read_arrays
from longstride.data.manifest import MANIFEST, read_manifest
from longstride.errors import DataError
from longstride.units import BOLTZMANN_KJ_PER_MOL_K

if TYPE_CHECKING:
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
    """

    manifest: dict[str, Any]
    topology: mdtraj.Topology
    torsions: Torsions
    elements: np.ndarray
    masses: np.ndarray


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
    )


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
    """

    manifest: dict[str, Any]
    angles: np.ndarray
    energy: np.ndarray
    temperature: dict[str, np.ndarray]
    temperature_note: str
    log_weights: np.ndarray | None = None

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
    arrays, _ = read_arrays(folder / "samples.safetensors")
    for field in ("positions", "potential_energy"):
        if field not in arrays:
            raise DataError(f"{folder / 'samples.safetensors'} has no {field}; run the sample stage again")
    positions, energy = arrays["positions"], np.asarray(arrays["potential_energy"], dtype=np.float64)
    if positions.ndim != 4 or energy.shape != positions.shape[:2]:
        raise DataError(
            f"{folder}: positions {positions.shape} and energies {energy.shape} are not [save, chain, ...];"
            " run the sample stage again"
        )
    found = _build(manifest, arrays, molecule)
    status = "complete"
    if not positions.size:
        return Cell(method=method, seed=seed, status="empty: no saved state", samples=None)
    if not (np.isfinite(energy).all() and np.isfinite(positions).all()):
        status = "not finite: some positions or energies are NaN or infinite"
    return Cell(method=str(manifest["method"]), seed=int(manifest.get("repeat", seed)), status=status, samples=found)


def load_reference(folder: Path, molecule: Molecule) -> SampleSet:
    """Read reference trajectories as one SampleSet, chains = trajectories (cut to the shortest).

    Raises:
        DataError: files are missing or altered, or belong to another potential.
    """
    manifest = read_manifest(folder, kind="reference")
    _check_origin(folder, manifest, molecule)
    names = sorted(name for name in manifest["files"] if name.endswith(".safetensors"))
    parts = []
    for name in names:
        arrays, _ = read_arrays(folder / name)
        for field in ("positions", "potential_energy"):
            if field not in arrays:
                raise DataError(f"{folder / name} has no {field}; run the reference stage again")
        single = {key: value[:, None] for key, value in arrays.items() if key != "time"}
        parts.append(_build(manifest, single, molecule))
    if not parts:
        raise DataError(f"{folder} names no trajectory; run the reference stage again")
    length = min(len(part.energy) for part in parts)
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
    )


def _check_origin(folder: Path, manifest: dict[str, Any], molecule: Molecule) -> None:
    for key, meaning in (("system_hash", "potential"), ("temperature_K", "temperature")):
        expected = molecule.manifest.get(key)
        if expected is not None and manifest.get(key) != expected:
            raise DataError(f"{folder} was made with another {meaning} than the prepared system; delete it and run again")


def _build(manifest: dict[str, Any], arrays: dict[str, np.ndarray], molecule: Molecule) -> SampleSet:
    temperature, note = _temperatures(manifest, arrays, molecule)
    return SampleSet(
        manifest=manifest,
        angles=torsion_angles(arrays["positions"], molecule.topology, molecule.torsions),
        energy=np.asarray(arrays["potential_energy"], dtype=np.float64),
        temperature=temperature,
        temperature_note=note,
        log_weights=np.asarray(arrays["log_weights"], dtype=np.float64) if "log_weights" in arrays else None,
    )


def _temperatures(
    manifest: dict[str, Any], arrays: dict[str, np.ndarray], molecule: Molecule
) -> tuple[dict[str, np.ndarray], str]:
    kinetic = arrays.get("kinetic_energy")
    velocities = arrays.get("velocities")
    if velocities is None:
        if kinetic is None:
            return {}, "no velocities stored"
        freedom = 3 * len(molecule.masses)  # Langevin dynamics thermalises the centre of mass too
        return {"all": 2 * kinetic / (freedom * BOLTZMANN_KJ_PER_MOL_K)}, "no velocities stored, only kinetic energies"
    masses = np.asarray(manifest.get("masses_Da") or molecule.masses, dtype=float)
    if kinetic is not None:
        own = 0.5 * np.einsum("...ax,...ax,a->...", velocities, velocities, masses, optimize=True)
        # the two may differ by half a step of a leap-frog scheme, but not by a repartitioned hydrogen mass
        if abs(float(own.mean()) / max(float(kinetic.mean()), 1e-12) - 1) > 0.1:
            freedom = 3 * len(masses)
            total = 2 * kinetic / (freedom * BOLTZMANN_KJ_PER_MOL_K)
            return {"all": total}, "the manifest does not give the masses of the dynamics (masses_Da)"
    found = {"all": kinetic_temperature(velocities, masses, np.ones(len(masses), dtype=bool))}
    for element in sorted(set(molecule.elements.tolist())):
        found[element] = kinetic_temperature(velocities, masses, molecule.elements == element)
    return found, ""
