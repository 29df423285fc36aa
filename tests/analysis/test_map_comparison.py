from dataclasses import replace

import numpy as np
import pytest
from fake_run import CENTRES, EXCHANGE, POPULATIONS, WIDTH
from test_autocorrelation import ar1

from longstride.analysis.free_energy import BASINS, basin_of, bin_edges, bin_index, from_chains, from_probabilities, grid_index
from longstride.analysis.map_comparison import LEVEL, basins_of_grid, compare_maps

BINS = 36
BASIN_OF_BIN = basins_of_grid(BINS)


def torsions(generator, *, times=200, chains=64, populations=POPULATIONS, shift=0.0):
    """(phi, psi) [time, chain, 2] that jump between basins of known populations and move inside them."""
    jumps = 5 * EXCHANGE * populations[None, :]
    cumulative = (jumps + np.diag(1 - jumps.sum(axis=1))).cumsum(axis=1)
    state = np.empty((times, chains), dtype=int)
    state[0] = generator.choice(3, p=populations, size=chains)
    for t in range(1, times):
        state[t] = (generator.random(chains)[:, None] > cumulative[state[t - 1]]).sum(axis=1)
    inside = ar1(generator, times=times, chains=2 * chains, phi=0.8).reshape(times, chains, 2)
    return CENTRES[state] + WIDTH * inside + shift


def map_of(angles, *, replicates=100):
    return from_chains(grid_index(angles[..., 0], angles[..., 1], BINS), bins=BINS**2, replicates=replicates, seed=0)


def compared(generator, **changes):
    method, reference = map_of(torsions(generator, **changes)), map_of(torsions(generator))
    return compare_maps(method, reference, limit=5.0, basins=BASIN_OF_BIN)


def test_every_bin_has_the_basin_of_its_points():
    centre = (bin_edges(BINS)[17] + bin_edges(BINS)[18]) / 2
    assert BASIN_OF_BIN[grid_index(np.array(centre), np.array(0.1), BINS)] == basin_of(np.array(centre), np.array(0.1))
    assert set(BASIN_OF_BIN) == set(range(len(BASINS)))


@pytest.mark.slow
def test_equal_maps_seldom_differ():
    found = [compared(np.random.default_rng(k)) for k in range(200)]
    assert np.mean([one.verdict == "differs" for one in found]) <= 0.05
    assert np.mean([one.p_value < LEVEL for one in found]) <= 0.05
    # judged bin by bin, as if bins were independent, far too many would
    assert np.mean([one.within_two_errors < 0.9 for one in found]) > 0.15
    assert np.mean([one.rmse / one.expected for one in found]) == pytest.approx(1.0, abs=0.1)
    assert np.mean([one.rmse_basins / one.expected_basins for one in found]) == pytest.approx(1.0, abs=0.1)


def test_shifted_maps_differ_in_the_shape_of_basins():
    found = [compared(np.random.default_rng(k), shift=0.15) for k in range(5)]
    assert all(one.verdict == "differs" for one in found)
    assert all("in the shape of basins" in one.statement for one in found)
    assert all(one.rmse > 2 * one.expected for one in found)
    equal = [compared(np.random.default_rng(k)) for k in range(5)]
    assert all(one.verdict == "agrees" for one in equal)


def test_other_populations_differ_in_the_weights_of_basins_alone():
    found = [compared(np.random.default_rng(k), populations=np.array([0.33, 0.55, 0.12])) for k in range(5)]
    assert all("in the weights of basins" in one.statement for one in found)
    assert all(one.p_value < LEVEL < one.p_value_basins for one in found)
    assert np.mean([one.rmse / one.expected for one in found]) > 1.2
    assert np.mean([one.rmse_basins / one.expected_basins for one in found]) < 1.1


def test_shuffled_torsions_differ():
    generator = np.random.default_rng(4)
    phi = generator.vonmises(-1.3, 4.0, size=(300, 64))
    joint = generator.vonmises(0.4, 4.0, size=(300, 64)) + 0.8 * np.sin(phi)  # phi and psi depend on each other ...
    linked = map_of(np.stack([phi, joint], axis=-1))
    shuffled = map_of(np.stack([phi, generator.permuted(joint.ravel()).reshape(joint.shape)], axis=-1))  # ... until shuffled
    assert compare_maps(shuffled, linked, limit=5.0, basins=BASIN_OF_BIN).verdict == "differs"


def test_profiles_have_one_test():
    generator = np.random.default_rng(5)

    def profile(shift):
        return from_chains(bin_index(generator.vonmises(shift, 3.0, size=(200, 40)), 24), bins=24, replicates=100, seed=0)

    same, moved = compare_maps(profile(0.0), profile(0.0), limit=5.0), compare_maps(profile(0.1), profile(0.0), limit=5.0)
    assert (same.verdict, moved.verdict) == ("agrees", "differs")
    assert same.p_value_basins is None
    assert same.rmse_basins is None


def test_one_uncertain_crossing_is_no_evidence():
    """The weight of a basin known from two units only: a difference that a normal distribution would call significant."""
    generator = np.random.default_rng(6)
    probability = np.array([0.45, 0.25, 0.15, 0.1, 0.05])
    common = generator.normal(size=(400, 1)) * 0.02
    draws = probability + np.hstack([-common / 2, -common / 2, common / 2, common / 2, 0 * common])
    moved = probability + 0.06 * np.array([-0.5, -0.5, 0.5, 0.5, 0.0])
    exact = from_probabilities(moved, moved + 0.0 * draws, 100 * moved, units=1000)
    verdicts = [
        compare_maps(exact, from_probabilities(probability, draws, 100 * probability, units=n), limit=9.0).verdict
        for n in (2, 1000)
    ]
    assert verdicts == ["agrees", "differs"]


def test_a_map_of_chains_that_have_not_mixed_is_no_evidence():
    """Four chains, each in the basin where it started: twenty blocks of them look like twenty independent units."""
    generator = np.random.default_rng(7)
    stuck = CENTRES[np.array([1, 1, 2, 2])] + WIDTH * ar1(generator, times=50, chains=8, phi=0.8).reshape(50, 4, 2)
    grid, reference = map_of(stuck), map_of(torsions(generator))
    naive = compare_maps(grid, reference, limit=5.0, basins=BASIN_OF_BIN)
    honest = compare_maps(replace(grid, units=2), reference, limit=5.0, basins=BASIN_OF_BIN)
    assert naive.p_value < LEVEL < honest.p_value


def test_maps_without_overlap_or_errors_are_undefined():
    left = from_chains(np.zeros((50, 30), dtype=int), bins=36, replicates=20, seed=0)
    right = from_chains(np.full((50, 30), 20), bins=36, replicates=20, seed=0)
    found = compare_maps(left, right, limit=5.0)
    assert found.rmse is None
    assert found.statement.startswith("undefined")
    assert found.missing == 1
    flat = np.full(10, 0.1)
    unknown = from_probabilities(flat, np.tile(flat, (20, 1)), 10 * flat)
    found = compare_maps(unknown, unknown, limit=5.0)
    assert (found.verdict, found.rmse, found.p_value) == ("undefined", 0.0, None)
    assert "no errors are known" in found.statement
