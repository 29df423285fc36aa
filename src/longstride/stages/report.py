"""Stage `report`: a run folder -> one self-contained HTML page, or one page per system where there are many."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from longstride.analysis import leaderboard, report_page, report_sections, tables, verdict
from longstride.config import dump_config
from longstride.data.atomic import write_text
from longstride.errors import DataError
from longstride.provenance import provenance

if TYPE_CHECKING:
    from pathlib import Path

    from longstride.config import Config

MAX_INLINE_SYSTEMS = 12
MAX_INLINE_BYTES = 12_000_000


def run(config: Config, *, run_folder: Path, out: Path) -> None:
    """Write the report of a run to `out`; it opens without a network.

    Beside it, in a folder of the same name without the suffix: the speed-up figures as SVG and PDF and the verdicts as CSV.
    With more than 12 systems, or more than 12 MB of figures, each system gets its own page in that folder, linked from `out`.

    Args:
        config: the resolved configuration of the run.
        run_folder: results/<run>, with summary.csv, compare/<system>/ and dynamics/<system>/.
        out: the HTML file.

    Raises:
        DataError: summary.csv is missing, or no system has a comparison or dynamics.
    """
    table = report_page.summary_table(run_folder / "summary.csv")
    shown = [one.name for one in config.systems if report_page.has_results(run_folder, one.name)]
    if not shown:
        raise DataError(f"{run_folder} holds no finished comparison; run the compare stage first")
    files = [run_folder / "compare" / name / "comparison.json" for name in shown]
    contents = [report_page.read_comparison(path.parent) for path in files if path.is_file()]
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    overview = report_page.overview_figures(contents, folder, first_figure=1)
    sections = _sections(run_folder, shown, first_figure=len(overview) + 1)
    groups = report_sections.verdict_groups(contents, run_folder)
    rows = [{**row, "target": group["target"]} for group in groups for row in group["rows"]]
    tables.write_csv(folder / "verdicts.csv", leaderboard.COLUMNS, rows)
    first = sections[0]["content"] or sections[0]["dynamics"]["content"]
    context = {
        "run": config.run.name,
        "seed": config.run.seed,
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "table": table,
        "systems": sections,
        "missing": [one.name for one in config.systems if one.name not in shown],
        "verdicts": groups,
        "overview": overview,
        "costs": report_sections.cost_rows(groups, run_folder),
        "samples_per_peptide": leaderboard.SAMPLES_PER_PEPTIDE,
        "explanations": verdict.EXPLANATIONS,
        "method_notes": verdict.METHOD_NOTES,
        "config": dump_config(config),
        "origin": first.get("provenance") or provenance(),
        "commits": sorted({str((one.get("provenance") or {}).get("commit")) for one in contents}),
        "limit": config.compare.max_free_energy_kT,
        "pages": {},
        "folder": folder.name,
    }
    if len(sections) > MAX_INLINE_SYSTEMS or _size(sections) > MAX_INLINE_BYTES:
        context["pages"] = _write_pages(context, sections, out=out)
    text = report_page.render(context)
    write_text(out, text)
    print(f"report: {len(sections)} systems, {len(text) / 1e6:.1f} MB in {out}")


def _sections(run_folder: Path, names: list[str], *, first_figure: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name in names:
        count = sum(report_page.figure_count(one) for one in found)
        found.append(report_page.system_section(run_folder, name, first_figure=first_figure + count))
    return found


def _size(sections: list[dict[str, Any]]) -> int:
    """Return how many bytes the figures of all sections take."""
    total = 0
    for one in sections:
        dynamics = one["dynamics"]["figures"] if one["dynamics"] else []
        total += sum(len(figure["svg"]) for figure in [*one["figures"], *one["resonance"], *one["training"], *dynamics])
    return total


def _write_pages(context: dict[str, Any], sections: list[dict[str, Any]], *, out: Path) -> dict[str, str]:
    """Write one page per system into the folder beside `out`; return system name to link from `out`."""
    folder = out.with_suffix("")
    for k, one in enumerate(sections):
        around = [sections[j]["name"] for j in (k - 1, k + 1) if 0 <= j < len(sections)]
        neighbours = [(name, f"{name}.html") for name in around]
        page = {key: context[key] for key in ("run", "seed", "written", "origin")}
        text = report_page.render({**page, "one": one, "back": f"../{out.name}", "neighbours": neighbours}, "single.html")
        write_text(folder / f"{one['name']}.html", text)
        one["page"] = f"{folder.name}/{one['name']}.html"
    return {one["name"]: one["page"] for one in sections}
