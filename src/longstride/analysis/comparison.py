"""All methods of one system, grouped by target potential: entries, pooled efficiencies and speed-ups as JSON values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import logsumexp

from longstride.analysis.basins import basin_summary
from longstride.analysis.cell_verdict import cell_verdict, estimate_of
from longstride.analysis.certification import certify
from longstride.analysis.cost import dynamics_rate
from longstride.analysis.energies import compare_energies
from longstride.analysis.estimate import Estimate, finite, ratio, undefined
from longstride.analysis.free_energy import FreeEnergy, crossings
from longstride.analysis.method_analysis import (
    MIXED_RHAT,
    Baseline,
    analyse_method,
    baseline_of_method,
    baseline_of_reference,
    efficiency,
    kinetics_json,
    pool,
    temperatures,
)
from longstride.analysis.reference_model import ReferenceModel, lag_frames, model_reference, reference_markov_json
from longstride.analysis.weighted import check_weights
from longstride.seeds import job_seed

if TYPE_CHECKING:
    from longstride.analysis.samples import Cell, Molecule, SampleSet
    from longstride.config import CompareConfig

# what each method is measured against, where it was sampled on the same target; the baselines among each other likewise
BASELINE_METHODS = ("md", "tuned-md", "sts")
BASELINES_OF_BASELINES = {"md": (), "tuned-md": ("md",), "sts": ()}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The analysed system.

    Attributes:
        reference: the analysed reference.
        baselines: target name to its baseline (None where there is none).
        pooled: (target, method) to the samples of all its seeds, chains side by side.
        content: everything as JSON values.
    """

    reference: ReferenceModel
    baselines: dict[str, Baseline | None]
    pooled: dict[tuple[str, str], SampleSet]
    content: dict[str, Any]


def pooled_sets(cells: list[Cell]) -> dict[tuple[str, str], SampleSet]:
    """Return the samples of all seeds of each (target, method) as one set; times and calls are summed."""
    groups: dict[tuple[str, str], list[SampleSet]] = {}
    for cell in cells:
        if cell.samples is not None and cell.status == "complete":
            groups.setdefault((str(cell.samples.manifest["target"]), cell.method), []).append(cell.samples)
    found = {}
    for key, sets in groups.items():
        angles, energy = pool(sets)
        manifest = dict(sets[0].manifest)
        manifest["cores"] = (manifest.get("timing") or {}).get("threads")
        for part in ("timing", "counts"):
            manifest[part] = _summed([dict(one.manifest.get(part) or {}) for one in sets])
        found[key] = replace(
            sets[0],
            manifest=manifest,
            angles=angles,
            energy=energy,
            temperature={},
            log_weights=_pooled_weights(sets, len(energy)),
        )
    return found


def _pooled_weights(sets: list[SampleSet], length: int) -> np.ndarray | None:
    """Return the log-weights of several sets side by side, each set counting as its number of samples; None without any."""
    if all(one.log_weights is None for one in sets):
        return None
    parts = []
    for one in sets:
        part = np.zeros(one.energy.shape)[:length] if one.log_weights is None else one.log_weights[:length]
        # weights are known up to a constant that differs between seeds; unusable ones stay so and are labelled
        parts.append(part - logsumexp(part) + np.log(part.size) if not check_weights(part) else part)
    return np.concatenate(parts, axis=1)


def _summed(parts: list[dict[str, Any]]) -> dict[str, Any]:
    names = [name for name in parts[0] if all(isinstance(part.get(name), int | float) for part in parts)]
    return {name: sum(part[name] for part in parts) for name in names if name != "threads"}


def analyse(molecule: Molecule, samples: SampleSet, cells: list[Cell], section: CompareConfig, *, seed: int) -> Comparison:
    """Analyse the reference and every cell.

    Args:
        molecule: the prepared system.
        samples: the reference trajectories.
        cells: sample cells, filled or not.
        section: settings.
        seed: of clustering and bootstraps.
    """
    torsions = molecule.torsions
    cells = sorted(cells, key=lambda one: (one.method, one.seed))  # results must not depend on the order of arguments
    reference = model_reference(samples, torsions, section, seed=seed)
    own_target = str(samples.manifest["target"])
    pooled = pooled_sets(cells)
    baselines: dict[str, Baseline | None] = {own_target: baseline_of_reference(reference, torsions)}
    for target, _ in pooled:
        if target not in baselines:
            single = pooled.get((target, "sts"))
            baselines[target] = None if single is None else baseline_of_method("sts", [single], reference, torsions, section)
    entries = []
    for cell in cells:
        target = "" if cell.samples is None else str(cell.samples.manifest["target"])
        identity = job_seed(seed, cell.method, cell.seed)
        entries.append(analyse_method(cell, torsions, section, reference, baselines.get(target), seed=identity))
    own_baseline = baselines[own_target]
    content = {
        "system": molecule.manifest["system"],
        "torsions": list(torsions.names),
        "primary_pair": None if torsions.pair is None else [torsions.names[k] for k in torsions.pair],
        "settings": section.model_dump(mode="json"),
        "temperature_K": molecule.manifest.get("temperature_K"),
        "reference": reference_json(reference, molecule, section, own_baseline),
        "methods": entries,
        "pooled": _pooled_json(pooled, molecule, reference, baselines),
    }
    content["speedups"] = speedups(content["pooled"], content["reference"], reference, section)
    content["reference"]["certification"] = certify(
        reference,
        torsions,
        section,
        rhat_max=content["reference"]["rhat_max"],
        slowest=_crossing_time(reference, section),
        seed=job_seed(seed, "certify"),
    )
    rates = {(one["target"], one["versus"]): estimate_of(one["dynamics_ess_per_s_from_msm"]) for one in content["speedups"]}
    for entry in entries:
        entry["verdict"] = cell_verdict(entry, content["pooled"], mixed_rhat=MIXED_RHAT, msm_rates=rates)
    return Comparison(reference=reference, baselines=baselines, pooled=pooled, content=content)


def _pooled_json(
    pooled: dict[tuple[str, str], SampleSet],
    molecule: Molecule,
    reference: ReferenceModel,
    baselines: dict[str, Baseline | None],
) -> list[dict[str, Any]]:
    found = []
    for (target, method), samples in sorted(pooled.items()):
        entry = efficiency(samples, molecule.torsions, reference, baselines[target])
        seconds = samples.manifest["timing"].get("sampling_s")
        physical = bool(samples.manifest["physical_time"])
        simulated = samples.size * float(samples.manifest["save_every"]) if physical else None
        found.append(
            {
                "target": target,
                "method": method,
                "invariance": samples.manifest["invariance"],
                "n_samples": samples.size,
                **{key: entry[key] for key in ("ess", "ess_per_s", "ess_per_core_hour", "rhat_max")},
                "sampling_s": seconds,
                "cores": samples.manifest["cores"],
                "throughput_ps_per_s": simulated / seconds if simulated and seconds else None,
            }
        )
    return found


def reference_json(
    reference: ReferenceModel, molecule: Molecule, section: CompareConfig, baseline: Baseline | None
) -> dict[str, Any]:
    """Return the reference's results as JSON values, shaped like a method's entry with the MSM results beside."""
    samples, torsions = reference.samples, molecule.torsions
    times, chains = samples.energy.shape
    spacing = float(samples.manifest["frame_spacing_ps"])
    timing = {"sampling_s": samples.manifest.get("wall_s")}
    counts = dict(samples.manifest.get("counts") or {})
    manifest = {**samples.manifest, "timing": timing, "counts": counts}
    found = efficiency(replace(samples, manifest=manifest), torsions, reference, baseline)
    weights = reference.weights
    lag = lag_frames(section.msm_lag_ps, spacing)
    slowest = undefined("no torsions") if reference.kinetics is None else reference.kinetics.slowest(lag)
    simulated = times * chains * spacing
    delta_f = {}
    for k in torsions.phis:
        name = torsions.names[k]
        delta_f[name] = {
            **reference.delta_f_msm[name].to_json(),
            "raw": reference.delta_f_raw[name].to_json(),
            "crossings": crossings(samples.angles[..., k] >= 0),
        }
    return {
        "method": "reference",
        "target": samples.manifest["target"],
        "invariance": "unadjusted",
        "seed": None,
        "status": _reference_status(reference),
        "n_samples": samples.size,
        "n_chains": chains,
        "n_saves": times,
        "save_every": spacing,
        "simulated_ps": simulated,
        "throughput_ps_per_s": simulated / timing["sampling_s"] if timing["sampling_s"] else None,
        "counts": counts,
        "timing": timing,
        **found,
        "delta_f": delta_f,
        "basins": basin_summary(samples.angles, torsions, reference.frame_weights),
        "basins_visited": len(basin_summary(samples.angles, torsions, None, present=True)),
        "energy": {"mean": compare_energies(samples.energy, None).mean.to_json()},
        "temperature": temperatures(samples),
        "msm": {
            "lag_ps": lag * spacing,
            "states": 0 if reference.clusters is None else reference.clusters.n_states,
            "connected_fraction": None if weights is None else weights.connected_fraction,
            "note": "no torsions" if weights is None else weights.note,
            "slowest_timescale_ps": slowest.to_json(),
            **reference_markov_json(reference),
        },
        "timescales": [] if reference.kinetics is None else kinetics_json(reference.kinetics),
        "estimators_differ_by": None if reference.kinetics is None else reference.kinetics.disagreement,
        "tica": _tica_json(reference, spacing),
    }


def _tica_json(reference: ReferenceModel, spacing: float) -> dict[str, Any] | None:
    if reference.tica is None or reference.tica_pyemma is None:
        return None
    count = len(reference.tica_pyemma)
    return {
        "lag_ps": reference.tica.lag * spacing,
        "deeptime_ps": [finite(float(value) * spacing) for value in reference.tica.timescales[:count]],
        "pyemma_ps": [finite(float(value) * spacing) for value in reference.tica_pyemma],
    }


def _reference_status(reference: ReferenceModel) -> str:
    if reference.weights is None:
        return "no torsions"
    if reference.weights.weights is None or reference.weights.note:
        return reference.weights.note
    lost = [f"{name}: {entry.note}" for name, entry in reference.delta_f_msm.items() if not entry.defined]
    return lost[0] if lost else "ok"


def _crossing_time(reference: ReferenceModel, section: CompareConfig) -> Estimate:
    # without all basins in the connected set the slowest timescale is that of some faster process inside one of them
    for name, entry in reference.delta_f_msm.items():
        if not entry.defined:
            return undefined(f"the MSM of the reference does not connect the basins of {name}")
    if reference.kinetics is None:
        return undefined("no torsions")
    spacing = float(reference.samples.manifest["frame_spacing_ps"])
    return reference.kinetics.slowest(lag_frames(section.msm_lag_ps, spacing))


def _plain_rate(plain: dict[str, Any] | None) -> Estimate:
    """Return the ESS/s of plain dynamics, undefined where its chains disagree: their own ESS then means nothing."""
    if plain is None:
        return undefined("no plain dynamics on this target")
    rhat = plain["rhat_max"]
    if rhat is not None and rhat > MIXED_RHAT:
        return undefined(f"{plain['method']} has not mixed, R-hat {rhat:.2f}: its own ESS cannot be trusted")
    return estimate_of(plain["ess_per_s"])


def speedups(
    pooled: list[dict[str, Any]], reference_entry: dict[str, Any], reference: ReferenceModel, section: CompareConfig
) -> list[dict[str, Any]]:
    """Return ESS/s of every unbiased method over each plain dynamics of its target, all seeds pooled.

    Plain dynamics is `md` and `tuned-md` on the reference's target (the second is measured against the first) and `sts`
    on a teacher. Two ratios each: against its measured ESS/s, and, on the reference's target, against the rate that
    follows from the MSM's slowest timescale and the throughput of that plain dynamics (`cost.dynamics_rate`), which exists
    even where plain dynamics never crosses. Without any plain dynamics the throughput is that of the reference.
    """
    own_target = reference_entry["target"]
    crossing = _crossing_time(reference, section)
    found = []
    for entry in pooled:
        if entry["invariance"] == "biased":
            continue
        own = entry["target"] == own_target
        slowest = crossing if own else undefined("no MSM of this target")
        plains = _plain_dynamics(entry, pooled)
        found += [_speedup(entry, plain, slowest=slowest) for plain in plains]
        if not plains and entry["method"] not in BASELINE_METHODS:
            rate = reference_entry["throughput_ps_per_s"] if own else None
            found.append(_speedup(entry, None, slowest=slowest, reference_throughput=rate))
    return found


def _plain_dynamics(entry: dict[str, Any], pooled: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = BASELINES_OF_BASELINES.get(entry["method"], BASELINE_METHODS)
    return [one for name in names for one in pooled if (one["target"], one["method"]) == (entry["target"], name)]


def _speedup(
    entry: dict[str, Any], plain: dict[str, Any] | None, *, slowest: Estimate, reference_throughput: float | None = None
) -> dict[str, Any]:
    throughput = plain["throughput_ps_per_s"] if plain else reference_throughput
    from_msm = dynamics_rate(slowest, throughput)
    baseline = entry["method"] in BASELINE_METHODS
    this = _plain_rate(entry) if baseline else estimate_of(entry["ess_per_s"])
    simulated = entry["throughput_ps_per_s"]
    return {
        "target": entry["target"],
        "method": entry["method"],
        "invariance": entry["invariance"],
        "is_baseline": baseline,
        "versus": plain["method"] if plain else "reference",
        "cores": entry["cores"],
        "versus_cores": plain["cores"] if plain else None,
        "versus_throughput_ps_per_s": throughput,
        "measured": ratio(this, _plain_rate(plain)).to_json(),
        "dynamics_ess_per_s_from_msm": from_msm.to_json(),
        "against_msm": ratio(this, from_msm).to_json(),
        "throughput_ratio": simulated / throughput if plain and throughput and simulated else None,
    }


def table_of(free_energy: FreeEnergy | None, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Return values and errors of a FreeEnergy, or arrays of NaN [bins] where there is none."""
    if free_energy is None:
        return np.full(bins, np.nan), np.full(bins, np.nan)
    return free_energy.values, free_energy.errors
