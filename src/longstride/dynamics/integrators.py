"""Integrators as pure steps over replicas: velocity Verlet, BAOAB, and multi-time-step BAOAB (r-RESPA).

A step takes an `MDState` and returns a new one; only the random generator advances. B is a half kick, A a half drift,
O the exact Ornstein-Uhlenbeck solution. Forces travel with the state, so every step costs one new force evaluation
per level. The centre of mass is a degree of freedom like any other here: Langevin noise moves it, no step removes its
motion, and a molecule of N atoms has 3 N degrees of freedom throughout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from longstride.errors import LongstrideError
from longstride.state import State
from longstride.units import BOLTZMANN_KJ_PER_MOL_K

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from longstride.potentials.base import Potential


@dataclass(frozen=True, kw_only=True)
class MDState:
    """Replicas of one molecule in motion. All tensors float64.

    Attributes:
        positions: [replica, atom, 3] nm.
        velocities: [replica, atom, 3] nm/ps, at the same time as the positions.
        forces: [replica, atom, 3] kJ/mol/nm, of the (slow, reference) potential at `positions`.
        potential_energy: [replica] kJ/mol, of the same potential.
        masses: [atom] Da; those that move, which may be repartitioned.
        fast_forces: [replica, atom, 3] kJ/mol/nm of the fast potential at `positions`, in multi-time-step runs.
        box: [replica, 3, 3] nm (rows are box vectors), constant, or None for isolated molecules. Positions are not wrapped.
    """

    positions: Tensor
    velocities: Tensor
    forces: Tensor
    potential_energy: Tensor
    masses: Tensor
    fast_forces: Tensor | None = None
    box: Tensor | None = None

    @property
    def kinetic_energy(self) -> Tensor:
        """Kinetic energy sum m v^2 / 2, [replica] kJ/mol."""
        return 0.5 * (self.masses[:, None] * self.velocities.square()).sum(dim=(1, 2))

    @property
    def temperature_K(self) -> Tensor:
        """Kinetic temperature 2 K / (3 N R), [replica] K."""
        return 2 * self.kinetic_energy / (3 * len(self.masses) * BOLTZMANN_KJ_PER_MOL_K)


def thermal_velocities(shape: torch.Size, masses: Tensor, kT: float | Tensor, generator: Generator) -> Tensor:
    """Draw Maxwell-Boltzmann velocities, [replica, atom, 3] nm/ps, the centre of mass included.

    Args:
        shape: of the positions, [replica, atom, 3].
        masses: [atom] Da.
        kT: thermal energy in kJ/mol, one number or [replica, 1, 1].
        generator: source of the draw.
    """
    return (kT / masses[:, None]) ** 0.5 * torch.randn(shape, generator=generator, dtype=masses.dtype)


def start(
    positions: Tensor,
    velocities: Tensor,
    *,
    masses: Tensor,
    potential: Potential,
    fast: Potential | None = None,
    box: Tensor | None = None,
) -> MDState:
    """Return the state at rest in time: forces of `potential`, and of `fast` where given, at the positions.

    Args:
        positions: [replica, atom, 3] nm.
        velocities: [replica, atom, 3] nm/ps.
        masses: [atom] Da.
        potential: the (slow, reference) potential.
        fast: the fast potential of multi-time-step dynamics.
        box: [replica, 3, 3] nm, or None for isolated molecules.
    """
    energy, forces = potential.energy_forces(State(positions=positions, box=box))
    fast_forces = None if fast is None else _evaluate(fast, positions, box)[1]
    return MDState(
        positions=positions,
        velocities=velocities,
        forces=forces.to(positions.dtype),
        potential_energy=energy.to(positions.dtype),
        masses=masses,
        fast_forces=fast_forces,
        box=box,
    )


def verlet(md: MDState, *, potential: Potential, dt: float) -> MDState:
    """Advance one velocity-Verlet step (NVE): B(dt/2) A(dt) B(dt/2).

    Source: doi:10.1063/1.442716. Time-reversible and symplectic; the energy error is O(dt^2).

    Args:
        md: the current state.
        potential: gives the forces.
        dt: timestep in ps.
    """
    inverse = 1 / md.masses[:, None]
    v = md.velocities + 0.5 * dt * md.forces * inverse
    x = md.positions + dt * v
    energy, forces = _evaluate(potential, x, md.box)
    return replace(md, positions=x, velocities=v + 0.5 * dt * forces * inverse, forces=forces, potential_energy=energy)


def baoab(
    md: MDState, *, potential: Potential, dt: float, kT: float | Tensor, friction: float | Tensor, generator: Generator
) -> MDState:
    """Advance one Langevin step B(dt/2) A(dt/2) O(dt) A(dt/2) B(dt/2).

    Equation of O: v <- c v + sqrt((1 - c^2) kT / m) xi, c = exp(-friction dt). Source: doi:10.1093/amrx/abs010.

    Args:
        md: the current state.
        potential: gives the forces; called once.
        dt: timestep in ps.
        kT: thermal energy in kJ/mol, one number or [replica, 1, 1].
        friction: Langevin friction in 1/ps, one number or [atom].
        generator: source of the noise.
    """
    kick = 0.5 * dt / md.masses[:, None]
    middle = _Middle(dt, md.masses, kT=kT, friction=friction, generator=generator)
    x, v = middle(md.positions, torch.addcmul(md.velocities, kick, md.forces))
    energy, forces = _evaluate(potential, x, md.box)
    velocities = torch.addcmul(v, kick, forces)
    return replace(md, positions=x, velocities=velocities, forces=forces, potential_energy=energy)


def respa_baoab(
    md: MDState,
    *,
    fast: Potential,
    slow: Potential,
    n_inner: int,
    dt: float,
    kT: float | Tensor,
    friction: float | Tensor,
    generator: Generator,
) -> MDState:
    """Advance one outer step of multi-time-step Langevin dynamics, distilled r-RESPA.

    Equation, h = dt / n_inner, F_L of `slow`, F_S of `fast`:
    v += dt/(2m) (F_L - F_S);  n_inner times [B_S(h/2) A(h/2) O(h) A(h/2) B_S(h/2)];  v += dt/(2m) (F_L - F_S).
    Both forces of a difference belong to the same positions. The fast force of the last inner step is reused, so an
    outer step costs n_inner calls of `fast` and one of `slow`. With n_inner = 1 the two kicks of either half merge
    and the step is `baoab` with `slow`, whatever `fast` is. Sources: doi:10.1063/1.463137 (r-RESPA),
    doi:10.1021/acs.jpclett.9b00901 (BAOAB-RESPA), doi:10.1021/acs.jpclett.5c03720 (distilled fast force).

    Args:
        md: the current state, with `fast_forces` (see `start`).
        fast: the cheap potential of every inner step.
        slow: the reference potential of every outer step; its energy is reported.
        n_inner: inner steps per outer step, a positive whole number.
        dt: outer timestep in ps.
        kT: thermal energy in kJ/mol, one number or [replica, 1, 1].
        friction: Langevin friction in 1/ps, one number or [atom]; O acts in every inner step. A high friction on hydrogens
            alone damps resonances of their bonds (doi:10.1021/acs.jctc.6c00653).
        generator: source of the noise.

    Raises:
        LongstrideError: `n_inner` is not a positive whole number, or `md` has no fast forces.
    """
    if not math.isfinite(n_inner) or n_inner != int(n_inner) or n_inner < 1:
        raise LongstrideError(f"the number of inner steps must be a positive whole number, not {n_inner!r}")
    if md.fast_forces is None:
        raise LongstrideError("multi-time-step dynamics needs the fast forces of its first state; make it with start(fast=...)")
    h = dt / n_inner
    kick, outer_kick = 0.5 * h / md.masses[:, None], 0.5 * dt / md.masses[:, None]
    middle = _Middle(h, md.masses, kT=kT, friction=friction, generator=generator)
    x, f_fast = md.positions, md.fast_forces
    v = torch.addcmul(md.velocities, outer_kick, md.forces - f_fast)
    for _ in range(int(n_inner)):
        x, v = middle(x, torch.addcmul(v, kick, f_fast))
        f_fast = _evaluate(fast, x, md.box)[1]
        v = torch.addcmul(v, kick, f_fast)
    energy, f_slow = _evaluate(slow, x, md.box)
    v = torch.addcmul(v, outer_kick, f_slow - f_fast)
    return replace(md, positions=x, velocities=v, forces=f_slow, potential_energy=energy, fast_forces=f_fast)


def half_step_velocities(md: MDState, *, dt: float, n_inner: int = 1) -> Tensor:
    """Return the velocities between O and the last kicks of the step that led to `md`, [replica, atom, 3] nm/ps.

    Equation: v - dt/(2m) (F_L - F_S) - h/(2m) F_S, h = dt / n_inner; v - dt/(2m) F without a fast force. They are
    Maxwell-Boltzmann in a harmonic well at every stable step, where the velocities at the end of the step are too cold by
    the factor 1 - (omega h)^2 / 4 (doi:10.1021/acs.jpca.9b02771): temperatures belong to them.

    Args:
        md: a state that `baoab` or `respa_baoab` returned.
        dt: (outer) timestep in ps.
        n_inner: inner steps per outer step.
    """
    half = 0.5 * dt / md.masses[:, None]
    if md.fast_forces is None:
        return md.velocities - half * md.forces
    return md.velocities - half * (md.forces - md.fast_forces) - half / n_inner * md.fast_forces


def whole_steps(outer: float, inner: float) -> int:
    """Return outer / inner as a whole number of steps.

    Raises:
        LongstrideError: the ratio is not a positive whole number (rounding it would change the dynamics silently).
    """
    ratio = outer / inner
    n = round(ratio)
    if n < 1 or not math.isclose(ratio, n, rel_tol=1e-6):
        raise LongstrideError(f"the outer timestep {outer:g} must be a whole multiple of the inner timestep {inner:g}")
    return n


class _Middle:
    """The part A(h/2) O(h) A(h/2); no noise is drawn at zero friction, so that NVE runs leave the generator alone."""

    def __init__(self, h: float, masses: Tensor, *, kT: float | Tensor, friction: float | Tensor, generator: Generator) -> None:
        rate = torch.as_tensor(friction, dtype=masses.dtype).reshape(-1, 1)  # [1 or atom, 1]
        self._half, self._generator, self._thermostat = 0.5 * h, generator, bool((rate > 0).any())
        self._decay = torch.exp(-rate * h)
        self._noise = ((1 - self._decay**2) * kT / masses[:, None]) ** 0.5

    def __call__(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return positions and velocities after the three parts."""
        x = torch.add(x, v, alpha=self._half)
        if self._thermostat:
            noise = torch.randn(v.shape, generator=self._generator, dtype=v.dtype)
            v = torch.addcmul(self._decay * v, self._noise, noise)
        return torch.add(x, v, alpha=self._half), v


def _evaluate(potential: Potential, x: Tensor, box: Tensor | None) -> tuple[Tensor, Tensor]:
    energy, forces = potential.energy_forces(State(positions=x, box=box))
    return energy.to(x.dtype), forces.to(x.dtype)
