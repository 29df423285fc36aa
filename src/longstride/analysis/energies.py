"""Potential-energy distributions, their distance from a baseline, and kinetic temperatures."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from longstride.analysis.autocorrelation import effective_size
from longstride.analysis.convergence import mean_estimate
from longstride.analysis.estimate import Estimate
from longstride.analysis.weighted import check_weights, normalised_weights, weighted_mean, weighted_size
from longstride.units import BOLTZMANN_KJ_PER_MOL_K

KS_95 = 1.3581  # the 95 % point of the Kolmogorov distribution


def ks_distance(
    x: np.ndarray, y: np.ndarray, y_weights: np.ndarray | None = None, x_weights: np.ndarray | None = None
) -> float:
    """Return the Kolmogorov-Smirnov distance max |F_x - F_y| of two samples; both may carry weights summing to 1."""
    grid = np.concatenate([x.ravel(), y.ravel()])
    return float(np.abs(_distribution(x, x_weights, grid) - _distribution(y, y_weights, grid)).max())


def _distribution(x: np.ndarray, weights: np.ndarray | None, grid: np.ndarray) -> np.ndarray:
    """Return the (weighted) empirical distribution function of x at the points of a grid."""
    if weights is None:
        return np.searchsorted(np.sort(x, axis=None), grid, side="right") / x.size
    order = np.argsort(x, axis=None, kind="stable")
    steps = np.concatenate([[0.0], np.cumsum(weights.ravel()[order])])
    return steps[np.searchsorted(x.ravel()[order], grid, side="right")]


@dataclass(frozen=True, kw_only=True)
class EnergyComparison:
    """How a method's potential energy compares with the baseline of the same target.

    Attributes:
        mean: mean energy in kJ/mol with interval.
        difference: mean minus the baseline mean in kJ/mol with interval.
        ks: Kolmogorov-Smirnov distance, or None.
        ks_noise: the distance that equal distributions stay below in 95 % of cases at these effective sizes, or None.
        statement: one line for people.
    """

    mean: Estimate
    difference: Estimate
    ks: float | None
    ks_noise: float | None
    statement: str


def _difference(a: Estimate, b: Estimate) -> Estimate:
    if a.value is None or b.value is None:
        return Estimate(value=None, note=a.note or b.note)
    error = math.hypot(a.standard_error or math.inf, b.standard_error or math.inf)
    value = a.value - b.value
    if not math.isfinite(error):
        return Estimate(value=value, note="no interval")
    return Estimate(value=value, low=value - 1.96 * error, high=value + 1.96 * error)


def compare_energies(
    x: np.ndarray,
    baseline: np.ndarray | None,
    baseline_weights: np.ndarray | None = None,
    log_weights: np.ndarray | None = None,
) -> EnergyComparison:
    """Compare energies x [time, chain] kJ/mol with a baseline [time, chain] of the same target.

    Args:
        x: the method's potential energies.
        baseline: the baseline's, or None where there is none.
        baseline_weights: [time, chain] weights of the baseline, summing to 1 (MSM weights), or None.
        log_weights: [time, chain] ln of the method's weights, or None.
    """
    mean = mean_estimate(x) if log_weights is None else weighted_mean(x, log_weights)
    nothing = Estimate(value=None, note="no baseline for this target")
    if baseline is None:
        return EnergyComparison(mean=mean, difference=nothing, ks=None, ks_noise=None, statement="no baseline")
    if not np.isfinite(x).all():
        return EnergyComparison(
            mean=mean, difference=nothing, ks=None, ks_noise=None, statement="undefined: some energies are not finite"
        )
    base = mean_estimate(baseline)
    if baseline_weights is not None and base.value is not None:
        shift = float((baseline * baseline_weights).sum()) - base.value
        base = Estimate(
            value=base.value + shift,
            low=None if base.low is None else base.low + shift,
            high=None if base.high is None else base.high + shift,
        )
    usable = log_weights is None or not check_weights(log_weights)
    own = None if log_weights is None or not usable else normalised_weights(log_weights)
    distance = ks_distance(x, baseline, baseline_weights, own) if usable else None
    size = effective_size(x) if log_weights is None else weighted_size(x, log_weights)
    sizes = size.value, effective_size(baseline).value
    if sizes[0] is None or sizes[1] is None or distance is None:
        statement = "the effective sizes are undefined, so agreement cannot be judged"
        return EnergyComparison(mean=mean, difference=_difference(mean, base), ks=distance, ks_noise=None, statement=statement)
    noise = KS_95 * math.sqrt((sizes[0] + sizes[1]) / (sizes[0] * sizes[1]))
    statement = (
        "same distribution as far as these samples can tell" if distance <= noise else "differs beyond the 95 % noise level"
    )
    return EnergyComparison(
        mean=mean, difference=_difference(mean, base), ks=distance, ks_noise=min(noise, 1.0), statement=statement
    )


def kinetic_temperature(velocities: np.ndarray, masses: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Return the kinetic temperature in K of some atoms at every save, [time, chain].

    Equation: T = sum_i m_i |v_i - v_com|^2 / (3 k_B sum_i (1 - m_i / M)) over the members i, which is unbiased with and
    without motion of the centre of mass.

    Args:
        velocities: [time, chain, atom, 3] nm/ps.
        masses: [atom] Da, the masses used in the dynamics.
        members: [atom] bool.
    """
    share = masses / masses.sum()
    centre = np.einsum("...ax,a->...x", velocities.astype(np.float64), share)
    relative = velocities[..., members, :] - centre[..., None, :]
    twice_kinetic = np.einsum("...ax,...ax,a->...", relative, relative, masses[members])
    return twice_kinetic / (3 * BOLTZMANN_KJ_PER_MOL_K * (1 - share[members]).sum())
