"""Multi-time-step dynamics of a teacher and its student inside OpenMM, for its reporters, barostats and restraints.

Both potentials become `openmm.PythonForce`s: force group 0 is the student, of every inner step, group 1 is teacher minus
student, of every outer step, and `MTSLangevinIntegrator` does r-RESPA over the two with the thermostat innermost. It is the
step of `longstride.dynamics.integrators.respa_baoab`; at zero friction both give the same trajectory to round-off. The
answers of a potential are kept until atoms or box move, so an outer step costs n_inner calls of the student and one of the
teacher here as well, although OpenMM asks n_inner + 1 times for the student and the difference needs it once more.

One replica per simulation; `respa_baoab` is for many. Sources: doi:10.1063/1.463137 (r-RESPA),
doi:10.1021/acs.jpclett.9b00901 (BAOAB-RESPA), doi:10.1371/journal.pcbi.1005659 (OpenMM).
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import openmm
import torch
from openmm import app, unit

from longstride.errors import LongstrideError, NumericsError
from longstride.seeds import job_seed
from longstride.state import State
from longstride.units import FS_PS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from longstride.potentials.base import Potential

INNER_GROUP, OUTER_GROUP = 0, 1


@dataclass(frozen=True, kw_only=True)
class OpenMMPlan:
    """Steps and thermostat of one simulation.

    Attributes:
        dt_outer_fs: time between teacher evaluations, fs.
        n_inner: student evaluations per outer step, a positive whole number.
        temperature_K: of the heat bath.
        friction_per_ps: Langevin friction; zero means Newtonian dynamics.
        seed: of noise, first velocities and barostat.
    """

    dt_outer_fs: float
    n_inner: int
    temperature_K: float
    friction_per_ps: float
    seed: int

    def __post_init__(self) -> None:
        """Refuse what would be rounded or would make no sense.

        Raises:
            LongstrideError: `n_inner` is not a positive whole number, or a step, temperature or friction is out of range.
        """
        if not float(self.n_inner).is_integer() or self.n_inner < 1:
            raise LongstrideError(f"the number of inner steps must be a positive whole number, not {self.n_inner!r}")
        for name in ("dt_outer_fs", "temperature_K"):
            if not 0 < getattr(self, name) < np.inf:
                raise LongstrideError(f"{name} must be a positive number, not {getattr(self, name)!r}")
        if not 0 <= self.friction_per_ps < np.inf:
            raise LongstrideError(f"friction_per_ps must be zero or a positive number, not {self.friction_per_ps!r}")


def mts_simulation(
    start: State,
    topology: app.Topology,
    *,
    teacher: Potential,
    student: Potential,
    plan: OpenMMPlan,
    masses: np.ndarray | None = None,
    extra_forces: Sequence[openmm.Force] = (),
    platform: str = "Reference",
) -> app.Simulation:
    """Return an OpenMM simulation of the teacher's potential that calls the student in the inner steps.

    Equation: that of `longstride.dynamics.integrators.respa_baoab`, h = dt_outer / n_inner:
    v += dt/(2m) (F_L - F_S);  n_inner times [B_S(h/2) A(h/2) O(h) A(h/2) B_S(h/2)];  v += dt/(2m) (F_L - F_S).
    The potential energy is the teacher's (plus that of `extra_forces`). A potential that fails or gives a number that is not
    finite ends `step` with one line, and the context is put back to where that call began: OpenMM's `Simulation.step` makes
    calls of ten outer steps or fewer. The centre of mass is a degree of freedom: 3 N in all.

    Args:
        start: one replica, positions [1, atom, 3] nm; velocities nm/ps, drawn from Maxwell-Boltzmann where None; box
            [1, 3, 3] nm in OpenMM's reduced form, or None for an isolated molecule.
        topology: atoms and bonds of the same molecule, for reporters; it is copied.
        teacher: the potential that is sampled.
        student: the cheap potential of the inner steps.
        plan: steps, thermostat, seed.
        masses: [atom] Da, those of the molecule where None.
        extra_forces: barostat, restraints: force group 0 (OpenMM's default) acts every inner step, 1 every outer step. A
            Monte Carlo barostat needs a box, energies only, and the temperature of `plan`.
        platform: any that OpenMM offers; "Reference" is in double precision and has the least overhead for a small molecule.

    Raises:
        LongstrideError: atoms, masses, box or force groups do not fit together, a potential refuses the system or ignores
            the box, or OpenMM lacks the platform.
        NumericsError: a potential is not finite at the start.
    """
    start = _one_replica(start, teacher, student, topology)
    levels = _Levels(teacher, student, periodic=start.box is not None)
    levels.check(start)
    box = None if start.box is None else start.box[0].numpy()
    openmm_system = _openmm_system(teacher, levels, masses=masses, box=box)
    for force in extra_forces:
        openmm_system.addForce(_checked(force, plan, box))
    integrator = _Integrator(plan, openmm_system, levels)
    topology = copy.deepcopy(topology)
    topology.setPeriodicBoxVectors(box)
    try:
        simulation = app.Simulation(topology, openmm_system, integrator, openmm.Platform.getPlatformByName(platform))
        simulation.context.setPositions(start.positions[0].numpy())
    except openmm.OpenMMException as error:
        raise LongstrideError(f"OpenMM cannot simulate {teacher.system.name!r} on {platform}: {_line(error)}") from error
    if start.velocities is None:
        simulation.context.setVelocitiesToTemperature(plan.temperature_K, _openmm_seed(plan.seed, "velocities"))
    else:
        simulation.context.setVelocities(start.velocities[0].numpy())
    integrator.context = simulation.context
    return simulation


class _Integrator(openmm.MTSLangevinIntegrator):
    """MTSLangevinIntegrator over the two groups, which lets no force be dropped and puts a failed run back."""

    def __init__(self, plan: OpenMMPlan, system: openmm.System, levels: _Levels) -> None:
        groups = [(OUTER_GROUP, 1), (INNER_GROUP, int(plan.n_inner))]
        # plain numbers in OpenMM's own units: K, 1/ps, ps
        super().__init__(plan.temperature_K * unit.kelvin, plan.friction_per_ps, plan.dt_outer_fs * FS_PS, groups)
        self.setRandomNumberSeed(_openmm_seed(plan.seed, "noise"))
        self.context: openmm.Context | None = None
        self._system, self._levels = system, levels

    def step(self, steps: int) -> None:
        """Take outer steps.

        Raises:
            LongstrideError: a potential failed, or a force is in a group that is never evaluated.
            NumericsError: a potential or the positions are not finite.
        """
        for force in self._system.getForces():
            _require_listed_group(force)
        if self.context is None:
            raise LongstrideError("this integrator belongs to the simulation that mts_simulation returned; step that one")
        before = self.context.getState(positions=True, velocities=True)
        self._levels.failure = None
        try:
            super().step(steps)
        except openmm.OpenMMException as error:
            failure = self._levels.failure or NumericsError(f"OpenMM stopped: {_line(error)}")
            time_ps = before.getTime().value_in_unit(unit.picosecond)
            self.context.setState(before)
            if not isinstance(failure, LongstrideError):  # an interrupt from the keyboard stays one
                raise failure from error
            raise type(failure)(f"{failure}; the simulation stands at {time_ps:g} ps, where this call began") from error


class _Levels:
    """The two force groups as functions of an OpenMM State, and the first failure inside them."""

    def __init__(self, teacher: Potential, student: Potential, *, periodic: bool) -> None:
        self.teacher, self.student, self._periodic = _Remembered(teacher), _Remembered(student), periodic
        self.failure: BaseException | None = None

    def fast(self, state: openmm.State) -> tuple[float, np.ndarray]:
        """Return energy, kJ/mol, and forces [atom, 3], kJ/mol/nm, of the student."""
        with self._recording():
            return self.student(self._configuration(state))

    def correction(self, state: openmm.State) -> tuple[float, np.ndarray]:
        """Return energy and forces of teacher minus student, both at the positions of `state`."""
        with self._recording():
            x = self._configuration(state)
            energy, forces = self.teacher(x)
            fast_energy, fast_forces = self.student(x)
            return energy - fast_energy, forces - fast_forces

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Keep the exception that leaves a callback, an interrupt among them: OpenMM passes on its text only."""
        try:
            yield
        except BaseException as error:
            self.failure = self.failure or error
            raise

    def _configuration(self, state: openmm.State) -> State:
        """Return positions, and the box of periodic forces, of an OpenMM State (in nm, OpenMM's own unit)."""
        box = None
        if self._periodic:
            box = torch.from_numpy(np.array(state.getPeriodicBoxVectors(asNumpy=True)._value, dtype=np.float64))[None]
        positions = np.array(state.getPositions(asNumpy=True)._value, dtype=np.float64)
        return State(positions=torch.from_numpy(positions)[None], box=box)

    def check(self, start: State) -> None:
        """Evaluate both at the start, and in a box also with every other atom moved to its next image.

        Raises:
            LongstrideError: a potential refuses the system, or ignores the box.
            NumericsError: a number is not finite.
        """
        x = replace(start, velocities=None)
        for potential in (self.teacher, self.student):
            forces = potential(x)[1]
            if x.box is None:
                continue
            moved = x.positions.clone()
            moved[:, ::2] += x.box[:, 0]
            change = np.abs(potential(replace(x, positions=moved))[1] - forces).max()
            if change > 1.0 + 1e-3 * np.abs(forces).max():  # above what single precision can explain
                raise LongstrideError(
                    f"{potential.name} is not periodic: its forces change by {change:.3g} kJ/mol/nm when atoms move to their"
                    " images; leave the box out, or use a potential that reads State.box"
                )


class _Remembered:
    """A potential that keeps its last answer for as long as positions and box stay the same."""

    def __init__(self, potential: Potential) -> None:
        self._potential, self.name, self.calls = potential, potential.name, 0
        self._at: State | None = None
        self._answer: tuple[float, np.ndarray] = (np.nan, np.empty(0))

    def __call__(self, x: State) -> tuple[float, np.ndarray]:
        if self._at is None or not _same(self._at, x):
            self._answer = self._evaluate(x)
            self._at = x
        return self._answer

    def _evaluate(self, x: State) -> tuple[float, np.ndarray]:
        self._at = None  # nothing is remembered of a failed evaluation
        self.calls += 1
        try:
            energy, forces = self._potential.energy_forces(x)
        except LongstrideError:
            raise
        except Exception as error:  # whatever a foreign potential trips over
            raise LongstrideError(f"{self.name} failed: {type(error).__name__}: {_line(error)}") from error
        answer = float(energy[0]), forces[0].detach().to(device="cpu", dtype=torch.float64).numpy()
        if answer[1].shape != x.positions.shape[1:]:
            raise LongstrideError(f"{self.name} gives forces of shape {answer[1].shape} for {x.positions.shape[1]} atoms")
        if not (np.isfinite(answer[0]) and np.isfinite(answer[1]).all()):
            raise NumericsError(
                f"{self.name}: the energy or a force is not finite; use a shorter dt_outer_fs, heavier hydrogens, or a student"
                " distilled with more frames"
            )
        return answer


def _same(one: State, other: State) -> bool:
    if not torch.equal(one.positions, other.positions):
        return False
    return one.box is other.box or (one.box is not None and other.box is not None and torch.equal(one.box, other.box))


def _one_replica(start: State, teacher: Potential, student: Potential, topology: app.Topology) -> State:
    """Return the start in float64 on the CPU, after comparing molecule, student, topology and shapes."""
    system = teacher.system
    if not np.array_equal(system.atomic_numbers, student.system.atomic_numbers):
        raise LongstrideError(
            f"teacher {teacher.name} is bound to {system.name!r} but student {student.name} to other atoms, of"
            f" {student.system.name!r}; bind both to one system"
        )
    if topology.getNumAtoms() != system.n_atoms:
        raise LongstrideError(f"the topology has {topology.getNumAtoms()} atoms but {system.name!r} has {system.n_atoms}")
    atoms = (1, system.n_atoms, 3)
    return State(
        positions=_double("positions", start.positions, atoms),
        velocities=None if start.velocities is None else _double("velocities", start.velocities, atoms),
        box=None if start.box is None else _double("box", start.box, (1, 3, 3)),
    )


def _double(name: str, value: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    if tuple(value.shape) != shape:
        raise LongstrideError(f"{name} of shape {tuple(value.shape)}, expected {list(shape)}: one replica per simulation")
    return value.detach().to(device="cpu", dtype=torch.float64).contiguous()


def _openmm_system(teacher: Potential, levels: _Levels, *, masses: np.ndarray | None, box: np.ndarray | None) -> openmm.System:
    molecule = teacher.system
    masses = molecule.masses if masses is None else np.asarray(masses, dtype=np.float64)
    if masses.shape != (molecule.n_atoms,) or not (masses > 0).all():
        raise LongstrideError(
            f"masses must be {molecule.n_atoms} positive numbers in Da, one for each atom of {molecule.name!r}"
        )
    result = openmm.System()
    for mass in masses:
        result.addParticle(float(mass))
    if box is not None:
        try:
            result.setDefaultPeriodicBoxVectors(*(openmm.Vec3(*row) for row in box.tolist()))
        except openmm.OpenMMException as error:
            raise LongstrideError(f"OpenMM refuses the box of {molecule.name!r}: {_line(error)}") from error
    for group, name, function in ((INNER_GROUP, "student", levels.fast), (OUTER_GROUP, "teacher - student", levels.correction)):
        force = openmm.PythonForce(function)
        force.setName(name)
        force.setForceGroup(group)
        force.setUsesPeriodicBoundaryConditions(box is not None)
        result.addForce(force)
    # bonds without energy: they tell OpenMM what a molecule is, which a barostat moves and a reporter wraps as a whole
    bonds = openmm.HarmonicBondForce()
    bonds.setName("molecules")
    bonds.setForceGroup(INNER_GROUP)
    bonds.setUsesPeriodicBoundaryConditions(box is not None)
    for first, second in molecule.bonds:
        bonds.addBond(int(first), int(second), 0.1, 0.0)
    result.addForce(bonds)
    return result


def _checked(force: openmm.Force, plan: OpenMMPlan, box: np.ndarray | None) -> openmm.Force:
    """Return a force of the user's after comparing it with the plan; a barostat without a seed gets one."""
    _require_listed_group(force)
    if "Barostat" not in type(force).__name__:
        return force
    if box is None:
        raise LongstrideError(f"{type(force).__name__} needs a periodic system: give the start a box")
    temperature_K = force.getDefaultTemperature().value_in_unit(unit.kelvin)
    if not np.isclose(temperature_K, plan.temperature_K, rtol=1e-9):
        raise LongstrideError(
            f"{type(force).__name__} is set to {temperature_K:g} K but the thermostat to {plan.temperature_K:g} K; use one"
            " temperature"
        )
    if force.getRandomNumberSeed() == 0:  # OpenMM would draw one that differs from run to run
        force.setRandomNumberSeed(_openmm_seed(plan.seed, "barostat"))
    return force


def _require_listed_group(force: openmm.Force) -> None:
    """Refuse a force that the integrator would drop without a word."""
    if force.getForceGroup() not in (INNER_GROUP, OUTER_GROUP):
        raise LongstrideError(
            f"force {force.getName()!r} is in force group {force.getForceGroup()}, which multi-time-step dynamics never"
            f" evaluates; use setForceGroup({INNER_GROUP}) for every inner step or setForceGroup({OUTER_GROUP}) for every outer"
        )


def _openmm_seed(seed: int, purpose: str) -> int:
    return 1 + job_seed(seed, purpose) % (2**31 - 2)  # 0 would ask for a random seed


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
