"""Command `import-timewarp`: published Timewarp checkpoints and trajectories -> folders of the stages flow and reference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from openmm import app

from longstride.data.atomic import sha256_of
from longstride.data.frames import write_trajectory
from longstride.data.manifest import read_manifest, write_manifest
from longstride.data.timewarp_npz import PublishedTrajectory, read_published_trajectory, uniform_grid
from longstride.errors import DataError, LongstrideError
from longstride.flows.cartesian_checkpoint import PUBLISHED_TARGET, read_published, save_cartesian
from longstride.potentials.amber import AmberPotential
from longstride.provenance import provenance
from longstride.state import State
from longstride.systems import canonical_labels, load_prepared, prepare_file
from longstride.units import BOLTZMANN_KJ_PER_MOL_K

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longstride.systems import Prepared

PUBLISHED_TEMPERATURE_K = 310.0
# the force fields of the published sets: the peptides', and the older one of the first alanine and test sets
PUBLISHED_FORCE_FIELDS = (("amber14-all.xml", "implicit/obc1.xml"), ("amber99sbildn.xml", "amber99_obc.xml"))
PUBLISHED_CUTOFF_NM = 2.0
COMPARED_FRAMES = 100
# rms difference of the forces over their rms: rounding of the stored values gives 1e-6, another force field 5e-2
MOST_FORCE_ERROR = 1e-3
LONGEST_BOND_NM = 0.25


def checkpoint(path: Path, *, out: Path) -> None:
    """Write a published checkpoint as a folder of the train-flow stage, from which `sample --flow` works for any peptide.

    Raises:
        DataError: not a published kernel-attention checkpoint (`longstride.flows.cartesian_checkpoint.read_published`).
    """
    flow = read_published(path)
    parameters = sum(value.numel() for value in flow.parameters())
    origin = {"imported_from": path.name, "imported_sha256": sha256_of(path)}
    out.mkdir(parents=True, exist_ok=True)
    save_cartesian(out / "model.safetensors", flow, prepared=None, extra=origin)
    content = {
        "system": None,
        "coordinates": "cartesian",
        "target": PUBLISHED_TARGET,
        "system_hash": None,
        "temperature_K": PUBLISHED_TEMPERATURE_K,
        "tau_ps": list(flow.architecture.lags_ps),
        "labels": list(flow.architecture.labels),
        "architecture": flow.architecture.to_meta(),
        "parameters": parameters,
        **origin,
        "provenance": provenance(),
    }
    write_manifest(out, kind="flow", files=["model.safetensors"], content=content)
    sizes = flow.architecture
    print(
        f"import-timewarp: {parameters} parameters, {sizes.couplings} half-coupling layers of 2 networks with {sizes.layers}"
        f" encoder layers, trained at {', '.join(sizes.labels)}; nothing in {path.name} was executed"
    )


def trajectories(
    paths: Sequence[Path], *, prepared: Path, out: Path, structure: Path | None, segments: int, recompute: bool
) -> None:
    """Write published trajectories of one molecule as a folder of the reference stage.

    Frames on the uniform grid of each file are kept and cut into `segments` consecutive trajectories, so that shards can hold
    some of them out. Stored energies and forces are compared with the prepared force field.

    Args:
        paths: files `*-traj-arrays.npz` of one molecule.
        prepared: folder of the prepare stage, made from the published structure.
        out: where to write.
        structure: the file `*-state0.pdb`; None looks beside the first trajectory.
        segments: trajectories per file.
        recompute: store energies and forces of the prepared force field, instead of refusing those of another one.

    Raises:
        DataError: damaged files, other atoms or another order than the prepared molecule has, or another force field.
    """
    molecule = load_prepared(prepared)
    conditions = read_manifest(prepared, kind="prepare")
    atoms = structure or _beside(paths[0])
    _check_atoms(molecule, atoms)
    pieces: list[dict[str, np.ndarray]] = []
    sources: list[dict[str, Any]] = []
    for path in paths:
        frames, source = _import_one(path, molecule, structure=atoms, recompute=recompute)
        pieces += _cut(frames, segments, path)
        sources.append(source)
    spacings = {source["frame_spacing_ps"] for source in sources}
    if len(spacings) > 1:
        raise DataError(
            f"the files have different frame spacings ({sorted(spacings)} ps); import them into folders of their own"
        )
    content = {
        "system": molecule.system.name,
        "target": molecule.target,
        "system_hash": molecule.system_hash,
        "temperature_K": conditions["temperature_K"],
        "trajectories": len(pieces),
        "frame_spacing_ps": spacings.pop(),
        "timestep_fs": sources[0]["timestep_fs"],
        "masses_Da": molecule.system.masses.tolist(),
        "imported": sources,
        "energies": "recomputed" if recompute else "as published",
        "counts": {},
        "wall_s": None,  # not recorded in these files
        "provenance": provenance(),
    }
    out.mkdir(parents=True, exist_ok=True)
    files = [name for index, frames in enumerate(pieces) for name in write_trajectory(out, index, frames)]
    write_manifest(out, kind="reference", files=files, content=content)
    kept = sum(len(frames["positions"]) for frames in pieces)
    print(f"import-timewarp: {len(pieces)} trajectories, {kept} frames {content['frame_spacing_ps']:g} ps apart")


def _import_one(
    path: Path, molecule: Prepared, *, structure: Path, recompute: bool
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the frames of one file on its uniform grid, and what the manifest says of it."""
    found = read_published_trajectory(path)
    _check_geometry(molecule, found, path)
    agreement = compare_with_force_field(molecule, found)
    print(f"import-timewarp: {path.name}: {_sentence(molecule, agreement)}")
    fits = agreement["relative_force_error"] <= MOST_FORCE_ERROR  # false for forces that are not finite
    if not fits and not recompute:
        raise DataError(_mismatch(path, structure, molecule, found=found, agreement=agreement))
    try:
        frames, spacing = _on_grid(found, molecule, recompute=recompute)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    times = {"frame_spacing_ps": round(spacing, 9), "timestep_fs": round(1e3 * found.timestep_ps, 9)}
    return frames, {"file": path.name, "sha256": sha256_of(path), **times, **agreement}


def _beside(path: Path) -> Path:
    ending = "-traj-arrays.npz"
    if not path.name.endswith(ending):
        raise DataError(f"{path} is not named *{ending}; say with --structure where its *-traj-state0.pdb is")
    return path.with_name(path.name.removesuffix(ending) + "-traj-state0.pdb")


def _check_atoms(molecule: Prepared, structure: Path) -> None:
    """Raise unless the published structure has the atoms of the prepared molecule in the same order."""
    try:
        atoms = list(app.PDBFile(str(structure)).topology.atoms())
    except FileNotFoundError:
        raise DataError(f"structure file {structure} does not exist; it belongs beside the trajectory") from None
    except Exception as error:  # the reader raises whatever its parsing trips over
        raise DataError(f"cannot read {structure} as PDB: {' '.join(str(error).split())}") from error
    system = molecule.system
    ours = list(zip(system.residue_indices.tolist(), system.residue_names, system.atom_names, strict=True))
    theirs = [(atom.residue.index, atom.residue.name, atom.name) for atom in atoms]
    mend = f"prepare the molecule from that file: longstride prepare --file {structure.name}"
    if len(ours) != len(theirs):
        raise DataError(f"{structure} has {len(theirs)} atoms and {system.name} {len(ours)}; {mend}")
    for index, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        if a != b:
            was, here = (f"{name} of {residue} {number + 1}" for number, residue, name in (a, b))
            raise DataError(f"{structure}: atom {index + 1} is {was}, in {system.name} it is {here}; {mend}")


def _check_geometry(molecule: Prepared, found: PublishedTrajectory, path: Path) -> None:
    positions = found.frames["positions"]
    if positions.shape[1] != molecule.system.n_atoms:
        raise DataError(f"{path} has {positions.shape[1]} atoms and {molecule.system.name} {molecule.system.n_atoms}")
    first, second = molecule.system.bonds.T
    longest = np.linalg.norm(positions[:, first] - positions[:, second], axis=-1).max(0)
    worst = int(longest.argmax())
    if longest[worst] > LONGEST_BOND_NM:
        a, b = (molecule.system.atom_names[index] for index in molecule.system.bonds[worst])
        raise DataError(
            f"{path}: the bond {a}-{b} is {longest[worst]:.2f} nm long; the atoms of {molecule.system.name}"
            " are in another order"
        )


def compare_with_force_field(molecule: Prepared, found: PublishedTrajectory) -> dict[str, float]:
    """Return how stored energies and forces differ from the molecule's force field, evaluated in float64.

    Returns:
        mean, standard deviation and largest absolute value of U(ours) - U(stored), kJ/mol; rms of the forces' difference over
        their rms; largest difference of a force component, kJ/mol/nm; kinetic temperature, K, over 3N - 3 degrees of freedom;
        frames used.
    """
    frames = found.frames
    chosen = np.linspace(0, len(found.step) - 1, min(COMPARED_FRAMES, len(found.step))).astype(int)
    energy, forces = _evaluate(molecule, frames["positions"][chosen])
    difference = energy - frames["potential_energy"][chosen]
    stored = frames["forces"][chosen].astype(np.float64)
    n_dof = 3 * molecule.system.n_atoms - 3
    return {
        "mean_energy_difference_kJ_per_mol": float(difference.mean()),
        "sd_energy_difference_kJ_per_mol": float(difference.std()),
        "max_energy_difference_kJ_per_mol": float(np.abs(difference).max()),
        "relative_force_error": float(np.sqrt(np.square(forces - stored).mean() / np.square(stored).mean())),
        "max_force_difference_kJ_per_mol_nm": float(np.abs(forces - stored).max()),
        "kinetic_temperature_K": float(2 * frames["kinetic_energy"].mean() / (n_dof * BOLTZMANN_KJ_PER_MOL_K)),
        "frames": len(chosen),
    }


def _evaluate(molecule: Prepared, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    potential = AmberPotential.from_openmm(molecule.openmm_system, molecule.system, name=molecule.target)
    energy, forces = potential.energy_forces(State(positions=torch.from_numpy(positions.astype(np.float64))))
    return energy.numpy(), forces.numpy()


def _sentence(molecule: Prepared, agreement: dict[str, float]) -> str:
    energy = f"{agreement['mean_energy_difference_kJ_per_mol']:.2g} ± {agreement['sd_energy_difference_kJ_per_mol']:.2g} kJ/mol"
    return (
        f"energies of {molecule.target} differ by {energy}, forces by {agreement['relative_force_error']:.1e} (relative rms)"
        f" over {agreement['frames']:.0f} frames; kinetic temperature {agreement['kinetic_temperature_K']:.0f} K"
    )


def _mismatch(
    path: Path, structure: Path, molecule: Prepared, *, found: PublishedTrajectory, agreement: dict[str, float]
) -> str:
    """Return the error message, with the published force field that does fit, if one does."""
    for files in PUBLISHED_FORCE_FIELDS:
        if "-".join(Path(name).stem for name in files) == molecule.target:
            continue  # the one that was just found not to fit
        try:
            other = prepare_file(structure, name=molecule.system.name, force_field=files, cutoff_nm=PUBLISHED_CUTOFF_NM)
        except LongstrideError:
            continue
        if compare_with_force_field(other, found)["relative_force_error"] <= MOST_FORCE_ERROR:
            mend = f"they fit {' + '.join(files)}, so prepare with --force-field '[{', '.join(files)}]' --cutoff-nm 2.0"
            break
    else:
        mend = "they fit no published force field either"
    wrong = f"stored forces differ from {molecule.target} by {agreement['relative_force_error']:.1e} (relative rms)"
    return f"{path}: {wrong}; {mend}; or import with --recompute, which keeps the frames and stores new energies and forces"


def _on_grid(found: PublishedTrajectory, molecule: Prepared, *, recompute: bool) -> tuple[dict[str, np.ndarray], float]:
    """Return the frames on the uniform grid with canonically labelled atoms, and their spacing in ps."""
    chosen, spacing = uniform_grid(found.step)
    frames = {name: value[chosen] for name, value in found.frames.items()}
    # one relabelling for the whole trajectory, as labels do not change in the course of dynamics
    order = _order(molecule, frames["positions"][0].astype(np.float64))
    frames |= {name: np.ascontiguousarray(frames[name][:, order]) for name in ("positions", "velocities", "forces")}
    if recompute:
        energy, forces = _evaluate(molecule, frames["positions"])
        wrong = int((~np.isfinite(energy) | ~np.isfinite(forces).all((1, 2))).sum())
        if wrong:
            raise DataError(f"{wrong} frames have no finite energy or forces of {molecule.target}; the trajectory is damaged")
        frames |= {"potential_energy": energy, "forces": forces.astype(np.float32)}
    return frames, spacing * found.timestep_ps


def _order(molecule: Prepared, positions: np.ndarray) -> np.ndarray:
    """Return the atoms of `positions` in canonical order; only equivalent hydrogens change places."""
    relabelled = canonical_labels(molecule.system, positions)
    distance = np.abs(relabelled[:, None] - positions[None]).max(-1)
    order = distance.argmin(1)
    if not np.array_equal(np.sort(order), np.arange(len(order))):
        raise DataError("two atoms of the first frame lie on each other; the trajectory is damaged")
    return order


def _cut(frames: dict[str, np.ndarray], segments: int, path: Path) -> list[dict[str, np.ndarray]]:
    length = len(frames["positions"]) // segments
    if length < 2:
        raise DataError(f"{path} has {len(frames['positions'])} evenly spaced frames, too few for {segments} segments")
    return [{name: value[k * length : (k + 1) * length] for name, value in frames.items()} for k in range(segments)]
