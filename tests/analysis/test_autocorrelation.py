import numpy as np
import pytest

from longstride.analysis.autocorrelation import (
    autocorrelation,
    autocovariance,
    effective_size,
    integrated_time,
    timewarp_effective_size,
)
from longstride.analysis.convergence import batch_means_error, mean_estimate, split_rhat, standard_error


def ar1(generator, *, times, chains, phi):
    """A stationary AR(1) process of unit variance: rho(t) = phi^t, tau = (1 + phi) / (1 - phi) exactly."""
    x = generator.normal(size=(times, chains))
    for t in range(1, times):
        x[t] = phi * x[t - 1] + np.sqrt(1 - phi**2) * x[t]
    return x


def tau_of(phi):
    return (1 + phi) / (1 - phi)


def test_autocovariance_equals_the_double_sum():
    x = np.random.default_rng(0).normal(size=(17, 3))
    centred = x - x.mean()
    direct = [np.mean(centred[: 17 - t] * centred[t:]) for t in range(17)]
    np.testing.assert_allclose(autocovariance(x), direct, atol=1e-12)


@pytest.mark.parametrize("phi", [-0.3, 0.0, 0.5, 0.9, 0.98])
def test_integrated_time_of_an_ar1_process(phi):
    x = ar1(np.random.default_rng(1), times=4000, chains=32, phi=phi)
    tau = integrated_time(x)
    error = np.log(tau.high / tau.low) / (2 * 1.96)
    assert abs(np.log(tau.value / tau_of(phi))) < 5 * error
    assert error < 0.12
    np.testing.assert_allclose(effective_size(x).value, x.size / tau.value)


def test_shuffling_in_time_is_detected():
    generator = np.random.default_rng(2)
    x = ar1(generator, times=4000, chains=8, phi=0.9)
    shuffled = generator.permuted(x, axis=0)
    assert effective_size(x).high < 0.2 * effective_size(shuffled).low
    assert abs(autocorrelation(shuffled)[1]) < 0.05


@pytest.mark.parametrize(("times", "chains", "phi"), [(200, 64, 0.7), (500, 4, 0.9), (2000, 1, 0.9), (200, 32, 0.95)])
def test_intervals_cover_the_truth(times, chains, phi):
    repeats = 200
    pool = ar1(np.random.default_rng(3), times=times, chains=chains * repeats, phi=phi).reshape(times, repeats, chains)
    tau_inside = mean_inside = 0
    for k in range(repeats):
        tau, mean = integrated_time(pool[:, k]), mean_estimate(pool[:, k])
        tau_inside += tau.low <= tau_of(phi) <= tau.high
        mean_inside += mean.low <= 0 <= mean.high
    assert 0.90 <= tau_inside / repeats <= 0.995  # Wolff's variance is on the safe side
    assert 0.90 <= mean_inside / repeats <= 0.98


def test_standard_error_agrees_with_batch_means_and_theory():
    x = ar1(np.random.default_rng(4), times=10_000, chains=4, phi=0.8)
    theory = np.sqrt(tau_of(0.8) / x.size)
    assert standard_error(x).value == pytest.approx(theory, rel=0.15)
    assert batch_means_error(x).value == pytest.approx(theory, rel=0.2)


def test_timewarp_definition_on_a_known_correlation():
    x = ar1(np.random.default_rng(5), times=20_000, chains=4, phi=0.9)
    # for a positive correlation -1 + 2 sum rho (from lag 0) is the integrated time itself
    assert timewarp_effective_size(x).value == pytest.approx(x.size / tau_of(0.9), rel=0.15)
    assert timewarp_effective_size(x).low is None


def test_chains_in_different_basins_share_no_effective_samples():
    generator = np.random.default_rng(6)
    stuck = generator.normal(scale=0.1, size=(500, 4)) + np.array([-1.0, -1.0, 1.0, 1.0])
    assert effective_size(stuck).value < 10
    assert split_rhat(stuck).value > 1.5
    mixed = ar1(generator, times=500, chains=4, phi=0.5)
    assert split_rhat(mixed).value < 1.02


def test_rhat_sees_what_the_mean_does_not():
    generator = np.random.default_rng(7)
    same_mean = generator.normal(size=(1000, 4)) * np.array([1.0, 1.0, 1.0, 4.0])
    assert split_rhat(same_mean).value > 1.1
    drifting = generator.normal(size=(1000, 4)) + np.linspace(0, 2, 1000)[:, None]
    assert split_rhat(drifting).value > 1.1


def test_rhat_formula_against_a_plain_transcription():
    from scipy import stats

    x = ar1(np.random.default_rng(8), times=200, chains=4, phi=0.8)
    halves = np.hstack([x[:100], x[100:]])

    def plain(y):
        z = stats.norm.ppf((stats.rankdata(y) - 0.375) / (y.size + 0.25)).reshape(y.shape)
        within = np.mean([np.var(z[:, k], ddof=1) for k in range(8)])
        between = 100 * np.var([z[:, k].mean() for k in range(8)], ddof=1)
        return np.sqrt((99 / 100 * within + between / 100) / within)

    expected = max(plain(halves), plain(np.abs(halves - np.median(halves))))
    assert split_rhat(x).value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("x", "word"),
    [
        (np.zeros((100, 4)), "constant"),
        (np.full((100, 4), 7.3), "constant"),
        (np.random.default_rng(0).normal(size=(5, 4)), "too short"),
        (np.where(np.arange(400).reshape(100, 4) == 17, np.nan, 1.0), "not finite"),
        (np.where(np.arange(400).reshape(100, 4) == 17, np.inf, 1.0), "not finite"),
        (np.broadcast_to(np.array([0.0, 0.0, 1.0, 1.0]), (100, 4)).copy(), "no chain moves"),
        (np.zeros(100), "expected"),
    ],
)
@pytest.mark.parametrize(
    "estimator",
    [integrated_time, effective_size, timewarp_effective_size, split_rhat, standard_error, batch_means_error, mean_estimate],
)
def test_bad_series_are_undefined_and_say_why(estimator, x, word):
    result = estimator(x)
    assert result.value is None
    assert word in result.note
