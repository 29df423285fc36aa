"""Small molecules from SDF files, with GAFF2 parameters and AM1-BCC charges, as OpenMM force field templates.

RDKit reads and checks the file, antechamber and parmchk2 (AmberTools, on the PATH or those that come with acpype) assign types,
charges and parameters, ParmEd writes them for OpenMM. All three are the extra `ligand`. Sources: GAFF doi:10.1002/jcc.20035;
antechamber doi:10.1016/j.jmgm.2005.12.005; AM1-BCC doi:10.1002/jcc.10128.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from openmm import app

from longstride.errors import LongstrideError

if TYPE_CHECKING:
    from types import ModuleType

Charges = Literal["am1-bcc", "gasteiger"]
METHODS: dict[Charges, str] = {"am1-bcc": "bcc", "gasteiger": "gas"}
ELEMENTS = frozenset({"H", "C", "N", "O", "F", "P", "S", "Cl", "Br", "I"})  # those that GAFF2 knows
RESIDUE = "LIG"
INSTALL = "pip install 'longstride[ligand]'"


@dataclass(frozen=True, kw_only=True)
class Ligand:
    """A small molecule and its force field.

    Attributes:
        topology: one residue LIG, atoms in the order of the file.
        positions: [atom, 3] nm, those of the file.
        template: OpenMM force field XML with this one residue.
        charge: formal charge, elementary charges; the partial charges add up to it.
        label: of the parameters, such as "gaff2-am1bcc".
    """

    topology: app.Topology
    positions: np.ndarray
    template: str
    charge: int
    label: str


def read_ligand(path: Path, *, charges: Charges) -> Ligand:
    """Read a small molecule from an SDF file and parametrise it.

    Args:
        path: one molecule with all hydrogens in three dimensions; bond orders and formal charges as drawn.
        charges: "am1-bcc", or "gasteiger" (doi:10.1016/0040-4020(80)80168-2), coarser but without quantum chemistry.

    Raises:
        LongstrideError: a missing package or program, an unreadable file, several molecules, missing hydrogens, a flat drawing,
            a radical, an element or a bonded term that GAFF2 does not know.
    """
    molecule = _read(path)
    charge = sum(atom.GetFormalCharge() for atom in molecule.GetAtoms())
    with tempfile.TemporaryDirectory() as folder:
        _write_sdf(molecule, Path(folder) / "ligand.sdf")
        source = ("-i", "ligand.sdf", "-fi", "sdf", "-o", "ligand.mol2", "-fo", "mol2")
        kind = ("-c", METHODS[charges], "-nc", str(charge), "-at", "gaff2", "-rn", RESIDUE, "-pf", "y", "-s", "0")
        _run("antechamber", *source, *kind, folder=folder, made="ligand.mol2", source=path)
        parameters = ("-i", "ligand.mol2", "-f", "mol2", "-o", "ligand.frcmod", "-s", "gaff2", "-a", "Y")
        _run("parmchk2", *parameters, folder=folder, made="ligand.frcmod", source=path)
        residue, template = _template(Path(folder), charge=charge, source=path)
    return Ligand(
        topology=_topology(molecule, [atom.name for atom in residue.atoms]),
        positions=np.array(molecule.GetConformer().GetPositions()) / 10.0,
        template=template,
        charge=charge,
        label=f"gaff2-{charges.replace('-', '')}",
    )


def _read(path: Path) -> Any:  # noqa: ANN401 - an RDKit molecule
    """Return the one molecule of an SDF file, checked."""
    chem = _package("rdkit.Chem", "RDKit")
    if not path.is_file():
        raise LongstrideError(f"ligand file {path} does not exist")
    from rdkit import rdBase

    with rdBase.BlockLogs():  # its complaints become the line below
        found = list(chem.SDMolSupplier(str(path), removeHs=False))
    if len(found) != 1 or found[0] is None:
        raise LongstrideError(
            f"{path} must hold one molecule that RDKit can read, not {len(found)}"
            if len(found) != 1
            else f"cannot read {path} as SDF, or a valence in it is impossible; check it with RDKit"
        )
    problem = _problem(chem, found[0])
    if problem:
        raise LongstrideError(f"{path}: {problem}")
    return found[0]


def _problem(chem: ModuleType, molecule: Any) -> str | None:  # noqa: ANN401 - an RDKit molecule
    """Return what keeps a molecule from being parametrised, or None."""
    atoms = list(molecule.GetAtoms())
    unknown = sorted({atom.GetSymbol() for atom in atoms} - ELEMENTS)
    bare = next((atom for atom in atoms if atom.GetTotalNumHs()), None)
    lacking = "" if bare is None else f"atom {bare.GetIdx() + 1} ({bare.GetSymbol()})"
    checks = (
        (not atoms, "the molecule has no atoms"),
        (unknown, f"GAFF2 has no parameters for {', '.join(unknown)}; it knows {', '.join(sorted(ELEMENTS))}"),
        (
            len(chem.GetMolFrags(molecule)) > 1,
            "the molecule is in several pieces; keep the ligand and remove counter-ions and solvent",
        ),
        (lacking, f"{lacking} lacks hydrogens; add all of them in the right protonation state (RDKit: AddHs with addCoords)"),
        (
            any(atom.GetNumRadicalElectrons() for atom in atoms),
            "the molecule is a radical, which GAFF2 does not describe; check bond orders and formal charges",
        ),
        (
            atoms and not molecule.GetConformer().Is3D(),
            "the molecule is a flat drawing; give its position in three dimensions (and 3D in the second line)",
        ),
    )
    return next((message for wrong, message in checks if wrong), None)


def _write_sdf(molecule: Any, path: Path) -> None:  # noqa: ANN401 - an RDKit molecule
    """Write what was checked: antechamber reads neither V3000 nor aromatic bond orders."""
    from rdkit import Chem

    copy = Chem.Mol(molecule)
    Chem.Kekulize(copy, clearAromaticFlags=True)
    path.write_text(Chem.MolToMolBlock(copy, kekulize=False) + "$$$$\n")


def _run(program: str, *arguments: str, folder: str, made: str, source: Path) -> None:
    """Run a program of AmberTools in `folder` and check that it made a file."""
    done = subprocess.run([_program(program), *arguments], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode == 0 and (Path(folder) / made).is_file():
        return
    said = f"{done.stdout}\n{done.stderr}"
    if "shared libraries" in said:
        raise LongstrideError(
            f"{source}: AM1-BCC charges need libraries that are not on this machine (Debian and Ubuntu: liblapack3 libarpack2"
            " libgfortran5); install them, or use the coarser ligand_charges: gasteiger"
        )
    lines = [line.strip() for line in said.splitlines() if "rror" in line or "annot" in line] or said.split("\n")[-1:]
    raise LongstrideError(f"{source}: {program} failed: {lines[0]}; check bond orders, hydrogens and formal charges")


def _program(name: str) -> str:
    """Return the path of a program of AmberTools: the one on the PATH, else that of acpype."""
    installed = shutil.which(name)
    if installed:
        return installed
    found = importlib.util.find_spec("acpype")
    if found is None or found.origin is None:
        raise LongstrideError(f"a ligand needs {name} (AmberTools), which is not on this machine; {INSTALL}")
    system = "amber_macos" if sys.platform == "darwin" else "amber_linux"
    return str(Path(found.origin).parent / system / "bin" / name)


def _template(folder: Path, *, charge: int, source: Path) -> tuple[Any, str]:
    """Return ParmEd's residue and the OpenMM force field XML of what antechamber and parmchk2 wrote."""
    parmed = _package("parmed", "ParmEd")
    from parmed.openmm import OpenMMParameterSet

    text = (folder / "ligand.frcmod").read_text()
    lacking = [line.split()[0] for line in text.splitlines() if "ATTN" in line]
    residue, parameters = parmed.load_file(str(folder / "ligand.mol2")), parmed.load_file(str(folder / "ligand.frcmod"))
    lacking += _absent(residue, parameters)
    if lacking:
        raise LongstrideError(f"{source}: GAFF2 has no parameters for {lacking[0]} of this ligand")
    excess = (sum(atom.charge for atom in residue.atoms) - charge) / len(residue.atoms)
    for atom in residue.atoms:  # antechamber rounds to 1e-6; a periodic box must be neutral
        atom.charge -= excess
    collected = OpenMMParameterSet.from_parameterset(parameters)
    collected.residues[residue.name] = residue
    written = io.StringIO()
    collected.write(written, improper_dihedrals_ordering="amber")
    return residue, written.getvalue()


def _absent(residue: Any, parameters: Any) -> list[str]:  # noqa: ANN401 - ParmEd's types
    """Return the types of bonds, angles and proper torsions without a parameter; OpenMM would silently leave them out."""
    around: dict[int, list[int]] = {atom.idx: [] for atom in residue.atoms}
    for bond in residue.bonds:
        around[bond.atom1.idx].append(bond.atom2.idx)
        around[bond.atom2.idx].append(bond.atom1.idx)
    kind = [atom.type for atom in residue.atoms]
    bonds = [(i, j) for i in around for j in around[i]]
    angles = [(i, j, k) for i, j in bonds for k in around[j] if k != i]
    torsions = [(i, j, k, m) for i, j, k in angles for m in around[k] if m not in (i, j)]
    tables = ((bonds, parameters.bond_types), (angles, parameters.angle_types), (torsions, parameters.dihedral_types))
    return [
        "-".join(kind[i] for i in term)
        for terms, known in tables
        for term in terms
        if tuple(kind[i] for i in term) not in known
    ]


def _topology(molecule: Any, names: list[str]) -> app.Topology:  # noqa: ANN401 - an RDKit molecule
    """Return an OpenMM topology with one residue."""
    topology = app.Topology()
    residue = topology.addResidue(RESIDUE, topology.addChain())
    atoms = [
        topology.addAtom(name, app.Element.getByAtomicNumber(atom.GetAtomicNum()), residue)
        for name, atom in zip(names, molecule.GetAtoms(), strict=True)
    ]
    for bond in molecule.GetBonds():
        topology.addBond(atoms[bond.GetBeginAtomIdx()], atoms[bond.GetEndAtomIdx()])
    return topology


def _package(module: str, name: str) -> ModuleType:
    """Import a package of the extra, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise LongstrideError(f"a ligand needs {name}, which is not installed; {INSTALL}") from error
