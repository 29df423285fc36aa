"""Observables as functions of additive statistics over independent units, so that every one has a standard error.

A unit is a replica, or an equal block of one where there are few. Each unit gives a vector of statistics (a histogram, a
correlation function, sums); the observable is a function of their mean over units, and the jackknife over units gives its
error, whatever the function is. Runs with other seeds only add units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from longstride.errors import LongstrideError

if TYPE_CHECKING:
    from collections.abc import Sequence

MIN_UNITS = 20
SHUFFLES = 199
Reduction = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Block:
    """One unit: some consecutive frames of one replica."""

    replica: int
    frames: slice


def blocks_of(n_frames: int, n_replicas: int, *, minimum: int = MIN_UNITS, shortest: int = 1) -> tuple[Block, ...]:
    """Return the units of a run, replica by replica: whole replicas, or equal blocks so that there are `minimum` of them.

    Args:
        n_frames: saved frames per replica.
        n_replicas: replicas.
        minimum: units wanted; fewer where blocks would be shorter than `shortest`.
        shortest: frames that a block must have (longest lag and what averages it).

    Raises:
        LongstrideError: a replica has fewer frames than `shortest`.
    """
    if n_frames < shortest or n_replicas < 1:
        raise LongstrideError(
            f"{n_frames} frames of {n_replicas} replicas are too few, at least {shortest} frames are needed; run longer, save"
            f" more often or ask for shorter lags"
        )
    count = max(1, min(math.ceil(minimum / n_replicas), n_frames // max(shortest, 1)))
    length = n_frames // count
    return tuple(
        Block(replica=replica, frames=slice(k * length, (k + 1) * length))
        for replica in range(n_replicas)
        for k in range(count)
    )


def identity(statistics: np.ndarray) -> np.ndarray:
    """Return the statistics as they are: the observable is a plain mean over units."""
    return statistics


@dataclass(frozen=True, kw_only=True, eq=False)
class Observable:
    """A number or a curve with the statistics that it comes from.

    Attributes:
        name: such as "temperature" or "bond length mean".
        part: which atoms or torsion it belongs to, such as "O-H"; empty for the whole system.
        unit: of the values.
        statistics: [unit, statistic], additive.
        chains: [unit] which replica of which run a unit belongs to; units of one replica are consecutive and in order.
        reduction: maps mean statistics [..., statistic] to values [..., component].
        grid: [component] abscissa of a curve; None for a number.
        grid_unit: of the abscissa.
        matters: smallest difference that would matter, unit of the values.
        matters_relative: the same as a fraction of the (root mean square) value; both add.
        cumulative: whether the values are a distribution function, compared by the largest difference (Kolmogorov-Smirnov).
        note: what limits it; empty otherwise.
    """

    name: str
    unit: str
    statistics: np.ndarray
    chains: np.ndarray
    part: str = ""
    reduction: Reduction = identity
    grid: np.ndarray | None = None
    grid_unit: str = ""
    matters: float = 0.0
    matters_relative: float = 0.0
    cumulative: bool = False
    note: str = ""

    @property
    def n_units(self) -> int:
        """Number of units."""
        return len(self.statistics)

    @cached_property
    def values(self) -> np.ndarray:
        """[component] the observable at the mean statistics."""
        return np.atleast_1d(self.reduction(self.statistics.mean(axis=0)))

    @cached_property
    def pseudo_values(self) -> np.ndarray:
        """[unit, component] jackknife pseudo-values n f(mean) - (n-1) f(mean without the unit), doi:10.1093/biomet/43.3-4.353.

        For a plain mean they are the units' own values.

        Raises:
            LongstrideError: fewer than two units.
        """
        n = self.n_units
        if n < 2:
            raise LongstrideError(f"{self.name} {self.part}: one unit has no standard error; use several replicas or seeds")
        without = (self.statistics.sum(axis=0) - self.statistics) / (n - 1)
        return n * self.values - (n - 1) * self.reduction(without).reshape(n, -1)

    @cached_property
    def inflation(self) -> float:
        """Factor on the variance for blocks of one replica that are not independent; 1 where they look independent.

        Equation: the larger of (1 + r) / (1 - r), r the correlation of neighbouring blocks, and of the variance of replica
        means over the one that independent blocks would give, both averaged over components. Either counts only where
        it exceeds 95 % of its values with the blocks dealt out at random.
        """
        centred = self.pseudo_values - self.pseudo_values.mean(axis=0)
        scale = np.sqrt((centred**2).mean(axis=0))
        moving = scale > 1e-9 * np.abs(self.values).max()
        same = self.chains[1:] == self.chains[:-1]
        if same.sum() < 2 or not moving.any():
            return 1.0
        unit = centred[:, moving] / scale[moving]
        generator = np.random.default_rng(0)
        shuffled = [_dependence(generator.permutation(unit), self.chains, same) for _ in range(SHUFFLES)]
        found, limits = _dependence(unit, self.chains, same), np.quantile(shuffled, 0.95, axis=0)
        r = min(found[0], 0.95)
        neighbours = (1 + r) / (1 - r) if found[0] > limits[0] else 1.0
        return max(neighbours, found[1] if found[1] > limits[1] else 1.0, 1.0)

    @cached_property
    def errors(self) -> np.ndarray:
        """[component] jackknife standard errors over units, inflated for correlated blocks; unit of the values."""
        return self.pseudo_values.std(axis=0, ddof=1) * math.sqrt(self.inflation / self.n_units)

    @property
    def tolerance(self) -> float:
        """Smallest difference that matters, unit of the values."""
        return self.matters + self.matters_relative * float(np.sqrt((self.values**2).mean()))


def _dependence(unit: np.ndarray, chains: np.ndarray, same: np.ndarray) -> tuple[float, float]:
    """Return (correlation of neighbours, variance of replica means relative to independent units) of [unit, component]."""
    neighbours = float((unit[1:] * unit[:-1])[same].mean())
    names, index, sizes = np.unique(chains, return_inverse=True, return_counts=True)
    if len(names) < 2:
        return neighbours, 1.0
    sums = np.zeros((len(names), unit.shape[1]))
    np.add.at(sums, index, unit)
    means = sums / sizes[:, None]
    return neighbours, float((means.var(axis=0, ddof=1).mean() * sizes.mean()) * (1 - 1 / len(unit)))


def pool(observables: Sequence[Observable]) -> Observable:
    """Return the observable of all units of several runs of the same kind together.

    Units weigh the same, so runs should have the same length.

    Raises:
        LongstrideError: nothing to pool, or other names, abscissae or numbers of statistics.
    """
    if not observables:
        raise LongstrideError("no runs to pool")
    first = observables[0]
    chains, offset = [], 0
    for item in observables:
        same_grid = (item.grid is None) == (first.grid is None) and np.array_equal(
            np.zeros(0) if item.grid is None else item.grid, np.zeros(0) if first.grid is None else first.grid
        )
        if (item.name, item.part) != (first.name, first.part) or not same_grid:
            raise LongstrideError(
                f"cannot pool {first.name} {first.part} with {item.name} {item.part}: not the same observable"
            )
        chains.append(item.chains + offset)
        offset += int(item.chains.max()) + 1
    return replace(
        first,
        statistics=np.concatenate([item.statistics for item in observables]),
        chains=np.concatenate(chains),
        matters=float(np.mean([item.matters for item in observables])),
        note=next((item.note for item in observables if item.note), ""),
    )


def mean_and_spread(statistics: np.ndarray) -> np.ndarray:
    """Return (mean, sd) from (<x>, <x^2>) [..., 2]."""
    mean, square = statistics[..., 0], statistics[..., 1]
    return np.stack([mean, np.sqrt(np.maximum(square - mean**2, 0.0))], axis=-1)


def component(reduction: Reduction, index: int) -> Reduction:
    """Return the reduction that keeps one component of another, [..., 1]."""

    def one(statistics: np.ndarray) -> np.ndarray:
        return reduction(statistics)[..., index : index + 1]

    return one


def ratio_of_means(statistics: np.ndarray) -> np.ndarray:
    """Return a / b from (<a>, <b>) [..., 2] as [..., 1]."""
    return statistics[..., :1] / statistics[..., 1:2]
