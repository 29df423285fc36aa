import numpy as np
import pytest

from longstride.analysis.cell_verdict import WORDS, cell_verdict
from longstride.analysis.cost import (
    StatePaths,
    amortised_rate,
    break_even_peptides,
    core_hours,
    moving,
    panel,
    sizes,
    smallest_size,
)
from longstride.analysis.estimate import Estimate, undefined
from longstride.analysis.features import Torsions


def values(value, low=None, high=None, note=""):
    return {"value": value, "low": low, "high": high, "note": note}


def cell(rate=10.0, **changes):
    """A cell that agrees with its baseline."""
    entry = {
        "method": "timewarp", "seed": 0, "target": "amber", "invariance": "exact", "status": "ok",
        "baseline": "reference (MSM-reweighted)", "ess": values(500.0, 400.0, 600.0) | {"observable": "TIC0"},
        "ess_per_s": values(rate, 0.8 * rate, 1.25 * rate), "rhat_max": 1.01, "timing": {"sampling_s": 50.0},
        "delta_f": {"phi ALA2": values(2.0, 1.8, 2.2) | {"z": 0.4}},
        "map": {"p_value": 0.4, "p_value_basins": 0.6, "rmse": 0.3},
        "energy": {"ks": 0.02, "ks_noise": 0.05, "difference": values(0.1, -0.4, 0.6)},
    }  # fmt: skip
    return entry | changes


def plain(rate=1.0, *, rhat=1.01, method="tuned-md", seconds=100.0):
    ess = values(rate, 0.8 * rate, 1.25 * rate) if rate else values(None, note="no chain moves")
    return {"method": method, "target": "amber", "ess_per_s": ess, "rhat_max": rhat, "sampling_s": seconds}


def word(entry, pooled, **changes):
    found = cell_verdict(entry, pooled, mixed_rhat=1.1, **changes)
    assert found["word"] in WORDS
    assert found["reason"]
    return found["word"], found["reason"]


def test_the_three_words_of_speed():
    assert word(cell(10.0), [plain()])[0] == "better"
    assert word(cell(1.1), [plain()])[0] == "equal within noise"
    assert word(cell(0.1), [plain()])[0] == "worse"
    assert "10 (" in word(cell(10.0), [plain()])[1]


def test_the_strongest_plain_dynamics_counts():
    both = [plain(1.0, method="md"), plain(100.0)]
    assert word(cell(10.0), both)[0] == "worse"
    assert word(cell(10.0), [one | {"target": "xtb"} for one in both])[1].endswith("to compare its speed with")


@pytest.mark.parametrize(
    "change",
    [
        {"delta_f": {"phi ALA2": values(4.0, 3.8, 4.2) | {"z": 8.0}}},
        {"map": {"p_value": 0.001, "p_value_basins": 0.6, "rmse": 0.9}},
        {"map": {"p_value": 0.4, "p_value_basins": 0.001, "rmse": 0.9}},
        {"energy": {"ks": 0.2, "ks_noise": 0.05, "difference": values(0.1, -0.4, 0.6)}},
        {"energy": {"ks": 0.02, "ks_noise": 0.05, "difference": values(9.0, 8.5, 9.5)}},
    ],
)
def test_a_wrong_distribution_is_worse_whatever_its_speed(change):
    found = word(cell(1000.0, **change), [plain()])
    assert found[0] == "worse"
    assert "not the distribution" in found[1]


def test_one_of_several_tests_may_be_borderline():
    # z = 2.2 once in five tests is no news
    assert word(cell(delta_f={"phi ALA2": values(2.0, 1.8, 2.2) | {"z": 2.2}}), [plain()])[0] == "better"


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"method": "md", "seed": 3, "status": "absent: not sampled"}, "failed"),
        (cell(status="not finite: some positions or energies are NaN or infinite"), "failed"),
        (cell(ess=values(None, note="too short") | {"observable": "TIC0"}), "not converged"),
        (cell(rhat_max=1.8), "not converged"),
        (cell(ess=values(5.0, 1.0, 9.0, "unresolved: ...") | {"observable": "TIC0"}), "not converged"),
        (cell(delta_f={"phi ALA2": values(None, note="no chain crosses") | {"z": None}}), "not converged"),
    ],
)
def test_unfinished_cells_have_a_word_too(entry, expected):
    assert word(entry, [plain()])[0] == expected


def test_plain_dynamics_that_has_not_mixed_is_judged_by_its_slowest_timescale():
    stuck = [plain(5.0, rhat=3.0)]
    rates = {("amber", "tuned-md"): Estimate(value=0.1, low=0.08, high=0.12)}
    found = word(cell(10.0), stuck, msm_rates=rates)
    assert found[0] == "better"
    assert "100 (" in found[1]
    assert "slowest timescale" in found[1]
    # without a timescale: converged in less time is better, in more time nothing can be said
    assert word(cell(10.0), stuck)[0] == "better"
    assert word(cell(10.0, timing={"sampling_s": 500.0}), stuck)[0] == "not converged"


def test_biased_methods_get_no_praise_for_speed():
    assert "not compared" in word(cell(1000.0, invariance="biased"), [plain()])[1]


def test_the_baseline_itself_is_judged_against_weaker_dynamics():
    own = cell(10.0, method="tuned-md", invariance="unadjusted")
    assert word(own, [plain(10.0), plain(1.0, method="md")])[0] == "better"
    alone = cell(1.0, method="sts", baseline="is the baseline", map=None, delta_f={}, energy={})
    assert word(alone, [plain(1.0, method="sts")])[0] == "equal within noise"


def test_training_is_paid_back_after_a_number_of_peptides():
    fast, slow = Estimate(value=10.0, low=8.0, high=12.5), Estimate(value=1.0, low=0.8, high=1.25)
    found = break_even_peptides(fast, slow, preparation_s=900.0, samples=100.0)
    assert found.value == pytest.approx(900 / (100 - 10))
    assert found.low < found.value < found.high
    assert found.high == pytest.approx(900 / (80 - 12.5))
    assert "never" in break_even_peptides(slow, fast, preparation_s=900.0, samples=100.0).note
    assert "not recorded" in break_even_peptides(fast, slow, preparation_s=None, samples=100.0).note
    assert break_even_peptides(undefined("stuck"), slow, preparation_s=1.0, samples=1.0).note == "stuck"
    close = break_even_peptides(Estimate(value=1.1, low=0.9, high=1.3), slow, preparation_s=9.0, samples=10.0)
    assert close.high is None, "it may never pay back"


def test_amortised_rates():
    size = Estimate(value=1000.0, low=900.0, high=1100.0)
    alone = amortised_rate(size, sampling_s=10.0, preparation_s=990.0, peptides=1)
    shared = amortised_rate(size, sampling_s=10.0, preparation_s=990.0, peptides=99)
    assert (alone.value, shared.value) == (pytest.approx(1.0), pytest.approx(50.0))
    assert amortised_rate(size, sampling_s=None, preparation_s=1.0, peptides=1).value is None
    assert amortised_rate(size, sampling_s=1.0, preparation_s=None, peptides=1).value is None
    assert core_hours(1800.0, 4) == 2.0
    assert core_hours(1800.0, None) is None


def test_macrostates_join_the_panel_and_one_never_visited_counts():
    torsions = Torsions(names=("phi ALA2", "psi ALA2"), indices=np.zeros((2, 4), dtype=int), pair=(0, 1))
    generator = np.random.default_rng(0)
    angles, states = generator.uniform(-3, 3, size=(300, 4, 2)), generator.integers(0, 3, size=(300, 4))
    full = panel(angles, torsions, None, StatePaths(index=states, count=3))
    assert {"macrostate 0", "macrostate 1", "macrostate 2"} <= set(full)
    assert "macrostate 1" not in panel(angles, torsions, None, StatePaths(index=states % 2, count=2)), "one of two is enough"
    poor = panel(angles, torsions, None, StatePaths(index=states % 2, count=3))
    size, name = smallest_size(sizes(poor), required=moving(full))
    assert (size.value, name) == (None, "macrostate 2")
    assert smallest_size(sizes(full), required=moving(full))[0].value > 500
    assert "macrostate 0" not in panel(angles, torsions, None, None)
