"""One method's samples against the baseline of the same target, as plain JSON values."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from longstride.analysis.convergence import mean_estimate
from longstride.analysis.cost import (
    ObservableSize,
    StatePaths,
    core_hours,
    moving,
    panel,
    per_unit,
    sizes,
    smallest_size,
)
from longstride.analysis.energies import compare_energies
from longstride.analysis.estimate import Estimate, finite, undefined
from longstride.analysis.features import Torsions, circular_features
from longstride.analysis.free_energy import (
    FreeEnergy,
    agreement,
    basin_of,
    basin_populations,
    bin_index,
    crossings,
    delta_f_chains,
    grid_index,
    rare_crossings,
)
from longstride.analysis.map_comparison import MapComparison, basins_of_grid, compare_maps
from longstride.analysis.reference_model import Kinetics, ReferenceModel, chain_histograms, end_to_end, kinetics, lag_frames
from longstride.analysis.weighted import (
    check_weights,
    kish_size,
    normalised_weights,
    weighted_delta_f,
    weighted_free_energy,
)
from longstride.seeds import job_seed

if TYPE_CHECKING:
    from longstride.analysis.samples import Cell, SampleSet
    from longstride.config import CompareConfig

MIXED_RHAT = 1.1


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What the methods of one target are compared with.

    Attributes:
        name: "reference (MSM-reweighted)" or "sts, all seeds".
        methods: methods whose own samples make up the baseline; they are not compared with themselves.
        map: free energy over (phi, psi), or None.
        delta_f: torsion name to Delta F in kT.
        energy: [time, chain] kJ/mol.
        energy_weights: [time, chain], or None for equal weights.
        required: panel observables that move in the baseline.
    """

    name: str
    methods: frozenset[str]
    map: FreeEnergy | None
    delta_f: dict[str, Estimate]
    energy: np.ndarray
    energy_weights: np.ndarray | None
    required: set[str]


def baseline_of_reference(reference: ReferenceModel, torsions: Torsions) -> Baseline:
    """Return the MSM-reweighted reference as the baseline of its own target."""
    return Baseline(
        name="reference (MSM-reweighted)",
        methods=frozenset(),
        map=_map_with_events(reference, torsions),
        delta_f=reference.delta_f_msm,
        energy=reference.samples.energy,
        energy_weights=reference.frame_weights,
        required=moving(panel_of(reference.samples.angles, torsions, reference)),
    )


def panel_of(angles: np.ndarray, torsions: Torsions, reference: ReferenceModel) -> dict[str, np.ndarray]:
    """Return the panel of angles [time, chain, torsion] rad with the TICA and the macrostates of the reference."""
    return panel(angles, torsions, reference.tica, state_paths(angles, reference))


def state_paths(angles: np.ndarray, reference: ReferenceModel) -> StatePaths | None:
    """Return the macrostate of every sample, or None where the reference has none."""
    states = getattr(reference, "macrostates", None)
    if states is None:
        return None
    count = getattr(states, "n_states", None)
    if count is None:  # a plain function: the reference shows how many there are
        count = np.asarray(states(reference.samples.angles)).max() + 1
    return StatePaths(index=np.asarray(states(angles)), count=int(count))


def _map_with_events(reference: ReferenceModel, torsions: Torsions) -> FreeEnergy | None:
    """Return the reweighted map; few crossings make its bootstrap too narrow, so they bound the number of its units."""
    grid, weights = reference.map_msm, reference.weights
    if grid is None or weights is None or weights.weights is None:
        return grid
    events = [rare_crossings(end_to_end(reference.samples.angles[..., k] >= 0), weights) for k in torsions.phis]
    return replace(grid, units=max(2, min(grid.units, *(int(one) for one in events), grid.units)))


def map_json(found: MapComparison) -> dict[str, Any]:
    """Return the comparison of two maps as JSON values."""
    return asdict(found)


def pool(sets: list[SampleSet]) -> tuple[np.ndarray, np.ndarray]:
    """Return angles [time, chain, torsion] and energies [time, chain] of several sets, chains side by side.

    Longer sets are cut to the shortest; they belong to one method, so lengths are equal in practice.
    """
    length = min(len(one.energy) for one in sets)
    angles = np.concatenate([one.angles[:length] for one in sets], axis=1)
    return angles, np.concatenate([one.energy[:length] for one in sets], axis=1)


def baseline_of_method(
    method: str, sets: list[SampleSet], reference: ReferenceModel, torsions: Torsions, section: CompareConfig
) -> Baseline:
    """Return the pooled samples of one method (sts on a teacher) as the baseline of its target."""
    angles, energy = pool(sets)
    grid, _ = chain_histograms(angles, torsions, section, seed=job_seed(0, "baseline", method))
    return Baseline(
        name=f"{method}, all seeds",
        methods=frozenset({method}),
        map=grid,
        delta_f={torsions.names[k]: delta_f_chains(angles[..., k] >= 0) for k in torsions.phis},
        energy=energy,
        energy_weights=None,
        required=moving(panel_of(angles, torsions, reference)),
    )


def absent_method(cell: Cell) -> dict[str, Any]:
    """Return the entry of a cell without samples: its identity and status, nothing else."""
    return {"method": cell.method, "seed": cell.seed, "status": cell.status}


def _identity(cell: Cell, samples: SampleSet) -> dict[str, Any]:
    manifest = samples.manifest
    times, chains = samples.energy.shape
    timing, counts = dict(manifest.get("timing") or {}), dict(manifest.get("counts") or {})
    physical = bool(manifest["physical_time"])
    simulated = times * chains * float(manifest["save_every"]) if physical else None
    seconds = timing.get("sampling_s")
    return {
        "method": cell.method,
        "seed": cell.seed,
        "target": manifest["target"],
        "invariance": manifest["invariance"],
        "physical_time": physical,
        "save_every": manifest["save_every"],
        "save_unit": "ps" if physical else "proposals",
        "n_saves": times,
        "n_chains": chains,
        "n_samples": samples.size,
        "counts": counts,
        "timing": timing,
        "simulated_ps": simulated,
        "throughput_ps_per_s": simulated / seconds if simulated and seconds else None,
        "acceptance": manifest.get("acceptance"),
    }


def _panel_json(found: dict[str, ObservableSize]) -> dict[str, Any]:
    return {
        name: {
            "ess": entry.size.to_json(),
            "timewarp_ess": entry.timewarp.value,
            "bulk_ess": entry.bulk.value,
            "tail_ess": entry.tail.value,
            "batch_means_ess": entry.batches.value,
            "rhat": entry.rhat.value,
        }
        for name, entry in found.items()
    }


def efficiency(samples: SampleSet, torsions: Torsions, reference: ReferenceModel, baseline: Baseline | None) -> dict[str, Any]:
    """Return ESS over the panel, its minimum, and the minimum per second and per call.

    Args:
        samples: the method's.
        torsions: of the molecule.
        reference: for its TICA.
        baseline: decides which observables must be resolved; None requires nothing.
    """
    found = sizes(panel_of(samples.angles, torsions, reference), samples.log_weights)
    smallest, observable = smallest_size(found, required=set() if baseline is None else baseline.required)
    counts, timing = samples.manifest.get("counts") or {}, samples.manifest.get("timing") or {}
    cores = timing.get("threads") or samples.manifest.get("cores")
    rhats = [entry.rhat.value for entry in found.values() if entry.rhat.value is not None]
    return {
        "panel": _panel_json(found),
        "ess": {**smallest.to_json(), "observable": observable},
        "ess_per_s": per_unit(smallest, timing.get("sampling_s"), "sampling time").to_json(),
        "ess_per_core_hour": per_unit(smallest, core_hours(timing.get("sampling_s"), cores), "core-hour").to_json(),
        "ess_per_energy_call": per_unit(smallest, counts.get("energy_calls"), "energy call").to_json(),
        "ess_per_force_call": per_unit(smallest, counts.get("force_calls"), "force call").to_json(),
        "rhat_max": max(rhats) if rhats else None,
    }


def _plain_weights(samples: SampleSet) -> np.ndarray | None:
    """Return weights that sum to 1, or None where all samples weigh the same or the weights cannot be used."""
    weights = samples.log_weights
    return None if weights is None or check_weights(weights) else normalised_weights(weights)


def sample_histograms(
    samples: SampleSet, torsions: Torsions, section: CompareConfig, *, seed: int
) -> tuple[FreeEnergy | None, FreeEnergy | None]:
    """Return the (phi, psi) map and the phi profile of a sample set, weighted where it has weights; None without torsions."""
    weights = samples.log_weights
    if weights is None or torsions.pair is None:
        return chain_histograms(samples.angles, torsions, section, seed=seed)
    phi, psi = (samples.angles[..., k] for k in torsions.pair)
    bins, common = section.bins, {"replicates": section.bootstrap, "seed": seed}
    grid = weighted_free_energy(grid_index(phi, psi, bins), weights, bins=bins**2, **common)
    return grid, weighted_free_energy(bin_index(phi, bins), weights, bins=bins, **common)


def _free_energies(
    samples: SampleSet,
    torsions: Torsions,
    section: CompareConfig,
    baseline: Baseline | None,
    *,
    effective: float | None,
    seed: int,
) -> dict[str, Any]:
    found: dict[str, Any] = {"delta_f": {}, "map": None, "basins": None, "basins_visited": None}
    for k in torsions.phis:
        inside, name = samples.angles[..., k] >= 0, torsions.names[k]
        weights = samples.log_weights
        estimate = delta_f_chains(inside) if weights is None else weighted_delta_f(inside, weights)
        other = undefined("no baseline for this target") if baseline is None else baseline.delta_f[name]
        z, statement = agreement(estimate, other)
        found["delta_f"][name] = {
            **estimate.to_json(), "crossings": crossings(inside), "z": z, "statement": statement,
            "fraction": float(inside.mean()),
        }  # fmt: skip
    if torsions.pair is None:
        return found
    phi, psi = (samples.angles[..., k] for k in torsions.pair)
    found["basins"] = basin_populations(phi, psi, _plain_weights(samples))
    found["basins_visited"] = len(np.unique(basin_of(phi, psi)))
    grid, _ = sample_histograms(samples, torsions, section, seed=seed)
    if grid is not None and baseline is not None and baseline.map is not None:
        # blocks of a few chains that have not mixed are not independent: no more units than effective samples
        grid = replace(grid, units=max(2, min(grid.units, int(effective or 0))))
        basins = basins_of_grid(section.bins)
        found["map"] = map_json(compare_maps(grid, baseline.map, limit=section.max_free_energy_kT, basins=basins))
    return found


def _energies(samples: SampleSet, baseline: Baseline | None) -> dict[str, Any]:
    result = compare_energies(
        samples.energy,
        None if baseline is None else baseline.energy,
        None if baseline is None else baseline.energy_weights,
        samples.log_weights,
    )
    return {
        "mean": result.mean.to_json(),
        "difference": result.difference.to_json(),
        "ks": result.ks,
        "ks_noise": result.ks_noise,
        "statement": result.statement,
    }


def temperatures(samples: SampleSet) -> dict[str, Any]:
    """Return the mean kinetic temperature in K, of all atoms and per element, with intervals and a note."""
    found = {name: mean_estimate(series).to_json() for name, series in samples.temperature.items()}
    return {"elements": found, "note": samples.temperature_note}


def kinetics_json(found: Kinetics) -> list[dict[str, Any]]:
    """Return implied timescales in ps, one entry per lag, both estimators side by side."""
    unit = found.spacing_ps

    def ps(values: np.ndarray) -> list[float | None]:
        return [finite(float(value) * unit) for value in values]

    return [
        {
            "lag_ps": entry.lag * unit, "deeptime_ps": ps(entry.values), "low_ps": ps(entry.low), "high_ps": ps(entry.high),
            "pyemma_ps": ps(theirs), "connected_fraction": entry.connected_fraction, "note": entry.note,
        }
        for entry, theirs in zip(found.deeptime, found.pyemma, strict=True)
    ]  # fmt: skip


def _timescales(samples: SampleSet, reference: ReferenceModel, section: CompareConfig, *, seed: int) -> dict[str, Any]:
    if samples.log_weights is not None:
        return {"note": "not computed: a bias acted on these samples, so their dynamics is not the molecule's", "lags": []}
    if not samples.manifest["physical_time"]:
        return {"note": "not computed: the steps of this method are not physical time", "lags": []}
    if reference.clusters is None:
        return {"note": "not computed: no torsions", "lags": []}
    spacing = float(samples.manifest["save_every"])
    series = np.swapaxes(circular_features(samples.angles), 0, 1)
    paths = [reference.clusters.assign(part) for part in series]
    lags = sorted({lag_frames(one, spacing) for one in section.msm_lags_ps})
    found = kinetics(paths, states=reference.clusters.n_states, lags=lags, spacing_ps=spacing, seed=seed)
    return {"note": "", "lags": kinetics_json(found), "estimators_differ_by": found.disagreement}


def _status(cell: Cell, entry: dict[str, Any]) -> str:
    if cell.status != "complete":
        return cell.status
    if entry["ess"]["value"] is None:
        return f"ESS undefined: {entry['ess']['note']}"
    if entry["rhat_max"] is not None and entry["rhat_max"] > MIXED_RHAT:
        return f"not mixed: R-hat {entry['rhat_max']:.2f}"
    if any(one["fraction"] in (0.0, 1.0) for one in entry["delta_f"].values()):
        return "one phi basin only"
    return "ok"


def analyse_method(
    cell: Cell, torsions: Torsions, section: CompareConfig, reference: ReferenceModel, baseline: Baseline | None, *, seed: int
) -> dict[str, Any]:
    """Return everything about one method's samples as JSON values.

    Args:
        cell: the samples, or why there are none.
        torsions: of the molecule.
        section: settings.
        reference: for TICA and states.
        baseline: of the same target, or None.
        seed: of bootstraps.
    """
    samples = cell.samples
    if samples is None:
        return absent_method(cell)
    entry = _identity(cell, samples)
    others = None if baseline is not None and cell.method in baseline.methods else baseline
    entry["baseline"] = "is the baseline" if baseline is not others else (baseline.name if baseline else "none")
    entry.update(efficiency(samples, torsions, reference, baseline))
    entry.update(_free_energies(samples, torsions, section, others, effective=entry["ess"]["value"], seed=seed))
    if samples.log_weights is not None:
        entry["weights"] = asdict(kish_size(samples.log_weights))
    entry["energy"] = _energies(samples, others)
    entry["temperature"] = temperatures(samples)
    entry["timescales"] = _timescales(samples, reference, section, seed=seed)
    entry["status"] = _status(cell, entry)
    return entry
