"""Multiple-time-step runs against single-step runs: every observable, at equal conditions, in units of the combined error."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from longstride.analysis import observables as static
from longstride.analysis.block_statistics import Block, Observable, blocks_of, pool
from longstride.analysis.dynamics_run import DynamicsRun, thinned
from longstride.analysis.spectra import infrared_spectrum, largest_wavenumber, velocity_spectra
from longstride.analysis.transport import (
    corrected_diffusion,
    diffusion,
    rotational_relaxation,
    torsional_relaxation,
)
from longstride.analysis.vibrations import NormalModes, mode_temperatures
from longstride.errors import LongstrideError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MIN_SEEDS = 3
LIMIT = 2.0  # combined standard errors
SAME, DIFFERS, NOT_RESOLVED, FEW_SEEDS, MISSING = "same", "differs", "not resolved", "too few seeds", "not available"


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings:
    """What to compare and how finely.

    Attributes:
        r_max_nm: range of pair distributions; cut to half the box.
        pair_bins: of pair distributions.
        torsion_bins: of phi and psi.
        vacf_lag_ps: longest lag of velocity correlations; the spectral resolution follows.
        wavenumbers: (first, last, step) 1/cm of spectra; cut to what the save interval resolves.
        relaxation_lag_ps: longest lag of rotational and torsional relaxation.
        diffusion_fit_ps: start and end of the line through the mean squared displacement.
        viscosity_mPa_s: for the finite-size correction of diffusion; None leaves it out.
        modes: normal modes for temperatures of bands; None leaves them out.
        permutations: of the tests of curves; the smallest p is 1 / (permutations + 1).
        seed: of the permutations.
    """

    r_max_nm: float = 1.0
    pair_bins: int = 100
    torsion_bins: int = 36
    vacf_lag_ps: float = 0.5
    wavenumbers: tuple[float, float, float] = (0.0, 4500.0, 25.0)
    relaxation_lag_ps: float = 2.0
    diffusion_fit_ps: tuple[float, float] = (1.0, 4.0)
    viscosity_mPa_s: float | None = None
    modes: NormalModes | None = None
    permutations: int = 999
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """One observable of the candidate against the baseline; a row of the table.

    Attributes:
        observable: name.
        part: element pair, torsion or band; empty for the whole system.
        unit: of candidate, baseline, difference, errors and `matters_from`.
        kind: "number" or "curve".
        candidate: value; None for curves.
        baseline: value; None for curves.
        difference: candidate - baseline; for curves the root mean square (distribution functions: the largest) difference.
        combined_se: sqrt(se_c^2 + se_b^2); for curves its root mean square.
        z: difference / combined_se; for curves the normal quantile of the permutation test's p, never negative.
        verdict: "same" (|z| <= 2), "differs" (|z| > 2), "not resolved" (|z| <= 2, but a difference of `matters_from` could
            hide in two combined errors), "too few seeds" (fewer than three on a side) or "not available" (see the note).
        matters_from: smallest difference that matters.
        matters: whether the difference is at least that; a resolved difference may be too small to matter.
        candidate_seeds: seeds.
        baseline_seeds: seeds.
        candidate_units: replicas or blocks behind the errors.
        baseline_units: the same.
        note: what limits it.
    """

    observable: str
    part: str
    unit: str
    kind: str
    candidate: float | None = None
    baseline: float | None = None
    difference: float | None = None
    combined_se: float | None = None
    z: float | None = None
    verdict: str = MISSING
    matters_from: float | None = None
    matters: bool | None = None
    candidate_seeds: int = 0
    baseline_seeds: int = 0
    candidate_units: int = 0
    baseline_units: int = 0
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class DynamicsComparison:
    """The table of a comparison.

    Attributes:
        candidate: label of the multiple-time-step runs.
        baseline: label of the single-step runs.
        rows: one per observable.
        curves: (observable, part) to (candidate, baseline) for figures.
    """

    candidate: str
    baseline: str
    rows: tuple[ComparisonRow, ...]
    curves: dict[tuple[str, str], tuple[Observable, Observable]] = field(default_factory=dict, repr=False)

    def records(self) -> list[dict[str, Any]]:
        """Return plain values for a CSV file, one dict per row with the labels of both sides."""
        return [{"candidate_label": self.candidate, "baseline_label": self.baseline, **asdict(row)} for row in self.rows]

    def differing(self) -> tuple[ComparisonRow, ...]:
        """Return the rows beyond two combined errors, whatever the number of seeds."""
        return tuple(row for row in self.rows if row.z is not None and abs(row.z) > LIMIT)

    @property
    def statement(self) -> str:
        """One line: how many observables differ, and how many would by chance."""
        judged = [row for row in self.rows if row.z is not None]
        counts = {verdict: sum(row.verdict == verdict for row in self.rows) for verdict in (SAME, NOT_RESOLVED, MISSING)}
        chance = len(judged) * 2 * float(stats.norm.sf(LIMIT))
        seeds = "; too few seeds for a verdict" if any(row.verdict == FEW_SEEDS for row in self.rows) else ""
        return (
            f"{len(self.differing())} of {len(judged)} observables differ by more than two combined standard errors"
            f" ({chance:.1f} expected by chance); {counts[SAME]} same, {counts[NOT_RESOLVED]} not resolved,"
            f" {counts[MISSING]} not available{seeds}"
        )


def check_comparable(candidate: Sequence[DynamicsRun], baseline: Sequence[DynamicsRun]) -> None:
    """Refuse runs whose difference would not be due to the time step.

    Raises:
        LongstrideError: no runs, one seed twice on a side, or other atoms, target, masses, friction, temperature or box.
    """
    if not candidate or not baseline:
        raise LongstrideError("a comparison needs runs on both sides")
    for side in (candidate, baseline):
        seeds = [run.seed for run in side]
        if len(set(seeds)) < len(seeds):
            raise LongstrideError(
                f"{side[0].label}: seed {max(seeds, key=seeds.count)} appears twice; runs must be independent"
            )
    first = baseline[0]
    for run in (*candidate, *baseline):
        pair = f"{run.label} (seed {run.seed}) and {first.label} (seed {first.seed})"
        if run.target != first.target:
            raise LongstrideError(
                f"{pair} have other targets, {run.target!r} and {first.target!r}; compare within one potential"
            )
        same_atoms = np.array_equal(run.system.atomic_numbers, first.system.atomic_numbers)
        if not same_atoms or not np.array_equal(run.system.bonds, first.system.bonds):
            raise LongstrideError(f"{pair} are of other molecules; compare runs of one system")
        _check_equal(pair, "masses", run.masses, first.masses, "repartition both alike")
        _check_equal(pair, "friction", run.friction_per_ps, first.friction_per_ps, "run both at one friction")
        _check_equal(pair, "temperature", run.temperature_K, first.temperature_K, "run both at one temperature")
        if (run.box is None) != (first.box is None):
            raise LongstrideError(f"{pair}: only one has a box; compare runs of one box")
        if run.box is not None and first.box is not None:
            _check_equal(pair, "box", run.box, first.box, "run both in one box")


def _check_equal(pair: str, what: str, a: Any, b: Any, advice: str) -> None:  # noqa: ANN401 - numbers or arrays
    if np.shape(a) != np.shape(b):
        a, b = np.broadcast_arrays(np.asarray(a), np.asarray(b))
    difference = np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float))
    if difference.max() > 1e-6 * max(1.0, float(np.abs(b).max())):
        raise LongstrideError(f"{pair} have other values of {what} (by up to {difference.max():.4g}); {advice}")


def common_interval(runs: Sequence[DynamicsRun]) -> tuple[list[DynamicsRun], str]:
    """Thin runs to the coarsest save interval; a note says why lagged observables cannot be compared, or is empty."""
    coarsest = max(run.save_interval_ps for run in runs)
    ratios = [coarsest / run.save_interval_ps for run in runs]
    if any(abs(ratio - round(ratio)) > 1e-6 * ratio for ratio in ratios):
        intervals = sorted({round(run.save_interval_ps * 1e3, 6) for run in runs})
        return list(runs), f"save intervals of {intervals} fs have no common multiple among them"
    return [thinned(run, round(ratio)) for run, ratio in zip(runs, ratios, strict=True)], ""


def compare_dynamics(
    candidate: Sequence[DynamicsRun], baseline: Sequence[DynamicsRun], *, settings: ComparisonSettings | None = None
) -> DynamicsComparison:
    """Compare every observable of multiple-time-step runs with single-step runs at equal masses and friction.

    Numbers: z = (c - b) / sqrt(se_c^2 + se_b^2), errors by jackknife over replicas or blocks of all seeds. Curves: T = mean
    over the abscissa of (c - b)^2 / (se_c^2 + se_b^2), or the largest difference of distribution functions; its p by
    permuting the units between the sides, z the two-sided normal quantile of p. About 5 % of the rows of equal
    ensembles exceed 2.

    Args:
        candidate: runs with other seeds, one label.
        baseline: single-step runs of the same target.
        settings: what to compare.

    Raises:
        LongstrideError: runs that are not comparable (`check_comparable`).
    """
    settings = settings or ComparisonSettings()
    check_comparable(candidate, baseline)
    runs, problem = common_interval([*candidate, *baseline])
    sides = (runs[: len(candidate)], runs[len(candidate) :])
    rows, curves = [], {}
    for name, kind, lag_ps in _kinds(settings, (candidate, baseline)):
        try:
            if lag_ps and problem:
                raise LongstrideError(problem)
            groups = [_observe(side, kind, lag_ps) for side in (sides if lag_ps else (candidate, baseline))]
        except LongstrideError as error:
            rows.append(ComparisonRow(observable=name, part="", unit="", kind="", note=str(error)))
            continue
        for key, ours in groups[0].items():
            theirs = groups[1][key]
            row = compare_observables(ours, theirs, permutations=settings.permutations, seed=settings.seed + len(rows))
            rows.append(_with_seeds(row, len(candidate), len(baseline)))
            if ours.grid is not None:
                curves[key] = (ours, theirs)
    return DynamicsComparison(candidate=candidate[0].label, baseline=baseline[0].label, rows=tuple(rows), curves=curves)


def _with_seeds(row: ComparisonRow, candidate: int, baseline: int) -> ComparisonRow:
    few = min(candidate, baseline) < MIN_SEEDS
    return replace(
        row, candidate_seeds=candidate, baseline_seeds=baseline, verdict=FEW_SEEDS if few and row.z is not None else row.verdict
    )


def _observe(
    side: Sequence[DynamicsRun], kind: Callable[[DynamicsRun, Sequence[Block]], list[Observable]], lag_ps: float
) -> dict[tuple[str, str], Observable]:
    found: dict[tuple[str, str], list[Observable]] = {}
    minimum = math.ceil(20 / len(side))
    for run in side:
        # a block must hold the longest lag four times, so that its own mean over origins means something
        shortest = 4 * math.ceil(lag_ps / run.save_interval_ps) if lag_ps else 1
        shortest = min(shortest, run.n_frames)
        for item in kind(run, blocks_of(run.n_frames, run.n_replicas, minimum=minimum, shortest=shortest)):
            found.setdefault((item.name, item.part), []).append(item)
    return {key: pool(items) for key, items in found.items()}


def _kinds(
    settings: ComparisonSettings, sides: tuple[Sequence[DynamicsRun], Sequence[DynamicsRun]]
) -> Iterator[tuple[str, Callable[[DynamicsRun, Sequence[Block]], list[Observable]], float]]:
    """Yield (name, function of run and blocks, longest lag in ps or 0)."""
    runs = [*sides[0], *sides[1]]
    first = sides[1][0]
    r_max = settings.r_max_nm
    if first.box is not None:
        r_max = min(r_max, 0.999 / float(np.linalg.norm(np.linalg.inv(first.box), axis=0).max()) / 2)
    yield "temperature", static.temperatures, 0.0
    if settings.modes is not None:
        modes = settings.modes
        yield "mode temperature", lambda run, blocks: mode_temperatures(run, blocks, modes=modes), 0.0
    yield "configurational temperature", lambda run, blocks: [static.configurational_temperature(run, blocks)], 0.0
    if all(run.potential_energy is not None for run in runs):
        assert first.potential_energy is not None
        origin, grid = float(first.potential_energy[0, 0]), static.energy_grid(runs)
        yield "potential energy", lambda run, blocks: static.energy_moments(run, blocks, origin=origin), 0.0
        yield "potential energy", lambda run, blocks: [static.energy_distribution(run, blocks, grid=grid)], 0.0
    else:
        yield "potential energy", static.energy_moments, 0.0
    yield "bond length", static.bond_lengths, 0.0
    yield "bond angle", static.bond_angles, 0.0
    yield "pairs", lambda run, blocks: static.pair_distributions(run, blocks, r_max_nm=r_max, bins=settings.pair_bins), 0.0
    yield "torsion density", lambda run, blocks: static.torsion_densities(run, blocks, bins=settings.torsion_bins), 0.0
    if all(np.all(np.asarray(run.friction_per_ps) == 0) for run in runs):
        yield "energy drift", lambda run, blocks: [static.nve_drift(run)], 0.0
    yield from _lagged_kinds(settings, runs)


def _lagged_kinds(
    settings: ComparisonSettings, runs: Sequence[DynamicsRun]
) -> Iterator[tuple[str, Callable[[DynamicsRun, Sequence[Block]], list[Observable]], float]]:
    coarsest = max(run.save_interval_ps for run in runs)
    first, last, step = settings.wavenumbers
    grid = np.arange(first, min(last, largest_wavenumber(coarsest)) + 1e-9, step)
    vacf, relaxation = settings.vacf_lag_ps, settings.relaxation_lag_ps
    yield "velocity spectrum", lambda run, blocks: velocity_spectra(run, blocks, max_lag_ps=vacf, wavenumbers=grid), vacf
    # dipoles on one side and charges on the other would be two different spectra
    dipoles = all(run.dipoles is not None for run in runs)

    def infrared(run: DynamicsRun, blocks: Sequence[Block]) -> list[Observable]:
        charges = [other.charges for other in runs if other.charges is not None]
        if not dipoles and any(not np.array_equal(charges[0], other) for other in charges[1:]):
            raise LongstrideError("the runs have other charges; give all of them the same, or dipoles")
        source = run if dipoles else replace(run, dipoles=None)
        return [infrared_spectrum(source, blocks, max_lag_ps=vacf, wavenumbers=grid)]

    yield "infrared spectrum", infrared, vacf
    yield (
        "rotational correlation",
        lambda run, blocks: [
            item for order in (1, 2) for item in rotational_relaxation(run, blocks, max_lag_ps=relaxation, order=order)
        ],
        relaxation,
    )
    yield "torsional correlation", lambda run, blocks: torsional_relaxation(run, blocks, max_lag_ps=relaxation), relaxation
    start, end = settings.diffusion_fit_ps

    def diffuse(run: DynamicsRun, blocks: Sequence[Block]) -> list[Observable]:
        found = diffusion(run, blocks, fit_from_ps=start, fit_to_ps=end)
        if run.box is not None and settings.viscosity_mPa_s is not None:
            found.append(
                corrected_diffusion(
                    found[1], box=run.box, temperature_K=run.temperature_K, viscosity_mPa_s=settings.viscosity_mPa_s
                )
            )
        return found

    if runs[0].box is not None:
        yield "diffusion coefficient", diffuse, end


def compare_observables(a: Observable, b: Observable, *, permutations: int = 999, seed: int = 0) -> ComparisonRow:
    """Compare one observable of two independent sides; see `compare_dynamics` for the equations.

    Raises:
        LongstrideError: another abscissa, or fewer than two units on a side.
    """
    if a.grid is not None and (b.grid is None or not np.array_equal(a.grid, b.grid)):
        raise LongstrideError(f"{a.name} {a.part}: the two sides have other abscissae")
    combined = np.hypot(a.errors, b.errors)
    difference = a.values - b.values
    tolerance = b.tolerance
    correlated = max(a.inflation, b.inflation) > 1
    note = "; ".join(
        text for text in (a.note or b.note, "blocks are correlated, longer runs would be better" if correlated else "") if text
    )
    shared: dict[str, Any] = {
        "observable": a.name, "part": a.part, "unit": a.unit, "matters_from": tolerance, "candidate_units": a.n_units,
        "baseline_units": b.n_units, "note": note,
    }  # fmt: skip
    if a.grid is None:
        value, error = float(difference[0]), float(combined[0])
        z = value / error if error > 0 else (0.0 if value == 0 else math.copysign(math.inf, value))
        return ComparisonRow(
            **shared, kind="number", candidate=float(a.values[0]), baseline=float(b.values[0]), difference=value,
            combined_se=error, z=z, verdict=_verdict(z, error, tolerance), matters=abs(value) >= tolerance,
        )  # fmt: skip
    z = float(stats.norm.isf(permutation_p(a, b, permutations=permutations, seed=seed) / 2))
    size = float(np.abs(difference).max() if a.cumulative else np.sqrt((difference**2).mean()))
    error = float(combined.max() if a.cumulative else np.sqrt((combined**2).mean()))
    return ComparisonRow(
        **shared, kind="curve", difference=size, combined_se=error, z=z, verdict=_verdict(z, error, tolerance),
        matters=size >= tolerance,
    )  # fmt: skip


def _verdict(z: float, error: float, tolerance: float) -> str:
    if not abs(z) <= LIMIT:
        return DIFFERS
    return SAME if LIMIT * error <= tolerance else NOT_RESOLVED


def permutation_p(a: Observable, b: Observable, *, permutations: int, seed: int) -> float:
    """Return the p of equal curves: how often units dealt out at random differ as much as the two sides do.

    Equation: p = (1 + #{T_perm >= T}) / (1 + permutations), doi:10.2202/1544-6115.1585; T divided by the inflation of
    correlated blocks. Units are jackknife pseudo-values about each curve, so that nonlinear curves are handled to first order.
    """
    pooled = np.concatenate([a.pseudo_values, b.pseudo_values])
    # a component that is fixed by definition, such as C(0) = 1, differs by round-off, which is not exchangeable
    moving = np.ptp(pooled, axis=0) > 1e-9 * np.abs(b.values).max()
    if not moving.any():
        return 1.0
    pooled = pooled[:, moving] - pooled[:, moving].mean(axis=0)
    n, m = a.n_units, b.n_units
    generator = np.random.default_rng(seed)
    order = np.argsort(generator.random((permutations, n + m)), axis=1)
    members = np.zeros((permutations + 1, n + m))
    members[0, :n] = 1
    np.put_along_axis(members[1:], order[:, :n], 1, axis=1)
    first, square = members @ pooled, members @ pooled**2
    total, total_square = pooled.sum(axis=0), (pooled**2).sum(axis=0)
    mean_a, mean_b = first / n, (total - first) / m
    if a.cumulative:
        distance = np.abs(mean_a - mean_b).max(axis=1)
        distance[0] /= math.sqrt(max(a.inflation, b.inflation))
    else:
        variance_a = np.maximum(square / n - mean_a**2, 0) / (n - 1)
        variance_b = np.maximum((total_square - square) / m - mean_b**2, 0) / (m - 1)
        variance = variance_a + variance_b
        # a bin in which one side has no spread at all is judged by the spread of both together
        floor = (total_square / (n + m)) * (1 / n + 1 / m) * 1e-3
        distance = ((mean_a - mean_b) ** 2 / np.maximum(variance, floor)).mean(axis=1)
        distance[0] /= max(a.inflation, b.inflation)
    return float((1 + (distance[1:] >= distance[0]).sum()) / (1 + permutations))
