"""Every distance between two distributions, under an unambiguous name, with its sampling error over chains."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from longstride.analysis import divergences
from longstride.analysis.bootstrap import multiplicities
from longstride.analysis.distances import check_points, energy_w2, euclidean_cost, resample, torus_cost, transport
from longstride.analysis.energies import ks_distance
from longstride.analysis.estimate import Z95, Estimate, undefined

if TYPE_CHECKING:
    from longstride.analysis.clouds import Cloud, Spaces
    from longstride.analysis.features import Torsions

POINTS = 1_500  # of each side in T-W2 and TICA-W2; published values use up to 10 000
LINE_POINTS = 10_000  # of each side in E-W2 and KS
REPLICATES = 50
MIN_FRAMES = 20
MIN_ALPHA, MIN_ALPHA_PWD, PWD_OFFSET = 3, 5, 3


@dataclass(frozen=True, kw_only=True)
class Column:
    """Two histograms over the same bins.

    Attributes:
        x: [frame or point] bin of the reference, negative outside.
        y: [frame or point] bin of the method, negative outside.
        bins: how many there are.
        volume: of one bin; 1 where it does not matter.
    """

    x: np.ndarray
    y: np.ndarray
    bins: int
    volume: float = 1.0


class Evaluate(Protocol):
    """Returns the distance of two clouds, with an interval where that is asked for."""

    def __call__(self, x: Cloud, y: Cloud, *, seed: int, interval: bool) -> Estimate:
        """Compare the reference x with the method y."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One distance between distributions.

    Attributes:
        name: key in comparison.json.
        unit: of the value.
        evaluate: compares a reference and a method.
    """

    name: str
    unit: str
    evaluate: Evaluate


def _unit_counts(unit: np.ndarray, index: np.ndarray, weights: np.ndarray, bins: int) -> np.ndarray:
    """Return weighted histograms per bootstrap unit, [unit, bin]."""
    inside = index >= 0
    units = int(unit.max()) + 1
    flat = np.bincount(unit[inside] * bins + index[inside], weights[inside], minlength=units * bins)
    return flat.reshape(units, bins)


def _spread(value: float, replicates: np.ndarray) -> Estimate:
    """Return value with the interval that the standard deviation of its bootstrap replicates gives, never below zero.

    Percentiles would be wrong: resampling adds noise, and noise adds to a distance.
    """
    if not math.isfinite(value):
        return undefined("the distance is not finite: no common bin")
    if not np.isfinite(replicates).all() or len(replicates) < 2:
        return Estimate(value=value, note="no interval: some bootstrap replicates are undefined")
    half = Z95 * float(replicates.std(ddof=1))
    return Estimate(value=value, low=max(value - half, 0.0), high=value + half)


def _histograms(
    columns: list[Column],
    form: Callable[[np.ndarray, np.ndarray, float], np.ndarray],
    reference: tuple[np.ndarray, np.ndarray],
    method: tuple[np.ndarray, np.ndarray],
    *,
    seed: int,
    interval: bool,
) -> Estimate:
    """Return the mean of a divergence over histograms; each side is its (unit, weights)."""
    generator = np.random.default_rng(seed)
    draws = [multiplicities(int(unit.max()) + 1, REPLICATES if interval else 0, generator) for unit, _ in (reference, method)]
    value, replicates = 0.0, np.zeros(len(draws[0]))
    for column in columns:
        p = _unit_counts(reference[0], column.x, reference[1], column.bins)
        q = _unit_counts(method[0], column.y, method[1], column.bins)
        if not p.sum() or not q.sum():
            return undefined("one side has no sample inside the bins")
        value += float(form(p.sum(axis=0), q.sum(axis=0), column.volume)) / len(columns)
        if interval:
            replicates = replicates + form(draws[0] @ p, draws[1] @ q, column.volume) / len(columns)
    return _spread(value, replicates) if interval else Estimate(value=value)


def _mdgen(p: np.ndarray, q: np.ndarray, _: float) -> np.ndarray:
    return divergences.jsd_dist_nat(p, q)


def _prose(p: np.ndarray, q: np.ndarray, _: float) -> np.ndarray:
    return divergences.prose_jsd(p, q)


def _too_few(x: Cloud, y: Cloud, *, points: bool) -> str:
    sizes = (len(x.whole), len(y.whole)) if points else (x.size, y.size)
    what = "frames with coordinates" if points else "samples"
    return f"too few {what}: {min(sizes)}, at least {MIN_FRAMES} are needed" if min(sizes) < MIN_FRAMES else ""


def _frame_metric(name: str, unit: str, columns: Callable[[Cloud, Cloud], list[Column] | str]) -> Metric:
    """Return a metric of histograms over all frames; `columns` may return why there are none."""

    def evaluate(x: Cloud, y: Cloud, *, seed: int, interval: bool) -> Estimate:
        reason = _too_few(x, y, points=False)
        found = reason or columns(x, y)
        if isinstance(found, str):
            return undefined(found)
        return _histograms(found, _mdgen, (x.unit, x.weights), (y.unit, y.weights), seed=seed, interval=interval)

    return Metric(name=name, unit=unit, evaluate=evaluate)


def _point_metric(
    name: str,
    unit: str,
    columns: Callable[[Cloud, Cloud], list[Column] | str],
    form: Callable[[np.ndarray, np.ndarray, float], np.ndarray],
) -> Metric:
    """Return a metric of histograms over the frames whose coordinates are known."""

    def evaluate(x: Cloud, y: Cloud, *, seed: int, interval: bool) -> Estimate:
        found = columns(x, y)  # what a molecule does not have is said before what a set lacks
        if isinstance(found, str) or _too_few(x, y, points=True):
            return undefined(found if isinstance(found, str) else _too_few(x, y, points=True))
        sides = [(one.unit[one.whole], one.weights[one.whole]) for one in (x, y)]
        return _histograms(found, form, sides[0], sides[1], seed=seed, interval=interval)

    return Metric(name=name, unit=unit, evaluate=evaluate)


def _line_metric(name: str, unit: str, distance: Callable[..., float]) -> Metric:
    """Return a metric of reduced energies: distance(x, y, x weights, y weights) of at most 10 000 samples of each side."""

    def evaluate(x: Cloud, y: Cloud, *, seed: int, interval: bool) -> Estimate:
        reason = _too_few(x, y, points=False) or check_points(x.energy) or check_points(y.energy)
        if reason:
            return undefined(reason)
        generator = np.random.default_rng(seed)
        picked = [resample(one.weights, one.size, min(LINE_POINTS, one.size), generator) for one in (x, y)]
        a, b = x.energy[picked[0]], y.energy[picked[1]]
        value = distance(a, b, None, None)
        if not interval:
            return Estimate(value=value)
        units = [one.unit[index] for one, index in zip((x, y), picked, strict=True)]
        draws = [multiplicities(int(unit.max()) + 1, REPLICATES, generator)[:, unit] for unit in units]
        kept = [(p, q) for p, q in zip(*draws, strict=True) if p.sum() and q.sum()]
        return _spread(value, np.array([distance(a, b, p / p.sum(), q / q.sum()) for p, q in kept]))

    return Metric(name=name, unit=unit, evaluate=evaluate)


def _transport_metric(
    name: str,
    unit: str,
    coordinates: Callable[[Cloud], tuple[np.ndarray, np.ndarray, np.ndarray]],
    cost: Callable[[np.ndarray, np.ndarray], np.ndarray],
    missing: str,
) -> Metric:
    """Return a W2 metric; `coordinates` gives (points, weights, units) and `missing` says why there may be none."""

    def evaluate(x: Cloud, y: Cloud, *, seed: int, interval: bool) -> Estimate:
        sides = [coordinates(one) for one in (x, y)]
        if not all(points.shape[1] for points, _, _ in sides):
            return undefined(missing)
        for points, _, _ in sides:
            reason = check_points(points, fewest=MIN_FRAMES)
            if reason:
                return undefined(reason)
        generator = np.random.default_rng(seed)
        picked = [resample(weights, len(points), min(POINTS, len(points)), generator) for points, weights, _ in sides]
        a, b = (points[index] for (points, _, _), index in zip(sides, picked, strict=True))
        found = transport(cost(a, b))
        if not interval:
            return Estimate(value=found.distance)
        units = [side[2][index] for side, index in zip(sides, picked, strict=True)]
        return _linear_spread(found.distance, (found.potential_x, found.potential_y), units, generator)

    return Metric(name=name, unit=unit, evaluate=evaluate)


def _linear_spread(
    value: float, potentials: tuple[np.ndarray, np.ndarray], units: list[np.ndarray], generator: np.random.Generator
) -> Estimate:
    """Return W2 with the interval of W2^2 under resampling of units, to first order in the weights by the dual potentials."""
    shift = np.zeros(REPLICATES)
    for potential, unit in zip(potentials, units, strict=True):
        n_units = int(unit.max()) + 1
        draws = multiplicities(n_units, REPLICATES, generator).astype(float)
        sums, sizes = np.bincount(unit, potential, n_units), np.bincount(unit, minlength=n_units)
        shift += np.divide(draws @ sums, draws @ sizes, out=np.zeros(REPLICATES), where=draws @ sizes > 0)
    half = Z95 * float(shift.std(ddof=1))
    square = value**2
    return Estimate(value=value, low=math.sqrt(max(square - half, 0.0)), high=math.sqrt(square + half))


def _torsion_columns(choose: Callable[[Cloud], np.ndarray], missing: str) -> Callable[[Cloud, Cloud], list[Column] | str]:
    def columns(x: Cloud, y: Cloud) -> list[Column] | str:
        a, b = choose(x), choose(y)
        if not a.shape[1]:
            return missing
        bins = divergences.MDGEN_BINS
        binned = [divergences.circular_bins(one, bins) for one in (a, b)]
        return [Column(x=binned[0][:, k], y=binned[1][:, k], bins=bins) for k in range(a.shape[1])]

    return columns


def ramachandran_pairs(torsions: Torsions) -> list[tuple[int, int]]:
    """Return the (phi, psi) positions of every residue that has both; the shown pair of a molecule in which none has."""
    place = {name: k for k, name in enumerate(torsions.names)}
    own = [(k, place["psi" + name[3:]]) for name, k in place.items() if name.startswith("phi") and "psi" + name[3:] in place]
    return own or ([] if torsions.pair is None else [torsions.pair])


def _ramachandran(pairs: list[tuple[int, int]]) -> Callable[[Cloud, Cloud], list[Column] | str]:
    def columns(x: Cloud, y: Cloud) -> list[Column] | str:
        if not pairs:
            return "no phi and psi"
        bins = divergences.MDGEN_BINS_2D
        binned = [divergences.circular_bins(one.angles, bins) for one in (x, y)]
        joint = [[divergences.pair_bins(one[:, a], one[:, b], bins) for a, b in pairs] for one in binned]
        return [Column(x=p, y=q, bins=bins**2) for p, q in zip(*joint, strict=True)]

    return columns


def _union_bins(x: np.ndarray, y: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    low, high = min(x.min(), y.min()), max(x.max(), y.max())
    return divergences.bins_between(x, low, high, bins), divergences.bins_between(y, low, high, bins)


def _tics(dimensions: int) -> Callable[[Cloud, Cloud], list[Column] | str]:
    def columns(x: Cloud, y: Cloud) -> list[Column] | str:
        if min(x.tics.shape[1], y.tics.shape[1]) < dimensions:
            return "no TICA of torsions with that many components"
        bins = divergences.MDGEN_BINS if dimensions == 1 else divergences.MDGEN_BINS_2D
        parts = [_union_bins(x.tics[:, k], y.tics[:, k], bins) for k in range(dimensions)]
        if dimensions == 1:
            return [Column(x=parts[0][0], y=parts[0][1], bins=bins)]
        joint = [divergences.pair_bins(parts[0][side], parts[1][side], bins) for side in (0, 1)]
        return [Column(x=joint[0], y=joint[1], bins=bins**2)]

    return columns


def _macrostates(n_states: int) -> Callable[[Cloud, Cloud], list[Column] | str]:
    def columns(x: Cloud, y: Cloud) -> list[Column] | str:
        if n_states < 2:
            return "the reference has no macrostates"
        return [Column(x=x.states, y=y.states, bins=n_states)]

    return columns


def _means(field: str, count: int) -> Callable[[Cloud, Cloud], list[Column] | str]:
    def columns(x: Cloud, y: Cloud) -> list[Column] | str:
        if count < 2:
            return "no k-means states: the features of the reference do not move or are missing"
        return [Column(x=getattr(x, field), y=getattr(y, field), bins=count)]

    return columns


def _unisim_column(x: np.ndarray, y: np.ndarray) -> Column | str:
    """Return the histograms of UniSim: 49 bins between the extremes of the reference, what lies outside is dropped."""
    if not x.size or not y.size:
        return "no frames with coordinates"
    low, high, bins = float(x.min()), float(x.max()), divergences.UNISIM_EDGES - 1
    if not high > low:
        return "constant in the reference"
    binned = [divergences.bins_between(one, low, high, bins) for one in (x, y)]
    return Column(x=binned[0], y=binned[1], bins=bins, volume=(high - low) / bins)


def _unisim(
    values: Callable[[Cloud], np.ndarray], reason: Callable[[Cloud], str]
) -> Callable[[Cloud, Cloud], list[Column] | str]:
    def columns(x: Cloud, y: Cloud) -> list[Column] | str:
        why = reason(x)
        if why:
            return why
        a, b = values(x), values(y)
        found = [_unisim_column(a[:, k], b[:, k]) for k in range(a.shape[1])]
        wrong = [one for one in found if isinstance(one, str)]
        return wrong[0] if wrong else [one for one in found if isinstance(one, Column)]

    return columns


def _unisim_tic2d(x: Cloud, y: Cloud) -> list[Column] | str:
    if min(x.tica.shape[1], y.tica.shape[1]) < 2:
        return "no TICA in the features of the literature"
    parts = [_unisim_column(x.tica[:, k], y.tica[:, k]) for k in (0, 1)]
    if isinstance(parts[0], str) or isinstance(parts[1], str):
        return "constant in the reference"
    bins = parts[0].bins
    return [
        Column(
            x=divergences.pair_bins(parts[0].x, parts[1].x, bins),
            y=divergences.pair_bins(parts[0].y, parts[1].y, bins),
            bins=bins**2,
            volume=parts[0].volume * parts[1].volume,
        )
    ]


def _fewer_alpha(least: int, what: str) -> Callable[[Cloud], str]:
    def reason(x: Cloud) -> str:
        count = x.alpha.shape[1]
        return "" if count >= least else f"{what} needs {least} CA atoms, this molecule has {count}"

    return reason


def _contact_metric() -> Metric:
    reason = _fewer_alpha(MIN_ALPHA, "CONTACT")

    def evaluate(x: Cloud, y: Cloud, *, seed: int, interval: bool) -> Estimate:
        why = reason(x) or _too_few(x, y, points=True)
        if why:
            return undefined(why)
        generator = np.random.default_rng(seed)
        sums = []
        for one in (x, y):
            weights, unit = one.weights[one.whole], one.unit[one.whole]
            rows = np.concatenate([divergences.ca_contacts(one.alpha), np.ones((len(weights), 1))], axis=1) * weights[:, None]
            total = np.zeros((int(unit.max()) + 1, rows.shape[1]))
            np.add.at(total, unit, rows)
            sums.append(total)
        rates = [one.sum(axis=0)[:-1] / one.sum(axis=0)[-1] for one in sums]
        value = divergences.contact_rmse(rates[0], rates[1])
        if not interval:
            return Estimate(value=value)
        drawn = [multiplicities(len(one), REPLICATES, generator) @ one for one in sums]
        with np.errstate(invalid="ignore", divide="ignore"):
            replicas = [one[:, :-1] / one[:, -1:] for one in drawn]
        return _spread(value, np.array([divergences.contact_rmse(p, q) for p, q in zip(*replicas, strict=True)]))

    return Metric(name="unisim_contact_rmse", unit="", evaluate=evaluate)


def _all_torsions(cloud: Cloud) -> np.ndarray:
    return np.concatenate([cloud.angles, cloud.chi], axis=1)


def _torus_points(cloud: Cloud) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return cloud.angles, cloud.weights, cloud.unit


def _tica_points(cloud: Cloud) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return cloud.tica, cloud.weights[cloud.whole], cloud.unit[cloud.whole]


def _unisim_form(p: np.ndarray, q: np.ndarray, volume: float) -> np.ndarray:
    return divergences.unisim_jsd(p, q, volume)


def _count(means: object) -> int:
    return 0 if means is None else int(getattr(means, "n_clusters", 0))


def all_metrics(spaces: Spaces, torsions: Torsions) -> list[Metric]:
    """Return every metric; one that makes no sense for a molecule gives a labelled undefined value.

    Names and definitions: e_w2, t_w2, tica_w2 `distances`; ks_energy the Kolmogorov-Smirnov distance; t_k_jsd_div_bits and
    tica_k_jsd_div_bits of Prose; jsd_dist_nat_* of MDGen (100 bins per torsion, 50 x 50 for phi and psi, TIC ranges of both
    samples together); unisim_* of UniSim and FBM (49 bins between the extremes of the reference).

    Args:
        spaces: of the molecule.
        torsions: of the molecule.
    """
    nat = "sqrt(nat)"
    no_tica = "no TICA in the features of the literature: coordinates were not kept, or trajectories are shorter than two lags"
    line_ks = lambda a, b, p, q: ks_distance(a, b, q, p)  # noqa: E731 - energies.ks_distance takes the weights of y first

    def tic_reason(x: Cloud) -> str:
        return "" if x.tica.shape[1] >= 2 else no_tica

    return [
        _line_metric("e_w2", "kT", energy_w2),
        _transport_metric("t_w2", "rad", _torus_points, torus_cost, "no phi and psi"),
        _transport_metric("tica_w2", "TIC (kinetic map)", _tica_points, euclidean_cost, no_tica),
        _line_metric("ks_energy", "", line_ks),
        _point_metric("t_k_jsd_div_bits", "bit", _means("torsion_state", _count(spaces.torsion_means)), _prose),
        _point_metric("tica_k_jsd_div_bits", "bit", _means("tica_state", _count(spaces.tica_means)), _prose),
        _frame_metric("jsd_dist_nat_torsions", nat, _torsion_columns(_all_torsions, "no torsions")),
        _frame_metric("jsd_dist_nat_backbone", nat, _torsion_columns(lambda cloud: cloud.angles, "no phi and psi")),
        _frame_metric("jsd_dist_nat_side_chain", nat, _torsion_columns(lambda cloud: cloud.chi, "no side-chain torsions")),
        _frame_metric("jsd_dist_nat_ramachandran", nat, _ramachandran(ramachandran_pairs(torsions))),
        _frame_metric("jsd_dist_nat_tic0", nat, _tics(1)),
        _frame_metric("jsd_dist_nat_tic01", nat, _tics(2)),
        _frame_metric("jsd_dist_nat_macrostates", nat, _macrostates(spaces.n_states)),
        _point_metric("unisim_js_tic", nat, _unisim(lambda cloud: cloud.tica, tic_reason), _unisim_form),
        _point_metric("unisim_js_tic2d", nat, _unisim_tic2d, _unisim_form),
        _point_metric("unisim_js_pwd", nat, _unisim(_pwd, _fewer_alpha(MIN_ALPHA_PWD, "PWD")), _unisim_form),
        _point_metric("unisim_js_rg", nat, _unisim(_rg, _fewer_alpha(MIN_ALPHA, "RG of CA atoms")), _unisim_form),
        _contact_metric(),
    ]


def _pwd(cloud: Cloud) -> np.ndarray:
    return divergences.ca_distances(cloud.alpha, offset=PWD_OFFSET)


def _rg(cloud: Cloud) -> np.ndarray:
    return divergences.radius_of_gyration(cloud.alpha)[:, None]
