"""How fast a free-energy profile becomes right: its error from growing prefixes of the samples against their cost."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from longstride.analysis.estimate import finite
from longstride.analysis.free_energy import FreeEnergy, bin_index
from longstride.analysis.weighted import check_weights, normalised_weights

if TYPE_CHECKING:
    from longstride.analysis.comparison import Comparison
    from longstride.analysis.features import Torsions
    from longstride.analysis.samples import Cell, SampleSet
    from longstride.config import CompareConfig

POINTS = 12
FEWEST_SAMPLES = 20  # a prefix of fewer says nothing about a profile
MIN_BINS = 3
TOLERANCES_KT = (1.0, 0.5, 0.25)
COLUMNS = ("method", "target", "seed", "n_saves", "n_samples", "target_calls", "rmse_kT", "sampling_wall_s")


def prefix_lengths(saves: int, chains: int) -> list[int]:
    """Return up to 12 numbers of saves, even in their logarithm, the last one all of them; empty if there are too few."""
    first = max(1, math.ceil(FEWEST_SAMPLES / chains))
    if saves < first:
        return []
    return sorted({round(value) for value in np.geomspace(first, saves, POINTS)})


def profile_rmse(probability: np.ndarray, empty: float, baseline: np.ndarray, *, limit: float) -> float | None:
    """Return the root mean square difference of a profile from its baseline in kT, mean offset removed.

    Equation: F_i = -ln max(p_i, e), d_i = F_i - F_i(baseline) over bins with F_i(baseline) <= limit, RMSE = sd(d). A bin that
    was never visited counts with e, the probability of half a sample: leaving it out would flatter short samples.

    Args:
        probability: [bin] of the sample.
        empty: e.
        baseline: [bin] free energy in kT, lowest bin at 0; NaN where unsampled.
        limit: in kT.

    Returns:
        None where fewer than three bins can be compared.
    """
    kept = np.isfinite(baseline) & (np.nan_to_num(baseline, nan=np.inf) <= limit)
    if kept.sum() < MIN_BINS:
        return None
    difference = -np.log(np.maximum(probability[kept], empty)) - baseline[kept]
    return float(difference.std())


def accuracy_curve(samples: SampleSet, torsions: Torsions, baseline: FreeEnergy, *, bins: int, limit: float) -> dict[str, Any]:
    """Return the RMSE of F(phi) of the first n saves of all chains, for growing n, with what they cost.

    Wall seconds and calls of the target (energies and forces) are those of sampling times the share of saves used, so burn-in,
    training and reference data are not counted. `reached` holds, for each tolerance, the cost of the first prefix from which
    on the RMSE stays below it, or None.

    Args:
        samples: of one cell; weighted ones use their weights.
        torsions: of the molecule, with a (phi, psi) pair.
        baseline: F(phi) to compare with.
        bins: of the profile.
        limit: bins above it in the baseline are left out, kT.
    """
    if torsions.pair is None:
        return _nothing("no phi")
    kept = np.isfinite(baseline.values) & (np.nan_to_num(baseline.values, nan=np.inf) <= limit)
    if kept.sum() < MIN_BINS:
        return _nothing(baseline.note or "the baseline has fewer than three bins to compare")
    weights = samples.log_weights
    if weights is not None and check_weights(weights):
        return _nothing(check_weights(weights))
    saves, chains = samples.energy.shape
    index = bin_index(samples.angles[..., torsions.pair[0]], bins)
    points = []
    for length in prefix_lengths(saves, chains):
        probability, size = _histogram(index[:length], None if weights is None else weights[:length], bins)
        rmse = profile_rmse(probability, 0.5 / size, baseline.values, limit=limit)
        points.append({"n_saves": length, "n_samples": length * chains, **_cost(samples, length / saves), "rmse_kT": rmse})
    if not points:
        return _nothing(f"fewer than {FEWEST_SAMPLES} samples")
    errors = baseline.errors[kept]
    known = errors[np.isfinite(errors)]
    return {
        "quantity": f"F({torsions.names[torsions.pair[0]]})",
        "bins": int(kept.sum()),
        "floor_kT": finite(math.sqrt(float((known**2).mean()))) if known.size else None,
        "points": points,
        "reached": {f"{tolerance:g}": _reached(points, tolerance) for tolerance in TOLERANCES_KT},
        "note": "",
    }


def _nothing(reason: str) -> dict[str, Any]:
    return {"quantity": "", "bins": 0, "floor_kT": None, "points": [], "reached": {}, "note": reason}


def _histogram(index: np.ndarray, log_weights: np.ndarray | None, bins: int) -> tuple[np.ndarray, float]:
    """Return probabilities [bin] and how many equally weighted samples they are worth (Kish)."""
    if log_weights is None or not np.isfinite(log_weights).any():
        return np.bincount(index.ravel(), minlength=bins) / index.size, float(index.size)
    weights = normalised_weights(log_weights)
    return np.bincount(index.ravel(), weights.ravel(), minlength=bins), 1 / float((weights**2).sum())


def _cost(samples: SampleSet, share: float) -> dict[str, float | None]:
    counts, timing = samples.manifest.get("counts") or {}, samples.manifest.get("timing") or {}
    calls = float(counts.get("energy_calls") or 0) + float(counts.get("force_calls") or 0)
    seconds = timing.get("sampling_s")
    return {
        "target_calls": calls * share if calls else None,
        "sampling_wall_s": float(seconds) * share if seconds else None,
    }


def _reached(points: list[dict[str, Any]], tolerance: float) -> dict[str, float | None] | None:
    first = None
    for point in reversed(points):
        if point["rmse_kT"] is None or point["rmse_kT"] > tolerance:
            break
        first = point
    return None if first is None else {key: first[key] for key in ("target_calls", "sampling_wall_s", "n_samples")}


def attach_accuracy(found: Comparison, cells: list[Cell], torsions: Torsions, section: CompareConfig) -> None:
    """Put `accuracy` into every filled entry of comparison.json: `accuracy_curve`, or the reason why there is none.

    The baseline is F(phi) of the reference on its own target, and of all samples of `sts` on another; `sts` is not compared
    with itself.
    """
    profiles = _baseline_profiles(found, torsions, section)
    filled = {(cell.method, cell.seed): cell.samples for cell in cells if cell.samples is not None}
    for entry in found.content["methods"]:
        samples = filled.get((entry["method"], entry["seed"]))
        if samples is None:
            continue
        baseline = found.baselines.get(entry["target"])
        profile = profiles.get(entry["target"])
        if entry["status"].startswith("not finite"):
            entry["accuracy"] = _nothing(entry["status"])
        elif baseline is not None and entry["method"] in baseline.methods:
            entry["accuracy"] = _nothing("is the baseline")
        elif profile is None:
            entry["accuracy"] = _nothing("no baseline for this target")
        else:
            limit = section.max_free_energy_kT
            entry["accuracy"] = accuracy_curve(samples, torsions, profile, bins=section.bins, limit=limit)


def _baseline_profiles(found: Comparison, torsions: Torsions, section: CompareConfig) -> dict[str, FreeEnergy]:
    from longstride.analysis.method_analysis import sample_histograms

    if torsions.pair is None:
        return {}
    own = str(found.reference.samples.manifest["target"])
    profiles = {}
    for target, baseline in found.baselines.items():
        profile = found.reference.profile_msm if target == own else None
        if target != own and baseline is not None:
            pooled = [samples for (of, method), samples in found.pooled.items() if of == target and method in baseline.methods]
            profile = sample_histograms(pooled[0], torsions, section, seed=0)[1] if pooled else None
        if profile is not None:
            profiles[target] = profile
    return profiles


def accuracy_rows(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of accuracy.csv, one per prefix of every cell."""
    return [
        {"method": entry["method"], "target": entry["target"], "seed": entry["seed"], **point}
        for entry in content["methods"]
        for point in (entry.get("accuracy") or {}).get("points", [])
    ]
