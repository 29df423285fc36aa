"""Chemical validity of one set of samples beside that of the reference, as JSON values."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from longstride.analysis.bootstrap import multiplicities, unit_labels
from longstride.analysis.clouds import MAX_UNITS
from longstride.analysis.divergences import ca_valid
from longstride.analysis.estimate import Estimate, undefined
from longstride.analysis.geometry import GeometryLimits, GeometryTerms, flag_geometry
from longstride.analysis.weighted import check_weights, normalised_weights

if TYPE_CHECKING:
    from longstride.analysis.frames import FrameLayout
    from longstride.analysis.samples import SampleSet

REPLICATES = 200
UNITS = {
    "bond_outliers": "share of bonds",
    "angle_outliers": "share of angles",
    "broken_bonds": "share of frames",
    "clashes": "pairs per frame",
    "inverted_centres": "share of frames",
    "cis_omega": "share of peptide bonds",
    "unisim_invalid_ca": "share of frames",
}
BLIND_BELOW = 20


def rate(values: np.ndarray, unit: np.ndarray, weights: np.ndarray | None, *, seed: int, share: bool) -> Estimate:
    """Return the mean of values [frame] with a 95 % interval over resampled units.

    Where nothing was seen in n units the upper end of a share is 1 - 0.025^(1/n): the largest share that n independent looks
    miss in 2.5 % of cases.

    Args:
        values: not negative.
        unit: [frame] bootstrap unit.
        weights: [frame], or None for equal ones.
        seed: of the bootstrap.
        share: whether values are at most one.
    """
    if len(values) < BLIND_BELOW:
        return undefined(f"too few frames: {len(values)}, at least {BLIND_BELOW} are needed")
    _, unit = np.unique(unit, return_inverse=True)
    own = np.ones(len(values)) if weights is None else weights
    if not own.sum() > 0:
        return undefined("all weights are zero")
    count = int(unit.max()) + 1
    sums, sizes = np.bincount(unit, values * own, count), np.bincount(unit, own, count)
    value = float(sums.sum() / sizes.sum())
    if value == 0.0:
        return Estimate(value=0.0, low=0.0, high=1 - 0.025 ** (1 / count) if share else None)
    draws = multiplicities(count, REPLICATES, np.random.default_rng(seed))
    total = draws @ sizes
    found = (draws @ sums)[total > 0] / total[total > 0]
    low, high = np.percentile(found, [2.5, 97.5])
    return Estimate(value=value, low=float(min(low, value)), high=float(max(high, value)))


def validity(
    samples: SampleSet,
    layout: FrameLayout,
    terms: GeometryTerms,
    limits: GeometryLimits,
    *,
    weights: np.ndarray | None = None,
    seed: int,
) -> dict[str, Estimate]:
    """Return the rate of every defect.

    Bonds, angles, clashes and CA atoms are looked at in the whole frames that the set keeps (at most about 10 000), handedness
    and peptide bonds in all frames.

    Args:
        samples: the set.
        layout: of the molecule.
        terms: of the molecule.
        limits: of the reference.
        weights: [time, chain]; None takes the set's own, or equal ones.
        seed: of bootstraps.
    """
    frames = samples.frames
    if frames is None:
        return {name: undefined("coordinates were not kept") for name in UNITS}
    if weights is None and samples.log_weights is not None and not check_weights(samples.log_weights):
        weights = normalised_weights(samples.log_weights)
    unit = unit_labels(*samples.energy.shape) % MAX_UNITS
    own = (frames.times, frames.chains)
    flags = flag_geometry(frames.structures, terms, limits)
    some, every = (
        partial(rate, unit=labels, weights=factors, seed=seed)
        for labels, factors in (
            (unit[own], None if weights is None else weights[own]),
            (unit.ravel(), None if weights is None else weights.ravel()),
        )
    )
    found = {
        "bond_outliers": some(flags.bond_outliers, share=True),
        "angle_outliers": some(flags.angle_outliers, share=True),
        "broken_bonds": some(flags.broken, share=True),
        "clashes": some(flags.clashes, share=False),
        "inverted_centres": undefined("no chiral centre"),
        "cis_omega": undefined("no peptide bond"),
        "unisim_invalid_ca": undefined(f"needs 2 CA atoms, this molecule has {len(layout.alpha)}"),
    }
    if frames.inverted.shape[2]:
        inverted = frames.inverted.any(axis=2).ravel().astype(float)
        found["inverted_centres"] = every(inverted, share=True)
    if frames.peptide.shape[2]:
        cis = (np.abs(frames.peptide) < np.pi / 2).mean(axis=2, dtype=float).ravel()
        found["cis_omega"] = every(cis, share=True)
    if len(layout.alpha) >= 2:
        broken = 1.0 - ca_valid(frames.structures[:, layout.alpha])
        found["unisim_invalid_ca"] = some(broken, share=True)
    return found


def worse_than(one: Estimate, reference: Estimate) -> bool | None:
    """Return whether a rate is above the reference's beyond both intervals; None where that cannot be said."""
    if one.value is None or reference.value is None:
        return None
    ceiling = reference.value if reference.high is None else reference.high
    floor = one.value if one.low is None else one.low
    return floor > ceiling


def validity_json(found: dict[str, Estimate], reference: dict[str, Estimate] | None) -> dict[str, dict[str, Any]]:
    """Return rates of defects as JSON values, with those of the reference and a statement beside each."""
    entries = {}
    for name, one in found.items():
        other = None if reference is None else reference[name]
        worse = None if other is None else worse_than(one, other)
        if one.value is None:
            statement = f"undefined: {one.note}"
        elif worse is None:
            statement = "no reference to compare with"
        elif other is not None and other.value == 0 and (one.low or 0.0) > 0:
            statement = "seen here, never in the reference" + ("" if worse else ", whose chains are too few to rule it out")
        else:
            statement = "more often than in the reference" if worse else "not more often than in the reference, within noise"
        entries[name] = {
            **one.to_json(),
            "reference": None if other is None else other.value,
            "noise_floor": None if other is None else other.high,
            "unit": UNITS[name],
            "statement": statement,
        }
    return entries
