"""Equilibrium weights for trajectories that were started in chosen basins.

A histogram of short trajectories repeats the choice of their starts. An MSM only uses transitions given their start,
so its stationary distribution does not, once every basin is left and entered at least a few times.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from longstride.analysis.bootstrap import multiplicities
from longstride.analysis.tica_msm import REPLICATE_TOLERANCE, SEGMENTS, MarkovModel, fit_msm, segment_counts, segment_of_frames


@dataclass(frozen=True, kw_only=True)
class Reweighting:
    """MSM weights of the frames of several trajectories, with bootstrap replicates.

    Attributes:
        weights: [frame] over all trajectories end to end, sum 1; zero outside the connected set. None where no MSM
            could be fitted.
        lag: lag time of the MSM in frames.
        lengths: frames of each trajectory.
        connected_fraction: fraction of frames in the connected set.
        note: what limits the weights; empty otherwise.
        paths: [frame] state of every frame.
        segments: [frame] bootstrap segment of every frame.
        draws: [replicate, segment] how often each segment is drawn.
        stationaries: [replicate, state] stationary distribution of each replicate, zero outside its connected set.
        model: the MSM itself, or None.
    """

    weights: np.ndarray | None
    lag: int
    lengths: tuple[int, ...]
    connected_fraction: float
    note: str
    paths: np.ndarray
    segments: np.ndarray
    draws: np.ndarray
    stationaries: np.ndarray
    model: MarkovModel | None = None

    @property
    def replicates(self) -> int:
        """Number of bootstrap replicates."""
        return len(self.draws)

    def replicate(self, index: int) -> np.ndarray:
        """Return the frame weights of one bootstrap replicate, [frame], sum 1 (or all zero where it has no model)."""
        drawn = self.draws[index][self.segments].astype(np.float64)
        return _frame_weights(self.paths, drawn, self.stationaries[index])


def _frame_weights(paths: np.ndarray, drawn: np.ndarray, stationary: np.ndarray) -> np.ndarray:
    occupied = np.bincount(paths, weights=drawn, minlength=len(stationary))
    share = np.divide(stationary, occupied, out=np.zeros_like(stationary), where=occupied > 0)
    weights = drawn * share[paths]
    total = weights.sum()
    return weights / total if total > 0 else weights


def _spread(model: MarkovModel | None, states: int) -> np.ndarray:
    full = np.zeros(states)
    if model is not None:
        full[model.states] = model.stationary
    return full


def reweight(paths: list[np.ndarray], *, states: int, lag: int, replicates: int, seed: int) -> Reweighting:
    """Weight frames of discrete trajectories by the stationary distribution of their MSM.

    Equation: w_f = pi(s_f) / n(s_f), pi of the reversible MSM at `lag`, n the number of frames in the state. Replicates
    resample trajectory segments and repeat the whole estimate.

    Args:
        paths: discrete trajectories [time] int.
        states: number of states.
        lag: lag time in frames.
        replicates: bootstrap replicates.
        seed: of the bootstrap.
    """
    minimum = max(len(paths), min(SEGMENTS, sum(len(path) for path in paths) // max(2 * lag, 1)))
    segments = segment_of_frames([len(path) for path in paths], minimum=minimum)
    joined, joined_segments = np.concatenate(paths), np.concatenate(segments)
    n_segments = int(joined_segments.max()) + 1
    draws = multiplicities(n_segments, replicates, np.random.default_rng(seed))
    stationaries = np.zeros((replicates, states))
    longest = max(len(path) for path in paths)
    weights, fraction = None, 0.0
    counts = segment_counts(paths, segments, states=states, lag=lag)
    model = fit_msm(counts.sum(axis=0)) if longest >= 3 * lag else None
    if model is None:
        short = f"trajectories of {longest} frames are shorter than three lags of {lag}"
        note = f"no MSM: {short if longest < 3 * lag else 'no two states are connected in both directions'}"
    else:
        for row, drawn in enumerate(draws):
            replica = fit_msm(np.tensordot(drawn, counts, axes=1), tolerance=REPLICATE_TOLERANCE)
            stationaries[row] = _spread(replica, states)
        weights = _frame_weights(joined, np.ones(len(joined)), _spread(model, states))
        fraction = float(np.isin(joined, model.states).mean())
        note = "" if fraction > 0.99 else f"{100 * (1 - fraction):.1f} % of the frames lie outside the connected states"
    return Reweighting(
        weights=weights, connected_fraction=fraction, note=note, paths=joined, segments=joined_segments, draws=draws,
        stationaries=stationaries, lag=lag, lengths=tuple(len(path) for path in paths),
        model=model,
    )  # fmt: skip
