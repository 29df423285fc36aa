"""TICA, k-means and Markov state models with deeptime; implied timescales with errors.

Kinetics are computed only from methods whose saves are equally spaced in physical time; a Markov chain Monte Carlo
trajectory has no time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from deeptime.clustering import KMeans, KMeansModel
from deeptime.covariance import CovarianceModel, KoopmanWeightingEstimator, KoopmanWeightingModel
from deeptime.decomposition import TICA
from deeptime.markov.tools.analysis import stationary_distribution
from deeptime.markov.tools.estimation import transition_matrix
from scipy.sparse.csgraph import connected_components

from longstride.analysis.bootstrap import multiplicities

KMEANS_FRAMES = 50_000
CLUSTER_TICS = 4
NEGATIVE_WEIGHTS = 0.05
SEGMENTS = 40
_TRACES = (1e-3, 1e-2, 1e-1)  # shares of all counts that a bootstrap replicate keeps: the first with which it can be estimated
REPLICATE_TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class TICAModel:
    """A fitted TICA projection.

    Attributes:
        mean: [feature] mean removed before projecting.
        axes: [feature, component]; the component with the slowest decay first. Signs are fixed: the largest entry of
            every axis is positive.
        timescales: [component] -lag / ln|eigenvalue| in frames.
        lag: lag time in frames.
        reweighting: "koopman" where frames were weighted to equilibrium, "none" where they could not be.
        note: why they could not; empty otherwise.
    """

    mean: np.ndarray
    axes: np.ndarray
    timescales: np.ndarray
    lag: int
    reweighting: str = "none"
    note: str = ""

    @property
    def eigenvalues(self) -> np.ndarray:
        """Absolute eigenvalues exp(-lag / timescale), [component]."""
        return np.exp(-self.lag / self.timescales)

    def project(self, features: np.ndarray) -> np.ndarray:
        """Return (features - mean) @ axes for features [..., feature], as [..., component]."""
        return (features - self.mean) @ self.axes

    def kinetic_map(self, features: np.ndarray, *, components: int) -> np.ndarray:
        """Return the slowest components times their eigenvalues (doi:10.1021/acs.jctc.5b00553), [..., component]."""
        return (features - self.mean) @ (self.axes * self.eigenvalues)[:, :components]


Pairs = Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]


def fit_tica(series: list[np.ndarray], *, lag: int, koopman: bool = True) -> TICAModel | None:
    """Fit TICA (reversible, unit variance per component) to trajectories [time, feature]; None where it cannot be.

    See `fit_tica_pairs`. None when no trajectory is longer than twice the lag or no feature moves.
    """
    usable = [np.asarray(part, dtype=np.float64) for part in series if len(part) > 2 * lag]
    if not usable or not usable[0].shape[1] or max(np.ptp(part, axis=0).max() for part in usable) < 1e-9:
        return None
    return fit_tica_pairs(lambda: ((part[:-lag], part[lag:]) for part in usable), lag=lag, koopman=koopman)


def fit_tica_pairs(pairs: Pairs, *, lag: int, koopman: bool = True) -> TICAModel:
    """Fit TICA to pairs of features (x(t), x(t + lag)), each [frame, feature], that a function gives anew for every pass.

    Equation: C(tau) a = lambda C(0) a with both covariances symmetrised in time (doi:10.1063/1.4811489). Trajectories that
    were started out of equilibrium bias both; every pair is therefore weighted by the ratio of the equilibrium and the
    empirical density that the Koopman operator gives (doi:10.1063/1.4979344). The weights are linear in the
    features: where more than 5 % of them are negative the features cannot express the ratio, and the pairs count equally.

    Args:
        pairs: called once per pass; a pass may be streamed from disk.
        lag: lag time in frames.
        koopman: whether to reweight; False is for controls.
    """
    weights, note = (_koopman_weights(pairs, lag), "") if koopman else (None, "not asked for")
    covariances, negative = _covariances(pairs, lag, weights)
    if not np.isfinite(negative):
        weights, note = None, "not reweighted: these features give no equilibrium density"
    elif negative > NEGATIVE_WEIGHTS:
        weights, note = None, f"not reweighted: {100 * negative:.0f} % of the equilibrium weights would be negative"
    if note and koopman:
        covariances, _ = _covariances(pairs, lag, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = TICA(lagtime=lag, dim=None, scaling=None).fit_from_covariances(covariances).fetch_model()
    axes = np.asarray(model.singular_vectors_left, dtype=np.float64)
    largest = axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])]
    axes = axes * np.where(largest < 0, -1.0, 1.0)
    values = np.clip(np.abs(np.asarray(model.singular_values)), 1e-12, 1 - 1e-12)
    return TICAModel(
        mean=np.asarray(model.mean_0, dtype=np.float64),
        axes=axes,
        timescales=-lag / np.log(values),
        lag=lag,
        reweighting="none" if weights is None else "koopman",
        note=note,
    )


def _koopman_weights(pairs: Pairs, lag: int) -> KoopmanWeightingModel:
    estimator = KoopmanWeightingEstimator(lag)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for pair in pairs():
            estimator.partial_fit(pair)
        return estimator.fetch_model()


def _covariances(pairs: Pairs, lag: int, weights: KoopmanWeightingModel | None) -> tuple[CovarianceModel, float]:
    """Return the covariances of weighted pairs and the share of negative weights; NaN where the weights mean nothing."""
    estimator = TICA.covariance_estimator(lagtime=lag)
    total, negative, sum_of_weights = 0, 0, 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for x, y in pairs():
            own = np.ones(len(x)) if weights is None else np.ravel(weights.weights(x))
            total, negative, sum_of_weights = total + len(own), negative + int((own < 0).sum()), sum_of_weights + own.sum()
            estimator.partial_fit((x, y), weights=own)
        model = estimator.fetch_model()
    return model, negative / total if np.isfinite(sum_of_weights) and sum_of_weights > 0 else np.nan


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """k-means states in feature space.

    Attributes:
        model: the fitted centres.
        tica: projection applied before clustering, or None for the features themselves.
    """

    model: KMeansModel
    tica: TICAModel | None

    @property
    def n_states(self) -> int:
        """Number of states."""
        return len(self.model.cluster_centers)

    def assign(self, features: np.ndarray) -> np.ndarray:
        """Return the nearest state of features [time, feature], [time] int."""
        return np.asarray(self.model.transform(_cluster_space(features, self.tica), n_jobs=1), dtype=np.int64)


def _cluster_space(features: np.ndarray, tica: TICAModel | None) -> np.ndarray:
    if tica is None:
        return np.ascontiguousarray(features, dtype=np.float64)
    projected = tica.project(features)[:, :CLUSTER_TICS]
    weights = np.exp(-tica.lag / tica.timescales[:CLUSTER_TICS])  # kinetic map (doi:10.1021/acs.jctc.5b00553)
    return np.ascontiguousarray(projected * weights)


def cluster(series: list[np.ndarray], *, states: int, tica: TICAModel | None, seed: int) -> Clusters:
    """Cluster trajectories [time, feature] into `states` k-means states with a fixed seed (deterministic).

    Up to four features (two torsions) are clustered as they are; more are first projected on the slowest TICA components.
    """
    space = tica if series[0].shape[1] > 4 else None
    points = np.concatenate([_cluster_space(part, space) for part in series])
    points = points[:: max(1, len(points) // KMEANS_FRAMES)]
    states = min(states, len(np.unique(points, axis=0)))
    estimator = KMeans(
        states, init_strategy="kmeans++", fixed_seed=seed % 2**31, max_iter=200, tolerance=1e-6, n_jobs=1, progress=None
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Clusters(model=estimator.fit(points).fetch_model(), tica=space)


def segment_of_frames(lengths: list[int], *, minimum: int = SEGMENTS) -> list[np.ndarray]:
    """Return the bootstrap segment of every frame, one [time] int array per trajectory.

    Trajectories are cut into equal segments, at least `minimum` in all. Given its starting state a transition does
    not remember the past (that is what an MSM assumes), so segments of one trajectory may be resampled separately.
    """
    per_trajectory = max(1, -(-minimum // max(len(lengths), 1)))
    labels, offset = [], 0
    for length in lengths:
        pieces = max(1, min(per_trajectory, length))
        labels.append(offset + np.arange(length) * pieces // max(length, 1))
        offset += pieces
    return labels


def segment_counts(paths: list[np.ndarray], segments: list[np.ndarray], *, states: int, lag: int) -> np.ndarray:
    """Return sliding-window transition counts per segment, [segment, state, state] float64.

    Equation: C_ij = number of t with s_t = i and s_{t+lag} = j; a transition belongs to the segment of its start.
    """
    n_segments = max(int(part.max()) for part in segments if len(part)) + 1
    total = np.zeros(n_segments * states * states)
    for path, segment in zip(paths, segments, strict=True):
        if len(path) > lag:
            index = (segment[:-lag] * states + path[:-lag]) * states + path[lag:]
            total += np.bincount(index, minlength=len(total))
    return total.reshape(n_segments, states, states)


def connected_states(counts: np.ndarray) -> np.ndarray:
    """Return the states of the strongly connected set that holds the most counts, ascending ints."""
    n_sets, label = connected_components(counts > 0, directed=True, connection="strong")
    weight = np.array([counts[np.ix_(label == k, label == k)].sum() for k in range(n_sets)])
    return np.nonzero(label == int(weight.argmax()))[0]


@dataclass(frozen=True, kw_only=True)
class MarkovModel:
    """A reversible maximum-likelihood Markov state model on the connected set.

    Attributes:
        states: the connected states, as numbered before.
        matrix: [state, state] transition probabilities among them.
        stationary: [state] stationary distribution.
    """

    states: np.ndarray
    matrix: np.ndarray
    stationary: np.ndarray

    def timescales(self, *, lag: int, count: int) -> np.ndarray:
        """Return the `count` slowest implied timescales -lag / ln(lambda_i) in frames; NaN for lambda <= 0 or missing."""
        root = np.sqrt(self.stationary)
        symmetric = root[:, None] * self.matrix / root[None, :]
        values = np.linalg.eigvalsh((symmetric + symmetric.T) / 2)[::-1][1 : count + 1]
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.where((values > 0) & (values < 1 - 1e-13), -lag / np.log(np.maximum(values, 1e-300)), np.nan)
        return np.pad(found, (0, count - len(found)), constant_values=np.nan)


def fit_msm(counts: np.ndarray, *, tolerance: float = 1e-8) -> MarkovModel | None:
    """Fit a reversible maximum-likelihood MSM to counts [state, state]; None with fewer than two connected states.

    Equation: the T that maximises prod T_ij^C_ij under pi_i T_ij = pi_j T_ji (doi:10.1063/1.3565032), by deeptime.

    Args:
        counts: transition counts.
        tolerance: largest relative change per iteration at which the fit stops; `REPLICATE_TOLERANCE` is enough (0.2 %
            of a timescale) and three times faster where only a spread is wanted.
    """
    states = connected_states(counts)
    if len(states) < 2:
        return None
    inside = np.ascontiguousarray(counts[np.ix_(states, states)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        matrix = np.asarray(transition_matrix(inside, reversible=True, maxiter=100_000, maxerr=tolerance))
        stationary = np.asarray(stationary_distribution(matrix))
    return MarkovModel(states=states, matrix=matrix, stationary=stationary)


@dataclass(frozen=True, kw_only=True)
class ImpliedTimescales:
    """Implied timescales at one lag.

    Attributes:
        lag: lag time in frames.
        values: [timescale] in frames, slowest first; NaN where undefined.
        low: 2.5 % bootstrap percentiles.
        high: 97.5 % bootstrap percentiles.
        connected_fraction: fraction of all frames in the connected set.
        note: why values are undefined; empty otherwise.
    """

    lag: int
    values: np.ndarray
    low: np.ndarray
    high: np.ndarray
    connected_fraction: float
    note: str = ""


def _replica(weight: np.ndarray, counts: np.ndarray) -> MarkovModel | None:
    """Return the MSM of counts [segment, state, state] drawn [segment] times and a trace of all; None where there is none.

    A state that is left often and entered by the trace alone has a stationary probability too small for the estimator; a larger
    trace then takes its place.
    """
    for trace in _TRACES:
        try:
            return fit_msm(np.tensordot(weight + trace, counts, axes=1), tolerance=REPLICATE_TOLERANCE)
        except RuntimeError as error:
            if "Stationary distribution" not in str(error):  # deeptime says so where a stationary probability underflows
                raise
    return None


def implied_timescales(
    paths: list[np.ndarray], *, states: int, lag: int, count: int, replicates: int, seed: int
) -> ImpliedTimescales:
    """Return implied timescales of discrete trajectories at one lag, with segment-bootstrap intervals.

    Args:
        paths: discrete trajectories [time] int.
        states: number of states they are numbered in.
        lag: lag time in frames.
        count: number of timescales.
        replicates: bootstrap replicates.
        seed: of the bootstrap.
    """
    empty = np.full(count, np.nan)
    longest = max((len(path) for path in paths), default=0)
    if longest < 3 * lag:
        note = f"undefined: trajectories of {longest} frames are shorter than three lags of {lag}"
        return ImpliedTimescales(lag=lag, values=empty, low=empty, high=empty, connected_fraction=0.0, note=note)
    segments = segment_of_frames([len(path) for path in paths])
    counts = segment_counts(paths, segments, states=states, lag=lag)
    model = fit_msm(counts.sum(axis=0))
    if model is None:
        note = "undefined: no two states are connected in both directions"
        return ImpliedTimescales(lag=lag, values=empty, low=empty, high=empty, connected_fraction=0.0, note=note)
    drawn = multiplicities(len(counts), replicates, np.random.default_rng(seed))
    samples = np.full((replicates, count), np.nan)
    for row, weight in enumerate(drawn):
        # a replicate that misses one direction of a rare crossing has not lost that process, it has not resolved it: what all
        # of the data connect stays connected, by a trace, and its timescale is long
        replica = _replica(weight, counts)
        if replica is not None:
            samples[row] = replica.timescales(lag=lag, count=count)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a column of NaN has a NaN percentile
        low, high = np.nanpercentile(samples, [2.5, 97.5], axis=0)
    occupied = np.bincount(np.concatenate(paths), minlength=states)
    fraction = float(occupied[model.states].sum() / occupied.sum())
    values = model.timescales(lag=lag, count=count)
    return ImpliedTimescales(lag=lag, values=values, low=low, high=high, connected_fraction=fraction)
