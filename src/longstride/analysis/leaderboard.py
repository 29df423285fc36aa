"""A table of methods across runs: one row per target, system, method and run; ranks only within one target and system."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from longstride.analysis.cell_verdict import STRONGEST_FIRST, WORDS, estimate_of
from longstride.analysis.cost import amortised_rate, break_even_peptides
from longstride.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

PUBLISHED_SEEDS = 5
SAMPLES_PER_PEPTIDE = 1000.0
COLUMNS = (
    "target", "system", "rank", "method", "invariance", "seeds", "seeds_planned", "verdict", "reason", "certified_reference",
    "ess_per_energy_call", "ess_per_force_call", "ess_per_core_hour", "acceptance", "rmse_free_energy_kT", "run", "commit",
    "interval_from", "ess_median_per_s", "ess_ci_low_per_s", "ess_ci_high_per_s", "speed_up", "versus",
    "ess_amortised_over_1_peptide_per_s", "ess_amortised_over_100_peptides_per_s", "break_even_peptides_at_1000_ess",
)  # fmt: skip


def leaderboard(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the rows of leaderboard.csv of several run folders.

    The rate is the median over seeds of the smallest ESS per second of the panel. Its 95 % interval is Student's t of ln(rate)
    over seeds where at least three have one, else that of all seeds pooled, else none; `interval_from` says which. Failed and
    unfinished cells count in `seeds_planned` and in the verdict. Rank: by that median among rows of the same target and system,
    over runs and machines, so name runs that share one; rows without a rate have no rank.

    Args:
        runs: run folders with compare/<system>/comparison.json.

    Raises:
        DataError: a run holds no comparison, or one of them is unreadable.
    """
    rows = [row for run in runs for row in _rows_of_run(run)]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((str(row["target"]), str(row["system"])), []).append(row)
    found = []
    for key in sorted(groups):
        members = sorted(groups[key], key=lambda row: (-(row["ess_median_per_s"] or 0.0), row["method"], row["run"]))
        for rank, row in enumerate(members, start=1):
            row["rank"] = rank if row["ess_median_per_s"] and row["target"] else None
            found.append(row)
    return found


def _rows_of_run(run: Path) -> list[dict[str, Any]]:
    files = sorted((run / "compare").glob("*/comparison.json"))
    if not files:
        raise DataError(f"{run} holds no compare/<system>/comparison.json; give a run folder whose compare stage has finished")
    rows = []
    for path in files:
        try:
            content = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise DataError(f"cannot read {path} ({error}); run the compare stage of that system again") from error
        rows += rows_of_comparison(content, run=run)
    return rows


def rows_of_comparison(content: dict[str, Any], *, run: Path) -> list[dict[str, Any]]:
    """Return the rows of one comparison.json, one per target and method, in the order of their names.

    A method without any samples has no target of its own and takes the only one there is; with several it stays empty.
    """
    targets = sorted({str(one["target"]) for one in content["methods"] if one.get("target")})
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in content["methods"]:
        known = [str(one["target"]) for one in content["methods"] if one["method"] == entry["method"] and one.get("target")]
        fallback = known[0] if known else (targets[0] if len(targets) == 1 else "")
        groups.setdefault((str(entry.get("target") or fallback), entry["method"]), []).append(entry)
    return [_row(content, target, method, cells, run=run) for (target, method), cells in sorted(groups.items())]


def _row(content: dict[str, Any], target: str, method: str, cells: list[dict[str, Any]], *, run: Path) -> dict[str, Any]:
    filled = [one for one in cells if "ess_per_s" in one]
    pooled = next((one for one in content["pooled"] if (one["target"], one["method"]) == (target, method)), None)
    rates = [one["ess_per_s"]["value"] for one in filled if one["ess_per_s"]["value"]]
    low, high, origin = seed_interval(rates, pooled)
    word, reason = _verdict(cells)
    rmse = [one["map"]["rmse"] for one in filled if one.get("map") and one["map"]["rmse"] is not None]
    return {
        "target": target, "system": content["system"], "method": method,
        "invariance": filled[0]["invariance"] if filled else None,
        "seeds": len(filled), "seeds_planned": len(cells), "verdict": word, "reason": reason,
        "certified_reference": (content["reference"].get("certification") or {}).get("word"),
        "ess_median_per_s": statistics.median(rates) if rates else None,
        "ess_ci_low_per_s": low, "ess_ci_high_per_s": high, "interval_from": origin,
        **{key: _median(filled, key) for key in ("ess_per_energy_call", "ess_per_force_call", "ess_per_core_hour")},
        "acceptance": _mean([one.get("acceptance") for one in filled]), "rmse_free_energy_kT": _mean(rmse),
        **_speed(content, target, method, pooled, run=run),
        "run": run.name, "commit": (content.get("provenance") or {}).get("commit"),
    }  # fmt: skip


def seed_interval(rates: list[float], pooled: dict[str, Any] | None) -> tuple[float | None, float | None, str]:
    """Return (low, high, origin) of the 95 % interval of a typical rate over seeds; see `leaderboard`."""
    if len(rates) >= 3:
        logs = np.log(rates)
        half = float(stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1)) / math.sqrt(len(logs))
        return math.exp(logs.mean() - half), math.exp(logs.mean() + half), f"{len(rates)} seeds"
    if pooled is not None and pooled["ess_per_s"]["low"] is not None:
        return pooled["ess_per_s"]["low"], pooled["ess_per_s"]["high"], "seeds pooled"
    return None, None, "no interval"


def _verdict(cells: list[dict[str, Any]]) -> tuple[str, str]:
    """Return the word that all seeds share, or each with its count, and the reason of the most frequent one."""
    given = [one.get("verdict") or {"word": "failed", "reason": one["status"]} for one in cells]
    counts = Counter(one["word"] for one in given)
    ordered = sorted(counts, key=lambda word: (-counts[word], WORDS.index(word)))
    text = ordered[0] if len(ordered) == 1 else ", ".join(f"{word} {counts[word]}" for word in ordered)
    few = f"; {len(cells)} of {PUBLISHED_SEEDS} seeds that a published table needs" if len(cells) < PUBLISHED_SEEDS else ""
    return text, next(one["reason"] for one in given if one["word"] == ordered[0]) + few


def _median(cells: list[dict[str, Any]], key: str) -> float | None:
    values = [one[key]["value"] for one in cells if one.get(key) and one[key]["value"] is not None]
    return statistics.median(values) if values else None


def _mean(values: list[float | None]) -> float | None:
    known = [one for one in values if one is not None]
    return statistics.fmean(known) if known else None


def _speed(content: dict[str, Any], target: str, method: str, pooled: dict[str, Any] | None, *, run: Path) -> dict[str, Any]:
    """Return the ratio to the strongest plain dynamics of the target, and after how many peptides training is paid back."""
    from longstride.analysis.report_page import preparation_seconds

    for versus in STRONGEST_FIRST:
        for one in content["speedups"]:
            if (one["target"], one["method"], one["versus"]) != (target, method, versus):
                continue
            measured = one["measured"]["value"] is not None
            ratio = one["measured" if measured else "against_msm"]["value"]
            found = {"speed_up": ratio, "versus": versus if measured else f"{versus} at its slowest timescale"}
            if one["is_baseline"] or pooled is None:
                return found
            other = next((p for p in content["pooled"] if (p["target"], p["method"]) == (target, versus)), None)
            plain = other["ess_per_s"] if measured and other else one["dynamics_ess_per_s_from_msm"]
            cost = preparation_seconds(run, content["system"], method)
            ours, theirs = estimate_of(pooled["ess_per_s"]), estimate_of(plain)
            paid = break_even_peptides(ours, theirs, preparation_s=cost, samples=SAMPLES_PER_PEPTIDE)
            shared = {"sampling_s": pooled["sampling_s"], "preparation_s": cost}
            size = estimate_of(pooled["ess"])
            return found | {
                "break_even_peptides_at_1000_ess": paid.value,
                "ess_amortised_over_1_peptide_per_s": amortised_rate(size, peptides=1, **shared).value,
                "ess_amortised_over_100_peptides_per_s": amortised_rate(size, peptides=100, **shared).value,
            }
    return {"speed_up": None, "versus": None}
