"""Stage `chains`: exact chains of one peptide with a transferable flow, or with torsion moves alone.

They are equilibrium samples, and so the training data of the next transferable flow: the first round has no flow at all
(torsion moves need none), each later one mixes the moves with proposals of the flow before it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from longstride.data.atomic import write_arrays
from longstride.data.checkpoint import fingerprint, open_state
from longstride.data.manifest import read_manifest, write_manifest
from longstride.fingerprints import code_version
from longstride.flows.transferable import BoundMolecule, TorsionMoves, bind_all
from longstride.flows.transferable_checkpoint import Physics, load_transferable
from longstride.mcmc.kernel import Kernel, mixture
from longstride.mcmc.metropolis import boltzmann, checked_starts, noting, start_chains
from longstride.mcmc.run import Saved, Schedule, Tally, run
from longstride.mcmc.timewarp import MOVES, flow_moves
from longstride.provenance import provenance
from longstride.seeds import job_seed
from longstride.stages.flow_models import WEIGHTS
from longstride.stages.target import target_potential
from longstride.state import State
from longstride.systems import load_prepared
from longstride.units import thermal_energy

if TYPE_CHECKING:
    from pathlib import Path

    from longstride.config import ChainsConfig, PhysicsConfig
    from longstride.flows.torsion_network import TorsionNetwork
    from longstride.mcmc.kernel import LogDensity
    from longstride.systems import Prepared

THREADS = 1  # peptides are what runs side by side


def run_chains(
    section: ChainsConfig,
    *,
    physics: PhysicsConfig,
    prepared: Path,
    flow: Path | None,
    out: Path,
    state: Path,
    seed: int,
    threads: int,
) -> None:
    """Write samples of exact chains to `out`; continue from `state` where an earlier attempt stopped.

    Args:
        section: lengths and probabilities.
        physics: temperature; the force field is that of `prepared`.
        prepared: folder of the prepare stage.
        flow: folder of the train-transfer stage, or None for torsion moves alone.
        out: folder to write.
        state: folder for checkpoints.
        seed: of the job.
        threads: cores granted.

    Raises:
        DataError: the flow was trained for another potential or temperature; a relaxed state lies outside the domain.
        LongstrideError: the batched engine cannot evaluate the molecule.
    """
    torch.set_num_threads(min(threads, THREADS))
    molecule = load_prepared(prepared)
    kT = thermal_energy(physics.temperature_K)
    network, files = None, None
    if flow is not None:
        files = read_manifest(flow, kind="transferable")["files"]
        network, trained_on = load_transferable(flow / WEIGHTS)
        trained_on.check(Physics.of(molecule, physics.temperature_K), path=flow)
    engine = partial(target_potential, molecule, section.energies, compile=section.compile_energy, key="chains.energies")
    # single precision does for what shapes proposals and decides nothing
    potential, guide = engine(), engine(dtype=torch.float32)
    bound = BoundMolecule.of(molecule, guide, kT=kT, fitted_states=section.fitted_states)
    kernel = peptide_kernel(bound, network, boltzmann(potential, kT), flow_probability=section.flow_probability)
    chains = start_chains(boltzmann(potential, kT), _starts(bound, section.chains, seed=seed, source=prepared))
    key = fingerprint(section.model_dump(), molecule.system_hash, physics.temperature_K, files, seed, code_version("chains"))
    schedule = Schedule(
        steps=section.steps,
        burn_in=section.burn_in,
        save_every=section.save_every,
        checkpoint_every=section.checkpoint_every,
    )
    with open_state(state, key) as folder:
        generator = torch.Generator().manual_seed(job_seed(seed, "chains"))
        saved, tally = run(
            kernel, chains, schedule, generator=generator, folder=folder, label=f"chains of {molecule.system.name}"
        )
        content = {"temperature_K": physics.temperature_K, "flow": files, "seed": seed, "save_every": section.save_every}
        _write(out, saved, tally, molecule=molecule, kernel=kernel, content=content)
        folder.clear()


def _starts(bound: BoundMolecule, count: int, *, seed: int, source: Path) -> State:
    """Return relaxed torsion states, drawn with replacement.

    Raises:
        DataError: one of them lies outside the domain, where its chain would never move.
    """
    generator = torch.Generator().manual_seed(job_seed(seed, "starts"))
    chosen = torch.randint(len(bound.states), (count,), generator=generator)
    advice = f"check the structure that {source} was made from"
    return checked_starts(bound.contains, State(positions=bound.states[chosen]), advice=advice)


def peptide_kernel(
    molecule: BoundMolecule, network: TorsionNetwork | None, log_density: LogDensity, *, flow_probability: float
) -> Kernel:
    """Return the mixture of torsion moves and of flow proposals, all labels alike; exact.

    Args:
        molecule: the molecule.
        network: the torsion network, or None for torsion moves alone.
        log_density: log pi up to a constant.
        flow_probability: of all flow proposals together.
    """
    moves = noting(log_density, TorsionMoves(molecule=molecule), label=MOVES)
    if network is None:
        return moves
    flow = bind_all(network, molecule)
    jumps = flow_moves(log_density, flow.proposals, (1.0 / len(flow.proposals),) * len(flow.proposals))
    return mixture((moves, jumps), (1.0 - flow_probability, flow_probability))


def _write(out: Path, saved: Saved, tally: Tally, *, molecule: Prepared, kernel: Kernel, content: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    energy = -saved.log_density * thermal_energy(content["temperature_K"])
    arrays = {"positions": saved.positions, "potential_energy": energy, "acceptance": saved.acceptance}
    write_arrays(out / "samples.safetensors", arrays)
    by_label = {name: tally.acceptance(name) for name in tally.proposed}
    full = {
        "system": molecule.system.name,
        "method": "chains",
        "target": molecule.target,
        "invariance": kernel.invariance,
        "physical_time": False,
        "system_hash": molecule.system_hash,
        "counts": {"energy_calls": tally.energy_calls, "proposals": sum(tally.proposed.values())},
        "acceptance": tally.acceptance(),
        "acceptance_by_label": by_label,
        "timing": {"sampling_s": tally.sampling_s, "burn_in_s": tally.burn_in_s, "threads": THREADS},
        "provenance": provenance(),
        **content,
    }
    write_manifest(out, kind="samples", files=["samples.safetensors"], content=full)
    rate = full["counts"]["proposals"] / max(tally.sampling_s, 1e-9)
    labels = ", ".join(f"{name} {value:.3f}" for name, value in by_label.items())
    print(f"chains of {molecule.system.name}: {rate:.0f} proposals/s, accepted {labels}")
