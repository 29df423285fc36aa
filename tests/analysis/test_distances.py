import math

import numpy as np
import ot
import pytest
from scipy import stats

from longstride.analysis.distances import (
    check_points,
    energy_w2,
    euclidean_cost,
    resample,
    tica_w2,
    torus_cost,
    torus_w2,
    transport,
)
from longstride.errors import NumericsError


def test_energy_w2_of_two_normals():
    generator = np.random.default_rng(0)
    n = 20_000
    x, y = -100 + 3 * generator.normal(size=n), -98 + 5 * generator.normal(size=n)
    # W2^2 = (difference of means)^2 + (difference of standard deviations)^2; the errors of both follow from n
    truth = math.hypot(2.0, 2.0)
    error = math.hypot(math.sqrt((9 + 25) / n), math.sqrt((9 + 25) / (2 * n)))
    assert abs(energy_w2(x, y) - truth) < 4 * error
    assert energy_w2(x, x) == pytest.approx(0.0, abs=1e-9)
    assert energy_w2(x, x + 1.5) == pytest.approx(1.5, rel=1e-9)


def test_energy_w2_is_the_square_root_of_pot():
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=300), generator.gamma(2.0, size=200)
    assert energy_w2(x, y) == pytest.approx(math.sqrt(ot.emd2_1d(x, y)), rel=1e-9)
    assert energy_w2(x, y) > stats.wasserstein_distance(x, y), "W2 is never smaller than W1"


def test_weights_equal_repetition():
    generator = np.random.default_rng(2)
    x, y = generator.normal(size=60), generator.normal(1.0, size=40)
    times = generator.integers(1, 4, size=40)
    assert energy_w2(x, y, None, times.astype(float)) == pytest.approx(energy_w2(x, np.repeat(y, times)), rel=1e-9)
    cost = euclidean_cost(x[:, None], y[:, None])
    repeated = euclidean_cost(x[:, None], np.repeat(y, times)[:, None])
    weighted = transport(cost, None, times.astype(float)).distance
    assert weighted == pytest.approx(transport(repeated).distance, rel=1e-7)
    assert weighted == pytest.approx(energy_w2(x, y, None, times.astype(float)), rel=1e-7), "one dimension two ways"


def test_torus_w2_goes_the_short_way_round():
    x = np.array([[math.pi - 0.1, 0.0], [math.pi - 0.1, 1.0]])
    y = np.array([[-math.pi + 0.1, 0.0], [-math.pi + 0.1, 1.0]])
    assert torus_w2(x, y) == pytest.approx(0.2)
    assert tica_w2(x, y) > 6, "negative control: the Euclidean distance goes the long way"
    assert torus_cost(x, y)[0, 1] == pytest.approx(0.2**2 + 1.0)
    assert torus_cost(x + 2 * math.pi, y - 4 * math.pi) == pytest.approx(torus_cost(x, y))


def test_torus_w2_equals_pot_on_the_same_cost():
    generator = np.random.default_rng(3)
    x, y = generator.uniform(-np.pi, np.pi, (80, 3)), generator.uniform(-1, 2, (60, 3))
    d = np.abs(x[:, None] - y[None])
    cost = (np.minimum(d, 2 * np.pi - d) ** 2).sum(-1)
    expected = math.sqrt(ot.emd2(ot.unif(80), ot.unif(60), cost))
    assert torus_w2(x, y) == pytest.approx(expected, rel=1e-9)


def test_translation_is_its_length():
    generator = np.random.default_rng(4)
    x = generator.normal(size=(200, 2))
    assert tica_w2(x, x + np.array([0.3, -0.4])) == pytest.approx(0.5, rel=1e-9)


def test_dual_potentials_predict_a_change_of_weights():
    generator = np.random.default_rng(5)
    x, y = generator.normal(size=(60, 2)), generator.normal(0.7, 1.3, size=(50, 2))
    cost = euclidean_cost(x, y)
    own, other = generator.random(60), generator.random(50)  # equal weights would be degenerate: potentials are not unique
    found = transport(cost, own, other)
    base = other / other.sum()
    assert base @ found.potential_y == pytest.approx(0.0, abs=1e-9)
    changed = base.copy()
    changed[7] += 1e-6
    changed /= changed.sum()
    exact = transport(cost, own, changed).distance ** 2 - found.distance**2
    assert exact == pytest.approx(changed @ found.potential_y, rel=1e-4)


def test_resampling_is_systematic():
    generator = np.random.default_rng(6)
    assert resample(None, 10, 20, generator).tolist() == list(range(10))
    assert len(set(resample(None, 1000, 100, generator).tolist())) == 100
    weights = np.array([0.0, 0.5, 0.25, 0.25])
    counts = np.bincount(resample(weights, 4, 4000, generator), minlength=4)
    assert np.abs(counts - 4000 * weights).max() <= 2
    for bad in (np.zeros(3), np.array([1.0, np.nan]), np.array([1.0, -1.0])):
        with pytest.raises(NumericsError, match="weights must be finite"):
            resample(bad, len(bad), 2, generator)


def test_points_that_cannot_be_compared_are_named():
    assert check_points(np.zeros((1, 2))).startswith("too few samples")
    assert check_points(np.zeros((5, 0))) == "no coordinates"
    assert check_points(np.array([[0.0], [np.nan]])).startswith("not finite")
    assert check_points(np.zeros((5, 2))) == ""
