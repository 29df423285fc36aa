"""Figures of multi-time-step dynamics against single-step dynamics, and how they read aloud."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from longstride.analysis import figures
from longstride.analysis.mts_comparison import LIMIT

if TYPE_CHECKING:
    from pathlib import Path

    from longstride.analysis.block_statistics import Observable
    from longstride.analysis.mts_comparison import DynamicsComparison

MAX_PANELS = 12
# file, names of the observables in it, title; the first name that has curves is drawn
GROUPS = (
    ("energy", ("potential energy distribution",), "Distribution of the potential energy"),
    ("bonds", ("bond length density",), "Bond lengths"),
    ("angles", ("bond angle density",), "Bond angles"),
    ("pairs", ("g(r)", "distance density"), "Pairs that share neither bond nor angle"),
    ("torsions", ("torsion density",), "Backbone torsions"),
    ("spectra", ("velocity spectrum",), "Spectra of velocities"),
    ("infrared", ("infrared spectrum",), "Infrared spectrum"),
    ("displacement", ("mean squared displacement",), "Mean squared displacement of molecules"),
)
NOTHING_SEEN = 1e-3  # of the peak: where both densities are below it, the axis is cut


def draw(found: DynamicsComparison, *, out: Path) -> list[dict[str, str]]:
    """Draw every figure that the comparison allows into `out` and return their descriptions.

    Returns:
        One dict per figure: file, title, caption and alt (what a reader who cannot see it should know).
    """
    made = [_deviations(found, out=out)]
    for stem, names, title in GROUPS:
        for name in names:
            curves = {part: pair for (other, part), pair in found.curves.items() if other == name}
            if curves:
                made.append(_curves(found, name, curves, out=out / f"{stem}.svg", title=title))
                break
    return made


def _deviations(found: DynamicsComparison, *, out: Path) -> dict[str, str]:
    dots = [
        figures.Deviation(row=row.observable, part=row.part, z=row.z, curve=row.kind == "curve")
        for row in found.rows
        if row.z is not None
    ]
    figures.deviations(out / "deviations.svg", dots, limit=LIMIT)
    far = ", ".join(f"{row.observable} {row.part}".strip() for row in found.differing())
    return {
        "file": "deviations.svg",
        "title": f"{found.candidate} against {found.baseline}, every observable",
        "caption": "Difference in combined standard errors. About one dot in twenty lies outside the band by chance; those are"
        " named. Diamonds are whole curves, judged by permuting replicas or blocks between the methods.",
        "alt": f"Differences of {len(dots)} observables in combined standard errors; beyond {LIMIT:g}: {far or 'none'}.",
    }


def _curves(
    found: DynamicsComparison, name: str, curves: dict[str, tuple[Observable, Observable]], *, out: Path, title: str
) -> dict[str, str]:
    shown = dict(list(curves.items())[:MAX_PANELS])
    figures.panels(out, [_panel(found, part, *pair) for part, pair in shown.items()])
    left = len(curves) - len(shown)
    rest = f" {left} more are in curves.csv." if left else ""
    verdicts = [f"{row.part or name}: {row.verdict}" for row in found.rows if row.observable == name and row.part in shown]
    return {
        "file": out.name,
        "title": title,
        "caption": f"Lines with bands of two standard errors over replicas or blocks of all seeds.{rest}",
        "alt": f"{name} of {found.candidate} and {found.baseline}; {'; '.join(verdicts)}.",
    }


def _panel(found: DynamicsComparison, part: str, ours: Observable, theirs: Observable) -> figures.Panel:
    grid, origin = np.asarray(ours.grid, dtype=float), 0.0
    kept = np.ones(len(grid), dtype=bool)
    if ours.cumulative:
        origin = float(np.interp(0.5, theirs.values, grid))  # total energies of a teacher have many digits in common
    elif "density" in ours.name:
        high = np.maximum(ours.values, theirs.values)
        seen = np.flatnonzero(high > NOTHING_SEEN * high.max())
        kept[: max(seen.min() - 2, 0)] = kept[seen.max() + 3 :] = False
    unit = f" ({ours.grid_unit})" if ours.grid_unit else ""
    xlabel = {"kJ/mol": "U less its median (kJ/mol)", "nm": "distance (nm)", "1/cm": "wavenumber (1/cm)", "ps": "time (ps)"}
    return figures.Panel(
        title=part,
        xlabel=xlabel.get(ours.grid_unit, f"angle{unit}"),
        ylabel=f"{ours.name if not ours.unit else ours.unit}" if not ours.cumulative else "P(U ≤ u)",
        series=[
            figures.Series(
                method=method, label=label, x=grid[kept] - origin, y=one.values[kept],
                low=(one.values - 2 * one.errors)[kept], high=(one.values + 2 * one.errors)[kept],
            )
            for method, label, one in (("sts", found.baseline, theirs), ("mts", found.candidate, ours))
        ],
    )  # fmt: skip


def curve_rows(found: DynamicsComparison) -> list[dict[str, Any]]:
    """Return every point of every curve for a CSV file: values and standard errors of both sides."""
    return [
        {
            "observable": name, "part": part, "unit": ours.unit, "x": float(np.asarray(ours.grid)[k]), "x_unit": ours.grid_unit,
            "candidate": float(ours.values[k]), "candidate_se": float(ours.errors[k]),
            "baseline": float(theirs.values[k]), "baseline_se": float(theirs.errors[k]),
        }
        for (name, part), (ours, theirs) in found.curves.items()
        for k in range(len(ours.values))
    ]  # fmt: skip
