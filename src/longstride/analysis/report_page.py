"""The report: everything a run found, as one HTML page that needs nothing else."""

from __future__ import annotations

import csv
import json
import tempfile
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from longstride.analysis import figures, map_figures, report_sections, verdict
from longstride.analysis.svg_inline import inline
from longstride.analysis.tables import SUMMARY_COLUMNS
from longstride.data.manifest import MANIFEST
from longstride.errors import DataError

PAGE = Path(__file__).parent / "page"
STYLE = "report.css"
SCRIPTS = ("report.js", "viewer.js")
SHOWN = (
    ("system", "system"), ("method", "method"), ("seed", "seed"), ("invariance", "label"), ("status", "status"),
    ("ess_per_s", "ESS / s"), ("ess", "ESS"), ("delta_f_phi_kT", "ΔF phi (kT)"),
    ("delta_f_phi_umbrella_z", "z of ΔF, umbrella"), ("rmse_free_energy_kT", "map RMSE (kT)"),
    ("acceptance", "acceptance"), ("n_samples", "samples"), ("target", "target"),
    ("mean_energy_kJ_per_mol", "mean U (kJ/mol)"), ("energy_ks", "KS of U"), ("temperature_K", "T (K)"),
    ("basins_visited", "basins"), ("rhat_max", "R-hat"), ("energy_calls", "energy calls"), ("force_calls", "force calls"),
    ("sampling_wall_s", "sampling (s)"),
)  # fmt: skip
INTERVALS = {
    "ess": ("ess_ci_low", "ess_ci_high"),
    "ess_per_s": ("ess_ci_low_per_s", "ess_ci_high_per_s"),
    "delta_f_phi_kT": ("delta_f_phi_ci_low_kT", "delta_f_phi_ci_high_kT"),
    "mean_energy_kJ_per_mol": ("mean_energy_ci_low_kJ_per_mol", "mean_energy_ci_high_kJ_per_mol"),
}
MAX_TRAINING_PANELS = 9


def read_comparison(folder: Path) -> dict[str, Any]:
    """Return comparison.json of one system.

    Raises:
        DataError: it is missing or not valid JSON.
    """
    path = folder / "comparison.json"
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"cannot read {path} ({error}); run the compare stage of that system first") from error


def _manifest(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / MANIFEST).read_text())
    except (OSError, json.JSONDecodeError):
        return None


def summary_table(path: Path) -> dict[str, Any]:
    """Return header and rows of summary.csv for the page; each cell has a text, a sorting key and an interval.

    Raises:
        DataError: the file is missing.
    """
    try:
        with path.open(newline="") as handle:
            rows = list(csv.DictReader(handle))
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}); run the summary stage first") from error
    shown = [(key, label) for key, label in SHOWN if key in SUMMARY_COLUMNS]
    several = len({row["system"] for row in rows}) > 1
    used = [(key, label) for key, label in shown if any(row.get(key) for row in rows) and (key != "system" or several)]
    return {
        "head": [label for _, label in used],
        "rows": [{"label": row.get("invariance") or "absent", "cells": [_cell(row, key) for key, _ in used]} for row in rows],
    }


def _cell(row: dict[str, str], key: str) -> dict[str, str]:
    raw = row.get(key) or ""
    try:
        value: float | None = float(raw)
    except ValueError:
        value = None
    text = raw if value is None else verdict.number(value, 4)
    interval = ""
    if value is not None and key in INTERVALS:
        low, high = (row.get(name) or "" for name in INTERVALS[key])
        if low or high:
            ends = [verdict.number(float(low), 3) if low else "-∞", verdict.number(float(high), 3) if high else "∞"]
            interval = f"{ends[0]} to {ends[1]}"
    return {"text": text or "–", "key": raw, "interval": interval, "numeric": "yes" if value is not None else ""}


def _figure_html(text: str, figure: dict[str, str], number: int) -> dict[str, Any]:
    return {**figure, "number": number, "svg": Markup(inline(text, prefix=f"f{number}-", alt=figure["alt"]))}


def _numbered(drawn: list[tuple[dict[str, str], str]], first: int) -> list[dict[str, Any]]:
    return [_figure_html(text, figure, first + k) for k, (figure, text) in enumerate(drawn)]


def training_curves(folder: Path, *, title: str) -> tuple[str, dict[str, str]] | None:
    """Return (SVG text, description) of the metrics.csv in a training folder, or None where there is none.

    One panel per numeric column other than step and wall time, nine at most.
    """
    path = folder / "metrics.csv"
    if not path.is_file():
        return None
    with path.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    columns = []
    for name in rows[0] if rows else []:
        pairs = [(_float(row.get("step", "")), _float(row[name])) for row in rows]
        points = np.array([pair for pair in pairs if np.isfinite(pair).all()])
        if name not in ("step", "wall_s") and len(points) > 1:
            columns.append((name.replace("_", " "), points[:, 0], points[:, 1]))
    if not columns:
        return None
    columns = columns[:MAX_TRAINING_PANELS]
    with tempfile.TemporaryDirectory() as temporary:
        figures.training(Path(temporary) / "training.svg", columns)
        text = (Path(temporary) / "training.svg").read_text()
    last = "; ".join(f"{name} ends at {value[-1]:.3g}" for name, _, value in columns)
    return text, {"file": "metrics.csv", "title": title, "caption": f"From {path.name}.", "alt": f"Training curves: {last}."}


def _float(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")


def wall_times(run: Path, system: str) -> list[dict[str, Any]]:
    """Return what each stage of one system took, from manifests: stage, seconds, and how they were counted."""
    found: list[dict[str, Any]] = []

    def add(stage: str, seconds: Any, note: str) -> None:  # noqa: ANN401 - whatever a manifest holds
        if isinstance(seconds, int | float):
            found.append({"stage": stage, "seconds": float(seconds), "note": note})

    for stage, key, note in (
        ("reference", "wall_s", "summed over trajectories"),
        ("flow", "train_wall_s", "training"),
        ("distill", "label_wall_s", "teacher labels"),
        ("distill", "train_wall_s", "training"),
    ):
        add(stage, (_manifest(run / stage / system) or {}).get(key), note)
    umbrella = (_manifest(run / "free_energy" / system) or {}).get("timing") or {}
    add("free-energy", umbrella.get("sampling_s"), "umbrella sampling")
    for folder in sorted((run / "sample" / system).glob("*/seed*")):
        timing = (_manifest(folder) or {}).get("timing") or {}
        name = f"sample {folder.parent.name}, {folder.name}"
        add(name, timing.get("sampling_s"), "sampling")
        add(name, timing.get("burn_in_s"), "burn-in or equilibration")
    return found


def preparation_seconds(run: Path, system: str, method: str) -> float | None:
    """Return wall seconds of reference data and training that a method needs, or None where not recorded.

    The flow needs reference and flow; mts needs reference and distill (labels and training).
    """
    reference = _manifest(run / "reference" / system) or {}
    trained = _manifest(run / ("distill" if method == "mts" else "flow") / system) or {}
    total = 0.0
    for part in (reference.get("wall_s"), trained.get("train_wall_s")):
        if not isinstance(part, int | float):
            return None
        total += part
    return total + float(trained.get("label_wall_s") or 0.0)


def _plain_rate(content: dict[str, Any], entry: dict[str, Any]) -> float | None:
    """Return the ESS per second of plain dynamics: the one that the ratio of `break_even` is to."""
    if entry["measured"]["value"] is None:
        return entry["dynamics_ess_per_s_from_msm"]["value"]
    for one in content["pooled"]:
        if one["target"] == entry["target"] and one["method"] == entry["versus"]:
            return one["ess_per_s"]["value"]
    return None


def _speed_line(run: Path, system: str, content: dict[str, Any], entry: dict[str, Any]) -> str:
    sentence = verdict.speedup_sentence(entry)
    if entry["is_baseline"]:
        return sentence  # nothing is trained for it
    cost = preparation_seconds(run, system, entry["method"])
    full = {**entry, "plain_ess_per_s": _plain_rate(content, entry)}
    return f"{sentence} {verdict.break_even(full, preparation_s=cost)}"


def system_section(run: Path, system: str, *, first_figure: int) -> dict[str, Any]:
    """Return what the page shows of one system: sentences, figures, tables and times.

    A system without a comparison by torsions, such as a box of water, has its dynamics, training and times.
    """
    folder = run / "compare" / system
    content = read_comparison(folder) if (folder / "comparison.json").is_file() else None
    drawn = [(figure, (folder / figure["file"]).read_text()) for figure in content["figures"]] if content else []
    curves = []
    for stage, title in (("flow", "Training of the flow"), ("distill", "Training of the distilled student")):
        made = training_curves(run / stage / system, title=title)
        if made is not None:
            curves.append((made[1], made[0]))
    scan = resonance_figure(run / "resonance" / system)
    shown = _numbered(drawn, first_figure)  # numbers follow the order on the page
    dynamics = dynamics_section(run / "dynamics" / system, first_figure=first_figure + len(drawn))
    after = first_figure + len(drawn) + (len(dynamics["figures"]) if dynamics else 0)
    return {
        "name": system,
        "anchor": f"system-{system}",
        "content": content,
        "reference": verdict.reference_sentences(content) if content else [],
        "speedups": [_speed_line(run, system, content, entry) for entry in content["speedups"]] if content else [],
        "agreement": agreement_table(content) if content else [],
        "figures": with_headings(shown),
        "resonance": _numbered(scan, after),
        "training": _numbered(curves, after + len(scan)),
        **optional_parts(content),
        "panel": panel_table(content) if content else {"head": [], "rows": []},
        "temperatures": temperature_table(content) if content else {"head": [], "rows": [], "notes": []},
        "dynamics": dynamics,
        "times": wall_times(run, system),
    }


METRICS = (
    ("distances", "Distances from the baseline", "0 is the same distribution; a difference below its noise floor is none."),
    ("validity", "Are the structures physical?", "Shares of samples with broken geometry, beside those of the reference."),
    ("coverage", "Coverage of states", "Which states of the reference a method finds."),
)
HEADINGS = (
    (("ramachandran", "phi_profile"), "Free energies"),
    (("tica", "timescales", "chapman"), "Slow coordinates and kinetics"),
    (("autocorrelation", "accuracy", "moves", "rates"), "Efficiency"),
    (("energies",), "Energies"),
)


def with_headings(shown: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return figures of one kind side by side, the first of each kind with its heading."""
    found = []
    rest = list(shown)
    for prefixes, heading in HEADINGS:
        own = [one for one in rest if one["file"].startswith(prefixes)]
        rest = [one for one in rest if one not in own]
        found += [{**one, "heading": heading if k == 0 else ""} for k, one in enumerate(own)]
    found += [{**one, "heading": ""} for one in rest]
    numbers = sorted(one["number"] for one in found)
    return [_renumbered(one, number) for one, number in zip(found, numbers, strict=True)]


def _renumbered(figure: dict[str, Any], number: int) -> dict[str, Any]:
    return {**figure, "number": number}  # its ids keep their old number, which is as unique


def optional_parts(content: dict[str, Any] | None) -> dict[str, Any]:
    """Return the parts that only newer comparisons have; empty ones are not shown."""
    if content is None:
        none: dict[str, Any] = {"head": [], "rows": []}
        return {"viewer": None, "accuracy": none, "metrics": [], "certificate": None, "markov": [], "chapman_kolmogorov": ""}
    metrics = []
    for key, title, text in METRICS:
        table = report_sections.metric_table(content, key)
        if table["rows"]:
            metrics.append({"title": title, "text": text, **table})
    return {
        "viewer": report_sections.viewer_data(content),
        "accuracy": report_sections.accuracy_table(content),
        "metrics": metrics,
        "certificate": report_sections.certificate(content),
        "markov": report_sections.markov_tables(content),
        "chapman_kolmogorov": report_sections.chapman_kolmogorov(content),
    }


def resonance_figure(folder: Path) -> list[tuple[dict[str, str], str]]:
    """Return (description, SVG text) of a resonance scan of the run, or nothing where none was made."""
    path = folder / "resonance.svg"
    if not path.is_file():
        return []
    caption = (
        "Kinetic temperatures and errors against the outer step of multi-time-step dynamics; resonance.csv holds the numbers."
    )
    alt = "Errors of multi-time-step dynamics against the outer time step."
    title = "How long the outer step may be"
    return [({"file": path.name, "title": title, "caption": caption, "alt": alt}, path.read_text())]


def overview_figures(contents: list[dict[str, Any]], folder: Path, *, first_figure: int) -> list[dict[str, Any]]:
    """Draw the speed-ups, one figure per target, into `folder` as SVG and PDF and return them for the page."""
    made = []
    for number, (target, bars) in enumerate(report_sections.speedup_bars(contents).items()):
        name = "speedups.svg" if number == 0 else f"speedups_{number + 1}.svg"
        with figures.with_pdf():
            map_figures.speedups(folder / name, bars, xlabel="ratio of effective samples per second (log scale)")
        spoken = "; ".join(f"{bar.system}, {bar.label}: {verdict.number(bar.value)}" for bar in bars)
        figure = {
            "file": name,
            "title": f"Speed-up over plain dynamics, target {target}",
            "caption": "Ratio of the smallest effective sample size per second, all seeds pooled, with 95 % intervals, on this"
            " machine. * marks ratios to the rate that the slowest timescale allows plain dynamics, where that has not"
            " converged itself. Training, data and burn-in are not included (see Cost). Biased methods have no speed-up. With"
            f" more than {report_sections.MAX_BARS} bars the systems are merged into geometric means.",
            "alt": f"Speed-up bars. {spoken}.",
        }
        made.append(_figure_html((folder / name).read_text(), figure, first_figure + number))
    return made


def has_results(run: Path, system: str) -> bool:
    """Whether a comparison or dynamics of a system are there to show."""
    return (run / "compare" / system / "comparison.json").is_file() or (run / "dynamics" / system / MANIFEST).is_file()


def figure_count(section: dict[str, Any]) -> int:
    """Return how many figures a section has; they are numbered through the page."""
    dynamics = section["dynamics"]
    return (
        len(section["figures"])
        + len(section["resonance"])
        + len(section["training"])
        + (len(dynamics["figures"]) if dynamics else 0)
    )


def dynamics_section(folder: Path, *, first_figure: int) -> dict[str, Any] | None:
    """Return what the page shows of multi-time-step against single-step dynamics, or None where the stage did not run.

    Raises:
        DataError: dynamics.json is not valid JSON, although the manifest is there.
    """
    if not (folder / MANIFEST).is_file():
        return None
    path = folder / "dynamics.json"
    try:
        content = json.loads(path.read_text())
        drawn = [(figure, (folder / figure["file"]).read_text()) for figure in content["figures"]]
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"cannot read {path} ({error}); run the dynamics stage of that system again") from error
    return {
        "content": content,
        "verdict": verdict.dynamics_sentence(content),
        "gain": verdict.gain_sentence(content),
        "conditions": verdict.conditions_sentence(content),
        "rows": [_dynamics_row(row) for row in content["rows"]],
        "figures": [_figure_html(text, figure, first_figure + k) for k, (figure, text) in enumerate(drawn)],
    }


def _dynamics_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return the cells of one observable: text, sorting key, whether a number."""
    numbers = [row["candidate"], row["baseline"], row["difference"], row["combined_se"], row["z"]]
    cells = [{"text": row["observable"], "key": row["observable"], "numeric": ""}]
    cells.append({"text": row["part"] or "–", "key": row["part"], "numeric": ""})
    for value, digits in zip(numbers, (6, 6, 3, 2, 2), strict=True):
        text = "–" if value is None else verdict.number(value, digits)
        cells.append({"text": text, "key": "" if value is None else f"{value!r}", "numeric": "yes"})
    cells.append({"text": row["unit"] or "–", "key": row["unit"], "numeric": ""})
    return {"cells": cells, "verdict": row["verdict"], "note": row["note"], "mark": verdict.DYNAMICS_MARKS[row["verdict"]]}


def agreement_table(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row per cell on whether it agrees with its baseline; a cell without samples shows its status."""
    primary = content["primary_pair"][0] if content["primary_pair"] else None
    rows = []
    for entry in content["methods"]:
        name = f"{entry['method']}, seed {entry['seed']}"
        filled = "ess" in entry
        rows.append(
            {
                "name": name,
                "label": entry["invariance"] if filled else "absent",
                "status": entry["status"],
                "baseline": entry["baseline"] if filled else "",
                "cells": verdict.agreement_row(entry, primary) if filled else [],
            }
        )
    return rows


def panel_table(content: dict[str, Any]) -> dict[str, Any]:
    """Return ESS and R-hat of every observable of every cell, one column per observable."""
    entries = [content["reference"], *(entry for entry in content["methods"] if "panel" in entry)]
    names = list(entries[0]["panel"])
    rows = []
    for entry in entries:
        name = entry["method"] if entry["seed"] is None else f"{entry['method']}, seed {entry['seed']}"
        cells = []
        for observable in names:
            one = entry["panel"][observable]
            text = verdict.number(one["ess"]["value"], 3)
            cells.append({"text": text if one["ess"]["value"] is not None else one["ess"]["note"], "rhat": one["rhat"]})
        rows.append({"name": name, "cells": cells})
    return {"head": names, "rows": rows}


def temperature_table(content: dict[str, Any]) -> dict[str, Any]:
    """Return mean kinetic temperatures per element of every cell that has velocities, and notes for those that lack them."""
    rows, elements, notes = [], [], []
    for entry in [content["reference"], *content["methods"]]:
        found = entry.get("temperature")
        if not found:
            continue
        name = entry["method"] if entry["seed"] is None else f"{entry['method']}, seed {entry['seed']}"
        if found["note"]:
            notes.append(f"{name}: {found['note']}")
        if found["elements"]:
            elements += [element for element in found["elements"] if element not in elements]
            rows.append((name, found["elements"]))
    table = [
        {"name": name, "cells": [verdict.with_interval(one[k], 4) if k in one else "–" for k in elements]} for name, one in rows
    ]
    return {"head": elements, "rows": table, "notes": notes}


def render(context: dict[str, Any], template: str = "report.html") -> str:
    """Return a page as HTML text; every value is escaped except the figures made here."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["number"] = verdict.number
    return environment.get_template(template).render(
        style=Markup((PAGE / STYLE).read_text()),
        script=Markup("\n".join((PAGE / name).read_text() for name in SCRIPTS)),
        **context,
    )
