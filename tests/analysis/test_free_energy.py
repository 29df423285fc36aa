import itertools
import math

import numpy as np
import pytest

from longstride.analysis.estimate import Estimate, ratio, undefined
from longstride.analysis.free_energy import (
    BASINS,
    agreement,
    basin_of,
    bin_index,
    crossings,
    delta_f_chains,
    delta_f_weights,
    from_chains,
    from_weights,
    grid_index,
)
from longstride.analysis.reweighting import reweight


def two_state(generator, *, times, chains, forward, backward, starts=None):
    """A two-state chain with p(1) = forward / (forward + backward) exactly."""
    p = forward / (forward + backward)
    state = np.empty((times, chains), dtype=int)
    state[0] = generator.random(chains) < p if starts is None else starts
    draw = generator.random((times, chains))
    for t in range(1, times):
        state[t] = np.where(state[t - 1] == 0, draw[t] < forward, draw[t] >= backward)
    return state


TRUTH = math.log(10)  # Delta F of the rates below in kT


def test_bins_are_periodic_and_complete():
    angles = np.array([-np.pi, np.pi, -np.pi + 1e-9, np.pi - 1e-9, 0.0])
    assert bin_index(angles, 36).tolist() == [0, 0, 0, 35, 18]
    assert grid_index(np.array([0.0]), np.array([np.pi]), 36).tolist() == [18 * 36]


def test_every_point_of_the_map_has_exactly_one_basin():
    grid = np.radians(np.arange(-180, 180, 5.0))
    phi, psi = np.meshgrid(grid, grid, indexing="ij")
    inside = np.zeros(phi.shape, dtype=int)
    for _, (a, b), (c, d) in BASINS:
        inside += ((np.degrees(phi) - a) % 360 < b - a) & ((np.degrees(psi) - c) % 360 < d - c)
    assert (inside == 1).all()
    known = np.radians([[-75, 145], [-75, -20], [55, 45], [65, -60]])
    assert basin_of(known[:, 0], known[:, 1]).tolist() == [0, 1, 2, 3]


def test_profile_of_a_known_density():
    """phi from a von Mises density: F = -kappa cos phi exactly."""
    generator = np.random.default_rng(0)
    kappa, bins = 1.5, 24
    phi = generator.vonmises(0.0, kappa, size=(400, 128))
    found = from_chains(bin_index(phi, bins), bins=bins, replicates=200, seed=1)
    edges = np.linspace(-np.pi, np.pi, bins + 1)
    fine = np.array([np.mean(np.exp(kappa * np.cos(np.linspace(a, b, 200)))) for a, b in itertools.pairwise(edges)])
    truth = -np.log(fine)
    difference = (found.values - found.values.mean()) - (truth - truth.mean())
    z = difference / found.errors
    assert np.abs(z).max() < 5
    assert 0.5 < z.std() < 1.6


def test_delta_f_of_a_double_well():
    """x in a quartic double well with a tilt: Delta F by quadrature, samples by inversion of its distribution."""
    grid = np.linspace(-2.5, 2.5, 20_001)
    density = np.exp(-4 * (grid**2 - 1) ** 2 - 0.6 * grid)
    density /= density.sum()
    truth = -math.log(density[grid >= 0].sum() / density[grid < 0].sum())
    draw = np.random.default_rng(1).random((500, 40))
    x = np.interp(draw, np.cumsum(density), grid)
    found = delta_f_chains(x >= 0)
    assert found.low < truth < found.high
    assert found.high - found.low < 0.1
    assert abs(found.value - truth) < 5 * found.standard_error


@pytest.mark.parametrize(
    ("times", "chains", "forward", "backward"),
    [(200, 64, 0.01, 0.1), (2000, 8, 0.002, 0.02), (1000, 4, 0.01, 0.1), (300, 128, 0.002, 0.02)],
)
def test_delta_f_intervals_cover_the_truth(times, chains, forward, backward):
    repeats = 200
    pool = two_state(np.random.default_rng(2), times=times, chains=chains * repeats, forward=forward, backward=backward)
    pool = pool.reshape(times, repeats, chains)
    results = [delta_f_chains(pool[:, k]) for k in range(repeats)]
    inside = [one.low <= TRUTH <= one.high for one in results if one.defined]
    assert len(inside) > 0.98 * repeats
    assert 0.90 <= np.mean(inside) <= 0.985


def seeded(generator, *, rate, times=2000, trajectories=8):
    starts = np.arange(trajectories) % 2  # half of them start in the rare state
    return two_state(generator, times=times, chains=trajectories, forward=rate, backward=10 * rate, starts=starts)


def test_seeded_starts_bias_the_histogram_and_the_msm_undoes_it():
    state = np.concatenate([seeded(np.random.default_rng(k), rate=0.0005, times=400) for k in range(20)], axis=1)
    raw = delta_f_chains(state)
    weights = reweight(list(state.T.copy()), states=2, lag=2, replicates=200, seed=0)
    msm = delta_f_weights(state.T.ravel(), weights)
    assert raw.value < TRUTH - 0.8, "negative control: the raw histogram repeats the starts"
    assert raw.high < TRUTH
    assert msm.low < TRUTH < msm.high
    assert abs(msm.value - TRUTH) < 0.6


def test_msm_intervals_cover_the_truth():
    inside = []
    for k in range(40):
        state = seeded(np.random.default_rng(100 + k), rate=0.004, times=500)
        weights = reweight(list(state.T.copy()), states=2, lag=2, replicates=50, seed=k)
        found = delta_f_weights(state.T.ravel(), weights)
        inside.append(found.low is not None and found.high is not None and found.low <= TRUTH <= found.high)
    assert np.mean(inside) >= 0.85  # 40 repeats: two to three standard errors below 0.95


def test_unconnected_states_are_undefined_and_say_so():
    state = np.repeat(np.array([[0, 1, 0, 1]]), 300, axis=0)
    weights = reweight(list(state.T.copy()), states=2, lag=2, replicates=50, seed=0)
    found = delta_f_weights(state.T.ravel(), weights)
    assert found.value is None
    assert "connected" in found.note
    one_way = state.copy()
    one_way[150:, 1] = 0  # the rare basin is left and never entered
    weights = reweight(list(one_way.T.copy()), states=2, lag=2, replicates=50, seed=0)
    assert delta_f_weights(one_way.T.ravel(), weights).value is None
    assert from_weights(one_way.T.ravel(), weights, bins=2).note


def test_disconnected_part_of_a_larger_model_is_reported():
    generator = np.random.default_rng(3)
    left = generator.integers(0, 3, size=(400, 4))  # three states that mix
    right = 3 + generator.integers(0, 2, size=(400, 2))  # two others, never linked to them
    state = np.concatenate([left, right], axis=1)
    weights = reweight(list(state.T.copy()), states=5, lag=1, replicates=50, seed=0)
    assert weights.connected_fraction == pytest.approx(4 / 6)
    assert "outside the connected" in weights.note
    found = delta_f_weights((state >= 3).T.ravel(), weights)
    assert found.value is None


def test_too_short_trajectories_give_no_msm():
    weights = reweight([np.array([0, 1, 0, 1, 0])] * 3, states=2, lag=5, replicates=20, seed=0)
    assert weights.weights is None
    assert "shorter than three lags" in weights.note
    nothing = from_weights(np.zeros(15, dtype=int), weights, bins=4)
    assert np.isnan(nothing.values).all()


@pytest.mark.parametrize(
    ("state", "word"),
    [
        (np.zeros((100, 4), dtype=bool), "never visited"),
        (np.ones((100, 4), dtype=bool), "never visited"),
        (np.broadcast_to(np.array([True, False]), (100, 2)), "no chain crosses"),
    ],
)
def test_basins_that_are_not_exchanged_have_no_delta_f(state, word):
    found = delta_f_chains(state)
    assert found.value is None
    assert word in found.note


def test_crossings_are_counted():
    assert crossings(np.array([[0, 1], [1, 1], [0, 1]])) == 2


def test_agreement_uses_both_errors():
    narrow, wide = Estimate(value=2.0, low=1.9, high=2.1), Estimate(value=2.5, low=1.5, high=3.5)
    z, statement = agreement(narrow, wide)
    assert abs(z) < 2
    assert "too wide" in statement
    z, statement = agreement(narrow, Estimate(value=2.5, low=2.4, high=2.6))
    assert abs(z) > 2
    assert "differs" in statement
    assert agreement(undefined("no"), narrow) == (None, "undefined: no")
    assert agreement(narrow, undefined("gone"))[0] is None
    assert agreement(narrow, Estimate(value=1.0))[0] is None


def test_ratio_combines_both_intervals():
    found = ratio(Estimate(value=8.0, low=4.0, high=16.0), Estimate(value=2.0, low=1.0, high=4.0))
    assert found.value == 4.0
    assert found.high / found.value == pytest.approx(np.exp(np.hypot(np.log(2), np.log(2))))
    assert ratio(undefined("none"), found).value is None
    assert ratio(found, Estimate(value=1.0)).low is None
