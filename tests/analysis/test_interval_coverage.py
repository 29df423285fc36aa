"""Stated 95 % intervals on 200 synthetic data sets with known answers: each must hold the truth in 90 to 98 % of them.

The bounds are three standard errors of a frequency of 0.95 over 200 (0.0154) below it and two above. Two processes: AR(1),
whose correlation is known, and jumps between two states, one of them rare, which a theory for Gaussian series gets wrong.
"""

import functools
import math

import numpy as np
import pytest
from scipy import stats
from test_autocorrelation import ar1, tau_of
from test_free_energy import two_state

from longstride.analysis.autocorrelation import effective_size, integrated_time
from longstride.analysis.bootstrap import block_bootstrap
from longstride.analysis.convergence import batch_means_size, mean_estimate, quantile_estimate
from longstride.analysis.free_energy import bin_index, delta_f_chains, from_chains
from longstride.analysis.weighted import weighted_delta_f

pytestmark = pytest.mark.slow

REPEATS = 200
LOWEST, HIGHEST = 0.90, 0.98
AR1 = [(200, 64, 0.7), (2000, 1, 0.9), (200, 32, 0.95)]
JUMPS = [(200, 64, 0.01, 0.1), (2000, 8, 0.002, 0.02), (1000, 16, 0.01, 0.03)]


@functools.cache
def ar1_sets(times, chains, phi):
    pool = ar1(np.random.default_rng(2024), times=times, chains=chains * REPEATS, phi=phi)
    return [pool[:, k * chains : (k + 1) * chains] for k in range(REPEATS)]


@functools.cache
def jump_sets(times, chains, forward, backward):
    pool = two_state(np.random.default_rng(2025), times=times, chains=chains * REPEATS, forward=forward, backward=backward)
    return [pool[:, k * chains : (k + 1) * chains] for k in range(REPEATS)]


def coverage(estimates, truth):
    assert all(one.low is not None and one.high is not None for one in estimates), "every set has an interval"
    return float(np.mean([one.low <= truth <= one.high for one in estimates]))


def inside(share):
    return LOWEST <= share <= HIGHEST


@pytest.mark.parametrize(("times", "chains", "phi"), AR1)
def test_means_medians_and_correlation_times_of_an_ar1_process(times, chains, phi):
    sets = ar1_sets(times, chains, phi)
    found = {
        "mean": coverage([mean_estimate(x) for x in sets], 0.0),
        "tau": coverage([integrated_time(x) for x in sets], tau_of(phi)),
        "ESS": coverage([effective_size(x) for x in sets], times * chains / tau_of(phi)),
        "median": coverage([quantile_estimate(x, 0.5) for x in sets], 0.0),
    }
    assert all(map(inside, found.values())), found


@pytest.mark.parametrize(("times", "chains", "phi"), AR1[:2])
def test_quantiles_in_the_tail(times, chains, phi):
    truth = float(stats.norm.ppf(0.9))
    share = coverage([quantile_estimate(x, 0.9) for x in ar1_sets(times, chains, phi)], truth)
    assert inside(share), share


@pytest.mark.parametrize("circular", [True, False])
@pytest.mark.parametrize(("times", "chains", "phi"), AR1[:2])
def test_block_bootstrap_of_a_mean_and_a_median(times, chains, phi, circular):
    sets = ar1_sets(times, chains, phi)
    options = {"replicates": 80, "circular": circular}
    found = {
        "mean": coverage([block_bootstrap(x, np.mean, seed=k, **options) for k, x in enumerate(sets)], 0.0),
        "median": coverage([block_bootstrap(x, np.median, seed=k, **options) for k, x in enumerate(sets)], 0.0),
    }
    assert all(map(inside, found.values())), found


@pytest.mark.parametrize(("times", "chains", "forward", "backward"), JUMPS)
def test_two_states(times, chains, forward, backward):
    sets = jump_sets(times, chains, forward, backward)
    decay = 1 - forward - backward
    tau, p = (1 + decay) / (1 - decay), forward / (forward + backward)
    found = {
        "tau": coverage([integrated_time(x.astype(float)) for x in sets], tau),
        "delta F": coverage([delta_f_chains(x) for x in sets], math.log(backward / forward)),
        "weighted": coverage([weighted_delta_f(x, np.zeros(x.shape)) for x in sets], math.log(backward / forward)),
        "population": coverage([mean_estimate(x.astype(float)) for x in sets], p),
    }
    assert all(map(inside, found.values())), found


def test_bins_of_a_profile():
    """One von Mises torsion with memory: all bins of all sets together, each against its exact probability."""
    bins, kappa = 12, 1.0
    edges = np.linspace(-np.pi, np.pi, bins + 1)
    truth = -np.log(np.diff(stats.vonmises.cdf(edges, kappa)))
    hits = []
    for x in ar1_sets(200, 64, 0.7):
        angle = _angles(x, kappa)
        found = from_chains(bin_index(angle, bins), bins=bins, replicates=100, seed=1)
        # F is known up to a constant: the lowest bin of the estimate sits at zero
        shift = -np.log(found.probability)
        hits.append(np.abs(shift - truth) <= 1.96 * found.errors)
    share = float(np.mean(hits))
    assert inside(share), share


@functools.cache
def _table(kappa):
    u = np.linspace(1e-6, 1 - 1e-6, 20_001)
    return u, stats.vonmises.ppf(u, kappa)


def _angles(x, kappa):
    return np.interp(stats.norm.cdf(x), *_table(kappa))


def test_batch_means_that_are_long_enough():
    sets = ar1_sets(2000, 1, 0.9)
    fast = [batch_means_size(ar1(np.random.default_rng(k), times=2000, chains=4, phi=0.3)) for k in range(REPEATS)]
    share = coverage(fast, 8000 / tau_of(0.3))
    assert inside(share), share
    # negative control: batches of 44 saves with a correlation time of 19 miss a part of it
    assert coverage([batch_means_size(x) for x in sets], 2000 / tau_of(0.9)) < LOWEST


def test_the_theory_for_gaussian_series_alone_covers_too_little():
    """Negative control: without the kurtosis the interval of tau of a rare state holds the truth too seldom."""
    sets = [x.astype(float) for x in jump_sets(*JUMPS[0])]
    truth = (2 - 0.11) / 0.11
    shares = []
    for x in sets:
        found = integrated_time(x)
        log_width = (math.log(found.high / found.low) / (2 * 1.96)) ** 2 - stats.kurtosis(x, axis=None) * found.value / x.size
        shares.append(abs(math.log(found.value / truth)) <= 1.96 * math.sqrt(log_width))
    assert np.mean(shares) < LOWEST
