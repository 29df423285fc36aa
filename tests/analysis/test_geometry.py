import mdtraj
import numpy as np
import pytest

from longstride.analysis.clouds import cloud_of, fit_spaces
from longstride.analysis.frames import STRUCTURES, concatenate, cut, frames_of, handedness, pick_frames
from longstride.analysis.geometry import bond_angles, bond_lengths, find_terms, flag_geometry, limits_of
from longstride.analysis.literature_tica import literature_features
from longstride.analysis.samples import load_cell, load_molecule, load_reference
from longstride.analysis.validity import rate, validity, validity_json, worse_than
from longstride.systems import prepare_sequence, save_prepared


@pytest.fixture(scope="module")
def molecule(run_folder):
    return load_molecule(run_folder / "prepare/fake")


@pytest.fixture(scope="module")
def reference(run_folder, molecule):
    return load_reference(run_folder / "reference/fake", molecule)


@pytest.fixture(scope="module")
def terms(molecule):
    return find_terms(molecule.topology)


@pytest.fixture(scope="module")
def threonine(tmp_path_factory):
    """ACE-THR-NME: two chiral centres, side-chain torsions."""
    folder = tmp_path_factory.mktemp("threonine")
    prepared = prepare_sequence("ACE-THR-NME", name="T", force_field=("amber14-all.xml", "implicit/obc1.xml"), cutoff_nm=2.0)
    save_prepared(folder, prepared, {"temperature_K": 310.0})
    return load_molecule(folder), prepared.positions


def test_terms_of_alanine_dipeptide(terms):
    assert terms.bonds.shape == (21, 2)
    assert terms.angles.shape == (36, 3)
    assert len(terms.contacts) == len(terms.pairs)


def test_lengths_and_angles_equal_mdtraj(molecule, reference, terms):
    x = reference.frames.structures[:20]
    trajectory = mdtraj.Trajectory(x, molecule.topology)
    assert bond_lengths(x, terms.bonds) == pytest.approx(mdtraj.compute_distances(trajectory, terms.bonds), rel=1e-5)
    assert bond_angles(x, terms.angles) == pytest.approx(mdtraj.compute_angles(trajectory, terms.angles), abs=2e-3)


def test_a_tenth_of_a_percent_of_the_reference_is_outside(reference, terms):
    limits = limits_of(reference.frames.structures, terms)
    flags = flag_geometry(reference.frames.structures, terms, limits)
    assert 0 < flags.bond_outliers.mean() < 0.003
    assert 0 < flags.angle_outliers.mean() < 0.003
    assert flags.broken.sum() == 0


def test_broken_geometry_is_seen_by_what_is_meant_to_see_it(reference, terms):
    x = reference.frames.structures[:100]
    limits = limits_of(reference.frames.structures, terms)
    scaled = flag_geometry(x * np.float32(1.05), terms, limits)
    assert scaled.bond_outliers.mean() > 0.95
    assert scaled.angle_outliers.mean() < 0.02, "scaling keeps angles"
    moved = x.copy()
    moved[:, 8] += 0.1
    assert flag_geometry(moved, terms, limits).broken.all()
    assert flag_geometry(x * np.float32(0.5), terms, limits).clashes.min() > 0
    assert flag_geometry(x * np.float32(np.nan), terms, limits).broken.all(), "NaN is never valid"


def test_a_mirror_image_inverts_every_centre(threonine):
    molecule, positions = threonine
    layout = molecule.layout
    assert layout.centre_names == ("CA THR2", "CB THR2")
    assert (layout.handedness != 0).all()
    turned = positions @ np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0].T
    sign = np.sign(np.linalg.det(np.linalg.lstsq(positions, turned, rcond=None)[0]))
    assert handedness(turned, layout.centres).tolist() == (sign * layout.handedness).tolist(), "rotations keep it"
    assert handedness(positions * [-1, 1, 1], layout.centres).tolist() == (-layout.handedness).tolist()
    swapped = positions.copy()
    names = [atom.name for atom in molecule.topology.atoms]
    swapped[[names.index("OG1"), names.index("CG2")]] = positions[[names.index("CG2"), names.index("OG1")]]
    assert (handedness(swapped, layout.centres) == layout.handedness).tolist() == [True, False], "CB alone is inverted"


def test_peptide_bonds_of_caps_count_and_a_cis_bond_is_seen(molecule, reference):
    assert molecule.layout.omega.names == (), "mdtraj needs two CA"
    assert molecule.layout.peptide.names == ("omega ALA2", "omega NME3")
    assert (np.abs(reference.frames.peptide) > np.pi / 2).all(), "all trans"


def test_parts_make_the_same_frames_as_the_whole(threonine):
    molecule, positions = threonine
    generator = np.random.default_rng(1)
    x = (positions + generator.normal(scale=0.005, size=(12, 5, *positions.shape))).astype(np.float32)
    picked = pick_frames(60, 20, generator)
    assert len(set(picked.tolist())) == 20
    common = {"picked": picked, "literature": True}
    whole = frames_of(x, molecule.layout, molecule.topology, first=0, **common)
    parts = [frames_of(x[a:b], molecule.layout, molecule.topology, first=a, **common) for a, b in ((0, 5), (5, 12))]
    joined = concatenate(parts, axis=0)
    for name in ("chi", "omega", "peptide", "inverted", "times", "chains", "structures", "literature"):
        assert np.array_equal(getattr(joined, name), getattr(whole, name)), name
    assert np.array_equal(whole.structures, x[whole.times, whole.chains])
    short = cut(whole, 3)
    assert len(short.chi) == 3
    assert (short.times < 3).all()
    beside = concatenate([whole, whole], axis=1)
    assert np.array_equal(beside.chi[:, 5:], whole.chi)
    assert beside.chains.max() == 9


def test_chi_equals_mdtraj(threonine):
    molecule, positions = threonine
    x = positions[None, None].astype(np.float32)
    found = frames_of(x, molecule.layout, molecule.topology, first=0, picked=np.arange(1), literature=False)
    assert molecule.layout.chi.names == ("chi1 THR2",)
    expected = mdtraj.compute_chi1(mdtraj.Trajectory(x[0], molecule.topology))[1]
    assert found.chi[0] == pytest.approx(expected, abs=1e-5)
    assert found.literature is None


def test_literature_features_have_psi_not_phi_twice():
    x = np.random.default_rng(2).normal(size=(4, 3, 3))
    angles = np.array([[0.1, 0.2, 3.0]] * 4)
    found = literature_features(x, angles)
    assert found.shape == (4, 3 + 6)
    assert found[:, 0] == pytest.approx(np.linalg.norm(x[:, 0] - x[:, 1], axis=1))
    assert found[0, 3:] == pytest.approx([*np.sin(angles[0]), *np.cos(angles[0])])


def test_rates_of_nothing_seen_have_an_upper_end():
    unit = np.arange(1000) % 50
    none = rate(np.zeros(1000), unit, None, seed=0, share=True)
    assert (none.value, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(1 - 0.025 ** (1 / 50))
    some = rate((np.arange(1000) % 10 == 0).astype(float), np.arange(1000) // 20, None, seed=0, share=True)
    assert some.value == pytest.approx(0.1)
    assert some.low <= 0.1 <= some.high
    assert worse_than(rate(np.ones(1000), unit, None, seed=0, share=True), none) is True
    assert worse_than(none, some) is False
    assert rate(np.zeros(3), np.zeros(3, int), None, seed=0, share=True).value is None
    weights = np.where(np.arange(1000) < 500, 0.0, 1.0)
    halves = rate((np.arange(1000) < 500).astype(float), unit, weights, seed=0, share=True)
    assert halves.value == 0.0, "what has no weight does not count"


def test_validity_of_a_method_beside_the_reference(run_folder, molecule, reference, terms):
    cell = load_cell(run_folder / "sample/fake/timewarp/seed0", molecule)
    limits = limits_of(reference.frames.structures, terms)
    expected = validity(reference, molecule.layout, terms, limits, seed=0)
    found = validity_json(validity(cell.samples, molecule.layout, terms, limits, seed=0), expected)
    assert found["inverted_centres"]["value"] == 0.0
    assert found["bond_outliers"]["statement"].startswith("not more often")
    assert found["unisim_invalid_ca"]["statement"].startswith("undefined: needs 2 CA atoms")


def test_whole_frames_are_bounded_and_energies_reduced(molecule, reference):
    assert len(reference.frames.structures) <= STRUCTURES + reference.energy.shape[1]
    spaces, cloud = fit_spaces(reference, None, molecule.layout, kT=2.5, lag=5, states=None, n_states=0, seed=0)
    assert cloud.energy == pytest.approx(reference.energy.ravel() / 2.5)
    again = cloud_of(reference, spaces)
    own = again.whole
    assert again.tica == pytest.approx(cloud.tica[own], abs=1e-4), "a subset of frames has the TICs it has among all"
    assert np.array_equal(again.torsion_state, cloud.torsion_state[own])


def test_a_set_without_frames_is_labelled(molecule, reference, terms):
    from dataclasses import replace

    limits = limits_of(reference.frames.structures, terms)
    bare = validity(replace(reference, frames=None), molecule.layout, terms, limits, seed=0)
    assert {one.note for one in bare.values()} == {"coordinates were not kept"}
