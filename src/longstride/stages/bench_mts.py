"""Speed of multi-time-step dynamics over single-step dynamics with the same teacher, measured in one run.

Everything is timed in the same processes, one per core, in turn: a complete step of each scheme, a teacher call, a student
call. With t_L and t_S the seconds of a call for all replicas, c = t_S / t_L, h the inner step and n inner steps per outer one,
the count of calls alone gives the gain over single steps of d:

    S = n h t_L / (d (t_L + n t_S)) = n h / d / (1 + n c).

Baselines are single steps of 1 fs, and of the longest stable single step at the scheme's own masses, which is found here: a
step is stable where short dynamics on the student (its stiff modes are the teacher's) keep hydrogen within 5 % of the
temperature of the thermostat. Whether a scheme keeps what it must is another question, answered on its trajectories.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from longstride.compute import pinned_workers
from longstride.data.manifest import read_manifest
from longstride.dynamics.integrators import MDState, baoab, half_step_velocities, respa_baoab, start, thermal_velocities
from longstride.dynamics.masses import repartitioned_masses
from longstride.dynamics.replicas import group_size
from longstride.errors import LongstrideError, NumericsError
from longstride.potentials.amber import compiler_available
from longstride.potentials.shipped_students import shipped_student
from longstride.potentials.student import load_student
from longstride.potentials.teachers import TeacherSpec, open_teacher
from longstride.provenance import provenance
from longstride.stages.bench_measure import memory_MiB, rates_in_turn
from longstride.stages.prepare import build
from longstride.state import State
from longstride.systems import Prepared, load_prepared
from longstride.units import BOLTZMANN_KJ_PER_MOL_K, FS_PS, thermal_energy

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from longstride.config import Config
    from longstride.potentials.base import Potential

LIGHT_DA, HEAVY_DA = None, 3.024
FRICTION_PER_PS = 1.0
SETTLE_STEPS, SCAN_PS = 20, 3.0
SINGLE_STEPS_FS = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5)
TOLERANCE = 0.05


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A multi-time-step scheme: `n_inner` steps of `inner_fs`, hydrogens of `hydrogen_mass_Da` (None: 1.008)."""

    inner_fs: float
    n_inner: int
    hydrogen_mass_Da: float | None = LIGHT_DA

    @property
    def name(self) -> str:
        """Such as "4 x 1 fs, H 1.008 Da"."""
        return f"{self.n_inner} x {self.inner_fs:g} fs, H {self.hydrogen_mass_Da or 1.008:g} Da"

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Read "4x1" or "3x2@3.024" (inner steps x femtoseconds @ hydrogen mass).

        Raises:
            LongstrideError: anything else.
        """
        body, _, mass = text.partition("@")
        count, _, inner = body.partition("x")
        try:
            scheme = cls(n_inner=int(count), inner_fs=float(inner), hydrogen_mass_Da=float(mass) if mass else None)
        except ValueError:
            raise LongstrideError(f"cannot read the scheme {text!r}; write such as 4x1 or 3x2@3.024") from None
        if scheme.n_inner < 1 or not scheme.inner_fs > 0:
            raise LongstrideError(f"scheme {text!r} needs one inner step or more, of a length above zero")
        return scheme


SCHEMES = (
    Scheme(n_inner=4, inner_fs=1.0),
    Scheme(n_inner=3, inner_fs=2.0, hydrogen_mass_Da=HEAVY_DA),
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured.

    Attributes:
        teacher: the expensive potential.
        student: its safetensors file.
        schemes: multi-time-step schemes.
        temperature_K: of the thermostat.
        threads: processes, one core each.
        replicas: per process; None: as many as `sample` puts into one.
        rounds: windows of each measurement.
        window_s: length of one.
    """

    teacher: TeacherSpec
    student: Path
    schemes: tuple[Scheme, ...] = SCHEMES
    temperature_K: float = 310.0
    threads: int = 1
    replicas: int | None = None
    rounds: int = 5
    window_s: float = 2.0

    @classmethod
    def of(
        cls,
        config: Config,
        molecule: Prepared,
        *,
        distill: Path | None,
        schemes: tuple[Scheme, ...],
        threads: int,
        replicas: int | None = None,
        quick: bool = False,
    ) -> Settings:
        """Return the settings of a configuration; `distill` is a stage folder, None takes the student of the package."""
        teacher = TeacherSpec.of(config.distill)
        if distill is None:
            student = shipped_student(molecule.system, teacher=teacher.label_for(molecule))
        else:
            read_manifest(distill, kind="distill")
            student = distill / "student.safetensors"
        return cls(
            teacher=teacher,
            student=student,
            schemes=schemes,
            temperature_K=config.physics.temperature_K,
            threads=threads,
            replicas=replicas,
            rounds=2 if quick else 5,
            window_s=0.2 if quick else 2.0,
        )


def molecule_of(config: Config, name: str, folder: Path | None) -> Prepared:
    """Return the molecule of a prepare folder, or prepare that of the configuration."""
    return build(config.system(name), config.physics) if folder is None else load_prepared(folder)


def mts(molecule: Prepared, settings: Settings) -> dict[str, Any]:
    """Return JSON values: calls and their cost, and for every scheme ps per day and gains over single steps.

    Args:
        molecule: whose dynamics; its positions are the start.
        settings: what is measured.

    Raises:
        DataError: the student is of another teacher.
        LongstrideError: teacher or student cannot treat the molecule.
        NumericsError: the dynamics became unstable while it was timed.
    """
    label = settings.teacher.label_for(molecule)
    load_student(settings.student, teacher=label).species_of(molecule.system)  # a refusal comes before any process starts
    stable = {
        mass: longest_single_step(molecule, settings, mass) for mass in {item.hydrogen_mass_Da for item in settings.schemes}
    }
    with pinned_workers(settings.threads) as pool:
        found = list(pool.map(partial(_measure, molecule, settings), range(settings.threads)))
    per_core = {name: [statistics.median(item["rates"][name]) for item in found] for name in found[0]["rates"]}
    replicas = found[0]["replicas"]
    teacher_s, student_s = (1 / statistics.mean(per_core[name]) for name in ("teacher", "student"))
    return {
        "system": molecule.system.name,
        "atoms": molecule.system.n_atoms,
        "periodic": molecule.box is not None,
        "teacher": label,
        "student": f"{settings.student.parent.name}/{settings.student.name}",
        "threads": settings.threads,
        "replicas_per_process": replicas,
        "teacher_ms": 1e3 * teacher_s,
        "student_ms": 1e3 * student_s,
        "c": student_s / teacher_s,
        "longest_single_step_fs": {f"{mass or 1.008:g} Da": value for mass, value in stable.items()},
        "schemes": [_row(item, stable[item.hydrogen_mass_Da], per_core, replicas) for item in settings.schemes],
        "rates_of_rounds": [item["rates"] for item in found],
        "peak_memory_MiB": max(item["memory_MiB"] or 0 for item in found),
        "provenance": provenance(),
    }


def _row(scheme: Scheme, longest_fs: float, per_core: dict[str, list[float]], replicas: int) -> dict[str, Any]:
    """Rates are (outer) steps per second; a gain is the ratio of simulated time per second."""

    def speed(name: str, step_fs: float) -> float:
        return sum(per_core[name]) * step_fs

    outer_fs = scheme.n_inner * scheme.inner_fs
    fast = speed(scheme.name, outer_fs)
    c = statistics.mean(per_core["teacher"]) / statistics.mean(per_core["student"])
    expected = outer_fs / (1 + scheme.n_inner * c)
    return {
        **asdict(scheme),
        "name": scheme.name,
        "outer_fs": outer_fs,
        "replica_ps_per_s": replicas * fast * FS_PS,
        "gain_over_1_fs": fast / speed("single step", 1.0),
        "gain_by_counting_calls": expected,
        "longest_single_step_fs": longest_fs,
        "gain_over_longest_single_step": fast / speed("single step", longest_fs),
    }


def _measure(molecule: Prepared, settings: Settings, index: int) -> dict[str, Any]:
    """Time everything in this process; the numbers of the other processes are taken at the same time."""
    torch.set_num_threads(1)
    student = _student(molecule, settings)
    replicas = settings.replicas or group_size(molecule.system.n_atoms)
    with open_teacher(settings.teacher, molecule, charge=molecule.charge) as teacher:
        runs = {"single step": _Run(molecule, settings, teacher, None, scheme=Scheme(n_inner=1, inner_fs=1.0), seed=index)}
        for number, scheme in enumerate(settings.schemes):
            runs[scheme.name] = _Run(molecule, settings, teacher, student, scheme=scheme, seed=100 * number + index)
        for run in runs.values():
            run.settle()
        state = runs["single step"].state()
        calls: dict[str, tuple[Callable[[], object], float]] = {
            "teacher": (lambda: teacher.energy_forces(state), 1.0),
            "student": (lambda: student.energy_forces(_nudged(state)), 1.0),
            **{name: (run.step, 1.0) for name, run in runs.items()},
        }
        rates = rates_in_turn(calls, rounds=settings.rounds, window_s=settings.window_s)
        for run in runs.values():
            run.check()
    return {
        "replicas": replicas,
        "rates": {name: list(rate.wall) for name, rate in rates.items()},
        "memory_MiB": memory_MiB("VmHWM"),
    }


def _nudged(state: State) -> State:
    """Move as far as an inner step does, so that neighbour tables are rebuilt as often as in dynamics."""
    shift = 0.004 * torch.randn(state.positions.shape, dtype=state.positions.dtype)
    return State(positions=state.positions + shift, box=state.box)


class _Run:
    """Dynamics of one scheme that goes on from call to call."""

    def __init__(
        self,
        molecule: Prepared,
        settings: Settings,
        slow: Potential,
        fast: Potential | None,
        *,
        scheme: Scheme,
        seed: int,
    ) -> None:
        replicas = settings.replicas or group_size(molecule.system.n_atoms)
        self._scheme, self._slow, self._fast = scheme, slow, fast
        self._kT = thermal_energy(settings.temperature_K)
        self._generator = torch.Generator().manual_seed(seed)
        masses = torch.from_numpy(repartitioned_masses(molecule.system, scheme.hydrogen_mass_Da))
        positions = torch.from_numpy(molecule.positions).expand(replicas, -1, -1).clone()
        velocities = thermal_velocities(positions.shape, masses, self._kT, self._generator)
        box = None if molecule.box is None else torch.from_numpy(molecule.box).expand(replicas, 3, 3).contiguous()
        self.md = start(positions, velocities, masses=masses, potential=slow, fast=fast, box=box)

    def settle(self) -> None:
        """Leave the minimum, so that what is timed is thermal."""
        for _ in range(SETTLE_STEPS):
            self.step(friction=20.0)

    def step(self, *, friction: float = FRICTION_PER_PS) -> None:
        """Advance one (outer) step."""
        scheme = self._scheme
        common: dict[str, Any] = {"kT": self._kT, "friction": friction, "generator": self._generator}
        dt = scheme.n_inner * scheme.inner_fs * FS_PS
        if self._fast is None:
            self.md = baoab(self.md, potential=self._slow, dt=dt, **common)
        else:
            self.md = respa_baoab(self.md, fast=self._fast, slow=self._slow, n_inner=scheme.n_inner, dt=dt, **common)

    def state(self) -> State:
        """Return the positions."""
        return State(positions=self.md.positions, box=self.md.box)

    def check(self) -> None:
        """Raise NumericsError where the dynamics left the realm of numbers."""
        if not bool(torch.isfinite(self.md.velocities).all()):
            raise NumericsError(f"the dynamics of {self._scheme.name} became unstable while it was timed; use a shorter step")


def _student(molecule: Prepared, settings: Settings) -> Potential:
    network = load_student(settings.student, teacher=settings.teacher.label_for(molecule))
    return network.bind(molecule.system, periodic=molecule.box is not None, compile=compiler_available())


def longest_single_step(molecule: Prepared, settings: Settings, hydrogen_mass_Da: float | None) -> float:
    """Return the longest stable single step in fs at these masses, in halves of a femtosecond; see the module's text."""
    student = _student(molecule, settings)
    numbers = torch.from_numpy(np.asarray(molecule.system.atomic_numbers))
    longest = SINGLE_STEPS_FS[0]
    for step_fs in SINGLE_STEPS_FS:
        scheme = Scheme(n_inner=1, inner_fs=step_fs, hydrogen_mass_Da=hydrogen_mass_Da)
        run = _Run(molecule, settings, student, None, scheme=scheme, seed=1)
        if not _keeps_temperature(run, scheme, numbers, settings.temperature_K):
            break
        longest = step_fs
    return longest


def _keeps_temperature(run: _Run, scheme: Scheme, numbers: torch.Tensor, temperature_K: float) -> bool:
    steps = round(SCAN_PS / (scheme.inner_fs * FS_PS))
    total = torch.zeros(len(numbers), dtype=torch.float64)
    for index in range(steps):
        run.step(friction=5.0)
        if index >= steps // 3:
            total += _temperatures(run.md, scheme)
        if not bool(torch.isfinite(run.md.velocities).all()):
            return False
    mean = total / (steps - steps // 3)
    return abs(float(mean[numbers == 1].mean()) / temperature_K - 1) < TOLERANCE


def _temperatures(md: MDState, scheme: Scheme) -> torch.Tensor:
    """Kinetic temperature of every atom, [atom] K."""
    velocities = half_step_velocities(md, dt=scheme.inner_fs * FS_PS)
    return (md.masses[:, None] * velocities.square()).sum(dim=2).mean(dim=0) / (3 * BOLTZMANN_KJ_PER_MOL_K)


def table(result: dict[str, Any]) -> str:
    """Return the result of `mts` as text."""
    lines = [
        f"{result['system']}: {result['atoms']} atoms, teacher {result['teacher']}, {result['threads']} processes of one core,"
        f" {result['replicas_per_process']} replicas each",
        f"  teacher {result['teacher_ms']:.2f} ms, student {result['student_ms']:.2f} ms a call: c = {result['c']:.3f};"
        f" peak memory {result['peak_memory_MiB']} MiB",
        f"  {'scheme':<28}{'outer':>9}{'x 1 fs':>9}{'counted':>9}{'x longest single step':>26}",
    ]
    for row in result["schemes"]:
        longest = f"{row['gain_over_longest_single_step']:.2f} ({row['longest_single_step_fs']:g} fs)"
        gains = f"{row['gain_over_1_fs']:>9.2f}{row['gain_by_counting_calls']:>9.2f}{longest:>26}"
        lines.append(f"  {row['name']:<28}{row['outer_fs']:>6g} fs{gains}")
    return "\n".join(lines)
