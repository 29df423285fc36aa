"""Method `tuned-md`: batched Langevin dynamics, the fastest plain dynamics this package knows on the AMBER target.

`md` is what a user of OpenMM would run; a speed-up over it alone would flatter a method that evaluates hundreds of
configurations at once, as this baseline does too.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from longstride.data.atomic import write_arrays
from longstride.data.checkpoint import fingerprint, open_state
from longstride.data.frames import start_positions
from longstride.data.manifest import read_manifest, write_manifest
from longstride.dynamics.batched_md import BatchedJob, BatchedResult, run_batched
from longstride.dynamics.masses import repartitioned_masses
from longstride.dynamics.runner import RunPlan
from longstride.errors import LongstrideError
from longstride.fingerprints import code_version
from longstride.potentials.amber import AmberPotential, compiler_available
from longstride.provenance import provenance
from longstride.seeds import job_seed
from longstride.systems import load_prepared
from longstride.units import FS_PS

if TYPE_CHECKING:
    from pathlib import Path

    from longstride.config import PhysicsConfig, TunedMDSampling
    from longstride.systems import Prepared


def run_tuned_md(
    section: TunedMDSampling,
    *,
    physics: PhysicsConfig,
    prepared: Path,
    reference: Path,
    out: Path,
    state: Path,
    seed: int,
    threads: int,
) -> None:
    """Write `samples.safetensors` and its manifest; starts are reference frames from all basins.

    Raises:
        LongstrideError: the batched force field does not know a force of the System.
        NumericsError: the dynamics diverged; the last good state is kept.
    """
    molecule = load_prepared(prepared)
    source = read_manifest(reference, kind="reference", verify=False)["files"]
    version = code_version("sample_tuned_md")
    key = fingerprint(section.model_dump(), physics.model_dump(), molecule.system_hash, source, seed, version)
    job = BatchedJob(
        system=molecule.system,
        masses=repartitioned_masses(molecule.system, section.hydrogen_mass_Da),
        temperature_K=physics.temperature_K,
        friction_per_ps=section.friction_per_ps,
        plan=RunPlan.of(section, dt=section.timestep_fs * FS_PS),
        potential=_potential(molecule, compile=section.compile_energy),
        advice="use a shorter sample.tuned_md.timestep_fs (2.5 is stable with hydrogens of 3.024 Da)",
        seed=seed,
    )
    starts = start_positions(reference, count=section.chains, seed=job_seed(seed, "starts"))
    result = run_batched(job, starts, state=state, key=key, threads=threads, label="sample tuned-md")
    _write(section, result, job=job, molecule=molecule, out=out)
    with open_state(state, key) as folder:
        folder.clear()


def _potential(molecule: Prepared, *, compile: bool | None) -> partial[AmberPotential]:
    """Return what makes the potential, in float32 (wrong by 1e-4 kT), having seen that it can be made."""
    compiled = compiler_available() if compile is None else compile
    make = partial(
        AmberPotential.from_openmm,
        molecule.openmm_system,
        molecule.system,
        name=molecule.target,
        dtype=torch.float32,
        compile=compiled,
    )
    try:
        make()
    except LongstrideError as error:
        raise LongstrideError(
            f"method tuned-md cannot run {molecule.system.name!r}: {error} (method md takes any force)"
        ) from error
    return make


def _write(section: TunedMDSampling, result: BatchedResult, *, job: BatchedJob, molecule: Prepared, out: Path) -> None:
    write_arrays(out / "samples.safetensors", result.frames())
    plan = result.plan
    steps = plan.n_steps * section.chains
    # groups run side by side, one per core: the machine is busy for the sum divided by the cores
    timing = {
        "sampling_s": result.production_s / result.processes,
        "burn_in_s": result.discarded_s / result.processes,
        "threads": result.processes,
    }
    content = {
        "system": molecule.system.name,
        "method": "tuned-md",
        "target": molecule.target,
        "invariance": "unadjusted",
        "physical_time": True,
        "save_every": section.save_every_ps,
        "seed": job.seed,
        "system_hash": molecule.system_hash,
        "temperature_K": job.temperature_K,
        "timestep_fs": section.timestep_fs,
        "masses_Da": job.masses.tolist(),
        "counts": {
            "force_calls": steps,
            "energy_calls": plan.n_frames * section.chains,
            "steps": steps,
            "burn_in_force_calls": plan.n_discard * section.chains,
        },
        "acceptance": None,
        "timing": timing,
        "provenance": provenance(),
    }
    write_manifest(out, kind="samples", files=["samples.safetensors"], content=content)
    rate = section.chains * section.length_ps / max(timing["sampling_s"], 1e-9)
    print(
        f"tuned-md: {section.chains} trajectories of {section.length_ps:g} ps in {timing['sampling_s']:.1f} s, {rate:.3g} ps/s"
        f" on {result.processes} cores"
    )
