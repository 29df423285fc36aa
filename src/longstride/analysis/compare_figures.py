"""Which figures a comparison has, what they show and how they read aloud."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from longstride.analysis import figures
from longstride.analysis.autocorrelation import autocorrelation
from longstride.analysis.cost import panel
from longstride.analysis.free_energy import FreeEnergy, bin_edges
from longstride.analysis.method_analysis import sample_histograms
from longstride.seeds import job_seed

if TYPE_CHECKING:
    from pathlib import Path

    from longstride.analysis.comparison import Comparison
    from longstride.analysis.samples import Molecule, SampleSet
    from longstride.config import CompareConfig

MAX_ENERGIES = 200_000


def draw(found: Comparison, molecule: Molecule, section: CompareConfig, *, out: Path, seed: int) -> list[dict[str, str]]:
    """Draw every figure that the data allow into `out` and return their descriptions.

    Returns:
        One dict per figure: file, title, caption and alt (what a reader who cannot see it should know).
    """
    made: list[dict[str, str]] = []
    if molecule.torsions.pair is not None:
        made += _free_energies(found, molecule, section, out=out, seed=seed)
    if found.reference.kinetics is not None:
        made.append(_timescales(found, out=out))
    made += [*_autocorrelation(found, molecule, out=out), _energies(found, out=out), _rates(found, out=out)]
    return made


def _targets(found: Comparison) -> list[str]:
    return list(found.baselines)


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
        suffix = "" if number == 0 else f"_{number + 1}"
        limit = section.max_free_energy_kT
        figures.ramachandran(out / f"ramachandran{suffix}.svg", square, limit=limit + 3, torsions=(phi, psi))
        series = [_profile_series(method, label, one, section.bins) for method, label, one in lines if one is not None]
        figures.phi_profile(out / f"phi_profile{suffix}.svg", series, limit=limit + 2, name=phi)
        made += _describe_maps(suffix, target, [title for title, _ in square], (phi, psi))
    return made


def _describe_maps(suffix: str, target: str, titles: list[str], names: tuple[str, str]) -> list[dict[str, str]]:
    shown = ", ".join(titles)
    return [
        {
            "file": f"ramachandran{suffix}.svg",
            "title": f"Free energy over ({names[0]}, {names[1]}), target {target}",
            "caption": "All panels share one grid and one colour scale; all seeds of a method are pooled. Grey bins were"
            " never visited.",
            "alt": f"Ramachandran free-energy maps on one colour scale, one panel each: {shown}.",
        },
        {
            "file": f"phi_profile{suffix}.svg",
            "title": f"Free energy along {names[0]}, target {target}",
            "caption": "Lines with 95 % bands: bootstrap over chains, or over blocks where chains are few; over trajectory"
            " segments for the reweighted reference.",
            "alt": f"Free-energy profiles along {names[0]} with error bands: {shown}.",
        },
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
