"""Stage `reference`: independent OpenMM trajectories started in different basins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longstride.data.checkpoint import fingerprint, open_state
from longstride.data.frames import write_trajectory
from longstride.data.manifest import write_manifest
from longstride.dynamics.masses import repartitioned_masses
from longstride.dynamics.openmm_md import MDPlan, run_trajectories
from longstride.dynamics.starts import basin_starts
from longstride.fingerprints import code_version
from longstride.provenance import provenance
from longstride.systems import load_prepared

if TYPE_CHECKING:
    from pathlib import Path

    from longstride.config import PhysicsConfig, ReferenceConfig


def run(
    section: ReferenceConfig, *, physics: PhysicsConfig, prepared: Path, out: Path, state: Path, seed: int, threads: int
) -> None:
    """Write trajectories and their manifest to `out`; continue from `state` where an earlier attempt stopped."""
    molecule = load_prepared(prepared)
    plan = MDPlan.of(section, molecule, temperature_K=physics.temperature_K, seed=seed)
    starts = basin_starts(molecule, section.trajectories)
    key = fingerprint(section.model_dump(), physics.model_dump(), molecule.system_hash, seed, code_version("reference"))
    result = run_trajectories(plan, starts, state=state, key=key, workers=threads, label="reference MD")
    out.mkdir(parents=True, exist_ok=True)
    files = [name for index, frames in enumerate(result.trajectories) for name in write_trajectory(out, index, frames)]
    content = {
        "system": molecule.system.name,
        "target": molecule.target,
        "system_hash": molecule.system_hash,
        "temperature_K": physics.temperature_K,
        "trajectories": section.trajectories,
        "frame_spacing_ps": section.save_every_ps,
        "timestep_fs": section.timestep_fs,
        "masses_Da": repartitioned_masses(molecule.system, section.hydrogen_mass_Da).tolist(),
        "threads": threads,
        "counts": {"force_calls": plan.frames * plan.steps_per_frame * section.trajectories},
        "wall_s": result.production_s + result.equilibration_s,
        "provenance": provenance(),
    }
    write_manifest(out, kind="reference", files=files, content=content)
    with open_state(state, key) as folder:
        folder.clear()
    total = section.trajectories * section.length_ps
    rate = total / max(result.production_s / threads, 1e-9)
    print(f"reference: {section.trajectories} trajectories, {total:g} ps, {rate:.3g} ps/s on {threads} cores")
