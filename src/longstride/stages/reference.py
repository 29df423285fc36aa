"""Stage `reference`: independent trajectories by OpenMM or on the batched force field.

Isolated molecules start in different basins of their backbone; in a periodic box, where turned torsions would run into
water, all trajectories start from the prepared structure and differ by their velocities and noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from longstride.data.checkpoint import fingerprint, open_state
from longstride.data.frames import write_trajectory
from longstride.data.manifest import write_manifest
from longstride.dynamics.batched_md import BatchedJob, run_batched
from longstride.dynamics.masses import repartitioned_masses
from longstride.dynamics.openmm_md import MDPlan, run_trajectories
from longstride.dynamics.runner import RunPlan
from longstride.dynamics.starts import basin_starts
from longstride.errors import LongstrideError
from longstride.fingerprints import code_version
from longstride.provenance import provenance
from longstride.stages.target import target_potential
from longstride.systems import box_values, load_prepared
from longstride.units import FS_PS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from longstride.config import PhysicsConfig, ReferenceConfig
    from longstride.systems import Prepared


def run(
    section: ReferenceConfig, *, physics: PhysicsConfig, prepared: Path, out: Path, state: Path, seed: int, threads: int
) -> None:
    """Write trajectories and their manifest to `out`; continue from `state` where an earlier attempt stopped.

    Raises:
        NumericsError: the dynamics diverged.
        LongstrideError: engine `batched` does not know a force of the System, or the system is periodic.
    """
    molecule = load_prepared(prepared)
    starts = _starts(molecule, section)
    key = fingerprint(section.model_dump(), physics.model_dump(), molecule.system_hash, seed, code_version("reference"))
    engine = _openmm if section.engine == "openmm" else _batched
    made = engine(section, molecule, starts, physics=physics, state=state, key=key, seed=seed, threads=threads)
    out.mkdir(parents=True, exist_ok=True)
    files = [
        name
        for index, frames in enumerate(made.trajectories)
        for name in write_trajectory(out, index, frames, box=molecule.box)
    ]
    steps = round(section.length_ps / (section.timestep_fs * FS_PS)) * section.trajectories
    content = {
        "system": molecule.system.name,
        "target": molecule.target,
        "system_hash": molecule.system_hash,
        "temperature_K": physics.temperature_K,
        "engine": section.engine,
        "trajectories": section.trajectories,
        "frame_spacing_ps": section.save_every_ps,
        "box_nm": box_values(molecule.box),
        "timestep_fs": section.timestep_fs,
        "masses_Da": repartitioned_masses(molecule.system, section.hydrogen_mass_Da).tolist(),
        "threads": made.processes,
        "counts": {"force_calls": steps},
        "wall_s": made.production_s + made.equilibration_s,
        "provenance": provenance(),
    }
    write_manifest(out, kind="reference", files=files, content=content)
    with open_state(state, key) as folder:
        folder.clear()
    total = section.trajectories * section.length_ps
    rate = total / max(made.production_s / made.processes, 1e-9)
    print(f"reference: {section.trajectories} trajectories, {total:g} ps, {rate:.3g} ps/s on {made.processes} cores")


def _starts(molecule: Prepared, section: ReferenceConfig) -> np.ndarray:
    """Return where the trajectories start, [trajectory, atom, 3] nm."""
    if molecule.box is None:
        return basin_starts(molecule, section.trajectories)
    if section.engine != "openmm":
        raise LongstrideError(
            f"reference.engine: {section.engine} handles isolated molecules, {molecule.system.name!r} lies in a periodic"
            " box; set reference.engine: openmm"
        )
    return np.repeat(molecule.positions[None], section.trajectories, axis=0)


@dataclass(frozen=True, kw_only=True)
class _Made:
    """Trajectories, made or read as they are asked for, and what they cost.

    Attributes:
        trajectories: frames of each, with the fields of `write_trajectory`.
        production_s: wall seconds of the saved part, summed over processes.
        equilibration_s: wall seconds of the discarded part, summed over processes.
        processes: cores in use.
    """

    trajectories: Iterator[dict[str, np.ndarray]]
    production_s: float
    equilibration_s: float
    processes: int


def _openmm(
    section: ReferenceConfig,
    molecule: Prepared,
    starts: np.ndarray,
    *,
    physics: PhysicsConfig,
    state: Path,
    key: str,
    seed: int,
    threads: int,
) -> _Made:
    plan = MDPlan.of(section, molecule, temperature_K=physics.temperature_K, seed=seed)
    result = run_trajectories(plan, starts, state=state, key=key, workers=threads, label="reference MD")
    return _Made(
        trajectories=iter(result.trajectories),
        production_s=result.production_s,
        equilibration_s=result.equilibration_s,
        processes=threads,
    )


def _batched(
    section: ReferenceConfig,
    molecule: Prepared,
    starts: np.ndarray,
    *,
    physics: PhysicsConfig,
    state: Path,
    key: str,
    seed: int,
    threads: int,
) -> _Made:
    # single precision is wrong by 1e-4 kT, far below the error of the timestep, and several times faster
    potential = partial(
        target_potential, molecule, "batched", compile=section.compile_energy, dtype=torch.float32, key="reference.engine"
    )
    potential()  # a refusal comes before any process starts
    job = BatchedJob(
        system=molecule.system,
        masses=repartitioned_masses(molecule.system, section.hydrogen_mass_Da),
        temperature_K=physics.temperature_K,
        friction_per_ps=section.friction_per_ps,
        plan=RunPlan.of(section, dt=section.timestep_fs * FS_PS, save_forces=True),
        potential=potential,
        advice="use a shorter reference.timestep_fs (2.5 is stable with hydrogens of 3.024 Da)",
        seed=seed,
    )
    result = run_batched(job, starts, state=state, key=key, threads=threads, label="reference MD")
    return _Made(
        trajectories=_one_by_one(result.groups(), section.save_every_ps),
        production_s=result.production_s,
        equilibration_s=result.discarded_s,
        processes=result.processes,
    )


def _one_by_one(groups: Iterator[dict[str, np.ndarray]], save_every_ps: float) -> Iterator[dict[str, np.ndarray]]:
    """Split frames [frame, replica, ...] of groups into trajectories, holding one group at a time."""
    for frames in groups:
        count, replicas = frames["potential_energy"].shape
        time = save_every_ps * np.arange(1, count + 1)
        for replica in range(replicas):
            yield {**{name: np.ascontiguousarray(value[:, replica]) for name, value in frames.items()}, "time": time}
