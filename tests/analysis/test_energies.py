import numpy as np
import pytest
from fake_run import energies, maxwell
from scipy import stats

from longstride.analysis.convergence import mean_estimate
from longstride.analysis.cost import dynamics_rate, moving, per_unit, sizes, smallest_size
from longstride.analysis.energies import compare_energies, kinetic_temperature, ks_distance
from longstride.analysis.estimate import Estimate, undefined


def test_ks_distance_equals_scipy():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=500), generator.normal(0.3, 1.2, size=800)
    assert ks_distance(x, y) == pytest.approx(stats.ks_2samp(x, y).statistic, abs=1e-12)
    ties = np.round(x, 1), np.round(y, 1)
    assert ks_distance(*ties) == pytest.approx(stats.ks_2samp(*ties).statistic, abs=1e-12)


def test_weighted_ks_equals_repetition():
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=100), generator.normal(size=50)
    times = generator.integers(1, 5, size=50)
    assert ks_distance(x, y, times / times.sum()) == pytest.approx(ks_distance(x, np.repeat(y, times)), abs=1e-12)


def test_equal_temperatures_agree_and_20_K_more_is_detected():
    generator = np.random.default_rng(2)
    base = energies(generator, (400, 8))
    same = compare_energies(energies(generator, (400, 8)), base)
    assert same.ks < same.ks_noise
    assert same.statement.startswith("same distribution")
    assert same.difference.low < 0 < same.difference.high
    hot = compare_energies(energies(generator, (400, 8), temperature=330.0), base)
    assert hot.ks > hot.ks_noise
    assert hot.statement == "differs beyond the 95 % noise level"
    # 60 modes of kT/2 each: 20 K more is 60 * R * 20 / 2
    assert hot.difference.low < 60 * 8.314462618e-3 * 20 / 2 < hot.difference.high
    assert hot.difference.low > 0


def test_false_alarms_are_rare():
    generator = np.random.default_rng(3)
    pool = generator.normal(size=(200, 100, 4, 2))
    alarms = [compare_energies(one[..., 0], one[..., 1]).statement == "differs beyond the 95 % noise level" for one in pool]
    assert 0.0 <= np.mean(alarms) < 0.1


def test_energies_that_are_not_finite_are_labelled():
    x = np.random.default_rng(4).normal(size=(50, 4))
    x[3, 1] = np.nan
    result = compare_energies(x, np.zeros((50, 4)))
    assert result.ks is None
    assert "not finite" in result.statement
    assert result.mean.value is None
    assert compare_energies(x[:0], None).mean.value is None


@pytest.mark.parametrize("drift", [0.0, 0.5])
def test_temperature_with_and_without_motion_of_the_centre(drift):
    masses = np.array([12.0, 1.008, 1.008, 16.0, 14.0])
    generator = np.random.default_rng(5)
    v = maxwell(generator, (4000, 4), masses, temperature=310.0).astype(float)
    v -= np.einsum("...ax,a->...x", v, masses / masses.sum())[..., None, :]  # as an integrator that removes it would
    v += drift
    for members in (np.ones(5, dtype=bool), masses < 2, masses == 16.0):
        series = kinetic_temperature(v, masses, members)
        found = mean_estimate(series)
        assert abs(found.value - 310.0) < 5 * found.standard_error
        assert found.standard_error < 6
    # negative control: hot hydrogens are seen in their element and not in the others
    v[:, :, 1:3] *= np.sqrt(1.2)
    assert mean_estimate(kinetic_temperature(v, masses, masses < 2)).low > 330


def test_smallest_size_refuses_to_flatter():
    generator = np.random.default_rng(6)
    moving_everywhere = {"a": generator.normal(size=(200, 4)), "b": generator.normal(size=(200, 4)).cumsum(axis=0)}
    found = sizes(moving_everywhere)
    value, name = smallest_size(found, required={"a", "b"})
    assert name == "b"
    assert value.value == found["b"].size.value
    stuck = sizes(moving_everywhere | {"basin": np.zeros((200, 4))})
    assert smallest_size(stuck, required={"a", "basin"})[0].value is None
    assert "basin" in smallest_size(stuck, required={"a", "basin"})[0].note
    assert smallest_size(stuck, required={"a"})[0].value is not None
    assert smallest_size({}, required=set())[0].value is None
    assert moving(moving_everywhere | {"basin": np.zeros((200, 4))}) == {"a", "b"}


def test_cost_per_unit_and_rate_from_a_timescale():
    size = Estimate(value=100.0, low=50.0, high=200.0)
    assert per_unit(size, 4.0, "second") == Estimate(value=25.0, low=12.5, high=50.0)
    assert per_unit(size, 0, "energy call").note == "no energy call recorded"
    assert per_unit(size, None, "energy call").value is None
    rate = dynamics_rate(Estimate(value=50.0, low=25.0, high=100.0), 20.0)
    assert (rate.value, rate.low, rate.high) == (0.2, 0.1, 0.4)
    assert dynamics_rate(undefined("no MSM"), 20.0).note == "no MSM"


def test_rate_from_the_timescale_equals_the_measured_one():
    """An Ornstein-Uhlenbeck process has tau_int = 2 t2 in the limit of dense saves."""
    generator = np.random.default_rng(7)
    relaxation, spacing = 40.0, 1.0
    decay = np.exp(-spacing / relaxation)
    x = generator.normal(size=(20_000, 8))
    for t in range(1, len(x)):
        x[t] = decay * x[t - 1] + np.sqrt(1 - decay**2) * x[t]
    measured = sizes({"x": x})["x"].size.scaled(1 / (x.size * spacing))  # per ps
    predicted = dynamics_rate(Estimate(value=relaxation), 1.0)
    assert measured.low < predicted.value < measured.high
