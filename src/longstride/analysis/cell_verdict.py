"""One word for every cell of a comparison, with its reason: better, equal within noise, worse, not converged, failed."""

from __future__ import annotations

import math
from typing import Any

from scipy import stats

from longstride.analysis.energies import KS_95
from longstride.analysis.estimate import Estimate, ratio, undefined

BETTER, EQUAL, WORSE = "better", "equal within noise", "worse"
NOT_CONVERGED, FAILED = "not converged", "failed"
WORDS = (BETTER, EQUAL, WORSE, NOT_CONVERGED, FAILED)
LEVEL = 0.05  # of all tests of one cell against its baseline together (Bonferroni)
STRONGEST_FIRST = ("tuned-md", "md", "sts")


def estimate_of(values: dict[str, Any]) -> Estimate:
    """Return the Estimate of its JSON values."""
    return Estimate(value=values["value"], low=values["low"], high=values["high"], note=values["note"])


def _verdict(word: str, reason: str) -> dict[str, str]:
    return {"word": word, "reason": reason}


def disagreements(entry: dict[str, Any]) -> tuple[int, list[tuple[float, str]]]:
    """Return how many tests a cell was put to against its baseline, and (p-value, words) of each, smallest first.

    Tests: Delta F of every phi (z), map and shapes of basins (bootstrap), Kolmogorov-Smirnov distance of energies (with the
    effective sizes), mean energy (z).
    """
    found: list[tuple[float, str]] = []
    for name, one in (entry.get("delta_f") or {}).items():
        if one.get("z") is not None:
            found.append((2 * float(stats.norm.sf(abs(one["z"]))), f"ΔF({name}) is off by {abs(one['z']):.1f} errors"))
    grid = entry.get("map") or {}
    for key, words in (("p_value", "the map differs"), ("p_value_basins", "the shapes of its basins differ")):
        if grid.get(key) is not None:
            found.append((float(grid[key]), f"{words} (RMSE {grid['rmse']:.2g} kT)"))
    energy = entry.get("energy") or {}
    if energy.get("ks") is not None and energy.get("ks_noise"):
        p = float(stats.kstwobign.sf(KS_95 * energy["ks"] / energy["ks_noise"])) if energy["ks_noise"] < 1 else 1.0
        found.append((p, f"energies differ (KS {energy['ks']:.2g}, noise level {energy['ks_noise']:.2g})"))
    difference = energy.get("difference")
    if difference and difference["value"] is not None:
        error = estimate_of(difference).standard_error
        if error:
            shift = difference["value"]
            found.append((2 * float(stats.norm.sf(abs(shift) / error)), f"the mean energy is off by {shift:.2g} kJ/mol"))
    return len(found), sorted(found)


def _plain(entry: dict[str, Any], pooled: list[dict[str, Any]]) -> dict[str, Any] | None:
    for name in STRONGEST_FIRST:
        for one in pooled:
            if one["target"] == entry["target"] and one["method"] == name and name != entry["method"]:
                return one
    return None


def _unfit(entry: dict[str, Any], *, mixed_rhat: float) -> dict[str, str] | None:
    """Return the verdict of a cell that cannot be judged by its speed: failed or not converged; None if it can."""
    if entry.get("ess") is None or entry["status"].startswith(("absent", "empty", "not finite")):
        return _verdict(FAILED, entry["status"])
    ess, rhat = entry["ess"], entry["rhat_max"]
    if ess["value"] is None:
        return _verdict(NOT_CONVERGED, f"ESS undefined: {ess['note']}")
    if rhat is not None and rhat > mixed_rhat:
        return _verdict(NOT_CONVERGED, f"R-hat {rhat:.2f} over its chains, above {mixed_rhat}")
    if ess["note"]:
        return _verdict(NOT_CONVERGED, f"{ess['observable']}: {ess['note']}")
    lost = [f"{name}: {one['note']}" for name, one in entry["delta_f"].items() if one["value"] is None]
    return _verdict(NOT_CONVERGED, f"ΔF of {lost[0]}") if lost else None


def cell_verdict(
    entry: dict[str, Any],
    pooled: list[dict[str, Any]],
    *,
    mixed_rhat: float,
    msm_rates: dict[tuple[str, str], Estimate] | None = None,
) -> dict[str, str]:
    """Return {"word", "reason"} of one cell of comparison.json["methods"].

    In this order: a cell without usable samples has failed; one whose chains disagree, whose slowest correlation is not
    resolved or that misses a basin has not converged; one whose distribution differs from its baseline beyond noise is worse
    whatever its speed; the others are compared by the smallest ESS per second of the panel with the strongest plain dynamics
    of the same target: better or worse only where the 95 % interval of the ratio excludes 1.

    Args:
        entry: of the cell.
        pooled: comparison.json["pooled"], for the rates of plain dynamics.
        mixed_rhat: largest R-hat of chains that have mixed.
        msm_rates: (target, plain method) to the ESS per second that the slowest timescale allows it, used where plain dynamics
            has not mixed.
    """
    unfit = _unfit(entry, mixed_rhat=mixed_rhat)
    if unfit is not None:
        return unfit
    count, tests = disagreements(entry)
    if tests and tests[0][0] * count < LEVEL:
        more = (
            f" and {sum(p * count < LEVEL for p, _ in tests) - 1} more" if sum(p * count < LEVEL for p, _ in tests) > 1 else ""
        )
        return _verdict(WORSE, f"{tests[0][1]}: not the distribution of its baseline (p = {tests[0][0]:.1g}{more})")
    agrees = "is the baseline of its target" if entry.get("baseline") == "is the baseline" else "same distribution within noise"
    if not tests and entry.get("baseline") != "is the baseline":
        return _verdict(NOT_CONVERGED, "nothing to compare its distribution with")
    if entry["invariance"] == "biased":
        return _verdict(EQUAL, f"{agrees}, but it is biased: its weights are not corrected and its rate is not compared")
    plain = _plain(entry, pooled)
    if plain is None:
        return _verdict(EQUAL, f"{agrees}; no other plain dynamics on this target to compare its speed with")
    return _by_speed(entry, plain, agrees, mixed_rhat=mixed_rhat, msm_rates=msm_rates or {})


def _by_speed(
    entry: dict[str, Any],
    plain: dict[str, Any],
    agrees: str,
    *,
    mixed_rhat: float,
    msm_rates: dict[tuple[str, str], Estimate],
) -> dict[str, str]:
    name, rhat = plain["method"], plain["rhat_max"]
    mixed = rhat is None or rhat <= mixed_rhat
    measured = estimate_of(plain["ess_per_s"])
    mixed = mixed and measured.defined
    rate = measured if mixed else msm_rates.get((plain["target"], name), undefined(f"{name} has not mixed"))
    how = "its measured ESS/s" if mixed else "what the slowest timescale allows it"
    found = ratio(estimate_of(entry["ess_per_s"]), rate)
    if found.value is None and not mixed:
        own, theirs = (entry.get("timing") or {}).get("sampling_s"), plain.get("sampling_s")
        if own and theirs and own <= theirs:
            return _verdict(BETTER, f"{agrees}; converged in {own:.3g} s, {name} has not in {theirs:.3g} s")
    if found.value is None:
        reason = f"{agrees}; the rate of {name} is undefined ({rate.note or 'no interval'}), so speed cannot be compared"
        return _verdict(NOT_CONVERGED, reason)
    if found.low is None or found.high is None or not math.isfinite(found.value):
        return _verdict(EQUAL, f"{agrees}; {found.value:.3g} × {name} by {how}, without an interval")
    words = f"{agrees}; {found.value:.3g} ({found.low:.3g} to {found.high:.3g}) × {name} by {how}"
    if found.low > 1:
        return _verdict(BETTER, words)
    return _verdict(WORSE if found.high < 1 else EQUAL, words)
