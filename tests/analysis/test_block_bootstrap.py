import numpy as np
import pytest
from test_autocorrelation import ar1, tau_of

from longstride.analysis.bootstrap import block_bootstrap, block_length, draw_blocks


def test_block_length_grows_with_correlation_and_data():
    assert block_length(1.0, 1000, 1000) == 1
    assert block_length(tau_of(0.9), 10_000, 10_000) == pytest.approx(
        (1.5 * (2 * 0.9 / (1 - 0.81)) ** 2 * 10_000) ** (1 / 3), abs=1
    )
    assert block_length(40.0, 2000, 2000) > block_length(10.0, 2000, 2000)
    assert block_length(1000.0, 200, 200) == 50


@pytest.mark.parametrize("circular", [True, False])
def test_blocks_are_consecutive_saves_of_one_chain(circular):
    times, chains = draw_blocks(50, 30, length=7, circular=circular, generator=np.random.default_rng(0))
    steps = np.diff(times.reshape(-1, 7), axis=1) % 50
    assert (steps == 1).all()
    assert (chains.reshape(-1, 7) == chains.reshape(-1, 7)[:, :1]).all()
    assert (np.diff(times.reshape(-1, 7), axis=1) == 1).all() != circular


def test_circular_blocks_draw_every_save_alike():
    generator = np.random.default_rng(1)
    count = {}
    for circular in (True, False):
        drawn = [draw_blocks(20, 2, length=5, circular=circular, generator=generator)[0] for _ in range(2000)]
        count[circular] = np.bincount(np.concatenate(drawn), minlength=20)
    expected = count[True].sum() / 20
    assert np.abs(count[True] / expected - 1).max() < 5 / np.sqrt(expected / 5)
    assert count[False][0] < 0.5 * count[False][10], "negative control: moving blocks draw the ends less"


def test_intervals_are_as_wide_as_theory_says():
    x = ar1(np.random.default_rng(2), times=4000, chains=4, phi=0.8)
    found = block_bootstrap(x, np.mean, replicates=300, seed=0)
    theory = np.sqrt(tau_of(0.8) / x.size)
    assert found.standard_error == pytest.approx(theory, rel=0.15)
    # negative control: single saves know nothing of their correlation
    blind = block_bootstrap(np.random.default_rng(3).permuted(x, axis=0), np.mean, replicates=300, seed=0)
    assert blind.standard_error < 0.5 * theory


@pytest.mark.parametrize(
    ("x", "word"),
    [
        (np.zeros((0, 2)), "too short"),
        (np.ones((50, 2)), "constant"),
        (np.where(np.arange(80).reshape(40, 2) == 5, np.nan, 1), "NaN"),
    ],
)
def test_bad_series_say_why(x, word):
    assert word in block_bootstrap(x, np.mean, replicates=20, seed=0).note


def test_too_few_blocks_give_no_interval():
    drift = np.linspace(0.0, 1.0, 100)[:, None]
    found = block_bootstrap(drift, np.mean, replicates=50, seed=0)
    assert found.low is None
    assert "too few independent blocks" in found.note
    assert "does not fit" in block_bootstrap(drift, np.mean, replicates=50, seed=0, length=200).note
