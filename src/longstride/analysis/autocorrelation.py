"""Autocorrelation of chains: integrated time, effective sample size, and Timewarp's own definition of it.

All functions take x [time, chain]. Chains are pooled with one common mean, so chains that sit in different
basins count as correlated with themselves for ever, as they should.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import fft, stats

from longstride.analysis.estimate import Z95, Estimate, undefined

MIN_SAVES = 8
LARGEST_LOG = 300.0  # a spread beyond exp(300) is no number any more


def check_series(x: np.ndarray) -> str:
    """Return why no correlation can be estimated from x [time, chain], or an empty string.

    Reasons: not finite, too short, constant, or no chain that moves.
    """
    if x.ndim != 2:
        return f"expected [time, chain], got {x.ndim} axes"
    if x.shape[0] < MIN_SAVES or x.shape[1] < 1:
        return f"too short: {x.shape[0]} saves, at least {MIN_SAVES} are needed"
    if not np.isfinite(x).all():
        return "not finite: some values are NaN or infinite"
    scale = max(float(np.abs(x).max()), 1e-300)
    if float(np.ptp(x)) <= 1e-12 * scale:
        return "constant"
    if float(np.ptp(x, axis=0).max()) <= 1e-12 * scale:
        return "no chain moves"
    return ""


def autocovariance(x: np.ndarray) -> np.ndarray:
    """Return the autocovariance of x [time, chain] at lags 0 .. time-1, pooled over chains, [lag].

    Equation: c(t) = 1/(M (n-t)) sum_m sum_s (x_{s,m} - mean)(x_{s+t,m} - mean) with the mean of all chains.
    Dividing by n-t (not n) keeps short chains unbiased; many chains tame the noise at long lags.
    """
    n = x.shape[0]
    centred = x - x.mean()
    size = fft.next_fast_len(2 * n, real=True)
    spectrum = fft.rfft(centred, size, axis=0)
    products = fft.irfft((spectrum * spectrum.conj()).real, size, axis=0)[:n]
    return products.mean(axis=1) / (n - np.arange(n))


def autocorrelation(x: np.ndarray) -> np.ndarray:
    """Return the normalised autocorrelation of x [time, chain], [lag]; rho(0) = 1. NaN where undefined."""
    if check_series(x):
        return np.full(x.shape[0], np.nan)
    covariance = autocovariance(x)
    return covariance / covariance[0]


def _initial_monotone(rho: np.ndarray) -> tuple[float, int]:
    even = len(rho) // 2 * 2
    pairs = rho[0:even:2] + rho[1:even:2]
    negative = np.nonzero(pairs <= 0)[0]
    kept = np.minimum.accumulate(pairs[: negative[0] if len(negative) else len(pairs)])
    return float(2 * kept.sum() - 1), 2 * len(kept)


def integrated_time(x: np.ndarray) -> Estimate:
    """Return the integrated autocorrelation time of x [time, chain] in units of saves, with a 95 % interval.

    Equation: tau = 1 + 2 sum_t rho(t), summed by Geyer's initial monotone sequence over pairs
    rho(2k) + rho(2k+1) (doi:10.1214/ss/1177011137). Interval: log-normal with the relative variance
    4 (W + 1/2 - tau/2) / N + max(kappa, 0) tau / N of a sum cut at W lags over N = time * chain samples. The first term is
    Wolff's for Gaussian series (doi:10.1016/S0010-4655(03)00467-3). The second, kappa the excess kurtosis of x, is what few
    large excursions add that come and go as a whole: for a process that jumps between two values, kappa = 1/(p q) - 6, it makes
    the sum the variance that counting its jumps gives, (p^2 + q^2) tau / (2 p q N), plus the cost of a sum that does
    not know the model.
    """
    reason = check_series(x)
    if reason:
        return undefined(reason)
    tau, window = _initial_monotone(autocorrelation(x))
    if not tau > 0:  # a strictly alternating chain: the sum is not resolved
        return undefined("anticorrelated beyond resolution")
    variance = (4 * max(window + 0.5 - tau / 2, 0.5) + max(float(stats.kurtosis(x, axis=None)), 0.0) * tau) / x.size
    spread = math.exp(min(Z95 * math.sqrt(variance), LARGEST_LOG))
    note = "unresolved: the correlation does not decay within a chain" if window >= x.shape[0] - 1 else ""
    return Estimate(value=tau, low=tau / spread, high=tau * spread, note=note)


def effective_size(x: np.ndarray) -> Estimate:
    """Return the effective sample size of x [time, chain], pooled over chains, with a 95 % interval.

    Equation: ESS = N / tau, N = time * chain. Repeated states after rejections must be in x.
    """
    tau = integrated_time(x)
    if tau.value is None or tau.low is None or tau.high is None:
        return tau
    return Estimate(value=x.size / tau.value, low=x.size / tau.high, high=x.size / tau.low, note=tau.note)


def timewarp_effective_size(x: np.ndarray) -> Estimate:
    """Return the effective sample size as the Timewarp paper defines it, summed over chains.

    Equation: per sample 1 / (-1 + 2 sum_{t < t0} |rho(t)|), t0 the first lag with rho <= 0 (doi:10.48550/arXiv.2302.01170).
    Kept for comparison with published numbers; it has no interval.
    """
    reason = check_series(x)
    if reason:
        return undefined(reason)
    rho = autocorrelation(x)
    stop = np.nonzero(rho <= 0)[0]
    cut = int(stop[0]) if len(stop) else len(rho)
    return Estimate(value=x.size / float(2 * np.abs(rho[:cut]).sum() - 1))
