"""Stage `flow`: train the internal-coordinate conditional flow on lagged pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from longstride.data.atomic import write_text
from longstride.data.checkpoint import fingerprint, open_state
from longstride.data.manifest import read_manifest, write_manifest
from longstride.data.shards import load_pairs
from longstride.errors import DataError
from longstride.fingerprints import code_version
from longstride.flows.checkpoint import save_flow
from longstride.flows.internal import FlowArchitecture, InternalFlow
from longstride.flows.zmatrix import build_zmatrix
from longstride.mcmc.metropolis import boltzmann, log_ratio
from longstride.potentials.amber import AmberPotential
from longstride.provenance import provenance
from longstride.seeds import job_seed
from longstride.stages import train_cartesian
from longstride.state import State
from longstride.systems import load_prepared
from longstride.training.flow import EnergyLoss, encode_pairs, internals_of, train, validation_nll
from longstride.training.module_state import ModuleState
from longstride.training.schedule import early_end_note
from longstride.units import thermal_energy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from longstride.config import FlowConfig
    from longstride.potentials.base import Potential
    from longstride.systems import Prepared

THREADS = 1
HELD_OUT = 512  # validation frames from which acceptance is measured


def run(section: FlowConfig, *, prepared: Path, shards: Path, out: Path, state: Path, seed: int, threads: int) -> None:
    """Write model.safetensors, metrics.csv and the manifest to `out`; continue from `state`.

    With `coordinates: cartesian` this is `longstride.stages.train_cartesian`.

    Training runs on one core however many `threads` grants: its tensors are small, a second thread mostly waits (and waits
    badly where the machine is shared), and the order of sums, hence the result, would depend on the number.

    Raises:
        DataError: the shards belong to another molecule or force field.
        NumericsError: training diverged.
    """
    if section.coordinates == "cartesian":
        train_cartesian.run(section, prepared=prepared, shards=shards, out=out, state=state, seed=seed, threads=threads)
        return
    torch.set_num_threads(THREADS)
    molecule = load_prepared(prepared)
    source = read_manifest(shards, kind="shards")
    if source["system_hash"] != molecule.system_hash:
        raise DataError(f"{shards} belongs to another molecule or force field than {prepared}; run reference and shard again")
    kT = thermal_energy(source["temperature_K"])
    train_pairs, validation_pairs = (
        [load_pairs(shards, split=split, lag_index=index) for index in range(len(source["lags_ps"]))]
        for split in ("train", "validation")
    )
    flow = build_flow(section, molecule, lags_ps=tuple(source["lags_ps"]), frames=_frames(train_pairs), seed=seed)
    pairs, held_out = encode_pairs(flow, train_pairs), encode_pairs(flow, validation_pairs)
    potential = AmberPotential.from_openmm(molecule.openmm_system, molecule.system, name=molecule.target, dtype=torch.float64)
    starts = _spread(_frames(validation_pairs), HELD_OUT)
    draws = job_seed(seed, "held-out")

    def evaluate(current: InternalFlow) -> dict[str, float]:
        nll = validation_nll(current, held_out)
        return {"validation_nll_per_dof": nll, **acceptance(current, potential, starts, kT=kT, seed=draws)}

    trainer = ModuleState.fresh(
        flow,
        learning_rate=section.learning_rate,
        weight_decay=section.weight_decay,
        rate_key="flow.learning_rate",
        seed=job_seed(seed, "training"),
    )
    energy = (
        EnergyLoss(potential=_single_precision(molecule), kT=kT, size=section.energy_batch) if section.energy_weight else None
    )
    key = fingerprint(section.model_dump(), molecule.system_hash, source["files"], seed, code_version("flow"))
    with open_state(state, key) as folder:
        train(trainer, pairs, section, energy_loss=energy, evaluate=evaluate, folder=folder)
        _write(trainer, section, molecule, source=source, out=out)
        folder.clear()


def _single_precision(molecule: Prepared) -> Potential:
    return AmberPotential.from_openmm(molecule.openmm_system, molecule.system, name=molecule.target, dtype=torch.float32)


def build_flow(
    section: FlowConfig, molecule: Prepared, *, lags_ps: tuple[float, ...], frames: np.ndarray, seed: int
) -> InternalFlow:
    """Return an untrained flow, standardised by training frames [frame, atom, 3] nm; weights depend on the seed only."""
    architecture = FlowArchitecture(
        lags_ps=lags_ps,
        hidden=section.hidden,
        couplings=section.couplings,
        torsion_components=section.torsion_components,
    )
    with torch.random.fork_rng(devices=[]):  # layers initialise from torch's global stream; leave that as it was
        torch.manual_seed(job_seed(seed, "weights"))
        flow = InternalFlow(build_zmatrix(molecule.system), architecture)
    flow.set_statistics(internals_of(flow, frames))
    return flow


def acceptance(flow: InternalFlow, potential: Potential, starts: np.ndarray, *, kT: float, seed: int) -> dict[str, float]:
    """Return acceptance and standard deviation of log r per label, from one proposal per frame [frame, atom, 3] nm."""
    log_density = boltzmann(potential, kT)
    x = State(positions=torch.from_numpy(starts).double())
    at_x = log_density(x)
    found = {}
    for index, name in enumerate(flow.architecture.labels):
        generator = torch.Generator().manual_seed(seed)
        proposal = flow.bind(potential.system, label=index)
        y, log_q = proposal.sample(x, generator)
        log_r = log_ratio(at_x, log_density(y), proposal.log_prob(x, y), log_q)
        usual = log_r[log_r > log_r.quantile(0.05)]  # clashes make the tail arbitrarily long
        key = name.replace(" ", "_")
        found[f"acceptance_{key}"] = log_r.clamp(max=0).exp().mean().item()
        found[f"log_r_sd_{key}"] = usual.std().item()
    return found


def _frames(pairs: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    return np.concatenate([lagged[end] for lagged in pairs for end in ("x", "y")])


def _spread(frames: np.ndarray, count: int) -> np.ndarray:
    return frames[np.linspace(0, len(frames) - 1, min(count, len(frames))).astype(int)]


def _write(
    trainer: ModuleState[InternalFlow], section: FlowConfig, molecule: Prepared, *, source: dict[str, Any], out: Path
) -> None:
    flow = trainer.module
    out.mkdir(parents=True, exist_ok=True)
    save_flow(out / "model.safetensors", flow, molecule, {"lags_ps": source["lags_ps"], "steps": trainer.step})
    write_text(out / "metrics.csv", pd.DataFrame(trainer.rows).to_csv(index=False))
    last = trainer.rows[-1]
    content = {
        "system": molecule.system.name,
        "target": molecule.target,
        "system_hash": molecule.system_hash,
        "temperature_K": source["temperature_K"],
        "tau_ps": source["lags_ps"],
        "labels": list(flow.architecture.labels),
        "architecture": flow.architecture.to_meta(),
        "parameters": sum(value.numel() for value in flow.parameters()),
        "steps": trainer.step,
        "stopped_by_time": trainer.cooldown_from is not None,
        "train_wall_s": trainer.wall_s,
        "final": {key: value for key, value in last.items() if key not in ("step", "wall_s")},
        "provenance": provenance(),
    }
    write_manifest(out, kind="flow", files=["model.safetensors", "metrics.csv"], content=content)
    rates = ", ".join(f"{key[11:]} {value:.3f}" for key, value in last.items() if key.startswith("acceptance_"))
    print(f"flow: {trainer.step} steps in {trainer.wall_s:.1f} s; held-out acceptance {rates}")
    if note := early_end_note(trainer, section):
        print(note)
