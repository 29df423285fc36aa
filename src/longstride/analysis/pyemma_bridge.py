"""PyEMMA as a second estimator: the only module that touches it.

PyEMMA 2.5.12 is no longer maintained. It reads numpy names that numpy 2 removed; `_import` puts them back before
the first import, and every call runs with one job. Since 2.5.10 PyEMMA's Markov models call deeptime's numerics, so
agreement checks counting, connectivity and conventions rather than the linear algebra.
"""

from __future__ import annotations

import functools
import io
import logging
import logging.config
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

if TYPE_CHECKING:
    from types import ModuleType

_REMOVED: dict[str, Any] = {
    "NAN": np.nan, "NaN": np.nan, "Inf": np.inf, "infty": np.inf, "product": np.prod, "in1d": np.isin, "float_": np.float64,
    "complex_": np.complex128, "alltrue": np.all, "sometrue": np.any, "row_stack": np.vstack, "trapz": np.trapezoid,
}  # fmt: skip


@functools.cache
def _import() -> ModuleType:
    for name, value in _REMOVED.items():
        if name not in np.__dict__:
            setattr(np, name, value)
    # PyEMMA configures logging anew when it is imported, which closes the handlers of all other libraries: one of absl (jax's
    # libraries) then closes the process's standard error
    no_logging = mock.patch("logging.config.dictConfig", return_value=None)
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()), no_logging:
        warnings.simplefilter("ignore")
        import pyemma
        import pyemma.coordinates
        import pyemma.msm
    pyemma.config.show_progress_bars = False
    pyemma.config.mute = True
    logging.getLogger("pyemma").setLevel(logging.ERROR)
    return pyemma


def version() -> str:
    """Return PyEMMA's version."""
    return str(_import().__version__)


def msm_timescales(paths: list[np.ndarray], *, lag: int, count: int) -> np.ndarray:
    """Return the `count` slowest implied timescales, in frames, of PyEMMA's reversible MSM; NaN where it has fewer.

    Args:
        paths: discrete trajectories, one int array each.
        lag: lag time in frames.
        count: how many timescales.
    """
    pyemma = _import()
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        model = pyemma.msm.estimate_markov_model([np.asarray(path, dtype=np.int32) for path in paths], lag=lag)
        found = np.asarray(model.timescales(), dtype=float)[:count]
    return np.pad(found, (0, count - len(found)), constant_values=np.nan)


def tica_timescales(series: list[np.ndarray], *, lag: int, count: int, koopman: bool = True) -> np.ndarray:
    """Return the `count` slowest TICA timescales, in frames, of PyEMMA; NaN where it has fewer.

    Args:
        series: [time, feature] arrays, one per trajectory.
        lag: lag time in frames.
        count: how many timescales.
        koopman: whether to weight frames to equilibrium.
    """
    pyemma = _import()
    weights = "koopman" if koopman else "empirical"
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        model = pyemma.coordinates.tica(series, lag=lag, dim=-1, kinetic_map=False, weights=weights, n_jobs=1)
        found = np.asarray(model.timescales, dtype=float)[:count]
    return np.pad(found, (0, count - len(found)), constant_values=np.nan)


@dataclass(frozen=True, kw_only=True)
class MarkovAnalysis:
    """PyEMMA's own analysis of discrete trajectories at one lag; all NaN where `note` says why there is none.

    Attributes:
        of_state: [state] its PCCA+ macrostate of every state, the most populated first; -1 outside its connected set.
        populations: [macrostate] stationary probabilities.
        passage: [from, to] mean first-passage times in frames, NaN on the diagonal.
        predicted: [step, macrostate] staying probabilities after k lags, from the model.
        estimated: [step, macrostate] the same, estimated at k lags.
        timescales: [timescale] implied timescales in frames.
        low: 2.5 % percentiles of its Bayesian timescales.
        high: 97.5 % percentiles.
        note: why there is nothing; empty otherwise.
    """

    of_state: np.ndarray
    populations: np.ndarray
    passage: np.ndarray
    predicted: np.ndarray
    estimated: np.ndarray
    timescales: np.ndarray
    low: np.ndarray
    high: np.ndarray
    note: str = ""


def markov_analysis(
    paths: list[np.ndarray], *, states: np.ndarray, lag: int, n_sets: int, steps: int, count: int, samples: int
) -> MarkovAnalysis:
    """Repeat MSM, PCCA+, first-passage times, Chapman-Kolmogorov test and Bayesian timescales with PyEMMA.

    Its Bayesian model counts every lag-th frame only ("sample"), which like sliding counts over the lag are independent.

    Args:
        paths: discrete trajectories, one int array each.
        states: the states that the other estimator connects; PyEMMA must find the same.
        lag: lag time in frames.
        n_sets: number of macrostates, 1 for none.
        steps: multiples of the lag that are tested, the first is one.
        count: number of timescales.
        samples: draws of the Bayesian model.
    """
    pyemma = _import()
    discrete = [np.asarray(path, dtype=np.int32) for path in paths]
    n_states = int(max(path.max() for path in discrete)) + 1
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        model = pyemma.msm.estimate_markov_model(discrete, lag=lag)
        if not np.array_equal(np.sort(model.active_set), np.sort(states)):
            return _nothing(n_states, n_sets, steps, count, note=f"PyEMMA connects {len(model.active_set)} states, not these")
        order, of_state = np.zeros(1, dtype=int), np.full(n_states, -1, dtype=np.int64)
        of_state[model.active_set] = 0
        passage, predicted, estimated = np.full((1, 1), np.nan), np.ones((steps, 1)), np.ones((steps, 1))
        if n_sets > 1:
            model.pcca(n_sets)
            sets = model.metastable_sets
            order = np.argsort([-model.pi[part].sum() for part in sets], kind="stable")
            for k, part in enumerate(order):
                of_state[model.active_set[sets[part]]] = k
            passage = np.array([[np.nan if a == b else model.mfpt(sets[a], sets[b]) for b in order] for a in order])
        if n_sets > 1 and steps > 1:
            test = model.cktest(n_sets, mlags=list(range(1, steps + 1)), show_progress=False, n_jobs=1)
            found = np.array(test.predictions), np.array(test.estimates)
            predicted, estimated = (part[-steps:, order, order] for part in found)
        draws = pyemma.msm.bayesian_markov_model(discrete, lag=lag, nsamples=samples, count_mode="sample", show_progress=False)
        low, high = (np.asarray(end, dtype=float)[:count] for end in draws.sample_conf("timescales"))
        timescales = np.asarray(model.timescales(), dtype=float)[:count]
        populations = np.array([model.pi[of_state[model.active_set] == k].sum() for k in range(len(order))])
    wide = [np.pad(part, (0, count - len(part)), constant_values=np.nan) for part in (timescales, low, high)]
    return MarkovAnalysis(
        of_state=of_state, populations=populations, passage=passage, predicted=predicted, estimated=estimated,
        timescales=wide[0], low=wide[1], high=wide[2],
    )  # fmt: skip


def _nothing(n_states: int, n_sets: int, steps: int, count: int, *, note: str) -> MarkovAnalysis:
    empty = np.full(count, np.nan)
    return MarkovAnalysis(
        of_state=np.full(n_states, -1, dtype=np.int64), populations=np.full(n_sets, np.nan),
        passage=np.full((n_sets, n_sets), np.nan), predicted=np.full((steps, n_sets), np.nan),
        estimated=np.full((steps, n_sets), np.nan), timescales=empty, low=empty, high=empty, note=note,
    )  # fmt: skip
