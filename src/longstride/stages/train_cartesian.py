"""Stage `flow` with `coordinates: cartesian`: train the published Timewarp model on lagged pairs."""

from __future__ import annotations

import math
from dataclasses import replace
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
from longstride.flows.cartesian import PRESETS, CartesianFlow
from longstride.flows.cartesian_checkpoint import save_cartesian
from longstride.mcmc.metropolis import boltzmann, log_ratio
from longstride.potentials.amber import AmberPotential
from longstride.provenance import provenance
from longstride.seeds import job_seed
from longstride.state import State
from longstride.systems import load_prepared
from longstride.training.cartesian import AcceptanceLoss, MoleculePairs, RelativeStep, train, validation_nll
from longstride.training.device import training_device
from longstride.training.module_state import ModuleState
from longstride.training.schedule import early_end_note
from longstride.units import thermal_energy

if TYPE_CHECKING:
    from pathlib import Path

    from longstride.config import CartesianConfig, FlowConfig
    from longstride.potentials.base import Potential
    from longstride.systems import Prepared

HELD_OUT = 256  # validation pairs from which likelihood and acceptance are measured


def run(section: FlowConfig, *, prepared: Path, shards: Path, out: Path, state: Path, seed: int, threads: int) -> None:
    """Write model.safetensors, metrics.csv and the manifest to `out`; continue from `state`.

    Raises:
        DataError: the shards belong to another molecule or force field, or hold several lags.
        NumericsError: training diverged.
    """
    torch.set_num_threads(threads)
    molecule, settings = load_prepared(prepared), section.cartesian
    source = read_manifest(shards, kind="shards")
    if source["system_hash"] != molecule.system_hash:
        raise DataError(f"{shards} belongs to another molecule or force field than {prepared}; run reference and shard again")
    if len(source["lags_ps"]) != 1:
        raise DataError(
            f"{shards} holds {len(source['lags_ps'])} lags; the Cartesian flow knows one: give shard.lags_ps one value"
        )
    pairs, held_out = (
        MoleculePairs.from_arrays(
            load_pairs(shards, split=split), molecule.system, superpose=settings.turn_step_rad is not None
        )
        for split in ("train", "validation")
    )
    held_out = _spread(held_out, HELD_OUT)
    device = training_device(settings.device, key="flow.cartesian.device")
    flow = build_flow(settings, lag_ps=source["lags_ps"][0], seed=seed).to(device)
    potential = AmberPotential.from_openmm(molecule.openmm_system, molecule.system, name=molecule.target)
    kT, draws = thermal_energy(source["temperature_K"]), job_seed(seed, "held-out")

    step = RelativeStep(centre_nm=settings.centre_step_nm, turn_rad=settings.turn_step_rad)

    def evaluate(current: CartesianFlow) -> dict[str, float]:
        nll = validation_nll(current, held_out, step=step, seed=draws)
        return {"validation_nll_per_atom": nll, **acceptance(current, potential, held_out.x, kT=kT, seed=draws)}

    trainer = ModuleState.fresh(
        flow,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        rate_key="flow.cartesian.learning_rate",
        seed=job_seed(seed, "training"),
    )
    key = fingerprint(section.model_dump(), molecule.system_hash, source["files"], seed, code_version("train_cartesian"))
    with open_state(state, key) as folder:
        train(trainer, [pairs], section, acceptance_loss=_fine_tuning(settings, molecule, kT), evaluate=evaluate, folder=folder)
        _write(trainer, section, molecule, source=source, out=out)
        folder.clear()


def _fine_tuning(settings: CartesianConfig, molecule: Prepared, kT: float) -> AcceptanceLoss | None:
    if settings.acceptance_weight == 0:
        return None
    device = training_device(settings.device, key="flow.cartesian.device")
    potential = AmberPotential.from_openmm(
        molecule.openmm_system, molecule.system, name=molecule.target, dtype=torch.float32, device=device
    )
    return AcceptanceLoss(potential=potential, kT=kT, size=settings.acceptance_batch, entropy_weight=settings.entropy_weight)


def build_flow(settings: CartesianConfig, *, lag_ps: float, seed: int) -> CartesianFlow:
    """Return an untrained flow; its weights depend on the seed only."""
    with torch.random.fork_rng(devices=[]):  # layers initialise from torch's global stream; leave that as it was
        torch.manual_seed(job_seed(seed, "weights"))
        return CartesianFlow(replace(PRESETS[settings.preset], lags_ps=(lag_ps,)))


def acceptance(flow: CartesianFlow, potential: Potential, x: torch.Tensor, *, kT: float, seed: int) -> dict[str, float]:
    """Return acceptance and standard deviation of log r, from one proposal per frame [frame, atom, 3]."""
    log_density = boltzmann(potential, kT)
    here = State(positions=x.double())
    y, forward, backward = flow.bind(potential.system).propose(here, torch.Generator().manual_seed(seed))
    log_r = log_ratio(log_density(here), log_density(y), backward, forward)
    finite = log_r[log_r.isfinite()]
    name = flow.architecture.labels[0].replace(" ", "_")
    # clashes make the tail arbitrarily long; NaN where hardly any proposal has a finite ratio
    spread = finite[finite >= finite.quantile(0.05)].std().item() if len(finite) > 2 else math.nan
    return {f"acceptance_{name}": log_r.clamp(max=0).exp().mean().item(), f"log_r_sd_{name}": spread}


def _spread(pairs: MoleculePairs, count: int) -> MoleculePairs:
    chosen = torch.from_numpy(np.linspace(0, len(pairs) - 1, min(count, len(pairs))).astype(np.int64))
    return MoleculePairs(x=pairs.x[chosen], y=pairs.y[chosen], elements=pairs.elements)


def _write(
    trainer: ModuleState[CartesianFlow], section: FlowConfig, molecule: Prepared, *, source: dict[str, Any], out: Path
) -> None:
    flow = trainer.module
    out.mkdir(parents=True, exist_ok=True)
    save_cartesian(out / "model.safetensors", flow, prepared=molecule, extra={"steps": trainer.step})
    write_text(out / "metrics.csv", pd.DataFrame(trainer.rows).to_csv(index=False))
    last = trainer.rows[-1]
    content = {
        "system": molecule.system.name,
        "coordinates": "cartesian",
        "target": molecule.target,
        "system_hash": molecule.system_hash,
        "temperature_K": source["temperature_K"],
        "tau_ps": source["lags_ps"],
        "labels": list(flow.architecture.labels),
        "architecture": flow.architecture.to_meta(),
        "parameters": sum(value.numel() for value in flow.parameters()),
        "centre_step_nm": section.cartesian.centre_step_nm,
        "turn_step_rad": section.cartesian.turn_step_rad,
        "device": str(flow.embedding.weight.device),
        "steps": trainer.step,
        "stopped_by_time": trainer.cooldown_from is not None,
        "train_wall_s": trainer.wall_s,
        "final": {key: value if math.isfinite(value) else None for key, value in last.items() if key not in ("step", "wall_s")},
        "provenance": provenance(),
    }
    write_manifest(out, kind="flow", files=["model.safetensors", "metrics.csv"], content=content)
    nll = last["validation_nll_per_atom"]
    rates = ", ".join(f"{key[11:]} {value:.4f}" for key, value in last.items() if key.startswith("acceptance_"))
    print(f"flow: {trainer.step} steps in {trainer.wall_s:.1f} s; {nll:.3f} nat per atom; held-out acceptance {rates}")
    if note := early_end_note(trainer, section):
        print(note)
