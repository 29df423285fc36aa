"""Effective samples per second, per call and per core-hour, over a panel of observables, with training shared or not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from longstride.analysis.autocorrelation import check_series, effective_size, timewarp_effective_size
from longstride.analysis.convergence import batch_means_size, bulk_size, split_rhat, tail_size
from longstride.analysis.estimate import Estimate, undefined
from longstride.analysis.features import Torsions, circular_feature_names, circular_features
from longstride.analysis.tica_msm import TICAModel
from longstride.analysis.weighted import weighted_size

PANEL_TICS = 3


@dataclass(frozen=True, kw_only=True)
class StatePaths:
    """Which macrostate every sample is in.

    Attributes:
        index: [time, chain] int; negative where a sample belongs to none.
        count: number of macrostates, visited or not.
    """

    index: np.ndarray
    count: int


def panel(
    angles: np.ndarray, torsions: Torsions, tica: TICAModel | None, macrostates: StatePaths | None = None
) -> dict[str, np.ndarray]:
    """Return the observables whose worst ESS is quoted, each [time, chain].

    cos and sin of every phi and psi, the indicator phi >= 0 of every phi, the slowest TICA components of the reference
    (TIC0 to TIC2) and the indicators of its macrostates, where there are any.

    Args:
        angles: [time, chain, torsion] rad.
        torsions: their names.
        tica: TICA of the reference, or None.
        macrostates: of the samples, by the reference's assignment, or None.
    """
    features = circular_features(angles)
    found = {name: features[..., k] for k, name in enumerate(circular_feature_names(torsions))}
    for k in torsions.phis:
        found[f"basin {torsions.names[k]}"] = (angles[..., k] >= 0).astype(float)
    if tica is not None:
        projected = tica.project(features)
        found |= {f"TIC{k}": projected[..., k] for k in range(min(PANEL_TICS, projected.shape[-1]))}
    if macrostates is not None and macrostates.count > 1:
        # the indicators sum to one: of two states one is enough
        states = range(macrostates.count) if macrostates.count > 2 else range(1)
        found |= {f"macrostate {k}": (macrostates.index == k).astype(float) for k in states}
    return found


@dataclass(frozen=True, kw_only=True)
class ObservableSize:
    """Effective size and convergence of one observable.

    Attributes:
        size: ESS over all chains.
        timewarp: ESS by the Timewarp definition.
        rhat: rank-normalised split R-hat.
        bulk: bulk ESS, rank-normalised.
        tail: tail ESS, of the 5 % and 95 % quantiles.
        batches: ESS by batch means.
    """

    size: Estimate
    timewarp: Estimate
    rhat: Estimate
    bulk: Estimate
    tail: Estimate
    batches: Estimate


def sizes(observables: dict[str, np.ndarray], log_weights: np.ndarray | None = None) -> dict[str, ObservableSize]:
    """Return ESS by every definition and R-hat of every observable [time, chain].

    Of weighted samples only the ESS that knows the weights is defined; their R-hat is that of the biased chains.
    """
    if log_weights is not None:
        unknown = undefined("not defined for weighted samples")
        return {
            name: ObservableSize(
                size=weighted_size(x, log_weights), timewarp=unknown, rhat=split_rhat(x), bulk=unknown, tail=unknown,
                batches=unknown,
            )
            for name, x in observables.items()
        }  # fmt: skip
    return {
        name: ObservableSize(
            size=effective_size(x), timewarp=timewarp_effective_size(x), rhat=split_rhat(x),
            bulk=bulk_size(x), tail=tail_size(x), batches=batch_means_size(x),
        )
        for name, x in observables.items()
    }  # fmt: skip


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


def core_hours(sampling_s: float | None, cores: float | None) -> float | None:
    """Return cores times hours of sampling, or None where either was not recorded."""
    return sampling_s * cores / 3600 if sampling_s and cores else None


def amortised_rate(size: Estimate, *, sampling_s: float | None, preparation_s: float | None, peptides: float) -> Estimate:
    """Return the ESS per second with training and data shared by a number of peptides.

    Equation: r = ESS / (t_sampling + P / n).

    Args:
        size: ESS on one peptide.
        sampling_s: wall seconds of its sampling.
        preparation_s: wall seconds P of training and data, once for all peptides.
        peptides: how many peptides n share them.
    """
    if not sampling_s or preparation_s is None:
        return undefined("the cost of training and data was not recorded" if sampling_s else "no sampling time recorded")
    return size.scaled(1 / (sampling_s + preparation_s / peptides))


def break_even_peptides(method: Estimate, plain: Estimate, *, preparation_s: float | None, samples: float) -> Estimate:
    """Return after how many peptides a trained method has cost less than plain dynamics.

    Equation: n = P / (S / r_plain - S / r_method), S effective samples wanted per peptide, r in ESS per second, P the seconds
    of training and data. The interval takes the fastest of one with the slowest of the other, so it is wide on purpose; an
    end is None where the method may never pay back.

    Args:
        method: ESS/s of the method, sampling alone.
        plain: ESS/s of plain dynamics on the same target and machine.
        preparation_s: P, or None where it was not recorded.
        samples: S.
    """
    if preparation_s is None:
        return undefined("the cost of training and data was not recorded")
    if not method.value or not plain.value:
        return undefined(method.note or plain.note or "a rate is undefined")

    def count(ours: float | None, theirs: float | None) -> float | None:
        if not ours or not theirs or ours <= theirs:
            return None
        return preparation_s / (samples / theirs - samples / ours)

    value = count(method.value, plain.value)
    if value is None:
        return undefined("never: plain dynamics is faster")
    return Estimate(value=value, low=count(method.high, plain.low), high=count(method.low, plain.high))
