import json

import mdtraj
import numpy as np
import pytest

from longstride.analysis.samples import load_molecule
from longstride.analysis.structures import nearest_frames, principal_frame


def test_the_nearest_frame_to_a_known_centre():
    features = np.array([[0.0], [1.0], [1.9], [10.0], [11.0], [14.0], [50.0]])
    state = np.array([0, 0, 0, 1, 1, 1, -1])
    assert nearest_frames(features, state) == {0: 1, 1: 4}
    assert nearest_frames(features, state, np.array([1.0, 0, 0, 0, 0, 1, 1])) == {0: 0, 1: 5}


def test_turning_keeps_distances_and_chirality():
    x = np.random.default_rng(4).normal(size=(9, 3)) * [1, 5, 2] + 3
    turned = principal_frame(x)
    assert np.linalg.norm(turned[:, None] - turned, axis=-1) == pytest.approx(np.linalg.norm(x[:, None] - x, axis=-1))
    volume = [np.linalg.det(points[1:4] - points[0]) for points in (x, turned, turned * [1, 1, -1])]
    assert volume[1] == pytest.approx(volume[0])
    assert volume[2] == pytest.approx(-volume[0])  # a mirror image would be seen
    spread = turned.std(axis=0)
    assert spread[0] > spread[1] > spread[2]


def test_representatives_lie_in_their_state(run_folder, compared):
    content = json.loads((compared / "comparison.json").read_text())
    shown, molecule = content["structures"], load_molecule(run_folder / "prepare/fake")
    assert shown["elements"] == molecule.elements.tolist()
    assert len(shown["bonds"]) == molecule.topology.n_bonds
    assert 2 <= len(shown["states"]) <= 12
    assert sum(one["population"] for one in shown["states"]) == pytest.approx(1, abs=0.02)
    x = np.array([one["positions_A"] for one in shown["states"]])
    bonds = np.array(shown["bonds"])
    lengths = np.linalg.norm(x[:, bonds[:, 0]] - x[:, bonds[:, 1]], axis=-1)
    assert 0.85 < lengths.min() < lengths.max() < 1.7  # Angstrom
    frames = mdtraj.load(str(compared / "states.pdb"))
    angles = np.degrees(mdtraj.compute_phi(frames)[1][:, 0])
    stored = np.array([one["torsions_degrees"]["phi ALA2"] for one in shown["states"]])
    assert np.abs((angles - stored + 180) % 360 - 180).max() < 2.0  # coordinates are rounded to 0.01 Angstrom
