"""Method `md`: OpenMM Langevin dynamics, the baseline on the AMBER target."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from longstride.data.atomic import write_arrays
from longstride.data.checkpoint import fingerprint, open_state
from longstride.data.frames import start_positions
from longstride.data.manifest import read_manifest, write_manifest
from longstride.dynamics.openmm_md import MDPlan, MDResult, run_trajectories
from longstride.fingerprints import code_version
from longstride.provenance import provenance
from longstride.systems import load_prepared

if TYPE_CHECKING:
    from pathlib import Path

    from longstride.config import MDSampling, PhysicsConfig


def run_md(
    section: MDSampling,
    *,
    physics: PhysicsConfig,
    prepared: Path,
    reference: Path,
    out: Path,
    state: Path,
    seed: int,
    threads: int,
) -> None:
    """Write `samples.safetensors` and its manifest; starts are reference frames from all basins."""
    molecule = load_prepared(prepared)
    plan = MDPlan.of(section, molecule, temperature_K=physics.temperature_K, seed=seed)
    source = read_manifest(reference, kind="reference", verify=False)["files"]
    key = fingerprint(section.model_dump(), physics.model_dump(), molecule.system_hash, source, seed, code_version("sample_md"))
    starts = start_positions(reference, count=section.chains, seed=seed)
    result = run_trajectories(plan, starts, state=state, key=key, workers=threads, label="sample md")
    _write(
        section,
        result,
        plan=plan,
        molecule_hash=molecule.system_hash,
        names=(molecule.system.name, molecule.target),
        out=out,
        threads=threads,
    )
    with open_state(state, key) as folder:
        folder.clear()


def _write(
    section: MDSampling, result: MDResult, *, plan: MDPlan, molecule_hash: str, names: tuple[str, str], out: Path, threads: int
) -> None:
    fields = ("positions", "velocities", "potential_energy", "kinetic_energy")
    arrays = {key: np.stack([frames[key] for frames in result.trajectories], axis=1) for key in fields}
    write_arrays(out / "samples.safetensors", arrays)
    steps = plan.frames * plan.steps_per_frame * section.chains
    content: dict[str, Any] = {
        "system": names[0],
        "method": "md",
        "target": names[1],
        "invariance": "unadjusted",
        "physical_time": True,
        "save_every": plan.save_every_ps,
        "seed": plan.seed,
        "system_hash": molecule_hash,
        "temperature_K": plan.temperature_K,
        "counts": {"force_calls": steps, "energy_calls": plan.frames * section.chains, "steps": steps},
        "acceptance": None,
        # trajectories run side by side, one per core: the machine is busy for the sum divided by the cores
        "timing": {
            "sampling_s": result.production_s / threads,
            "burn_in_s": result.equilibration_s / threads,
            "threads": threads,
        },
        "provenance": provenance(),
    }
    write_manifest(out, kind="samples", files=["samples.safetensors"], content=content)
    print(f"md: {section.chains} trajectories of {plan.length_ps:g} ps in {content['timing']['sampling_s']:.1f} s")
