"""Wasserstein distances as the literature on samplers of peptides defines them, with POT, and their sampling errors.

W2 is a square root: of the cheapest mean squared displacement that turns one sample into the other. Values depend on the number
of points (more points, smaller distances, the more so in more dimensions), so it is stated beside every value.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np

from longstride.errors import NumericsError

MAX_ITERATIONS = 10_000_000


def check_points(x: np.ndarray, *, fewest: int = 2) -> str:
    """Return why points x [point, ...] cannot be compared, or an empty string: too few, or some are not finite."""
    if len(x) < fewest:
        return f"too few samples: {len(x)}, at least {fewest} are needed"
    if x.ndim > 1 and not x.shape[1]:
        return "no coordinates"
    return "" if np.isfinite(x).all() else "not finite: some values are NaN or infinite"


def resample(weights: np.ndarray | None, size: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """Return sorted indices of `count` of `size` samples, drawn in proportion to their weights by systematic resampling.

    Equation: index_k = F^-1((k + u) / count), F the cumulated weights, one u in [0, 1) per stratum. With equal weights and
    count <= size no sample is drawn twice.

    Args:
        weights: [sample] not negative, or None for equal ones.
        size: number of samples.
        count: how many to draw.
        generator: of the draws.

    Raises:
        NumericsError: weights that are negative, not finite, or all zero.
    """
    if weights is None:
        if count >= size:
            return np.arange(size)
        edges = np.arange(count + 1) * size // count
        return edges[:-1] + (generator.random(count) * np.diff(edges)).astype(int)
    if not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() <= 0:
        raise NumericsError("weights must be finite, not negative and not all zero; leave samples without a weight out")
    positions = (np.arange(count) + generator.random(count)) / count
    cumulated = np.cumsum(weights)
    return np.minimum(np.searchsorted(cumulated / cumulated[-1], positions, side="right"), size - 1)


@dataclass(frozen=True, kw_only=True)
class Transport:
    """An optimal transport between two samples.

    Attributes:
        distance: W2.
        potential_x: [point] how much a little more weight on a point of x adds to W2 squared.
        potential_y: [point] the same for y.
    """

    distance: float
    potential_x: np.ndarray
    potential_y: np.ndarray


def transport(cost: np.ndarray, x_weights: np.ndarray | None = None, y_weights: np.ndarray | None = None) -> Transport:
    """Return the optimal transport for squared displacements cost [point of x, point of y], solved exactly by POT.

    Equation: W2^2 = min_P sum_ij P_ij cost_ij over couplings P of the two samples = sum_i a_i f_i + sum_j b_j g_j with the dual
    potentials f and g, centred so that each averages to zero over its own sample. Source: Peyre and Cuturi,
    doi:10.1561/2200000073; POT's ot.emd2.

    Args:
        cost: squared displacements.
        x_weights: [point of x], or None for equal ones.
        y_weights: [point of y], or None for equal ones.

    Raises:
        NumericsError: the solver did not converge.
    """
    import ot

    a = np.full(cost.shape[0], 1 / cost.shape[0]) if x_weights is None else x_weights / x_weights.sum()
    b = np.full(cost.shape[1], 1 / cost.shape[1]) if y_weights is None else y_weights / y_weights.sum()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what POT warns of is in the log
        value, log = ot.emd2(a, b, np.ascontiguousarray(cost, dtype=np.float64), numItermax=MAX_ITERATIONS, log=True)
    if log.get("warning"):
        raise NumericsError(f"optimal transport of {cost.shape} points failed ({log['warning']}); use fewer points")
    f, g = np.asarray(log["u"]), np.asarray(log["v"])
    return Transport(distance=math.sqrt(max(float(value), 0.0)), potential_x=f - a @ f, potential_y=g - b @ g)


def torus_cost(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return sum over torsions of min(|d|, 2 pi - |d|)^2 in rad^2 for angles x, y [point, torsion] rad, [point, point]."""
    total = np.zeros((len(x), len(y)))
    for a, b in zip(_wrapped(x).T, _wrapped(y).T, strict=True):
        difference = np.abs(a[:, None] - b[None, :])
        np.minimum(difference, 2 * np.pi - difference, out=difference)
        difference *= difference
        total += difference
    return total


def _wrapped(angles: np.ndarray) -> np.ndarray:
    return (np.asarray(angles, dtype=np.float64) + np.pi) % (2 * np.pi) - np.pi


def euclidean_cost(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return squared Euclidean distances of points x, y [point, dimension], [point of x, point of y]."""
    from scipy.spatial.distance import cdist

    return cdist(x, y, "sqeuclidean")


def torus_w2(x: np.ndarray, y: np.ndarray) -> float:
    """Return T-W2 of all phi and psi jointly, x and y [point, torsion] rad, in rad.

    Equation: W2 with the cost `torus_cost`. Source: doi:10.48550/arXiv.2502.18462 (SBG), doi:10.48550/arXiv.2508.18175 (Prose).
    """
    return transport(torus_cost(x, y)).distance


def tica_w2(x: np.ndarray, y: np.ndarray) -> float:
    """Return TICA-W2 of the first two TICA components, x and y [point, 2], in units of those components.

    Equation: W2 with the squared Euclidean distance. Source: as `torus_w2`.
    """
    return transport(euclidean_cost(x, y)).distance


def energy_w2(x: np.ndarray, y: np.ndarray, x_weights: np.ndarray | None = None, y_weights: np.ndarray | None = None) -> float:
    """Return E-W2 of two samples of reduced energies U / kT, in kT; both may carry weights.

    Equation: sqrt of the one-dimensional W2^2 = int_0^1 (F_x^-1(q) - F_y^-1(q))^2 dq, by POT's emd2_1d. Source: as `torus_w2`.

    Args:
        x: [point] kT.
        y: [point] kT.
        x_weights: [point], or None for equal ones.
        y_weights: [point], or None for equal ones.
    """
    import ot

    a = None if x_weights is None else x_weights / x_weights.sum()
    b = None if y_weights is None else y_weights / y_weights.sum()
    # POT works with absolute values; -100 kT and -100.1 kT would lose half of their digits when squared
    shift = float(np.mean(x))
    return math.sqrt(max(float(ot.emd2_1d(x - shift, y - shift, a, b)), 0.0))
