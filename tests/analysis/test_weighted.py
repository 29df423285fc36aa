import math
import subprocess
import sys

import numpy as np
import pytest
from test_autocorrelation import ar1

from longstride.analysis.free_energy import bin_index, delta_f_chains, from_chains, grid_index
from longstride.analysis.weighted import (
    kish_size,
    mbar_free_energies,
    normalised_weights,
    weighted_delta_f,
    weighted_free_energy,
    weighted_mean,
)
from longstride.errors import LongstrideError, NumericsError


def test_kish_size_of_known_weights():
    weights = np.array([1.0, 1.0, 2.0, 4.0])
    found = kish_size(np.log(weights) + 700.0)  # any constant
    assert found.size == pytest.approx(64 / 22)
    assert found.fraction == pytest.approx(16 / 22)
    assert found.largest_share == pytest.approx(0.5)
    assert kish_size(np.zeros((50, 4))).size == pytest.approx(200.0)
    sigma = 1.2  # log-normal weights: <w>^2 / <w^2> = exp(-sigma^2)
    drawn = kish_size(np.random.default_rng(0).normal(scale=sigma, size=400_000))
    assert drawn.fraction == pytest.approx(math.exp(-(sigma**2)), rel=0.05)
    assert drawn.clipped_fraction > 1.1 * drawn.fraction, "clipping flatters"
    assert drawn.dropped == 800


def test_one_giant_weight_is_labelled_everywhere():
    generator = np.random.default_rng(1)
    log_weights = generator.normal(scale=0.3, size=(500, 4))
    log_weights[17, 2] = 20.0
    indicator = generator.random((500, 4)) < 0.3
    found = kish_size(log_weights)
    assert found.size == pytest.approx(1.0, abs=1e-3)
    assert found.clipped > 1500
    assert "one sample of 2000 carries 100 %" in found.note
    for estimate in (weighted_delta_f(indicator, log_weights), weighted_mean(indicator * 1.0, log_weights)):
        assert (estimate.low, estimate.high) == (None, None)
        assert "carries 100 %" in estimate.note
    grid = weighted_free_energy(indicator.astype(int), log_weights, bins=2, replicates=50, seed=0)
    assert "carries 100 %" in grid.note


@pytest.mark.parametrize(
    ("log_weights", "word"),
    [
        (np.zeros((0, 4)), "no samples"),
        (np.full((20, 4), -np.inf), "all weights are zero"),
        (np.where(np.arange(80).reshape(20, 4) == 3, np.nan, 0.0), "1 of 80 log-weights are NaN"),
        (np.where(np.arange(80).reshape(20, 4) == 3, np.inf, 0.0), "1 of 80 log-weights are NaN or infinite"),
    ],
)
def test_unusable_weights_say_why(log_weights, word):
    indicator = np.ones(log_weights.shape, dtype=bool)
    assert word in kish_size(log_weights).note
    assert kish_size(log_weights).size is None
    assert word in weighted_delta_f(indicator, log_weights).note
    grid = weighted_free_energy(indicator.astype(int), log_weights, bins=2, replicates=20, seed=0)
    assert np.isnan(grid.values).all()
    assert word in grid.note
    with pytest.raises(NumericsError, match="no weights"):
        normalised_weights(log_weights)
    with pytest.raises(LongstrideError, match="clip"):
        kish_size(np.zeros(3), clip=1.0)


def test_equal_weights_change_nothing():
    generator = np.random.default_rng(2)
    index = bin_index(generator.vonmises(0.0, 1.5, size=(200, 40)), 24)
    ours = weighted_free_energy(index, np.full(index.shape, 3.3), bins=24, replicates=60, seed=5)
    plain = from_chains(index, bins=24, replicates=60, seed=5)
    np.testing.assert_allclose(ours.values, plain.values, atol=1e-12)
    np.testing.assert_allclose(ours.errors, plain.errors, rtol=1e-9)
    indicator = ar1(generator, times=500, chains=8, phi=0.8) > 1
    weighted, chains = weighted_delta_f(indicator, np.zeros(indicator.shape)), delta_f_chains(indicator)
    assert weighted.value == pytest.approx(chains.value)
    assert weighted.high - weighted.low == pytest.approx(chains.high - chains.low, rel=0.35)


def biased(generator, *, times, chains, moved=0.8):
    """A correlated normal series about `moved` with the weights that bring it back to the standard normal."""
    x = moved + ar1(generator, times=times, chains=chains, phi=0.7)
    return x, 0.5 * (x - moved) ** 2 - 0.5 * x**2


def test_reweighting_recovers_the_target():
    x, log_weights = biased(np.random.default_rng(3), times=2000, chains=20)
    mean = weighted_mean(x, log_weights)
    assert mean.low < 0 < mean.high
    found = weighted_delta_f(x >= 0, log_weights)
    assert found.low < 0 < found.high  # half of a standard normal on either side
    unweighted = delta_f_chains(x >= 0)
    assert unweighted.high < -0.8, "negative control: without weights"
    edges = np.linspace(-2, 2, 9)
    inside = np.clip(np.searchsorted(edges, x) - 1, 0, 7)
    grid = weighted_free_energy(inside, np.where(np.abs(x) < 2, log_weights, -np.inf), bins=8, replicates=200, seed=0)
    from scipy import stats

    truth = -np.log(np.diff(stats.norm.cdf(edges)))
    difference = grid.values - grid.values.mean() - (truth - truth.mean())
    assert np.abs(difference / grid.errors).max() < 5
    pair = weighted_free_energy(grid_index(x, x, 12), log_weights, bins=144, replicates=20, seed=0)
    assert np.isfinite(pair.values).sum() <= 12, "a map of (x, x) lies on its diagonal"


def test_weighted_intervals_cover_the_truth():
    repeats, generator = 200, np.random.default_rng(4)
    mean_inside = delta_inside = 0
    for _ in range(repeats):
        x, log_weights = biased(generator, times=300, chains=8)
        mean, delta = weighted_mean(x, log_weights), weighted_delta_f(x >= 0, log_weights)
        mean_inside += mean.low <= 0 <= mean.high
        delta_inside += delta.low <= 0 <= delta.high
    assert 0.90 <= mean_inside / repeats <= 0.98
    assert 0.90 <= delta_inside / repeats <= 0.98


def harmonic_set(generator, *, count=400):
    """Reduced energies of samples from harmonic wells: F_k = ln(K_k / K_0) / 2 exactly."""
    stiffness, centres = np.array([1.0, 2.0, 4.0, 8.0]), np.array([0.0, 0.6, 1.0, 1.2])
    x = (centres[:, None] + generator.normal(size=(4, count)) / np.sqrt(stiffness)[:, None]).ravel()
    return 0.5 * stiffness[:, None] * (x - centres[:, None]) ** 2, np.full(4, count), 0.5 * np.log(stiffness / stiffness[0]), x


def test_mbar_on_harmonic_wells():
    u, n, truth, x = harmonic_set(np.random.default_rng(5))
    found = mbar_free_energies(u, n)
    assert found.values[0] == found.errors[0] == 0
    assert (np.abs(found.values - truth)[1:] < 4 * found.errors[1:]).all()
    assert (found.errors[1:] < 0.1).all()
    weights = np.exp(found.log_weights)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-6)
    assert weights[3] @ x == pytest.approx(1.2, abs=0.05)
    # negative control: the wrong number of samples credited to the states
    wrong = mbar_free_energies(u, np.array([1300, 100, 100, 100]))
    assert np.abs(wrong.values - truth).max() > 10 * found.errors.max()
    assert mbar_free_energies(u, n, inefficiency=4.0).errors[1] == pytest.approx(2 * found.errors[1])


def test_mbar_errors_are_those_of_repeats():
    generator = np.random.default_rng(6)
    repeats = [harmonic_set(generator, count=150) for _ in range(40)]
    found = [mbar_free_energies(u, n) for u, n, _, _ in repeats]
    z = np.array([(one.values[3] - repeats[0][2][3]) / one.errors[3] for one in found])
    assert abs(z.mean()) < 5 / math.sqrt(40)
    assert 0.7 < z.std() < 1.35


def test_mbar_leaves_jax_alone():
    u, n, _, _ = harmonic_set(np.random.default_rng(7), count=50)
    mbar_free_energies(u, n)
    assert sys.modules.get("jax", "absent") is not None, "the block on the import of JAX must be lifted"
    jax = pytest.importorskip("jax", reason="JAX comes with the FeNNol teacher")
    assert not jax.config.jax_enable_x64


@pytest.mark.slow
def test_mbar_leaves_jax_alone_even_where_pymbar_has_it():
    pytest.importorskip("jax", reason="JAX comes with the FeNNol teacher")
    code = """
import numpy as np, jax, pymbar
from longstride.analysis.weighted import mbar_free_energies
assert pymbar.mbar_solvers.use_jit, "the case does not arise"
x = np.random.default_rng(0).normal(size=200)
u = np.stack([x**2 / 2, (x - 0.5)**2 / 2])
found = mbar_free_energies(u, np.array([200, 0]))
assert abs(found.values[1]) < 5 * found.errors[1], found.values
assert not jax.config.jax_enable_x64
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_mbar_says_what_is_wrong():
    u, n, _, _ = harmonic_set(np.random.default_rng(8), count=50)
    with pytest.raises(LongstrideError, match="as many samples"):
        mbar_free_energies(u, n[:2])
    u[1, 3] = np.nan
    with pytest.raises(NumericsError, match="NaN"):
        mbar_free_energies(u, n)
    apart = np.array([[0.0] * 20 + [80.0] * 20, [80.0] * 20 + [0.0] * 20])
    assert "overlap" in mbar_free_energies(apart, np.array([20, 20])).note
