"""Local moves by dynamics, batched over chains: generalised hybrid Monte Carlo, hybrid Monte Carlo, plain Langevin.

They sample exp(-U(x)/kT) N(v; 0, kT/m), whose positions have the target density; velocities travel in `ChainState`.
Moves of other kernels change positions only and keep that product invariant, so all of them can be mixed and cycled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from longstride.dynamics.integrators import baoab, start, thermal_velocities
from longstride.errors import LongstrideError
from longstride.mcmc.kernel import ChainState, Info, Kernel
from longstride.mcmc.metropolis import accept, log_ratio
from longstride.state import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from longstride.potentials.base import Potential

DIVERGED_KT = 20.0  # kT per coordinate; fluctuations of the potential energy are of order kT per square root of them


@dataclass(frozen=True, kw_only=True)
class Dynamics:
    """What all local moves need.

    Attributes:
        potential: the target U.
        kT: thermal energy, kJ/mol.
        masses: [atom] Da; any masses give the same positions.
        dt: timestep, ps.
        steps: integration steps per kernel step.
        contains: positions in the domain of the chain, [chain] bool, such as those of one handedness; None for all.
        anchored: put the centre of mass back where it was after every kernel step. Right where U does not depend on it,
            as of any free molecule; it would drift without bound otherwise. Wrong in an external field.
    """

    potential: Potential
    kT: float
    masses: Tensor
    dt: float
    steps: int
    contains: Callable[[State], Tensor] | None = None
    anchored: bool = True

    def __post_init__(self) -> None:
        if self.dt <= 0 or self.steps < 1:
            raise LongstrideError(f"local moves need a positive timestep and number of steps, not {self.dt} and {self.steps}")

    def evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return -U/kT [chain] float64, -inf outside the domain, and forces [chain, atom, 3] kJ/mol/nm."""
        energy, forces = self.potential.energy_forces(State(positions=x))
        value = -energy.double() / self.kT
        if self.contains is not None:
            value = torch.where(self.contains(State(positions=x)), value, -torch.inf)
        return value, forces.to(x.dtype)

    def log_kinetic(self, v: Tensor) -> Tensor:
        """Return -sum m v^2 / 2kT, [chain] float64."""
        return -0.5 * (self.masses[:, None] * v.double().square()).sum((1, 2)) / self.kT

    def verlet(self, x: Tensor, v: Tensor, forces: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return x, v, -U/kT and forces one step B A B later; volume-preserving, and its own inverse under v -> -v."""
        kick = 0.5 * self.dt / self.masses[:, None]
        v = v + kick * forces
        x = x + self.dt * v
        value, forces = self.evaluate(x)
        return x, v + kick * forces, value, forces

    def velocities(self, chains: ChainState, generator: torch.Generator) -> Tensor:
        """Return the chains' velocities, drawn now where they have none."""
        if chains.velocities is not None:
            return chains.velocities
        return thermal_velocities(chains.state.positions.shape, self.masses, self.kT, generator)

    def anchor(self, x: Tensor, before: Tensor) -> Tensor:
        """Return x with the centre of mass of `before`."""
        if not self.anchored:
            return x
        weights = (self.masses / self.masses.sum())[:, None]
        return x - (weights * (x - before)).sum(dim=1, keepdim=True)


def _per_atom(mask: Tensor) -> Tensor:
    return mask[:, None, None]


def ghmc(dynamics: Dynamics, *, friction: float, label: str = "ghmc") -> Kernel:
    """Return generalised hybrid Monte Carlo: Langevin dynamics O B A B O with a Metropolis test on B A B; exact.

    Each of `dynamics.steps` steps: v <- c v + sqrt((1 - c^2) kT/m) xi with c = exp(-friction dt / 2); one velocity-Verlet
    step to (x', v'); accept with min(1, exp(-(H(x', v') - H(x, v)) / kT)), else keep x and turn v to -v; v <- as before.
    Turning the velocity back is what keeps the product density invariant when part of it is kept. Sources:
    doi:10.1016/0370-2693(91)90812-5, doi:10.1021/jp411770f. An energy that is not finite, and a step out of the domain, are
    rejections.

    Args:
        dynamics: potential, temperature, masses, timestep, steps.
        friction: 1/ps.
        label: name in `Info`.
    """
    decay = math.exp(-0.5 * friction * dynamics.dt)
    noise = ((1 - decay**2) * dynamics.kT / dynamics.masses[:, None]) ** 0.5

    def refresh(v: Tensor, generator: torch.Generator) -> Tensor:
        return decay * v + noise * torch.randn(v.shape, generator=generator, dtype=v.dtype)

    def step(chains: ChainState, generator: torch.Generator) -> tuple[ChainState, Info]:
        x, v = chains.state.positions, dynamics.velocities(chains, generator)
        value, forces = dynamics.evaluate(x)
        count = torch.zeros(len(value), dtype=torch.int64)
        for _ in range(dynamics.steps):
            v = refresh(v, generator)
            y, w, at_y, forces_y = dynamics.verlet(x, v, forces)
            log_alpha = log_ratio(value, at_y, dynamics.log_kinetic(w), dynamics.log_kinetic(v))
            taken = accept(log_alpha, generator)
            x, v = torch.where(_per_atom(taken), y, x), torch.where(_per_atom(taken), w, -v)
            value, forces = torch.where(taken, at_y, value), torch.where(_per_atom(taken), forces_y, forces)
            count += taken
            v = refresh(v, generator)
        # a chain that never moved keeps its cached density to the last bit
        value = torch.where(count > 0, value, chains.log_density)
        x = torch.where(_per_atom(count > 0), dynamics.anchor(x, chains.state.positions), chains.state.positions)
        calls = len(value) * (dynamics.steps + 1)
        info = Info(
            accepted=count,
            log_alpha=log_alpha,
            label=label,
            energy_calls=0,
            force_calls=calls,
            proposals=dynamics.steps,
        )
        return ChainState(state=State(positions=x), log_density=value, velocities=v), info

    return Kernel(step=step, invariance="exact", labels=(label,))


def hmc(dynamics: Dynamics, *, label: str = "hmc") -> Kernel:
    """Return hybrid Monte Carlo: fresh velocities, `dynamics.steps` velocity-Verlet steps, one Metropolis test; exact.

    Accept with min(1, exp(-(H(x', v') - H(x, v)) / kT)), else repeat x (doi:10.1016/0370-2693(87)91197-X). The velocities of
    the move are forgotten; those that the chains carry stay as they are.
    """

    def step(chains: ChainState, generator: torch.Generator) -> tuple[ChainState, Info]:
        x = chains.state.positions
        v = thermal_velocities(x.shape, dynamics.masses, dynamics.kT, generator)
        value, forces = dynamics.evaluate(x)
        y, w, at_y = x, v, value
        inside = torch.ones(len(value), dtype=torch.bool)
        for _ in range(dynamics.steps):
            y, w, at_y, forces = dynamics.verlet(y, w, forces)
            inside &= at_y.isfinite()  # a path through infinite energy has no way back
        at_y = torch.where(inside, at_y, -torch.inf)
        log_alpha = log_ratio(value, at_y, dynamics.log_kinetic(w), dynamics.log_kinetic(v))
        taken = accept(log_alpha, generator)
        moved = ChainState(
            state=State(positions=torch.where(_per_atom(taken), dynamics.anchor(y, x), x)),
            log_density=torch.where(taken, at_y, chains.log_density),
            velocities=chains.velocities,
        )
        calls = len(value) * (dynamics.steps + 1)
        return moved, Info(accepted=taken, log_alpha=log_alpha, label=label, energy_calls=0, force_calls=calls)

    return Kernel(step=step, invariance="exact", labels=(label,))


def langevin(dynamics: Dynamics, *, friction: float, label: str = "langevin") -> Kernel:
    """Return plain Langevin dynamics, `dynamics.steps` BAOAB steps without a test: unadjusted.

    Its distribution differs from the target by an error of order dt^2 (doi:10.1093/amrx/abs010). A chain whose energy is
    not finite afterwards or has risen by what no thermal fluctuation reaches (`DIVERGED_KT` per coordinate), or that left
    the domain, repeats where it was with its velocity turned.

    Args:
        dynamics: potential, temperature, masses, timestep, steps.
        friction: 1/ps.
        label: name in `Info`.
    """

    def step(chains: ChainState, generator: torch.Generator) -> tuple[ChainState, Info]:
        x, v = chains.state.positions, dynamics.velocities(chains, generator)
        md = start(x, v, masses=dynamics.masses, potential=dynamics.potential)
        for _ in range(dynamics.steps):
            md = baoab(md, potential=dynamics.potential, dt=dynamics.dt, kT=dynamics.kT, friction=friction, generator=generator)
        at_y = -md.potential_energy.double() / dynamics.kT
        valid = at_y - chains.log_density > -DIVERGED_KT * x[0].numel()  # false for NaN
        valid &= at_y.isfinite() & md.positions.isfinite().all(-1).all(-1) & md.velocities.isfinite().all(-1).all(-1)
        if dynamics.contains is not None:
            valid &= dynamics.contains(State(positions=md.positions))
        moved = replace(
            chains,
            state=State(positions=torch.where(_per_atom(valid), dynamics.anchor(md.positions, x), x)),
            log_density=torch.where(valid, at_y, chains.log_density),
            velocities=torch.where(_per_atom(valid), md.velocities, -v),
        )
        change = torch.where(valid, at_y - chains.log_density, -torch.inf)
        calls = len(at_y) * (dynamics.steps + 1)
        return moved, Info(accepted=valid, log_alpha=change, label=label, energy_calls=0, force_calls=calls)

    return Kernel(step=step, invariance="unadjusted", labels=(label,))
