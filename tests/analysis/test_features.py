import numpy as np
import pytest
from fake_run import CENTRES, Builder

from longstride.analysis.features import circular_feature_names, circular_features, find_torsions, load_topology, torsion_angles
from longstride.errors import DataError
from longstride.systems import load_prepared


@pytest.fixture(scope="module")
def molecule(run_folder):
    topology = load_topology(run_folder / "prepare/fake/structure.pdb")
    return topology, find_torsions(topology), Builder(load_prepared(run_folder / "prepare/fake"))


def dihedral(x, i, j, k, m):
    """The angle of two planes, written out separately from MDTraj's formula."""
    a, b, c = x[j] - x[i], x[k] - x[j], x[m] - x[k]
    n1, n2 = np.cross(a, b), np.cross(b, c)
    sign = np.sign(np.dot(a, n2))
    return sign * np.arccos(np.dot(n1, n2) / np.linalg.norm(n1) / np.linalg.norm(n2))


def test_alanine_dipeptide_has_one_pair(molecule):
    _, torsions, _ = molecule
    assert torsions.names == ("phi ALA2", "psi ALA2")
    assert torsions.pair == (0, 1)
    assert torsions.phis == [0]
    assert circular_feature_names(torsions) == ("cos phi ALA2", "cos psi ALA2", "sin phi ALA2", "sin psi ALA2")


def test_angles_are_those_the_coordinates_were_made_with(molecule):
    topology, torsions, builder = molecule
    wanted = np.stack([CENTRES, -CENTRES])
    x = builder.positions(np.random.default_rng(0), wanted)
    found = torsion_angles(x, topology, torsions)
    assert found.shape == (2, 3, 2)
    np.testing.assert_allclose(np.exp(1j * found), np.exp(1j * wanted), atol=0.01)
    by_hand = dihedral(x[0, 2].astype(float), *torsions.indices[0])
    assert found[0, 2, 0] == pytest.approx(by_hand, abs=1e-5)


def test_features_are_periodic():
    angles = np.array([[[np.pi, 0.3]], [[-np.pi, 0.3 + 2 * np.pi]]])
    values = circular_features(angles)
    np.testing.assert_allclose(values[0], values[1], atol=1e-12)
    assert values.shape == (2, 1, 4)


def test_uncapped_dipeptide_pairs_phi_2_with_psi_1(tmp_path):
    from longstride.systems import prepare_sequence, save_prepared

    prepared = prepare_sequence("AG", name="ag", force_field=("amber14-all.xml", "implicit/obc1.xml"), cutoff_nm=2.0)
    save_prepared(tmp_path, prepared, {})
    torsions = find_torsions(load_topology(tmp_path / "structure.pdb"))
    assert torsions.names == ("phi GLY2", "psi ALA1")
    assert torsions.pair == (0, 1)


def test_bad_inputs_are_one_line(molecule, tmp_path):
    topology, torsions, _ = molecule
    with pytest.raises(DataError, match="the topology has 22 atoms"):
        torsion_angles(np.zeros((5, 3, 3)), topology, torsions)
    with pytest.raises(DataError, match="run the prepare stage again"):
        load_topology(tmp_path / "none.pdb")
