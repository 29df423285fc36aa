"""Periodic boxes: density, whole molecules, neutrality, what is stored, and clear refusals."""

from __future__ import annotations

import numpy as np
import openmm
import pytest
from openmm import app, unit

from longstride.config import PhysicsConfig, SystemConfig
from longstride.errors import LongstrideError
from longstride.solvation import Solvent, add_water, check_cutoff, check_overlap, half_width
from longstride.stages.prepare import build
from longstride.systems import load_prepared, prepare_file, prepare_sequence, prepare_water, save_prepared

EXPLICIT = {"force_field": ("amber14-all.xml", "amber14/tip3p.xml"), "cutoff_nm": 0.5}
MOLECULES_PER_NM3 = 0.997 / 18.01528 * 602.214076  # of water at 298 K


@pytest.fixture(scope="module")
def water():
    return prepare_water(64, name="water", **EXPLICIT)


@pytest.fixture(scope="module")
def lysine():
    return prepare_sequence("ACE-LYS-NME", name="lysine", solvent=Solvent(molecules=60), **EXPLICIT)


def _density(prepared) -> float:
    return prepared.system.masses.sum() / abs(np.linalg.det(prepared.box)) / 602.214076  # g/cm3


def _energy(prepared, positions, *, box=None) -> float:
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(prepared.openmm_system, openmm.VerletIntegrator(0.001), platform)
    if box is not None:
        context.setPeriodicBoxVectors(*box)
    context.setPositions(positions)
    return context.getState(energy=True).getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)


def test_water_has_the_density_of_the_liquid(water):
    assert water.system.n_atoms == 3 * 64
    assert _density(water) == pytest.approx(0.997, abs=1e-9)
    assert water.box[0, 0] == pytest.approx((64 / MOLECULES_PER_NM3) ** (1 / 3), rel=1e-4)  # masses of the force field
    assert (216 / MOLECULES_PER_NM3) ** (1 / 3) == pytest.approx(1.8644, abs=1e-4)


def test_the_box_of_modeller_alone_is_too_wide():
    """Negative control of the density: what is scaled needs it."""
    modeller = app.Modeller(app.Topology(), [] * unit.nanometer)
    modeller.addSolvent(app.ForceField(*EXPLICIT["force_field"]), numAdded=64)
    edge = modeller.topology.getUnitCellDimensions().value_in_unit(unit.nanometer)[0]
    assert 64 / edge**3 < 0.9 * MOLECULES_PER_NM3


def test_water_is_whole_and_nothing_touches(water):
    x = water.positions
    bonds = np.linalg.norm(x[water.system.bonds[:, 0]] - x[water.system.bonds[:, 1]], axis=1)
    assert len(bonds) == 2 * 64
    assert ((bonds > 0.09) & (bonds < 0.105)).all()
    oxygens = x[water.system.atomic_numbers == 8]
    gap = oxygens[:, None] - oxygens[None]
    gap -= water.box[0, 0] * np.round(gap / water.box[0, 0])
    distances = np.linalg.norm(gap, axis=2)[np.triu_indices(64, 1)]
    assert 0.24 < distances.min() < 0.29  # a hydrogen bond


def test_water_is_flexible_and_its_electrostatics_are_periodic(water):
    system = water.openmm_system
    bonds, nonbonded = (
        next(force for force in system.getForces() if isinstance(force, kind))
        for kind in (openmm.HarmonicBondForce, openmm.NonbondedForce)
    )
    assert system.getNumConstraints() == 0
    assert bonds.getNumBonds() == 2 * 64
    assert nonbonded.getNonbondedMethod() == openmm.NonbondedForce.PME
    assert nonbonded.getCutoffDistance().value_in_unit(unit.nanometer) == 0.5
    assert water.target == "amber14-all-tip3p-pme"
    assert water.charge == 0


def test_a_molecule_in_the_next_box_has_the_same_energy(water):
    """The control is the same displacement in a box that is wider by a fifth."""
    moved = water.positions.copy()
    moved[:3] += water.box[0]
    # charges spread on a mesh: the energy is periodic to the error of PME, which is 5e-4 of the forces
    assert _energy(water, moved) == pytest.approx(_energy(water, water.positions), rel=1e-5)
    wide = 1.2 * water.box
    assert abs(_energy(water, moved, box=wide) - _energy(water, water.positions, box=wide)) > 10.0


def test_preparation_in_a_box_is_reproducible_to_the_bit(water):
    again = prepare_water(64, name="water", **EXPLICIT)
    assert again.system_hash == water.system_hash
    assert np.array_equal(again.positions, water.positions)


def test_box_and_charge_are_stored_and_read_back(water, lysine, alanine, tmp_path):
    for prepared in (water, lysine, alanine):
        folder = tmp_path / prepared.system.name
        save_prepared(folder, prepared, {})
        loaded = load_prepared(folder)
        assert loaded.system_hash == prepared.system_hash
        assert loaded.charge == prepared.charge
        assert np.array_equal(loaded.positions, prepared.positions)
        if prepared.box is None:
            assert loaded.box is None
            assert loaded.topology.getPeriodicBoxVectors() is None
        else:
            assert np.array_equal(loaded.box, prepared.box)
            assert np.array_equal(loaded.topology.getPeriodicBoxVectors().value_in_unit(unit.nanometer), prepared.box)


def test_a_charged_peptide_is_neutralised_by_an_ion(lysine):
    names = [residue.name for residue in lysine.topology.residues()]
    assert names.count("CL") == 1
    assert names.count("HOH") == 59  # the ion took the place of one
    assert names.count("NA") == 0
    assert lysine.charge == 0
    assert prepare_sequence("ACE-LYS-NME", name="gas", force_field=("amber14-all.xml",), cutoff_nm=None).charge == 1


def test_a_neutral_peptide_gets_no_ions_and_stays_whole():
    prepared = prepare_sequence("ACE-ALA-NME", name="a", solvent=Solvent(molecules=60), **EXPLICIT)
    assert [residue.name for residue in prepared.topology.residues()] == ["ACE", "ALA", "NME"] + ["HOH"] * 60
    bonds = prepared.system.bonds
    lengths = np.linalg.norm(prepared.positions[bonds[:, 0]] - prepared.positions[bonds[:, 1]], axis=1)
    assert lengths.max() < 0.16
    water, solute = 60 * 18.015, prepared.system.masses[:22].sum()
    assert abs(np.linalg.det(prepared.box)) == pytest.approx((water / 0.997 + solute / 1.35) / 602.214076, rel=1e-4)


@pytest.mark.parametrize("padding", [0.5, 0.9])
def test_padding_is_the_room_around_the_molecule(padding):
    solute = prepare_sequence("ACE-ALA-NME", name="a", force_field=("amber14-all.xml",), cutoff_nm=None)
    modeller = app.Modeller(solute.topology, solute.positions * unit.nanometer)
    made = add_water(modeller, app.ForceField(*EXPLICIT["force_field"]), Solvent(padding_nm=padding), name="a")
    edge = made.topology.getUnitCellDimensions().value_in_unit(unit.nanometer)[0]
    x = np.array(made.positions.value_in_unit(unit.nanometer))
    inside = np.linalg.norm(x[:22, None] - x[None, :22], axis=2)
    assert np.allclose(inside, np.linalg.norm(solute.positions[:, None] - solute.positions[None], axis=2), atol=1e-9)
    middle = 0.5 * (x[:22].min(axis=0) + x[:22].max(axis=0))
    assert np.allclose(middle, edge / 2, atol=1e-9)
    diameter = 2 * np.linalg.norm(x[:22] - middle, axis=1).max()
    molecule = 1 / MOLECULES_PER_NM3  # the edge is exact to half a molecule
    assert edge**3 == pytest.approx((diameter + padding) ** 3, abs=0.51 * molecule)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"cutoff_nm": 0.7},
            r"box of 'w' \(1\.243 nm\) is smaller than twice the cutoff of 0\.7 nm; set physics\.cutoff_nm to 0\.62",
        ),
        ({"cutoff_nm": None}, r"lies in a periodic box and needs a cutoff; set physics\.cutoff_nm to 0\.62"),
        (
            {"force_field": ("amber14-all.xml", "implicit/obc1.xml")},
            r"names the implicit solvent implicit/obc1\.xml; set physics",
        ),
        ({"force_field": ("amber14-all.xml",)}, r"the force field must know each residue, water \(HOH\)"),
    ],
)
def test_a_box_that_cannot_be_is_one_line(changes, message):
    with pytest.raises(LongstrideError, match=message) as caught:
        prepare_water(64, name="w", **{**EXPLICIT, **changes})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", ["cube", "dodecahedron", "octahedron"])
def test_the_largest_cutoff_is_that_of_openmm(shape):
    box = np.array(app.Modeller(app.Topology(), [])._computeBoxVectors(2.0, shape))
    largest = half_width(box)
    check_cutoff(box, largest * 0.999, name="x")
    with pytest.raises(LongstrideError, match="smaller than twice the cutoff"):
        check_cutoff(box, largest * 1.001, name="x")
    _openmm_accepts(box, largest * 0.999)
    with pytest.raises(openmm.OpenMMException, match="cutoff distance cannot be greater than half"):
        _openmm_accepts(box, largest * 1.001)


def _openmm_accepts(box, cutoff) -> None:
    system, force = openmm.System(), openmm.NonbondedForce()
    system.addParticle(1.0)
    force.addParticle(0.0, 0.1, 0.0)
    force.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    force.setCutoffDistance(cutoff)
    system.addForce(force)
    system.setDefaultPeriodicBoxVectors(*box)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions([[0, 0, 0]])
    context.getState(energy=True)


def test_overlapping_atoms_are_named_across_the_faces_of_a_box(water):
    x = water.positions.copy()
    check_overlap(water.topology, x, box=water.box, source="water")
    x[5] = x[0] + 3 * water.box[1] + [0.01, 0.0, 0.02]
    check_overlap(water.topology, x, box=None, source="water")  # control: without the images they are far apart
    with pytest.raises(
        LongstrideError, match=r"water: atom 1 \(HOH 1 O\) and atom 6 \(HOH 2 H2\) overlap \(0\.0224 nm apart, 0\.05 nm"
    ) as caught:
        check_overlap(water.topology, x, box=water.box, source="water")
    assert "\n" not in str(caught.value)
    x[7] = np.nan
    with pytest.raises(LongstrideError, match=r"atom 8 \(HOH 3 H1\) has no finite position"):
        check_overlap(water.topology, x, box=water.box, source="water")


def test_a_structure_file_with_overlapping_atoms_is_one_line(alanine, tmp_path):
    x = alanine.positions.copy()
    x[1] = x[0] + [0.0, 0.03, 0.0]
    path = tmp_path / "clash.pdb"
    with path.open("w") as handle:
        app.PDBFile.writeFile(alanine.topology, x * unit.nanometer, handle)
    first, second = alanine.system.atom_names[:2]
    message = rf"clash\.pdb: atom 1 \(ACE 1 {first}\) and atom 2 \(ACE 1 {second}\) overlap \(0\.0300 nm apart"
    with pytest.raises(LongstrideError, match=message) as caught:
        prepare_file(path, name="clash", force_field=("amber14-all.xml",), cutoff_nm=None)
    assert "\n" not in str(caught.value)


def test_the_stage_reads_systems_in_a_box_from_the_configuration(water):
    physics = PhysicsConfig(force_field=EXPLICIT["force_field"], cutoff_nm=0.5)
    assert build(SystemConfig(name="water", water=64), physics).system_hash == water.system_hash
    solvated = SystemConfig.model_validate({"name": "a", "sequence": "ACE-GLY-NME", "solvate": {"molecules": 40}})
    assert build(solvated, physics).system.n_atoms == 19 + 3 * 40
