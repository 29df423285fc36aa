"""Stage `report`: a run folder -> one self-contained HTML page."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from longstride.analysis import report_page, verdict
from longstride.config import dump_config
from longstride.data.atomic import write_text
from longstride.errors import DataError
from longstride.provenance import provenance

if TYPE_CHECKING:
    from pathlib import Path

    from longstride.config import Config


def run(config: Config, *, run_folder: Path, out: Path) -> None:
    """Write the report of a run to `out`; it opens without a network.

    Args:
        config: the resolved configuration of the run.
        run_folder: results/<run>, with summary.csv, compare/<system>/ and dynamics/<system>/.
        out: the HTML file.

    Raises:
        DataError: summary.csv is missing, or no system has a comparison or dynamics.
    """
    table = report_page.summary_table(run_folder / "summary.csv")
    sections: list[dict[str, Any]] = []
    missing = []
    for system in config.systems:
        if not report_page.has_results(run_folder, system.name):
            missing.append(system.name)
            continue
        count = sum(report_page.figure_count(one) for one in sections)
        sections.append(report_page.system_section(run_folder, system.name, first_figure=count + 1))
    if not sections:
        raise DataError(f"{run_folder} holds no finished comparison; run the compare stage first")
    first = sections[0]["content"] or sections[0]["dynamics"]["content"]
    origin = first.get("provenance") or provenance()
    context = {
        "run": config.run.name,
        "seed": config.run.seed,
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "table": table,
        "systems": sections,
        "missing": missing,
        "explanations": verdict.EXPLANATIONS,
        "method_notes": verdict.METHOD_NOTES,
        "config": dump_config(config),
        "origin": origin,
        "limit": config.compare.max_free_energy_kT,
    }
    text = report_page.render(context)
    write_text(out, text)
    print(f"report: {len(sections)} systems, {len(text) / 1e6:.1f} MB in {out}")
