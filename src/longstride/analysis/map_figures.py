"""Maps over two coordinates on equal scales, beside what they differ by, and curves and bars of the report."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np

from longstride.analysis.figures import COLOURS, MARKERS, MISSING, OTHER, Series, canvas, draw_line

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACROSS = 3


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The axes that all maps of one figure share.

    Attributes:
        x: name of the first coordinate with its unit.
        y: name of the second one with its unit.
        extent: (x low, x high, y low, y high) in these units.
        ticks: positions of ticks on both axes; None leaves them to the figure.
    """

    x: str
    y: str
    extent: tuple[float, float, float, float]
    ticks: tuple[float, ...] | None = None


def torsion_grid(names: tuple[str, str]) -> Grid:
    """Return the axes of a Ramachandran map in degrees."""
    return Grid(
        x=f"{names[0]} (degrees)", y=f"{names[1]} (degrees)", extent=(-180, 180, -180, 180), ticks=(-180, -90, 0, 90, 180)
    )


def maps(path: Path, shown: Sequence[tuple[str, np.ndarray]], grid: Grid, *, limit: float) -> None:
    """Draw free-energy maps side by side on one colour scale from 0 to `limit` kT.

    Args:
        path: the SVG file.
        shown: (title, [x bin, y bin] free energy in kT, NaN where unsampled).
        grid: the common axes.
        limit: top of the colour scale in kT.
    """
    norm = mpl.colors.Normalize(0, limit)
    _tiles(path, shown, grid, norm=norm, colours="viridis", label="free energy (kT); grey: unvisited", extend="max")


def difference_maps(path: Path, shown: Sequence[tuple[str, np.ndarray]], grid: Grid, *, limit: float) -> None:
    """Draw differences of free-energy maps side by side on one colour scale from -limit to +limit kT.

    Args:
        path: the SVG file.
        shown: (title, [x bin, y bin] free energy minus that of the baseline in kT, NaN where either is undefined).
        grid: the common axes.
        limit: end of the colour scale in kT.
    """
    norm = mpl.colors.Normalize(-limit, limit)
    label = "difference (kT); grey: undefined"
    _tiles(path, shown, grid, norm=norm, colours="RdBu_r", label=label, extend="both")


def _tiles(
    path: Path,
    shown: Sequence[tuple[str, np.ndarray]],
    grid: Grid,
    *,
    norm: mpl.colors.Normalize,
    colours: str,
    label: str,
    extend: str,
) -> None:
    columns = min(ACROSS, max(len(shown), 1))
    rows = -(-len(shown) // columns)
    with canvas(path, 3.0 * columns + 0.9, 3.1 * rows + 0.6) as figure:
        tiles = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        scheme = mpl.colormaps[colours].with_extremes(bad=MISSING)
        for axes, (title, values) in zip(tiles.flat, shown, strict=False):
            axes.imshow(
                np.ma.masked_invalid(values.T), origin="lower", extent=grid.extent, cmap=scheme, norm=norm,
                interpolation="nearest", aspect="auto",
            )  # fmt: skip
            axes.set_box_aspect(1)
            axes.set_title(title)
            if grid.ticks is not None:
                axes.set_xticks(grid.ticks)
                axes.set_yticks(grid.ticks)
        _label_tiles(tiles, len(shown), grid)
        _scale(figure, tiles, mpl.cm.ScalarMappable(norm, scheme), label=label, extend=extend)


def _label_tiles(tiles: np.ndarray, count: int, grid: Grid) -> None:
    rows, columns = tiles.shape
    for axes in tiles.flat[count:]:
        axes.set_visible(False)
    for axes in tiles[:, 0]:
        axes.set_ylabel(grid.y)
    for column in range(columns):
        lowest = max(row for row in range(rows) if row * columns + column < count)
        tiles[lowest, column].set_xlabel(grid.x)
        tiles[lowest, column].tick_params(labelbottom=True)


def _scale(figure: Figure, tiles: np.ndarray, scale: mpl.cm.ScalarMappable, *, label: str, extend: str) -> None:
    figure.colorbar(scale, ax=tiles, label=label, extend=extend, shrink=0.9, pad=0.02)


def accuracy(path: Path, panels: Sequence[tuple[str, Sequence[Series], float | None]], *, ylabel: str) -> None:
    """Draw the error of a growing sample against its cost on logarithmic axes, one panel per measure of cost.

    Args:
        path: the SVG file.
        panels: (axis text, lines with bands, noise floor in kT or None).
        ylabel: what the ordinate is.
    """
    count = max(len(panels), 1)
    with canvas(path, 4.3 * count + 0.4, 4.0) as figure:
        grid = figure.subplots(1, count, squeeze=False, sharey=True)
        for axes, (text, series, floor) in zip(grid.flat, panels, strict=False):
            for one in series:
                draw_line(axes, one, marker=MARKERS.get(one.method, "o"), ms=4)
            if floor is not None:
                axes.axhline(floor, color="#666666", lw=1.0, ls=(0, (1, 2)), label="errors of the baseline alone")
            axes.set(xscale="log", yscale="log", xlabel=text)
            _plain_ticks(axes)
            axes.grid(color="#dddddd", lw=0.6)
        grid[0, 0].set_ylabel(ylabel)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3)


def _plain_ticks(axes: Axes) -> None:
    values = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
    low, high = axes.get_ylim()
    kept = [value for value in values if low <= value <= high]
    if kept:
        axes.set_yticks(kept, [f"{value:g}" for value in kept])
        axes.minorticks_off()


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """One bar of the speed-up figure.

    Attributes:
        system: its group.
        method: decides colour and marker.
        label: text at the axis.
        value: ratio of rates, or None.
        low: lower end of the 95 % interval, or None.
        high: upper end, or None.
        note: shown where there is no value.
    """

    system: str
    method: str
    label: str
    value: float | None
    low: float | None
    high: float | None
    note: str


def speedups(path: Path, bars: Sequence[Ratio], *, xlabel: str) -> None:
    """Draw ratios of rates with 95 % intervals on a logarithmic axis, rows grouped by system, undefined ones as text."""
    systems = list(dict.fromkeys(bar.system for bar in bars))
    rows = len(bars) + 0.9 * len(systems)
    with canvas(path, 7.6, 1.0 + 0.34 * max(rows, 1)) as figure:
        axes = figure.subplots()
        known = [end for bar in bars for end in (bar.value, bar.low, bar.high) if end is not None and end > 0]
        low, high = min([*known, 0.7]) / 1.6, max([*known, 1.5]) * 2.2
        axes.axvspan(low, 1, color="#000000", alpha=0.04, lw=0)
        axes.axvline(1, color="#000000", lw=1.0)
        place, places, labels = 0.0, [], []
        for system in systems:
            axes.text(0.0, place, f" {system}", transform=axes.get_yaxis_transform(), va="center", weight="bold", fontsize=10)
            place += 0.9
            for bar in (one for one in bars if one.system == system):
                _ratio_row(axes, bar, place, low)
                places.append(place)
                labels.append(bar.label)
                place += 1.0
        axes.set_yticks(places, labels, fontsize=9)
        axes.set(xscale="log", xlim=(low, high), ylim=(place - 0.3, -0.7), xlabel=xlabel)
        ticks = [value for value in (0.01, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1000, 1e4) if low <= value <= high]
        axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
        axes.minorticks_off()
        axes.grid(axis="x", color="#dddddd", lw=0.6)


def _ratio_row(axes: Axes, bar: Ratio, place: float, low: float) -> None:
    colour = COLOURS.get(bar.method, OTHER)
    if bar.value is None or bar.value <= 0:
        text = "\n".join(textwrap.wrap(bar.note or "undefined", 78)[:2])
        axes.text(low * 1.08, place, text, va="center", ha="left", color="#555555", fontsize=8, style="italic")
        return
    axes.barh(place, bar.value - 1, left=1, height=0.6, color=colour, alpha=0.45, lw=0)
    if bar.low is not None and bar.high is not None:
        axes.plot([bar.low, bar.high], [place, place], "|-", color="#000000", lw=1.4, ms=8)
    axes.plot([bar.value], [place], MARKERS.get(bar.method, "o"), color=colour, mec="#000000", ms=6)


@dataclass(frozen=True, kw_only=True)
class Moves:
    """How often one cell's chains move.

    Attributes:
        method: decides colour and marker.
        label: text at the axis.
        acceptance: accepted share of proposals, or None.
        jumps: crossings of phi = 0 per second of sampling, or None.
        jumps_per_chain: crossings per chain, or None.
    """

    method: str
    label: str
    acceptance: float | None
    jumps: float | None
    jumps_per_chain: float | None


def moves(path: Path, cells: Sequence[Moves]) -> None:
    """Draw acceptance and basin crossings of every cell: one row each, zero crossings at the left edge as an open mark."""
    with canvas(path, 8.4, 1.1 + 0.34 * max(len(cells), 1)) as figure:
        first, second, third = figure.subplots(1, 3, sharey=True, width_ratios=(1, 1.2, 1.2))
        rows = range(len(cells))
        for row in rows:
            one = cells[row]
            colour, marker = COLOURS.get(one.method, OTHER), MARKERS.get(one.method, "o")
            if one.acceptance is None:
                first.text(0.02, row, "no proposals", va="center", fontsize=8, style="italic", color="#555555")
            else:
                first.barh(row, one.acceptance, height=0.6, color=colour, alpha=0.6, lw=0)
            for axes, value in ((second, one.jumps), (third, one.jumps_per_chain)):
                if value is None:
                    axes.text(0.02, row, "unknown", va="center", fontsize=8, transform=axes.get_yaxis_transform())
                else:
                    axes.plot([value], [row], marker, color=colour, mec="#000000", mfc=colour if value > 0 else "none", ms=7)
        first.set(xlim=(0, 1), xlabel="accepted share", ylim=(len(cells) - 0.4, -0.6))
        first.set_yticks(rows, [one.label for one in cells], fontsize=9)
        for axes, text, values in (
            (second, "crossings of φ = 0\nper second of sampling", [one.jumps for one in cells]),
            (third, "crossings of φ = 0\nper chain", [one.jumps_per_chain for one in cells]),
        ):
            smallest = min([value for value in values if value] or [1.0])
            axes.set_xscale("symlog", linthresh=smallest, linscale=0.5)
            axes.set_xlim(-0.15 * smallest, max([value for value in values if value] or [1.0]) * 3)
            axes.set_xticks([0, *_powers(axes.get_xlim()[1], smallest)])
            axes.minorticks_off()
            axes.set_xlabel(text)
        for axes in (first, second, third):
            axes.grid(axis="x", color="#dddddd", lw=0.6)


def _powers(high: float, low: float) -> list[float]:
    """Return at most four powers of ten from `low` to `high`."""
    first, last = math.floor(math.log10(low)), math.floor(math.log10(high))
    every = max(1, -(-(last - first) // 3))
    return [10.0**k for k in range(last, first, -every)][::-1] or [10.0**last]
