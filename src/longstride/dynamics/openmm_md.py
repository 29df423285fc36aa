"""Molecular dynamics with OpenMM: independent trajectories, one pinned process per core, killable at any moment.

A trajectory advances in segments. A segment is a pure function of the state it starts from and of its own seed
(a fresh Context, float64 positions and velocities, a seed derived from trajectory and segment number), so a
run that was killed and continued is bitwise the run that was not.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import openmm
from openmm import unit

from longstride.compute import pinned_workers
from longstride.data.checkpoint import open_state
from longstride.dynamics.masses import repartitioned_masses
from longstride.errors import NumericsError
from longstride.progress import Progress
from longstride.seeds import job_seed
from longstride.units import FS_PS

if TYPE_CHECKING:
    from concurrent.futures import Future

    from longstride.config import MDSampling, ReferenceConfig
    from longstride.systems import Prepared


@dataclass(frozen=True, kw_only=True)
class MDPlan:
    """What one trajectory does. Lengths in ps, timestep in fs, friction in 1/ps, temperature in K."""

    system_xml: str
    temperature_K: float
    timestep_fs: float
    friction_per_ps: float
    equilibration_ps: float
    length_ps: float
    save_every_ps: float
    checkpoint_every_ps: float
    seed: int

    @classmethod
    def of(cls, section: ReferenceConfig | MDSampling, molecule: Prepared, *, temperature_K: float, seed: int) -> MDPlan:
        """Return the plan of a configuration section for a molecule, its hydrogen masses repartitioned."""
        masses = repartitioned_masses(molecule.system, section.hydrogen_mass_Da)
        return cls(
            system_xml=openmm.XmlSerializer.serialize(with_masses(molecule.openmm_system, masses)),
            temperature_K=temperature_K,
            timestep_fs=section.timestep_fs,
            friction_per_ps=section.friction_per_ps,
            equilibration_ps=section.equilibration_ps,
            length_ps=section.length_ps,
            save_every_ps=section.save_every_ps,
            checkpoint_every_ps=section.checkpoint_every_ps,
            seed=seed,
        )

    @property
    def steps_per_frame(self) -> int:
        """Integration steps between saved frames."""
        return round(self.save_every_ps / (self.timestep_fs * FS_PS))

    @property
    def frames(self) -> int:
        """Saved frames of the whole trajectory."""
        return round(self.length_ps / self.save_every_ps)

    @property
    def frames_per_segment(self) -> int:
        """Saved frames between checkpoints."""
        return max(1, round(self.checkpoint_every_ps / self.save_every_ps))

    @property
    def segments(self) -> int:
        """Segments of the whole trajectory."""
        return -(-self.frames // self.frames_per_segment)


@dataclass(frozen=True, kw_only=True)
class MDResult:
    """Trajectories and what they cost.

    Attributes:
        trajectories: one dict of arrays each: positions [frame, atom, 3] nm (float32, centre of mass at the origin; in a
            periodic box unwrapped, so that molecules are whole and displacements are those of diffusion), velocities,
            forces, potential_energy, kinetic_energy [frame] kJ/mol, time [frame] ps.
        production_s: wall seconds of the saved part, summed over trajectories.
        equilibration_s: wall seconds of the discarded part, summed over trajectories.
    """

    trajectories: list[dict[str, np.ndarray]]
    production_s: float
    equilibration_s: float


def with_masses(openmm_system: openmm.System, masses: np.ndarray) -> openmm.System:
    """Return a copy of an OpenMM System with other masses, [atom] Da."""
    result = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(openmm_system))
    for index, mass in enumerate(masses):
        result.setParticleMass(index, mass)
    return result


def run_trajectories(plan: MDPlan, starts: np.ndarray, *, state: Path, key: str, workers: int, label: str) -> MDResult:
    """Run one trajectory from each start, in parallel processes, continuing what an earlier attempt finished.

    Equation: LangevinMiddle (BAOAB-type) dynamics, doi:10.1021/acs.jpca.9b02771.

    Args:
        plan: length, step, thermostat; `plan.seed` is the seed of the set, each trajectory derives its own.
        starts: [trajectory, atom, 3] nm, float64.
        state: folder for checkpoints; holds one subfolder per trajectory.
        key: fingerprint of everything that defines the trajectories.
        workers: processes to use, one core each.
        label: shown in the progress line.

    Raises:
        NumericsError: an energy is not finite.
    """
    total = plan.frames * len(starts) * plan.save_every_ps
    with open_state(state, key) as folder, pinned_workers(workers) as pool:
        parts = [folder.path / f"trajectory_{index:02d}" for index in range(len(starts))]
        futures = [
            pool.submit(_run_one, plan, start, part, key, job_seed(plan.seed, index))
            for index, (start, part) in enumerate(zip(starts, parts, strict=True))
        ]
        _watch(futures, parts, plan, Progress(label, total, "ps", start=_done_ps(parts, plan)))
        results = [future.result() for future in futures]
        return MDResult(
            trajectories=[_collect(part, key, plan) for part in parts],
            production_s=sum(result[0] for result in results),
            equilibration_s=sum(result[1] for result in results),
        )


def _watch(futures: list[Future[tuple[float, float]]], parts: list[Path], plan: MDPlan, progress: Progress) -> None:
    while not all(future.done() for future in futures):
        for future in futures:
            if future.done():
                future.result()  # a failed trajectory ends the job at once
        time.sleep(0.2)
        progress.update(_done_ps(parts, plan))
    progress.update(plan.frames * len(parts) * plan.save_every_ps)


def _done_ps(parts: list[Path], plan: MDPlan) -> float:
    segments = sum(len(list(part.glob("block_*.safetensors"))) for part in parts)
    return min(segments * plan.frames_per_segment, plan.frames * len(parts)) * plan.save_every_ps


def _run_one(plan: MDPlan, start: np.ndarray, folder: Path, key: str, seed: int) -> tuple[float, float]:
    """Run or continue one trajectory; return wall seconds of production and of equilibration."""
    system = openmm.XmlSerializer.deserialize(plan.system_xml)
    with open_state(folder, key) as store:
        saved = store.latest()
        if saved is None:
            began = time.perf_counter()
            positions, velocities = _equilibrate(system, plan, start, seed, folder.name)
            timing = {"production_s": 0.0, "equilibration_s": time.perf_counter() - began}
            store.save(0, {"positions": positions, "velocities": velocities}, timing)
            segment = 0
        else:
            positions, velocities = saved.arrays["positions"], saved.arrays["velocities"]
            segment, timing = saved.step, dict(saved.meta)
        while segment < plan.segments:
            began = time.perf_counter()
            frames, positions, velocities = _segment(
                system, plan, (positions, velocities), segment=segment, seed=seed, label=folder.name
            )
            timing["production_s"] += time.perf_counter() - began
            store.save_block(segment, frames)
            segment += 1
            store.save(segment, {"positions": positions, "velocities": velocities}, timing)
    return timing["production_s"], timing["equilibration_s"]


def _context(system: openmm.System, plan: MDPlan, seed: int) -> openmm.Context:
    integrator = openmm.LangevinMiddleIntegrator(plan.temperature_K, plan.friction_per_ps, plan.timestep_fs * FS_PS)
    integrator.setRandomNumberSeed(1 + seed % (2**31 - 2))  # 0 would ask for a random seed
    platform = openmm.Platform.getPlatformByName("CPU")
    # particle-mesh Ewald sums in an order that depends on chance, unless told not to
    options = {"DeterministicForces": "true"} if system.usesPeriodicBoundaryConditions() else {}
    return openmm.Context(system, integrator, platform, {"Threads": "1", **options})


def _equilibrate(
    system: openmm.System, plan: MDPlan, start: np.ndarray, seed: int, label: str
) -> tuple[np.ndarray, np.ndarray]:
    context = _context(system, plan, job_seed(seed, "equilibration"))
    context.setPositions(start)
    openmm.LocalEnergyMinimizer.minimize(context, 10.0)
    context.setVelocitiesToTemperature(plan.temperature_K, 1 + seed % (2**31 - 2))
    _advance(context, round(plan.equilibration_ps / (plan.timestep_fs * FS_PS)), label, 0.0)
    state = context.getState(positions=True, velocities=True)
    return _array(state.getPositions(asNumpy=True)), _array(state.getVelocities(asNumpy=True))


def _segment(
    system: openmm.System, plan: MDPlan, phase: tuple[np.ndarray, np.ndarray], *, segment: int, seed: int, label: str
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    positions, velocities = phase
    context = _context(system, plan, job_seed(seed, "segment", segment))
    context.setPositions(positions)
    context.setVelocities(velocities)
    masses = np.array([system.getParticleMass(i).value_in_unit(unit.dalton) for i in range(system.getNumParticles())])
    first = segment * plan.frames_per_segment
    frames: list[dict[str, np.ndarray]] = []
    for index in range(first, min(first + plan.frames_per_segment, plan.frames)):
        time_ps = (index + 1) * plan.save_every_ps
        _advance(context, plan.steps_per_frame, label, time_ps)
        frames.append(_frame(context, masses, time_ps, label))
    state = context.getState(positions=True, velocities=True)
    stacked = {key: np.stack([frame[key] for frame in frames]) for key in frames[0]}
    return stacked, _array(state.getPositions(asNumpy=True)), _array(state.getVelocities(asNumpy=True))


def _advance(context: openmm.Context, steps: int, label: str, time_ps: float) -> None:
    try:
        context.getIntegrator().step(steps)
    except openmm.OpenMMException as error:
        raise NumericsError(_blow_up(label, time_ps)) from error


def _frame(context: openmm.Context, masses: np.ndarray, time_ps: float, label: str) -> dict[str, np.ndarray]:
    try:
        state = context.getState(positions=True, velocities=True, forces=True, energy=True)
    except openmm.OpenMMException as error:
        raise NumericsError(_blow_up(label, time_ps)) from error
    masses_total = masses.sum()
    positions = _array(state.getPositions(asNumpy=True))
    positions -= (masses[:, None] * positions).sum(axis=0) / masses_total
    with np.errstate(over="ignore", invalid="ignore"):  # what does not fit float32 is caught below
        frame: dict[str, np.ndarray] = {
            "positions": positions.astype(np.float32),
            "velocities": _array(state.getVelocities(asNumpy=True)).astype(np.float32),
            "forces": _array(state.getForces(asNumpy=True)).astype(np.float32),
            "potential_energy": np.array(state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)),
            "kinetic_energy": np.array(state.getKineticEnergy().value_in_unit(unit.kilojoule_per_mole)),
            "time": np.array(time_ps, dtype=np.float64),
        }
    if not all(np.isfinite(value).all() for value in frame.values()):
        raise NumericsError(_blow_up(label, time_ps))
    return frame


def _array(quantity: unit.Quantity) -> np.ndarray:
    return np.array(quantity._value, dtype=np.float64)  # OpenMM's own units are nm, ps, kJ/mol


def _blow_up(label: str, time_ps: float) -> str:
    return (
        f"{label}: the energy is not finite near {time_ps:g} ps; use a shorter timestep_fs (0.5 fs is safe without constraints)"
    )


def _collect(folder: Path, key: str, plan: MDPlan) -> dict[str, np.ndarray]:
    with open_state(folder, key) as store:
        blocks = [store.read_block(index) for index in range(plan.segments)]
    return {key: np.concatenate([block[key] for block in blocks]) for key in blocks[0]}
