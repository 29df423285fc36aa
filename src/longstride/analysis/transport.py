"""Diffusion with its finite-size correction, and rotational and torsional relaxation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from longstride.analysis.block_statistics import Observable, identity
from longstride.analysis.features import find_torsions, torsion_angles
from longstride.analysis.observables import atom_types, chains_of, per_block
from longstride.analysis.spectra import lagged_products, lags_within
from longstride.errors import LongstrideError
from longstride.units import thermal_energy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longstride.analysis.block_statistics import Block, Reduction
    from longstride.analysis.dynamics_run import DynamicsRun

CUBIC_LATTICE = 2.837297  # of a cubic lattice of point forces, doi:10.1021/jp0477147
MPA_S = 602.214076  # 1 mPa s in kJ/mol ps / nm^3
CM2_PER_S = 1e-2  # 1 nm^2/ps in cm^2/s


def centres_of_mass(positions: np.ndarray, masses: np.ndarray, molecules: np.ndarray) -> np.ndarray:
    """Return the centres of mass of molecules, [frame, molecule, 3] nm, of unwrapped positions [frame, atom, 3] nm."""
    n = int(molecules.max()) + 1
    weight = np.zeros((n, len(masses)))
    weight[molecules, np.arange(len(masses))] = masses
    return np.einsum("ma,fax->fmx", weight / weight.sum(axis=1, keepdims=True), positions.astype(np.float64), optimize=True)


def squared_displacement(x: np.ndarray, n_lags: int) -> np.ndarray:
    """Return <|x(s+t) - x(s)|^2> over frames s and particles of x [frame, particle, 3] nm, [lag] nm^2.

    Equation: <|x(s+t)|^2> + <|x(s)|^2> - 2 <x(s) . x(s+t)> with the last term by Fourier transform.
    """
    n = len(x)
    y = x - x.mean(axis=0)  # close to the origin, so that the difference keeps its digits
    square = (y**2).sum(axis=2).mean(axis=1)
    running = np.concatenate([[0.0], np.cumsum(square)])
    lags = np.arange(n_lags)
    first, last = running[n - lags], running[n] - running[lags]
    return (first + last) / (n - lags) - 2 * lagged_products(y, n_lags) / x.shape[1]


def diffusion(
    run: DynamicsRun, blocks: Sequence[Block], *, fit_from_ps: float, fit_to_ps: float, species: np.ndarray | None = None
) -> list[Observable]:
    """Return the mean squared displacement of molecules in nm^2 and the diffusion coefficient of the box in nm^2/ps.

    Equation: D = slope / 6 of a straight line through the mean squared displacement from `fit_from_ps` to `fit_to_ps`
    (Einstein). It still depends on the box: see `yeh_hummer`. Langevin friction changes it; compare at equal friction.

    Args:
        run: unwrapped positions.
        blocks: units, longer than `fit_to_ps`.
        fit_from_ps: start of the line, after ballistic motion and cage.
        fit_to_ps: end of the line.
        species: [molecule] bool, which molecules to follow, or None for all (see `DynamicsRun.molecules`).

    Raises:
        DataError: wrapped positions.
        LongstrideError: a fit range with fewer than two lags, or longer than the blocks.
    """
    run.require_unwrapped()
    n_lags = lags_within(run, fit_to_ps)
    first = math.ceil(fit_from_ps / run.save_interval_ps - 1e-6)
    if n_lags - first < 2:
        raise LongstrideError(f"the line from {fit_from_ps:g} to {fit_to_ps:g} ps has fewer than two lags; widen it")
    lags = np.arange(n_lags) * run.save_interval_ps
    centred = np.where(np.arange(n_lags) >= first, lags - lags[first:].mean(), 0.0)
    line = centred / (centred @ centred) / 6

    def follow(block: Block) -> np.ndarray:
        x = centres_of_mass(run.positions[block.frames, block.replica], run.masses, run.molecules)
        return squared_displacement(x if species is None else x[:, species], n_lags)

    def slope(statistics: np.ndarray) -> np.ndarray:
        return (statistics @ line)[..., None]

    msd, chains = per_block(blocks, follow), chains_of(blocks)
    return [
        Observable(
            name="mean squared displacement", unit="nm^2", statistics=msd, chains=chains, grid=lags, grid_unit="ps",
            matters_relative=0.1,
        ),
        Observable(
            name="diffusion coefficient", unit="nm^2/ps", statistics=msd, chains=chains, reduction=slope, matters_relative=0.1
        ),
    ]  # fmt: skip


def yeh_hummer(*, temperature_K: float, viscosity_mPa_s: float, box_edge_nm: float) -> float:
    """Return the correction in nm^2/ps that a cubic box takes from the diffusion coefficient: D_inf = D_box + this.

    Equation: xi kT / (6 pi eta L), xi = 2.837297 (Yeh and Hummer, doi:10.1021/jp0477147); 0.39e-5 cm^2/s for 216 waters
    at 300 K and 0.85 mPa s.

    Raises:
        LongstrideError: a quantity that is not positive.
    """
    if min(temperature_K, viscosity_mPa_s, box_edge_nm) <= 0:
        raise LongstrideError("the finite-size correction needs a positive temperature, viscosity and box edge")
    return CUBIC_LATTICE * thermal_energy(temperature_K) / (6 * math.pi * viscosity_mPa_s * MPA_S * box_edge_nm)


def cubic_edge(box: np.ndarray) -> float:
    """Return the edge of a cubic box [3, 3] nm.

    Raises:
        LongstrideError: another shape, for which the correction has another constant.
    """
    edge = float(box[0, 0])
    if not np.allclose(box, edge * np.eye(3), rtol=1e-4, atol=1e-4 * abs(edge)):
        raise LongstrideError("the finite-size correction of diffusion is for cubic boxes only; use a cubic box")
    return edge


@dataclass(frozen=True, kw_only=True)
class SizeExtrapolation:
    """Diffusion of an infinite system and viscosity from boxes of several sizes, with standard errors.

    Attributes:
        diffusion: nm^2/ps.
        diffusion_error: nm^2/ps.
        viscosity_mPa_s: from the slope.
        viscosity_error_mPa_s: of it.
    """

    diffusion: float
    diffusion_error: float
    viscosity_mPa_s: float
    viscosity_error_mPa_s: float


def viscosity_from_boxes(
    *, diffusion: np.ndarray, errors: np.ndarray, box_edges_nm: np.ndarray, temperature_K: float
) -> SizeExtrapolation:
    """Return D_inf and the viscosity from D_box(L) = D_inf - xi kT / (6 pi eta L), a weighted straight line in 1/L.

    Args:
        diffusion: [box] nm^2/ps.
        errors: [box] standard errors, nm^2/ps.
        box_edges_nm: [box] cubic edges.
        temperature_K: of all of them.

    Raises:
        LongstrideError: fewer than two sizes, or diffusion that does not grow with the box.
    """
    if len(np.unique(box_edges_nm)) < 2:
        raise LongstrideError("a viscosity from diffusion needs boxes of at least two sizes; give the viscosity instead")
    coefficients, covariance = np.polyfit(1 / box_edges_nm, diffusion, 1, w=1 / errors, cov="unscaled")
    slope, limit = (float(value) for value in coefficients)
    if slope >= 0:
        raise LongstrideError("diffusion does not grow with the box within these runs; run longer or give the viscosity")
    viscosity = CUBIC_LATTICE * thermal_energy(temperature_K) / (6 * math.pi * -slope) / MPA_S
    return SizeExtrapolation(
        diffusion=limit,
        diffusion_error=math.sqrt(covariance[1, 1]),
        viscosity_mPa_s=viscosity,
        viscosity_error_mPa_s=viscosity * math.sqrt(covariance[0, 0]) / -slope,
    )


def corrected_diffusion(observable: Observable, *, box: np.ndarray, temperature_K: float, viscosity_mPa_s: float) -> Observable:
    """Return the diffusion coefficient with the Yeh-Hummer correction added; the error is that of the box's coefficient."""
    shift = yeh_hummer(temperature_K=temperature_K, viscosity_mPa_s=viscosity_mPa_s, box_edge_nm=cubic_edge(box))
    inner = observable.reduction

    def shifted(statistics: np.ndarray) -> np.ndarray:
        return inner(statistics) + shift

    return replace(observable, name="diffusion coefficient, infinite box", reduction=shifted)


def _relaxation(
    name: str, part: str, statistics: np.ndarray, *, run: DynamicsRun, chains: np.ndarray, reduction: Reduction
) -> list[Observable]:
    n_lags = len(np.atleast_1d(reduction(statistics[0])))
    weights = np.full(n_lags, run.save_interval_ps)
    weights[[0, -1]] /= 2

    def integral(mean: np.ndarray) -> np.ndarray:
        return (reduction(mean) @ weights)[..., None]

    curve = Observable(
        name=name, part=part, unit="", statistics=statistics, chains=chains, reduction=reduction, matters=0.02,
        grid=np.arange(n_lags) * run.save_interval_ps, grid_unit="ps",
    )  # fmt: skip
    left = float(curve.values[-1])
    note = f"{100 * left:.0f} % of the correlation is left at the longest lag" if left > 0.05 else ""
    time = Observable(
        name=f"{name} time", part=part, unit="ps", statistics=statistics, chains=chains, reduction=integral,
        matters_relative=0.1, note=note,
    )  # fmt: skip
    return [curve, time]


def rotational_relaxation(run: DynamicsRun, blocks: Sequence[Block], *, max_lag_ps: float, order: int = 2) -> list[Observable]:
    """Return C_l(t) = <P_l(u(s) . u(s+t))> of bonds to hydrogen per element pair, and its integral up to the longest lag, ps.

    For isotropic rotational diffusion C_l = exp(-l (l+1) D_rot t). The integral is the relaxation time once C has decayed;
    a note says where it has not.

    Args:
        run: positions.
        blocks: units, longer than the longest lag.
        max_lag_ps: longest lag.
        order: l, 1 (as in dielectric relaxation) or 2 (as in NMR).

    Raises:
        LongstrideError: another order.
    """
    import mdtraj

    if order not in (1, 2):
        raise LongstrideError(f"the order of rotational relaxation is 1 or 2, not {order}")
    n_lags = lags_within(run, max_lag_ps)

    def correlate(block: Block, bonds: np.ndarray) -> np.ndarray:
        frames = run.trajectory(run.positions[block.frames, block.replica])
        u = mdtraj.compute_displacements(frames, bonds, periodic=run.box is not None).astype(np.float64)
        u /= np.linalg.norm(u, axis=2, keepdims=True)
        if order == 1:
            return lagged_products(u, n_lags) / len(bonds)
        # (u . u')^2 is the scalar product of the tensors u u and u' u'
        x, y, z = u[..., 0], u[..., 1], u[..., 2]
        tensor = np.stack([x * x, y * y, z * z, *(math.sqrt(2) * product for product in (x * y, x * z, y * z))], axis=2)
        return 1.5 * lagged_products(tensor, n_lags) / len(bonds) - 0.5

    found = []
    for label, bonds in atom_types(run.elements, run.system.bonds).items():
        if "H" in label.split("-"):
            statistics = per_block(blocks, lambda b, bonds=bonds: correlate(b, bonds))  # type: ignore[misc]
            found += _relaxation(
                f"rotational correlation P{order}", label, statistics, run=run, chains=chains_of(blocks), reduction=identity
            )
    return found


def torsional_relaxation(run: DynamicsRun, blocks: Sequence[Block], *, max_lag_ps: float) -> list[Observable]:
    """Return the correlation of each phi and psi and its integral up to the longest lag in ps; none without a backbone.

    Equation: C(t) = (<cos(a(s+t) - a(s))> - |m|^2) / (1 - |m|^2), m = <exp(i a)> over all units together.
    """
    torsions = find_torsions(run.topology)
    n_lags = lags_within(run, max_lag_ps)
    if not torsions.names:
        return []
    angles = torsion_angles(run.positions, run.topology, torsions)
    units = np.stack([np.cos(angles), np.sin(angles)], axis=-1)

    def statistics(block: Block, t: int) -> np.ndarray:
        own = units[block.frames, block.replica, t]
        return np.concatenate([lagged_products(own, n_lags), own.mean(axis=0)])

    def reduction(mean: np.ndarray) -> np.ndarray:
        constant = (mean[..., n_lags:] ** 2).sum(axis=-1, keepdims=True)
        return (mean[..., :n_lags] - constant) / (1 - constant)

    found = []
    for t, name in enumerate(torsions.names):
        table = per_block(blocks, lambda b, t=t: statistics(b, t))  # type: ignore[misc]
        found += _relaxation("torsional correlation", name, table, run=run, chains=chains_of(blocks), reduction=reduction)
    return found
