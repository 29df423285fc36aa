"""Ligands: GAFF2 parameters in the right units, whole charges, the complex with a peptide, and clear refusals."""

from __future__ import annotations

import importlib.util
import io
import shutil
from pathlib import Path

import numpy as np
import openmm
import pytest
from openmm import app, unit

from longstride import ligands
from longstride.config import load_config
from longstride.errors import LongstrideError
from longstride.ligands import read_ligand
from longstride.solvation import Solvent
from longstride.stages.prepare import build
from longstride.systems import load_prepared, prepare_file, prepare_sequence, save_prepared

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("rdkit", "parmed", "acpype")),
    reason="the packages of the extra `ligand` (rdkit, ParmEd, acpype) are not installed",
)
VACUUM = {"force_field": ("amber14-all.xml",), "cutoff_nm": None}
KCAL, ANGSTROM = 4.184, 0.1


def _sdf(path, smiles: str, *, hydrogens: bool = True, flat: bool = False, centre_nm=(0.0, 0.0, 0.0)):
    from rdkit import Chem
    from rdkit.Chem import AllChem

    molecule = Chem.MolFromSmiles(smiles)
    molecule = Chem.AddHs(molecule) if hydrogens else molecule
    if flat:
        AllChem.Compute2DCoords(molecule)
    else:
        AllChem.EmbedMolecule(molecule, randomSeed=7)
    conformer = molecule.GetConformer()
    x = conformer.GetPositions()
    for index, place in enumerate(x - x.mean(axis=0) + 10 * np.array(centre_nm)):
        conformer.SetAtomPosition(index, place.tolist())
    with Chem.SDWriter(str(path)) as writer:
        writer.write(molecule)
    return path


@pytest.fixture(scope="module")
def phenol(tmp_path_factory):
    return read_ligand(_sdf(tmp_path_factory.mktemp("ligand") / "phenol.sdf", "Oc1ccccc1"), charges="gasteiger")


@pytest.fixture(scope="module")
def peptide_file(tmp_path_factory):
    prepared = prepare_sequence("ACE-ALA-NME", name="peptide", **VACUUM)
    path = tmp_path_factory.mktemp("peptide") / "peptide.pdb"
    x = prepared.positions - prepared.positions.mean(axis=0)
    with path.open("w") as handle:
        app.PDBFile.writeFile(prepared.topology, x * unit.nanometer, handle)
    return path


def _system(ligand) -> openmm.System:
    field = app.ForceField(io.StringIO(ligand.template))
    return field.createSystem(ligand.topology, nonbondedMethod=app.NoCutoff, constraints=None, removeCMMotion=False)


def _force(system, kind):
    return next(force for force in system.getForces() if isinstance(force, kind))


def _charges(system) -> np.ndarray:
    force = _force(system, openmm.NonbondedForce)
    return np.array([force.getParticleParameters(index)[0]._value for index in range(force.getNumParticles())])


def test_parameters_of_phenol_arrive_in_the_units_of_openmm(phenol):
    """Units and factors of two from parmchk2's numbers (kcal/mol and Å, k without the factor 2) to OpenMM's."""
    system = _system(phenol)
    stretch, bend = _force(system, openmm.HarmonicBondForce), _force(system, openmm.HarmonicAngleForce)
    names = [atom.name for atom in phenol.topology.atoms()]
    bonds = {}
    for index in range(stretch.getNumBonds()):
        first, second, length, k = stretch.getBondParameters(index)
        bonds[frozenset((names[first], names[second]))] = (length._value, k._value)
    assert len(bonds) == 13  # atoms and one ring
    assert bonds[frozenset(("O1", "H1"))] == pytest.approx((0.973 * ANGSTROM, 2 * 371.4 * KCAL / ANGSTROM**2), rel=1e-6)
    assert bonds[frozenset(("C1", "C2"))] == pytest.approx((1.398 * ANGSTROM, 2 * 461.1 * KCAL / ANGSTROM**2), rel=1e-6)
    assert bend.getNumAngles() == 19  # three on each of six carbons, one on oxygen
    # each of six ring bonds has four, the C-O bond has two; six carbons are kept planar by one improper each
    assert _force(system, openmm.PeriodicTorsionForce).getNumTorsions() == 6 * 4 + 2 + 6
    _, sigma, epsilon = _force(system, openmm.NonbondedForce).getParticleParameters(names.index("C3"))
    assert sigma._value == pytest.approx(2 * 1.908 * ANGSTROM / 2 ** (1 / 6), rel=1e-6)
    assert epsilon._value == pytest.approx(0.086 * KCAL, rel=1e-6)
    assert phenol.label == "gaff2-gasteiger"


def test_pairs_across_three_bonds_are_scaled_as_in_amber(phenol):
    system = _system(phenol)
    nonbonded, charges = _force(system, openmm.NonbondedForce), _charges(system)
    scaled = [nonbonded.getExceptionParameters(index) for index in range(nonbonded.getNumExceptions())]
    ratios = [product._value / (charges[i] * charges[j]) for i, j, product, _, _ in scaled if product._value]
    assert np.allclose(ratios, 1 / 1.2, rtol=1e-6)
    assert len(ratios) == 26 - 3  # two torsions lead from each ring atom to the opposite one


@pytest.mark.parametrize(("smiles", "charge"), [("CC(=O)[O-]", -1), ("C[NH3+]", 1), ("CCO", 0)])
def test_partial_charges_add_up_to_the_formal_charge(smiles, charge, tmp_path):
    ligand = read_ligand(_sdf(tmp_path / "ion.sdf", smiles), charges="gasteiger")
    assert ligand.charge == charge
    assert _charges(_system(ligand)).sum() == pytest.approx(charge, abs=1e-12)


def test_am1_bcc_charges_of_phenol(tmp_path):
    """Pinned to what AmberTools 22 prints for this molecule; the control is that Gasteiger charges are far from it."""
    path = _sdf(tmp_path / "phenol.sdf", "Oc1ccccc1")
    charges = {}
    for kind in ("am1-bcc", "gasteiger"):
        try:
            charges[kind] = _charges(_system(read_ligand(path, charges=kind)))[[0, 7]]
        except LongstrideError as error:
            if "liblapack3" not in str(error):
                raise
            pytest.skip("sqm of AmberTools does not run here: LAPACK is missing")
    assert np.allclose(charges["am1-bcc"], [-0.499, 0.418], atol=0.005)
    assert np.abs(charges["gasteiger"] - charges["am1-bcc"]).min() > 0.1  # control


def test_a_term_without_a_parameter_is_noticed(tmp_path):
    """OpenMM would leave the bond out and say nothing."""
    import parmed

    names = ("ligand.mol2", "ligand.frcmod")
    _sdf(tmp_path / "ligand.sdf", "CO")
    arguments = ("-i", "ligand.sdf", "-fi", "sdf", "-o", names[0], "-fo", "mol2", "-c", "gas", "-at", "gaff2", "-pf", "y")
    ligands._run("antechamber", *arguments, folder=str(tmp_path), made=names[0], source=tmp_path)
    more = ("-i", names[0], "-f", "mol2", "-o", names[1], "-s", "gaff2", "-a", "Y")
    ligands._run("parmchk2", *more, folder=str(tmp_path), made=names[1], source=tmp_path)
    residue, parameters = (parmed.load_file(str(tmp_path / name)) for name in names)
    assert ligands._absent(residue, parameters) == []
    del parameters.bond_types["c3", "oh"], parameters.bond_types["oh", "c3"]
    assert set(ligands._absent(residue, parameters)) == {"c3-oh", "oh-c3"}


@pytest.mark.parametrize(
    ("smiles", "options", "message"),
    [
        ("Oc1ccccc1", {"hydrogens": False}, r"atom 1 \(O\) lacks hydrogens; add all of them"),
        ("Oc1ccccc1", {"flat": True}, "is a flat drawing"),
        ("CO.CO", {}, "in several pieces"),
        ("C[CH2]", {}, "is a radical"),
        ("C[Si](C)(C)C", {}, "GAFF2 has no parameters for Si; it knows Br, C, Cl, F, H, I, N, O, P, S"),
    ],
)
def test_a_molecule_that_gaff_cannot_treat_is_one_line(smiles, options, message, tmp_path):
    with pytest.raises(LongstrideError, match=message) as caught:
        read_ligand(_sdf(tmp_path / "bad.sdf", smiles, **options), charges="gasteiger")
    assert "\n" not in str(caught.value)
    assert "bad.sdf" in str(caught.value)


def test_a_file_that_is_not_one_molecule_is_one_line(tmp_path):
    with pytest.raises(LongstrideError, match="does not exist"):
        read_ligand(tmp_path / "absent.sdf", charges="gasteiger")
    good = _sdf(tmp_path / "good.sdf", "CO").read_text()
    (tmp_path / "two.sdf").write_text(good + good)
    with pytest.raises(LongstrideError, match="must hold one molecule that RDKit can read, not 2"):
        read_ligand(tmp_path / "two.sdf", charges="gasteiger")
    (tmp_path / "broken.sdf").write_text(good.replace(" C ", " Q9"))
    with pytest.raises(LongstrideError, match=r"broken\.sdf"):
        read_ligand(tmp_path / "broken.sdf", charges="gasteiger")


def test_missing_packages_and_programs_say_how_to_get_them(tmp_path, monkeypatch):
    path = _sdf(tmp_path / "methanol.sdf", "CO")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(LongstrideError, match=r"needs antechamber .* pip install 'longstride\[ligand\]'"):
        read_ligand(path, charges="gasteiger")

    def refuse(name):
        raise ImportError(name)

    monkeypatch.setattr(ligands.importlib, "import_module", refuse)
    with pytest.raises(LongstrideError, match=r"needs RDKit, which is not installed; pip install 'longstride\[ligand\]'"):
        read_ligand(path, charges="gasteiger")


def test_a_failing_program_is_one_line(tmp_path, monkeypatch):
    path = _sdf(tmp_path / "methanol.sdf", "CO")
    program = tmp_path / "antechamber"
    program.write_text("#!/bin/sh\necho 'sqm: error while loading shared libraries: liblapack.so.3'\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda _: str(program))
    with pytest.raises(LongstrideError, match=r"liblapack3 .* ligand_charges: gasteiger"):
        read_ligand(path, charges="am1-bcc")
    program.write_text("#!/bin/sh\necho 'The number of electrons is odd'\necho 'Fatal Error!' >&2\nexit 1\n")
    with pytest.raises(LongstrideError, match="antechamber failed: Fatal Error!; check bond orders") as caught:
        read_ligand(path, charges="gasteiger")
    assert "\n" not in str(caught.value)


def test_a_ligand_inside_the_peptide_is_refused_with_the_atoms(peptide_file, tmp_path):
    inside = read_ligand(_sdf(tmp_path / "inside.sdf", "Oc1ccccc1"), charges="gasteiger")
    with pytest.raises(LongstrideError, match=r"the ligand in .*peptide\.pdb: atom \d+ \(LIG 1 .*\) and atom \d+ .* overlap"):
        prepare_file(peptide_file, name="x", ligand=inside, **VACUUM)
    apart = read_ligand(_sdf(tmp_path / "apart.sdf", "Oc1ccccc1", centre_nm=(0.0, 0.0, 0.9)), charges="gasteiger")
    assert prepare_file(peptide_file, name="x", ligand=apart, **VACUUM).system.n_atoms == 22 + 13


def test_the_complex_in_water_is_neutral_and_its_ligand_stays_whole(peptide_file, tmp_path):
    acetate = read_ligand(_sdf(tmp_path / "acetate.sdf", "CC(=O)[O-]", centre_nm=(0.0, 0.0, 0.7)), charges="gasteiger")
    explicit = {"force_field": ("amber14-all.xml", "amber14/tip3p.xml"), "cutoff_nm": 0.55}
    prepared = prepare_file(peptide_file, name="complex", ligand=acetate, solvent=Solvent(molecules=70), **explicit)
    names = [residue.name for residue in prepared.topology.residues()]
    assert names[:4] == ["ACE", "ALA", "NME", "LIG"]
    assert (names.count("HOH"), names.count("NA"), names.count("CL")) == (69, 1, 0)
    assert prepared.charge == 0
    assert prepared.target == "amber14-all-tip3p-gaff2-gasteiger-pme"
    bonds = prepared.system.bonds
    lengths = np.linalg.norm(prepared.positions[bonds[:, 0]] - prepared.positions[bonds[:, 1]], axis=1)
    assert len(bonds) == 21 + 6 + 2 * 69
    assert 0.09 < lengths.min() < lengths.max() < 0.16
    save_prepared(tmp_path / "out", prepared, {})
    loaded = load_prepared(tmp_path / "out")
    assert loaded.system_hash == prepared.system_hash
    assert loaded.topology.getNumBonds() == len(bonds)


@pytest.mark.slow
def test_the_shipped_complex_runs_a_few_steps(monkeypatch):
    root = Path(__file__).parents[1]
    config = load_config(root / "workflow" / "configs" / "protein-ligand.yaml")
    monkeypatch.chdir(root)  # paths in a configuration are relative to the working folder
    prepared = build(config.systems[0], config.physics)
    integrator = openmm.LangevinMiddleIntegrator(298.15, 5.0, 0.001)
    integrator.setRandomNumberSeed(3)
    context = openmm.Context(prepared.openmm_system, integrator, openmm.Platform.getPlatformByName("CPU"), {"Threads": "1"})
    context.setPositions(prepared.positions)
    context.setVelocitiesToTemperature(298.15, 3)
    integrator.step(100)
    x = np.array(context.getState(positions=True).getPositions()._value)
    ligand = [index for index, name in enumerate(prepared.system.residue_names) if name == "LIG"]
    ring = [index for index in ligand if prepared.system.atomic_numbers[index] == 6]
    centred = x[ring] - x[ring].mean(axis=0)
    assert np.linalg.svd(centred)[1][2] < 0.02 < np.linalg.svd(centred)[1][1]  # a benzene ring is flat, in nm
