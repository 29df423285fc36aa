from dataclasses import replace

import numpy as np
import pytest

from longstride.analysis.accuracy_curves import accuracy_curve, prefix_lengths, profile_rmse
from longstride.analysis.features import Torsions
from longstride.analysis.free_energy import FreeEnergy
from longstride.analysis.samples import SampleSet

BINS = 12
CENTRES = -np.pi + (np.arange(BINS) + 0.5) * 2 * np.pi / BINS
TRUTH = np.exp(1.5 * np.cos(CENTRES + 1.0))
TRUTH /= TRUTH.sum()
FREE = -np.log(TRUTH) + np.log(TRUTH.max())
BASELINE = FreeEnergy(values=FREE, errors=np.full(BINS, 0.02), counts=np.full(BINS, 1000.0))
PHI = Torsions(names=("phi ALA2", "psi ALA2"), indices=np.zeros((2, 4), dtype=int), pair=(0, 1))


def samples(index, log_weights=None, *, seconds=8.0):
    angles = np.stack([CENTRES[index], np.zeros(index.shape)], axis=-1)
    manifest = {"counts": {"energy_calls": 300, "force_calls": 100}, "timing": {"sampling_s": seconds}}
    return SampleSet(
        manifest=manifest, angles=angles, energy=np.zeros(index.shape), temperature={}, temperature_note="",
        log_weights=log_weights,
    )  # fmt: skip


def draws(seed, shape, probability=TRUTH):
    return np.random.default_rng(seed).choice(BINS, size=shape, p=probability)


def curve(index, log_weights=None, *, limit=20.0):
    return accuracy_curve(samples(index, log_weights), PHI, BASELINE, bins=BINS, limit=limit)


def test_independent_samples_err_as_their_number_says():
    """-ln p of N draws has variance (1 - p) / (N p) to first order, and the mean offset is removed."""
    sizes = np.array([[point["n_samples"] for point in curve(draws(0, (500, 8)))["points"]]]).ravel()
    squares = np.array([[point["rmse_kT"] ** 2 for point in curve(draws(k, (500, 8)))["points"]] for k in range(60)])
    measured, error = squares.mean(axis=0), squares.std(axis=0, ddof=1) / np.sqrt(60)
    variance = 1 / TRUTH  # covariance of ln p of a multinomial is diag(1 / p) - 1, and the constant is an offset
    expected = (variance * (1 - 1 / BINS)).mean() / sizes
    assert sizes[-1] == 4000
    late = sizes >= 1000  # where every bin is filled
    assert late.sum() >= 3
    assert (np.abs(measured - expected)[late] < 4 * error[late] + 0.02 * expected[late]).all()
    wrong = np.array([curve(draws(k, (500, 8), np.roll(TRUTH, 3)))["points"][-1]["rmse_kT"] for k in range(5)])
    assert (wrong > 10 * np.sqrt(expected[-1])).all(), "samples of another distribution never become right"


def test_weights_undo_a_bias():
    flat = np.full(BINS, 1 / BINS)
    index = draws(3, (600, 8), flat)
    log_weights = np.log(TRUTH[index]) + 7.0
    assert curve(index, log_weights)["points"][-1]["rmse_kT"] < 0.1
    assert curve(index)["points"][-1]["rmse_kT"] > 0.5
    assert "NaN" in curve(index, np.where(index == 0, np.nan, log_weights))["note"]


def test_costs_are_shares_of_what_sampling_cost():
    found = curve(draws(1, (100, 8)))
    last, first = found["points"][-1], found["points"][0]
    assert (last["n_saves"], last["target_calls"], last["sampling_wall_s"]) == (100, 400.0, 8.0)
    assert first["sampling_wall_s"] == pytest.approx(8.0 * first["n_saves"] / 100)
    assert found["floor_kT"] == pytest.approx(0.02)
    assert found["quantity"] == "F(phi ALA2)"


def test_reached_means_for_good():
    index = draws(2, (2000, 8))
    found = curve(index)
    rmse = [point["rmse_kT"] for point in found["points"]]
    for tolerance in (0.5, 0.25):
        reached = found["reached"][f"{tolerance:g}"]
        where = [point["n_samples"] for point in found["points"]].index(reached["n_samples"])
        assert max(rmse[where:]) <= tolerance
        assert where == 0 or rmse[where - 1] > tolerance
    stuck = np.where(np.arange(2000)[:, None] < 100, index, 3)  # right at first, then stuck in one bin
    assert curve(stuck)["reached"]["0.5"] is None


def test_empty_bins_count():
    half = np.where(np.arange(BINS) < 6, TRUTH, 0)
    half /= half.sum()
    visited = profile_rmse(half, 0.5 / 1000, np.where(np.arange(BINS) < 6, FREE, np.nan), limit=20.0)
    assert visited == pytest.approx(0, abs=1e-12)
    assert profile_rmse(half, 0.5 / 1000, FREE, limit=20.0) > 1.0


@pytest.mark.parametrize(
    ("torsions", "baseline", "index", "note"),
    [
        (replace(PHI, pair=None), BASELINE, draws(0, (50, 4)), "no phi"),
        (PHI, replace(BASELINE, values=np.full(BINS, np.nan), note="not connected"), draws(0, (50, 4)), "not connected"),
        (PHI, BASELINE, draws(0, (3, 4)), "fewer than 20 samples"),
    ],
)
def test_no_curve_says_why(torsions, baseline, index, note):
    found = accuracy_curve(samples(index), torsions, baseline, bins=BINS, limit=20.0)
    assert found["points"] == []
    assert found["reached"] == {}
    assert note in found["note"]


def test_prefixes_grow_evenly_and_end_with_everything():
    lengths = prefix_lengths(1000, 4)
    assert lengths[0] == 5
    assert lengths[-1] == 1000
    assert len(lengths) == 12
    assert prefix_lengths(2, 4) == []
