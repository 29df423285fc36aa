"""Which figures a comparison has, what they show and how they read aloud."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from longstride.analysis import figures, map_figures
from longstride.analysis.autocorrelation import autocorrelation
from longstride.analysis.cost import panel
from longstride.analysis.features import circular_features
from longstride.analysis.free_energy import FreeEnergy, bin_edges
from longstride.analysis.method_analysis import sample_histograms
from longstride.analysis.weighted import check_weights, normalised_weights
from longstride.seeds import job_seed

if TYPE_CHECKING:
    from pathlib import Path

    from longstride.analysis.comparison import Comparison
    from longstride.analysis.reference_model import ReferenceModel
    from longstride.analysis.samples import Molecule, SampleSet
    from longstride.config import CompareConfig

MAX_ENERGIES = 200_000
DIFFERENCE_LIMIT_KT = 2.0
TICA_BINS = 48


def draw(found: Comparison, molecule: Molecule, section: CompareConfig, *, out: Path, seed: int) -> list[dict[str, str]]:
    """Draw every figure that the data allow into `out`, as SVG and PDF, and return their descriptions.

    Returns:
        One dict per figure: file, pdf, title, caption and alt (what a reader who cannot see it should know).
    """
    made: list[dict[str, str]] = []
    with figures.with_pdf():
        if molecule.torsions.pair is not None:
            made += _free_energies(found, molecule, section, out=out, seed=seed)
        if found.reference.tica is not None:
            made += tica_figures(found, section, out=out)
        if found.reference.kinetics is not None:
            made.append(_timescales(found, out=out))
        made += [*_autocorrelation(found, molecule, out=out), _energies(found, out=out)]
        made += [*accuracy_figures(found.content, out=out), *move_figures(found.content, out=out), _rates(found, out=out)]
    return [{**one, "pdf": one["file"].removesuffix(".svg") + ".pdf"} for one in made]


def _targets(found: Comparison) -> list[str]:
    return list(found.baselines)


def _suffix(number: int) -> str:
    return "" if number == 0 else f"_{number + 1}"


def _free_energies(
    found: Comparison, molecule: Molecule, section: CompareConfig, *, out: Path, seed: int
) -> list[dict[str, str]]:
    model, own = found.reference, str(found.reference.samples.manifest["target"])
    phi, psi = found.content["primary_pair"]
    made = []
    for number, target in enumerate(_targets(found)):
        maps: list[tuple[str, FreeEnergy | None]] = []
        lines: list[tuple[str, str, FreeEnergy | None]] = []
        if target == own:
            maps = [("reference, MSM-reweighted", model.map_msm), ("reference, raw histogram", model.map_raw)]
            lines = [("reference", "reference, MSM-reweighted", model.profile_msm)]
        for (of, method), samples in sorted(found.pooled.items()):
            if of == target:
                identity = job_seed(seed, "pooled", target, method)
                grid, profile = sample_histograms(samples, molecule.torsions, section, seed=identity)
                label = f"{method} ({samples.manifest['invariance']})"
                maps.append((label, grid))
                lines.append((method, label, profile))
        square = [(title, one.values.reshape(section.bins, section.bins)) for title, one in maps if one is not None]
        suffix, limit = _suffix(number), section.max_free_energy_kT
        axes = map_figures.torsion_grid((phi, psi))
        map_figures.maps(out / f"ramachandran{suffix}.svg", square, axes, limit=limit + 3)
        made.append(_describe_maps(suffix, target, [title for title, _ in square], (phi, psi)))
        baseline = found.baselines[target]
        if baseline is not None and baseline.map is not None:
            base = baseline.map.values.reshape(section.bins, section.bins)
            others = [one for one in square if target != own or not one[0].startswith("reference, MSM")]
            others = [one for one in others if one[0].split(" (")[0] not in baseline.methods]
            name = out / f"ramachandran_difference{suffix}.svg"
            made += _differences(name, others, (baseline.name, base), axes, target=target, limit=limit)
        series = [_profile_series(method, label, one, section.bins) for method, label, one in lines if one is not None]
        figures.phi_profile(out / f"phi_profile{suffix}.svg", series, limit=limit + 2, name=phi)
        made.append(_describe_profile(suffix, target, [one.label for one in series], phi))
    return made


def _describe_maps(suffix: str, target: str, titles: list[str], names: tuple[str, str]) -> dict[str, str]:
    return {
        "file": f"ramachandran{suffix}.svg",
        "title": f"Free energy over ({names[0]}, {names[1]}), target {target}",
        "caption": "All panels share one grid and one colour scale; all seeds of a method are pooled. Grey bins were"
        " never visited.",
        "alt": f"Ramachandran free-energy maps on one colour scale, one panel each: {', '.join(titles)}.",
    }


def _describe_profile(suffix: str, target: str, labels: list[str], phi: str) -> dict[str, str]:
    return {
        "file": f"phi_profile{suffix}.svg",
        "title": f"Free energy along {phi}, target {target}",
        "caption": "Lines with 95 % bands: bootstrap over chains, or over blocks where chains are few; over trajectory"
        " segments for the reweighted reference.",
        "alt": f"Free-energy profiles along {phi} with error bands: {', '.join(labels)}.",
    }


def aligned_difference(values: np.ndarray, baseline: np.ndarray, *, limit: float) -> np.ndarray:
    """Return a free energy minus that of the baseline in kT, less the mean over bins up to `limit` in the baseline.

    NaN where either is undefined or the baseline lies above the limit; all NaN where nothing can be compared.
    """
    with np.errstate(invalid="ignore"):
        kept = np.isfinite(values) & np.isfinite(baseline) & (baseline <= limit)
    difference = np.where(kept, values - baseline, np.nan)
    return difference - difference[kept].mean() if kept.any() else difference


def _differences(
    path: Path,
    shown: list[tuple[str, np.ndarray]],
    base: tuple[str, np.ndarray],
    axes: map_figures.Grid,
    *,
    target: str,
    limit: float,
) -> list[dict[str, str]]:
    base_name, values_of_base = base
    found = [(title, aligned_difference(values, values_of_base, limit=limit)) for title, values in shown]
    found = [(title, values) for title, values in found if np.isfinite(values).any()]
    if not found:
        return []
    map_figures.difference_maps(path, found, axes, limit=DIFFERENCE_LIMIT_KT)
    rms = "; ".join(f"{title}: {np.sqrt(np.nanmean(values**2)):.2g} kT" for title, values in found)
    return [
        {
            "file": path.name,
            "title": f"Difference from the baseline over ({axes.x.split(' (')[0]}, {axes.y.split(' (')[0]}), target {target}",
            "caption": f"Free energy minus that of the baseline ({base_name}), over bins up to {limit:g} kT in the baseline,"
            " mean offset removed. Red: too rarely visited, blue: too often. All panels share one scale.",
            "alt": f"Maps of free-energy differences from {base_name}; root mean square {rms}.",
        }
    ]


def tica_figures(found: Comparison, section: CompareConfig, *, out: Path) -> list[dict[str, str]]:
    """Draw free energies over the two slowest TICA components of the reference, and differences, one pair per target."""
    model = found.reference
    if model.tica is None or model.tica.axes.shape[1] < 2:
        return []
    own = str(model.samples.manifest["target"])
    slow = _slow_coordinates(model.samples.angles, model)
    low, high = np.percentile(slow, [0.02, 99.98], axis=0)
    margin = 0.05 * (high - low)
    edges = [np.linspace(low[k] - margin[k], high[k] + margin[k], TICA_BINS + 1) for k in range(2)]
    axes = map_figures.Grid(
        x="TIC0 (of the reference)", y="TIC1 (of the reference)", extent=(*edges[0][[0, -1]], *edges[1][[0, -1]])
    )
    made = []
    for number, target in enumerate(_targets(found)):
        shown, base, base_name = [], None, ""
        if target == own:
            weights = model.frame_weights
            base = _tica_map(slow, None if weights is None else weights.ravel(), edges)
            base_name = "reference, MSM-reweighted" if weights is not None else "reference, raw"
            shown.append((base_name, base))
        baseline = found.baselines[target]
        for (of, method), samples in sorted(found.pooled.items()):
            if of == target:
                values = _tica_map(_slow_coordinates(samples.angles, model), plain_weights(samples), edges)
                shown.append((f"{method} ({samples.manifest['invariance']})", values))
                if base is None and baseline is not None and method in baseline.methods:
                    base, base_name = values, shown[-1][0]
        suffix, limit = _suffix(number), section.max_free_energy_kT
        map_figures.maps(out / f"tica{suffix}.svg", shown, axes, limit=limit + 3)
        made.append(_describe_tica(f"tica{suffix}.svg", target, [title for title, _ in shown]))
        if base is not None:
            others = [one for one in shown if one[0] != base_name]
            name = out / f"tica_difference{suffix}.svg"
            made += _differences(name, others, (base_name, base), axes, target=target, limit=limit)
    return made


def _describe_tica(file: str, target: str, titles: list[str]) -> dict[str, str]:
    return {
        "file": file,
        "title": f"Free energy over the two slowest TICA components, target {target}",
        "caption": "All samples are projected by the TICA of the reference and share one grid and one colour scale. Grey bins"
        " were never visited; the few samples beyond the range of the reference lie outside.",
        "alt": f"Free-energy maps over TIC0 and TIC1 on one colour scale, one panel each: {', '.join(titles)}.",
    }


def _slow_coordinates(angles: np.ndarray, model: ReferenceModel) -> np.ndarray:
    """Return TIC0 and TIC1 of angles [time, chain, torsion] as [sample, 2]."""
    assert model.tica is not None
    return model.tica.project(circular_features(angles))[..., :2].reshape(-1, 2)


def plain_weights(samples: SampleSet) -> np.ndarray | None:
    """Return weights [sample] with sum 1, or None where all samples weigh the same or their weights cannot be used."""
    weights = samples.log_weights
    return None if weights is None or check_weights(weights) else normalised_weights(weights).ravel()


def _tica_map(slow: np.ndarray, weights: np.ndarray | None, edges: list[np.ndarray]) -> np.ndarray:
    histogram = np.histogram2d(slow[:, 0], slow[:, 1], bins=edges, weights=weights)[0]
    with np.errstate(divide="ignore"):
        values = np.where(histogram > 0, -np.log(histogram), np.nan)
    return values - np.nanmin(values) if np.isfinite(values).any() else values


def _merged_curves(entries: list[dict[str, Any]], key: str) -> figures.Series | None:
    """Return the geometric mean over seeds of the RMSE against a cost, with the range over seeds as its band."""
    curves = []
    for entry in entries:
        points = [(one[key], one["rmse_kT"]) for one in entry["accuracy"]["points"] if one[key] and one["rmse_kT"]]
        if len(points) > 1:
            curves.append(np.array(points).T)
    if not curves:
        return None
    low, high = max(curve[0][0] for curve in curves), min(curve[0][-1] for curve in curves)
    if low >= high:
        return None
    x = np.geomspace(low, high, len(curves[0][0]))
    logs = np.array([np.interp(np.log(x), np.log(cost), np.log(rmse)) for cost, rmse in curves])
    label = f"{entries[0]['method']} ({entries[0]['invariance']})"
    y, band = np.exp(logs.mean(axis=0)), (np.exp(logs.min(axis=0)), np.exp(logs.max(axis=0)))
    several = len(curves) > 1
    return figures.Series(
        method=entries[0]["method"], label=label, x=x, y=y, low=band[0] if several else None, high=band[1] if several else None
    )


def accuracy_figures(content: dict[str, Any], *, out: Path) -> list[dict[str, str]]:
    """Draw the error of F(phi) against sampling seconds and target calls, one figure per target that has curves."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for entry in content["methods"]:
        if (entry.get("accuracy") or {}).get("points"):
            groups.setdefault(entry["target"], {}).setdefault(entry["method"], []).append(entry)
    made = []
    for number, (target, methods) in enumerate(sorted(groups.items())):
        first = next(iter(methods.values()))[0]["accuracy"]
        panels = []
        for key, text in (("sampling_wall_s", "sampling (s)"), ("target_calls", "energy + force calls of the target")):
            lines = [_merged_curves(entries, key) for entries in methods.values()]
            panels.append((text, [one for one in lines if one is not None], first["floor_kT"]))
        if not any(lines for _, lines, _ in panels):
            continue
        name = f"accuracy{_suffix(number)}.svg"
        map_figures.accuracy(out / name, panels, ylabel=f"RMSE of {first['quantity']} (kT)")
        ends = "; ".join(f"{one.label} ends at {one.y[-1]:.2g} kT" for one in panels[0][1])
        made.append(
            {
                "file": name,
                "title": f"Time to accuracy, target {target}",
                "caption": f"Root mean square error of {first['quantity']} against the baseline from growing parts of the"
                " samples. Line: geometric mean over seeds; band: their range. Unvisited bins count as half a sample."
                " Burn-in, training and reference data are not included. Dotted: what errors of the baseline alone give.",
                "alt": f"Error of the free-energy profile against seconds and calls: {ends}.",
            }
        )
    return made


def move_figures(content: dict[str, Any], *, out: Path) -> list[dict[str, str]]:
    """Draw acceptance and crossings of phi of every cell that has samples; none without phi."""
    cells = []
    for entry in content["methods"]:
        if not entry.get("delta_f"):
            continue
        jumps = sum(one["crossings"] for one in entry["delta_f"].values())
        seconds = entry["timing"].get("sampling_s")
        cells.append(
            map_figures.Moves(
                method=entry["method"], label=f"{entry['method']}, seed {entry['seed']}", acceptance=entry["acceptance"],
                jumps=jumps / seconds if seconds else None, jumps_per_chain=jumps / entry["n_chains"],
            )
        )  # fmt: skip
    if not cells:
        return []
    map_figures.moves(out / "moves.svg", cells)
    spoken = "; ".join(
        f"{one.label}: {'no proposals' if one.acceptance is None else f'{one.acceptance:.2g} accepted'},"
        f" {one.jumps_per_chain:.2g} crossings per chain"
        for one in cells
    )
    return [
        {
            "file": "moves.svg",
            "title": "Acceptance and jumps",
            "caption": "Accepted share of proposals, and how often chains cross from phi < 0 to phi ≥ 0 or back between two"
            " saves, over all phi. An open mark is zero: such chains say nothing about ΔF. Methods on different targets are"
            " not comparable.",
            "alt": f"Acceptance and crossings of every cell. {spoken}.",
        }
    ]


def _profile_series(method: str, label: str, profile: FreeEnergy, bins: int) -> figures.Series:
    edges = np.degrees(bin_edges(bins))
    low, high = profile.values - 1.96 * profile.errors, profile.values + 1.96 * profile.errors
    centres = (edges[1:] + edges[:-1]) / 2
    return figures.Series(method=method, label=label, x=centres, y=profile.values, low=low, high=high)


def _timescales(found: Comparison, *, out: Path) -> dict[str, str]:
    lags = found.content["reference"]["timescales"]
    x = np.array([one["lag_ps"] for one in lags])

    def column(key: str, k: int) -> np.ndarray:
        return np.array([np.nan if one[key][k] is None else one[key][k] for one in lags])

    count = len(lags[0]["deeptime_ps"])
    ours = [
        figures.Series(
            method="reference", label=f"{k + 1}. process, deeptime", x=x, y=column("deeptime_ps", k), low=column("low_ps", k),
            high=column("high_ps", k),
        )
        for k in range(count)
    ]  # fmt: skip
    theirs = [figures.Series(method="reference", label="PyEMMA", x=x, y=column("pyemma_ps", k)) for k in range(count)]
    figures.timescales(out / "timescales.svg", ours, theirs, lags_ps=x)
    first = found.content["reference"]["msm"]["slowest_timescale_ps"]
    spoken = "undefined" if first["value"] is None else f"about {first['value']:.3g} ps"
    return {
        "file": "timescales.svg",
        "title": "Implied timescales of the reference",
        "caption": "deeptime with 95 % bands (bootstrap over trajectory segments) and PyEMMA on the same states. Values in the"
        " grey area are shorter than the lag and mean nothing. Kinetics are shown for dynamics only, never for Monte Carlo.",
        "alt": f"Implied timescales against lag time for deeptime and PyEMMA; the slowest is {spoken}.",
    }


def _autocorrelation(found: Comparison, molecule: Molecule, *, out: Path) -> list[dict[str, str]]:
    if not molecule.torsions.names:
        return []
    tica = found.reference.tica
    name = "TIC0" if tica is not None else f"cos {molecule.torsions.names[0]}"
    panels = []
    for target in _targets(found):
        lines = []
        for (of, method), samples in sorted(found.pooled.items()):
            if of == target:
                line = _correlation_series(method, samples, panel(samples.angles, molecule.torsions, tica)[name])
                lines += [line] if line is not None else []
        panels.append((target, lines))
    figures.autocorrelation(out / "autocorrelation.svg", panels, observable=name)
    return [
        {
            "file": "autocorrelation.svg",
            "title": f"Autocorrelation of {name} against cost",
            "caption": "The abscissa is cost, not time: target energy plus force evaluations per chain between two saves."
            " A curve further left decorrelates more cheaply. All seeds are pooled.",
            "alt": f"Autocorrelation of {name} against potential evaluations per chain, one panel per target.",
        }
    ]


def _correlation_series(method: str, samples: SampleSet, x: np.ndarray) -> figures.Series | None:
    rho = autocorrelation(x)
    counts = samples.manifest.get("counts") or {}
    calls = float(counts.get("energy_calls", 0)) + float(counts.get("force_calls", 0))
    if not np.isfinite(rho).all() or calls <= 0:
        return None
    kept = max(2, len(rho) // 2)
    cost = calls / samples.size * np.arange(1, kept)
    invariance = samples.manifest["invariance"]
    return figures.Series(method=method, label=f"{method} ({invariance})", x=cost, y=rho[1:kept])


def _energies(found: Comparison, *, out: Path) -> dict[str, str]:
    model, panels = found.reference, []
    for target in _targets(found):
        sets = []
        if target == model.samples.manifest["target"]:
            sets.append(("reference", "reference", _thinned(model.samples.energy)))
        for (of, method), samples in sorted(found.pooled.items()):
            if of == target:
                sets.append((method, f"{method} ({samples.manifest['invariance']})", _thinned(samples.energy)))
        panels.append((target, sets))
    figures.energies(out / "energies.svg", panels)
    return {
        "file": "energies.svg",
        "title": "Distribution of the potential energy",
        "caption": "Energies of the target potential, one panel per target; an exact method lies on its baseline.",
        "alt": "Histograms of potential energy for: "
        + "; ".join(f"{t}: {', '.join(s[1] for s in ss)}" for t, ss in panels)
        + ".",
    }


def _thinned(energy: np.ndarray) -> np.ndarray:
    flat = energy.ravel()
    return flat[:: max(1, flat.size // MAX_ENERGIES)]


def _rates(found: Comparison, *, out: Path) -> dict[str, str]:
    content = found.content
    bars = []
    for entry in [content["reference"], *content["methods"]]:
        label = entry["method"] if entry["seed"] is None else f"{entry['method']}, seed {entry['seed']}"
        if "ess_per_s" not in entry:
            bars.append(_bar(entry["method"], label, {"value": None, "low": None, "high": None, "note": entry["status"]}))
            continue
        bars.append(_bar(entry["method"], f"{label} ({entry['invariance']})", entry["ess_per_s"]))
    figures.rates(out / "rates.svg", bars)
    values = [f"{bar.label}: {'undefined' if bar.value is None else f'{bar.value:.3g}'}" for bar in bars]
    return {
        "file": "rates.svg",
        "title": "Effective samples per second",
        "caption": "Smallest ESS over the panel of observables per second of sampling, with 95 % intervals, on this machine."
        " Burn-in, training and reference data are not included. Biased methods do not sample the target, so their bar is not a"
        " speed-up. Methods on different targets are not comparable.",
        "alt": "Effective sample size per second of sampling: " + "; ".join(values) + ".",
    }


def _bar(method: str, label: str, rate: dict[str, Any]) -> figures.Bar:
    return figures.Bar(method=method, label=label, value=rate["value"], low=rate["low"], high=rate["high"], note=rate["note"])
