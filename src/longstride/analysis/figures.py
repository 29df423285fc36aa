"""Figures as SVG: colour-blind-safe, equal scales, identical bytes for identical data.

Colours are those of Okabe and Ito (doi:10.1038/nmeth.1618); every method also has its own line style and marker.
"""

from __future__ import annotations

import contextlib
import contextvars
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from longstride.data.atomic import atomic_path

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

COLOURS = {
    "reference": "#000000", "md": "#0072B2", "tuned-md": "#56B4E9", "timewarp": "#D55E00", "explore": "#CC79A7",
    "mts": "#009E73", "sts": "#E69F00", "metadynamics": "#882255", "tempering": "#7A7A1F",
}  # fmt: skip
DASHES = {
    "reference": "-", "md": "--", "tuned-md": "-.", "timewarp": "-", "explore": ":", "mts": "-", "sts": "--",
    "metadynamics": "-.", "tempering": "--",
}  # fmt: skip
MARKERS = {
    "reference": "s", "md": "o", "tuned-md": "X", "timewarp": "D", "explore": "v", "mts": "^", "sts": "P",
    "metadynamics": "h", "tempering": "<",
}  # fmt: skip
OTHER = "#777777"
MISSING = "#e6e6e6"
STYLE: dict[str, Any] = {
    "svg.hashsalt": "longstride",
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "font.size": 11.0,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11.0,
    "axes.labelsize": 11.0,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 10.0,
    "image.composite_image": False,
    "figure.facecolor": "white",
}


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line with an optional band.

    Attributes:
        method: decides colour, dash and marker.
        label: legend text.
        x: [point] abscissa.
        y: [point] ordinate, NaN where undefined.
        low: [point] lower edge of the band, or None.
        high: [point] upper edge of the band, or None.
    """

    method: str
    label: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


_PDF_TOO: contextvars.ContextVar[bool] = contextvars.ContextVar("pdf_too", default=False)


@contextlib.contextmanager
def with_pdf() -> Iterator[None]:
    """Write every figure drawn inside as a PDF beside its SVG, for manuscripts; bytes are a function of the data here too."""
    token = _PDF_TOO.set(True)
    try:
        yield
    finally:
        _PDF_TOO.reset(token)


@contextlib.contextmanager
def canvas(path: Path, width: float, height: float) -> Iterator[Figure]:
    """Yield an empty figure of a size in inches; it is written to `path` as SVG (see `with_pdf`) when the block ends."""
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": None}, dpi=150)
        if _PDF_TOO.get():
            with atomic_path(path.with_suffix(".pdf")) as temporary:
                figure.savefig(temporary, format="pdf", metadata={"CreationDate": None, "Creator": None}, dpi=150)


def draw_line(axes: Axes, series: Series, **options: Any) -> None:  # noqa: ANN401 - matplotlib's own options
    """Draw a line with its band in the colour and dash of its method."""
    colour = COLOURS.get(series.method, OTHER)
    dash = DASHES.get(series.method, "-")
    axes.plot(series.x, series.y, dash, color=colour, label=series.label, lw=1.8, **options)
    if series.low is not None and series.high is not None:
        axes.fill_between(series.x, series.low, series.high, color=colour, alpha=0.18, lw=0)


def _legend_above(axes: Axes, entries: int) -> None:
    title = axes.get_title()
    axes.set_title("")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(entries, 2), title=title, title_fontsize=11.0)


def phi_profile(path: Path, series: Sequence[Series], *, limit: float, name: str) -> None:
    """Draw F(phi) in kT with 95 % bands, x in degrees."""
    with canvas(path, 7.2, 4.2) as figure:
        axes = figure.subplots()
        for one in series:
            draw_line(axes, one)
        axes.axvline(0, color="#888888", lw=0.8, ls=":")
        axes.set(xlim=(-180, 180), ylim=(-0.3, limit + 3), xlabel=f"{name} (degrees)", ylabel="free energy (kT)")
        axes.set_xticks(range(-180, 181, 60))
        axes.grid(color="#dddddd", lw=0.6)
        figure.legend(ncols=2, loc="outside upper center")


def timescales(path: Path, deeptime: Sequence[Series], pyemma: Sequence[Series], *, lags_ps: np.ndarray) -> None:
    """Draw implied timescales in ps against the lag: deeptime as lines with bands, PyEMMA as open circles."""
    with canvas(path, 7.2, 4.4) as figure:
        axes = figure.subplots()
        styles = ("-", "--", ":")
        shades = ("#0072B2", "#D55E00", "#009E73")
        for k, one in enumerate(deeptime):
            axes.plot(one.x, one.y, styles[k % 3], color=shades[k % 3], marker=".", ms=8, lw=1.8, label=one.label)
            if one.low is not None and one.high is not None:
                axes.fill_between(one.x, one.low, one.high, color=shades[k % 3], alpha=0.18, lw=0)
        for k, one in enumerate(pyemma):
            label = one.label if k == 0 else None
            axes.plot(one.x, one.y, "o", mfc="none", mec="#000000", ms=9, mew=1.2, ls="", label=label)
        edge = np.array([lags_ps.min() * 0.8, lags_ps.max() * 1.25])
        axes.fill_between(edge, edge * 1e-6, edge, color="#bbbbbb", alpha=0.5, lw=0, label="shorter than the lag")
        shown = np.concatenate([one.y[np.isfinite(one.y)] for one in deeptime] or [np.array([])])
        top = max(shown.max() * 4, edge[1] * 3) if shown.size else edge[1] * 10
        axes.set(xscale="log", yscale="log", xlim=tuple(edge), ylim=(edge[0] * 0.5, top))
        axes.set(xlabel="lag time (ps)", ylabel="implied timescale (ps)")
        axes.set_xticks(lags_ps, [f"{lag:g}" for lag in lags_ps])
        axes.minorticks_off()
        axes.grid(color="#dddddd", lw=0.6)
        figure.legend(loc="outside upper center", ncols=3)


def autocorrelation(path: Path, panels: Sequence[tuple[str, Sequence[Series]]], *, observable: str) -> None:
    """Draw the autocorrelation of one observable against potential evaluations per chain, one panel per target."""
    with canvas(path, 4.4 * max(len(panels), 1) + 0.6, 3.8) as figure:
        grid = figure.subplots(1, max(len(panels), 1), squeeze=False, sharey=True)
        for axes, (title, series) in zip(grid.flat, panels, strict=True):
            for one in series:
                draw_line(axes, one)
            axes.axhline(0, color="#888888", lw=0.8)
            axes.set(xscale="log", ylim=(-0.25, 1.05), xlabel="energy + force evaluations per chain")
            axes.set_title(title)
            axes.grid(color="#dddddd", lw=0.6)
            if series:
                _legend_above(axes, len(series))
            else:
                axes.text(0.5, 0.5, "undefined for every method", transform=axes.transAxes, ha="center")
        grid[0, 0].set_ylabel(f"autocorrelation of {observable}")


def energies(path: Path, panels: Sequence[tuple[str, Sequence[tuple[str, str, np.ndarray]]]]) -> None:
    """Draw histograms of the target potential energy, one panel per target.

    Args:
        path: the SVG file.
        panels: (title, [(method, label, energies in kJ/mol)]).
    """
    with canvas(path, 4.6 * max(len(panels), 1), 3.8) as figure:
        grid = figure.subplots(1, max(len(panels), 1), squeeze=False)
        for axes, (title, sets) in zip(grid.flat, panels, strict=True):
            low = min(np.percentile(values, 0.1) for _, _, values in sets)
            high = max(np.percentile(values, 99.5) for _, _, values in sets)
            fewest = min(values.size for _, _, values in sets)
            edges = np.linspace(low, high, int(np.clip(np.sqrt(fewest), 20, 60)) + 1)
            centres = (edges[1:] + edges[:-1]) / 2
            for method, label, values in sets:
                density = np.histogram(values, edges)[0] / values.size / (edges[1] - edges[0])
                draw_line(axes, Series(method=method, label=label, x=centres, y=density))
            axes.set(xlabel="potential energy (kJ/mol)", ylabel="probability density (mol/kJ)", ylim=(0, None))
            axes.set_title(title)
            axes.ticklabel_format(axis="x", useOffset=False)
            axes.locator_params(axis="x", nbins=5)
            axes.grid(color="#dddddd", lw=0.6)
            _legend_above(axes, len(sets))


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One row of the efficiency figure.

    Attributes:
        method: decides colour and marker.
        label: text at the axis.
        value: ESS per second, or None.
        low: lower end of the interval, or None.
        high: upper end of the interval, or None.
        note: shown where there is no value.
    """

    method: str
    label: str
    value: float | None
    low: float | None
    high: float | None
    note: str


def rates(path: Path, bars: Sequence[Bar]) -> None:
    """Draw ESS per second with 95 % intervals on a log scale, one row per method and seed, best visible on paper too."""
    with canvas(path, 7.2, 1.1 + 0.42 * max(len(bars), 1)) as figure:
        axes = figure.subplots()
        known = [end for bar in bars for end in (bar.value, bar.low, bar.high) if end is not None and end > 0]
        low, high = (min(known) / 3, max(known) * 3) if known else (0.1, 10.0)
        for row, bar in enumerate(bars):
            colour = COLOURS.get(bar.method, OTHER)
            if bar.value is None or bar.value <= 0:
                text = "\n".join(textwrap.wrap(bar.note or "undefined", 64))
                axes.text(low * 1.1, row, text, va="center", ha="left", color="#555555", fontsize=9, style="italic")
                continue
            axes.barh(row, bar.value - low, left=low, height=0.6, color=colour, alpha=0.45, lw=0)
            if bar.low is not None and bar.high is not None:
                axes.plot([bar.low, bar.high], [row, row], "|-", color="#000000", lw=1.6, ms=9)
            axes.plot([bar.value], [row], MARKERS.get(bar.method, "o"), color=colour, mec="#000000", ms=7)
        axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
        axes.set(xscale="log", xlim=(low, high), ylim=(len(bars) - 0.4, -0.6))
        axes.set_xlabel("smallest ESS per second of sampling (log scale)")
        axes.grid(axis="x", color="#dddddd", lw=0.6)


def training(path: Path, columns: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> None:
    """Draw one small panel per training metric.

    Args:
        path: the SVG file.
        columns: (name, [point] optimiser step, [point] value).
    """
    across = min(3, max(len(columns), 1))
    down = -(-len(columns) // across)
    with canvas(path, 3.3 * across, 2.3 * down + 0.3) as figure:
        grid = figure.subplots(down, across, squeeze=False)
        for axes, (name, step, value) in zip(grid.flat, columns, strict=False):
            axes.plot(step, value, color="#0072B2", lw=1.6, marker="." if len(step) < 30 else "")
            axes.set_title(name, fontsize=10)
            axes.set_xlabel("optimiser step", fontsize=10)
            axes.grid(color="#dddddd", lw=0.6)
            axes.locator_params(axis="both", nbins=5)
        for axes in grid.flat[len(columns) :]:
            axes.set_visible(False)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One small set of axes.

    Attributes:
        title: such as the pair of elements.
        xlabel: axis text with the unit.
        ylabel: axis text with the unit.
        series: lines with bands.
    """

    title: str
    xlabel: str
    ylabel: str
    series: Sequence[Series]


def panels(path: Path, shown: Sequence[Panel]) -> None:
    """Draw panels three abreast, one legend for all of them."""
    across = min(3, max(len(shown), 1))
    down = -(-len(shown) // across)
    with canvas(path, max(3.3 * across, 5.0), 2.6 * down + 0.5) as figure:
        grid = figure.subplots(down, across, squeeze=False)
        for axes, panel in zip(grid.flat, shown, strict=False):
            for one in panel.series:
                draw_line(axes, one)
            axes.set_title(panel.title)
            axes.set_xlabel(panel.xlabel, fontsize=10)
            axes.set_ylabel(panel.ylabel, fontsize=10)
            axes.grid(color="#dddddd", lw=0.6)
            axes.locator_params(axis="both", nbins=4)
        for axes in grid.flat[len(shown) :]:
            axes.set_visible(False)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2)


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """One dot of the figure of deviations.

    Attributes:
        row: name of the row, shared by dots of one kind.
        part: what the dot is of; written beside it where it lies beyond the limit.
        z: difference in combined standard errors.
        curve: whether z is of a whole curve, which has no sign.
    """

    row: str
    part: str
    z: float
    curve: bool


def deviations(path: Path, dots: Sequence[Deviation], *, limit: float, cut: float = 8.0) -> None:
    """Draw differences in combined standard errors, one row per kind; what lies beyond `cut` is drawn at the edge."""
    rows = list(dict.fromkeys(dot.row for dot in dots))
    with canvas(path, 7.2, 1.3 + 0.3 * max(len(rows), 1)) as figure:
        axes = figure.subplots()
        axes.axvspan(-limit, limit, color="#0072B2", alpha=0.10, lw=0, label=f"within {limit:g} combined standard errors")
        axes.axvline(0, color="#888888", lw=0.8)
        for curve, marker, label in ((False, "o", "number"), (True, "D", "curve (no sign)")):
            kept = [dot for dot in dots if dot.curve == curve]
            for beyond, colour in ((False, "#0072B2"), (True, "#D55E00")):
                own = [dot for dot in kept if (abs(dot.z) > limit) == beyond]
                if not own:
                    continue
                x = np.clip([dot.z for dot in own], -cut, cut)
                y = [rows.index(dot.row) for dot in own]
                face = "none" if curve else colour
                text = f"{label}, beyond" if beyond else label
                axes.plot(x, y, marker, mfc=face, mec=colour, ms=6, mew=1.3, alpha=0.9, ls="", label=text)
        _name_the_far(axes, [dot for dot in dots if abs(dot.z) > limit], rows, cut=cut)
        axes.set_yticks(range(len(rows)), rows)
        axes.set(xlim=(-cut - 5, cut + 5), ylim=(len(rows) - 0.4, -0.6), xlabel="difference in combined standard errors (z)")
        axes.grid(axis="y", color="#dddddd", lw=0.6)
        figure.legend(loc="outside upper center", ncols=2)


def _name_the_far(axes: Axes, far: Sequence[Deviation], rows: Sequence[str], *, cut: float) -> None:
    """Write the parts beyond the limit of each row in one text outside its outermost dot, so that none overlap."""
    for number, row in enumerate(rows):
        for sign in (-1, 1):
            own = sorted((dot for dot in far if dot.row == row and dot.z * sign > 0), key=lambda dot: -abs(dot.z))
            names = [dot.part for dot in own if dot.part]
            if not names:
                continue
            text = ", ".join(names[:2]) + (f" +{len(names) - 2}" if len(names) > 2 else "")
            x = float(np.clip(own[0].z, -cut, cut)) + sign * 0.6
            axes.text(x, number, text, va="center", ha="left" if sign > 0 else "right", fontsize=8, color="#8a3c00")
