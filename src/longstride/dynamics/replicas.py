"""Replicas on an expensive teacher: small groups, one pinned process each, killable at any moment.

A group of replicas shares every student call, and its process evaluates student and teacher in turn, so that all cores are
busy all the time. Groups have a fixed size and noise of their own: the number of processes does not change a result.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from longstride.data.checkpoint import open_state
from longstride.dynamics.groups import run_groups, side_by_side
from longstride.dynamics.integrators import MDState, baoab, respa_baoab, start, thermal_velocities
from longstride.dynamics.runner import Monitor, RunPlan, run_trajectory
from longstride.potentials.amber import compiler_available
from longstride.potentials.student import load_student
from longstride.potentials.teachers import TeacherSpec, open_teacher
from longstride.seeds import job_seed
from longstride.units import thermal_energy

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from longstride.potentials.base import Potential
    from longstride.systems import Prepared

GROUP = 4  # replicas: a student call for four costs little more than for one
LARGE_ATOMS = 200  # from here on a student call costs in proportion to its replicas, and every replica is a group
EQUILIBRATION_FRICTION_PER_PS = 10.0


@dataclass(frozen=True, kw_only=True)
class ReplicaJob:
    """What all groups have in common.

    Attributes:
        molecule: the prepared molecule.
        teacher: the expensive potential.
        charge: total charge in elementary charges.
        student: weights of the fast potential, or None for single-step dynamics.
        n_inner: inner steps per outer step; not used without a student.
        masses: [atom] Da.
        temperature_K: of the thermostat.
        friction_per_ps: [atom] of the thermostat, in the part that is kept.
        plan: lengths and intervals.
        max_slow_force: limit of the monitor, kJ/mol/nm.
        advice: end of the monitor's error line.
        seed: of velocities and noise; each group derives its own.
    """

    molecule: Prepared
    teacher: TeacherSpec
    charge: int
    student: Path | None
    n_inner: int
    masses: np.ndarray
    temperature_K: float
    friction_per_ps: np.ndarray
    plan: RunPlan
    max_slow_force: float
    advice: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class ReplicaResult:
    """Frames of all replicas and what they cost.

    Attributes:
        frames: positions, velocities [frame, replica, atom, 3] float32; potential_energy, kinetic_energy [frame, replica].
        production_s: wall seconds of the saved part, summed over groups and attempts.
        discarded_s: wall seconds of equilibration, likewise.
    """

    frames: dict[str, np.ndarray]
    production_s: float
    discarded_s: float


def run_replicas(job: ReplicaJob, starts: np.ndarray, *, state: Path, key: str, threads: int, label: str) -> ReplicaResult:
    """Run all replicas, in parallel processes where `threads` > 1, continuing what an earlier attempt finished.

    Args:
        job: what to run.
        starts: [replica, atom, 3] nm, float64.
        state: folder for checkpoints; holds one subfolder per group.
        key: fingerprint of everything that defines the trajectories.
        threads: processes to use, one core each.
        label: shown in the progress line.

    Raises:
        NumericsError: the monitor stopped a group; the last good state of every group is kept.
    """
    results = run_groups(
        partial(run_group, job),
        starts,
        size=group_size(job.molecule.system.n_atoms),
        steps=job.plan.total,
        state=state,
        key=key,
        threads=threads,
        label=label,
    )
    return ReplicaResult(
        frames=side_by_side([result.frames for result in results]),
        production_s=sum(result.production_s for result in results),
        discarded_s=sum(result.discarded_s for result in results),
    )


def group_size(n_atoms: int) -> int:
    """Return how many replicas share a process and every student call."""
    return 1 if n_atoms >= LARGE_ATOMS else GROUP


def run_group(
    job: ReplicaJob, first: int, starts: np.ndarray, *, folder: Path, key: str, progress: Callable[[float], None] | None = None
) -> ReplicaResult:
    """Run or continue one group; replica `first` of the job is its first."""
    torch.set_num_threads(1)  # tensors of a few replicas are too small to share between threads
    system = job.molecule.system
    student = None
    if job.student is not None:
        network = load_student(job.student, teacher=job.teacher.label_for(job.molecule))
        # a trajectory is long, so that half a minute of compiling pays
        student = network.bind(system, periodic=job.molecule.box is not None, compile=compiler_available())
    monitor = Monitor(
        system=system,
        temperature_K=job.temperature_K,
        max_slow_force=job.max_slow_force,
        advice=job.advice,
        first_replica=first,
    )
    with open_state(folder, key) as store, open_teacher(job.teacher, job.molecule, charge=job.charge) as teacher:
        result = run_trajectory(
            lambda: _begin(job, first, starts, teacher=teacher, student=student),
            _step(job, teacher, student, friction=job.friction_per_ps),
            plan=job.plan,
            generator=torch.Generator().manual_seed(job_seed(job.seed, "noise", first)),
            monitor=monitor,
            store=store,
            # a high friction carries off the energy by which frames of another potential are strained
            equilibrate=_step(job, teacher, student, friction=np.maximum(job.friction_per_ps, EQUILIBRATION_FRICTION_PER_PS)),
            progress=progress,
        )
    return ReplicaResult(frames=result.frames, production_s=result.production_s, discarded_s=result.discarded_s)


def _begin(job: ReplicaJob, first: int, starts: np.ndarray, *, teacher: Potential, student: Potential | None) -> MDState:
    positions, masses = torch.from_numpy(starts), torch.from_numpy(job.masses)
    generator = torch.Generator().manual_seed(job_seed(job.seed, "velocities", first))
    velocities = thermal_velocities(positions.shape, masses, thermal_energy(job.temperature_K), generator)
    box = None if job.molecule.box is None else torch.from_numpy(job.molecule.box).expand(len(positions), 3, 3).contiguous()
    return start(positions, velocities, masses=masses, potential=teacher, fast=student, box=box)


def _step(
    job: ReplicaJob, teacher: Potential, student: Potential | None, *, friction: np.ndarray
) -> Callable[[MDState, torch.Generator], MDState]:
    kT, dt, n_inner = thermal_energy(job.temperature_K), job.plan.dt, job.n_inner
    rate = torch.from_numpy(friction)
    if student is None:
        return lambda md, generator: baoab(md, potential=teacher, dt=dt, kT=kT, friction=rate, generator=generator)
    return lambda md, generator: respa_baoab(
        md, fast=student, slow=teacher, n_inner=n_inner, dt=dt, kT=kT, friction=rate, generator=generator
    )
