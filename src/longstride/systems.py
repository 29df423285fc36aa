"""From a sequence or a structure file to a molecule with a force field, isolated or in a periodic box of water.

Hydrogens and other interchangeable atoms get canonical labels here, before anything is stored: preparation
tools number them in either handedness, which a learned model would see as different molecules.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import openmm
from openmm import app, unit

from longstride.data.atomic import atomic_path, write_json, write_text
from longstride.data.manifest import read_manifest, write_manifest
from longstride.errors import DataError, LongstrideError
from longstride.solvation import (
    Solvent,
    add_water,
    box_of,
    check_apart,
    check_cutoff,
    check_overlap,
    require_explicit,
    seeded_random,
)
from longstride.state import System

if TYPE_CHECKING:
    from longstride.ligands import Ligand

ONE_LETTER = {
    "A": "ALA", "R": "ARG", "N": "ASN", "D": "ASP", "C": "CYS", "Q": "GLN", "E": "GLU", "G": "GLY", "H": "HIS", "I": "ILE",
    "L": "LEU", "K": "LYS", "M": "MET", "F": "PHE", "P": "PRO", "S": "SER", "T": "THR", "W": "TRP", "Y": "TYR", "V": "VAL",
}  # fmt: skip
THREE_LETTER = {name: letter for letter, name in ONE_LETTER.items()}
# protonation variants by name; plain HIS is the neutral epsilon tautomer
VARIANTS = {"HIS": "HIE", "HID": "HID", "HIE": "HIE", "HIP": "HIP", "ASH": "ASH", "GLH": "GLH", "LYN": "LYN"}
PARENT = {"HID": "HIS", "HIE": "HIS", "HIP": "HIS", "ASH": "ASP", "GLH": "GLU", "LYN": "LYS"}
N_CAP, C_CAP = "ACE", "NME"
MIN_CONTACT_NM = 0.1  # between atoms of two molecules; a hydrogen bond is 0.15 nm and more


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A molecule ready to simulate.

    Attributes:
        system: identity, masses and bonds.
        openmm_system: the OpenMM System (no constraints, no centre-of-mass remover).
        topology: the OpenMM Topology.
        positions: [atom, 3] nm, minimised.
        system_hash: SHA-256 of the serialised OpenMM System; models and samples carry it.
        target: label of the potential, such as "amber14-all-obc1" or, in a box, "amber14-all-tip3p-pme".
        box: [3, 3] nm (rows are box vectors), or None for an isolated molecule.
        charge: total charge, elementary charges.
    """

    system: System
    openmm_system: openmm.System
    topology: app.Topology
    positions: np.ndarray
    system_hash: str
    target: str
    box: np.ndarray | None = None
    charge: int = 0


def parse_sequence(sequence: str) -> list[str]:
    """Return residue names of "AA" (one letter each) or "ACE-ALA-NME" (dash-separated names).

    Raises:
        LongstrideError: an unknown residue, a cap inside the chain, or a free single residue.
    """
    names = sequence.upper().split("-") if "-" in sequence else [ONE_LETTER.get(letter, letter) for letter in sequence.upper()]
    known = {*THREE_LETTER, *VARIANTS, N_CAP, C_CAP}
    for position, name in enumerate(names, start=1):
        if name not in known:
            raise LongstrideError(
                f"unknown residue {name!r} at position {position} of {sequence!r}; known: {' '.join(sorted(known))},"
                f" or one letter each of {''.join(sorted(ONE_LETTER))}"
            )
    inner = names[(names[0] == N_CAP) : len(names) - (names[-1] == C_CAP)]
    if N_CAP in inner or C_CAP in inner or not inner:
        raise LongstrideError(f"{sequence!r}: ACE may only stand first and NME last, with at least one amino acid between")
    if len(names) < 2:
        raise LongstrideError(f"{sequence!r}: a single uncapped amino acid has no AMBER template; cap it as ACE-{names[0]}-NME")
    return names


def prepare_sequence(sequence: str, **physics: Any) -> Prepared:  # noqa: ANN401 - passed to `prepare`
    """Build an extended peptide from a sequence and prepare it; see `prepare` for the keyword arguments."""
    names = parse_sequence(sequence)
    topology, positions = _build_heavy_atoms(names)
    return prepare(topology, positions, variants=[VARIANTS.get(name) for name in names], add_hydrogens=True, **physics)


def prepare_water(molecules: int, *, density: float = 0.997, **physics: Any) -> Prepared:  # noqa: ANN401 - passed to `prepare`
    """Build a periodic box of water and prepare it; see `prepare` for the keyword arguments.

    Args:
        molecules: number of water molecules.
        density: g/cm3, that of water at 298 K and 1 bar by default (216 molecules: 1.8643 nm).
        **physics: keyword arguments of `prepare`.
    """
    return prepare(app.Topology(), [] * unit.nanometer, solvent=Solvent(molecules=molecules, density=density), **physics)


def prepare_file(path: Path, **physics: Any) -> Prepared:  # noqa: ANN401 - passed to `prepare`
    """Read a PDB or mmCIF file and prepare it; hydrogens are added only where the file has none at all.

    Raises:
        LongstrideError: the file is missing, unreadable, has missing heavy atoms or an unknown ligand.
    """
    if not path.is_file():
        raise LongstrideError(f"structure file {path} does not exist")
    reader = app.PDBxFile if path.suffix.lower() in (".cif", ".mmcif") else app.PDBFile
    try:
        structure = reader(str(path))
        count = structure.topology.getNumAtoms()
    except Exception as error:  # the readers raise whatever their parsing trips over
        raise LongstrideError(f"cannot read {path} as {reader.__name__.removesuffix('File')}: {_flat(error)}") from error
    if count == 0:
        raise LongstrideError(f"{path} holds no atoms")
    bare = all(atom.element is not app.element.hydrogen for atom in structure.topology.atoms())
    structure.topology.setPeriodicBoxVectors(None)  # that of a crystal is no box to simulate in
    return prepare(structure.topology, structure.positions, variants=None, add_hydrogens=bare, source=str(path), **physics)


def prepare(
    topology: app.Topology,
    positions: unit.Quantity,
    *,
    name: str,
    force_field: tuple[str, ...],
    cutoff_nm: float | None,
    variants: list[str | None] | None = None,
    add_hydrogens: bool = False,
    source: str = "",
    ligand: Ligand | None = None,
    solvent: Solvent | None = None,
) -> Prepared:
    """Parametrise, relabel canonically and minimise a molecule, in a box of water where there is a `solvent`.

    A box is cubic, its water flexible; its electrostatics is particle-mesh Ewald. There are no constraints anywhere.

    Args:
        topology: heavy atoms or all atoms.
        positions: of those atoms.
        name: label of the system.
        force_field: OpenMM force field XML files, by name or path.
        cutoff_nm: non-periodic cutoff with reaction field, or None; with a solvent that of the direct sum of PME.
        variants: protonation variant per residue for `add_hydrogens`.
        add_hydrogens: add missing hydrogens at pH 7.
        source: file name for error messages.
        ligand: a small molecule to add, in the frame of `positions`, with its own parameters.
        solvent: water to add.

    Raises:
        LongstrideError: unknown force field, residue without a template, missing or overlapping atoms, a box too small.
    """
    source = source or name
    if solvent is not None:
        require_explicit(force_field, name=name)
    field = _load_force_field(force_field, ligand)
    modeller = app.Modeller(topology, positions)
    if add_hydrogens:
        _add_hydrogens(modeller, field, variants, source=source)
    check_overlap(modeller.topology, _as_array(modeller.positions), box=None, source=source)
    if ligand is not None:
        _add_ligand(modeller, ligand, source=source)
    if solvent is not None:
        modeller = add_water(modeller, field, solvent, name=name)
    complete = _sorted_bonds(modeller.topology)
    box = box_of(complete)
    openmm_system = _create_system(field, complete, cutoff_nm, source)
    system = describe(complete, openmm_system, name=name)
    start = _relaxed(system, openmm_system, _as_array(modeller.positions))
    check_overlap(complete, start, box=box, source=source)
    return Prepared(
        system=system,
        openmm_system=openmm_system,
        topology=complete,
        positions=start,
        system_hash=hash_system(openmm_system),
        target=_target(force_field, ligand, periodic=box is not None),
        box=box,
        charge=net_charge(openmm_system, name=name),
    )


def _target(force_field: tuple[str, ...], ligand: Ligand | None, *, periodic: bool) -> str:
    parts = [Path(item).stem for item in force_field]
    return "-".join([*parts, *([ligand.label] if ligand else []), *(["pme"] if periodic else [])])


def _relaxed(system: System, openmm_system: openmm.System, positions: np.ndarray) -> np.ndarray:
    # a box is one of many minima and is equilibrated before use: only what is too close must go
    tolerance = 10.0 if openmm_system.usesPeriodicBoundaryConditions() else 2.0
    return canonical_labels(system, minimise(openmm_system, canonical_labels(system, positions), tolerance=tolerance))


def _add_hydrogens(modeller: app.Modeller, field: app.ForceField, variants: list[str | None] | None, *, source: str) -> None:
    try:
        with seeded_random():
            modeller.addHydrogens(field, pH=7.0, variants=variants, platform=_reference_platform())
    except (ValueError, KeyError, openmm.OpenMMException) as error:
        raise LongstrideError(_template_message(error, source)) from error


def _add_ligand(modeller: app.Modeller, ligand: Ligand, *, source: str) -> None:
    check_overlap(ligand.topology, ligand.positions, box=None, source="ligand")
    first = modeller.topology.getNumAtoms()
    modeller.add(ligand.topology, ligand.positions * unit.nanometer)
    other = np.arange(modeller.topology.getNumAtoms()) >= first
    x = _as_array(modeller.positions)
    check_apart(modeller.topology, x, other, source=f"the ligand in {source}", shortest_nm=MIN_CONTACT_NM)


def net_charge(openmm_system: openmm.System, *, name: str) -> int:
    """Return the total charge of a System in elementary charges, the sum over its NonbondedForce; 0 without one.

    Raises:
        LongstrideError: the partial charges do not add up to a whole number.
    """
    for force in openmm_system.getForces():
        if isinstance(force, openmm.NonbondedForce):
            charges = [force.getParticleParameters(index)[0] for index in range(force.getNumParticles())]
            total = sum(charge.value_in_unit(unit.elementary_charge) for charge in charges)
            if abs(total - round(total)) > 0.01:
                raise LongstrideError(f"the partial charges of {name!r} add up to {total:.3f}, not a whole number")
            return round(total)
    return 0


def describe(topology: app.Topology, openmm_system: openmm.System, *, name: str) -> System:
    """Return the `System` value of an OpenMM topology and system."""
    atoms = list(topology.atoms())
    bonds = sorted({(min(a.index, b.index), max(a.index, b.index)) for a, b in topology.bonds()})
    return System(
        name=name,
        atomic_numbers=np.array([atom.element.atomic_number for atom in atoms], dtype=np.int64),
        masses=np.array([openmm_system.getParticleMass(i).value_in_unit(unit.dalton) for i in range(len(atoms))]),
        bonds=np.array(bonds, dtype=np.int64).reshape(-1, 2),
        atom_names=tuple(atom.name for atom in atoms),
        residue_names=tuple(atom.residue.name for atom in atoms),
        residue_indices=np.array([atom.residue.index for atom in atoms], dtype=np.int64),
    )


def hash_system(openmm_system: openmm.System) -> str:
    """Return the SHA-256 of the serialised OpenMM System."""
    return hashlib.sha256(openmm.XmlSerializer.serialize(openmm_system).encode()).hexdigest()


def minimise(openmm_system: openmm.System, positions: np.ndarray, *, tolerance: float = 2.0) -> np.ndarray:
    """Return locally minimised positions [atom, 3] nm (tolerance in kJ/mol/nm).

    The platform is Reference, and for a periodic system the CPU with deterministic forces on one thread, which is far
    faster there: either way the result is reproducible.

    Raises:
        LongstrideError: the energy is not finite, such as for overlapping atoms.
    """
    platform, options = _reference_platform(), {}
    if openmm_system.usesPeriodicBoundaryConditions():
        platform = openmm.Platform.getPlatformByName("CPU")
        options = {"Threads": "1", "DeterministicForces": "true"}
    context = openmm.Context(openmm_system, openmm.VerletIntegrator(0.001), platform, options)
    context.setPositions(positions)
    openmm.LocalEnergyMinimizer.minimize(context, tolerance)
    state = context.getState(getPositions=True, getEnergy=True)
    energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
    if not np.isfinite(energy):
        raise LongstrideError("the energy of the structure is not finite: atoms overlap or coordinates are missing")
    return np.asarray(state.getPositions(asNumpy=True).value_in_unit(unit.nanometer), dtype=np.float64)


def neighbours(system: System) -> list[list[int]]:
    """Return the bonded neighbours of every atom, ascending."""
    found: list[list[int]] = [[] for _ in range(system.n_atoms)]
    for first, second in system.bonds:
        found[first].append(int(second))
        found[second].append(int(first))
    return [sorted(item) for item in found]


def canonical_labels(system: System, positions: np.ndarray) -> np.ndarray:
    """Return positions [atom, 3] in which equivalent hydrogens on one atom are labelled by handedness.

    Three hydrogens h1 h2 h3 on p: (h1-p).((h2-p)x(h3-p)) > 0. Two hydrogens on a tetrahedral p with other
    neighbours a < b: (a-p).((b-p)x(h1-p)) > 0. Two hydrogens on a planar p: h1 has the smaller |torsion| to the first
    other neighbour of p's neighbour. The energy does not change, since the atoms are interchangeable.
    """
    result = positions.copy()
    bonded = neighbours(system)
    for parent, around in enumerate(bonded):
        hydrogens = [atom for atom in around if system.atomic_numbers[atom] == 1]
        others = [atom for atom in around if system.atomic_numbers[atom] != 1]
        if len(hydrogens) in (2, 3) and _swapped(result, parent, hydrogens, others, bonded):
            first, second = hydrogens[:2]
            result[[first, second]] = result[[second, first]]
    return result


def _swapped(x: np.ndarray, parent: int, hydrogens: list[int], others: list[int], bonded: list[list[int]]) -> bool:
    arm = x - x[parent]
    if len(hydrogens) == 3:
        return _triple(arm[hydrogens[0]], arm[hydrogens[1]], arm[hydrogens[2]]) < 0
    if len(others) == 2:
        return _triple(arm[others[0]], arm[others[1]], arm[hydrogens[0]]) < 0
    if len(others) != 1:
        return False
    far = [atom for atom in bonded[others[0]] if atom != parent]
    if not far:
        return False
    torsions = [abs(torsion(x, (hydrogen, parent, others[0], far[0]))) for hydrogen in hydrogens]
    return torsions[0] > torsions[1]


def _triple(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> float:
    return float(np.dot(a, np.cross(b, c)))


def torsion(x: np.ndarray, atoms: tuple[int, int, int, int]) -> float:
    """Return the torsion angle i-j-k-l in radians, IUPAC sign, from positions [atom, 3]."""
    i, j, k, m = (x[a] for a in atoms)
    axis = k - j
    left, right = np.cross(i - j, axis), np.cross(m - k, axis)
    return float(np.arctan2(np.dot(np.cross(left, right), axis) / np.linalg.norm(axis), np.dot(left, right)))


def backbone_torsions(system: System) -> list[tuple[str, tuple[int, int, int, int]]]:
    """Return ("phi", atoms) and ("psi", atoms) of every residue that has them, in chain order."""
    by_residue: dict[int, dict[str, int]] = {}
    for index, (residue, name) in enumerate(zip(system.residue_indices, system.atom_names, strict=True)):
        by_residue.setdefault(int(residue), {})[name] = index
    bonded = neighbours(system)
    found = []
    for residue, atoms in sorted(by_residue.items()):
        if not {"N", "CA", "C"} <= atoms.keys():
            continue
        before, after = by_residue.get(residue - 1, {}), by_residue.get(residue + 1, {})
        n, ca, c = atoms["N"], atoms["CA"], atoms["C"]
        if before.get("C") in bonded[n]:
            found.append(("phi", (before["C"], n, ca, c)))
        if after.get("N") in bonded[c]:
            found.append(("psi", (n, ca, c, after["N"])))
    return found


def set_torsion(system: System, x: np.ndarray, atoms: tuple[int, int, int, int], value: float) -> np.ndarray:
    """Return positions with torsion `atoms` turned to `value` (radians) about its middle bond.

    A bond in a ring cannot be turned and leaves the positions as they are (proline's phi).
    """
    _, j, k, last = atoms
    moving = _far_side(neighbours(system), j, k)
    if j in moving:
        return x.copy()
    axis = (x[k] - x[j]) / np.linalg.norm(x[k] - x[j])
    turn = value - torsion(x, atoms)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    rotation = np.eye(3) + np.sin(turn) * cross + (1 - np.cos(turn)) * (cross @ cross)
    result = x.copy()
    index = sorted({*moving, last} - {k})
    result[index] = x[k] + (x[index] - x[k]) @ rotation.T
    return result


def _far_side(bonded: list[list[int]], near: int, start: int) -> set[int]:
    """Atoms reached from `start` without crossing the bond near-start; contains `near` if a ring leads back."""
    seen, todo = {start}, [start]
    while todo:
        atom = todo.pop()
        for other in bonded[atom]:
            if (atom, other) != (start, near) and other not in seen:
                seen.add(other)
                todo.append(other)
    return seen


def save_prepared(folder: Path, prepared: Prepared, content: dict[str, Any]) -> None:
    """Write system.json, system.xml, structure.pdb and the manifest."""
    system = prepared.system
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "system.xml", openmm.XmlSerializer.serialize(prepared.openmm_system))
    description = {
        "name": system.name,
        "target": prepared.target,
        "atomic_numbers": system.atomic_numbers.tolist(),
        "masses_Da": system.masses.tolist(),
        "bonds": system.bonds.tolist(),
        "atom_names": system.atom_names,
        "residue_names": system.residue_names,
        "residue_indices": system.residue_indices.tolist(),
        "positions_nm": prepared.positions.tolist(),  # PDB keeps only 1e-4 nm
        "box_nm": box_values(prepared.box),
    }
    write_json(folder / "system.json", description)
    with atomic_path(folder / "structure.pdb") as temporary, temporary.open("w") as handle:
        app.PDBFile.writeFile(prepared.topology, prepared.positions * unit.nanometer, handle, keepIds=True)
    write_manifest(
        folder,
        kind="prepare",
        files=["system.xml", "system.json", "structure.pdb"],
        content={
            "system": system.name,
            "target": prepared.target,
            "system_hash": prepared.system_hash,
            "n_atoms": system.n_atoms,
            "box_nm": box_values(prepared.box),
            "charge": prepared.charge,
            **content,
        },
    )


def load_prepared(folder: Path) -> Prepared:
    """Read what `save_prepared` wrote.

    Raises:
        DataError: missing, corrupted or inconsistent files.
    """
    manifest = read_manifest(folder, kind="prepare")
    text = (folder / "system.xml").read_text()
    found = json.loads((folder / "system.json").read_text())
    if hashlib.sha256(text.encode()).hexdigest() != manifest["system_hash"]:
        raise DataError(f"{folder / 'system.xml'} is not the system its manifest describes; run prepare again")
    system = System(
        name=found["name"],
        atomic_numbers=np.array(found["atomic_numbers"], dtype=np.int64),
        masses=np.array(found["masses_Da"]),
        bonds=np.array(found["bonds"], dtype=np.int64).reshape(-1, 2),
        atom_names=tuple(found["atom_names"]),
        residue_names=tuple(found["residue_names"]),
        residue_indices=np.array(found["residue_indices"], dtype=np.int64),
    )
    openmm_system = openmm.XmlSerializer.deserialize(text)
    topology = app.PDBFile(str(folder / "structure.pdb")).topology
    box = found.get("box_nm")
    topology.setPeriodicBoxVectors(None if box is None else np.array(box) * unit.nanometer)  # PDB keeps only 1e-4 nm
    return Prepared(
        system=system,
        openmm_system=openmm_system,
        topology=topology,
        positions=np.array(found["positions_nm"]),
        system_hash=manifest["system_hash"],
        target=found["target"],
        box=None if box is None else np.array(box),
        charge=net_charge(openmm_system, name=system.name),
    )


def box_values(box: np.ndarray | None) -> list[list[float]] | None:
    """Return a box [3, 3] nm as a manifest holds it, under the key box_nm; None for an isolated molecule."""
    return None if box is None else box.tolist()


def _build_heavy_atoms(names: list[str]) -> tuple[app.Topology, unit.Quantity]:
    """Build an extended chain; caps are cut from glycines put in their place."""
    import Bio.PDB
    import PeptideBuilder

    parents = [PARENT.get(name, name) for name in names]
    letters = ["G" if name in (N_CAP, C_CAP) else THREE_LETTER[name] for name in parents]
    structure = PeptideBuilder.make_extended_structure(letters)
    if names[-1] != C_CAP:
        PeptideBuilder.add_terminal_OXT(structure)
    chain = structure[0]["A"]
    for residue, name in zip(chain, parents, strict=True):
        residue.resname = name
        for atom in list(residue):
            renamed = _cap_atom(name, atom.id)
            if renamed is None:
                residue.detach_child(atom.id)
            elif renamed != atom.id:
                atom.id = atom.name = renamed
                atom.fullname = f" {renamed:<3}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chain.pdb"
        writer = Bio.PDB.PDBIO()
        writer.set_structure(structure)
        writer.save(str(path))
        built = app.PDBFile(str(path))
    return built.topology, built.positions


def _cap_atom(residue: str, atom: str) -> str | None:
    """Name of a glycine atom in the cap that replaces it, None where the cap has no such atom."""
    if residue == N_CAP:
        return {"CA": "CH3", "C": "C", "O": "O"}.get(atom)
    if residue == C_CAP:
        return {"N": "N", "CA": "C"}.get(atom)
    return atom


def _sorted_bonds(topology: app.Topology) -> app.Topology:
    """Return a copy whose bonds are sorted, so that the System does not depend on where the structure came from."""
    result = app.Topology()
    result.setPeriodicBoxVectors(topology.getPeriodicBoxVectors())
    atoms = {}
    for chain in topology.chains():
        new_chain = result.addChain(chain.id)
        for residue in chain.residues():
            new_residue = result.addResidue(residue.name, new_chain, residue.id, residue.insertionCode)
            for atom in residue.atoms():
                atoms[atom.index] = result.addAtom(atom.name, atom.element, new_residue, atom.id)
    for first, second in sorted({(min(a.index, b.index), max(a.index, b.index)) for a, b in topology.bonds()}):
        result.addBond(atoms[first], atoms[second])
    return result


def _load_force_field(files: tuple[str, ...], ligand: Ligand | None) -> app.ForceField:
    templates = [] if ligand is None else [io.StringIO(ligand.template)]
    try:
        return app.ForceField(*files, *templates)
    except Exception as error:  # OpenMM raises several kinds for a missing or malformed file
        raise LongstrideError(f"cannot load the force field {', '.join(files)}: {_flat(error)}") from error


def _create_system(field: app.ForceField, topology: app.Topology, cutoff_nm: float | None, source: str) -> openmm.System:
    method = app.NoCutoff if cutoff_nm is None else app.CutoffNonPeriodic
    box = box_of(topology)
    if box is not None:
        check_cutoff(box, cutoff_nm, name=source)
        method = app.PME
    options = {} if cutoff_nm is None else {"nonbondedCutoff": cutoff_nm * unit.nanometer}
    try:
        return field.createSystem(
            topology, nonbondedMethod=method, constraints=None, rigidWater=False, removeCMMotion=False, **options
        )
    except (ValueError, KeyError, openmm.OpenMMException) as error:
        raise LongstrideError(_template_message(error, source)) from error


def _template_message(error: Exception, source: str) -> str:
    hint = "complete the structure (all heavy atoms, hydrogens all or none), or give a force field that knows this residue"
    return f"{source}: {_flat(error)}; {hint}"


def _flat(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _as_array(positions: unit.Quantity) -> np.ndarray:
    return np.array(positions.value_in_unit(unit.nanometer), dtype=np.float64).reshape(-1, 3)


def _reference_platform() -> openmm.Platform:
    return openmm.Platform.getPlatformByName("Reference")
