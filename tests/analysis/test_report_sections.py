import copy
import json
import re

import numpy as np
import pytest

from longstride.analysis import report_sections as parts
from longstride.analysis.map_figures import Ratio
from longstride.analysis.report_page import render, with_headings


def estimate(value, low=None, high=None, note=""):
    return {"value": value, "low": low, "high": high, "note": note}


def cell(method, seed, target, word, rate):
    return {
        "method": method, "seed": seed, "target": target, "invariance": "exact", "status": "ok", "ess": estimate(10.0),
        "ess_per_s": estimate(rate), "ess_per_energy_call": estimate(0.1), "ess_per_force_call": estimate(None),
        "ess_per_core_hour": estimate(3600.0), "acceptance": 0.5, "map": None, "verdict": {"word": word, "reason": f"{word}!"},
    }  # fmt: skip


def content():
    methods = [
        cell("timewarp", 0, "amber", "better", 4.0), cell("timewarp", 1, "amber", "worse", 5.0),
        cell("mts", 0, "xtb", "equal within noise", 1.0), {"method": "md", "seed": 0, "status": "absent: <not> sampled"},
    ]  # fmt: skip
    speed = {
        "target": "amber", "method": "timewarp", "versus": "md", "is_baseline": False, "measured": estimate(None, note="no md"),
        "against_msm": estimate(8.0, 6.0, 10.0), "dynamics_ess_per_s_from_msm": estimate(0.5),
    }  # fmt: skip
    return {"system": "AA", "methods": methods, "pooled": [], "speedups": [speed], "reference": {"msm": {}, "seed": None}}


def test_methods_are_grouped_by_target_and_failures_stay(tmp_path):
    groups = {one["target"]: one["rows"] for one in parts.verdict_groups([content()], tmp_path)}
    assert set(groups) == {"amber", "xtb", parts.NO_TARGET}
    (row,) = groups["amber"]
    assert [(one["word"], one["count"]) for one in row["words"]] == [("better", 1), ("worse", 1)]
    assert row["reasons"] == ["seed 0: better!", "seed 1: worse!"]
    (lost,) = groups[parts.NO_TARGET]
    assert lost["words"][0]["word"] == "failed"
    assert lost["reasons"] == ["seed 0: absent: <not> sampled"]


def test_a_comparison_without_verdicts_is_not_judged(tmp_path):
    older = content()
    for one in older["methods"]:
        one.pop("verdict", None)
    rows = [row for group in parts.verdict_groups([older], tmp_path) for row in group["rows"]]
    assert {one["word"] for row in rows for one in row["words"]} == {"not judged", "failed"}


def test_bars_prefer_measured_ratios_and_keep_failed_methods():
    found = parts.speedup_bars([content()])
    assert [(bar.label, bar.value) for bar in found["amber"]] == [("timewarp / md *", 8.0)]
    (lost,) = found[parts.NO_TARGET]
    assert lost.value is None
    assert "absent" in lost.note
    measured = copy.deepcopy(content())
    measured["speedups"][0]["measured"] = estimate(3.0, 2.0, 4.0)
    (bar,) = parts.speedup_bars([measured])["amber"]
    assert (bar.label, bar.value, bar.low) == ("timewarp / md", 3.0, 2.0)


def test_many_bars_become_geometric_means_with_their_interval():
    values = np.exp(np.random.default_rng(1).normal(1.0, 0.5, size=60))
    bars = [
        Ratio(system=f"S{k}", method="timewarp", label="timewarp / md", value=float(value), low=None, high=None, note="")
        for k, value in enumerate(values)
    ]
    lost = Ratio(system="S60", method="timewarp", label="timewarp / md", value=None, low=None, high=None, note="never")
    (merged,) = parts.merged_bars([*bars, lost])
    logs = np.log(values)
    half = 2.0009953780882688 * logs.std(ddof=1) / np.sqrt(60)  # Student's t, 59 degrees of freedom
    assert merged.value == pytest.approx(np.exp(logs.mean()))
    assert [merged.low, merged.high] == pytest.approx([np.exp(logs.mean() - half), np.exp(logs.mean() + half)])
    assert "60 of 61 systems" in merged.system
    assert parts.merged_bars(bars[:2])[0].low is None


def test_metrics_show_value_interval_floor_and_reason():
    full = content()
    full["methods"][0]["distances"] = {
        "t_w2_rad": {"value": 0.25, "low": 0.2, "high": 0.3, "noise_floor": 0.1, "note": ""},
        "tica": {"w2": 1.5}, "lost": {"value": None, "note": "too few"}, "found": True,
    }  # fmt: skip
    table = parts.metric_table(full, "distances")
    assert table["head"] == ["timewarp, seed 0"]
    shown = {row["name"]: row["cells"][0] for row in table["rows"]}
    assert shown["t w2 rad"] == {"text": "0.25", "small": "0.2 to 0.3; noise floor 0.1"}
    assert shown["tica: w2"]["text"] == "1.5"
    assert shown["lost"] == {"text": "–", "small": "too few"}
    assert shown["found"]["text"] == "yes"
    assert parts.metric_table(full, "validity")["rows"] == []


def test_the_markov_model_is_shown_only_where_it_is():
    full = content()
    assert parts.markov_tables(full) == []
    full["reference"]["msm"] = {
        "macrostates": [
            {"index": 0, "population": 0.9, "low": 0.8, "high": 0.95, "phi_deg": -70.0, "psi_deg": 140.0, "entries": 12.0}
        ],
        "mfpt_ps": [[estimate(None), estimate(50.0, 40.0, 60.0)]],
        "timescales_bayesian": [{"lag_ps": 1.0, "deeptime_ps": [20.0], "low_ps": [15.0], "high_ps": [30.0]}],
    }  # fmt: skip
    titles = [one["title"] for one in parts.markov_tables(full)]
    assert titles == ["Macrostates (PCCA+)", "Mean first passage times (ps)", "Implied timescales with Bayesian 95 % intervals"]
    text = json.dumps(parts.markov_tables(full), ensure_ascii=False)
    for piece in ("90 (80 to 95)", "50 (40 to 60)", "20 (15 to 30)"):
        assert piece in text


def test_structures_round_trip_and_cannot_end_their_element():
    states = [{"name": "</script><b>", "population": 0.5, "positions_A": [[0.0, 1.25, -2.5]]}]
    full = content() | {"structures": {"elements": ["C"], "bonds": [], "kind": "basins", "states": states}}
    text = parts.viewer_data(full)
    assert "<" not in text
    assert json.loads(text) == full["structures"]
    assert parts.viewer_data(content()) is None
    assert parts.viewer_data(content() | {"structures": None}) is None


def test_figures_of_one_kind_stand_together_and_are_numbered_in_order():
    files = ("ramachandran.svg", "energies.svg", "tica.svg", "phi_profile.svg", "unknown.svg")
    found = with_headings([{"file": name, "number": 3 + k} for k, name in enumerate(files)])
    assert [one["number"] for one in found] == [3, 4, 5, 6, 7]
    assert [one["file"] for one in found] == ["ramachandran.svg", "phi_profile.svg", "tica.svg", "energies.svg", "unknown.svg"]
    assert [one["heading"] for one in found] == ["Free energies", "", "Slow coordinates and kinetics", "Energies", ""]


def test_scripts_and_styles_load_nothing():
    page = render(
        {"run": "<r>", "seed": 1, "written": "", "one": _bare(), "back": "x", "neighbours": [], "origin": {"commit": "c"}},
        "single.html",
    )
    assert "&lt;r&gt;" in page
    assert "<r>" not in page
    assert not re.search(r"(src|href)=\"(https?:)?//|@import|fetch\(|XMLHttpRequest|import\(", page)


def _bare():
    none = {"head": [], "rows": []}
    return {
        "name": "A", "anchor": "system-A", "content": None, "agreement": [], "figures": [], "training": [], "resonance": [],
        "panel": none, "temperatures": {**none, "notes": []}, "dynamics": None, "times": [], "viewer": None, "accuracy": none,
        "metrics": [], "certificate": None, "markov": [], "chapman_kolmogorov": "",
    }  # fmt: skip
