"""Umbrella sampling of two torsions with exchange between neighbouring windows, all replicas in one batch.

Window (i, j) feels U(x) + k_1 (1 - cos(phi - c_i)) + k_2 (1 - cos(psi - c_j)). Both torsions are restrained because psi
changes too slowly to equilibrate within windows of phi alone. Between stretches of Langevin dynamics neighbouring
windows try to swap configurations (replica exchange umbrella sampling, doi:10.1063/1.1308516), so that what is left of slow
motions equilibrates over the whole grid.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from longstride.dynamics.integrators import MDState, baoab, start, thermal_velocities
from longstride.errors import LongstrideError, NumericsError
from longstride.potentials.analytic import SumPotential
from longstride.potentials.restraint import TorsionRestraint
from longstride.progress import Progress
from longstride.state import State
from longstride.systems import set_torsion

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Generator, Tensor

    from longstride.data.checkpoint import StateFolder
    from longstride.potentials.base import Potential
    from longstride.state import System
    from longstride.systems import Prepared

RELAX_STEPS, RELAX_NM = 300, 0.002  # steepest descent that takes apart atoms which turning a torsion put on each other


@dataclass(frozen=True, kw_only=True)
class UmbrellaPlan:
    """What is sampled, and how long.

    Attributes:
        torsions: the two torsions that are restrained, four atoms each.
        windows: number of centres of each, evenly over the circle; even, because neighbours swap in pairs.
        stiffness: of each restraint, kJ/mol.
        kT: thermal energy, kJ/mol.
        dt: timestep, ps.
        friction: Langevin friction, 1/ps.
        steps_per_cycle: steps between two attempts to swap; one sample of every window is kept per cycle.
        n_discard: cycles of equilibration.
        n_cycles: cycles kept.
        checkpoint_every: cycles between checkpoints.
    """

    torsions: tuple[tuple[int, int, int, int], tuple[int, int, int, int]]
    windows: tuple[int, int]
    stiffness: tuple[float, float]
    kT: float
    dt: float
    friction: float
    steps_per_cycle: int
    n_discard: int
    n_cycles: int
    checkpoint_every: int

    def centers(self, axis: int) -> np.ndarray:
        """Return the centres of the windows along one axis, rad, half a spacing from -pi on."""
        return -math.pi + (np.arange(self.windows[axis]) + 0.5) * 2 * math.pi / self.windows[axis]

    @property
    def total(self) -> int:
        """Cycles of the whole run."""
        return self.n_discard + self.n_cycles


@dataclass(frozen=True, kw_only=True)
class UmbrellaSamples:
    """What a run recorded.

    Attributes:
        torsions: [cycle, window 1, window 2, torsion] float32 rad.
        exchange: [axis] accepted fraction of the swaps along each axis.
        wall_s: wall seconds of equilibration and production, summed over attempts.
    """

    torsions: np.ndarray
    exchange: np.ndarray
    wall_s: float


def restraints_of(plan: UmbrellaPlan, molecule: Prepared) -> tuple[TorsionRestraint, TorsionRestraint]:
    """Return the two restraints of all windows, the second torsion's windows innermost."""
    grid = np.meshgrid(plan.centers(0), plan.centers(1), indexing="ij")
    first, second = (
        TorsionRestraint(molecule.system, atoms=atoms, centers=torch.from_numpy(centers.ravel()), stiffness=stiffness)
        for atoms, centers, stiffness in zip(plan.torsions, grid, plan.stiffness, strict=True)
    )
    return first, second


def can_turn(system: System, atoms: Sequence[int]) -> bool:
    """Return whether a torsion can be turned about its middle bond, which is not so in a ring."""
    a, b, c, d = (int(atom) for atom in atoms)
    probe = np.random.default_rng(0).normal(size=(system.n_atoms, 3))
    return bool((set_torsion(system, probe, (a, b, c, d), 0.0) != probe).any())


def umbrella_starts(plan: UmbrellaPlan, molecule: Prepared) -> np.ndarray:
    """Return one structure per window, [window, atom, 3] nm, with both torsions at the window's centres.

    Raises:
        LongstrideError: a torsion lies in a ring and cannot be turned.
    """
    system = molecule.system
    for atoms in plan.torsions:
        if not can_turn(system, atoms):
            raise LongstrideError(
                f"umbrella sampling cannot turn the torsion of atoms {atoms} of {system.name}: it is in a ring"
            )
    found = []
    for first in plan.centers(0):
        turned = set_torsion(system, molecule.positions, plan.torsions[0], float(first))
        found += [set_torsion(system, turned, plan.torsions[1], float(second)) for second in plan.centers(1)]
    return np.stack(found)


def relax(positions: Tensor, potential: Potential, *, steps: int = RELAX_STEPS, longest: float = RELAX_NM) -> Tensor:
    """Return positions after steepest descent, in which no atom moves further than `longest` nm per step.

    The step shrinks linearly to zero, so that the result lies near a minimum whatever the forces are; forces that are
    not finite move nothing.

    Args:
        positions: [batch, atom, 3] nm.
        potential: gives the forces.
        steps: number of steps.
        longest: nm.
    """
    x = positions
    for step in range(steps):
        forces = torch.nan_to_num(potential.energy_forces(State(positions=x))[1].to(x.dtype), posinf=0.0, neginf=0.0)
        size = forces.norm(dim=-1).amax(dim=1)[:, None, None].clamp(min=1.0)
        x = x + longest * (1 - step / steps) * forces / size
    return x


def exchange(
    md: MDState, restraints: Sequence[TorsionRestraint], plan: UmbrellaPlan, generator: Generator
) -> tuple[MDState, int, Tensor]:
    """Try to swap the configurations of neighbouring windows: along one axis, odd or even pairs, each chosen by a coin.

    Equation: accept with min(1, exp(-(U_k(x_l) + U_l(x_k) - U_k(x_k) - U_l(x_l)) / kT)); U_k is window k's restraint along
    the axis, everything else cancels. Velocities go with the positions; forces are stale afterwards.

    Returns:
        the state, the axis, the swaps made [pair, window of the other axis] bool.
    """
    coins = torch.randint(2, (2,), generator=generator)
    axis, parity = int(coins[0]), int(coins[1])
    restraint, count = restraints[axis], plan.windows[axis]
    angle = restraint.angle(State(positions=md.positions)).reshape(plan.windows).movedim(axis, 0)
    order = torch.arange(angle.numel()).reshape(plan.windows).movedim(axis, 0)
    first = torch.arange(parity, count, 2)
    second = (first + 1) % count
    centers = torch.from_numpy(plan.centers(axis))[:, None]
    now = restraint.bias(angle[first], centers[first]) + restraint.bias(angle[second], centers[second])
    swapped = restraint.bias(angle[second], centers[first]) + restraint.bias(angle[first], centers[second])
    accepted = torch.rand(now.shape, generator=generator, dtype=torch.float64).log() < (now - swapped) / plan.kT
    source = order.clone()
    source[first] = torch.where(accepted, order[second], order[first])
    source[second] = torch.where(accepted, order[first], order[second])
    index = source.movedim(0, axis).flatten()
    return replace(md, positions=md.positions[index], velocities=md.velocities[index]), axis, accepted


@dataclass(kw_only=True)
class _Record:
    """Samples since the last checkpoint, and running counts per axis."""

    tried: np.ndarray
    swapped: np.ndarray
    wall_s: float = 0.0
    blocks: int = 0
    torsions: list[np.ndarray] = field(default_factory=list)


class _Umbrella:
    """The parts that a run and its checkpoints share."""

    def __init__(
        self, plan: UmbrellaPlan, molecule: Prepared, potential: Potential, *, masses: Tensor, generator: Generator
    ) -> None:
        self.plan, self.molecule, self.masses, self.generator = plan, molecule, masses, generator
        self.restraints = restraints_of(plan, molecule)
        self.biased = SumPotential(potential, *self.restraints)

    def begin(self) -> tuple[MDState, _Record]:
        positions = relax(torch.from_numpy(umbrella_starts(self.plan, self.molecule)), self.biased)
        velocities = thermal_velocities(positions.shape, self.masses, self.plan.kT, self.generator)
        return self._at(positions, velocities), _Record(tried=np.zeros(2), swapped=np.zeros(2))

    def cycle(self, md: MDState, record: _Record, *, keep: bool) -> MDState:
        plan = self.plan
        for _ in range(plan.steps_per_cycle):
            md = baoab(md, potential=self.biased, dt=plan.dt, kT=plan.kT, friction=plan.friction, generator=self.generator)
        if not bool(md.potential_energy.isfinite().all()):
            raise NumericsError("umbrella sampling: an energy is not finite; use a shorter timestep_fs")
        if keep:
            angles = torch.stack([restraint.angle(State(positions=md.positions)) for restraint in self.restraints], -1)
            record.torsions.append(angles.reshape(*plan.windows, 2).numpy().astype(np.float32))
        md, axis, accepted = exchange(md, self.restraints, plan, self.generator)
        record.tried[axis] += accepted.numel()
        record.swapped[axis] += int(accepted.sum())
        return self._at(md.positions, md.velocities)

    def _at(self, positions: Tensor, velocities: Tensor) -> MDState:
        return start(positions, velocities, masses=self.masses, potential=self.biased)

    def checkpoint(self, folder: StateFolder, cycle: int, md: MDState, record: _Record) -> _Record:
        """Write the samples as a block and everything needed to continue; return a record without samples."""
        blocks = record.blocks
        if record.torsions:
            folder.save_block(blocks, {"torsions": np.stack(record.torsions)})
            blocks += 1
        arrays = {
            "positions": md.positions.numpy(),
            "velocities": md.velocities.numpy(),
            "tried": record.tried,
            "swapped": record.swapped,
            "generator": self.generator.get_state().numpy(),
        }
        folder.save(cycle, arrays, {"wall_s": record.wall_s, "blocks": blocks})
        return replace(record, blocks=blocks, torsions=[])

    def restore(self, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> tuple[MDState, _Record]:
        self.generator.set_state(torch.from_numpy(arrays["generator"].copy()))
        positions, velocities = (torch.from_numpy(arrays[name].copy()) for name in ("positions", "velocities"))
        record = _Record(tried=arrays["tried"].copy(), swapped=arrays["swapped"].copy(), **meta)
        return self._at(positions, velocities), record


def run_umbrella(
    plan: UmbrellaPlan,
    molecule: Prepared,
    potential: Potential,
    *,
    masses: Tensor,
    generator: Generator,
    folder: StateFolder,
    label: str = "umbrella sampling",
) -> UmbrellaSamples:
    """Run, or continue from the newest checkpoint in `folder`; a run that was killed ends with the same bits.

    Args:
        plan: what and how long.
        molecule: topology and the structure whose torsions are turned.
        potential: the unrestrained target.
        masses: [atom] Da.
        generator: the run's only random stream.
        folder: where blocks and checkpoints go.
        label: what progress is called.

    Raises:
        NumericsError: an energy is not finite.
        LongstrideError: a torsion cannot be turned.
    """
    run = _Umbrella(plan, molecule, potential, masses=masses, generator=generator)
    begin, saved = time.monotonic(), folder.latest()
    if saved is None:
        (md, record), first = run.begin(), 0
    else:
        (md, record), first = run.restore(saved.arrays, saved.meta), saved.step
    progress = Progress(label, plan.total, "cycles", start=first)
    for cycle in range(first + 1, plan.total + 1):
        md = run.cycle(md, record, keep=cycle > plan.n_discard)
        if cycle % plan.checkpoint_every == 0 or cycle == plan.total:
            now = time.monotonic()
            record.wall_s, begin = record.wall_s + now - begin, now
            record = run.checkpoint(folder, cycle, md, record)
        progress.update(cycle)
    blocks = [folder.read_block(index)["torsions"] for index in range(record.blocks)]
    exchanged = record.swapped / np.maximum(record.tried, 1)
    return UmbrellaSamples(torsions=np.concatenate(blocks), exchange=exchanged, wall_s=record.wall_s)
