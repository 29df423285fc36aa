"""What a comparison means, in sentences. Every sentence quotes a number and its interval, or says why there is none."""

from __future__ import annotations

from typing import Any

EXPLANATIONS = {
    "exact": "samples the target distribution itself: every proposal is accepted or rejected by Metropolis-Hastings",
    "unadjusted": "follows the target up to the error of a finite time step, which is not corrected",
    "biased": "does not sample the target distribution: use it to find states, not to weigh them",
}
METHOD_NOTES = {
    "reference": "Langevin dynamics started in several basins; an MSM removes the choice of starts from populations.",
    "umbrella": "Umbrella sampling of phi and psi with replica exchange, then WHAM: a second, independent reference for ΔF.",
    "md": "Plain OpenMM Langevin dynamics: the baseline on the AMBER-type target.",
    "tuned-md": "Langevin dynamics of many replicas at once on the batched force field: the tuned baseline on that target.",
    "timewarp": "A conditional normalising flow proposes the molecule a long time ahead; Metropolis-Hastings makes it exact.",
    "explore": "The same flow proposals without the correction, with an energy filter against broken structures.",
    "metadynamics": "Well-tempered metadynamics on torsions, then dynamics on the frozen bias; weights undo it.",
    "tempering": "Parallel tempering: replicas at higher temperatures exchange with the one at the target temperature.",
    "mts": "RESPA dynamics: the distilled student every inner step, the teacher every outer step.",
    "sts": "Single-step Langevin dynamics with the teacher alone: the baseline of mts.",
}


DYNAMICS_MARKS = {  # class of the tag of each verdict of `mts_comparison`
    "same": "exact",
    "differs": "biased",
    "not resolved": "unadjusted",
    "too few seeds": "absent",
    "not available": "absent",
}


def number(value: float | None, digits: int = 3) -> str:
    """Return a number for people, or a dash."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def with_interval(estimate: dict[str, Any], digits: int = 3, *, unit: str = "") -> str:
    """Return "value (low to high) unit", or "undefined: reason"."""
    tail = f" {unit}" if unit else ""
    if estimate["value"] is None:
        return f"undefined: {estimate['note']}" if estimate["note"] else "undefined"
    if estimate["low"] is None and estimate["high"] is None:
        return f"{number(estimate['value'], digits)}{tail} (no interval)"
    low = "-∞" if estimate["low"] is None else number(estimate["low"], digits)
    high = "∞" if estimate["high"] is None else number(estimate["high"], digits)
    return f"{number(estimate['value'], digits)} ({low} to {high}){tail}"


def reference_sentences(content: dict[str, Any]) -> list[str]:
    """Return what the reference says about itself: Delta F reweighted and raw, connectivity, slowest process."""
    reference = content["reference"]
    found = []
    for name, entry in reference["delta_f"].items():
        found.append(
            f"ΔF({name}) from phi < 0 to phi ≥ 0 by the MSM: {with_interval(entry, unit='kT')}. The raw histogram of the"
            f" seeded trajectories: {with_interval(entry['raw'], unit='kT')}. They cross {entry['crossings']} times."
        )
    found += umbrella_sentences(content)
    if reference["msm"]["note"]:
        found.append(f"Limits of the reference: {reference['msm']['note']}.")
    slowest = reference["msm"]["slowest_timescale_ps"]
    total = number(reference["simulated_ps"])
    found.append(
        f"Slowest implied timescale at a lag of {number(reference['msm']['lag_ps'])} ps: {with_interval(slowest, unit='ps')};"
        f" {reference['n_chains']} trajectories hold {total} ps in all."
    )
    if reference["estimators_differ_by"] is not None:
        percent = max(100 * reference["estimators_differ_by"], 0.1)
        found.append(f"deeptime and PyEMMA agree within {percent:.2g} % on implied timescales longer than the lag.")
    return found


def umbrella_sentences(content: dict[str, Any]) -> list[str]:
    """Return what umbrella sampling says about Delta F, and how each method of its target compares; empty without it."""
    umbrella = content.get("umbrella")
    if umbrella is None:
        return []
    if not umbrella["torsions"]:
        return [f"No umbrella sampling: {umbrella['status']}."]
    name = umbrella["torsions"][0]
    found = [
        f"Independent of all methods, umbrella sampling gives ΔF({name}) {with_interval(umbrella['delta_f'], unit='kT')} from"
        f" {number(umbrella['simulated_ps'])} ps of restrained dynamics (overlap of neighbouring windows"
        f" {number(umbrella['smallest_overlap'], 2)})."
    ]
    for entry in content["methods"]:
        own = (entry.get("delta_f") or {}).get(name) or {}
        if "umbrella" in own:
            found.append(f"{entry['method']}, seed {entry['seed']}: {own['umbrella']['statement']}.")
    return found


BASELINE_NAMES = {
    "md": "md (plain OpenMM dynamics)",
    "tuned-md": "tuned-md (batched dynamics, the tuned baseline)",
    "sts": "sts (the teacher alone)",
    "reference": "the dynamics of the reference",
}


def speedup_sentence(entry: dict[str, Any]) -> str:
    """Return one line on the speed of a method against one plain dynamics on the same target and machine."""
    versus = entry["versus"]
    name = f"{entry['method']} ({entry['invariance']}) on {entry['target']}, against {BASELINE_NAMES.get(versus, versus)}"
    parts = []
    if entry["measured"]["value"] is not None:
        parts.append(f"{with_interval(entry['measured'])} × its ESS per second")
    else:
        parts.append(f"no measured ratio to {versus} ({entry['measured']['note'] or 'undefined'})")
    if entry["against_msm"]["value"] is not None:
        speed = number(entry["versus_throughput_ps_per_s"])
        parts.append(
            f"{with_interval(entry['against_msm'])} × what the MSM's slowest timescale allows {versus} at its {speed} ps/s"
        )
    else:
        parts.append(f"no ratio to what the slowest timescale allows it ({entry['against_msm']['note'] or 'undefined'})")
    if entry["throughput_ratio"]:
        parts.append(f"{number(entry['throughput_ratio'])} × its simulated time per second")
    cores, theirs = entry["cores"], entry["versus_cores"]
    if cores and theirs and cores != theirs:
        parts.append(f"{cores} core{'s' if cores > 1 else ''} against its {theirs}")
    return f"{name}: {'; '.join(parts)}."


def break_even(entry: dict[str, Any], *, preparation_s: float | None) -> str:
    """Return after how many effective samples (and how long) a method has paid for its training and data.

    Equation: E = P / (1/r_plain - 1/r_method), with P the seconds of preparation and r in ESS per second.

    Args:
        entry: one element of `speedups`.
        preparation_s: wall seconds of reference data and training, or None where unknown.
    """
    versus = entry["versus"]
    if entry["against_msm"]["value"] is None and entry["measured"]["value"] is None:
        return f"Break-even with {versus} is undefined, because the rate of {versus} is."
    if preparation_s is None:
        return "Break-even is undefined: the cost of training and data was not recorded."
    ratio = entry["measured"]["value"] or entry["against_msm"]["value"]
    if ratio <= 1:
        return f"It never pays back its training and data: {versus} is faster."
    plain = entry.get("plain_ess_per_s")
    if not plain:
        return f"Break-even is undefined: no rate of {versus}."
    samples = preparation_s / (1 / plain - 1 / (plain * ratio))
    return (
        f"Training and reference data cost {number(preparation_s)} s; they are paid back after about {number(samples)}"
        f" effective samples, or {number(samples / plain)} s of {versus}."
    )


def _judged(z: float | None, statement: str) -> str:
    if z is None:
        return "undefined" if statement.startswith("undefined") else "undecided"
    if abs(z) > 2:
        return "differs"
    return "not excluded (wide errors)" if "too wide" in statement else "agrees"


def agreement_row(entry: dict[str, Any], primary: str | None) -> list[dict[str, str]]:
    """Return the cells that say whether one method agrees with its baseline: text and a smaller second line each.

    Delta F with its z score, the map with the RMSE that errors alone would give, the mean energy and the KS distance
    with the level that equal distributions stay below.

    Args:
        entry: a filled cell of comparison.json.
        primary: name of the phi whose Delta F is shown, or None.
    """
    cells = []
    one = entry["delta_f"].get(primary) if primary else None
    if one is None:
        cells.append({"text": "–", "small": "no phi"})
    else:
        z = "" if one["z"] is None else f"{_judged(one['z'], one['statement'])}, z = {one['z']:.1f}"
        cells.append({"text": with_interval(one), "small": z or ("" if one["value"] is None else one["statement"])})
    grid = entry.get("map")
    if not grid:
        cells.append({"text": "–", "small": entry["baseline"]})
    elif grid["rmse"] is None:
        cells.append({"text": "–", "small": grid["statement"]})
    else:
        inside = "" if grid["within_two_errors"] is None else f"{100 * grid['within_two_errors']:.0f} % within 2 errors, "
        missing = f"{grid['missing']} of {grid['bins'] + grid['missing']} bins missing"
        small = f"errors alone: {number(grid['expected'], 2)}; {inside}{missing}"
        cells.append({"text": number(grid["rmse"], 2), "small": small})
    energy = entry["energy"]
    own = entry["baseline"] == "is the baseline"
    cells.append({"text": "–" if own else with_interval(energy["difference"], 2), "small": ""})
    noise = "" if energy["ks_noise"] is None else f"noise level {number(energy['ks_noise'], 2)}: "
    small = f"{noise}{energy['statement']}" if energy["ks"] is not None else ("" if own else energy["statement"])
    cells.append({"text": number(energy["ks"], 2), "small": small})
    return cells


def dynamics_sentence(content: dict[str, Any]) -> str:
    """Return how many observables multi-time-step dynamics changes, and which, from dynamics.json."""
    beyond = [row for row in content["rows"] if row["z"] is not None and abs(row["z"]) > 2]
    beyond.sort(key=lambda row: -abs(row["z"]))
    names = [f"{row['observable']} {row['part']}".strip() + f" (z {row['z']:.1f})" for row in beyond[:6]]
    more = f" and {len(beyond) - len(names)} more" if len(beyond) > len(names) else ""
    which = f" Beyond: {', '.join(names)}{more}." if names else ""
    return f"{content['candidate']} against {content['baseline']}: {content['statement']}.{which}"


def gain_sentence(content: dict[str, Any]) -> str:
    """Return the gain in simulated time per second, with its error, from dynamics.json."""
    cost = content["cost"]
    ours, theirs = cost["mts"], cost["sts"]
    spread = "" if cost["gain_se"] is None else f" ± {cost['gain_se']:.2f}"
    note = f" {cost['note'][0].upper()}{cost['note'][1:]}." if cost["note"] else ""
    return (
        f"{content['candidate']} simulates {number(ours['ps_per_s'])} ps per second and {content['baseline']}"
        f" {number(theirs['ps_per_s'])}: a gain of {number(cost['gain'])}{spread} ×, labels and training not counted.{note}"
    )


def conditions_sentence(content: dict[str, Any]) -> str:
    """Return what both methods have in common, from dynamics.json."""
    shared, cost = content["conditions"], content["cost"]
    mass, own = shared["hydrogen_mass_Da"], shared["hydrogen_friction_per_ps"]
    parts = [
        f"target {content['target']}", f"{number(content['temperature_K'], 4)} K", f"friction {shared['friction_per_ps']:g}/ps",
        *([f"of hydrogens {own:g}/ps"] if own not in (None, shared["friction_per_ps"]) else []),
        *([f"hydrogens of {mass:.4g} Da"] if mass is not None else []), f"{shared['atoms']} atoms",
    ]  # fmt: skip
    lengths = f"{number(cost['mts']['simulated_ps'])} ps with {content['candidate']}, {number(cost['sts']['simulated_ps'])} ps"
    return f"Both: {', '.join(parts)}. All replicas and seeds together: {lengths} with {content['baseline']}."
