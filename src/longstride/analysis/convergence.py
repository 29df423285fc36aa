"""Means and quantiles with Monte Carlo standard errors, bulk and tail effective sizes, batch means, and R-hat."""

from __future__ import annotations

import math

import numpy as np
from scipy import fft, stats

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


def batch_means_size(x: np.ndarray) -> Estimate:
    """Return the effective sample size of x [time, chain] by batch means, an independent check of `effective_size`.

    Equation: N s^2 / (b v), s^2 the variance of all N samples, v the variance of the means of batches of b saves (as in
    `batch_means_error`); interval from the chi-square distribution of v. A batch shorter than some tau makes it too large.
    """
    error = batch_means_error(x)
    if error.value is None:
        return error
    n, chains = x.shape
    freedom = n // math.isqrt(n) * chains - 1
    if not error.value > 0:
        return undefined("all batch means are equal")
    size = float(x.var(ddof=1)) / error.value**2
    low, high = (float(point) / freedom for point in stats.chi2.ppf([0.025, 0.975], freedom))
    return Estimate(value=size, low=size * low, high=size * high)


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


def _split_size(halves: np.ndarray) -> float:
    """Return the effective sample size of half chains [time, chain] after Vehtari et al.: within and between chains."""
    n, _ = halves.shape
    centred = halves - halves.mean(axis=0)
    length = fft.next_fast_len(2 * n, real=True)
    spectrum = fft.rfft(centred, length, axis=0)
    covariance = fft.irfft((spectrum * spectrum.conj()).real, length, axis=0)[:n].mean(axis=1) / n
    within = covariance[0] * n / (n - 1)
    pooled = covariance[0] + float(halves.mean(axis=0).var(ddof=1))
    if not pooled > 0:
        return math.nan
    rho = 1 - (within - covariance) / pooled
    rho[0] = 1.0
    count = (n - 1) // 2
    pairs = rho[0 : 2 * count : 2] + rho[1 : 2 * count : 2]
    negative = np.nonzero(pairs <= 0)[0]
    kept = int(negative[0]) if len(negative) else count - 1
    tau = 2 * float(np.minimum.accumulate(pairs[:kept]).sum()) - 1 + max(float(rho[2 * kept]), 0.0)
    return halves.size / max(tau, 1 / math.log10(halves.size))


def bulk_size(x: np.ndarray) -> Estimate:
    """Return the bulk effective sample size of x [time, chain]: of the rank-normalised half chains.

    Equation: N / tau, tau = 1 + 2 sum_t rho(t) by Geyer's initial monotone sequence, rho(t) = 1 - (W - c(t)) / V with W the
    mean variance within half chains, c(t) their mean autocovariance and V = W (n-1)/n + variance of their means
    (Vehtari et al., doi:10.1214/20-BA1221). It is defined for values without a mean too. No interval.
    """
    reason = check_series(x)
    if reason:
        return undefined(reason)
    value = _split_size(_rank_normalise(_split(x)))
    return Estimate(value=value) if math.isfinite(value) else undefined("no half chain moves")


def quantile_size(x: np.ndarray, probability: float) -> Estimate:
    """Return the effective sample size of x [time, chain] for one quantile: of the indicator x <= quantile (same source)."""
    reason = check_series(x)
    if reason:
        return undefined(reason)
    inside = (x <= np.quantile(x, probability)).astype(float)
    if inside.min() == inside.max():
        return undefined("the quantile is the largest value")
    value = _split_size(_split(inside))
    return Estimate(value=value) if math.isfinite(value) else undefined("no half chain moves")


def tail_size(x: np.ndarray) -> Estimate:
    """Return the tail effective sample size of x [time, chain]: the smaller of those of its 5 % and 95 % quantiles."""
    ends = [quantile_size(x, probability) for probability in (0.05, 0.95)]
    values = [one.value for one in ends if one.value is not None]
    if len(values) < 2:
        return next(one for one in ends if one.value is None)
    return Estimate(value=min(values))


def _order_statistics(x: np.ndarray, probability: float, size: float, ends: tuple[float, float]) -> tuple[float, float]:
    places = stats.beta.ppf(ends, size * probability + 1, size * (1 - probability) + 1) * x.size - 1
    ordered = np.sort(x, axis=None)
    return float(ordered[math.floor(max(places[0], 0))]), float(ordered[math.ceil(min(places[1], x.size - 1))])


def quantile_error(x: np.ndarray, probability: float) -> Estimate:
    """Return the Monte Carlo standard error of a quantile of x [time, chain], unit of x.

    Equation: half the distance between the order statistics at the 16 % and 84 % points of Beta(S p + 1, S (1-p) + 1), S the
    effective size for that quantile (Vehtari et al., doi:10.1214/20-BA1221).
    """
    size = quantile_size(x, probability)
    if size.value is None:
        return size
    low, high = _order_statistics(x, probability, size.value, (0.1586553, 0.8413447))
    return Estimate(value=(high - low) / 2)


def quantile_estimate(x: np.ndarray, probability: float) -> Estimate:
    """Return a quantile of x [time, chain] with a 95 % interval, unit of x.

    Equation: the order statistics at the 2.5 % and 97.5 % points of Beta(S p + 1, S (1-p) + 1), as in `quantile_error`, but
    with S the geometric mean of the `effective_size` of the indicator x <= quantile and of the lower end of its interval: half
    chains of few correlation times make the other S so small that the interval covers 99 %.
    """
    reason = check_series(x)
    if reason:
        return undefined(reason)
    size = effective_size((x <= np.quantile(x, probability)).astype(float))
    if size.value is None or size.low is None:
        return size
    low, high = _order_statistics(x, probability, math.sqrt(size.value * size.low), (0.025, 0.975))
    return Estimate(value=float(np.quantile(x, probability)), low=low, high=high, note=size.note)
