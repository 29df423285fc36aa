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


def tica_timescales(series: list[np.ndarray], *, lag: int, count: int) -> np.ndarray:
    """Return the `count` slowest TICA timescales, in frames, of PyEMMA; NaN where it has fewer.

    Args:
        series: [time, feature] arrays, one per trajectory.
        lag: lag time in frames.
        count: how many timescales.
    """
    pyemma = _import()
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        model = pyemma.coordinates.tica(series, lag=lag, dim=-1, kinetic_map=False, n_jobs=1)
        found = np.asarray(model.timescales, dtype=float)[:count]
    return np.pad(found, (0, count - len(found)), constant_values=np.nan)
