"""Stage `compare`: samples and reference of one system -> free energies, kinetics, efficiency, figures, tables."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from longstride.analysis import (
    compare_figures,
    distribution_comparison,
    markov_analysis,
    paper_rows,
    projection,
    structures,
    tables,
)
from longstride.analysis.accuracy_curves import COLUMNS as ACCURACY_COLUMNS
from longstride.analysis.accuracy_curves import accuracy_rows, attach_accuracy
from longstride.analysis.comparison import Comparison, analyse, table_of
from longstride.analysis.features import circular_feature_names
from longstride.analysis.free_energy import bin_edges
from longstride.analysis.method_analysis import sample_histograms
from longstride.analysis.samples import load_cell, load_molecule, load_reference
from longstride.analysis.umbrella import attach_umbrella, load_umbrella
from longstride.data.atomic import write_json
from longstride.data.manifest import write_manifest
from longstride.errors import DataError
from longstride.progress import Progress, format_duration
from longstride.provenance import provenance
from longstride.seeds import job_seed

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from longstride.analysis.samples import Molecule
    from longstride.config import CompareConfig


def run(
    section: CompareConfig,
    *,
    prepared: Path,
    reference: Path,
    samples: list[Path],
    out: Path,
    seed: int,
    threads: int,
    free_energy: Path | None = None,
) -> None:
    """Compare all samples of one system and write comparison.json, *.csv, *.svg and manifest.json to `out`.

    `free_energy` is the folder of the free-energy stage: its Delta F is shown beside that of every method.

    Methods are compared only within one target potential. Everything but times is a function of the inputs and `seed`;
    one thread is used whatever `threads` says, so that sums have one order.

    Raises:
        DataError: an input is missing, altered, or belongs to another potential. Sample folders without a manifest are
            no error: they are shown as absent.
    """
    del threads
    begin = time.monotonic()
    progress = Progress("compare", len(samples) + 3, "parts")
    molecule = load_molecule(prepared)
    trajectories = load_reference(reference, molecule)
    progress.update(1, "reference read")
    cells = []
    for folder in samples:
        cells.append(load_cell(folder, molecule))
        progress.update(1 + len(cells), str(folder))
    found = analyse(molecule, trajectories, cells, section, seed=seed)
    if free_energy is not None:
        attach_umbrella(found.content, load_umbrella(free_energy, molecule))
    attach_accuracy(found, cells, molecule.torsions, section)
    distribution_comparison.attach_distributions(found, cells, molecule, section, seed=job_seed(seed, "distributions"))
    progress.update(2 + len(cells), "analysed")
    out.mkdir(parents=True, exist_ok=True)
    figures = compare_figures.draw(found, molecule, section, out=out, seed=seed)
    names = write_tables(found, molecule, section, out=out, seed=seed)
    shown = structures.representatives(molecule, found.reference, reference)
    content = {**found.content, "structures": shown, "figures": figures, "tables": names, "provenance": provenance()}
    write_json(out / "comparison.json", content)
    files = ["comparison.json", *names, *(figure[key] for figure in figures for key in ("file", "pdf"))]
    if found.reference.tica is not None:
        spacing = float(trajectories.manifest["frame_spacing_ps"])
        model = (found.reference.tica, circular_feature_names(molecule.torsions), spacing)
        files += projection.save_tica(out, {"torsions": model})
    if shown is not None:
        structures.write_states_pdb(out / "states.pdb", molecule, shown)
        files.append("states.pdb")
    write_manifest(out, kind="compare", files=files, content={"system": found.content["system"]})
    progress.update(3 + len(cells), "written")
    filled = sum(cell.samples is not None for cell in cells)
    print(f"compare: {filled} of {len(cells)} sample sets in {format_duration(time.monotonic() - begin)}, see {out}")


def write_tables(found: Comparison, molecule: Molecule, section: CompareConfig, *, out: Path, seed: int) -> list[str]:
    """Write the CSV tables of a comparison and return their names."""
    content = found.content
    columns = (
        "method", "target", "seed", "observable", "ess", "ess_ci_low", "ess_ci_high", "timewarp_ess", "bulk_ess", "tail_ess",
        "batch_means_ess", "rhat", "note",
    )  # fmt: skip
    entries = [content["reference"], *content["methods"]]
    rows = [
        {
            "method": entry["method"], "target": entry["target"], "seed": entry["seed"], "observable": name,
            "ess": one["ess"]["value"], "ess_ci_low": one["ess"]["low"], "ess_ci_high": one["ess"]["high"],
            **{key: one[key] for key in ("timewarp_ess", "bulk_ess", "tail_ess", "batch_means_ess", "rhat")},
            "note": one["ess"]["note"],
        }
        for entry in entries
        for name, one in entry.get("panel", {}).items()
    ]  # fmt: skip
    tables.write_csv(out / "effective_sizes.csv", columns, rows)
    tables.write_csv(out / "methods.csv", tables.SUMMARY_COLUMNS, summary_rows(content))
    scales = [
        {"source": name, "lag_ps": one["lag_ps"], "index": k + 1, "deeptime_ps": one["deeptime_ps"][k],
         "ci_low_ps": one["low_ps"][k], "ci_high_ps": one["high_ps"][k], "pyemma_ps": one["pyemma_ps"][k], "note": one["note"]}
        for name, lags in _timescale_sources(content)
        for one in lags
        for k in range(len(one["deeptime_ps"]))
    ]  # fmt: skip
    scale_columns = ("source", "lag_ps", "index", "deeptime_ps", "ci_low_ps", "ci_high_ps", "pyemma_ps", "note")
    tables.write_csv(out / "implied_timescales.csv", scale_columns, scales)
    names = ["effective_sizes.csv", "methods.csv", "implied_timescales.csv", *_write_trust(content, out=out), "accuracy.csv"]
    tables.write_csv(out / "accuracy.csv", ACCURACY_COLUMNS, accuracy_rows(content))
    names += distribution_comparison.write_tables(content, out)
    if content["primary_pair"] is None:
        return names
    _write_free_energies(found, molecule, section, out=out, seed=seed)
    return [*names, "free_energy_phi.csv", "free_energy_map.csv"]


def _write_trust(content: dict[str, Any], *, out: Path) -> list[str]:
    """Write the verdict of every cell, the checks of the reference and the rows in the columns of published tables."""
    rows = [
        {**{key: entry.get(key) for key in ("method", "target", "seed", "status")}, **entry["verdict"]}
        for entry in content["methods"]
    ]
    tables.write_csv(out / "verdicts.csv", ("method", "target", "seed", "status", "word", "reason"), rows)
    checks = content["reference"]["certification"]["checks"]
    tables.write_csv(out / "certification.csv", ("name", "value", "limit", "passed", "statement"), checks)
    tables.write_csv(out / "paper_rows.csv", paper_rows.COLUMNS, paper_rows.paper_rows(content))
    markov = markov_analysis.write_tables(content["reference"]["msm"], out)
    return ["verdicts.csv", "certification.csv", "paper_rows.csv", *markov]


def write_leaderboard(runs: Sequence[Path], out_csv: Path) -> None:
    """Write leaderboard.csv of several run folders; see `analysis.leaderboard`.

    Raises:
        DataError: a run has no readable comparison.
    """
    from longstride.analysis import leaderboard

    rows = leaderboard.leaderboard(runs)
    tables.write_csv(out_csv, leaderboard.COLUMNS, rows)
    print(f"leaderboard: {len(rows)} rows of {len(runs)} runs in {out_csv}")


def _timescale_sources(content: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    methods = [
        (f"{entry['method']}/seed{entry['seed']}", entry["timescales"]["lags"])
        for entry in content["methods"]
        if "timescales" in entry
    ]
    return [("reference", content["reference"]["timescales"]), *methods]


def _write_free_energies(found: Comparison, molecule: Molecule, section: CompareConfig, *, out: Path, seed: int) -> None:
    model, bins = found.reference, section.bins
    maps = {"reference_msm": model.map_msm, "reference_raw": model.map_raw}
    profiles = {"reference_msm": model.profile_msm, "reference_raw": model.profile_raw}
    for (target, method), samples in sorted(found.pooled.items()):
        key = method if target == model.samples.manifest["target"] else f"{method}_{target}"
        maps[key], profiles[key] = sample_histograms(
            samples, molecule.torsions, section, seed=job_seed(seed, "pooled", target, method)
        )
    centres = np.degrees((bin_edges(bins)[1:] + bin_edges(bins)[:-1]) / 2)
    columns = [f"{name}_{part}_kT" for name in maps for part in ("F", "error")]
    flat = [array for one in profiles.values() for array in table_of(one, bins)]
    rows = [{"phi_deg": float(centres[k]), **{c: float(v[k]) for c, v in zip(columns, flat, strict=True)}} for k in range(bins)]
    tables.write_csv(out / "free_energy_phi.csv", ["phi_deg", *columns], rows)
    flat = [array for one in maps.values() for array in table_of(one, bins**2)]
    rows = [
        {
            "phi_deg": float(centres[k // bins]),
            "psi_deg": float(centres[k % bins]),
            **{c: float(v[k]) for c, v in zip(columns, flat, strict=True)},
        }
        for k in range(bins**2)
    ]
    tables.write_csv(out / "free_energy_map.csv", ["phi_deg", "psi_deg", *columns], rows)


def summary_rows(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of summary.csv of one comparison: the reference first, then every cell, filled or not."""
    primary = content["primary_pair"][0] if content["primary_pair"] else None
    entries = [content["reference"], *content["methods"]]
    rows = [tables.summary_row(content["system"], entry, primary) for entry in entries]
    if "umbrella" in content:
        rows.insert(1, tables.umbrella_row(content["system"], content["umbrella"]))
    return rows


def summarise(comparison_files: list[Path], out_csv: Path, *, dynamics_files: Sequence[Path] = ()) -> None:
    """Write summary.csv: one row per (system, method, seed), systems in alphabetical order.

    Only columns whose name ends in `_s` depend on the speed of the machine.

    Args:
        comparison_files: comparison.json of systems.
        out_csv: the file to write.
        dynamics_files: dynamics.json of systems; they fill in for systems without a comparison, such as those in a box.

    Raises:
        DataError: a comparison is missing or not valid JSON.
    """
    contents = sorted((_read(path, "compare") for path in comparison_files), key=lambda content: content["system"])
    compared = {content["system"]: summary_rows(content) for content in contents}
    others = [_read(path, "dynamics") for path in dynamics_files]
    compared |= {content["system"]: content["methods"] for content in others if content["system"] not in compared}
    rows = [row for system in sorted(compared) for row in compared[system]]
    tables.write_csv(out_csv, tables.SUMMARY_COLUMNS, rows)
    print(f"summary: {len(rows)} rows in {out_csv}")


def _read(path: Path, stage: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"cannot read {path} ({error}); run the {stage} stage of that system again") from error
