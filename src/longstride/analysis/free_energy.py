"""Free energies on a common periodic grid, with errors, and free-energy differences between basins. Units of kT."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from longstride.analysis.autocorrelation import effective_size
from longstride.analysis.bootstrap import multiplicities, percentile_interval, unit_labels
from longstride.analysis.estimate import Z95, Estimate, undefined
from longstride.analysis.reweighting import Reweighting

# Basins of the alanine-type Ramachandran map: (name, phi range, psi range) in degrees, half-open, periodic.
BASINS = (
    ("beta/PII", (-180.0, 0.0), (50.0, 240.0)),
    ("alpha-R", (-180.0, 0.0), (-120.0, 50.0)),
    ("alpha-L", (0.0, 180.0), (-10.0, 130.0)),
    ("C7ax", (0.0, 180.0), (130.0, 350.0)),
)


def bin_edges(bins: int) -> np.ndarray:
    """Return the bin edges of a torsion axis in rad, [bins + 1] from -pi to pi."""
    return np.linspace(-math.pi, math.pi, bins + 1)


def bin_index(angle: np.ndarray, bins: int) -> np.ndarray:
    """Return the bin of each angle in rad, int in [0, bins); the axis is periodic, so pi falls into bin 0."""
    return np.floor((angle + math.pi) / (2 * math.pi) * bins).astype(np.int64) % bins


def grid_index(phi: np.ndarray, psi: np.ndarray, bins: int) -> np.ndarray:
    """Return the flat index phi_bin * bins + psi_bin of pairs of angles in rad."""
    return bin_index(phi, bins) * bins + bin_index(psi, bins)


@dataclass(frozen=True, kw_only=True)
class FreeEnergy:
    """A free-energy profile or map.

    Attributes:
        values: [bin] F = -ln p in kT, lowest bin at 0; NaN where nothing was sampled.
        errors: [bin] standard error in kT; NaN where unknown.
        counts: [bin] number of raw samples.
        note: what limits it; empty otherwise.
        probability: [bin] the probabilities behind the values, or None.
        deviations: [replicate, bin] bootstrap replicates of the probabilities minus the probabilities, or None.
        units: how many independent units the bootstrap drew from (chains, blocks, segments); 0 where unknown.
    """

    values: np.ndarray
    errors: np.ndarray
    counts: np.ndarray
    note: str = ""
    probability: np.ndarray | None = None
    deviations: np.ndarray | None = None
    units: int = 0

    @property
    def sampled(self) -> np.ndarray:
        """[bin] whether the bin has a value."""
        return np.isfinite(self.values)


def from_probabilities(
    probability: np.ndarray, replicates: np.ndarray, counts: np.ndarray, note: str = "", *, units: int = 0
) -> FreeEnergy:
    """Turn bin probabilities [bin] and their bootstrap replicates [replicate, bin] over `units` (0: unknown) into a FreeEnergy.

    Equation: F = -ln p + ln max p; error = sd(p over replicates) / p, the linearised error of ln p.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.where(probability > 0, -np.log(probability), np.nan)
        errors = np.where(probability > 0, replicates.std(axis=0, ddof=1) / probability, np.nan)
    # a bin filled by one resampling unit has no spread to speak of
    errors = np.where(errors > 0, errors, np.nan)
    lowest = np.nanmin(values) if np.isfinite(values).any() else 0.0
    return FreeEnergy(
        values=values - lowest, errors=errors, counts=counts, note=note,
        probability=probability, deviations=replicates - probability, units=units,
    )  # fmt: skip


def from_chains(index: np.ndarray, *, bins: int, replicates: int, seed: int) -> FreeEnergy:
    """Return the free energy of bin indices [time, chain], errors by bootstrap over chains or blocks.

    Args:
        index: bin of every sample.
        bins: number of bins in all.
        replicates: bootstrap replicates.
        seed: of the bootstrap.
    """
    labels = unit_labels(*index.shape)
    n_units = int(labels.max()) + 1
    table = np.bincount((labels * bins + index).ravel(), minlength=n_units * bins).reshape(n_units, bins).astype(float)
    drawn = multiplicities(n_units, replicates, np.random.default_rng(seed)) @ table
    counts = table.sum(axis=0)
    return from_probabilities(counts / counts.sum(), drawn / drawn.sum(axis=1, keepdims=True), counts, units=n_units)


def from_weights(index: np.ndarray, weights: Reweighting, *, bins: int) -> FreeEnergy:
    """Return the MSM-reweighted free energy of bin indices [frame] (trajectories end to end).

    Where the weights have no MSM every value is NaN and the note says why.
    """
    counts = np.bincount(index, minlength=bins).astype(float)
    if weights.weights is None:
        nothing = np.full(bins, np.nan)
        return FreeEnergy(values=nothing, errors=nothing, counts=counts, note=weights.note)
    probability = np.bincount(index, weights=weights.weights, minlength=bins)
    replicates = np.stack([np.bincount(index, weights.replicate(k), minlength=bins) for k in range(weights.replicates)])
    return from_probabilities(probability, replicates, counts, weights.note, units=weights.draws.shape[1])


def crossings(indicator: np.ndarray) -> int:
    """Return how often a 0/1 indicator [time, chain] changes along its chains, all chains together."""
    return int((np.diff(indicator.astype(np.int8), axis=0) != 0).sum())


def delta_f_chains(indicator: np.ndarray) -> Estimate:
    """Return Delta F = -ln(p / (1 - p)) in kT of an indicator [time, chain] of the second basin (phi >= 0).

    Interval: p from the Jeffreys Beta posterior with n pseudo-counts, Beta(p n + 1/2, (1-p) n + 1/2)
    (doi:10.1214/ss/1009213286), n the geometric mean of the indicator's ESS and the lower end of its interval: with
    few crossings the ESS itself is uncertain, and n = ESS covers too little. Undefined where a basin is not visited
    or no chain ever crosses: then the ratio only repeats the starting points.
    """
    inside = indicator.astype(float)
    p = float(inside.mean())
    if p in (0.0, 1.0):
        return undefined(f"the basin phi {'>= 0' if p == 0 else '< 0'} was never visited")
    if crossings(indicator) == 0:
        return undefined("no chain crosses between the basins")
    size = effective_size(inside)
    if size.value is None or size.low is None:
        return undefined(size.note)
    count = min(math.sqrt(size.value * size.low), inside.size)
    low_p, high_p = stats.beta.ppf([0.025, 0.975], p * count + 0.5, (1 - p) * count + 0.5)
    low, high = (math.log((1 - q) / q) for q in (high_p, low_p))
    return Estimate(value=math.log((1 - p) / p), low=low, high=high, note=size.note)


def delta_f_weights(indicator: np.ndarray, weights: Reweighting) -> Estimate:
    """Return Delta F = -ln(p / (1 - p)) in kT of an indicator [frame] under MSM weights.

    Interval: bootstrap percentiles, stretched about the value by t_{0.975, n-1} / 1.96 with n the number of
    independent crossings in the rarer direction, because few events make a bootstrap too narrow. Undefined, with the
    reason, where no MSM exists or one basin is outside the connected states.
    """
    if weights.weights is None:
        return undefined(weights.note)
    inside = indicator.astype(float)

    def difference(weight: np.ndarray) -> float:
        total = weight.sum()
        if total <= 0:
            return math.nan
        p = float(np.clip((weight * inside).sum() / total, 0, 1))
        if p in (0.0, 1.0):
            return math.inf if p == 0 else -math.inf
        return math.log((1 - p) / p)

    value = difference(weights.weights)
    if not math.isfinite(value):
        return undefined("the two basins are not connected by transitions in both directions")
    replicates = np.array([difference(weights.replicate(k)) for k in range(weights.replicates)])
    interval = percentile_interval(value, replicates)
    return _stretched(interval, rare_crossings(indicator, weights))


def rare_crossings(indicator: np.ndarray, weights: Reweighting) -> float:
    """Return the number of independent crossings of an indicator [frame] in its rarer direction, at the lag of the MSM."""
    forward = backward = 0.0
    for part in np.split(indicator.astype(bool), np.cumsum(weights.lengths)[:-1]):
        start, end = part[: -weights.lag], part[weights.lag :]
        forward += float((~start & end).sum()) / weights.lag
        backward += float((start & ~end).sum()) / weights.lag
    return min(forward, backward)


def _stretched(estimate: Estimate, events: float) -> Estimate:
    factor = float(stats.t.ppf(0.975, max(events - 1, 1.0))) / Z95
    value, low, high = estimate.value, estimate.low, estimate.high
    if value is None:
        return estimate
    return Estimate(
        value=value,
        low=None if low is None else value - (value - low) * factor,
        high=None if high is None else value + (high - value) * factor,
        note=estimate.note or (f"only {events:.0f} independent crossings in the rarer direction" if events < 5 else ""),
    )


def agreement(method: Estimate, reference: Estimate) -> tuple[float | None, str]:
    """Return z = (a - b) / sqrt(se_a^2 + se_b^2) of two independent estimates and a one-line verdict."""
    if method.value is None:
        return None, f"undefined: {method.note}"
    if reference.value is None:
        return None, f"the reference is undefined: {reference.note}"
    errors = method.standard_error, reference.standard_error
    if errors[0] is None or errors[1] is None:
        return None, "no closed interval, so agreement cannot be judged"
    combined = math.hypot(errors[0], errors[1])
    if combined == 0:
        return None, "both errors are zero, so agreement cannot be judged"
    z = (method.value - reference.value) / combined
    if abs(z) > 2:
        return z, f"differs from the reference by {abs(z):.1f} combined standard errors"
    strength = "; the errors are too wide to say much" if combined > 0.5 else ""
    return z, f"agrees with the reference within two combined standard errors ({combined:.2f}){strength}"


def basin_of(phi: np.ndarray, psi: np.ndarray) -> np.ndarray:
    """Return the index in BASINS of each (phi, psi) in rad; every point of the map belongs to exactly one."""
    degrees_phi, degrees_psi = np.degrees(phi), np.degrees(psi)
    found = np.zeros(np.shape(phi), dtype=np.int64)
    for index, (_, (phi_low, phi_high), (psi_low, psi_high)) in enumerate(BASINS):
        in_phi = (degrees_phi - phi_low) % 360 < phi_high - phi_low
        in_psi = (degrees_psi - psi_low) % 360 < psi_high - psi_low
        found = np.where(in_phi & in_psi, index, found)
    return found


def basin_populations(phi: np.ndarray, psi: np.ndarray, weights: np.ndarray | None = None) -> dict[str, float]:
    """Return the fraction of samples (or of weight) in each basin by name."""
    basin = basin_of(phi, psi).ravel()
    flat = np.full(basin.shape, 1 / max(basin.size, 1)) if weights is None else weights.ravel()
    share = np.bincount(basin, weights=flat, minlength=len(BASINS))
    return {name: float(value) for (name, _, _), value in zip(BASINS, share, strict=True)}
