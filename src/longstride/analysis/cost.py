"""Effective samples per second, per energy call and per force call, over a panel of observables."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from longstride.analysis.autocorrelation import check_series, effective_size, timewarp_effective_size
from longstride.analysis.convergence import split_rhat
from longstride.analysis.estimate import Estimate, undefined
from longstride.analysis.features import Torsions, circular_feature_names, circular_features
from longstride.analysis.tica_msm import TICAModel


def panel(angles: np.ndarray, torsions: Torsions, tica: TICAModel | None) -> dict[str, np.ndarray]:
    """Return the observables whose worst ESS is quoted, each [time, chain].

    cos and sin of every phi and psi, the indicator phi >= 0 of every phi, and the slowest TICA component of the
    reference (TIC0) where there is one.

    Args:
        angles: [time, chain, torsion] rad.
        torsions: their names.
        tica: TICA of the reference, or None.
    """
    features = circular_features(angles)
    found = {name: features[..., k] for k, name in enumerate(circular_feature_names(torsions))}
    for k in torsions.phis:
        found[f"basin {torsions.names[k]}"] = (angles[..., k] >= 0).astype(float)
    if tica is not None:
        found["TIC0"] = tica.project(features)[..., 0]
    return found


@dataclass(frozen=True, kw_only=True)
class ObservableSize:
    """Effective size and convergence of one observable.

    Attributes:
        size: ESS over all chains.
        timewarp: ESS by the Timewarp definition.
        rhat: rank-normalised split R-hat.
    """

    size: Estimate
    timewarp: Estimate
    rhat: Estimate


def sizes(observables: dict[str, np.ndarray]) -> dict[str, ObservableSize]:
    """Return ESS, Timewarp's ESS and R-hat of every observable [time, chain]."""
    return {
        name: ObservableSize(size=effective_size(x), timewarp=timewarp_effective_size(x), rhat=split_rhat(x))
        for name, x in observables.items()
    }


def smallest_size(found: dict[str, ObservableSize], *, required: set[str]) -> tuple[Estimate, str]:
    """Return the smallest ESS over the panel and the name of its observable.

    Args:
        found: the panel.
        required: observables that move in the baseline. If one of them is undefined here (the method never left a basin,
            say), the minimum over the others would flatter the method, so the answer is undefined.
    """
    if not found:
        return undefined("no torsions to judge by"), ""
    for name in sorted(required & found.keys()):
        if not found[name].size.defined:
            return undefined(f"{name}: {found[name].size.note}"), name
    defined = {name: entry.size for name, entry in found.items() if entry.size.value is not None}
    if not defined:
        return undefined(next(iter(found.values())).size.note), ""
    worst = min(defined, key=lambda name: (defined[name].value or 0.0, name))
    return defined[worst], worst


def moving(observables: dict[str, np.ndarray]) -> set[str]:
    """Return the names of the observables that vary over all chains together (constant ones are left out)."""
    return {name for name, x in observables.items() if check_series(x) in ("", "no chain moves")}


def per_unit(size: Estimate, amount: float | None, unit: str) -> Estimate:
    """Return ESS per unit of cost; undefined where the amount is unknown or zero."""
    if not amount or amount <= 0:
        return undefined(f"no {unit} recorded")
    return size.scaled(1 / amount)


def dynamics_rate(timescale_ps: Estimate, throughput_ps_per_s: float | None) -> Estimate:
    """Return the ESS per second of MD on its slowest process, from the MSM instead of from autocorrelation.

    Equation: a process that relaxes as exp(-t / t2) yields one effective sample per 2 t2 of simulated time, so
    ESS/s = throughput / (2 t2). Usable where direct MD is too short to resolve its own slowest correlation.

    Args:
        timescale_ps: slowest implied timescale t2 in ps.
        throughput_ps_per_s: simulated ps per second of wall time, all trajectories together.
    """
    t2 = timescale_ps
    if t2.value is None or not throughput_ps_per_s:
        return undefined(t2.note or "no throughput recorded")
    rate = throughput_ps_per_s / 2
    return Estimate(
        value=rate / t2.value, low=None if t2.high is None else rate / t2.high, high=None if not t2.low else rate / t2.low
    )
