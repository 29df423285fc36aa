"""TICA in the features of the literature on samplers of peptides: distances among C, N, S and sines and cosines of torsions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from longstride.analysis.tica_msm import TICAModel, fit_tica_pairs

if TYPE_CHECKING:
    from longstride.analysis.frames import FrameLayout
    from longstride.analysis.samples import SampleSet

CHUNK = 20_000


def literature_features(positions: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Return all distances among C, N and S atoms in nm, then sines, then cosines of phi, psi and omega, [frame, feature].

    The features of Timewarp, TBG, SBG and Prose, with psi where Timewarp's release computes phi twice
    (doi:10.48550/arXiv.2302.01170, doi:10.48550/arXiv.2508.18175). Oxygen is left out, as in their code.

    Args:
        positions: [frame, atom, 3] nm of C, N and S atoms.
        angles: [frame, torsion] rad, phi and psi, then omega.
    """
    first, second = np.triu_indices(positions.shape[1], k=1)
    x = np.asarray(positions, dtype=np.float64)
    distances = np.sqrt(sum((x[:, first, k] - x[:, second, k]) ** 2 for k in range(3)))
    return np.concatenate([distances, np.sin(angles), np.cos(angles)], axis=1)


def literature_torsions(samples: SampleSet) -> np.ndarray:
    """Return phi, psi and omega of all frames of a set, [time, chain, torsion] rad."""
    if samples.frames is None:
        return samples.angles
    return np.concatenate([samples.angles, samples.frames.omega], axis=-1)


def structure_features(samples: SampleSet, layout: FrameLayout) -> np.ndarray:
    """Return `literature_features` of the whole frames that a set keeps, [frame, feature]; none without frames."""
    frames = samples.frames
    if frames is None:
        return np.zeros((0, 0))
    angles = literature_torsions(samples)[frames.times, frames.chains]
    parts = [
        literature_features(frames.structures[start : start + CHUNK][:, layout.literature], angles[start : start + CHUNK])
        for start in range(0, len(frames.structures), CHUNK)
    ]
    return np.concatenate(parts)


def fit_literature_tica(samples: SampleSet, *, lag: int) -> TICAModel | None:
    """Fit TICA with Koopman reweighting to the features of the literature, on all frames of the reference.

    Features are made one trajectory at a time, so memory holds those of one.

    Args:
        samples: the reference, whose frames keep C, N and S.
        lag: in frames.

    Returns:
        the model, or None where no trajectory is longer than twice the lag or C, N and S were not kept.
    """
    frames = samples.frames
    if frames is None or frames.literature is None or len(samples.energy) <= 2 * lag or frames.literature.shape[2] < 2:
        return None
    angles, positions = literature_torsions(samples), frames.literature

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for chain in range(angles.shape[1]):
            features = literature_features(positions[:, chain], angles[:, chain])
            yield features[:-lag], features[lag:]

    return fit_tica_pairs(pairs, lag=lag)
