"""One row per cell in the columns of published tables, so that a number can be set beside a published one.

A column that a comparison does not hold is None, never another quantity under its name. Where the literature uses one name for
different things, the column says whose it is. Sources: Timewarp (doi:10.48550/arXiv.2302.01170), Prose
(doi:10.48550/arXiv.2508.18175), MDGen (doi:10.48550/arXiv.2409.17808).
"""

from __future__ import annotations

from typing import Any

TIMEWARP_COLUMNS = (
    "timewarp_acceptance_percent", "timewarp_ess_per_s_tic0", "timewarp_ess_per_s_tic1", "timewarp_ess_per_s_md_tic0",
    "timewarp_speed_up_tic0", "timewarp_all_states_found",
)  # fmt: skip
PROSE_COLUMNS = (
    "prose_energy_evaluations", "prose_ess_kish_clipped", "prose_e_w2", "prose_t_w2", "prose_tica_w2", "prose_t_k_jsd_bits",
    "prose_tica_k_jsd_bits",
)  # fmt: skip
MDGEN_COLUMNS = (
    "mdgen_jsd_torsions_backbone", "mdgen_jsd_torsions_side_chain", "mdgen_jsd_torsions_all", "mdgen_jsd_tica_0",
    "mdgen_jsd_tica_01", "mdgen_jsd_msm_states", "mdgen_sampling_s",
)  # fmt: skip
COLUMNS = ("system", "target", "method", "invariance", "seed", "status", *TIMEWARP_COLUMNS, *PROSE_COLUMNS, *MDGEN_COLUMNS)
PLAIN_OF_TIMEWARP = ("md", "sts")  # one chain per device and no repartitioned masses, as published


def _number(value: Any) -> float | None:  # noqa: ANN401 - a number or the JSON of an Estimate
    if isinstance(value, dict):
        value = value.get("value")
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _distance(entry: dict[str, Any], *names: str) -> float | None:
    found = entry.get("distances") or {}
    return next((_number(found[name]) for name in names if name in found), None)


def _timewarp_rate(entry: dict[str, Any], observable: str) -> float | None:
    size = (entry.get("panel", {}).get(observable) or {}).get("timewarp_ess")
    seconds = (entry.get("timing") or {}).get("sampling_s")
    return size / seconds if size and seconds else None


def _plain_timewarp_rate(content: dict[str, Any], target: str) -> float | None:
    """Return the ESS per second of plain dynamics by Timewarp's definition on TIC0: summed sizes over summed times."""
    for method in PLAIN_OF_TIMEWARP:
        cells = [one for one in content["methods"] if one["method"] == method and one.get("target") == target]
        sizes = [float((one.get("panel", {}).get("TIC0") or {}).get("timewarp_ess") or 0) for one in cells]
        seconds = [float((one.get("timing") or {}).get("sampling_s") or 0) for one in cells]
        if cells and all(sizes) and all(seconds):
            return sum(sizes) / sum(seconds)
    return None


def timewarp_row(entry: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of Timewarp's tables: acceptance, ESS/s by its own estimator and the ratio to plain dynamics on TIC0.

    The speed-up is 0 where its missing-state test fails, as published; None where plain dynamics has no ESS.

    Args:
        entry: a cell of comparison.json["methods"].
        content: comparison.json.
    """
    ours, plain = _timewarp_rate(entry, "TIC0"), _plain_timewarp_rate(content, entry["target"])
    explored = (entry.get("coverage") or {}).get("timewarp_explored")
    explored = explored.get("passed") if isinstance(explored, dict) else explored
    ratio = ours / plain if ours and plain and entry["method"] not in PLAIN_OF_TIMEWARP else None
    acceptance = entry.get("acceptance")
    return {
        "timewarp_acceptance_percent": None if acceptance is None else 100 * acceptance,
        "timewarp_ess_per_s_tic0": ours,
        "timewarp_ess_per_s_tic1": _timewarp_rate(entry, "TIC1"),
        "timewarp_ess_per_s_md_tic0": plain,
        "timewarp_speed_up_tic0": 0.0 if explored is False and ratio is not None else ratio,
        "timewarp_all_states_found": explored,
    }


def prose_row(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of Prose's tables: energy evaluations, clipped Kish ESS, Wasserstein distances, k-means JSD in bits.

    A chain has no importance weights, so its Kish ESS is None.
    """
    return {
        "prose_energy_evaluations": entry["counts"].get("energy_calls") or entry["counts"].get("force_calls"),
        "prose_ess_kish_clipped": _number((entry.get("weights") or {}).get("clipped_fraction")),
        "prose_e_w2": _distance(entry, "e_w2"),
        "prose_t_w2": _distance(entry, "t_w2"),
        "prose_tica_w2": _distance(entry, "tica_w2"),
        "prose_t_k_jsd_bits": _distance(entry, "t_k_jsd_div_bits", "jsd_div_bits_torsions"),
        "prose_tica_k_jsd_bits": _distance(entry, "tica_k_jsd_div_bits", "jsd_div_bits_tica"),
    }


def mdgen_row(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of MDGen's tables: its JS distances (natural logarithm) and the seconds of sampling."""
    return {
        "mdgen_jsd_torsions_backbone": _distance(entry, "jsd_dist_nat_backbone"),
        "mdgen_jsd_torsions_side_chain": _distance(entry, "jsd_dist_nat_side_chain"),
        "mdgen_jsd_torsions_all": _distance(entry, "jsd_dist_nat_torsions"),
        "mdgen_jsd_tica_0": _distance(entry, "jsd_dist_nat_tic0"),
        "mdgen_jsd_tica_01": _distance(entry, "jsd_dist_nat_tic01"),
        "mdgen_jsd_msm_states": _distance(entry, "jsd_dist_nat_macrostates"),
        "mdgen_sampling_s": (entry.get("timing") or {}).get("sampling_s"),
    }


def paper_rows(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row per cell of comparison.json with the columns COLUMNS; a cell without samples has a status and no more."""
    rows = []
    for entry in content["methods"]:
        row = {"system": content["system"], **{key: entry.get(key) for key in COLUMNS[1:6]}}
        if entry.get("counts") is not None:
            row |= timewarp_row(entry, content) | prose_row(entry) | mdgen_row(entry)
        rows.append(row)
    return rows
