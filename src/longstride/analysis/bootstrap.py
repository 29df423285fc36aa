"""Bootstrap over independent chains or over blocks of a few long ones."""

from __future__ import annotations

import math

import numpy as np

from longstride.analysis.estimate import Estimate, undefined

MIN_UNITS = 20


def unit_labels(n_times: int, n_chains: int, *, minimum: int = MIN_UNITS) -> np.ndarray:
    """Return the resampling unit of each sample, [time, chain] int: chains, or equal blocks of them.

    With at least `minimum` chains every chain is one unit. Fewer chains are cut into equal blocks so that there
    are at least `minimum` units; blocks must be longer than the correlation time for the errors to be right.
    """
    blocks = max(1, min(math.ceil(minimum / max(n_chains, 1)), n_times))
    block_of_time = np.arange(n_times) * blocks // max(n_times, 1)
    return block_of_time[:, None] + blocks * np.arange(n_chains)[None, :]


def multiplicities(n_units: int, replicates: int, generator: np.random.Generator) -> np.ndarray:
    """Return how often each unit is drawn in each bootstrap replicate, [replicate, unit] int (Efron)."""
    return generator.multinomial(n_units, np.full(n_units, 1 / n_units), size=replicates)


def percentile_interval(value: float, replicates: np.ndarray) -> Estimate:
    """Return value with the 2.5 and 97.5 percentiles of its bootstrap replicates.

    Replicates of ±inf are kept in order (a free-energy difference of a basin that a replicate lost); an end that
    falls on them is reported as unbounded (None).
    """
    if not math.isfinite(value):
        return undefined("the estimate is not finite")
    usable = np.sort(replicates[~np.isnan(replicates)])
    if len(usable) < 0.5 * len(replicates) or len(usable) < 10:
        return Estimate(value=value, note="no interval: most bootstrap replicates are undefined")
    low = float(usable[math.floor(0.025 * (len(usable) - 1))])
    high = float(usable[math.ceil(0.975 * (len(usable) - 1))])
    note = "" if math.isfinite(low) and math.isfinite(high) else "unbounded: too few transitions"
    return Estimate(value=value, low=low if math.isfinite(low) else None, high=high if math.isfinite(high) else None, note=note)
