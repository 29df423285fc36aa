"""Run replicas step by step: save frames in blocks, checkpoint, continue bitwise, stop at the first sign of nonsense."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from ase.data import chemical_symbols
from scipy.stats import chi2

from longstride.dynamics.integrators import MDState, half_step_velocities, whole_steps
from longstride.errors import NumericsError
from longstride.units import BOLTZMANN_KJ_PER_MOL_K

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Generator

    from longstride.config import MTSSampling, ReferenceConfig, STSSampling, TunedMDSampling
    from longstride.data.checkpoint import StateFolder
    from longstride.state import System

NEVER = 1e-15  # probability per look
FIELDS = ("positions", "velocities", "forces", "potential_energy", "masses", "fast_forces", "box")


@dataclass(frozen=True, kw_only=True)
class Monitor:
    """Limits that a healthy trajectory never touches: of the slow force, and of temperatures, of all atoms and per element.

    Attributes:
        system: names the offending atom.
        temperature_K: of the thermostat.
        max_slow_force: largest |F_slow - F_fast| on one atom, kJ/mol/nm; infinite for single-step runs.
        advice: how to mend it, the end of the error line.
        first_replica: number of the first replica in error lines, where a run is one group of many.
    """

    system: System
    temperature_K: float
    max_slow_force: float = math.inf
    advice: str = "use a shorter timestep"
    first_replica: int = 0

    def check(self, md: MDState, *, time_ps: float) -> None:
        """Look at one state.

        Raises:
            NumericsError: one line naming quantity, replica, atom and time.
        """
        if not self._healthy(md):
            self._diagnose(md, time_ps)

    def _healthy(self, md: MDState) -> bool:
        """Few operations, since this runs every step; comparisons with NaN are false."""
        cold = bool((self._temperatures(md) <= self._limits).all())
        # a sum over all replicas is finite only where every summand is
        if not (cold and math.isfinite(float(md.potential_energy.sum())) and math.isfinite(float(md.forces.sum()))):
            return False
        if md.fast_forces is None:
            return True
        largest = float((md.forces - md.fast_forces).square().sum(dim=2).max())
        return largest <= self.max_slow_force**2 and math.isfinite(largest)

    def _diagnose(self, md: MDState, time_ps: float) -> None:
        finite = torch.isfinite(md.potential_energy)
        if not finite.all():
            replica = int((~finite).nonzero()[0])
            raise NumericsError(self._line("the potential energy is not finite (no convergence)", replica, None, time_ps))
        difference = md.forces if md.fast_forces is None else md.forces - md.fast_forces
        size = difference.norm(dim=-1) + 0 * md.velocities.norm(dim=-1)  # a NaN in the velocities shows as well
        bad = ~torch.isfinite(size)
        if bad.any():
            replica, atom = (int(index) for index in bad.nonzero()[0])
            raise NumericsError(self._line("a force or velocity is not finite", replica, atom, time_ps))
        if md.fast_forces is not None and size.max() > self.max_slow_force:
            replica, atom = divmod(int(size.argmax()), size.shape[1])
            found = f"{float(size.max()):.4g} kJ/mol/nm, limit {self.max_slow_force:g}"
            what = f"reference and fast force differ too much, by {found}"
            raise NumericsError(self._line(what, replica, atom, time_ps))
        temperatures = self._temperatures(md)
        excess = temperatures - self._limits
        replica, group = divmod(int(excess.argmax()), excess.shape[1])
        if excess[replica, group] > 0:
            of = f" of {chemical_symbols[self._elements[group - 1]]}" if group else ""
            what = f"the temperature{of} is {float(temperatures[replica, group]):.0f} K, target {self.temperature_K:g} K"
            raise NumericsError(self._line(what, replica, None, time_ps))

    @cached_property
    def _elements(self) -> list[int]:
        return [int(number) for number in np.unique(self.system.atomic_numbers)]

    @cached_property
    def _groups(self) -> torch.Tensor:
        """Membership [atom, group]: all atoms, then each element."""
        numbers = torch.from_numpy(np.asarray(self.system.atomic_numbers))
        return torch.stack([numbers > 0, *(numbers == number for number in self._elements)], dim=1).to(torch.float64)

    @cached_property
    def _limits(self) -> torch.Tensor:
        return torch.tensor([self.max_temperature_K(int(count)) for count in self._groups.sum(dim=0)], dtype=torch.float64)

    def _temperatures(self, md: MDState) -> torch.Tensor:
        """Return kinetic temperatures, [replica, group] K; hydrogen heats first where an outer step resonates."""
        square = md.masses * md.velocities.square().sum(dim=2)
        return (square @ self._groups) / (3 * BOLTZMANN_KJ_PER_MOL_K * self._groups.sum(dim=0))

    def max_temperature_K(self, n_atoms: int) -> float:
        """Return the blow-up limit of the kinetic temperature of so many atoms.

        Equation: T q / 3N, where q is what a chi-squared variable of 3N degrees of freedom exceeds with probability 1e-15:
        never by chance, however long a run.
        """
        return self.temperature_K * float(chi2.isf(NEVER, 3 * n_atoms)) / (3 * n_atoms)

    def _line(self, what: str, replica: int, atom: int | None, time_ps: float) -> str:
        where = f"replica {self.first_replica + replica}"
        if atom is not None:
            label = f"{self.system.residue_names[atom]}{self.system.residue_indices[atom] + 1} {self.system.atom_names[atom]}"
            where += f", atom {atom} ({label})"
        return f"dynamics stopped at {time_ps:.4f} ps: {what} ({where}); {self.advice}"


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """How long a trajectory is and what is kept. All counts are (outer) steps; the first `n_discard` are equilibration.

    `n_inner` is the number of fast steps in an outer one; `save_forces` adds the forces to the frames.
    """

    dt: float
    n_discard: int
    n_steps: int
    save_every: int
    checkpoint_every: int
    n_inner: int = 1
    save_forces: bool = False

    @classmethod
    def of(
        cls,
        section: ReferenceConfig | TunedMDSampling | MTSSampling | STSSampling,
        *,
        dt: float,
        n_inner: int = 1,
        save_forces: bool = False,
    ) -> RunPlan:
        """Return the plan of a configuration section whose (outer) timestep is `dt` ps.

        Raises:
            LongstrideError: the time between frames is not a whole number of steps.
        """
        save_every = whole_steps(section.save_every_ps, dt)
        return cls(
            dt=dt,
            n_discard=round(section.equilibration_ps / dt),
            n_steps=round(section.length_ps / section.save_every_ps) * save_every,
            save_every=save_every,
            checkpoint_every=max(1, round(section.checkpoint_every_ps / dt)),
            n_inner=n_inner,
            save_forces=save_forces,
        )

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.n_discard + self.n_steps

    @property
    def n_frames(self) -> int:
        """Frames of the whole run."""
        return self.n_steps // self.save_every

    def time_ps(self, done: int) -> float:
        """Time after `done` steps; equilibration ends at zero."""
        return (done - self.n_discard) * self.dt

    def frames_until(self, done: int) -> int:
        """Frames saved in the first `done` steps."""
        return max(0, done - self.n_discard) // self.save_every

    def saves(self, done: int) -> bool:
        """Whether the state after `done` steps is a frame."""
        return done > self.n_discard and (done - self.n_discard) % self.save_every == 0


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """Saved frames and cost.

    Attributes:
        frames: positions (centre of mass at the origin), velocities [frame, replica, atom, 3] float32;
            potential_energy, kinetic_energy [frame, replica] float64; with `save_forces`, forces [frame, replica, atom, 3]
            float32. Velocities and kinetic energies are those of the half step (see `half_step_velocities`).
        final: state after the last step.
        production_s: wall seconds of the saved part, summed over attempts.
        discarded_s: wall seconds of equilibration, summed over attempts.
    """

    frames: dict[str, np.ndarray]
    final: MDState
    production_s: float
    discarded_s: float


class _Clock:
    """Wall seconds of equilibration and production, summed over attempts."""

    def __init__(self, *, production_s: float = 0.0, discarded_s: float = 0.0) -> None:
        self.production_s, self.discarded_s = production_s, discarded_s
        self._last = time.perf_counter()

    def book(self, *, discarded: bool) -> None:
        now = time.perf_counter()
        if discarded:
            self.discarded_s += now - self._last
        else:
            self.production_s += now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        return {"production_s": self.production_s, "discarded_s": self.discarded_s}


def run_trajectory(
    begin: Callable[[], MDState],
    step: Callable[[MDState, Generator], MDState],
    *,
    plan: RunPlan,
    generator: Generator,
    monitor: Monitor,
    store: StateFolder,
    equilibrate: Callable[[MDState, Generator], MDState] | None = None,
    progress: Callable[[float], None] | None = None,
) -> RunResult:
    """Run, or continue from the newest checkpoint in `store`, and return every saved frame.

    A checkpoint holds positions, velocities, both forces, the energy and the generator, so that a run that was killed and
    continued is bitwise the run that was not. When the monitor objects, the last good state is checkpointed and the
    frames until then are kept in `store`.

    Args:
        begin: makes the first state; not called when a checkpoint exists.
        step: advances a state by one (outer) step with the given generator.
        plan: lengths and intervals.
        generator: source of noise; its state is overwritten when a checkpoint is loaded.
        monitor: limits, checked after every step.
        store: open state folder.
        equilibrate: step of the discarded part, where it differs (such as a higher friction).
        progress: called with the number of finished steps.

    Raises:
        NumericsError: from the monitor, with the time of the last good state.
    """
    final, seconds = advance_trajectory(
        begin,
        step,
        plan=plan,
        generator=generator,
        monitor=monitor,
        store=store,
        equilibrate=equilibrate,
        progress=progress,
    )
    return RunResult(frames=collect_frames(store, plan), final=final, **seconds)


def advance_trajectory(
    begin: Callable[[], MDState],
    step: Callable[[MDState, Generator], MDState],
    *,
    plan: RunPlan,
    generator: Generator,
    monitor: Monitor,
    store: StateFolder,
    equilibrate: Callable[[MDState, Generator], MDState] | None = None,
    progress: Callable[[float], None] | None = None,
) -> tuple[MDState, dict[str, float]]:
    """Do the work of `run_trajectory` and leave the frames in `store`, for `collect_frames`.

    Returns:
        the last state; production_s and discarded_s as in `RunResult`.
    """
    saved = store.latest()
    clock = _Clock(**(saved.meta if saved else {}))
    if saved is None:
        md, done = begin(), 0
        monitor.check(md, time_ps=-plan.n_discard * plan.dt)
        clock.book(discarded=True)
        _save(store, plan, 0, found=(md, []), generator=generator, clock=clock)
    else:
        md, done = _restore(saved.arrays, generator), saved.step
    frames: list[dict[str, np.ndarray]] = []
    while done < plan.total:
        noise = generator.get_state()
        advance = equilibrate if equilibrate is not None and done < plan.n_discard else step
        following = advance(md, generator)
        try:
            monitor.check(following, time_ps=plan.time_ps(done + 1))
        except NumericsError as error:
            generator.set_state(noise)
            _save(store, plan, done, found=(md, frames), generator=generator, clock=clock)
            raise NumericsError(f"{error}; {_last_good(plan, done, store)}") from None
        md, done = following, done + 1
        clock.book(discarded=done <= plan.n_discard)
        if plan.saves(done):
            frames.append(_frame(md, plan))
        if done % plan.checkpoint_every == 0 or done == plan.total:
            _save(store, plan, done, found=(md, frames), generator=generator, clock=clock)
            frames = []
        if progress is not None:
            progress(done)
    return md, clock.seconds()


def _last_good(plan: RunPlan, done: int, store: StateFolder) -> str:
    return f"the last good state, {plan.time_ps(done):.4f} ps, is kept in {store.path}"


def _frame(md: MDState, plan: RunPlan) -> dict[str, np.ndarray]:
    velocities = half_step_velocities(md, dt=plan.dt, n_inner=plan.n_inner)
    # the centre of mass diffuses; single precision is spent on the shape instead
    centre = (md.masses[:, None] * md.positions).sum(dim=1, keepdim=True) / md.masses.sum()
    frame = {
        "positions": (md.positions - centre).to(torch.float32).numpy(),
        "velocities": velocities.to(torch.float32).numpy(),
        "potential_energy": md.potential_energy.numpy(),
        "kinetic_energy": replace(md, velocities=velocities).kinetic_energy.numpy(),
    }
    return {**frame, "forces": md.forces.to(torch.float32).numpy()} if plan.save_forces else frame


def _save(
    store: StateFolder,
    plan: RunPlan,
    done: int,
    *,
    found: tuple[MDState, list[dict[str, np.ndarray]]],
    generator: Generator,
    clock: _Clock,
) -> None:
    """Keep the frames since the last checkpoint as one block, named by its first frame, then checkpoint."""
    md, frames = found
    if frames:
        block = {key: np.stack([frame[key] for frame in frames]) for key in frames[0]}
        store.save_block(plan.frames_until(done) - len(frames), block)
    arrays = {key: getattr(md, key).numpy() for key in FIELDS if getattr(md, key) is not None}
    store.save(done, {**arrays, "generator": generator.get_state().numpy()}, clock.seconds())


def _restore(arrays: dict[str, np.ndarray], generator: Generator) -> MDState:
    generator.set_state(torch.from_numpy(arrays["generator"].copy()))
    return MDState(**{key: torch.from_numpy(arrays[key].copy()) for key in FIELDS if key in arrays})


def collect_frames(store: StateFolder, plan: RunPlan) -> dict[str, np.ndarray]:
    """Read the frames of a finished run back in order, as in `RunResult`; memory is that of the frames and one block.

    A block left by an attempt that died before its checkpoint was rewritten since.
    """
    frames: dict[str, np.ndarray] = {}
    first = 0
    while first < plan.n_frames:
        block = store.read_block(first)
        if not frames:
            frames = {key: np.empty((plan.n_frames, *value.shape[1:]), value.dtype) for key, value in block.items()}
        stop = first + len(block["positions"])
        for key, value in block.items():
            frames[key][first:stop] = value
        first = stop
    return frames
