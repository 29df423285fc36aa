"""Tables of a comparison: CSV with units in the column names and one fixed number format."""

from __future__ import annotations

import csv
import io
import math
from typing import TYPE_CHECKING, Any

from longstride.data.atomic import write_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

# Columns whose name ends in _s depend on the speed of the machine; all others are a pure function of config and seed.
SUMMARY_COLUMNS = (
    "system", "method", "target", "invariance", "seed", "status", "n_samples", "n_chains", "acceptance",
    "ess", "ess_ci_low", "ess_ci_high", "ess_observable", "rhat_max",
    "delta_f_phi_kT", "delta_f_phi_ci_low_kT", "delta_f_phi_ci_high_kT", "delta_f_phi_z", "delta_f_phi_umbrella_z",
    "rmse_free_energy_kT",
    "mean_energy_kJ_per_mol", "mean_energy_ci_low_kJ_per_mol", "mean_energy_ci_high_kJ_per_mol", "energy_ks",
    "temperature_K", "basins_visited", "simulated_ps", "energy_calls", "force_calls",
    "ess_per_energy_call", "ess_per_force_call",
    "ess_per_s", "ess_ci_low_per_s", "ess_ci_high_per_s", "simulated_ps_per_s", "sampling_wall_s", "burn_in_wall_s",
)  # fmt: skip


def cell_text(value: Any) -> str:  # noqa: ANN401 - anything a table can hold
    """Return a value as fixed text: floats with six significant digits, None and NaN as an empty cell."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as CSV atomically; a missing key is an empty cell."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([cell_text(row.get(column)) for column in columns] for row in rows)
    write_text(path, buffer.getvalue())


def summary_row(system: str, entry: Mapping[str, Any], primary: str | None) -> dict[str, Any]:
    """Return one row of summary.csv.

    Args:
        system: its name.
        entry: the method's entry of comparison.json (or the reference's).
        primary: name of the phi whose Delta F is shown, or None.
    """
    row: dict[str, Any] = {"system": system, **{key: entry.get(key) for key in ("method", "target", "invariance", "seed")}}
    row["status"] = entry["status"]
    if "ess" not in entry:
        return row
    for key in ("n_samples", "n_chains", "acceptance", "rhat_max", "basins_visited", "simulated_ps"):
        row[key] = entry.get(key)
    ess, rate, mean = entry["ess"], entry["ess_per_s"], entry["energy"]["mean"]
    row |= {"ess": ess["value"], "ess_ci_low": ess["low"], "ess_ci_high": ess["high"], "ess_observable": ess["observable"]}
    row |= {"ess_per_s": rate["value"], "ess_ci_low_per_s": rate["low"], "ess_ci_high_per_s": rate["high"]}
    row |= {
        "mean_energy_kJ_per_mol": mean["value"],
        "mean_energy_ci_low_kJ_per_mol": mean["low"],
        "mean_energy_ci_high_kJ_per_mol": mean["high"],
        "energy_ks": entry["energy"].get("ks"),
        "temperature_K": (entry["temperature"]["elements"].get("all") or {}).get("value"),
        "rmse_free_energy_kT": (entry.get("map") or {}).get("rmse"),
        "energy_calls": entry["counts"].get("energy_calls"),
        "force_calls": entry["counts"].get("force_calls"),
        "ess_per_energy_call": entry["ess_per_energy_call"]["value"],
        "ess_per_force_call": entry["ess_per_force_call"]["value"],
        "simulated_ps_per_s": entry.get("throughput_ps_per_s"),
        "sampling_wall_s": entry["timing"].get("sampling_s"),
        "burn_in_wall_s": entry["timing"].get("burn_in_s"),
    }
    difference = entry["delta_f"].get(primary) if primary else None
    if difference:
        row |= {
            "delta_f_phi_kT": difference["value"],
            "delta_f_phi_ci_low_kT": difference["low"],
            "delta_f_phi_ci_high_kT": difference["high"],
            "delta_f_phi_z": difference.get("z"),
            "delta_f_phi_umbrella_z": (difference.get("umbrella") or {}).get("z"),
        }
    return row


def umbrella_row(system: str, umbrella: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of summary.csv of the independent reference for Delta F: no samples, one free-energy difference.

    Args:
        system: its name.
        umbrella: `content["umbrella"]` of comparison.json.
    """
    difference = umbrella["delta_f"]
    row = {"system": system, **{key: umbrella[key] for key in ("method", "target", "invariance", "simulated_ps", "status")}}
    return row | {
        "delta_f_phi_kT": difference["value"],
        "delta_f_phi_ci_low_kT": difference["low"],
        "delta_f_phi_ci_high_kT": difference["high"],
        "force_calls": umbrella["counts"].get("force_calls"),
        "sampling_wall_s": umbrella["timing"].get("sampling_s"),
    }
