import csv
import json
import math
import shutil

import numpy as np
import pytest

from longstride.analysis.leaderboard import COLUMNS, leaderboard, rows_of_comparison, seed_interval
from longstride.analysis.paper_rows import COLUMNS as PAPER_COLUMNS
from longstride.analysis.paper_rows import paper_rows
from longstride.cli import main
from longstride.errors import DataError


@pytest.fixture(scope="module")
def content(compared):
    return json.loads((compared / "comparison.json").read_text())


@pytest.fixture
def runs(compared, tmp_path):
    """Two run folders with the same comparison."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        shutil.copytree(compared, folder / "compare" / "fake")
    return folders


def row_of(rows, method, **wanted):
    return next(row for row in rows if row["method"] == method and all(row[key] == value for key, value in wanted.items()))


def test_every_method_of_every_run_has_a_row(runs, content):
    rows = leaderboard(runs)
    methods = {one["method"] for one in content["methods"]}
    assert len(rows) == 2 * len(methods)
    for row in rows:
        assert set(row) <= set(COLUMNS)
        assert row["verdict"]
        assert row["reason"]
    flow = row_of(rows, "timewarp", run="first")
    rates = [one["ess_per_s"]["value"] for one in content["methods"] if one["method"] == "timewarp" and "ess_per_s" in one]
    assert flow["ess_median_per_s"] == pytest.approx(np.median(rates))
    assert (flow["seeds"], flow["seeds_planned"]) == (2, 3), "the absent seed is counted"
    assert "failed 1" in flow["verdict"]
    assert "3 of 5 seeds" in flow["reason"]
    assert flow["acceptance"] == pytest.approx(0.5)
    assert flow["interval_from"] == "seeds pooled"
    assert flow["ess_ci_low_per_s"] < flow["ess_median_per_s"] < flow["ess_ci_high_per_s"]


def test_ranks_are_within_one_target(runs):
    rows = leaderboard(runs)
    by_target = {}
    for row in rows:
        by_target.setdefault(row["target"], []).append(row)
    assert len(by_target) == 2
    for members in by_target.values():
        ranked = [row for row in members if row["rank"]]
        assert [row["rank"] for row in ranked] == list(range(1, len(ranked) + 1))
        values = [row["ess_median_per_s"] for row in ranked]
        assert values == sorted(values, reverse=True)
    assert {row["versus"] for row in by_target["gfn2-xtb"]} <= {"sts", "sts at its slowest timescale", None}


def test_seed_intervals_come_from_the_seeds_where_there_are_three():
    low, high, origin = seed_interval([1.0, 2.0, 4.0], None)
    assert origin == "3 seeds"
    assert math.sqrt(low * high) == pytest.approx(2.0)
    pooled = {"ess_per_s": {"low": 1.0, "high": 3.0}}
    assert seed_interval([2.0], pooled) == (1.0, 3.0, "seeds pooled")
    assert seed_interval([], None) == (None, None, "no interval")
    inside, generator = 0, np.random.default_rng(0)
    for _ in range(200):
        low, high, _ = seed_interval(list(np.exp(generator.normal(1.0, 0.3, size=5))), None)
        inside += low <= math.e <= high
    assert 0.90 <= inside / 200 <= 0.98


def test_training_is_paid_back_in_peptides(content, tmp_path):
    from longstride.data.manifest import write_manifest

    for stage, key, seconds in (("reference", "wall_s", 40.0), ("flow", "train_wall_s", 60.0)):
        folder = tmp_path / stage / "fake"
        folder.mkdir(parents=True)
        (folder / "x").write_text("x")
        write_manifest(folder, kind=stage, files=["x"], content={key: seconds})
    row = row_of(rows_of_comparison(content, run=tmp_path), "timewarp")
    speed = next(one for one in content["speedups"] if (one["method"], one["versus"]) == ("timewarp", "tuned-md"))
    pooled = {one["method"]: one["ess_per_s"]["value"] for one in content["pooled"]}
    assert row["speed_up"] == pytest.approx(speed["measured"]["value"] or speed["against_msm"]["value"])
    if speed["measured"]["value"]:
        plain = pooled["tuned-md"]
        assert row["break_even_peptides_at_1000_ess"] == pytest.approx(100 / (1000 / plain - 1000 / pooled["timewarp"]))
    pool = next(one for one in content["pooled"] if one["method"] == "timewarp")
    alone, shared = (row[f"ess_amortised_over_{n}_per_s"] for n in ("1_peptide", "100_peptides"))
    assert alone == pytest.approx(pool["ess"]["value"] / (pool["sampling_s"] + 100))
    assert shared == pytest.approx(pool["ess"]["value"] / (pool["sampling_s"] + 1))
    untrained = row_of(rows_of_comparison(content, run=tmp_path / "elsewhere"), "timewarp")
    assert untrained.get("break_even_peptides_at_1000_ess") is None, "unknown cost is not zero cost"


def test_the_command_writes_the_table(runs, tmp_path):
    out = tmp_path / "leaderboard.csv"
    assert main(["leaderboard", *map(str, runs), "--out", str(out)]) == 0
    with out.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert tuple(rows[0]) == COLUMNS
    assert {row["run"] for row in rows} == {"first", "second"}
    assert all(row["commit"] for row in rows)


def test_a_folder_without_comparisons_is_one_clear_line(tmp_path):
    with pytest.raises(DataError, match="give a run folder"):
        leaderboard([tmp_path])
    (tmp_path / "compare/x").mkdir(parents=True)
    (tmp_path / "compare/x/comparison.json").write_text("{")
    with pytest.raises(DataError, match="run the compare stage"):
        leaderboard([tmp_path])


def test_paper_rows_hold_what_is_known_and_nothing_else(content):
    rows = paper_rows(content)
    assert [row["seed"] for row in rows] == [one["seed"] for one in content["methods"]]
    assert all(set(row) <= set(PAPER_COLUMNS) for row in rows)
    flow = row_of(rows, "timewarp", seed=0)
    cell = next(one for one in content["methods"] if (one["method"], one["seed"]) == ("timewarp", 0))
    assert flow["timewarp_acceptance_percent"] == pytest.approx(50.0)
    seconds = cell["timing"]["sampling_s"]
    assert flow["timewarp_ess_per_s_tic0"] == pytest.approx(cell["panel"]["TIC0"]["timewarp_ess"] / seconds)
    plain = [one for one in content["methods"] if one["method"] == "md"]
    sizes = sum(one["panel"]["TIC0"]["timewarp_ess"] for one in plain) / sum(one["timing"]["sampling_s"] for one in plain)
    assert flow["timewarp_speed_up_tic0"] == pytest.approx(flow["timewarp_ess_per_s_tic0"] / sizes)
    assert row_of(rows, "md")["timewarp_speed_up_tic0"] is None
    assert flow["prose_ess_kish_clipped"] is None, "a chain has no importance weights"
    absent = row_of(rows, "timewarp", seed=7)
    assert absent["status"].startswith("absent")
    assert absent.get("prose_energy_evaluations") is None


def test_paper_rows_take_distances_under_their_own_names(content):
    filled = json.loads(json.dumps(content))
    cell = next(one for one in filled["methods"] if (one["method"], one["seed"]) == ("timewarp", 0))
    cell["distances"] = {"e_w2": {"value": 0.37}, "tica_w2": 0.5}
    cell["coverage"] = {"timewarp_explored": False}
    row = row_of(paper_rows(filled), "timewarp", seed=0)
    assert (row["prose_e_w2"], row["prose_tica_w2"], row["prose_t_w2"]) == (0.37, 0.5, None)
    assert row["timewarp_speed_up_tic0"] == 0.0, "published as zero where a state was missed"
