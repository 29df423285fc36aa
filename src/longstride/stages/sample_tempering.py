"""Method `tempering`: parallel tempering on the batched force field, many ladders at once; exact."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from longstride.data.atomic import write_arrays
from longstride.data.checkpoint import fingerprint, open_state
from longstride.data.frames import read_trajectories, start_positions
from longstride.data.manifest import read_manifest, write_manifest
from longstride.dynamics.masses import repartitioned_masses
from longstride.fingerprints import code_version
from longstride.flows.transferable import BoundMolecule, TorsionMoves
from longstride.mcmc.kernel import cycle
from longstride.mcmc.local import Dynamics, ghmc, hmc
from longstride.mcmc.metropolis import boltzmann, checked_starts, noting, start_chains
from longstride.mcmc.tempering import (
    ScaledPotential,
    TemperingPlan,
    TemperingResult,
    geometric_ladder,
    run_tempering,
    scales_of,
)
from longstride.mcmc.timewarp import MOVES, repeated
from longstride.provenance import provenance
from longstride.seeds import job_seed
from longstride.stages.target import target_potential
from longstride.state import State
from longstride.systems import load_prepared
from longstride.units import FS_PS, thermal_energy

if TYPE_CHECKING:
    from pathlib import Path

    from longstride.config import PhysicsConfig, TemperingSampling
    from longstride.mcmc.kernel import ChainState, Kernel
    from longstride.systems import Prepared

THREADS = 1  # one core however many are granted, as for the other methods on the batched force field


def run_tempering_method(
    section: TemperingSampling,
    *,
    physics: PhysicsConfig,
    prepared: Path,
    reference: Path,
    out: Path,
    state: Path,
    seed: int,
    threads: int,
) -> None:
    """Write samples of the cold rung and the manifest; starts are reference frames from all basins, on every rung.

    Raises:
        LongstrideError: the batched engine does not know a force; no ladder fits the energies.
        DataError: a starting configuration has no finite energy or, with torsion moves, another handedness.
    """
    used = min(threads, THREADS)
    torch.set_num_threads(used)
    molecule = load_prepared(prepared)
    kT = thermal_energy(physics.temperature_K)
    source = read_manifest(reference, kind="reference", verify=False)["files"]
    version = code_version("sample_tempering")
    key = fingerprint(section.model_dump(), physics.model_dump(), molecule.system_hash, source, seed, version)
    ladder = _ladder(section, reference, cold_K=physics.temperature_K, kT=kT)
    kernel, chains = _chains(section, molecule, ladder, reference=reference, kT=kT, seed=seed)
    plan = TemperingPlan(
        temperatures_K=ladder,
        cycles=section.cycles,
        burn_in=section.burn_in,
        save_every=section.save_every,
        checkpoint_every=section.checkpoint_every,
    )
    with open_state(state, key) as folder:
        generator = torch.Generator().manual_seed(job_seed(seed, "chains"))
        result = run_tempering(kernel, chains, plan, generator=generator, folder=folder, label="sample tempering")
        _write(section, result, plan=plan, molecule=molecule, out=out, seed=seed, threads=used)
        folder.clear()


def _ladder(section: TemperingSampling, reference: Path, *, cold_K: float, kT: float) -> tuple[float, ...]:
    """Return the temperatures, from the variance of the reference's energies."""
    trajectories = read_trajectories(reference, fields=("potential_energy",))
    energy = np.concatenate([trajectory["potential_energy"].ravel() for trajectory in trajectories]).astype(np.float64)
    return geometric_ladder(
        cold_K, section.hottest_K, energy_variance=float(energy.var()), kT=kT, swap_acceptance=section.swap_acceptance
    )


def _chains(
    section: TemperingSampling,
    molecule: Prepared,
    ladder: tuple[float, ...],
    *,
    reference: Path,
    kT: float,
    seed: int,
) -> tuple[Kernel, ChainState]:
    """Return the local moves of all rungs, and all replicas at their starts."""
    engine = partial(
        target_potential, molecule, section.energies, compile=section.compile_energy, key="sample.tempering.energies"
    )
    scaled = ScaledPotential(engine(), scales_of(ladder).repeat(section.ladders))
    bound = BoundMolecule.of(molecule, engine(dtype=torch.float32), kT=kT) if section.torsion_moves else None
    dynamics = Dynamics(
        potential=scaled,
        kT=kT,
        masses=torch.from_numpy(repartitioned_masses(molecule.system, section.local_hydrogen_mass_Da)),
        dt=section.local_timestep_fs * FS_PS,
        steps=section.local_steps,
        contains=None if bound is None else bound.contains,
    )
    local = hmc(dynamics) if section.local_moves == "hmc" else ghmc(dynamics, friction=section.local_friction_per_ps)
    frames = start_positions(reference, count=section.ladders * len(ladder), seed=job_seed(seed, "starts"))
    x = State(positions=torch.from_numpy(frames))
    log_density = boltzmann(scaled, kT)
    if bound is None:
        return local, start_chains(log_density, x)
    advice = f"start from another reference than {reference}"
    chains = start_chains(log_density, checked_starts(bound.contains, x, advice=advice))
    moves = noting(log_density, TorsionMoves(molecule=bound), label=MOVES)
    return cycle(repeated(moves, section.torsion_moves), local), chains


def _write(
    section: TemperingSampling,
    result: TemperingResult,
    *,
    plan: TemperingPlan,
    molecule: Prepared,
    out: Path,
    seed: int,
    threads: int,
) -> None:
    temperatures = np.array(plan.temperatures_K)
    kT = thermal_energy(plan.temperatures_K[0])
    energies = -result.log_density * kT * temperatures / temperatures[0]
    arrays = {
        "positions": result.positions,
        "potential_energy": np.ascontiguousarray(energies[..., 0]),
        "rung_energies": energies,
    }
    write_arrays(out / "samples.safetensors", arrays)
    tally = result.tally
    content = {
        "system": molecule.system.name,
        "method": "tempering",
        "target": molecule.target,
        "invariance": "exact",
        "physical_time": False,
        "save_every": section.save_every,
        "seed": seed,
        "system_hash": molecule.system_hash,
        "temperature_K": plan.temperatures_K[0],
        "energies": section.energies,
        "temperatures_K": list(plan.temperatures_K),
        "swap_acceptance": [float(rate) for rate in result.swap_acceptance],
        "round_trips": int(result.round_trips.sum()),
        "round_trips_per_ladder": result.round_trips.tolist(),
        "counts": {"energy_calls": tally.energy_calls, "force_calls": tally.force_calls},
        "acceptance": tally.acceptance(section.local_moves),
        "acceptance_by_label": {name: tally.acceptance(name) for name in tally.proposed},
        "timing": {"sampling_s": tally.sampling_s, "burn_in_s": tally.burn_in_s, "threads": threads},
        "provenance": provenance(),
    }
    write_manifest(out, kind="samples", files=["samples.safetensors"], content=content)
    labels = ", ".join(f"{name} {value:.3f}" for name, value in content["acceptance_by_label"].items())
    rates = result.swap_acceptance
    print(
        f"tempering: {section.ladders} ladders of {len(temperatures)} rungs to {temperatures[-1]:.0f} K in"
        f" {tally.sampling_s:.1f} s; swaps {rates.min():.2f} to {rates.max():.2f},"
        f" {content['round_trips']} round trips, accepted {labels}"
    )
