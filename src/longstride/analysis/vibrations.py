"""Normal modes of a minimum, which bonds they stretch, and temperatures that need the modes or the Hessian."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from longstride.analysis.block_statistics import Observable
from longstride.analysis.observables import atom_types, chains_of, series_mean
from longstride.analysis.resonance import LIGHT_CM_PER_PS, period_fs
from longstride.errors import DataError, LongstrideError, NumericsError
from longstride.units import BOLTZMANN_KJ_PER_MOL_K

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longstride.analysis.block_statistics import Block
    from longstride.analysis.dynamics_run import DynamicsRun
    from longstride.potentials.base import Potential
    from longstride.state import System

BATCH = 64
BANDS_PER_CM = (30.0, 500.0, 1000.0, 1600.0, 2200.0, 4500.0)


def _forces(potential: Potential, positions: np.ndarray, box: np.ndarray | None) -> np.ndarray:
    import torch

    from longstride.state import State

    found = []
    for start in range(0, len(positions), BATCH):
        x = torch.as_tensor(positions[start : start + BATCH], dtype=torch.float64)
        cell = None if box is None else torch.as_tensor(box, dtype=torch.float64).expand(len(x), 3, 3)
        found.append(potential.energy_forces(State(positions=x, box=cell))[1].detach().double().cpu().numpy())
    forces = np.concatenate(found)
    if not np.isfinite(forces).all():
        raise NumericsError(f"{potential.name}: a force is not finite; start from a sensible structure")
    return forces


def minimise(
    potential: Potential,
    positions: np.ndarray,
    *,
    box: np.ndarray | None = None,
    max_force: float = 1.0,
    max_steps: int = 2000,
) -> np.ndarray:
    """Return a local minimum, [atom, 3] nm, by L-BFGS (SciPy).

    Args:
        potential: whose minimum.
        positions: [atom, 3] nm, the start.
        box: [3, 3] nm or None.
        max_force: largest component of a force that may remain, kJ/mol/nm.
        max_steps: iterations.

    Raises:
        NumericsError: not converged.
    """
    import torch
    from scipy.optimize import minimize

    from longstride.state import State

    cell = None if box is None else torch.as_tensor(box, dtype=torch.float64)[None]

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        energy, forces = potential.energy_forces(
            State(positions=torch.as_tensor(flat.reshape(1, -1, 3), dtype=torch.float64), box=cell)
        )
        return float(energy[0]) - origin, -forces[0].detach().double().cpu().numpy().ravel()

    origin = 0.0
    origin = objective(positions.astype(np.float64).ravel())[0]  # large constants cost digits in the line search
    options = {"maxiter": max_steps, "gtol": max_force, "ftol": 0.0, "maxcor": 30, "maxfun": 5 * max_steps}
    result = minimize(objective, positions.astype(np.float64).ravel(), jac=True, method="L-BFGS-B", options=options)
    largest = float(np.abs(result.jac).max())
    if not largest <= max_force:
        raise NumericsError(
            f"{potential.name}: the minimisation stopped with a force of {largest:.3g} kJ/mol/nm, {max_force:g} wanted;"
            f" give more steps, a better start or a larger max_force"
        )
    return result.x.reshape(-1, 3)


def hessian(potential: Potential, positions: np.ndarray, *, box: np.ndarray | None = None, step_nm: float = 1e-4) -> np.ndarray:
    """Return the symmetrised Hessian of U, [3 atom, 3 atom] kJ/mol/nm^2, by central differences of forces.

    Args:
        potential: float64 forces.
        positions: [atom, 3] nm.
        box: [3, 3] nm or None.
        step_nm: displacement; its error is O(step^2), round-off of forces grows as 1/step.
    """
    size = positions.size
    moves = step_nm * np.eye(size).reshape(size, -1, 3)
    forward, backward = (_forces(potential, positions + sign * moves, box).reshape(size, size) for sign in (1, -1))
    second = -(forward - backward) / (2 * step_nm)
    return 0.5 * (second + second.T)


@dataclass(frozen=True, kw_only=True)
class NormalModes:
    """Harmonic vibrations about a minimum.

    Attributes:
        system: bonds and elements.
        masses: [atom] Da.
        positions: [atom, 3] nm, the minimum.
        wavenumbers: [mode] 1/cm, ascending; imaginary ones are negative. Six (five for linear molecules) are about zero.
        vectors: [mode, atom, 3] orthonormal in mass-weighted coordinates.
    """

    system: System
    masses: np.ndarray
    positions: np.ndarray
    wavenumbers: np.ndarray
    vectors: np.ndarray

    @property
    def stretch_shares(self) -> dict[str, np.ndarray]:
        """Share of each bond type in each mode, label to [mode].

        Equation: sum over bonds of mu (d_b)^2 with d_b the change of the bond's length per unit of the mode and
        mu = m1 m2 / (m1 + m2): the part of a mode's kinetic energy in stretching a bond, 1 for a diatomic molecule.
        """
        from ase.data import chemical_symbols

        elements = [chemical_symbols[number] for number in self.system.atomic_numbers]
        moves = self.vectors / np.sqrt(self.masses)[:, None]
        shares = {}
        for label, bonds in atom_types(elements, self.system.bonds).items():
            first, second = bonds[:, 0], bonds[:, 1]
            axis = self.positions[first] - self.positions[second]
            axis /= np.linalg.norm(axis, axis=1, keepdims=True)
            stretch = np.einsum("kbx,bx->kb", moves[:, first] - moves[:, second], axis)
            reduced = self.masses[first] * self.masses[second] / (self.masses[first] + self.masses[second])
            shares[label] = (stretch**2 * reduced).sum(axis=1)
        return shares

    @property
    def stiffest(self) -> dict[str, float]:
        """Bond type to the wavenumber in 1/cm of the stiffest mode in which that type has the largest share."""
        shares = self.stretch_shares
        if not shares:
            return {}
        labels = list(shares)
        owner = np.stack([shares[label] for label in labels]).argmax(axis=0)
        found = {label: self.wavenumbers[owner == k] for k, label in enumerate(labels)}
        return {label: float(values.max()) for label, values in found.items() if len(values) and values.max() > 0}

    @property
    def periods_fs(self) -> dict[str, float]:
        """Bond type to the period T in fs of its stiffest mode; resonances of the outer step lie at T/2 and T/3."""
        return {label: period_fs(wavenumber) for label, wavenumber in self.stiffest.items()}


def normal_modes(
    potential: Potential,
    minimum: np.ndarray,
    *,
    masses: np.ndarray,
    box: np.ndarray | None = None,
    step_nm: float = 1e-4,
    max_force: float = 5.0,
) -> NormalModes:
    """Return the normal modes at a minimum: eigenvectors of M^-1/2 H M^-1/2, wavenumber = w / (2 pi c).

    Args:
        potential: float64 forces.
        minimum: [atom, 3] nm, see `minimise`.
        masses: [atom] Da, those of the dynamics.
        box: [3, 3] nm or None.
        step_nm: of the Hessian.
        max_force: largest component of a force there, kJ/mol/nm.

    Raises:
        LongstrideError: not a minimum.
    """
    largest = float(np.abs(_forces(potential, minimum[None], box)).max())
    if largest > max_force:
        raise LongstrideError(f"a force of {largest:.3g} kJ/mol/nm acts at this structure; minimise it first")
    weight = np.repeat(1 / np.sqrt(masses), 3)
    values, vectors = np.linalg.eigh(weight[:, None] * hessian(potential, minimum, box=box, step_nm=step_nm) * weight)
    wavenumbers = np.sign(values) * np.sqrt(np.abs(values)) / (2 * math.pi * LIGHT_CM_PER_PS)
    return NormalModes(
        system=potential.system,
        masses=masses,
        positions=minimum,
        wavenumbers=wavenumbers,
        vectors=vectors.T.reshape(-1, len(masses), 3),
    )


def rotations_onto(positions: np.ndarray, reference: np.ndarray, masses: np.ndarray) -> np.ndarray:
    """Return rotations R [..., 3, 3] that turn frames [..., atom, 3] best onto a reference, x_ref ~ R x (Kabsch).

    Both are taken about their centres of mass, atoms weigh by mass. Source: doi:10.1107/S0567739476001873.
    """
    share = masses / masses.sum()
    x = positions - np.einsum("...ax,a->...x", positions, share)[..., None, :]
    y = reference - share @ reference
    left, _, right = np.linalg.svd(np.einsum("ai,...aj,a->...ij", y, x, masses))
    sign = np.sign(np.linalg.det(left @ right))
    left[..., :, 2] *= sign[..., None]
    return left @ right


def mode_temperatures(
    run: DynamicsRun,
    blocks: Sequence[Block],
    *,
    modes: NormalModes,
    edges_per_cm: Sequence[float] = BANDS_PER_CM,
    matters_K: float = 3.0,
) -> list[Observable]:
    """Return the kinetic temperature in K of bands of normal modes of an isolated molecule.

    Equation: T = sum_k (dq_k/dt)^2 / (n k_B) over the modes of a band, dq_k/dt = e_k . M^1/2 R v, R the rotation of the frame
    onto the minimum. R depends on positions only, so every band has the temperature of the bath however anharmonic the
    motion is; stiff bands heat first in a resonance.

    Raises:
        DataError: no velocities, a box, or modes of other masses.
    """
    if run.velocities is None or run.box is not None:
        raise DataError(f"{run.label}: temperatures of normal modes need velocities of an isolated molecule")
    if not np.allclose(modes.masses, run.masses, rtol=1e-6):
        raise DataError(f"{run.label}: the normal modes belong to other masses; compute them with the masses of the run")
    rotation = rotations_onto(run.positions.astype(np.float64), modes.positions, run.masses)
    turned = np.einsum("frij,fraj->frai", rotation, run.velocities.astype(np.float64)) * np.sqrt(run.masses)[:, None]
    speeds = np.einsum("frai,kai->frk", turned, modes.vectors, optimize=True)
    found = []
    for low, high in itertools.pairwise(edges_per_cm):
        band = (modes.wavenumbers >= low) & (modes.wavenumbers < high)
        if band.any():
            series = (speeds[..., band] ** 2).mean(axis=2) / BOLTZMANN_KJ_PER_MOL_K
            found.append(
                Observable(
                    name="mode temperature",
                    part=f"{low:g}-{high:g} 1/cm",
                    unit="K",
                    statistics=series_mean(series, blocks),
                    chains=chains_of(blocks),
                    matters=matters_K,
                )
            )
    return found


def configurational_terms(
    potential: Potential,
    positions: np.ndarray,
    *,
    box: np.ndarray | None = None,
    probes: int | None = None,
    seed: int = 0,
    step_nm: float = 1e-4,
) -> tuple[np.ndarray, np.ndarray]:
    """Return |grad U|^2 in (kJ/mol/nm)^2 and the Laplacian of U in kJ/mol/nm^2 of frames, each [frame].

    Equation: lap U = E[z . H z] over random signs z (Hutchinson, doi:10.1080/03610919008812866), H z from a central
    difference of forces along z; unbiased for any number of probes. Without `probes` the exact trace over all 3 N axes.

    Args:
        potential: the reference potential, float64.
        positions: [frame, atom, 3] nm.
        box: [3, 3] nm or None.
        probes: random vectors per frame, or None for all axes.
        seed: of the probes.
        step_nm: displacement per coordinate.
    """
    x = positions.astype(np.float64)
    generator = np.random.default_rng(seed)
    gradient = _forces(potential, x, box)
    laplacian = np.empty(len(x))
    for frame in range(len(x)):
        if probes is None:
            z = np.eye(x[frame].size).reshape(-1, *x[frame].shape)
            weight = 1.0
        else:
            z = generator.choice([-1.0, 1.0], size=(probes, *x[frame].shape))
            weight = 1 / probes
        ahead, behind = (_forces(potential, x[frame] + sign * step_nm * z, box) for sign in (1, -1))
        laplacian[frame] = weight * -(z * (ahead - behind)).sum() / (2 * step_nm)
    return (gradient**2).sum(axis=(1, 2)), laplacian
