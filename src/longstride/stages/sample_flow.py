"""Methods `timewarp` (exact) and `explore` (biased): Markov chains with flow proposals on the AMBER target."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from longstride.config import TimewarpSampling
from longstride.data.atomic import write_arrays
from longstride.data.checkpoint import fingerprint, open_state
from longstride.data.frames import start_positions
from longstride.data.manifest import read_manifest, write_manifest
from longstride.dynamics.masses import repartitioned_masses
from longstride.errors import DataError
from longstride.fingerprints import code_version
from longstride.mcmc.explore import explore
from longstride.mcmc.kernel import cycle
from longstride.mcmc.local import Dynamics, ghmc, hmc, langevin
from longstride.mcmc.metropolis import boltzmann, checked_starts, start_chains
from longstride.mcmc.run import Saved, Schedule, Tally, run
from longstride.mcmc.timewarp import MOVES, timewarp
from longstride.provenance import provenance
from longstride.seeds import job_seed
from longstride.stages.flow_models import open_flow
from longstride.stages.target import target_potential
from longstride.state import State
from longstride.systems import load_prepared
from longstride.units import FS_PS, thermal_energy

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from longstride.config import ExploreSampling
    from longstride.flows.bound import BoundFlow
    from longstride.mcmc.kernel import Kernel
    from longstride.potentials.base import Potential
    from longstride.stages.flow_models import OpenFlow
    from longstride.systems import Prepared

THREADS = 1  # one core however many are granted, as in training; repeats (seeds) are what runs side by side
LOCAL_LABELS = ("ghmc", "hmc", "langevin")


def run_timewarp(
    section: TimewarpSampling,
    *,
    prepared: Path,
    flow: Path,
    reference: Path | None,
    out: Path,
    state: Path,
    seed: int,
    threads: int,
) -> None:
    """Write samples of the chain to `out`; starts are reference frames from all basins, or states the flow knows.

    The chain is exact, unless its local moves are plain Langevin dynamics, which makes it unadjusted.
    """

    def make(flow: BoundFlow, potential: Potential, kT: float) -> Kernel:
        jumps = timewarp(
            flow,
            potential,
            kT=kT,
            independent_probability=section.independent_probability,
            batch=section.speculative,
            moves_probability=section.moves_probability,
        )
        local = local_moves(section, potential, kT=kT, contains=flow.contains)
        return jumps if local is None else cycle(jumps, local)

    folders = {"prepared": prepared, "flow": flow, "reference": reference, "out": out, "state": state}
    _sample("timewarp", section, make, folders=folders, seed=seed, threads=threads)


def run_explore(
    section: ExploreSampling,
    *,
    prepared: Path,
    flow: Path,
    reference: Path | None,
    out: Path,
    state: Path,
    seed: int,
    threads: int,
) -> None:
    """Write states of the biased exploration to `out`; starts as in `run_timewarp`."""

    def make(flow: BoundFlow, potential: Potential, kT: float) -> Kernel:
        rise = section.max_energy_rise_kJ_per_mol
        return explore(flow, potential, kT=kT, independent_probability=section.independent_probability, max_energy_rise=rise)

    folders = {"prepared": prepared, "flow": flow, "reference": reference, "out": out, "state": state}
    _sample("explore", section, make, folders=folders, seed=seed, threads=threads)


def local_moves(
    section: TimewarpSampling, potential: Potential, *, kT: float, contains: Callable[[State], torch.Tensor]
) -> Kernel | None:
    """Return the kernel of local dynamics that the section asks for, or None.

    Args:
        section: settings.
        potential: the target.
        kT: thermal energy, kJ/mol.
        contains: the domain of the flow, outside which no chain may go.
    """
    if section.local_moves == "none":
        return None
    dynamics = Dynamics(
        potential=potential,
        kT=kT,
        masses=torch.from_numpy(repartitioned_masses(potential.system, section.local_hydrogen_mass_Da)),
        dt=section.local_timestep_fs * FS_PS,
        steps=section.local_steps,
        contains=contains,
    )
    if section.local_moves == "hmc":
        return hmc(dynamics)
    kind = ghmc if section.local_moves == "ghmc" else langevin
    return kind(dynamics, friction=section.local_friction_per_ps)


def _sample(
    method: str,
    section: TimewarpSampling | ExploreSampling,
    make: Callable[[BoundFlow, Potential, float], Kernel],
    *,
    folders: dict[str, Any],
    seed: int,
    threads: int,
) -> None:
    used = min(threads, THREADS)
    torch.set_num_threads(used)
    molecule = load_prepared(folders["prepared"])
    engine = partial(
        target_potential, molecule, section.energies, compile=section.compile_energy, key=f"sample.{method}.energies"
    )
    potential, guide = engine(), engine(dtype=torch.float32)
    flow = open_flow(folders["flow"], molecule, guide, fitted_states=section.fitted_states)
    kT = thermal_energy(flow.temperature_K)
    x, source = _starts(folders, flow, molecule, count=section.chains, seed=job_seed(seed, "starts"))
    chains = start_chains(boltzmann(potential, kT), checked_starts(flow.bound.contains, x))
    generator = torch.Generator().manual_seed(job_seed(seed, "chains"))
    inputs = (molecule.system_hash, flow.files, source)
    key = fingerprint(section.model_dump(), inputs, seed, code_version("sample_flow"))
    at_once = section.speculative if isinstance(section, TimewarpSampling) else 1
    schedule = Schedule(
        steps=section.proposals // at_once,
        burn_in=section.burn_in // at_once,
        save_every=section.save_every // at_once,
        checkpoint_every=section.checkpoint_every // at_once,
    )
    kernel = make(flow.bound, potential, kT)
    with open_state(folders["state"], key) as folder:
        saved, tally = run(kernel, chains, schedule, generator=generator, folder=folder, label=method)
        identity = {"method": method, "invariance": kernel.invariance, "seed": seed, "threads": used}
        identity["temperature_K"] = flow.temperature_K
        _write(saved, tally, identity, section, molecule=molecule, out=folders["out"])
        folder.clear()


def _starts(
    folders: dict[str, Any], flow: OpenFlow, molecule: Prepared, *, count: int, seed: int
) -> tuple[State, dict[str, Any] | None]:
    """Return starting points of all chains and the checksums of where they come from.

    Raises:
        DataError: the reference is of another molecule, force field or temperature; there is none, and the flow knows no
            states.
    """
    if folders["reference"] is None:
        if flow.bound.states is None:
            raise DataError("this flow needs starting points: give the folder of a reference with --reference")
        chosen = torch.randint(len(flow.bound.states), (count,), generator=torch.Generator().manual_seed(seed))
        return State(positions=flow.bound.states[chosen]), None
    source = read_manifest(folders["reference"], kind="reference", verify=False)
    if source["system_hash"] != molecule.system_hash:
        raise DataError(f"{folders['reference']} belongs to another molecule or force field than {folders['prepared']}")
    if source["temperature_K"] != flow.temperature_K:
        hot, was = source["temperature_K"], flow.temperature_K
        raise DataError(f"{folders['reference']} is at {hot} K, but the flow in {folders['flow']} was trained at {was} K")
    frames = start_positions(folders["reference"], count=count, seed=seed)
    return State(positions=torch.from_numpy(frames)), source["files"]


def _write(
    saved: Saved,
    tally: Tally,
    identity: dict[str, Any],
    section: TimewarpSampling | ExploreSampling,
    *,
    molecule: Prepared,
    out: Path,
) -> None:
    energy = -saved.log_density * thermal_energy(identity["temperature_K"])
    arrays = {"positions": saved.positions, "potential_energy": energy, "acceptance": saved.acceptance}
    flow_labels = [name for name in tally.proposed if name not in (*LOCAL_LABELS, MOVES)]
    counts = {"energy_calls": tally.energy_calls, "proposals": sum(tally.proposed[name] for name in flow_labels)}
    if tally.force_calls:
        counts["force_calls"] = tally.force_calls
    write_arrays(out / "samples.safetensors", arrays)
    content = {
        "system": molecule.system.name,
        "method": identity["method"],
        "target": molecule.target,
        "invariance": identity["invariance"],
        "physical_time": False,
        "save_every": section.save_every,
        "seed": identity["seed"],
        "system_hash": molecule.system_hash,
        "temperature_K": identity["temperature_K"],
        "energies": section.energies,
        "counts": counts,
        "acceptance": tally.acceptance(*flow_labels),
        "acceptance_by_label": {name: tally.acceptance(name) for name in tally.proposed},
        "timing": {"sampling_s": tally.sampling_s, "burn_in_s": tally.burn_in_s, "threads": identity["threads"]},
        "provenance": provenance(),
    }
    write_manifest(out, kind="samples", files=["samples.safetensors"], content=content)
    rate = counts["proposals"] / max(tally.sampling_s, 1e-9)
    labels = ", ".join(f"{name} {value:.3f}" for name, value in content["acceptance_by_label"].items())
    print(f"{identity['method']}: {rate:.0f} proposals/s, accepted {content['acceptance']:.3f} ({labels})")
