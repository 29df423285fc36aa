"""Distances, validity and coverage of every cell against the reference, with noise floors and negative controls."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from longstride.analysis.clouds import Cloud, Spaces, cloud_of, fit_spaces, join, select, with_torsions, with_weights
from longstride.analysis.coverage import Cost, cost_of, coverage, missing_states
from longstride.analysis.distances import resample
from longstride.analysis.distribution_metrics import Metric, all_metrics
from longstride.analysis.estimate import Estimate
from longstride.analysis.features import circular_features
from longstride.analysis.geometry import GeometryLimits, GeometryTerms, find_terms, limits_of
from longstride.analysis.reference_model import lag_frames
from longstride.analysis.tables import write_csv
from longstride.analysis.validity import validity, validity_json, worse_than
from longstride.seeds import job_seed
from longstride.units import BOLTZMANN_KJ_PER_MOL_K

if TYPE_CHECKING:
    from pathlib import Path

    from longstride.analysis.comparison import Comparison
    from longstride.analysis.reference_model import ReferenceModel
    from longstride.analysis.samples import Cell, Molecule, SampleSet
    from longstride.config import CompareConfig

SPLITS = 6
TIC_POINTS = 10_000
HOTTER_K = 20.0
SHIFT = np.radians(15.0)
SCALE = 1.05
DISPLACED_NM = 0.1
# which control a metric is meant to see; a marginal cannot see that torsions were shuffled, whatever the method
MEANT = {
    "20 K hotter": ("e_w2", "ks_energy"),
    "shuffled torsions": ("t_w2", "t_k_jsd_div_bits", "jsd_dist_nat_ramachandran", "jsd_dist_nat_tic01"),
    "torsions shifted by 15 degrees": ("jsd_dist_nat_torsions", "jsd_dist_nat_backbone", "jsd_dist_nat_side_chain"),
    "minor states 1 kT too stable": ("jsd_dist_nat_macrostates", "jsd_dist_nat_tic0", "tica_k_jsd_div_bits", "tica_w2"),
    "scaled by 5 %": ("unisim_js_tic", "unisim_js_tic2d", "unisim_js_pwd", "unisim_js_rg", "unisim_contact_rmse"),
}
MEANT_VALIDITY = {
    "scaled by 5 %": ("bond_outliers",),
    "one atom displaced by 0.1 nm": ("bond_outliers", "angle_outliers", "broken_bonds"),
    "mirror image": ("inverted_centres",),
    "scaled by one half": ("clashes", "unisim_invalid_ca"),
    "omega turned by 180 degrees": ("cis_omega",),
}
DISTANCE_COLUMNS = (
    "method", "target", "seed", "distance", "value", "ci_low", "ci_high", "noise_floor", "md_equal_budget", "unit", "statement",
)  # fmt: skip
VALIDITY_COLUMNS = ("method", "target", "seed", "defect", "value", "ci_low", "ci_high", "reference", "unit", "statement")
COVERAGE_COLUMNS = (
    "method", "target", "seed", "n_saves", "n_samples", "target_calls", "sampling_wall_s", "recall", "recall_weighted",
)  # fmt: skip
CONTROL_COLUMNS = ("metric", "control", "value", "noise_floor", "separated", "statement")


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """What the cells of one target are measured against.

    Attributes:
        cloud: samples of the reference.
        chain: [frame] chain of every sample of the reference.
        metrics: all distances.
        floors: (kind, number of samples) to metric to noise floor; filled as they are needed.
        seed: of splits and bootstraps.
    """

    cloud: Cloud
    chain: np.ndarray
    metrics: list[Metric]
    floors: dict[tuple[str, int], dict[str, float | None]]
    seed: int


def _halves(yardstick: Yardstick, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the frames of two disjoint sets of chains, drawn at random; of a single chain its two halves in time."""
    chains = np.unique(yardstick.chain)
    if len(chains) < 2:
        middle = yardstick.cloud.size // 2
        return np.arange(middle), np.arange(middle, yardstick.cloud.size)
    first = np.isin(yardstick.chain, generator.permutation(chains)[: len(chains) // 2])
    return np.flatnonzero(first), np.flatnonzero(~first)


def _spread_out(frames: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    return frames[resample(None, len(frames), min(size, len(frames)), generator)]


def _consecutive(yardstick: Yardstick, frames: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """Return `size` of the frames as whole chains in random order, the last one cut: molecular dynamics of that length."""
    kept: list[np.ndarray] = []
    for chain in generator.permutation(np.unique(yardstick.chain[frames])):
        left = size - sum(map(len, kept))
        if left <= 0:
            break
        kept.append(frames[yardstick.chain[frames] == chain][:left])
    return np.sort(np.concatenate(kept))


def _ceiling(values: list[float | None]) -> float | None:
    """Return what one more value of the same distribution stays below with 95 % probability (normal prediction interval)."""
    known = np.array([value for value in values if value is not None])
    if len(known) < 2:
        return None
    factor = float(stats.t.ppf(0.95, len(known) - 1)) * np.sqrt(1 + 1 / len(known))
    return float(known.mean() + factor * known.std(ddof=1))


def noise_floor(yardstick: Yardstick, size: int, kind: str) -> dict[str, float | None]:
    """Return of every metric what two equal distributions stay below in 95 % of cases, from splits of the reference.

    Two disjoint random sets of its chains are compared; the second is cut to `size` samples, either spread out over all of its
    frames (kind "spread": the split-half floor) or as consecutive dynamics of a few chains (kind "budget": MD of the same
    number of samples against MD).
    """
    key = (kind, min(size, yardstick.cloud.size // 2))
    if key not in yardstick.floors:
        found: dict[str, list[float | None]] = {metric.name: [] for metric in yardstick.metrics}
        for split in range(SPLITS):
            generator = np.random.default_rng(job_seed(yardstick.seed, "split", split))
            first, second = _halves(yardstick, generator)
            if kind == "spread":
                frames = _spread_out(second, key[1], generator)
            else:
                frames = _consecutive(yardstick, second, key[1], generator)
            a, b = select(yardstick.cloud, first), select(yardstick.cloud, frames)
            for metric in yardstick.metrics:
                found[metric.name].append(metric.evaluate(a, b, seed=split, interval=False).value)
        yardstick.floors[key] = {name: _ceiling(values) for name, values in found.items()}
    return yardstick.floors[key]


def compare_distributions(cloud: Cloud, yardstick: Yardstick, *, seed: int) -> dict[str, dict[str, Any]]:
    """Return every distance of a cloud from the reference as JSON values, with noise floors and a statement."""
    spread = noise_floor(yardstick, cloud.size, "spread")
    budget = noise_floor(yardstick, cloud.size, "budget")
    entries = {}
    for metric in yardstick.metrics:
        found = metric.evaluate(yardstick.cloud, cloud, seed=seed, interval=True)
        floor, equal = spread[metric.name], budget[metric.name]
        entries[metric.name] = {
            **found.to_json(),
            "noise_floor": floor,
            "md_equal_budget": equal,
            "unit": metric.unit,
            "statement": _statement(found, floor, equal),
        }
    return entries


def _statement(found: Estimate, floor: float | None, equal: float | None) -> str:
    if found.value is None:
        return f"undefined: {found.note}"
    if floor is None:
        return "no noise floor: the reference cannot be split"
    if found.value <= floor:
        return "within the noise floor"
    if equal is not None and found.value <= equal:
        return "above the noise floor, within molecular dynamics of as many samples"
    return "above the noise floor"


def controls(yardstick: Yardstick, spaces: Spaces, scaled: Cloud | None) -> list[dict[str, Any]]:
    """Return, of every metric, whether it separates the broken distribution it is meant to see from noise, as JSON values.

    One half of the reference, as it is, against the other half after it was broken: torsions permuted independently of each
    other, torsions shifted by 15 degrees, energies reweighted to 20 K more, all states but the largest made 1 kT more stable,
    or coordinates scaled by 5 %. A metric that does not exceed its noise floor is flagged.

    Args:
        yardstick: the reference.
        spaces: of the molecule.
        scaled: the reference with scaled coordinates, or None where coordinates were not kept.
    """
    generator = np.random.default_rng(job_seed(yardstick.seed, "controls"))
    first, second = _halves(yardstick, np.random.default_rng(job_seed(yardstick.seed, "split", 0)))
    a, b = select(yardstick.cloud, first), select(yardstick.cloud, second)
    floor = noise_floor(yardstick, len(second), "spread")
    broken = {
        "shuffled torsions": shuffled(yardstick.cloud, second, spaces, generator),
        "torsions shifted by 15 degrees": with_torsions(b, spaces, _wrapped(b.angles + SHIFT), _wrapped(b.chi + SHIFT)),
        "20 K hotter": b,
        "minor states 1 kT too stable": with_weights(b, _minor_states(b)),
        "scaled by 5 %": None if scaled is None else select(scaled, second),
    }
    rows = []
    for metric in yardstick.metrics:
        for control in (name for name, seen in MEANT.items() if metric.name in seen):
            cloud = broken[control]
            if control == "20 K hotter":
                cloud = with_weights(b, _hotter(b, spaces))
            value = None if cloud is None else metric.evaluate(a, cloud, seed=0, interval=False).value
            rows.append(_control_row(metric.name, control, value, floor[metric.name]))
    return rows


def _control_row(metric: str, control: str, value: float | None, floor: float | None) -> dict[str, Any]:
    separated = None if value is None or floor is None else value > floor
    words = {
        None: "undefined for this molecule",
        True: "separates this control",
        False: "cannot separate this control from noise",
    }
    return {
        "metric": metric, "control": control, "value": value, "noise_floor": floor, "separated": separated,
        "statement": words[separated],
    }  # fmt: skip


def _wrapped(angles: np.ndarray) -> np.ndarray:
    return (angles + np.pi) % (2 * np.pi) - np.pi


def _hotter(cloud: Cloud, spaces: Spaces) -> np.ndarray:
    """Return exp(u (1 - T / (T + 20 K))) for reduced energies u, up to a constant."""
    temperature = spaces.kT / BOLTZMANN_KJ_PER_MOL_K
    return np.exp((cloud.energy - cloud.energy.mean()) * (1 - temperature / (temperature + HOTTER_K)))


def _minor_states(cloud: Cloud) -> np.ndarray:
    """Return e for frames outside the most populated state, 1 inside; without states the sign of the first torsion decides."""
    if (cloud.states >= 0).any():
        inside = cloud.states >= 0
        largest = np.bincount(cloud.states[inside], cloud.weights[inside]).argmax()
        return np.where(cloud.states == largest, 1.0, np.e)
    if not cloud.angles.shape[1]:
        return np.ones(cloud.size)
    return np.where(cloud.angles[:, 0] < 0, 1.0, np.e)


def shuffled(cloud: Cloud, frames: np.ndarray, spaces: Spaces, generator: np.random.Generator) -> Cloud:
    """Return frames of a cloud with every torsion permuted on its own: the same marginals, no correlation."""
    drawn = np.sort(frames[resample(cloud.weights[frames], len(frames), len(frames), generator)])
    part = select(cloud, np.unique(frames))
    equal = replace(part, weights=np.full(part.size, 1 / part.size))
    angles, chi = (
        np.stack([generator.permutation(column) for column in values[drawn].T], axis=1) if values.shape[1] else values[drawn]
        for values in (cloud.angles, cloud.chi)
    )
    return with_torsions(equal, spaces, angles, chi)


def broken_sets(samples: SampleSet, generator: np.random.Generator) -> dict[str, SampleSet]:
    """Return the reference with broken geometry: scaled, one atom displaced, mirrored, collapsed, peptide bonds turned."""
    frames = samples.frames
    if frames is None:
        return {}
    x = frames.structures
    moved = x.copy()
    direction = generator.normal(size=(len(x), 3))
    direction *= DISPLACED_NM / np.linalg.norm(direction, axis=1, keepdims=True)
    moved[np.arange(len(x)), generator.integers(x.shape[1], size=len(x))] += direction.astype(x.dtype)
    changed = {
        "scaled by 5 %": replace(frames, structures=x * np.float32(SCALE)),
        "one atom displaced by 0.1 nm": replace(frames, structures=moved),
        "mirror image": replace(frames, inverted=~frames.inverted),
        "scaled by one half": replace(frames, structures=x * np.float32(0.5)),
        "omega turned by 180 degrees": replace(frames, peptide=_wrapped(frames.peptide + np.pi)),
    }
    return {name: replace(samples, frames=one) for name, one in changed.items()}


def _chain_of(samples: SampleSet) -> np.ndarray:
    times, chains = samples.energy.shape
    return np.tile(np.arange(chains), times)


@dataclass(frozen=True, kw_only=True)
class _Setting:
    """All that does not depend on the cell."""

    molecule: Molecule
    reference: ReferenceModel
    spaces: Spaces
    yardsticks: dict[str, Yardstick | None]
    terms: GeometryTerms | None
    limits: GeometryLimits | None
    seed: int


def attach_distributions(
    found: Comparison, cells: list[Cell], molecule: Molecule, section: CompareConfig, *, seed: int
) -> None:
    """Put `distances`, `validity` and `coverage` into every filled entry of comparison.json, and controls beside the reference.

    The yardstick is the MSM-weighted reference on its own target, and all samples of `sts` on another one; `sts` is not
    compared with itself. Bonds and angles are always judged by the reference.

    Args:
        found: the analysed system; its content is changed.
        cells: of the comparison.
        molecule: the prepared system.
        section: lags and states.
        seed: of sub-samples and bootstraps.
    """
    reference, layout = found.reference, molecule.layout
    samples = reference.samples
    lag = lag_frames(section.tica_lag_ps, float(samples.manifest["frame_spacing_ps"]))
    kT = BOLTZMANN_KJ_PER_MOL_K * float(molecule.manifest.get("temperature_K") or samples.manifest["temperature_K"])
    states = reference.macrostates
    spaces, cloud = fit_spaces(
        samples, reference.frame_weights, layout, kT=kT, lag=lag, states=states,
        n_states=0 if states is None else states.n_states, seed=seed,
    )  # fmt: skip
    metrics = all_metrics(spaces, molecule.torsions)
    own = str(samples.manifest["target"])
    yardsticks: dict[str, Yardstick | None] = {
        target: _yardstick_of_cells(target, cells, baseline.methods, spaces=spaces, metrics=metrics, seed=seed)
        if baseline
        else None
        for target, baseline in found.baselines.items()
        if target != own
    }
    yardsticks[own] = Yardstick(cloud=cloud, chain=_chain_of(samples), metrics=metrics, floors={}, seed=seed)
    terms = limits = None
    if layout is not None and samples.frames is not None and len(samples.frames.structures):
        terms = find_terms(molecule.topology)
        limits = limits_of(samples.frames.structures, terms)
    setting = _Setting(
        molecule=molecule, reference=reference, spaces=spaces, yardsticks=yardsticks, terms=terms, limits=limits, seed=seed
    )
    scaled = None
    if samples.frames is not None and layout is not None:
        scaled = cloud_of(samples, spaces, weights=reference.frame_weights, every_frame=True, scale=SCALE)
    rows = controls(yardsticks[own], spaces, scaled)  # type: ignore[arg-type]
    del scaled
    expected = _reference_validity(found, setting)
    found.content["reference"]["controls"] = rows + _validity_controls(setting, expected)
    filled = {(cell.method, cell.seed): cell for cell in cells if cell.samples is not None}
    for entry in found.content["methods"]:
        cell = filled.get((entry["method"], entry["seed"]))
        if cell is not None:
            _attach_cell(entry, cell, setting, found, expected)


def _yardstick_of_cells(
    target: str, cells: list[Cell], methods: frozenset[str], *, spaces: Spaces, metrics: list[Metric], seed: int
) -> Yardstick | None:
    sets = [
        cell.samples
        for cell in cells
        if cell.samples is not None
        and cell.status == "complete"
        and cell.method in methods
        and cell.samples.manifest["target"] == target
    ]
    if not sets:
        return None
    chains, offset = [], 0
    for one in sets:
        chains.append(_chain_of(one) + offset)
        offset += one.energy.shape[1]
    cloud = join([cloud_of(one, spaces) for one in sets])
    return Yardstick(cloud=cloud, chain=np.concatenate(chains), metrics=metrics, floors={}, seed=seed)


def _reference_validity(found: Comparison, setting: _Setting) -> dict[str, Estimate] | None:
    layout = setting.molecule.layout
    if layout is None or setting.terms is None or setting.limits is None:
        return None
    weights = setting.reference.frame_weights
    samples = setting.reference.samples
    result = validity(samples, layout, setting.terms, setting.limits, weights=weights, seed=setting.seed)
    found.content["reference"]["validity"] = validity_json(result, None)
    return result


def _validity_controls(setting: _Setting, expected: dict[str, Estimate] | None) -> list[dict[str, Any]]:
    layout = setting.molecule.layout
    if expected is None or layout is None or setting.terms is None or setting.limits is None:
        return []
    rows = []
    generator = np.random.default_rng(job_seed(setting.seed, "geometry controls"))
    for control, samples in broken_sets(setting.reference.samples, generator).items():
        result = validity(samples, layout, setting.terms, setting.limits, seed=setting.seed)
        for name in MEANT_VALIDITY[control]:
            row = _control_row(name, control, result[name].value, expected[name].high)
            separated = worse_than(result[name], expected[name])
            words = {None: "undefined for this molecule", True: "separates this control"}
            row |= {
                "separated": separated,
                "statement": words.get(separated, "cannot separate this control from noise"),
            }
            rows.append(row)
    return rows


def _attach_cell(
    entry: dict[str, Any], cell: Cell, setting: _Setting, found: Comparison, expected: dict[str, Estimate] | None
) -> None:
    samples, layout = cell.samples, setting.molecule.layout
    if samples is None:
        return
    if cell.status != "complete":
        entry["distances"] = entry["validity"] = {}
        entry["coverage"] = {"points": [], "states": [], "note": cell.status}
        return
    seed = job_seed(setting.seed, "distances", cell.method, cell.seed)
    cloud = cloud_of(samples, setting.spaces)
    yardstick, baseline = setting.yardsticks.get(entry["target"]), found.baselines.get(entry["target"])
    same = baseline is not None and cell.method in baseline.methods
    entry["distances"] = {} if yardstick is None or same else compare_distributions(cloud, yardstick, seed=seed)
    if layout is not None and setting.terms is not None and setting.limits is not None:
        entry["validity"] = validity_json(validity(samples, layout, setting.terms, setting.limits, seed=seed), expected)
    own = setting.reference.samples.manifest["target"]
    points = setting.yardsticks[str(own)]
    entry["coverage"] = _coverage(
        samples, setting.reference, cloud, points.cloud if points else cloud, cost_of(samples.manifest)
    )


def _coverage(samples: SampleSet, reference: ReferenceModel, cloud: Cloud, points: Cloud, cost: Cost) -> dict[str, Any]:
    """Return the coverage of the k-means states of the reference and the missing-state test, as JSON values."""
    clusters, weights = reference.clusters, reference.frame_weights
    if clusters is None:
        result: dict[str, Any] = {"n_states": 0, "recall": None, "points": [], "states": [], "note": "no torsions"}
    else:
        features = circular_features(reference.samples.angles)
        path = clusters.assign(features.reshape(-1, features.shape[-1]))
        share = np.full(len(path), 1 / len(path)) if weights is None else weights.ravel()
        own = circular_features(samples.angles)
        visited = clusters.assign(own.reshape(-1, own.shape[-1])).reshape(samples.energy.shape)
        result = coverage(visited, np.bincount(path, share, clusters.n_states), cost)
    if points.tica.shape[1] < 2 or cloud.tica.shape[1] < 2:
        result["timewarp_explored"] = {"passed": None, "note": "no TICA in the features of the literature"}
    else:
        stride = max(10, -(-len(points.tica) // TIC_POINTS))
        ranges = np.abs(points.tica).max(axis=0)
        result["timewarp_explored"] = missing_states(points.tica[::stride], cloud.tica, ranges)
    return result


def write_tables(content: dict[str, Any], out: Path) -> list[str]:
    """Write distances.csv, validity.csv, coverage.csv and controls.csv of comparison.json and return their names."""
    write_csv(out / "distances.csv", DISTANCE_COLUMNS, distance_rows(content))
    write_csv(out / "validity.csv", VALIDITY_COLUMNS, validity_rows(content))
    write_csv(out / "coverage.csv", COVERAGE_COLUMNS, coverage_rows(content))
    write_csv(out / "controls.csv", CONTROL_COLUMNS, content["reference"].get("controls", []))
    return ["distances.csv", "validity.csv", "coverage.csv", "controls.csv"]


def distance_rows(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of distances.csv, one per distance of every cell."""
    return [
        {**_cell(entry), "distance": name, **_bounds(one), **{key: one[key] for key in DISTANCE_COLUMNS[7:]}}
        for entry in content["methods"]
        for name, one in (entry.get("distances") or {}).items()
    ]


def validity_rows(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of validity.csv, one per defect of the reference and of every cell."""
    return [
        {**_cell(entry), "defect": name, **_bounds(one), **{key: one[key] for key in VALIDITY_COLUMNS[7:]}}
        for entry in (content["reference"], *content["methods"])
        for name, one in (entry.get("validity") or {}).items()
    ]


def coverage_rows(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of coverage.csv, one per prefix of every cell."""
    return [
        {**_cell(entry), **point} for entry in content["methods"] for point in (entry.get("coverage") or {}).get("points", [])
    ]


def _cell(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: entry.get(key) for key in ("method", "target", "seed")}


def _bounds(one: dict[str, Any]) -> dict[str, Any]:
    return {"value": one["value"], "ci_low": one["low"], "ci_high": one["high"]}
