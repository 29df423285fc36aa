"""Effective sizes and R-hat against arviz and emcee, which share no code with ours."""

import numpy as np
import pytest
from test_autocorrelation import ar1, tau_of

from longstride.analysis.autocorrelation import effective_size, integrated_time
from longstride.analysis.convergence import (
    batch_means_size,
    bulk_size,
    quantile_error,
    quantile_estimate,
    quantile_size,
    split_rhat,
    tail_size,
)

SERIES = {
    "mixed": lambda: ar1(np.random.default_rng(0), times=500, chains=4, phi=0.8),
    "odd length": lambda: ar1(np.random.default_rng(1), times=333, chains=5, phi=0.5),
    "one chain": lambda: ar1(np.random.default_rng(2), times=1000, chains=1, phi=0.9),
    "anticorrelated": lambda: ar1(np.random.default_rng(3), times=400, chains=4, phi=-0.6),
    "heavy tails": lambda: np.random.default_rng(4).standard_cauchy(size=(300, 4)),
    "shifted chain": lambda: ar1(np.random.default_rng(5), times=500, chains=4, phi=0.8) + np.array([0, 0, 0, 1.0]),
    "drift": lambda: ar1(np.random.default_rng(6), times=60, chains=4, phi=0.95) + np.linspace(0, 4, 60)[:, None],
    "ties": lambda: (ar1(np.random.default_rng(7), times=500, chains=4, phi=0.9) > 1).astype(float),
}


@pytest.mark.parametrize("name", SERIES)
def test_bulk_tail_and_rhat_equal_arviz(name):
    arviz = pytest.importorskip("arviz", reason="arviz is a development dependency")
    x = SERIES[name]()
    theirs = np.ascontiguousarray(x.T)
    assert bulk_size(x).value == pytest.approx(arviz.ess(theirs, method="bulk"), rel=1e-6)
    if name != "one chain":  # arviz wants two chains
        assert split_rhat(x).value == pytest.approx(arviz.rhat(theirs), rel=1e-9)
    if name != "ties":  # the 95 % quantile of a two-valued series is its largest value
        assert tail_size(x).value == pytest.approx(arviz.ess(theirs, method="tail"), rel=1e-6)
    for probability in (0.25, 0.5, 0.9):
        if name != "ties":
            expected = arviz.mcse(theirs, method="quantile", prob=probability)
            assert quantile_error(x, probability).value == pytest.approx(expected, rel=1e-6)


def test_integrated_time_agrees_with_emcee_and_batch_means():
    autocorr = pytest.importorskip("emcee.autocorr", reason="emcee is a development dependency")
    x = ar1(np.random.default_rng(8), times=20_000, chains=8, phi=0.9)
    ours = integrated_time(x)
    theirs = float(autocorr.integrated_time(x[:, :, None], c=5)[0])
    assert ours.low < theirs < ours.high
    assert ours.low < tau_of(0.9) < ours.high
    batches, size = batch_means_size(x), effective_size(x)
    assert batches.low < size.value < batches.high
    # negative control: blind to the order of samples, none of them would differ
    shuffled = np.random.default_rng(9).permuted(x, axis=0)
    assert batch_means_size(shuffled).low > 5 * batches.high


def test_bulk_and_tail_see_what_the_mean_does_not():
    generator = np.random.default_rng(10)
    x = ar1(generator, times=1000, chains=4, phi=0.0)
    slow = np.exp(0.7 * ar1(generator, times=1000, chains=4, phi=0.99))  # a slowly breathing width, no slow mean
    assert tail_size(x * slow).value < 0.3 * bulk_size(x * slow).value
    assert tail_size(x).value > 0.5 * bulk_size(x).value, "negative control: the width is constant"


def test_quantiles_of_a_normal_distribution():
    from scipy import stats

    x = ar1(np.random.default_rng(11), times=2000, chains=8, phi=0.7)
    for probability in (0.05, 0.5, 0.95):
        found, truth = quantile_estimate(x, probability), float(stats.norm.ppf(probability))
        assert found.low < truth < found.high
        assert abs(found.value - truth) < 5 * quantile_error(x, probability).value
    assert quantile_error(x, 0.05).value > quantile_error(x, 0.5).value


@pytest.mark.parametrize(
    "estimator", [bulk_size, tail_size, batch_means_size, lambda x: quantile_error(x, 0.5), lambda x: quantile_size(x, 0.5)]
)
@pytest.mark.parametrize(
    ("x", "word"),
    [
        (np.zeros((0, 4)), "too short"),
        (np.zeros((100, 4)), "constant"),
        (np.where(np.arange(400).reshape(100, 4) == 17, np.nan, 1.0), "not finite"),
        (np.broadcast_to(np.array([0.0, 0.0, 1.0, 1.0]), (100, 4)).copy(), "no chain moves"),
    ],
)
def test_bad_series_are_undefined_and_say_why(estimator, x, word):
    found = estimator(x)
    assert found.value is None
    assert word in found.note
