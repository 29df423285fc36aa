"""Which states of the reference a method finds, at what cost, and whether it misses any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

MIN_POPULATION = 0.001
POINTS = 12
EXPLORED, BALL = 0.3, 0.1  # of the largest |TIC| of the reference
REFERENCE_STRIDE = 10


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What all samples of a set cost, without burn-in, training and reference.

    Attributes:
        calls: energy and force calls of the target, or None.
        seconds: wall-clock time of sampling, or None.
    """

    calls: float | None
    seconds: float | None


def cost_of(manifest: Mapping[str, Any]) -> Cost:
    """Return the cost that the manifest of a sample folder gives."""
    counts, timing = manifest.get("counts") or {}, manifest.get("timing") or {}
    calls = float(counts.get("energy_calls") or 0) + float(counts.get("force_calls") or 0)
    seconds = timing.get("sampling_s")
    return Cost(calls=calls or None, seconds=float(seconds) if seconds else None)


def first_visits(path: np.ndarray, states: int, *, visits: int = 1) -> np.ndarray:
    """Return the number of saves after which each state was seen `visits` times in any chain, [state] float; inf if never.

    Args:
        path: [time, chain] int, negative for no state.
        states: how many there are.
        visits: samples that count as having found a state.
    """
    found = np.full(states, np.inf)
    flat = path.ravel()  # in the order of time: a sample of time t lies at t * chains + chain
    order = np.argsort(flat, kind="stable")
    order = order[flat[order] >= 0]
    ordered = flat[order]
    starts = np.searchsorted(ordered, np.arange(states))
    ends = np.searchsorted(ordered, np.arange(states), side="right")
    enough = ends - starts >= visits
    positions = order[starts[enough] + visits - 1]
    found[enough] = positions // path.shape[1] + 1
    return found


def coverage(path: np.ndarray, populations: np.ndarray, cost: Cost, *, minimum: float = MIN_POPULATION) -> dict[str, Any]:
    """Return the recall of the states of the reference against cost, and when each was first visited, as JSON values.

    Equation: recall(n) = share of states with population >= minimum that n saves of all chains have visited; recall_weighted
    sums their populations instead. Costs are those of sampling times n over the number of saves.

    Args:
        path: [time, chain] state of every sample, negative for none.
        populations: [state] of the reference, sum 1.
        cost: of all samples.
        minimum: smallest population of a state that counts.
    """
    kept = np.flatnonzero(populations >= minimum)
    saves, chains = path.shape
    if not len(kept) or not path.size:
        reason = "no samples" if not path.size else f"no state of the reference has a population of {minimum:g}"
        return {"n_states": 0, "minimum_population": minimum, "recall": None, "points": [], "states": [], "note": reason}
    visits = first_visits(path, len(populations))[kept]
    share = populations[kept] / populations[kept].sum()
    lengths = sorted({round(value) for value in np.geomspace(1, saves, POINTS)})
    points = [
        {
            "n_saves": length,
            **_cost(cost, length, saves, chains),
            "recall": float((visits <= length).mean()),
            "recall_weighted": float(share[visits <= length].sum()),
        }
        for length in lengths
    ]
    states = [
        {
            "state": int(state),
            "population": float(populations[state]),
            "first_visit": None if not np.isfinite(visit) else _cost(cost, int(visit), saves, chains),
        }
        for state, visit in zip(kept, visits, strict=True)
    ]
    return {
        "n_states": len(kept),
        "minimum_population": minimum,
        "recall": points[-1]["recall"],
        "recall_weighted": points[-1]["recall_weighted"],
        "points": points,
        "states": states,
        "note": "",
    }


def _cost(cost: Cost, length: int, saves: int, chains: int) -> dict[str, float | int | None]:
    share = length / saves
    return {
        "n_samples": length * chains,
        "target_calls": None if cost.calls is None else cost.calls * share,
        "sampling_wall_s": None if cost.seconds is None else cost.seconds * share,
    }


def missing_states(reference: np.ndarray, sampled: np.ndarray, ranges: np.ndarray | None = None) -> dict[str, Any]:
    """Return Timewarp's missing-state test and the recall and precision of balls in TIC space, as JSON values.

    Equation: with r_k = max |TIC_k| of the reference, d(x) the distance of a reference point from the nearest sample in
    (TIC_0 / r_0, TIC_1 / r_1): explored if max d < 0.3. Recall is the share of reference points with d < 0.1, precision the
    share of samples with a reference point within 0.1. Source: doi:10.48550/arXiv.2302.01170 and its released notebooks.

    Args:
        reference: [point, 2] TICs of the reference.
        sampled: [point, 2] TICs of the method.
        ranges: [2] r; None takes it from the reference points.
    """
    from scipy.spatial import cKDTree

    if len(reference) < 2 or len(sampled) < 1:
        return {"passed": None, "note": "too few points"}
    if not (np.isfinite(reference).all() and np.isfinite(sampled).all()):
        return {"passed": None, "note": "not finite: some TICs are NaN or infinite"}
    r = np.abs(reference).max(axis=0) if ranges is None else ranges
    if (r <= 0).any():
        return {"passed": None, "note": "constant: a TIC of the reference does not move"}
    x, y = reference / r, sampled / r
    distance, _ = cKDTree(y).query(x)
    back, _ = cKDTree(x).query(y)
    return {
        "passed": bool(distance.max() < EXPLORED),
        "largest_distance": float(distance.max()),
        "recall": float((distance < BALL).mean()),
        "precision": float((back < BALL).mean()),
        "n_reference": len(x),
        "n_sampled": len(y),
        "note": "",
    }
