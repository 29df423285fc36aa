"""The whole Markov analysis of the reference by two estimators, and as JSON values and table rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from longstride.analysis import pyemma_bridge, tables
from longstride.analysis.estimate import Estimate, finite, undefined
from longstride.analysis.markov_model import (
    CK_LIMIT,
    CK_STEPS,
    POSTERIOR_SAMPLES,
    ChapmanKolmogorov,
    Macrostates,
    Posterior,
    Spread,
    bayesian_msm,
    bayesian_timescales,
    chapman_kolmogorov,
    macrostate_populations,
    mean_first_passage_times,
)
from longstride.errors import DataError
from longstride.seeds import job_seed

if TYPE_CHECKING:
    from pathlib import Path

TIMESCALES = 3


@dataclass(frozen=True, kw_only=True)
class MarkovAnalysis:
    """Kinetics of one set of trajectories of true dynamics at one lag, by deeptime and by PyEMMA.

    Attributes:
        spacing_ps: time between frames.
        lag: lag time of the model in frames.
        macrostates: its metastable sets.
        populations: [macrostate] with posterior intervals.
        passage: [from, to] mean first-passage times in frames.
        chapman_kolmogorov: the test at 1, 2, ... lags.
        timescales: lag in frames to the implied timescales, in frames.
        pyemma: what PyEMMA makes of the same trajectories.
    """

    spacing_ps: float
    lag: int
    macrostates: Macrostates
    populations: Spread
    passage: Spread
    chapman_kolmogorov: ChapmanKolmogorov
    timescales: dict[int, Spread]
    pyemma: pyemma_bridge.MarkovAnalysis

    @property
    def disagreement(self) -> float | None:
        """Largest relative difference of PyEMMA's populations, passage times and slow timescales, or None without PyEMMA.

        Only timescales above the lag count. A state in another macrostate shows as a difference of populations.
        """
        if self.pyemma.note:
            return None
        slow = self.timescales[self.lag].values > self.lag
        pairs = (
            (self.populations.values, self.pyemma.populations),
            (self.passage.values, self.pyemma.passage),
            (self.timescales[self.lag].values[slow], self.pyemma.timescales[slow]),
        )
        ours, theirs = (np.concatenate([np.ravel(pair[k]) for pair in pairs]) for k in (0, 1))
        both = np.isfinite(ours) & np.isfinite(theirs)
        return float((np.abs(ours - theirs)[both] / ours[both]).max()) if both.any() else None

    @property
    def states_in_common(self) -> float | None:
        """Share of the connected states that both estimators put into the same macrostate; None without PyEMMA."""
        if self.pyemma.note:
            return None
        here = self.macrostates.states
        return float((self.macrostates.of_state[here] == self.pyemma.of_state[here]).mean())


def require_physical_time(manifest: dict[str, Any]) -> None:
    """Refuse kinetics of anything but dynamics.

    Raises:
        DataError: the manifest says that the steps are not physical time.
    """
    if not manifest.get("physical_time", True):
        raise DataError(
            "timescales and passage times need dynamics: the steps of a Monte Carlo method are not physical time;"
            " compare ESS per second instead"
        )


def analyse_markov(
    paths: list[np.ndarray], found: Macrostates, *, lag: int, lags: list[int], spacing_ps: float, seed: int
) -> MarkovAnalysis | None:
    """Return posterior errors, test and passage times of discrete trajectories; None without a model at `lag`.

    Args:
        paths: discrete trajectories [time] int of true dynamics (`require_physical_time`).
        found: macrostates of the MSM at `lag`.
        lag: lag time of the model in frames.
        lags: further lags for the timescales, in frames.
        spacing_ps: time between frames.
        seed: of the posterior draws.
    """
    longest, n_states = max(len(path) for path in paths), len(found.of_state)
    multiples = [k * lag for k in range(1, CK_STEPS + 1) if longest >= 3 * k * lag]
    posteriors: dict[int, Posterior] = {}
    for one in sorted({*multiples, *(one for one in lags if longest >= 3 * one)}):
        posterior = bayesian_msm(
            paths, states=n_states, lag=one, seed=job_seed(seed, one), within=found.states, samples=POSTERIOR_SAMPLES
        )
        if posterior is not None:
            posteriors[one] = posterior
    if lag not in posteriors:
        return None
    test = chapman_kolmogorov([posteriors[one] for one in multiples if one in posteriors], found)
    return MarkovAnalysis(
        spacing_ps=spacing_ps,
        lag=lag,
        macrostates=found,
        populations=macrostate_populations(posteriors[lag], found),
        passage=mean_first_passage_times(posteriors[lag], found),
        chapman_kolmogorov=test,
        timescales={one: bayesian_timescales(posterior, count=TIMESCALES) for one, posterior in posteriors.items()},
        pyemma=pyemma_bridge.markov_analysis(
            paths,
            states=found.states,
            lag=lag,
            n_sets=found.n_states,
            steps=max(1, len(test.lags)),
            count=TIMESCALES,
            samples=POSTERIOR_SAMPLES,
        ),
    )


def circular_mean(angles: np.ndarray, weights: np.ndarray) -> float | None:
    """Return arg sum w exp(i angle) of angles [frame] rad in degrees, or None where no weight is left."""
    total = np.sum(weights * np.exp(1j * angles))
    return float(np.degrees(np.angle(total))) if np.abs(total) > 0 else None


def macrostate_rows(
    found: MarkovAnalysis, assigned: np.ndarray, angles: tuple[np.ndarray, np.ndarray] | None, weights: np.ndarray
) -> list[dict[str, Any]]:
    """Return one row per macrostate: population with its interval, entries, circular means of phi and psi.

    Args:
        found: the analysis.
        assigned: [frame] macrostate of every frame.
        angles: phi and psi [frame] rad, or None.
        weights: [frame] MSM weights.
    """
    rows = []
    for k, population in enumerate(found.populations.values):
        inside = weights * (assigned == k)
        means = [None, None] if angles is None else [circular_mean(one, inside) for one in angles]
        rows.append(
            {
                "index": k, "population": float(population), "low": finite(float(found.populations.low[k])),
                "high": finite(float(found.populations.high[k])), "entries": float(found.macrostates.entries[k]),
                "phi_deg": means[0], "psi_deg": means[1], "pyemma_population": finite(float(found.pyemma.populations[k])),
            }
        )  # fmt: skip
    return rows


def _test_rows(found: MarkovAnalysis) -> list[dict[str, Any]]:
    test, other = found.chapman_kolmogorov, found.pyemma
    if test.predicted is None or test.estimated is None:
        return []
    return [
        {
            "state": k, "k": step + 1, "lag_ps": lag * found.spacing_ps, "predicted": float(test.predicted.values[step, k]),
            "low": finite(float(test.predicted.low[step, k])), "high": finite(float(test.predicted.high[step, k])),
            "estimated": float(test.estimated.values[step, k]),
            "estimated_low": finite(float(test.estimated.low[step, k])),
            "estimated_high": finite(float(test.estimated.high[step, k])),
            "pyemma_predicted": finite(float(other.predicted[step, k])),
            "pyemma_estimated": finite(float(other.estimated[step, k])),
        }
        for k in range(found.macrostates.n_states)
        for step, lag in enumerate(test.lags)
    ]  # fmt: skip


def _test_json(test: ChapmanKolmogorov) -> dict[str, Any]:
    if test.passes is None:
        statement = test.note
    elif test.passes:
        statement = f"consistent with a Markov model at this lag: no difference above {CK_LIMIT:.0f} standard errors"
    else:
        statement = f"not Markovian at this lag: predictions differ by up to {test.largest_z:.1f} standard errors"
    return {
        "passes": test.passes, "largest_z": test.largest_z, "largest_difference": test.largest_difference,
        "statement": statement,
    }  # fmt: skip


def _passage_json(found: MarkovAnalysis) -> list[list[dict[str, Any]]]:
    unit, passage = found.spacing_ps, found.passage

    def cell(a: int, b: int) -> dict[str, Any]:
        one = undefined("the same macrostate")
        if a != b:
            value, low, high = (finite(float(part[a, b]) * unit) for part in (passage.values, passage.low, passage.high))
            one = undefined("never reached") if value is None else Estimate(value=value, low=low, high=high)
        other = found.pyemma.passage[a, b] if a != b else np.nan
        return {**one.to_json(), "pyemma": finite(float(other) * unit)}

    count = found.macrostates.n_states
    return [[cell(a, b) for b in range(count)] for a in range(count)]


def _timescale_rows(found: MarkovAnalysis) -> list[dict[str, Any]]:
    unit, rows = found.spacing_ps, []
    for lag, spread in sorted(found.timescales.items()):
        ends = (found.pyemma.low, found.pyemma.high) if lag == found.lag else (np.full(TIMESCALES, np.nan),) * 2
        parts = {"deeptime_ps": spread.values, "low_ps": spread.low, "high_ps": spread.high}
        parts |= {"pyemma_low_ps": ends[0], "pyemma_high_ps": ends[1]}
        rows.append({"lag_ps": lag * unit, **{key: [finite(float(one) * unit) for one in part] for key, part in parts.items()}})
    return rows


def markov_json(found: MarkovAnalysis | None, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the analysis adds to reference["msm"] of comparison.json; empty without an analysis.

    Args:
        found: the analysis, or None.
        rows: of `macrostate_rows`.
    """
    if found is None:
        return {}
    return {
        "macrostates": rows,
        "macrostates_note": found.macrostates.note,
        "chapman_kolmogorov": _test_rows(found),
        "chapman_kolmogorov_test": _test_json(found.chapman_kolmogorov),
        "mfpt_ps": _passage_json(found),
        "timescales_bayesian": _timescale_rows(found),
        "pyemma_note": found.pyemma.note,
        "pyemma_differs_by": found.disagreement,
        "pyemma_states_in_common": found.states_in_common,
    }


MACROSTATE_COLUMNS = ("index", "population", "low", "high", "entries", "phi_deg", "psi_deg", "pyemma_population")
PASSAGE_COLUMNS = ("from", "to", "mfpt_ps", "ci_low_ps", "ci_high_ps", "pyemma_ps")
TEST_COLUMNS = (
    "state", "k", "lag_ps", "predicted", "low", "high", "estimated", "estimated_low", "estimated_high", "pyemma_predicted",
    "pyemma_estimated",
)  # fmt: skip


def write_tables(msm: dict[str, Any], out: Path) -> list[str]:
    """Write macrostates.csv, mfpt.csv and chapman_kolmogorov.csv from reference["msm"] of a comparison; return their names."""
    passages = [
        {"from": a, "to": b, "mfpt_ps": one["value"], "ci_low_ps": one["low"], "ci_high_ps": one["high"]}
        | {"pyemma_ps": one["pyemma"]}
        for a, row in enumerate(msm.get("mfpt_ps", []))
        for b, one in enumerate(row)
        if a != b
    ]
    tables.write_csv(out / "macrostates.csv", MACROSTATE_COLUMNS, msm.get("macrostates", []))
    tables.write_csv(out / "mfpt.csv", PASSAGE_COLUMNS, passages)
    tables.write_csv(out / "chapman_kolmogorov.csv", TEST_COLUMNS, msm.get("chapman_kolmogorov", []))
    return ["macrostates.csv", "mfpt.csv", "chapman_kolmogorov.csv"]
