"""Well-tempered metadynamics with OpenMM: walkers fill one bias together, then sample on it, frozen.

Filling: every walker lays hills of its own with `openmm.app.metadynamics.Metadynamics`; after each round all of them go on with
the sum of all hills (multiple walkers, doi:10.1021/jp054359r), in a fixed order, so that the result does not depend on which
finishes first. Sampling: hills stop, and every walker samples exp(-(U + V) / kT) with the same V; the weights exp(V / kT) then
lead back to exp(-U / kT) exactly, however well V is converged, and are on one scale for all walkers. A round is a pure function
of positions, velocities, bias and seed: a run that was killed and continued is bitwise the run that was not.
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import openmm
from openmm import app, unit
from openmm.app.metadynamics import BiasVariable, Metadynamics

from longstride.compute import pinned_workers
from longstride.data.checkpoint import open_state
from longstride.errors import LongstrideError, NumericsError
from longstride.progress import Progress
from longstride.seeds import job_seed
from longstride.units import FS_PS, thermal_energy

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import ProcessPoolExecutor

    from longstride.data.checkpoint import StateFolder

MOST_VARIABLES = 2
_LOADED = 2**31 - 1  # Metadynamics numbers itself below this, so that a bias of this number is always another's
_NEVER = 10**12  # steps


@dataclass(frozen=True, kw_only=True)
class Variable:
    """A collective variable, tabulated on a grid.

    Attributes:
        force_xml: serialised OpenMM force whose energy is the variable.
        low: smallest value.
        high: largest value; beyond the two there is no bias, unless the variable is periodic.
        width: standard deviation of hills.
        grid: points from `low` to `high`, both included.
        periodic: whether `low` and `high` are the same point.
    """

    force_xml: str
    low: float
    high: float
    width: float
    grid: int
    periodic: bool


def torsion_variable(atoms: Sequence[int], *, width: float, grid: int) -> Variable:
    """Return a torsion of four atoms as a variable, hills of `width` rad, `grid` intervals over the circle."""
    force = openmm.CustomTorsionForce("theta")
    force.addTorsion(*(int(atom) for atom in atoms), [])
    xml = openmm.XmlSerializer.serialize(force)
    return Variable(force_xml=xml, low=-math.pi, high=math.pi, width=width, grid=grid + 1, periodic=True)


@dataclass(frozen=True, kw_only=True)
class MetadynamicsPlan:
    """What the walkers do. Lengths in integration steps unless a name says otherwise.

    Attributes:
        system_xml: serialised OpenMM System, without bias.
        variables: one or two.
        temperature_K: of the thermostat.
        timestep_fs: of LangevinMiddle.
        friction_per_ps: of the thermostat.
        bias_factor: of well-tempering, above 1.
        height_kJ_per_mol: of the first hill.
        hill_every: between hills of a walker.
        steps_per_round: between exchanges of hills, and between checkpoints; a multiple of `hill_every` and `steps_per_frame`.
        equilibration: before the first round, without bias.
        fill_rounds: rounds with hills.
        rounds: rounds with the bias frozen.
        steps_per_frame: between saved frames.
        seed: of velocities and noise.
        advice: end of the error line when the dynamics diverges.
        platform: OpenMM platform; "Reference" is the fastest for a handful of atoms.
    """

    system_xml: str
    variables: tuple[Variable, ...]
    temperature_K: float
    timestep_fs: float
    friction_per_ps: float
    bias_factor: float
    height_kJ_per_mol: float
    hill_every: int
    steps_per_round: int
    equilibration: int
    fill_rounds: int
    rounds: int
    steps_per_frame: int
    seed: int
    advice: str = "use a shorter timestep"
    platform: str = "CPU"

    def __post_init__(self) -> None:
        if not 1 <= len(self.variables) <= MOST_VARIABLES:
            raise LongstrideError(f"metadynamics takes one or two variables, not {len(self.variables)}")
        if self.bias_factor <= 1 or self.steps_per_round % self.hill_every or self.steps_per_round % self.steps_per_frame:
            raise LongstrideError(
                "metadynamics needs a bias factor above 1 and rounds of whole hills and frames, not a factor of"
                f" {self.bias_factor:g} and {self.steps_per_round} steps with hills every {self.hill_every} and frames every"
                f" {self.steps_per_frame}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the bias: the first variable varies fastest."""
        return tuple(variable.grid for variable in reversed(self.variables))

    @property
    def round_ps(self) -> float:
        """Length of a round."""
        return self.steps_per_round * self.timestep_fs * FS_PS

    @property
    def frames_per_round(self) -> int:
        """Saved frames of a round."""
        return self.steps_per_round // self.steps_per_frame


@dataclass(frozen=True, kw_only=True)
class MetadynamicsResult:
    """Biased frames with their weights, the bias, and what they cost.

    Attributes:
        frames: positions, velocities [frame, walker, atom, 3] float32 nm, nm/ps; potential_energy (without the bias) and
            kinetic_energy [frame, walker] kJ/mol; log_weights [frame, walker] = V / kT, up to one constant for all.
        bias: V on the grid, kJ/mol, shape of `MetadynamicsPlan.shape`.
        production_s: wall seconds with the bias frozen, summed over walkers and attempts.
        fill_s: wall seconds before, likewise.
    """

    frames: dict[str, np.ndarray]
    bias: np.ndarray
    production_s: float
    fill_s: float


def run_metadynamics(
    plan: MetadynamicsPlan, starts: np.ndarray, *, state: Path, key: str, workers: int, label: str
) -> MetadynamicsResult:
    """Run all walkers, in parallel processes, continuing what an earlier attempt finished.

    Equation: hills h exp(-V(s) / (k dT)) exp(-|s - s_t|^2 / 2 w^2) with dT = T (bias_factor - 1)
    (doi:10.1103/PhysRevLett.100.020603); frames of the frozen bias weigh exp(V / kT).

    Args:
        plan: what to do.
        starts: [walker, atom, 3] nm.
        state: folder for checkpoints.
        key: fingerprint of everything that defines the run.
        workers: processes to use, one core each.
        label: shown in the progress line.

    Raises:
        NumericsError: the dynamics diverged; one line with walker, time and `plan.advice`.
    """
    with open_state(state, key) as store, pinned_workers(min(workers, len(starts))) as pool:
        found = store.latest()
        if found is None:
            arrays, timing = _begin(plan, starts, pool)
            first = 0
            store.save(first, arrays, timing)
        else:
            arrays, timing, first = found.arrays, dict(found.meta), found.step
        total = plan.fill_rounds + plan.rounds
        progress = Progress(label, total * plan.round_ps * len(starts), "ps", start=first * plan.round_ps * len(starts))
        for index in range(first, total):
            arrays = _round(plan, arrays, pool, index=index, store=store, timing=timing)
            note = "filling" if index < plan.fill_rounds else "bias frozen"
            progress.update((index + 1) * plan.round_ps * len(starts), note)
        blocks = [store.read_block(index) for index in range(plan.rounds)]
        return MetadynamicsResult(
            frames={name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]},
            bias=arrays["bias"],
            production_s=timing["production_s"],
            fill_s=timing["fill_s"],
        )


def _begin(
    plan: MetadynamicsPlan, starts: np.ndarray, pool: ProcessPoolExecutor
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    futures = [pool.submit(_equilibrate, plan, start, walker) for walker, start in enumerate(starts)]
    results = [future.result() for future in futures]
    arrays = {name: np.stack([result[name] for result in results]) for name in ("positions", "velocities")}
    return {**arrays, "bias": np.zeros(plan.shape)}, {"production_s": 0.0, "fill_s": sum(r["wall_s"] for r in results)}


def _round(
    plan: MetadynamicsPlan,
    arrays: dict[str, np.ndarray],
    pool: ProcessPoolExecutor,
    *,
    index: int,
    store: StateFolder,
    timing: dict[str, float],
) -> dict[str, np.ndarray]:
    """Advance all walkers by one round and store what they did."""
    filling = index < plan.fill_rounds
    work = _fill if filling else _sample
    futures = [
        pool.submit(work, plan, (x, v), arrays["bias"], walker=walker, index=index)
        for walker, (x, v) in enumerate(zip(arrays["positions"], arrays["velocities"], strict=True))
    ]
    results = [future.result() for future in futures]
    bias = arrays["bias"]
    if filling:
        bias = bias + sum(result["hills"] for result in results)
    else:
        names = ("positions", "velocities", "potential_energy", "kinetic_energy", "log_weights")
        frames = {name: np.stack([result["frames"][name] for result in results], axis=1) for name in names}
        store.save_block(index - plan.fill_rounds, frames)
    timing["fill_s" if filling else "production_s"] += sum(result["wall_s"] for result in results)
    after = {name: np.stack([result[name] for result in results]) for name in ("positions", "velocities")}
    store.save(index + 1, {**after, "bias": bias}, timing)
    return {**after, "bias": bias}


def _integrator(plan: MetadynamicsPlan, seed: int) -> openmm.LangevinMiddleIntegrator:
    integrator = openmm.LangevinMiddleIntegrator(plan.temperature_K, plan.friction_per_ps, plan.timestep_fs * FS_PS)
    integrator.setRandomNumberSeed(1 + seed % (2**31 - 2))  # 0 would ask for a random seed
    return integrator


def _simulation(plan: MetadynamicsPlan, system: openmm.System, seed: int) -> app.Simulation:
    platform = openmm.Platform.getPlatformByName(plan.platform)
    options = {"Threads": "1"} if plan.platform == "CPU" else {}
    return app.Simulation(app.Topology(), system, _integrator(plan, seed), platform, options)


def _equilibrate(plan: MetadynamicsPlan, start: np.ndarray, walker: int) -> dict[str, Any]:
    began = time.perf_counter()
    seed = job_seed(plan.seed, "equilibration", walker)
    simulation = _simulation(plan, openmm.XmlSerializer.deserialize(plan.system_xml), seed)
    simulation.context.setPositions(start)
    openmm.LocalEnergyMinimizer.minimize(simulation.context, 10.0)
    simulation.context.setVelocitiesToTemperature(plan.temperature_K, 1 + seed % (2**31 - 2))
    _checked(simulation.step, plan.equilibration, plan=plan, walker=walker, index=0)
    return {**_phase(simulation.context), "wall_s": time.perf_counter() - began}


def _biased(
    plan: MetadynamicsPlan, phase: tuple[np.ndarray, np.ndarray], bias: np.ndarray, *, seed: int
) -> tuple[app.Simulation, Metadynamics, int]:
    """Return a simulation at `phase` under `bias`, what lays its hills, and the force group of the bias."""
    system = openmm.XmlSerializer.deserialize(plan.system_xml)
    variables = [
        BiasVariable(
            openmm.XmlSerializer.deserialize(variable.force_xml),
            variable.low,
            variable.high,
            variable.width,
            variable.periodic,
            variable.grid,
        )
        for variable in plan.variables
    ]
    # reading a folder at the start is how Metadynamics takes over hills; this one is read once and never written again
    with tempfile.TemporaryDirectory(prefix="longstride-bias-") as folder:
        np.save(Path(folder) / f"bias_{_LOADED}_1.npy", bias)
        metadynamics = Metadynamics(
            system,
            variables,
            plan.temperature_K,
            plan.bias_factor,
            plan.height_kJ_per_mol,
            plan.hill_every,
            saveFrequency=plan.hill_every * _NEVER,
            biasDir=folder,
        )
    simulation = _simulation(plan, system, seed)
    simulation.context.setPositions(phase[0])
    simulation.context.setVelocities(phase[1])
    return simulation, metadynamics, system.getForce(system.getNumForces() - 1).getForceGroup()


def _fill(
    plan: MetadynamicsPlan, phase: tuple[np.ndarray, np.ndarray], bias: np.ndarray, *, walker: int, index: int
) -> dict[str, Any]:
    """Lay hills for one round; they are returned on the grid, kJ/mol."""
    began = time.perf_counter()
    simulation, metadynamics, _ = _biased(plan, phase, bias, seed=job_seed(plan.seed, "round", index, walker))
    _checked(metadynamics.step, simulation, plan.steps_per_round, plan=plan, walker=walker, index=index)
    # its free energy is -bias_factor / (bias_factor - 1) times the bias
    free_energy = metadynamics.getFreeEnergy().value_in_unit(unit.kilojoule_per_mole)
    hills = -free_energy * (plan.bias_factor - 1) / plan.bias_factor - bias
    return {**_phase(simulation.context), "hills": hills, "wall_s": time.perf_counter() - began}


def _sample(
    plan: MetadynamicsPlan, phase: tuple[np.ndarray, np.ndarray], bias: np.ndarray, *, walker: int, index: int
) -> dict[str, Any]:
    """Sample one round on the frozen bias."""
    began = time.perf_counter()
    simulation, _, group = _biased(plan, phase, bias, seed=job_seed(plan.seed, "round", index, walker))
    frames = []
    for _ in range(plan.frames_per_round):
        _checked(simulation.step, plan.steps_per_frame, plan=plan, walker=walker, index=index)
        frames.append(_frame(plan, simulation.context, group, walker=walker, index=index))
    stacked = {name: np.stack([frame[name] for frame in frames]) for name in frames[0]}
    return {**_phase(simulation.context), "frames": stacked, "wall_s": time.perf_counter() - began}


def _frame(plan: MetadynamicsPlan, context: openmm.Context, group: int, *, walker: int, index: int) -> dict[str, np.ndarray]:
    state = _checked(context.getState, plan=plan, walker=walker, index=index, positions=True, velocities=True, energy=True)
    biased = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
    # the very bias that acted on the atoms, interpolation included, so that weights are exact on any grid
    bias = context.getState(energy=True, groups={group}).getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
    frame = {
        "positions": _array(state.getPositions(asNumpy=True)).astype(np.float32),
        "velocities": _array(state.getVelocities(asNumpy=True)).astype(np.float32),
        "potential_energy": np.array(biased - bias),
        "kinetic_energy": np.array(state.getKineticEnergy().value_in_unit(unit.kilojoule_per_mole)),
        "log_weights": np.array(bias / thermal_energy(plan.temperature_K)),
    }
    if not all(np.isfinite(value).all() for value in frame.values()):
        raise NumericsError(_diverged(plan, walker, index))
    return frame


def _phase(context: openmm.Context) -> dict[str, np.ndarray]:
    state = context.getState(positions=True, velocities=True)
    return {
        "positions": _array(state.getPositions(asNumpy=True)),
        "velocities": _array(state.getVelocities(asNumpy=True)),
    }


def _array(quantity: unit.Quantity) -> np.ndarray:
    return np.array(quantity._value, dtype=np.float64)  # OpenMM's own units are nm, ps, kJ/mol


def _checked(act: Any, *args: Any, plan: MetadynamicsPlan, walker: int, index: int, **kwargs: bool) -> Any:  # noqa: ANN401 - any call
    """Call OpenMM; what it raises when atoms fly apart becomes one clear line."""
    try:
        return act(*args, **kwargs)
    except openmm.OpenMMException as error:
        raise NumericsError(_diverged(plan, walker, index)) from error


def _diverged(plan: MetadynamicsPlan, walker: int, index: int) -> str:
    after = index * plan.round_ps
    return f"metadynamics, walker {walker}: the energy is not finite within {plan.round_ps:g} ps of {after:g} ps; {plan.advice}"
