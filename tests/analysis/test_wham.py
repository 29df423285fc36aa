"""Umbrella samples drawn from a known density: WHAM must give it back, and must not when the bias is mistold."""

import numpy as np
import pytest

from longstride.analysis.umbrella import analyse_umbrella, grid_bias
from longstride.analysis.wham import overlap_matrix, unbiased
from longstride.errors import DataError

BINS = 720
EDGES = np.linspace(-np.pi, np.pi, BINS + 1)
MIDDLE = (EDGES[1:] + EDGES[:-1]) / 2
F_KT = 3 * np.cos(2 * MIDDLE) + 2 * np.sin(MIDDLE) + 1.5 * np.cos(MIDDLE)
CENTERS = -np.pi + (np.arange(24) + 0.5) * 2 * np.pi / 24
STIFFNESS = 30.0


def density(energy):
    p = np.exp(-(energy - energy.min()))
    return p / p.sum()


TRUTH = density(F_KT)
TRUE_DELTA_F = np.log(TRUTH[: BINS // 2].sum() / TRUTH[BINS // 2 :].sum())


def drawn_counts(count, seed=0):
    generator = np.random.default_rng(seed)
    bias = STIFFNESS * (1 - np.cos(MIDDLE[None] - CENTERS[:, None]))
    return np.stack([generator.multinomial(count, density(F_KT + u)) for u in bias]).astype(float), bias


def delta_f(p):
    return np.log(p[: BINS // 2].sum() / p[BINS // 2 :].sum())


def test_the_density_comes_back_to_the_last_digit_without_noise():
    _, bias = drawn_counts(10)
    expected = np.stack([1000 * density(F_KT + u) for u in bias])
    p, f = unbiased(expected, bias)
    assert np.allclose(p, TRUTH, rtol=1e-8)
    truth = -np.log((TRUTH * np.exp(-bias)).sum(1))
    assert np.allclose(f, truth - truth[0], atol=1e-8)


def test_the_density_comes_back_within_its_errors_and_not_with_a_mistold_bias():
    found = [delta_f(unbiased(*drawn_counts(2000, seed=seed))[0]) for seed in range(20)]
    error = np.std(found, ddof=1)
    assert abs(np.mean(found) - TRUE_DELTA_F) < 5 * error / 20**0.5
    assert error < 0.1
    counts, bias = drawn_counts(2000)
    assert abs(delta_f(unbiased(counts, 0.5 * bias)[0]) - TRUE_DELTA_F) > 10 * error  # negative control
    assert abs(delta_f(counts.sum(0)) - TRUE_DELTA_F) > 10 * error  # negative control: not unbiased at all


def test_windows_that_do_not_overlap_or_are_empty_are_refused():
    counts, bias = drawn_counts(100)
    counts[3] = 0
    with pytest.raises(DataError, match="1 umbrella windows hold no sample"):
        unbiased(counts, bias)
    apart = np.zeros((2, BINS))
    apart[0, 100], apart[1, 600] = 50, 50
    with pytest.raises(DataError, match="do not overlap"):
        unbiased(apart, np.where(apart > 0, 0.0, 5000.0))


def test_overlap_is_a_stochastic_matrix_that_falls_with_distance():
    counts, bias = drawn_counts(2000)
    p, f = unbiased(counts, bias)
    matrix = overlap_matrix(counts, bias, f)
    assert np.allclose(matrix.sum(1), 1, atol=1e-6)
    assert 0.1 < matrix[5, 6] < 0.5
    assert matrix[5, 15] < 1e-6
    assert p.sum() == pytest.approx(1)


def drawn_torsions(cycles, seed):
    """Independent samples [cycle, 12, 6, 2] of exp(-F(phi) - cos(psi) - sin(phi) cos(psi)) under both restraints."""
    generator = np.random.default_rng(seed)
    grid = np.linspace(-np.pi, np.pi, 181)[:-1] + np.pi / 180
    phi, psi = np.meshgrid(grid, grid, indexing="ij")
    free = 1.5 * np.cos(2 * phi) + np.sin(phi) + np.cos(psi) + np.sin(phi) * np.cos(psi)
    centers = [-np.pi + (np.arange(n) + 0.5) * 2 * np.pi / n for n in (12, 6)]
    found = np.empty((cycles, 12, 6, 2))
    for i, first in enumerate(centers[0]):
        for j, second in enumerate(centers[1]):
            p = density(free + 8 * (1 - np.cos(phi - first)) + 3 * (1 - np.cos(psi - second))).ravel()
            cell = generator.choice(p.size, size=cycles, p=p)
            found[:, i, j] = np.stack([phi.ravel()[cell], psi.ravel()[cell]], -1)
    p = density(free).sum(1)
    return found, centers, np.log(p[:90].sum() / p[90:].sum())


@pytest.mark.parametrize("repeats", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_two_torsions_give_the_difference_of_the_first_with_an_honest_interval(repeats):
    covered, widths = 0, []
    for seed in range(repeats):
        samples, centers, truth = drawn_torsions(100, seed)
        result = analyse_umbrella(samples, centers=centers, stiffness_kT=(8.0, 3.0), bins=60, replicates=20, seed=seed)
        covered += result.delta_f.low < truth < result.delta_f.high
        widths.append(result.delta_f.high - result.delta_f.low)
        assert abs(result.delta_f.value - truth) < 5 * result.delta_f.standard_error
    assert covered >= repeats - 2
    assert np.mean(widths) < 0.5
    assert result.smallest_overlap > 0.05
    mistold = analyse_umbrella(samples, centers=centers, stiffness_kT=(4.0, 3.0), bins=60, replicates=20, seed=0)
    assert abs(mistold.delta_f.value - truth) > 5 * mistold.delta_f.standard_error  # negative control


def test_the_grid_of_biases_has_the_second_torsion_innermost():
    bias = grid_bias([np.array([0.0, 1.0]), np.array([0.5])], (2.0, 3.0), 24)
    middle = -np.pi + (np.arange(24) + 0.5) * 2 * np.pi / 24
    expected = 2 * (1 - np.cos(middle[5] - 1.0)) + 3 * (1 - np.cos(middle[7] - 0.5))
    assert bias[1, 5 * 24 + 7] == pytest.approx(expected)
