"""Means with Monte Carlo standard errors, batch means, and the R-hat statistic."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from longstride.analysis.autocorrelation import check_series, effective_size
from longstride.analysis.estimate import Estimate, undefined


def mean_estimate(x: np.ndarray) -> Estimate:
    """Return the mean of x [time, chain] with a 95 % interval from the effective sample size.

    Equation: mean ± t_{0.975, ESS-1} * MCSE, MCSE = sd / sqrt(ESS). Same unit as x.
    """
    error = standard_error(x)
    if error.value is None:
        return error
    size = effective_size(x)
    freedom = max((size.value or 2.0) - 1, 1.0)
    half = float(stats.t.ppf(0.975, freedom)) * error.value
    mean = float(x.mean())
    return Estimate(value=mean, low=mean - half, high=mean + half, note=error.note)


def standard_error(x: np.ndarray) -> Estimate:
    """Return the Monte Carlo standard error of the mean of x [time, chain]: sd / sqrt(ESS), unit of x."""
    size = effective_size(x)
    if size.value is None:
        return undefined(size.note)
    return Estimate(value=float(x.std(ddof=1)) / math.sqrt(size.value), note=size.note)


def batch_means_error(x: np.ndarray) -> Estimate:
    """Return the standard error of the mean of x [time, chain] by batch means, an independent check of MCSE.

    Equation: batches of b = floor(sqrt(time)) saves within each chain, sd(batch means) / sqrt(number of batches)
    (Flegal and Jones, doi:10.1214/09-AOS735).
    """
    reason = check_series(x)
    if reason:
        return undefined(reason)
    n, chains = x.shape
    size = math.isqrt(n)
    batches = n // size
    means = x[: batches * size].reshape(batches, size, chains).mean(axis=1)
    return Estimate(value=float(means.std(ddof=1)) / math.sqrt(means.size))


def _split(x: np.ndarray) -> np.ndarray:
    half = x.shape[0] // 2
    return np.concatenate([x[:half], x[-half:]], axis=1)


def _rank_normalise(x: np.ndarray) -> np.ndarray:
    ranks = stats.rankdata(x, axis=None).reshape(x.shape)
    return stats.norm.ppf((ranks - 0.375) / (x.size + 0.25))


def _rhat(x: np.ndarray) -> float:
    n = x.shape[0]
    within = x.var(axis=0, ddof=1).mean()
    between = n * x.mean(axis=0).var(ddof=1)
    return math.sqrt(((n - 1) / n * within + between / n) / within) if within > 0 else math.inf


def split_rhat(x: np.ndarray) -> Estimate:
    """Return the rank-normalised split R-hat of x [time, chain]: 1 when all halves of all chains agree.

    Equation: the larger of R-hat over rank-normalised half chains and over |x - median| of them
    (Vehtari et al., doi:10.1214/20-BA1221). Above 1.01 to 1.05 the chains have not mixed.
    """
    reason = check_series(x)
    if reason:
        return undefined(reason)
    halves = _split(x)
    bulk = _rhat(_rank_normalise(halves))
    folded_values = np.abs(halves - np.median(halves))
    # a two-valued series at p = 1/2 folds to a constant, which says nothing
    folded = _rhat(_rank_normalise(folded_values)) if np.ptp(folded_values) > 0 else 1.0
    value = max(bulk, folded)
    return Estimate(value=value) if math.isfinite(value) else undefined("no half chain moves")
