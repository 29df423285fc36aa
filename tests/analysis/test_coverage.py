import numpy as np
import pytest

from longstride.analysis.coverage import Cost, cost_of, coverage, first_visits, missing_states


def test_first_visits_by_hand():
    path = np.array([[0, 0], [0, 1], [2, -1], [2, 2]])
    assert first_visits(path, 4).tolist() == [1, 2, 3, np.inf]
    assert first_visits(path, 4, visits=3).tolist() == [2, np.inf, 4, np.inf]


def test_recall_counts_common_states_only_and_costs_are_shares():
    path = np.array([[0, 0], [0, 1], [0, 2], [0, 2]])
    populations = np.array([0.6, 0.3, 0.0995, 0.0005])
    found = coverage(path, populations, Cost(calls=800.0, seconds=4.0))
    assert found["n_states"] == 3, "a state of 0.05 % does not count"
    assert found["recall"] == 1.0
    first = found["points"][0]
    assert (first["n_samples"], first["target_calls"], first["sampling_wall_s"]) == (2, 200.0, 1.0)
    assert first["recall"] == pytest.approx(1 / 3)
    assert first["recall_weighted"] == pytest.approx(0.6 / 0.9995)
    assert [one["first_visit"]["n_samples"] for one in found["states"]] == [2, 4, 6]


def test_a_method_that_stays_has_low_recall():
    populations = np.full(10, 0.1)
    generator = np.random.default_rng(0)
    mixing = coverage(generator.integers(10, size=(200, 4)), populations, Cost(calls=None, seconds=None))
    stuck = coverage(np.zeros((200, 4), dtype=int), populations, Cost(calls=None, seconds=None))
    assert mixing["recall"] == 1.0
    assert stuck["recall"] == pytest.approx(0.1)
    assert stuck["states"][3]["first_visit"] is None
    assert mixing["points"][-1]["target_calls"] is None


def test_nothing_to_cover_is_labelled():
    assert coverage(np.zeros((0, 2), dtype=int), np.ones(1), Cost(calls=None, seconds=None))["note"] == "no samples"
    assert "no state" in coverage(np.zeros((2, 2), dtype=int), np.array([1e-4]), Cost(calls=None, seconds=None))["note"]


def test_cost_of_a_manifest():
    manifest = {"counts": {"energy_calls": 3, "force_calls": 4}, "timing": {"sampling_s": 2.0}}
    assert cost_of(manifest) == Cost(calls=7.0, seconds=2.0)
    assert cost_of({}) == Cost(calls=None, seconds=None)


def test_missing_state_test():
    generator = np.random.default_rng(1)
    a, b = generator.normal([-3.0, 0.0], 0.2, (400, 2)), generator.normal([3.0, 0.0], 0.2, (400, 2))
    reference = np.concatenate([a, b])
    assert missing_states(reference, generator.permutation(reference)[:300])["passed"] is True
    lost = missing_states(reference, a)
    assert lost["passed"] is False, "negative control: one of two states is missing"
    assert lost["recall"] == pytest.approx(0.5, abs=0.05)
    assert lost["precision"] == 1.0
    invented = missing_states(a, reference)
    assert invented["passed"] is True
    assert invented["precision"] < 0.6, "states that the reference does not have"


def test_missing_state_test_is_labelled_where_undefined():
    points = np.random.default_rng(2).normal(size=(10, 2))
    assert missing_states(points, points[:0])["passed"] is None
    assert missing_states(points * [1, 0], points)["note"].startswith("constant")
    assert missing_states(points, points * np.nan)["note"].startswith("not finite")
