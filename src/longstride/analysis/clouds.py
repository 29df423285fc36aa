"""Samples as points of the spaces in which distributions are compared, without the order of time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from longstride.analysis.bootstrap import unit_labels
from longstride.analysis.distances import resample
from longstride.analysis.divergences import PROSE_STATES
from longstride.analysis.features import circular_features
from longstride.analysis.frames import STRUCTURES
from longstride.analysis.literature_tica import (
    fit_literature_tica,
    literature_features,
    literature_torsions,
    structure_features,
)
from longstride.analysis.tica_msm import TICAModel, fit_tica
from longstride.analysis.weighted import check_weights, normalised_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from longstride.analysis.frames import FrameLayout
    from longstride.analysis.samples import SampleSet

MAX_UNITS = 64
TICS = 2


@dataclass(frozen=True, kw_only=True)
class Cloud:
    """Samples of one distribution.

    Attributes:
        angles: [frame, torsion] rad, phi and psi.
        chi: [frame, torsion] rad, side chains.
        energy: [frame] kT.
        tics: [frame, 2] TICA of all torsions; no column without torsions.
        states: [frame] macrostate of the reference, negative for none.
        weights: [frame] with sum 1.
        unit: [frame] bootstrap unit: chains, groups of them, or blocks of few.
        whole: [point] frames whose coordinates are known.
        omega: [point, torsion] rad.
        tica: [point, 2] TICA in the features of the literature; no column without a model.
        alpha: [point, residue, 3] nm, CA atoms.
        torsion_state: [point] k-means state in sines and cosines of phi, psi and omega.
        tica_state: [point] k-means state in `tica`.
    """

    angles: np.ndarray
    chi: np.ndarray
    energy: np.ndarray
    tics: np.ndarray
    states: np.ndarray
    weights: np.ndarray
    unit: np.ndarray
    whole: np.ndarray
    omega: np.ndarray
    tica: np.ndarray
    alpha: np.ndarray
    torsion_state: np.ndarray
    tica_state: np.ndarray

    @property
    def size(self) -> int:
        """Number of frames."""
        return len(self.energy)


FRAME_FIELDS = ("angles", "chi", "energy", "tics", "states", "weights", "unit")
POINT_FIELDS = ("omega", "tica", "alpha", "torsion_state", "tica_state")


@dataclass(frozen=True, kw_only=True)
class Spaces:
    """Where frames of one molecule are compared, all of it fitted to the reference.

    Attributes:
        kT: kJ/mol.
        layout: of the molecule; None where coordinates were not kept.
        torsion_tica: TICA of cosines and sines of phi, psi and side-chain torsions, or None.
        literature: TICA in the features of the literature, or None.
        states: assigns angles [..., torsion] rad to macrostates, or None.
        n_states: number of macrostates.
        torsion_means: k-means of sines and cosines of phi, psi and omega (scikit-learn), or None.
        tica_means: k-means of the first two TICs of `literature`, or None.
    """

    kT: float
    layout: FrameLayout | None
    torsion_tica: TICAModel | None
    literature: TICAModel | None
    states: Callable[[np.ndarray], np.ndarray] | None
    n_states: int
    torsion_means: Any = None
    tica_means: Any = None


def _means(points: np.ndarray, weights: np.ndarray, seed: int) -> Any:  # noqa: ANN401 - scikit-learn has no types
    """Return the 20 k-means states of Prose: scikit-learn, random_state 0, on at most 10 000 points of the reference."""
    from sklearn.cluster import KMeans

    picked = resample(weights, len(points), min(STRUCTURES, len(points)), np.random.default_rng(seed))
    chosen = np.ascontiguousarray(points[picked], dtype=np.float64)
    count = min(PROSE_STATES, len(np.unique(chosen, axis=0)))
    return KMeans(n_clusters=count, random_state=0).fit(chosen) if count > 1 else None


def _sines(angles: np.ndarray) -> np.ndarray:
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)


def _labels(means: Any, points: np.ndarray) -> np.ndarray:  # noqa: ANN401 - scikit-learn has no types
    if means is None or not len(points):
        return np.full(len(points), -1)
    return means.predict(np.ascontiguousarray(points, dtype=np.float64))


def all_torsions(samples: SampleSet) -> np.ndarray:
    """Return phi, psi and side-chain torsions of all frames, [time, chain, torsion] rad."""
    if samples.frames is None:
        return samples.angles
    return np.concatenate([samples.angles, samples.frames.chi], axis=-1)


def fit_spaces(
    samples: SampleSet,
    weights: np.ndarray | None,
    layout: FrameLayout | None,
    *,
    kT: float,
    lag: int,
    states: Callable[[np.ndarray], np.ndarray] | None,
    n_states: int,
    seed: int,
) -> tuple[Spaces, Cloud]:
    """Fit the spaces of one molecule to its reference and return them with the reference in them.

    Args:
        samples: the reference.
        weights: [time, chain] MSM weights of its frames, or None.
        layout: of the molecule.
        kT: kJ/mol.
        lag: of both TICAs, frames.
        states: assigns angles to macrostates, or None.
        n_states: number of macrostates.
        seed: of sub-samples.
    """
    torsions = all_torsions(samples)
    series = list(np.swapaxes(circular_features(torsions), 0, 1))
    torsion_tica = fit_tica(series, lag=lag) if torsions.shape[-1] else None
    literature = fit_literature_tica(samples, lag=lag) if layout is not None else None
    spaces = Spaces(
        kT=kT, layout=layout, torsion_tica=torsion_tica, literature=literature, states=states, n_states=n_states
    )  # fmt: skip
    cloud = cloud_of(samples, spaces, weights=weights, every_frame=True)
    share = cloud.weights[cloud.whole]
    usable = len(cloud.whole) > 1
    spaces = replace(
        spaces,
        torsion_means=_means(_sines(point_torsions(cloud)), share, seed) if usable and cloud.angles.shape[1] else None,
        tica_means=_means(cloud.tica, share, seed) if usable and cloud.tica.shape[1] else None,
    )
    return spaces, _with_labels(cloud, spaces)


def point_torsions(cloud: Cloud) -> np.ndarray:
    """Return phi, psi and omega of the points, [point, torsion] rad."""
    return np.concatenate([cloud.angles[cloud.whole], cloud.omega], axis=1)


def _with_labels(cloud: Cloud, spaces: Spaces) -> Cloud:
    return replace(
        cloud,
        torsion_state=_labels(spaces.torsion_means, _sines(point_torsions(cloud))),
        tica_state=_labels(spaces.tica_means, cloud.tica),
    )


def _reference_points(samples: SampleSet, spaces: Spaces, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Return TICs [frame, 2] and CA atoms [frame, residue, 3] of every frame of the reference, in the order of time."""
    frames, layout = samples.frames, spaces.layout
    times, chains = samples.energy.shape
    if frames is None or frames.literature is None or layout is None:
        return np.zeros((times * chains, 0)), np.zeros((times * chains, 0, 3))
    angles = literature_torsions(samples)
    alpha = frames.literature[:, :, np.searchsorted(layout.literature, layout.alpha)] * scale
    if spaces.literature is None:
        return np.zeros((times * chains, 0)), alpha.reshape(times * chains, -1, 3)
    tics = np.empty((times, chains, TICS))
    for chain in range(chains):
        features = literature_features(frames.literature[:, chain] * scale, angles[:, chain])
        tics[:, chain] = spaces.literature.kinetic_map(features, components=TICS)
    return tics.reshape(-1, TICS), alpha.reshape(times * chains, -1, 3)


def cloud_of(
    samples: SampleSet, spaces: Spaces, *, weights: np.ndarray | None = None, every_frame: bool = False, scale: float = 1.0
) -> Cloud:
    """Return the samples of one set as points.

    Args:
        samples: the set.
        spaces: of the molecule.
        weights: [time, chain]; None takes the set's own log-weights, or equal ones.
        every_frame: whether C, N and S are known of every frame (the reference) or of a subset.
        scale: factor on all coordinates, 1 but in controls.
    """
    times, chains = samples.energy.shape
    count = times * chains
    if weights is None and samples.log_weights is not None and not check_weights(samples.log_weights):
        weights = normalised_weights(samples.log_weights)
    labels = unit_labels(times, chains) % MAX_UNITS
    frames, layout = samples.frames, spaces.layout
    angles = samples.angles.reshape(count, -1)
    chi = np.zeros((count, 0)) if frames is None else frames.chi.reshape(count, -1)
    whole, omega = np.zeros(0, dtype=int), np.zeros((0, 0))
    tica, alpha = np.zeros((0, 0)), np.zeros((0, 0, 3))
    if frames is not None and layout is not None and every_frame:
        whole, omega = np.arange(count), frames.omega.reshape(count, -1)
        tica, alpha = _reference_points(samples, spaces, scale)
    elif frames is not None and layout is not None:
        whole, omega = frames.times * chains + frames.chains, frames.omega[frames.times, frames.chains]
        alpha = frames.structures[:, layout.alpha]
        tica = np.zeros((len(whole), 0))
        if spaces.literature is not None:
            tica = spaces.literature.kinetic_map(structure_features(samples, layout), components=TICS)
    total = np.full(count, 1 / count) if weights is None else weights.ravel() / weights.sum()
    cloud = Cloud(
        angles=angles, chi=chi, energy=samples.energy.ravel() / spaces.kT, tics=_tics(angles, chi, spaces),
        states=_states(angles, spaces), weights=total, unit=labels.ravel(), whole=whole, omega=omega, tica=tica, alpha=alpha,
        torsion_state=np.full(len(whole), -1), tica_state=np.full(len(whole), -1),
    )  # fmt: skip
    return _with_labels(cloud, spaces)


def _tics(angles: np.ndarray, chi: np.ndarray, spaces: Spaces) -> np.ndarray:
    if spaces.torsion_tica is None:
        return np.zeros((len(angles), 0))
    return spaces.torsion_tica.project(circular_features(np.concatenate([angles, chi], axis=1)))[:, :TICS]


def _states(angles: np.ndarray, spaces: Spaces) -> np.ndarray:
    return np.full(len(angles), -1) if spaces.states is None else np.asarray(spaces.states(angles))


def with_torsions(cloud: Cloud, spaces: Spaces, angles: np.ndarray, chi: np.ndarray) -> Cloud:
    """Return the cloud with other torsions, and what follows from them; coordinates stay as they are."""
    changed = replace(cloud, angles=angles, chi=chi, tics=_tics(angles, chi, spaces), states=_states(angles, spaces))
    return _with_labels(changed, spaces)


def with_weights(cloud: Cloud, factors: np.ndarray) -> Cloud:
    """Return the cloud with its weights multiplied by factors [frame]."""
    weights = cloud.weights * factors
    return replace(cloud, weights=weights / weights.sum())


def select(cloud: Cloud, frames: np.ndarray) -> Cloud:
    """Return the frames with the given sorted indices, with the weights they had; at most 10 000 points stay."""
    position = np.full(cloud.size, -1)
    position[frames] = np.arange(len(frames))
    inside = np.flatnonzero(position[cloud.whole] >= 0)
    if len(inside) > STRUCTURES and len(cloud.whole) == cloud.size:
        inside = inside[np.arange(STRUCTURES) * len(inside) // STRUCTURES]
    values = {name: getattr(cloud, name)[frames] for name in FRAME_FIELDS}
    values |= {name: getattr(cloud, name)[inside] for name in POINT_FIELDS}
    total = values["weights"].sum()
    values["weights"] = values["weights"] / total if total > 0 else np.full(len(frames), 1 / max(len(frames), 1))
    return Cloud(**values, whole=position[cloud.whole[inside]])


def join(clouds: Sequence[Cloud]) -> Cloud:
    """Return several clouds as one, each weighing as its number of frames; units stay apart."""
    sizes = np.array([cloud.size for cloud in clouds])
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    units = np.concatenate([[0], np.cumsum([cloud.unit.max() + 1 for cloud in clouds])[:-1]])
    values = {
        name: np.concatenate([getattr(cloud, name) for cloud in clouds])
        for name in (*FRAME_FIELDS, *POINT_FIELDS)
        if name not in ("weights", "unit")
    }
    return Cloud(
        **values,
        weights=np.concatenate([cloud.weights * size / sizes.sum() for cloud, size in zip(clouds, sizes, strict=True)]),
        unit=np.concatenate([cloud.unit + unit for cloud, unit in zip(clouds, units, strict=True)]) % MAX_UNITS,
        whole=np.concatenate([cloud.whole + offset for cloud, offset in zip(clouds, offsets, strict=True)]),
    )
