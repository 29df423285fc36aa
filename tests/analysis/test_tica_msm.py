import subprocess
import sys

import numpy as np
import pytest
from deeptime.decomposition import TICA
from deeptime.markov import TransitionCountEstimator

from longstride.analysis import pyemma_bridge
from longstride.analysis.reference_model import kinetics
from longstride.analysis.tica_msm import (
    cluster,
    connected_states,
    fit_msm,
    fit_tica,
    implied_timescales,
    segment_counts,
    segment_of_frames,
)

# a reversible three-state chain; its timescales follow from its eigenvalues
MATRIX = np.array([[0.96, 0.03, 0.01], [0.02, 0.96, 0.02], [0.01, 0.03, 0.96]])


def exact_timescales(matrix):
    values = np.sort(np.real(np.linalg.eigvals(matrix)))[::-1]
    return -1 / np.log(values[1:])


def chain(generator, matrix, times):
    cumulative = matrix.cumsum(axis=1)
    draw = generator.random(times)
    state = np.zeros(times, dtype=np.int64)
    for t in range(1, times):
        state[t] = np.searchsorted(cumulative[state[t - 1]], draw[t], side="right")
    return np.minimum(state, len(matrix) - 1)


@pytest.fixture(scope="module")
def paths():
    generator = np.random.default_rng(0)
    return [chain(generator, MATRIX, 20_000) for _ in range(4)]


def test_counts_equal_deeptime(paths):
    segments = segment_of_frames([len(path) for path in paths])
    ours = segment_counts(paths, segments, states=3, lag=5)
    theirs = TransitionCountEstimator(5, "sliding").fit(paths).fetch_model().count_matrix
    assert len(ours) == 40
    np.testing.assert_array_equal(ours.sum(axis=0), theirs)


def test_exact_counts_give_the_exact_model():
    stationary = np.linalg.matrix_power(MATRIX, 5000)[0]
    model = fit_msm(1e6 * stationary[:, None] * MATRIX)
    np.testing.assert_allclose(model.stationary, stationary, rtol=1e-6)
    np.testing.assert_allclose(model.timescales(lag=1, count=2), exact_timescales(MATRIX), rtol=1e-6)
    np.testing.assert_allclose(model.matrix, MATRIX, rtol=1e-6)


@pytest.mark.parametrize("lag", [1, 5, 10])
def test_timescales_of_a_known_chain(paths, lag):
    found = implied_timescales(paths, states=3, lag=lag, count=2, replicates=60, seed=1)
    truth = exact_timescales(MATRIX)
    error = (found.high - found.low) / (2 * 1.96)
    assert (np.abs(found.values - truth) < 5 * error).all()
    assert (error / truth < 0.1).all()


def test_timescale_intervals_cover_the_truth():
    generator, repeats, trajectories, times = np.random.default_rng(9), 40, 4, 3000
    cumulative = MATRIX.cumsum(axis=1)
    state = np.zeros((times, repeats * trajectories), dtype=np.int64)
    draw = generator.random(state.shape)
    for t in range(1, times):
        state[t] = (draw[t][:, None] > cumulative[state[t - 1]]).sum(axis=1)
    truth, inside = exact_timescales(MATRIX)[0], 0
    for part in np.split(state, repeats, axis=1):
        found = implied_timescales(list(part.T.copy()), states=3, lag=5, count=1, replicates=40, seed=1)
        inside += found.low[0] <= truth <= found.high[0]
    assert 0.85 <= inside / repeats <= 1.0  # 40 repeats: 0.95 within three standard errors


def test_deeptime_and_pyemma_agree(paths):
    found = kinetics(paths, states=3, lags=[1, 5, 20], spacing_ps=0.2, seed=0)
    assert found.disagreement < 1e-3
    slowest = found.slowest(5)
    assert abs(slowest.value - 0.2 * exact_timescales(MATRIX)[0]) < 5 * slowest.standard_error
    assert found.slowest(7).value is None


def test_pyemma_names_are_restored_without_touching_present_ones():
    assert pyemma_bridge.version() == "2.5.12"
    assert np.inf == np.inf


def ou(generator, *, times, relaxation):
    decay = np.exp(-1 / relaxation)
    x = generator.normal(size=times)
    for t in range(1, times):
        x[t] = decay * x[t - 1] + np.sqrt(1 - decay**2) * x[t]
    return x


def test_tica_finds_the_slow_coordinate_and_agrees_with_pyemma():
    generator = np.random.default_rng(2)
    slow_axis = np.array([0.6, -0.8])
    series = []
    for _ in range(4):
        slow, fast = ou(generator, times=8000, relaxation=50.0), ou(generator, times=8000, relaxation=2.0)
        series.append(np.outer(slow, slow_axis) + np.outer(3 * fast, np.array([0.8, 0.6])))
    model = fit_tica(series, lag=5)
    theirs = pyemma_bridge.tica_timescales(series, lag=5, count=2)
    np.testing.assert_allclose(model.timescales[:2], theirs, rtol=1e-6)
    assert model.timescales[0] == pytest.approx(50, rel=0.25)
    first = np.concatenate([model.project(part)[:, 0] for part in series])
    truth = np.concatenate([part @ slow_axis for part in series])
    assert abs(np.corrcoef(first, truth)[0, 1]) > 0.99
    assert first.std() == pytest.approx(1, rel=0.05)
    assert model.axes[np.abs(model.axes[:, 0]).argmax(), 0] > 0, "the sign is fixed"


def test_tica_of_too_little_is_none():
    assert fit_tica([np.random.default_rng(0).normal(size=(8, 2))], lag=5) is None
    assert fit_tica([np.ones((100, 2))], lag=5) is None
    assert fit_tica([np.empty((100, 0))], lag=5) is None


def test_clusters_are_deterministic():
    series = [np.random.default_rng(3).normal(size=(500, 4)) for _ in range(2)]
    first, second = (cluster(series, states=10, tica=None, seed=5) for _ in range(2))
    np.testing.assert_array_equal(first.model.cluster_centers, second.model.cluster_centers)
    np.testing.assert_array_equal(first.assign(series[0]), second.assign(series[0]))
    assert first.n_states == 10
    assert cluster([np.zeros((50, 2))], states=10, tica=None, seed=0).n_states == 1


def test_many_torsions_are_clustered_on_tica():
    generator = np.random.default_rng(4)
    series = [np.stack([ou(generator, times=600, relaxation=20.0) for _ in range(8)], axis=1) for _ in range(2)]
    tica = fit_tica(series, lag=5)
    found = cluster(series, states=12, tica=tica, seed=0)
    assert found.model.cluster_centers.shape == (12, 4)
    assert found.assign(series[0]).max() < 12


def test_the_connected_set_with_most_counts_is_kept():
    counts = np.array([[5.0, 1, 0, 0], [1, 5, 0, 0], [0, 0, 90, 2], [0, 0, 2, 90]])
    assert connected_states(counts).tolist() == [2, 3]
    counts[0, 2] = 4  # a way in but none back
    assert connected_states(counts).tolist() == [2, 3]
    assert fit_msm(np.eye(4)) is None


def test_lags_longer_than_the_data_are_labelled():
    found = implied_timescales([np.array([0, 1] * 10)], states=2, lag=10, count=2, replicates=20, seed=0)
    assert np.isnan(found.values).all()
    assert "shorter than three lags" in found.note


def test_a_crossing_that_replicates_miss_makes_the_slowest_timescale_longer_not_shorter():
    """Two pairs of states, one crossing each way: replicates without one of them must not report the fast process."""
    generator = np.random.default_rng(6)
    paths = []
    for k in range(20):
        inside = generator.integers(0, 2, size=400) + (0 if k % 2 else 2)
        if k < 2:  # one trajectory crosses in each direction
            inside[200:] = generator.integers(0, 2, size=200) + (2 if k % 2 else 0)
        paths.append(inside)
    found = implied_timescales(paths, states=4, lag=1, count=2, replicates=100, seed=0)
    assert found.low[0] > 100
    assert found.low[0] < found.values[0] < found.high[0]
    counts = segment_counts(paths, segment_of_frames([len(p) for p in paths]), states=4, lag=1)
    alone = [fit_msm(np.delete(counts, k, axis=0).sum(0)) for k in range(len(counts))]  # negative control
    assert min(len(model.states) for model in alone) == 2


def test_a_replicate_with_a_state_that_only_the_trace_enters_is_estimated_all_the_same():
    """Chains relax from state 5 to 0 and stay; one segment alone climbs back, and half of the replicates miss it."""
    down, up = np.zeros((6, 6)), np.zeros((6, 6))
    k = np.arange(5)
    down[k + 1, k], down[0, 0], up[k, k + 1] = 4, 200, 1
    with pytest.raises(RuntimeError, match="Stationary distribution"):  # the smallest trace is too small for the estimator
        fit_msm(1.001 * down + 0.001 * up, tolerance=1e-5)
    falling = [np.array([5, 4, 3, 2, 1] + [0] * 50)] * 4
    rising = [np.array([0, 1, 2, 3, 4, 5])]
    found = implied_timescales(falling + rising, states=6, lag=1, count=2, replicates=50, seed=1)
    assert np.isfinite(found.values).all()
    assert np.isfinite(found.low).all()
    assert (found.low <= found.high).all()


def test_pyemma_leaves_the_log_handlers_of_others_open():
    program = """
import io, logging
from longstride.analysis import pyemma_bridge

class Closes(logging.StreamHandler):
    def close(self):
        self.stream.close()
        super().close()

handler = Closes(io.StringIO())
logging.getLogger("another").addHandler(handler)
pyemma_bridge.version()
print("closed" if handler.stream.closed else "open")
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["open"]


def jump_features(*, times, number, start, seed=12):
    """One-hot features of chains of the known matrix, all started in one state."""
    generator = np.random.default_rng(seed)
    states = []
    for _ in range(number):
        path = chain(generator, MATRIX, times)
        assert path[0] == start
        states.append(path)
    return [np.eye(3)[path] for path in states]


def test_koopman_reweighting_removes_the_bias_of_the_starts():
    """240 chains of 60 steps from state 0, whose slowest timescale is 25 steps: time averages remember the start."""
    series = jump_features(times=60, number=240, start=0)
    truth = np.linalg.matrix_power(MATRIX, 5000)[0]
    slow = exact_timescales(MATRIX)[0]
    weighted, plain = fit_tica(series, lag=5), fit_tica(series, lag=5, koopman=False)
    assert (weighted.reweighting, plain.reweighting) == ("koopman", "none")
    groups = [np.mean(part, axis=0) for part in np.array_split(np.array([np.mean(one, axis=0) for one in series]), 20)]
    error = np.std(groups, axis=0) / np.sqrt(20)
    assert (np.abs(weighted.mean - truth) < 5 * error).all()
    assert np.abs(plain.mean - truth).max() > 10 * error.max(), "negative control: without weights the starts show"
    assert weighted.timescales[0] == pytest.approx(slow, rel=0.1)


def test_koopman_weights_are_those_of_pyemma():
    series = [part[:, :2] for part in jump_features(times=60, number=60, start=0)]
    ours, plain = fit_tica(series, lag=5), fit_tica(series, lag=5, koopman=False)
    np.testing.assert_allclose(ours.timescales, pyemma_bridge.tica_timescales(series, lag=5, count=2), rtol=1e-5)
    theirs = pyemma_bridge.tica_timescales(series, lag=5, count=2, koopman=False)
    np.testing.assert_allclose(plain.timescales, theirs, rtol=1e-5)
    assert np.abs(ours.timescales - theirs).max() > 1e-3 * theirs.max(), "negative control"


def test_weights_that_features_cannot_express_are_refused_and_said():
    """Two trajectories that never meet: no equilibrium between them."""
    generator = np.random.default_rng(5)
    apart = [generator.normal(size=(400, 2)) + shift * np.arange(400)[:, None] / 40 for shift in (-1, 1)]
    found = fit_tica(apart, lag=5)
    assert found.reweighting == "none"
    assert found.note.startswith("not reweighted")
    plain = fit_tica(apart, lag=5, koopman=False)
    np.testing.assert_array_equal(found.axes, plain.axes)


def test_the_kinetic_map_is_deeptimes():
    generator = np.random.default_rng(3)
    series = [np.stack([ou(generator, times=3000, relaxation=tau) for tau in (40.0, 10.0, 2.0)], axis=1)]
    model = fit_tica(series, lag=5, koopman=False)
    theirs = TICA(lagtime=5, dim=2, scaling="kinetic_map").fit_from_timeseries(series).fetch_model().transform(series[0])
    ours = model.kinetic_map(series[0], components=2)
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), rtol=1e-6, atol=1e-9)
