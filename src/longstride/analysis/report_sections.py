"""Parts of the report that are optional: verdicts by target, speed-up bars, cost, Markov model, distances, structures.

Every function takes what a comparison holds and returns nothing to show where a part is absent.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from scipy import stats

from longstride.analysis import leaderboard, map_figures, verdict
from longstride.analysis.cell_verdict import WORDS

if TYPE_CHECKING:
    from pathlib import Path

NO_TARGET = "no samples, so no target"
WORD_MARKS = {
    "better": "exact", "equal within noise": "unadjusted", "worse": "biased", "not converged": "absent", "failed": "failed",
    "not judged": "absent",
}  # fmt: skip
MAX_BARS = 48
NOISE_KEYS = ("noise_floor", "noise", "floor", "expected")


def verdict_groups(contents: list[dict[str, Any]], run: Path) -> list[dict[str, Any]]:
    """Return one table per target potential, a row per system and method, its seeds together; failed cells included.

    Returns:
        {"target", "rows": [{"system", "method", "label", "words": [(word, count, mark)], "reason", "values": [...]}]}.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for content in contents:
        for row in leaderboard.rows_of_comparison(content, run=run):
            cells = [one for one in content["methods"] if one["method"] == row["method"]]
            cells = [one for one in cells if str(one.get("target") or row["target"]) == row["target"]]
            full = {**row, "words": _words(cells), "reasons": _reasons(cells)}
            groups.setdefault(row["target"] or NO_TARGET, []).append(full)
    order = sorted(groups, key=lambda target: (target == NO_TARGET, target))
    return [{"target": target, "rows": groups[target]} for target in order]


def _word(cell: dict[str, Any]) -> str:
    if cell.get("verdict"):
        return str(cell["verdict"]["word"])
    return "failed" if "ess" not in cell else "not judged"


def _words(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = [_word(cell) for cell in cells]
    order = [*WORDS, "not judged"]
    return [
        {"word": word, "count": found.count(word), "mark": WORD_MARKS.get(word, "absent")}
        for word in sorted(set(found), key=lambda one: order.index(one) if one in order else len(order))
    ]


def _reasons(cells: list[dict[str, Any]]) -> list[str]:
    found = []
    for cell in cells:
        reason = cell["verdict"]["reason"] if cell.get("verdict") else cell["status"]
        found.append(f"seed {cell['seed']}: {reason}")
    return found


def speedup_bars(contents: list[dict[str, Any]]) -> dict[str, list[map_figures.Ratio]]:
    """Return the bars of the speed-up figure by target; methods without samples are there without a value.

    The ratio is the measured one, or that to the rate that the slowest timescale allows plain dynamics where the measured one
    is undefined (marked *). With more than 48 bars the systems are merged: geometric mean and Student interval of ln(ratio).
    """
    groups: dict[str, list[map_figures.Ratio]] = {}
    for content in contents:
        for entry in content["speedups"]:
            groups.setdefault(entry["target"], []).append(_bar(content["system"], entry))
        for row in leaderboard.rows_of_comparison(content, run=_nowhere()):
            if not row["seeds"]:
                groups.setdefault(row["target"] or NO_TARGET, []).append(_lost(content["system"], row["method"], row["reason"]))
    return {target: bars if len(bars) <= MAX_BARS else merged_bars(bars) for target, bars in sorted(groups.items())}


def _lost(system: str, method: str, note: str, label: str = "") -> map_figures.Ratio:
    return map_figures.Ratio(system=system, method=method, label=label or method, value=None, low=None, high=None, note=note)


def _nowhere() -> Path:
    from pathlib import Path

    return Path()


def _bar(system: str, entry: dict[str, Any]) -> map_figures.Ratio:
    measured = entry["measured"]["value"] is not None
    one = entry["measured" if measured else "against_msm"]
    mark = "" if measured or one["value"] is None else " *"
    note = entry["measured"]["note"] if one["value"] is None else ""
    return map_figures.Ratio(
        system=system, method=entry["method"], label=f"{entry['method']} / {entry['versus']}{mark}", value=one["value"],
        low=one["low"], high=one["high"], note=note or one["note"],
    )  # fmt: skip


def merged_bars(bars: list[map_figures.Ratio]) -> list[map_figures.Ratio]:
    """Return one bar per label over all systems: geometric mean, 95 % Student interval of ln(ratio) from three on."""
    found = []
    for label in sorted({bar.label for bar in bars}):
        own = [bar for bar in bars if bar.label == label]
        values = [bar.value for bar in own if bar.value is not None and bar.value > 0]
        system = f"geometric mean over {len(values)} of {len({bar.system for bar in own})} systems"
        if not values:
            found.append(_lost(system, own[0].method, own[0].note, label))
            continue
        logs = np.log(values)
        half = math.inf
        if len(logs) >= 3:
            half = float(stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs)))
        ends = (math.exp(logs.mean() - half), math.exp(logs.mean() + half)) if math.isfinite(half) else (None, None)
        found.append(map_figures.Ratio(
            system=system, method=own[0].method, label=label, value=math.exp(logs.mean()), low=ends[0], high=ends[1], note=""
        ))  # fmt: skip
    return sorted(found, key=lambda bar: bar.system)


def certificate(content: dict[str, Any]) -> dict[str, Any] | None:
    """Return the certificate of the reference with its checks, or None where it was not made."""
    return content["reference"].get("certification")


def markov_tables(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return tables on the Markov model of the reference: macrostates, passage times, timescales; empty where absent."""
    msm = content["reference"]["msm"]
    found = []
    states = msm.get("macrostates")
    if states:
        rows = [[
            f"{one['index']}", _percent(one), _plain(one.get("phi_deg"), 3), _plain(one.get("psi_deg"), 3),
            _plain(one.get("entries"), 3),
        ] for one in states]  # fmt: skip
        head = ["macrostate", "population (%)", "mean φ (°)", "mean ψ (°)", "times entered"]
        found.append({"title": "Macrostates (PCCA+)", "note": msm.get("macrostates_note") or "", "head": head, "rows": rows})
    passage = msm.get("mfpt_ps")
    if passage:
        rows = [[f"from {k}", *(verdict.with_interval(one) if one["value"] is not None else "–" for one in row)]
                for k, row in enumerate(passage)]  # fmt: skip
        head = ["macrostate", *(f"to {k}" for k in range(len(passage)))]
        found.append({"title": "Mean first passage times (ps)", "note": "", "head": head, "rows": rows})
    bayes = [one for one in msm.get("timescales_bayesian") or [] if any(value is not None for value in one["deeptime_ps"])]
    if bayes:
        count = len(bayes[0]["deeptime_ps"])
        rows = [[verdict.number(one["lag_ps"]), *(_between(one, k) for k in range(count))] for one in bayes]
        head = ["lag (ps)", *(f"timescale {k + 1} (ps)" for k in range(count))]
        found.append({"title": "Implied timescales with Bayesian 95 % intervals", "note": "", "head": head, "rows": rows})
    return found


def _plain(value: float | None, digits: int) -> str:
    return verdict.number(value, digits)


def _percent(one: dict[str, Any]) -> str:
    value = verdict.number(100 * one["population"], 3)
    if one.get("low") is None or one.get("high") is None:
        return value
    return f"{value} ({verdict.number(100 * one['low'], 3)} to {verdict.number(100 * one['high'], 3)})"


def _between(one: dict[str, Any], k: int) -> str:
    parts = [one[key][k] for key in ("deeptime_ps", "low_ps", "high_ps")]
    if parts[0] is None:
        return "–"
    return verdict.with_interval({"value": parts[0], "low": parts[1], "high": parts[2], "note": ""})


def metric_table(content: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the metrics under `key` of every cell: one row per metric, one column per cell; rows empty where none has any.

    A metric is a number, or a mapping with `value` and perhaps an interval, a noise floor and a note.
    """
    entries = [entry for entry in [content["reference"], *content["methods"]] if entry.get(key)]
    flat = [_flatten(entry[key]) for entry in entries]
    names = list(dict.fromkeys(name for one in flat for name in one))
    rows = [{"name": name, "cells": [one.get(name, {"text": "–", "small": ""}) for one in flat]} for name in names]
    head = [entry["method"] if entry["seed"] is None else f"{entry['method']}, seed {entry['seed']}" for entry in entries]
    return {"head": head, "rows": rows}


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for name, value in values.items():
        label = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, dict) and "value" in value:
            found[label] = _metric(value)
        elif isinstance(value, dict):
            found |= _flatten(value, f"{label}: ")
        elif isinstance(value, bool):
            found[label] = {"text": "yes" if value else "no", "small": ""}
        elif isinstance(value, int | float):
            found[label] = {"text": verdict.number(value), "small": ""}
        elif isinstance(value, str) and value:
            found[label] = {"text": value, "small": ""}
    return found


def _metric(values: dict[str, Any]) -> dict[str, str]:
    if values["value"] is None:
        return {"text": "–", "small": str(values.get("note") or "")}
    if not isinstance(values["value"], int | float):
        return {"text": str(values["value"]), "small": str(values.get("note") or "")}
    small = []
    if values.get("low") is not None and values.get("high") is not None:
        small.append(f"{verdict.number(values['low'])} to {verdict.number(values['high'])}")
    for key in NOISE_KEYS:
        if isinstance(values.get(key), int | float):
            small.append(f"noise floor {verdict.number(values[key], 2)}")
            break
    if values.get("note"):
        small.append(str(values["note"]))
    return {"text": verdict.number(values["value"]), "small": "; ".join(small)}


def accuracy_table(content: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds and calls after which F(phi) stays within each tolerance, one row per cell that has samples."""
    entries = [entry for entry in content["methods"] if entry.get("accuracy")]
    tolerances = list(dict.fromkeys(key for entry in entries for key in entry["accuracy"]["reached"]))
    rows = []
    for entry in entries:
        curve = entry["accuracy"]
        cells = [_reached(curve["reached"].get(key)) for key in tolerances]
        last = curve["points"][-1]["rmse_kT"] if curve["points"] else None
        end = {"text": verdict.number(last, 2), "small": curve["note"]}
        rows.append({"name": f"{entry['method']}, seed {entry['seed']}", "cells": [*cells, end] if curve["points"] else [
            *({"text": "–", "small": ""} for _ in tolerances), end]})  # fmt: skip
    head = [f"within {key} kT" for key in tolerances]
    return {"head": [*head, "RMSE at the end (kT)"], "rows": rows}


def _reached(cost: dict[str, float | None] | None) -> dict[str, str]:
    if cost is None:
        return {"text": "not reached", "small": ""}
    seconds, calls = cost["sampling_wall_s"], cost["target_calls"]
    return {
        "text": "–" if seconds is None else f"{verdict.number(seconds)} s",
        "small": "" if calls is None else f"{verdict.number(calls)} calls",
    }


def chapman_kolmogorov(content: dict[str, Any]) -> str:
    """Return what the Chapman-Kolmogorov test says, or an empty string."""
    return str((content["reference"]["msm"].get("chapman_kolmogorov_test") or {}).get("statement") or "")


def viewer_data(content: dict[str, Any]) -> Markup | None:
    """Return the representative structures as JSON that can stand inside a <script> element, or None where there are none."""
    structures = content.get("structures")
    if not structures or not structures["states"]:
        return None
    # "<" would let a name end the element
    return Markup(json.dumps(structures, separators=(",", ":")).replace("<", "\\u003c"))


def cost_rows(groups: list[dict[str, Any]], run: Path) -> list[list[dict[str, str]]]:
    """Return the cells of the cost table, one row per target, system and method of `verdict_groups`."""
    found = []
    for group in groups:
        for row in group["rows"]:
            seconds = preparation(row, run)
            numbers = [
                row["ess_median_per_s"], row["ess_per_core_hour"], row["ess_per_energy_call"], row["ess_per_force_call"],
                seconds, row.get("ess_amortised_over_1_peptide_per_s"), row.get("ess_amortised_over_100_peptides_per_s"),
                row.get("break_even_peptides_at_1000_ess"),
            ]  # fmt: skip
            names = [group["target"], row["system"], row["method"]]
            cells = [{"text": name, "key": name, "numeric": ""} for name in names]
            cells += [
                {"text": verdict.number(value), "key": "" if value is None else f"{value!r}", "numeric": "yes"}
                for value in numbers
            ]
            found.append(cells)
    return found


def preparation(row: dict[str, Any], run: Path) -> float | None:
    """Return the seconds of training and reference data of a method, 0 for dynamics that needs none, None where unknown."""
    from longstride.analysis.report_page import preparation_seconds

    if row["method"] in ("timewarp", "explore", "mts"):
        return preparation_seconds(run, row["system"], row["method"])
    return 0.0
