"""Preparing peptides: composition, chirality, canonical labels, and clear refusals."""

from __future__ import annotations

import numpy as np
import openmm
import pytest
from openmm import app, unit

from longstride.dynamics import starts as dynamics_starts
from longstride.dynamics.starts import BASINS, basin_starts
from longstride.errors import DataError, LongstrideError
from longstride.systems import (
    ONE_LETTER,
    backbone_torsions,
    canonical_labels,
    load_prepared,
    neighbours,
    prepare_file,
    prepare_sequence,
    save_prepared,
    set_torsion,
    torsion,
)
from molecules import PHYSICS

# heavy and hydrogen atoms of the residue inside a chain, from its chemical formula at pH 7
ATOMS = {
    "ALA": 10, "ARG": 24, "ASN": 14, "ASP": 12, "CYS": 11, "GLN": 17, "GLU": 15, "GLY": 7, "HIS": 17, "ILE": 19,
    "LEU": 19, "LYS": 22, "MET": 17, "PHE": 20, "PRO": 14, "SER": 11, "THR": 14, "TRP": 24, "TYR": 21, "VAL": 16,
}  # fmt: skip


def _energy(prepared, positions) -> float:
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(prepared.openmm_system, openmm.VerletIntegrator(0.001), platform)
    context.setPositions(positions)
    return context.getState(energy=True).getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)


def _alpha_handedness(prepared) -> list[float]:
    x, system = prepared.positions, prepared.system
    signs = []
    for centre, name in enumerate(system.atom_names):
        if name == "CA" and system.residue_names[centre] != "GLY":
            atoms = {system.atom_names[i]: x[i] - x[centre] for i in neighbours(system)[centre]}
            signs.append(float(np.dot(atoms["N"], np.cross(atoms["C"], atoms["CB"]))))
    return signs


@pytest.mark.parametrize("name", sorted(ATOMS))
def test_every_capped_amino_acid_is_complete_and_left_handed(name):
    prepared = prepare_sequence(f"ACE-{name}-NME", name=name, **PHYSICS)
    assert prepared.system.n_atoms == ATOMS[name] + 6 + 6  # ACE is CH3-CO, NME is NH-CH3
    assert all(sign > 0 for sign in _alpha_handedness(prepared))
    assert np.isfinite(prepared.positions).all()


def test_zwitterion_has_charged_ends():
    prepared = prepare_sequence("AA", name="AA", **PHYSICS)
    assert prepared.system.n_atoms == 23
    assert {"H", "H2", "H3", "OXT"} <= set(prepared.system.atom_names)


def test_preparation_is_reproducible_to_the_bit(alanine):
    again = prepare_sequence("ACE-ALA-NME", name="alanine-dipeptide", **PHYSICS)
    assert again.system_hash == alanine.system_hash
    assert np.array_equal(again.positions, alanine.positions)


def test_mirror_image_is_noticed(alanine):
    """Negative control of the handedness check."""
    mirrored = alanine.positions * np.array([1.0, 1.0, -1.0])
    system = alanine.system
    centre = system.atom_names.index("CA")
    arms = {system.atom_names[i]: mirrored[i] - mirrored[centre] for i in neighbours(system)[centre]}
    assert np.dot(arms["N"], np.cross(arms["C"], arms["CB"])) < 0


def test_canonical_labels_undo_swapped_hydrogens(alanine):
    names = alanine.system.atom_names
    first, second = names.index("HB1"), names.index("HB2")
    swapped = alanine.positions.copy()
    swapped[[first, second]] = swapped[[second, first]]
    assert not np.array_equal(swapped, alanine.positions)
    assert np.array_equal(canonical_labels(alanine.system, swapped), alanine.positions)
    assert _energy(alanine, swapped) == pytest.approx(_energy(alanine, alanine.positions), abs=1e-8)


def test_torsions_turn_only_the_far_side(alanine):
    system = alanine.system
    for _, atoms in backbone_torsions(system):
        turned = set_torsion(system, alanine.positions, atoms, 1.0)
        assert torsion(turned, atoms) == pytest.approx(1.0, abs=1e-12)
        lengths = [np.linalg.norm(turned[a] - turned[b]) for a, b in system.bonds]
        before = [np.linalg.norm(alanine.positions[a] - alanine.positions[b]) for a, b in system.bonds]
        assert np.allclose(lengths, before, atol=1e-12)


def test_starts_lie_in_different_basins(alanine):
    starts = basin_starts(alanine, len(BASINS))
    (_, phi), (_, psi) = backbone_torsions(alanine.system)
    angles = np.degrees([[torsion(x, phi), torsion(x, psi)] for x in starts])
    assert (angles[:, 0] > 0).sum() >= 2
    assert (angles[:, 0] < 0).sum() >= 2


def test_starts_keep_the_canonical_labels(monkeypatch):
    """In this molecule a clash turns a methyl group inside out; the control is the minimiser alone."""
    leucine = prepare_sequence("EL", name="EL", **PHYSICS)

    def start():
        return dynamics_starts._structure(leucine, backbone_torsions(leucine.system), (3, 4))

    kept = start()
    assert np.array_equal(canonical_labels(leucine.system, kept), kept)
    monkeypatch.setattr(dynamics_starts, "canonical_labels", lambda _, positions: positions)
    raw = start()
    assert not np.array_equal(canonical_labels(leucine.system, raw), raw)


def test_proline_ring_cannot_be_turned():
    proline = prepare_sequence("ACE-PRO-NME", name="p", **PHYSICS)
    phi = next(atoms for kind, atoms in backbone_torsions(proline.system) if kind == "phi")
    assert np.array_equal(set_torsion(proline.system, proline.positions, phi, 2.0), proline.positions)


def test_saved_molecule_reads_back_identical(alanine, tmp_path):
    save_prepared(tmp_path, alanine, {})
    loaded = load_prepared(tmp_path)
    assert loaded.system_hash == alanine.system_hash
    assert np.array_equal(loaded.positions, alanine.positions)
    assert np.array_equal(loaded.system.bonds, alanine.system.bonds)
    assert loaded.system.atom_names == alanine.system.atom_names
    (tmp_path / "system.xml").write_text("<System/>")
    with pytest.raises(DataError, match=r"system\.xml has 9 bytes"):
        load_prepared(tmp_path)


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        ("AXA", "unknown residue 'X' at position 2"),
        ("ACE-FOO-NME", "unknown residue 'FOO'"),
        ("A", "cap it as ACE-ALA-NME"),
        ("ALA-ACE-GLY", "ACE may only stand first"),
        ("ACE-NME", "at least one amino acid"),
    ],
)
def test_bad_sequences_are_one_line(sequence, message):
    with pytest.raises(LongstrideError, match=message) as caught:
        prepare_sequence(sequence, name="bad", **PHYSICS)
    assert "\n" not in str(caught.value)


def _write_pdb(prepared, path, *, drop: str | None = None, rename: str | None = None):
    modeller = app.Modeller(prepared.topology, prepared.positions * unit.nanometer)
    modeller.delete([atom for atom in modeller.topology.atoms() if atom.name == drop])
    text_path = path / "molecule.pdb"
    with text_path.open("w") as handle:
        app.PDBFile.writeFile(modeller.topology, modeller.positions, handle)
    if rename:
        text_path.write_text(text_path.read_text().replace("ALA", rename))
    return text_path


def test_pdb_round_trip_is_the_same_molecule(alanine, tmp_path):
    again = prepare_file(_write_pdb(alanine, tmp_path), name="again", **PHYSICS)
    assert again.system_hash == alanine.system_hash


@pytest.mark.parametrize(
    ("change", "message"),
    [({"drop": "CB"}, "No template found for residue 1 .ALA."), ({"rename": "LIG"}, "No template found for residue 1 .LIG.")],
)
def test_incomplete_or_unknown_structures_are_one_line(alanine, tmp_path, change, message):
    with pytest.raises(LongstrideError, match=message) as caught:
        prepare_file(_write_pdb(alanine, tmp_path, **change), name="bad", **PHYSICS)
    assert "\n" not in str(caught.value)


def test_missing_file_and_unknown_force_field(tmp_path):
    with pytest.raises(LongstrideError, match="does not exist"):
        prepare_file(tmp_path / "absent.pdb", name="x", **PHYSICS)
    with pytest.raises(LongstrideError, match="cannot load the force field"):
        prepare_sequence("AA", name="x", force_field=("nosuch.xml",), cutoff_nm=None)


def test_all_letters_are_covered():
    assert sorted(ONE_LETTER.values()) == sorted(ATOMS)
