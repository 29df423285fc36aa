"""Bootstrap over independent chains, over blocks of a few long ones, or over blocks as long as the correlation asks for."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy import stats

from longstride.analysis.autocorrelation import integrated_time
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


def block_length(tau: float, n_times: int, n_samples: int) -> int:
    """Return the block length in saves that is best for the variance of a mean under an integrated time tau in saves.

    Equation: b = (3/2 g^2 N)^(1/3) with g = sum |k| rho(k) / sum rho(k) = (tau^2 - 1) / (2 tau) for rho(k) decaying
    exponentially (circular blocks; Politis and White, doi:10.1081/ETC-120028836), at least 1 and at most a quarter of a chain.

    Args:
        tau: integrated autocorrelation time.
        n_times: saves per chain.
        n_samples: saves of all chains.
    """
    memory = max(tau**2 - 1, 0.0) / (2 * tau)
    best = math.ceil((1.5 * memory**2 * n_samples) ** (1 / 3))
    return max(1, min(best, n_times // 4))


def draw_blocks(
    n_times: int, n_chains: int, *, length: int, circular: bool, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return (times, chains), [sample] int each: the samples of one bootstrap replicate, in blocks of `length` saves.

    Blocks never join two chains. Circular blocks wrap around the end of their chain, so that every save is drawn as often
    as any other; moving blocks do not.
    """
    count = math.ceil(n_times * n_chains / length)
    chain = generator.integers(n_chains, size=count)
    start = generator.integers(n_times if circular else n_times - length + 1, size=count)
    times = (start[:, None] + np.arange(length)) % n_times
    return times.ravel(), np.repeat(chain, length)


def block_bootstrap(
    x: np.ndarray,
    statistic: Callable[[np.ndarray], float],
    *,
    replicates: int,
    seed: int,
    length: int | None = None,
    circular: bool = True,
) -> Estimate:
    """Return a statistic of correlated samples x [time, chain] with a 95 % interval by bootstrap over blocks of saves.

    Equation: value ± t_{0.975, B-1} s, s the standard deviation over replicates times (1 - g / b)^(-1/2), which gives back the
    correlation that is cut between blocks of b saves (g as in `block_length`); B blocks of data.
    Sources: Kunsch, doi:10.1214/aos/1176347265 (moving blocks), and `block_length`.

    Args:
        x: the samples.
        statistic: of samples [sample] in any order (mean, variance, quantile, Delta F).
        replicates: bootstrap replicates.
        seed: of the bootstrap.
        length: block length in saves; None takes `block_length` from the integrated time of x.
        circular: whether blocks wrap around the end of a chain.
    """
    tau = integrated_time(x)
    if tau.value is None:
        return tau
    n_times, n_chains = x.shape
    blocks = block_length(tau.value, n_times, x.size) if length is None else length
    if not 1 <= blocks <= n_times:
        return undefined(f"a block of {blocks} saves does not fit into chains of {n_times}")
    memory = max(tau.value**2 - 1, 0.0) / (2 * tau.value)
    count = x.size / blocks
    value = float(statistic(x.ravel()))
    if memory >= 0.5 * blocks or count < 4 or not math.isfinite(value):
        return Estimate(value=value if math.isfinite(value) else None, note="no interval: too few independent blocks")
    generator = np.random.default_rng(seed)
    draws = [
        statistic(x[draw_blocks(n_times, n_chains, length=blocks, circular=circular, generator=generator)])
        for _ in range(replicates)
    ]
    if not np.isfinite(draws).all():
        return Estimate(value=value, note="no interval: some bootstrap replicates are undefined")
    half = float(stats.t.ppf(0.975, count - 1) * np.std(draws, ddof=1)) / math.sqrt(1 - memory / blocks)
    return Estimate(value=value, low=value - half, high=value + half, note=tau.note)
