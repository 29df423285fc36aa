"""Velocity autocorrelation, its power spectrum, and infrared spectra, with errors over replicas and blocks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from longstride.analysis.block_statistics import Observable
from longstride.analysis.observables import chains_of, per_block
from longstride.analysis.resonance import LIGHT_CM_PER_PS
from longstride.errors import DataError, LongstrideError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longstride.analysis.block_statistics import Block, Reduction
    from longstride.analysis.dynamics_run import DynamicsRun

CHUNK = 4096  # columns per Fourier transform


def lagged_products(x: np.ndarray, n_lags: int) -> np.ndarray:
    """Return sum_c <x_c(s) x_c(s + t)>_s of x [frame, ...] at lags 0 .. n_lags - 1, [lag]; no mean is removed.

    The sum is over all trailing axes, the mean over the frames that have a partner at that lag.
    """
    from scipy import fft

    n = len(x)
    flat = x.reshape(n, -1)
    size = fft.next_fast_len(2 * n, real=True)
    total = np.zeros(n_lags)
    for start in range(0, flat.shape[1], CHUNK):
        spectrum = fft.rfft(flat[:, start : start + CHUNK].astype(np.float64), size, axis=0)
        total += fft.irfft((spectrum.real**2 + spectrum.imag**2).sum(axis=1), size)[:n_lags]
    return total / (n - np.arange(n_lags))


def lags_within(run: DynamicsRun, max_lag_ps: float) -> int:
    """Return the number of lags 0 .. max_lag_ps in frames.

    Raises:
        LongstrideError: the run is shorter than that, or saves less often.
    """
    n_lags = math.floor(max_lag_ps / run.save_interval_ps + 1e-6) + 1
    if n_lags < 3 or n_lags > run.n_frames:
        raise LongstrideError(
            f"{run.label}: lags up to {max_lag_ps:g} ps are {n_lags} frames of {run.n_frames}; use another longest lag or save"
            f" more often"
        )
    return n_lags


def largest_wavenumber(save_interval_ps: float) -> float:
    """Return the Nyquist wavenumber 1 / (2 c dt) in 1/cm: frames every 4 fs resolve up to 4170 1/cm."""
    return 1 / (2 * LIGHT_CM_PER_PS * save_interval_ps)


def cosine_transform(n_lags: int, save_interval_ps: float, wavenumbers: np.ndarray, *, window: str = "hann") -> np.ndarray:
    """Return the matrix [lag, wavenumber] cm that turns C(t) into a one-sided spectrum S per 1/cm.

    Equation: S(nu) = 4 c int_0^t_max C(t) w(t) cos(2 pi c nu t) dt by the trapezoidal rule, so that int_0^inf S dnu = C(0).

    Args:
        n_lags: lags of C.
        save_interval_ps: between them.
        wavenumbers: [wavenumber] 1/cm.
        window: "hann" (cos^2, zero at the last lag) or "none".

    Raises:
        LongstrideError: a wavenumber beyond Nyquist, or an unknown window.
    """
    limit = largest_wavenumber(save_interval_ps)
    if wavenumbers.max() > limit * (1 + 1e-9):
        raise LongstrideError(
            f"frames every {save_interval_ps * 1e3:g} fs resolve wavenumbers up to {limit:.0f} 1/cm, not"
            f" {wavenumbers.max():.0f}; save more often"
        )
    if window not in ("hann", "none"):
        raise LongstrideError(f"unknown window {window!r}; use hann or none")
    steps = np.arange(n_lags)
    weights = np.full(n_lags, save_interval_ps)
    weights[[0, -1]] /= 2
    if window == "hann":
        weights = weights * np.cos(0.5 * np.pi * steps / (n_lags - 1)) ** 2
    phase = 2 * np.pi * LIGHT_CM_PER_PS * save_interval_ps * np.outer(steps, wavenumbers)
    return 4 * LIGHT_CM_PER_PS * weights[:, None] * np.cos(phase)


def normalised(statistics: np.ndarray) -> np.ndarray:
    """Return C(t) / C(0) of [..., lag]."""
    return statistics / statistics[..., :1]


def _spectrum(transform: np.ndarray, *, unit_area: bool) -> Reduction:
    def reduction(statistics: np.ndarray) -> np.ndarray:
        return (normalised(statistics) if unit_area else statistics) @ transform

    return reduction


def velocity_spectra(
    run: DynamicsRun, blocks: Sequence[Block], *, max_lag_ps: float, wavenumbers: np.ndarray, window: str = "hann"
) -> list[Observable]:
    """Return the normalised velocity autocorrelation and its power spectrum in cm, for all atoms and per element.

    Equation: C(t) = sum_i m_i <v_i(s) . v_i(s+t)> / (3 N); VACF = C(t)/C(0); spectrum = `cosine_transform` of it, area 1.
    Equilibrium temperatures follow from `temperatures`; here only shapes count.

    Args:
        run: with `velocities`.
        blocks: units, longer than the longest lag.
        max_lag_ps: longest lag; the resolution is about 1 / (2 c max_lag).
        wavenumbers: [wavenumber] 1/cm.
        window: of the transform.
    """
    if run.velocities is None:
        raise DataError(f"{run.label}: no velocities saved; save them in the run, or leave this observable out")
    n_lags = lags_within(run, max_lag_ps)
    transform = cosine_transform(n_lags, run.save_interval_ps, wavenumbers, window=window)
    root, chains = np.sqrt(run.masses)[:, None], chains_of(blocks)
    symbols = sorted(set(run.elements))
    members = {symbol: np.array([e == symbol for e in run.elements]) for symbol in symbols}
    per_element = {
        symbol: per_block(
            blocks,
            lambda b, m=m: lagged_products(run.velocities[b.frames, b.replica][:, m] * root[m], n_lags),  # type: ignore[misc, index]
        )
        / (3 * m.sum())
        for symbol, m in members.items()
    }
    share = {symbol: m.mean() for symbol, m in members.items()}
    everything = np.sum([share[symbol] * per_element[symbol] for symbol in symbols], axis=0)
    found = []
    for part, statistics in {"all": everything, **per_element}.items():
        found.append(
            Observable(
                name="velocity autocorrelation", part=part, unit="", statistics=statistics, chains=chains, reduction=normalised,
                grid=np.arange(n_lags) * run.save_interval_ps, grid_unit="ps", matters=0.02,
            )
        )  # fmt: skip
        found.append(
            Observable(
                name="velocity spectrum", part=part, unit="cm", statistics=statistics, chains=chains, grid=wavenumbers,
                grid_unit="1/cm", reduction=_spectrum(transform, unit_area=True), matters_relative=0.1,
            )
        )  # fmt: skip
    return found


def infrared_spectrum(
    run: DynamicsRun, blocks: Sequence[Block], *, max_lag_ps: float, wavenumbers: np.ndarray, window: str = "hann"
) -> Observable:
    """Return the classical infrared spectrum in (e nm/ps)^2 cm: the transform of <dM/dt(s) . dM/dt(s+t)>.

    It is proportional to the absorption coefficient times the refractive index with the harmonic quantum correction. The
    dipole's derivative is a central difference of `dipoles`, or sum_i q_i v_i of fixed `charges`.

    Raises:
        DataError: neither dipoles nor charges with velocities.
    """
    n_lags = lags_within(run, max_lag_ps)
    if run.dipoles is not None:
        rate = np.gradient(run.dipoles.astype(np.float64), run.save_interval_ps, axis=0)
    elif run.charges is not None and run.velocities is not None:
        rate = np.einsum("frax,a->frx", run.velocities.astype(np.float64), run.charges)
    else:
        raise DataError(f"{run.label}: an infrared spectrum needs dipoles, or charges and velocities")
    transform = cosine_transform(n_lags, run.save_interval_ps, wavenumbers, window=window)
    return Observable(
        name="infrared spectrum", unit="(e nm/ps)^2 cm", chains=chains_of(blocks), grid=wavenumbers, grid_unit="1/cm",
        statistics=per_block(blocks, lambda b: lagged_products(rate[b.frames, b.replica], n_lags)),
        reduction=_spectrum(transform, unit_area=False), matters_relative=0.1,
    )  # fmt: skip
