import numpy as np
import pytest
from fake_run import Builder

from longstride.analysis.features import circular_feature_names, load_topology, torsion_angles
from longstride.analysis.projection import feature_set, fit_projection, load_projection, save_tica
from longstride.analysis.tica_msm import fit_tica
from longstride.data.atomic import read_arrays
from longstride.data.manifest import read_manifest
from longstride.errors import DataError
from longstride.systems import load_prepared


@pytest.fixture(scope="module")
def topology(run_folder):
    return load_topology(run_folder / "prepare/fake/structure.pdb")


@pytest.fixture(scope="module")
def fitted(run_folder, topology):
    folder = run_folder / "reference/fake"
    manifest = read_manifest(folder, kind="reference")
    return fit_projection(folder, manifest, topology, kind="literature", lag=10)


def test_psi_is_psi(run_folder, topology):
    """Frames that differ in psi alone differ in the features called psi; a second phi in their place would not."""
    features = feature_set(topology, "literature")
    builder = Builder(load_prepared(run_folder / "prepare/fake"))
    angles = np.radians([[[-75.0, 145.0], [-75.0, -20.0]]])
    x = builder.positions(np.random.default_rng(0), angles)[0]
    column = features.names.index("sin psi ALA2")
    values = features.values(x, topology)[:, column]
    np.testing.assert_allclose(values, np.sin(angles[0, :, 1]), atol=0.02)
    published = np.sin(torsion_angles(x, topology, features.torsions)[:, 0])  # negative control: phi computed twice
    assert np.abs(published - values).max() > 0.5


def test_feature_names_and_elements(topology):
    literature, heavy = (feature_set(topology, kind) for kind in ("literature", "heavy"))
    elements = [atom.element.symbol for atom in topology.atoms]
    assert {elements[k] for k in literature.pairs.ravel()} == {"C", "N"}
    assert {elements[k] for k in heavy.pairs.ravel()} == {"C", "N", "O"}
    assert len(heavy.names) == 10 * 9 // 2
    assert {"sin phi ALA2", "cos psi ALA2"} < set(literature.names)
    assert not any("phi" in name for name in heavy.names)
    assert len(circular_feature_names(literature.torsions)) + len(literature.pairs) == len(literature.names)
    with pytest.raises(DataError, match="choose torsions, literature or heavy"):
        feature_set(topology, "all")


def test_the_streamed_fit_equals_that_of_whole_trajectories(run_folder, topology, fitted):
    names = sorted(path.name for path in (run_folder / "reference/fake").glob("*.safetensors"))
    positions = [read_arrays(run_folder / "reference/fake" / name)[0]["positions"] for name in names]
    whole = fit_tica([fitted.features.values(part, topology) for part in positions], lag=10)
    np.testing.assert_allclose(fitted.tica.timescales[:3], whole.timescales[:3], rtol=1e-6)
    found = fitted.project(positions[0], topology, components=2)
    np.testing.assert_allclose(found, whole.project(fitted.features.values(positions[0], topology))[:, :2], atol=1e-6)
    scaled = fitted.kinetic_map(positions[0], topology)
    np.testing.assert_allclose(scaled, found * whole.eigenvalues[:2], atol=1e-6)


def test_a_stored_projection_comes_back(topology, fitted, tmp_path):
    model = (fitted.tica, fitted.features.names, fitted.spacing_ps)
    assert save_tica(tmp_path, {"literature": model}) == ["tica.safetensors", "tica.json"]
    again = load_projection(tmp_path, topology, "literature")
    np.testing.assert_array_equal(again.tica.axes, fitted.tica.axes)
    assert (again.tica.lag, again.spacing_ps, again.tica.reweighting) == (10, 0.2, fitted.tica.reweighting)
    with pytest.raises(DataError, match="holds no TICA of heavy features"):
        load_projection(tmp_path, topology, "heavy")


def test_too_short_a_reference_has_no_projection(run_folder, topology):
    folder = run_folder / "reference/fake"
    assert fit_projection(folder, read_manifest(folder, kind="reference"), topology, kind="heavy", lag=200) is None
