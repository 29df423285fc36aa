"""From umbrella samples of two torsions to the free energy of the first and the difference between its two halves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from longstride.analysis.estimate import Estimate, undefined
from longstride.analysis.free_energy import FreeEnergy, agreement, bin_edges, bin_index, from_probabilities
from longstride.analysis.wham import TOLERANCE, overlap_matrix, unbiased
from longstride.data.manifest import read_manifest
from longstride.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from longstride.analysis.samples import Molecule

BLOCKS = 20


@dataclass(frozen=True, kw_only=True)
class UmbrellaResult:
    """What the samples say.

    Attributes:
        profile: F(phi) in kT over `bins` bins.
        delta_f: Delta F(phi < 0 -> phi >= 0) in kT.
        smallest_overlap: of neighbouring windows along each axis, median over the grid and minimum over axes.
    """

    profile: FreeEnergy
    delta_f: Estimate
    smallest_overlap: float


def grid_bias(centers: Sequence[np.ndarray], stiffness_kT: Sequence[float], bins: int) -> np.ndarray:
    """Return the restraint of every window at every bin's centre in kT, [window 1 * window 2, bin * bin].

    Equation: u = k_1 (1 - cos(phi - c_i)) + k_2 (1 - cos(psi - c_j)).
    """
    edges = bin_edges(bins)
    middle = (edges[1:] + edges[:-1]) / 2
    first, second = (
        k * (1 - np.cos(middle[None, :] - center[:, None])) for center, k in zip(centers, stiffness_kT, strict=True)
    )
    both = first[:, None, :, None] + second[None, :, None, :]
    return both.reshape(len(centers[0]) * len(centers[1]), bins * bins)


def difference(profile: np.ndarray) -> float:
    """Return -ln(P(phi >= 0) / P(phi < 0)) of bin probabilities [bin] from -pi to pi."""
    half = len(profile) // 2
    below, above = profile[:half].sum(), profile[half:].sum()
    return math.log(below / above) if below > 0 and above > 0 else math.nan


def analyse_umbrella(
    torsions: np.ndarray,
    *,
    centers: Sequence[np.ndarray],
    stiffness_kT: Sequence[float],
    bins: int,
    replicates: int,
    seed: int,
) -> UmbrellaResult:
    """Return profile and difference with errors by a bootstrap over blocks of time, the same for all windows.

    Windows exchange configurations, so that only time separates independent samples. The interval is
    t_{0.975, blocks - 1} standard deviations of the bootstrap, which allows for few blocks.

    Args:
        torsions: [cycle, window 1, window 2, 2] rad.
        centers: of the windows along both axes, rad.
        stiffness_kT: of the two restraints, kT.
        bins: per torsion.
        replicates: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        DataError: the windows do not overlap.
    """
    cycles, windows = len(torsions), len(centers[0]) * len(centers[1])
    cell = bin_index(torsions[..., 0], bins) * bins + bin_index(torsions[..., 1], bins)
    cell = (cell.reshape(cycles, windows) + np.arange(windows) * bins * bins).astype(np.int64)
    blocks = min(BLOCKS, cycles)
    block = np.arange(cycles) * blocks // cycles
    occupied = np.bincount(cell.ravel(), minlength=windows * bins * bins).reshape(windows, -1).sum(0) > 0
    bias = grid_bias(centers, stiffness_kT, bins)[:, occupied]

    def solve(weights: np.ndarray, start: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        counts = np.bincount(cell.ravel(), np.repeat(weights, windows), minlength=windows * bins * bins)
        counts = counts.reshape(windows, -1)[:, occupied]
        # a replicate scatters by far more than what a loose end of the iteration leaves
        probability, f = unbiased(counts, bias, start, tolerance=TOLERANCE if start is None else 1e-6)
        full = np.zeros(bins * bins)
        full[occupied] = probability
        return full.reshape(bins, bins).sum(1), f, counts

    profile, f, counts = solve(np.ones(cycles), None)
    drawn = np.random.default_rng(seed).multinomial(blocks, np.full(blocks, 1 / blocks), size=replicates)
    resampled = np.stack([solve(one[block].astype(float), f)[0] for one in drawn])
    value = difference(profile)
    error = float(np.std([difference(one) for one in resampled], ddof=1)) * math.sqrt(blocks / max(blocks - 1, 1))
    reach = float(stats.t.ppf(0.975, max(blocks - 1, 1))) * error
    samples = np.bincount(bin_index(torsions[..., 0], bins).ravel(), minlength=bins).astype(float)
    return UmbrellaResult(
        profile=from_probabilities(profile, resampled, samples, units=blocks),
        delta_f=Estimate(value=value, low=value - reach, high=value + reach),
        smallest_overlap=_neighbours(overlap_matrix(counts, bias, f), (len(centers[0]), len(centers[1]))),
    )


def _neighbours(matrix: np.ndarray, windows: tuple[int, int]) -> float:
    index = np.arange(windows[0] * windows[1]).reshape(windows)
    return float(min(np.median(matrix[index, np.roll(index, -1, axis)]) for axis in (0, 1)))


def load_umbrella(folder: Path, molecule: Molecule) -> dict[str, Any]:
    """Return what `compare` shows of a folder of the free-energy stage.

    Raises:
        DataError: it is missing, altered, or was made for another potential or temperature.
    """
    manifest = read_manifest(folder, kind="free-energy")
    for key, meaning in (("system_hash", "potential"), ("temperature_K", "temperature")):
        expected = molecule.manifest.get(key)
        if expected is not None and manifest[key] != expected:
            raise DataError(f"{folder} was made with another {meaning} than the prepared system; delete it and run again")
    names = ("method", "target", "invariance", "torsions", "delta_f", "simulated_ps", "counts", "timing", "smallest_overlap")
    found = {name: manifest[name] for name in names}
    found["status"] = "ok" if manifest["delta_f"]["value"] is not None else manifest["delta_f"]["note"]
    return found


def attach_umbrella(content: dict[str, Any], umbrella: dict[str, Any]) -> None:
    """Add the independent reference to a comparison, and to every method of its target how well it agrees.

    Adds `content["umbrella"]`, and z and statement below the primary phi of each method.
    """
    content["umbrella"] = umbrella
    independent = _estimate(umbrella["delta_f"])
    for entry in [content["reference"], *content["methods"]]:
        own = (entry.get("delta_f") or {}).get(umbrella["torsions"][0]) if umbrella["torsions"] else None
        if own is None or entry["target"] != umbrella["target"]:
            continue
        z, statement = agreement(_estimate(own), independent)
        own["umbrella"] = {"z": z, "statement": statement.replace("the reference", "umbrella sampling")}


def _estimate(values: dict[str, Any]) -> Estimate:
    if values["value"] is None:
        return undefined(values["note"])
    return Estimate(value=values["value"], low=values["low"], high=values["high"], note=values["note"])
