"""Resonance of multiple time steps: what a linear model predicts, and a figure to hold measurements against it.

A harmonic mode of frequency w, whose slow (reference minus fast) force holds the share d of its stiffness, is a linear
map of (x, v) per outer step. Impulses at the outer step are in resonance with the mode at T/2, T/3, ...; the linear map
grows around T/2, anharmonic motion is also unstable near T/3 (Ma, Izaguirre and Skeel, doi:10.1137/S1064827501399833).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from longstride.errors import LongstrideError
from longstride.units import FS_PS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

LIGHT_CM_PER_PS = 2.99792458e-2  # so that frequency in 1/ps = wavenumber in 1/cm times this
UNSTABLE = 1e-6  # growth per outer step above round-off


def period_fs(wavenumber_per_cm: float) -> float:
    """Return the period T = 1 / (c wavenumber) in fs; 9.02 fs at 3700 1/cm."""
    return 1 / (LIGHT_CM_PER_PS * wavenumber_per_cm) / FS_PS


def respa_matrix(
    *, wavenumber_per_cm: float, slow_share: float, dt_outer_fs: float, n_inner: int, friction_per_ps: float = 0.0
) -> np.ndarray:
    """Return the map of (x, v) over one outer step of r-RESPA on a harmonic mode, [2, 2], noise left out.

    Equation, h = dt/n, w_S^2 = (1 - d) w^2:
    B_slow(dt/2) [B_S(h/2) A(h/2) O(h) A(h/2) B_S(h/2)]^n B_slow(dt/2), slow acceleration -d w^2 x, fast -w_S^2 x, and O the
    factor exp(-friction h) on v. Without friction its determinant is 1.

    Args:
        wavenumber_per_cm: of the mode under the reference potential.
        slow_share: d, the share of the stiffness that the fast potential misses; negative where it is too stiff.
        dt_outer_fs: outer step.
        n_inner: inner steps per outer step.
        friction_per_ps: Langevin friction.

    Raises:
        LongstrideError: a step, wavenumber or number of inner steps that is not positive, or negative friction.
    """
    if not (wavenumber_per_cm > 0 and dt_outer_fs > 0 and n_inner >= 1 and n_inner == int(n_inner) and friction_per_ps >= 0):
        raise LongstrideError(
            f"the linear model needs a positive wavenumber and outer step, whole inner steps and no negative friction,"
            f" not {wavenumber_per_cm:g} 1/cm, {dt_outer_fs:g} fs, {n_inner!r} and {friction_per_ps:g} 1/ps"
        )
    dt = dt_outer_fs * FS_PS
    h = dt / n_inner
    square = (2 * math.pi * LIGHT_CM_PER_PS * wavenumber_per_cm) ** 2
    outer = np.array([[1.0, 0.0], [-0.5 * dt * slow_share * square, 1.0]])
    kick = np.array([[1.0, 0.0], [-0.5 * h * (1 - slow_share) * square, 1.0]])
    drift = np.array([[1.0, 0.5 * h], [0.0, 1.0]])
    ornstein = np.diag([1.0, math.exp(-friction_per_ps * h)])
    inner = kick @ drift @ ornstein @ drift @ kick
    return outer @ np.linalg.matrix_power(inner, int(n_inner)) @ outer


def second_moment_matrix(step: np.ndarray) -> np.ndarray:
    """Return the map of (<x^2>, <x v>, <v^2>) that a linear map [2, 2] of (x, v) implies, [3, 3].

    With noise the moments obey m' = S m + const; <x^2> stays bounded exactly where the spectral radius of S is below 1.
    """
    (a, b), (c, d) = step
    return np.array([[a * a, 2 * a * b, b * b], [a * c, a * d + b * c, b * d], [c * c, 2 * c * d, d * d]])


def growth_per_outer_step(
    *, wavenumber_per_cm: float, slow_share: float, dt_outer_fs: float, n_inner: int, friction_per_ps: float = 0.0
) -> float:
    """Return the factor by which the amplitude of a mode grows per outer step; 1 is neutral, above 1 it blows up.

    Equation: the root of the spectral radius of the mean-square moment map of `respa_matrix` (`second_moment_matrix`),
    which for one linear map is the largest |eigenvalue| of `respa_matrix` itself.
    """
    step = respa_matrix(
        wavenumber_per_cm=wavenumber_per_cm,
        slow_share=slow_share,
        dt_outer_fs=dt_outer_fs,
        n_inner=n_inner,
        friction_per_ps=friction_per_ps,
    )
    return math.sqrt(float(np.abs(np.linalg.eigvals(second_moment_matrix(step))).max()))


@dataclass(frozen=True, kw_only=True)
class LinearScan:
    """Growth per outer step over outer steps for one mode and one slow share.

    Attributes:
        label: of the mode, such as "O-H".
        wavenumber_per_cm: of the mode.
        slow_share: share of the stiffness in the slow force.
        friction_per_ps: Langevin friction.
        dt_outer_fs: [step].
        n_inner: [step] inner steps per outer step.
        growth: [step] factor per outer step.
    """

    label: str
    wavenumber_per_cm: float
    slow_share: float
    friction_per_ps: float
    dt_outer_fs: np.ndarray
    n_inner: np.ndarray
    growth: np.ndarray

    @property
    def windows_fs(self) -> tuple[tuple[float, float], ...]:
        """Unstable ranges (first, last) of the outer step in fs, as far as the scan's grid resolves them."""
        unstable = self.growth > 1 + UNSTABLE
        runs = [(key, list(group)) for key, group in itertools.groupby(range(len(unstable)), key=lambda i: bool(unstable[i]))]
        return tuple((float(self.dt_outer_fs[g[0]]), float(self.dt_outer_fs[g[-1]])) for key, g in runs if key)

    @property
    def largest_growth(self) -> float:
        """Largest growth minus 1; 0.18 means 18 % per outer step."""
        return float(self.growth.max()) - 1


def linear_scan(
    dt_outer_fs: np.ndarray,
    *,
    wavenumber_per_cm: float,
    slow_share: float,
    inner_step_fs: float = 0.5,
    friction_per_ps: float = 0.0,
    label: str = "",
) -> LinearScan:
    """Return the linear prediction over outer steps, each divided into the nearest whole number of inner steps.

    A scan over arbitrary outer steps cannot keep one inner step; dt / n, n = round(dt / inner_step_fs), is what the map uses.
    """
    n_inner = np.maximum(np.rint(dt_outer_fs / inner_step_fs), 1).astype(int)
    growth = [
        growth_per_outer_step(
            wavenumber_per_cm=wavenumber_per_cm,
            slow_share=slow_share,
            dt_outer_fs=float(dt),
            n_inner=int(n),
            friction_per_ps=friction_per_ps,
        )
        for dt, n in zip(dt_outer_fs, n_inner, strict=True)
    ]
    return LinearScan(
        label=label,
        wavenumber_per_cm=wavenumber_per_cm,
        slow_share=slow_share,
        friction_per_ps=friction_per_ps,
        dt_outer_fs=np.asarray(dt_outer_fs, dtype=float),
        n_inner=n_inner,
        growth=np.array(growth),
    )


def friction_needed(scan_fs: np.ndarray, frictions_per_ps: Sequence[float], **mode: float) -> float | None:
    """Return the smallest friction of the list at which no outer step of the scan grows, or None if none suffices.

    Args:
        scan_fs: outer steps.
        frictions_per_ps: candidates.
        mode: `wavenumber_per_cm`, `slow_share` and, if wanted, `inner_step_fs` of `linear_scan`.
    """
    for friction in sorted(frictions_per_ps):
        if linear_scan(scan_fs, friction_per_ps=friction, **mode).largest_growth <= UNSTABLE:  # type: ignore[arg-type]
            return friction
    return None


@dataclass(frozen=True, kw_only=True)
class MeasuredScan:
    """What runs at several outer steps gave, for the lower panel of the figure.

    Attributes:
        label: legend text, such as "temperature of H".
        quantity: axis text with the unit, such as "T(H) in K".
        dt_outer_fs: [run].
        values: [run]; NaN where the run blew up.
        errors: [run] standard errors, or None.
    """

    label: str
    quantity: str
    dt_outer_fs: np.ndarray
    values: np.ndarray
    errors: np.ndarray | None = None


# Okabe and Ito, doi:10.1038/nmeth.1618, without yellow, which is too pale for lines
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def draw_resonance(
    path: Path, *, linear: Sequence[LinearScan], periods_fs: Mapping[str, float], measured: Sequence[MeasuredScan] = ()
) -> None:
    """Draw growth per outer step and measurements over the outer step, with T/2 (dashed) and T/3 (dotted) of the modes.

    Args:
        path: the SVG file; identical data give identical bytes.
        linear: predictions; label and colour follow the bond type.
        periods_fs: bond type to the period T of its stiffest mode.
        measured: series of one quantity; blow-ups (NaN) are marked at the top of the panel.

    Raises:
        LongstrideError: nothing to draw.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    from longstride.analysis.figures import STYLE
    from longstride.data.atomic import atomic_path

    if not linear and not measured:
        raise LongstrideError("a resonance figure needs at least one linear or measured scan")
    colours = {kind: PALETTE[i % len(PALETTE)] for i, kind in enumerate(periods_fs)}
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        rows = int(bool(linear)) + int(bool(measured))
        figure = Figure(figsize=(6.4, 2.9 * rows + 0.6), layout="constrained")
        FigureCanvasSVG(figure)
        panels = list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])
        if linear:
            _draw_linear(panels[0], linear, colours)
        if measured:
            _draw_measured(panels[-1], measured)
        for axes in panels:
            for kind, period in periods_fs.items():
                axes.axvline(period / 2, color=colours[kind], ls="--", lw=1.0, alpha=0.8)
                axes.axvline(period / 3, color=colours[kind], ls=":", lw=1.2, alpha=0.8)
        for row, (kind, period) in enumerate(periods_fs.items()):  # one row of text per bond type, none can overlap
            for part in (2, 3):
                panels[0].text(
                    period / part, 1.02 + 0.06 * row, f"T/{part} {kind}", color=colours[kind], ha="center", fontsize=8,
                    transform=panels[0].get_xaxis_transform(),
                )  # fmt: skip
        panels[-1].set_xlabel("outer step in fs")
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": None})


def _draw_linear(axes, scans: Sequence[LinearScan], colours: Mapping[str, str]) -> None:  # noqa: ANN001 - matplotlib Axes
    styles = ("-", "--", "-.", ":")
    for i, scan in enumerate(scans):
        text = f"{scan.label} {scan.wavenumber_per_cm:.0f} 1/cm, d = {100 * scan.slow_share:g} %"
        text += f", {scan.friction_per_ps:g} 1/ps" if scan.friction_per_ps else ""
        growth = 100 * np.maximum(scan.growth - 1, 0.0)
        axes.plot(scan.dt_outer_fs, growth, styles[i % 4], color=colours.get(scan.label, "#777777"), lw=1.6, label=text)
    axes.set_ylabel("growth per outer step in %")
    axes.legend(fontsize=8, loc="upper left", frameon=True, framealpha=1.0, edgecolor="none")


def _draw_measured(axes, measured: Sequence[MeasuredScan]) -> None:  # noqa: ANN001 - matplotlib Axes
    markers = ("o", "s", "^", "D", "v", "P", "X")
    for i, scan in enumerate(measured):
        colour = PALETTE[-1 - i % len(PALETTE)]
        axes.errorbar(
            scan.dt_outer_fs, scan.values, yerr=scan.errors, fmt=markers[i % 7], ms=5, color=colour, label=scan.label, capsize=2
        )
        lost = scan.dt_outer_fs[~np.isfinite(scan.values)]
        if len(lost):
            height = np.full(len(lost), 0.97 - 0.05 * i)
            axes.plot(
                lost, height, "x", color=colour, ms=8, mew=2, transform=axes.get_xaxis_transform(),
                label=f"{scan.label}: blew up",
            )  # fmt: skip
    axes.set_ylabel(measured[0].quantity)
    axes.legend(fontsize=8, loc="best", frameon=True, framealpha=1.0, edgecolor="none")
