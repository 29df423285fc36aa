"""Free-energy maps and profiles against a reference: distances, and a test that knows which bins err together.

The bins of one basin share the error of its weight. Judged bin by bin, a basin whose weight is uncertain looks like many
disagreements. The test here draws its null distribution from the bootstrap replicates of both sides, which carry that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from longstride.analysis.free_energy import FreeEnergy, basin_of, bin_edges

MIN_SHARED_BINS = 5
LEVEL = 0.025  # of each of the two tests, so that equal maps are called different in at most 5 % of all cases


@dataclass(frozen=True, kw_only=True)
class MapComparison:
    """How a free energy compares with a reference on shared bins.

    Attributes:
        rmse: root mean square difference in kT after removing the mean offset, or None.
        expected: the RMSE that both sides' errors alone would give, or None.
        rmse_basins: the same after removing the mean offset of every basin, or None: shapes without weights of basins.
        expected_basins: what both sides' errors alone would give for it, or None.
        within_two_errors: fraction of shared bins whose difference is below two combined errors, or None.
        p_value: probability of maps at least as different if both were equal, whole map; None where unknown.
        p_value_basins: the same for the shapes within basins; None where unknown.
        bins: number of shared bins.
        missing: reference bins within the limit that the method never visited.
        verdict: "agrees", "differs" or "undefined".
        statement: one line for people.
    """

    rmse: float | None = None
    expected: float | None = None
    rmse_basins: float | None = None
    expected_basins: float | None = None
    within_two_errors: float | None = None
    p_value: float | None = None
    p_value_basins: float | None = None
    bins: int = 0
    missing: int = 0
    verdict: str = "undefined"
    statement: str = ""


def basins_of_grid(bins: int) -> np.ndarray:
    """Return the basin of each bin of a (phi, psi) grid, flat [bins * bins] int, by the bin's centre."""
    centres = (bin_edges(bins)[1:] + bin_edges(bins)[:-1]) / 2
    phi, psi = np.meshgrid(centres, centres, indexing="ij")
    return basin_of(phi, psi).ravel()


def compare_maps(method: FreeEnergy, reference: FreeEnergy, *, limit: float, basins: np.ndarray | None = None) -> MapComparison:
    """Compare two free energies over the bins whose reference value is at most `limit` kT.

    Equations: d = F_method - F_reference minus its mean over shared bins (or over the bins of each basin);
    RMSE = sqrt(mean d^2). Tests: X = sum_b (p_method - p_reference)^2 / mean p over the bins within the limit and all others
    as one, and the same for the conditional distributions within basins; p-value: how often bootstrap replicates of both
    sides, centred on their own means, are as far apart. The replicates' spread is widened for few units (n/(n-1) and
    Student's t). "differs" where either p-value is below 2.5 %.

    Args:
        method: the free energy to judge.
        reference: what to compare with; independent of it.
        limit: highest reference value of a bin that counts, kT.
        basins: [bin] int, the basin of every bin; None: all bins are one basin, and there is one test.
    """
    with np.errstate(invalid="ignore"):
        relevant = reference.sampled & (reference.values <= limit)
    shared = relevant & method.sampled
    missing, count = int((relevant & ~method.sampled).sum()), int(shared.sum())
    if count < MIN_SHARED_BINS:
        reason = reference.note if not relevant.any() and reference.note else f"only {count} bins are shared"
        return MapComparison(bins=count, missing=missing, statement=f"undefined: {reason}")
    one_basin = np.zeros(len(relevant), dtype=np.int64)
    labels = one_basin if basins is None else basins
    difference = method.values[shared] - reference.values[shared]
    variance = method.errors[shared] ** 2 + reference.errors[shared] ** 2
    known = np.isfinite(variance)
    inside = None
    if known.any():
        centred = difference - difference.mean()
        inside = float((np.abs(centred[known]) <= 2 * np.sqrt(variance[known])).mean())
    whole = _p_value(method, reference, relevant)
    shapes = None if basins is None else _p_value_within(method, reference, relevant, labels)
    rmse, expected = _distance(method, reference, shared, one_basin)
    rmse_basins, expected_basins = (None, None) if basins is None else _distance(method, reference, shared, labels)
    verdict, words = _judged(whole, shapes)
    numbers = f"RMSE {rmse:.2g} kT" + ("" if expected is None else f" (errors alone: {expected:.2g})")
    return MapComparison(
        rmse=rmse, expected=expected, rmse_basins=rmse_basins, expected_basins=expected_basins, within_two_errors=inside,
        p_value=whole, p_value_basins=shapes, bins=count, missing=missing, verdict=verdict,
        statement=f"{words}; {numbers} over {count} bins, {missing} bins never visited",
    )  # fmt: skip


def _judged(whole: float | None, shapes: float | None) -> tuple[str, str]:
    if whole is None:
        return "undefined", "undefined: no errors are known, so agreement cannot be judged"
    numbers = f"p = {whole:.2g}" + ("" if shapes is None else f", {shapes:.2g} within basins")
    level = 2 * LEVEL if shapes is None else LEVEL
    if shapes is not None and shapes < level:
        return "differs", f"differs by more than the errors of both sides, in the shape of basins ({numbers})"
    if whole < level:
        where = "" if shapes is None else ", in the weights of basins"
        return "differs", f"differs by more than the errors of both sides{where} ({numbers})"
    return "agrees", f"agrees within the errors of both sides ({numbers})"


def _distance(method: FreeEnergy, reference: FreeEnergy, shared: np.ndarray, labels: np.ndarray) -> tuple[float, float | None]:
    """Return the RMSE over shared bins without the offset of every label, and what both errors alone would give."""
    difference = (method.values - reference.values)[shared]
    same = labels[shared][:, None] == np.unique(labels[shared])
    to_mean = same / same.sum(axis=0)

    def centred(values: np.ndarray) -> np.ndarray:
        return values - (values @ to_mean) @ same.T

    rmse = float(np.sqrt((centred(difference) ** 2).mean()))
    total = 0.0
    for side in (method, reference):
        if side.deviations is None or side.probability is None or side.units < 2:
            return rmse, None
        errors = side.deviations[:, shared] / side.probability[shared] * math.sqrt(side.units / (side.units - 1))
        total += float((centred(errors - errors.mean(axis=0)) ** 2).mean())
    return rmse, math.sqrt(total) if total > 0 else None


def _lumped(side: FreeEnergy, relevant: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return probabilities [relevant bin + 1] and deviations [replicate, relevant bin + 1], all other bins as the last."""
    if side.probability is None or side.deviations is None or side.units < 2:
        return None
    widened = side.deviations * math.sqrt(side.units / (side.units - 1))
    probability = np.append(side.probability[relevant], side.probability[~relevant].sum())
    return probability, np.column_stack([widened[:, relevant], widened[:, ~relevant].sum(axis=1)])


def _p_value(method: FreeEnergy, reference: FreeEnergy, relevant: np.ndarray) -> float | None:
    ours, theirs = _lumped(method, relevant), _lumped(reference, relevant)
    if ours is None or theirs is None:
        return None
    mean = (ours[0] + theirs[0]) / 2
    scale = np.divide(1, np.sqrt(mean), out=np.zeros_like(mean), where=mean > 0)
    return _exceedance((ours[0] - theirs[0]) * scale, ours[1] * scale, theirs[1] * scale, units=(method.units, reference.units))


def _p_value_within(method: FreeEnergy, reference: FreeEnergy, relevant: np.ndarray, labels: np.ndarray) -> float | None:
    """Return the p-value of the conditional distributions within basins that both sides visited."""
    ours, theirs = _lumped(method, relevant), _lumped(reference, relevant)
    if ours is None or theirs is None:
        return None
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for label in np.unique(labels[relevant]):
        members = np.append(labels[relevant] == label, False)
        weights = [float(side[0][members].sum()) for side in (ours, theirs)]
        if members.sum() < 2 or min(weights) <= 0:
            continue
        shapes = [side[0][members] / weight for side, weight in zip((ours, theirs), weights, strict=True)]
        moves = [
            (side[1][:, members] - shape * side[1][:, members].sum(axis=1, keepdims=True)) / weight
            for side, shape, weight in zip((ours, theirs), shapes, weights, strict=True)
        ]
        scale = np.sqrt(2 / (shapes[0] + shapes[1]) * sum(weights) / 2)
        parts.append(((shapes[0] - shapes[1]) * scale, moves[0] * scale, moves[1] * scale))
    if not parts:
        return None
    found, ours_moves, theirs_moves = (np.concatenate(column, axis=-1) for column in zip(*parts, strict=True))
    return _exceedance(found, ours_moves, theirs_moves, units=(method.units, reference.units))


def _exceedance(found: np.ndarray, ours: np.ndarray, theirs: np.ndarray, *, units: tuple[int, int]) -> float:
    """Return how often |a_i - b_j|^2 over all pairs of replicates exceeds |found|^2, widened for few units.

    Student's t in place of the normal is right where one direction (the weight of one basin) holds most of the spread, and on
    the safe side elsewhere; degrees of freedom by Welch and Satterthwaite.
    """
    ours, theirs = ours - ours.mean(axis=0), theirs - theirs.mean(axis=0)
    squares = (ours**2).sum(axis=1), (theirs**2).sum(axis=1)
    spread = float(squares[0].mean()), float(squares[1].mean())
    if not sum(spread) > 0:
        return 1.0 if not (found**2).sum() > 0 else 0.0
    freedom = sum(spread) ** 2 / sum(part**2 / (count - 1) for part, count in zip(spread, units, strict=True))
    point = 1 - LEVEL / 2
    widening = float(stats.t.ppf(point, max(freedom, 1.0)) / stats.norm.ppf(point)) ** 2
    null = squares[0][:, None] + squares[1][None, :] - 2 * ours @ theirs.T
    return float(((null * widening >= (found**2).sum()).sum() + 1) / (null.size + 1))
