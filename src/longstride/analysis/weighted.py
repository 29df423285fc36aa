"""Samples that carry weights (importance sampling, metadynamics, tempering): effective sizes, free energies, MBAR.

Log-weights are ln of anything proportional to target density over sampled density, [time, chain], without a unit. A weight of
zero is -inf; NaN and +inf are no weights, and what depends on them is undefined and says so.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import special, stats

from longstride.analysis.autocorrelation import check_series, effective_size
from longstride.analysis.bootstrap import multiplicities, unit_labels
from longstride.analysis.convergence import standard_error
from longstride.analysis.estimate import Estimate, undefined
from longstride.analysis.free_energy import FreeEnergy, from_probabilities
from longstride.errors import LongstrideError, NumericsError

if TYPE_CHECKING:
    from collections.abc import Iterator

CLIPPED_FRACTION = 0.002
GIANT_SHARE = 0.1


def check_weights(log_weights: np.ndarray) -> str:
    """Return why log-weights [...] cannot be used, or an empty string."""
    if not log_weights.size:
        return "no samples"
    if np.isnan(log_weights).any() or np.isposinf(log_weights).any():
        bad = int((np.isnan(log_weights) | np.isposinf(log_weights)).sum())
        return f"{bad} of {log_weights.size} log-weights are NaN or infinite"
    return "" if np.isfinite(log_weights).any() else "all weights are zero"


def normalised_weights(log_weights: np.ndarray) -> np.ndarray:
    """Return exp(log_weights) divided by its sum, same shape.

    Raises:
        NumericsError: NaN, +inf, or nothing but zeros.
    """
    reason = check_weights(log_weights)
    if reason:
        raise NumericsError(f"no weights: {reason}; leave those samples out or repair their energies")
    return np.exp(log_weights - special.logsumexp(log_weights))


@dataclass(frozen=True, kw_only=True)
class KishSize:
    """Effective number of weighted samples, as if they were independent.

    Attributes:
        size: (sum w)^2 / sum w^2 of all samples; None where undefined.
        fraction: the same over the number of samples.
        clipped: the same after the largest log-weights were dropped, as SBG and Prose report it. Dropping biases every average.
        clipped_fraction: `clipped` over the number of samples that are left.
        dropped: how many samples clipping drops.
        largest_share: the largest weight over the sum of all.
        note: what limits it; empty otherwise.
    """

    size: float | None
    fraction: float | None
    clipped: float | None
    clipped_fraction: float | None
    dropped: int
    largest_share: float | None
    note: str = ""


def _kish(log_weights: np.ndarray) -> float:
    return float(np.exp(2 * special.logsumexp(log_weights) - special.logsumexp(2 * log_weights)))


def kish_size(log_weights: np.ndarray, *, clip: float = CLIPPED_FRACTION) -> KishSize:
    """Return the effective sample size of Kish of log-weights of any shape, unclipped and clipped.

    Equation: (sum w)^2 / sum w^2 (Kish, Survey Sampling, 1965); clipped: without the samples whose log-weight lies above the
    (1 - clip) quantile (doi:10.48550/arXiv.2502.18462 drops 0.2 %). Correlation in time is not in it.

    Args:
        log_weights: of the samples.
        clip: fraction of samples to drop.

    Raises:
        LongstrideError: clip is not in [0, 1).
    """
    if not 0 <= clip < 1:
        raise LongstrideError(f"clip is {clip}, but the fraction of dropped samples must be at least 0 and below 1")
    flat = np.asarray(log_weights, dtype=float).ravel()
    reason = check_weights(flat)
    if reason:
        return KishSize(
            size=None, fraction=None, clipped=None, clipped_fraction=None, dropped=0, largest_share=None, note=reason
        )
    kept = flat[flat <= np.quantile(flat, 1 - clip, method="lower")]
    share = float(np.exp(flat.max() - special.logsumexp(flat)))
    size, clipped = _kish(flat), _kish(kept) if np.isfinite(kept).any() else None
    return KishSize(
        size=size,
        fraction=size / flat.size,
        clipped=clipped,
        clipped_fraction=None if clipped is None else clipped / kept.size,
        dropped=flat.size - kept.size,
        largest_share=share,
        note=_giant(share, flat.size),
    )


def _giant(share: float, count: int) -> str:
    return f"one sample of {count} carries {100 * share:.0f} % of the weight" if share > max(GIANT_SHARE, 2 / count) else ""


def weighted_free_energy(index: np.ndarray, log_weights: np.ndarray, *, bins: int, replicates: int, seed: int) -> FreeEnergy:
    """Return the free energy of weighted bin indices [time, chain] (1-D or flattened 2-D), errors by bootstrap.

    Equation: F_b = -ln sum_{s in b} w_s, lowest bin at 0, in kT; chains, or blocks of them, are drawn with replacement.
    With unusable weights every value is NaN and the note says why.

    Args:
        index: bin of every sample.
        log_weights: of every sample.
        bins: number of bins in all.
        replicates: bootstrap replicates.
        seed: of the bootstrap.
    """
    counts = np.bincount(index.ravel(), minlength=bins).astype(float)
    reason = check_weights(log_weights)
    if reason:
        nothing = np.full(bins, np.nan)
        return FreeEnergy(values=nothing, errors=nothing, counts=counts, note=reason)
    weights = normalised_weights(log_weights)
    labels = unit_labels(*index.shape)
    n_units = int(labels.max()) + 1
    flat = (labels * bins + index).ravel()
    table = np.bincount(flat, weights=weights.ravel(), minlength=n_units * bins).reshape(n_units, bins)
    drawn = multiplicities(n_units, replicates, np.random.default_rng(seed)) @ table
    total = drawn.sum(axis=1, keepdims=True)
    share = np.divide(drawn, total, out=np.zeros_like(drawn), where=total > 0)
    note = _giant(float(weights.max()), weights.size)
    return from_probabilities(table.sum(axis=0), share, counts, note, units=n_units)


def weighted_mean(x: np.ndarray, log_weights: np.ndarray) -> Estimate:
    """Return the weighted mean of x [time, chain] with a 95 % interval, unit of x.

    Equation: m = sum w x / sum w; its error is the Monte Carlo standard error of the mean of w (x - m) / <w> (delta method),
    which knows the correlation of values and weights in time. No interval where one sample carries much of the weight.
    """
    reason = check_weights(log_weights)
    if reason:
        return undefined(reason)
    if not np.isfinite(x).all():
        return undefined("not finite: some values are NaN or infinite")
    relative = normalised_weights(log_weights) * x.size
    mean = float((relative * x).mean())
    influence = relative * (x - mean)
    note = _giant(float(relative.max()) / x.size, x.size)
    if note:
        return Estimate(value=mean, note=f"no interval: {note}")
    reason = check_series(influence)
    if reason:
        return undefined(reason)
    error = standard_error(influence)
    if error.value is None:
        return Estimate(value=mean, note=f"no interval: {error.note}")
    size = max(float(influence.var(ddof=1)) / error.value**2, 2.0)
    half = float(stats.t.ppf(0.975, size - 1)) * error.value
    return Estimate(value=mean, low=mean - half, high=mean + half, note=error.note)


def weighted_size(x: np.ndarray, log_weights: np.ndarray) -> Estimate:
    """Return the effective sample size of weighted x [time, chain]: how many independent unweighted samples say as much.

    Equation: Var_w(x) / MCSE^2 with the error of `weighted_mean`, so weights and correlation in time both count, and their
    interplay (Kish's size knows the weights alone). Interval: of the correlation time of w (x - m). Undefined where one sample
    carries much of the weight.
    """
    reason = check_weights(log_weights) or check_series(x)
    if reason:
        return undefined(reason)
    relative = normalised_weights(log_weights) * x.size
    note = _giant(float(relative.max()) / x.size, x.size)
    if note:
        return undefined(note)
    centred = x - float((relative * x).mean())
    influence = relative * centred
    size = effective_size(influence)
    return size.scaled(float((relative * centred**2).mean() / influence.var())) if size.defined else size


def weighted_delta_f(indicator: np.ndarray, log_weights: np.ndarray) -> Estimate:
    """Return Delta F = -ln(p / (1 - p)) in kT of a weighted indicator [time, chain] of the second basin.

    Interval: as `free_energy.delta_f_chains`, from the Jeffreys Beta posterior with n pseudo-counts, n = p (1-p) / error^2
    with the error of `weighted_mean`. Undefined where a basin has no weight; no interval where one sample carries much of it.
    """
    inside = indicator.astype(float)
    share = weighted_mean(inside, log_weights)
    if share.value is None:
        return undefined("only one basin was visited" if share.note == "constant" else share.note)
    p = share.value
    if not 0 < p < 1:
        return undefined(f"the {'second' if p <= 0 else 'first'} basin has no weight")
    value = float(np.log((1 - p) / p))
    error = share.standard_error
    if not error:
        return Estimate(value=value, note=share.note or "no interval")
    count = min(p * (1 - p) / error**2, inside.size)
    low_p, high_p = stats.beta.ppf([0.025, 0.975], p * count + 0.5, (1 - p) * count + 0.5)
    low, high = (float(np.log((1 - q) / q)) for q in (high_p, low_p))
    return Estimate(value=value, low=low, high=high, note=share.note)


@dataclass(frozen=True, kw_only=True)
class MBARFreeEnergies:
    """Free energies of several states from samples of all of them.

    Attributes:
        values: [state] free energy relative to the first state, kT.
        errors: [state] standard error of the same, kT; 0 for the first, NaN for states without overlap.
        log_weights: [state, sample] ln of the weight with which a sample counts in each state; each row sums to 1.
        smallest_overlap: smallest overlap of neighbouring states, between 0 and 1/2 for two equal ones; None for one state.
        note: what limits it; empty otherwise.
    """

    values: np.ndarray
    errors: np.ndarray
    log_weights: np.ndarray
    smallest_overlap: float | None
    note: str = ""


def mbar_free_energies(u_kn: np.ndarray, n_k: np.ndarray, *, inefficiency: float = 1.0) -> MBARFreeEnergies:
    """Return free energies of states (umbrella windows, rungs of tempering) by MBAR, with pymbar.

    Equation: f_k = -ln sum_n exp(-u_kn) / sum_j N_j exp(f_j - u_jn), errors from the asymptotic covariance
    (Shirts and Chodera, doi:10.1063/1.2978177) times sqrt(inefficiency).

    Args:
        u_kn: [state, sample] reduced energies of every sample in every state, kT; their order does not matter.
        n_k: [state] number of samples from each state; 0 is allowed beyond the first.
        inefficiency: samples per independent sample (integrated autocorrelation time).

    Raises:
        LongstrideError: shapes or numbers do not fit together.
        NumericsError: an energy is NaN or -inf, or pymbar finds no solution.
    """
    u, n = np.asarray(u_kn, dtype=np.float64), np.asarray(n_k, dtype=np.int64)
    if u.ndim != 2 or n.shape != u.shape[:1] or int(n.sum()) != u.shape[1] or (n < 0).any() or inefficiency < 1:
        raise LongstrideError(
            f"MBAR wants energies [state, sample] with as many samples as n_k sums to and inefficiency >= 1, got {u.shape},"
            f" {n.tolist()} and {inefficiency}"
        )
    if np.isnan(u).any() or np.isneginf(u).any():
        raise NumericsError("MBAR: some reduced energies are NaN or -inf; leave those samples out")
    with _pymbar_on_numpy() as pymbar, np.errstate(invalid="ignore"):  # states without overlap have errors of NaN
        try:
            model = pymbar.MBAR(u, n, verbose=False)
            found = model.compute_free_energy_differences()
            overlap = np.asarray(model.compute_overlap()["matrix"])
        except (pymbar.utils.ParameterError, pymbar.utils.DataError, np.linalg.LinAlgError) as error:
            raise NumericsError(f"MBAR found no solution ({error}); do neighbouring states overlap?") from error
    with np.errstate(divide="ignore"):
        log_weights = np.log(np.asarray(model.W_nk).T)
    neighbours = np.diagonal(overlap, offset=1)
    smallest = float(neighbours.min()) if len(neighbours) else None
    note = "" if smallest is None or smallest > 0.03 else f"neighbouring states overlap by {smallest:.2g} only"
    return MBARFreeEnergies(
        values=np.asarray(found["Delta_f"])[0],
        errors=np.asarray(found["dDelta_f"])[0] * np.sqrt(inefficiency),
        log_weights=log_weights,
        smallest_overlap=smallest,
        note=note,
    )


@contextlib.contextmanager
def _pymbar_on_numpy() -> Iterator[Any]:
    """Give pymbar with its NumPy solvers: those on JAX would switch the JAX of a running FeNNol teacher to 64 bit."""
    if "pymbar" not in sys.modules:
        logger = logging.getLogger("pymbar")
        level, missing = logger.level, object()
        held = sys.modules.get("jax", missing)
        logger.setLevel(logging.ERROR)  # it recommends JAX at length
        sys.modules["jax"] = None  # type: ignore[assignment] # the import system's own way to say "not there"
        try:
            import pymbar
        finally:
            logger.setLevel(level)
            if held is missing:
                del sys.modules["jax"]
            else:
                sys.modules["jax"] = held  # type: ignore[assignment]
    import pymbar
    from pymbar import mbar_solvers

    if not mbar_solvers.use_jit:
        yield pymbar
        return
    # another package imported it with JAX before: 64 bit within this block only
    import jax

    with jax.enable_x64(True):  # noqa: FBT003 - JAX has no keyword for it
        yield pymbar
