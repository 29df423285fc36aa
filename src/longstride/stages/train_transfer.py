"""Stage `train-transfer`: exact chains of many peptides -> one transferable flow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from longstride.data.atomic import read_arrays, write_text
from longstride.data.checkpoint import fingerprint, open_state
from longstride.data.manifest import read_manifest, write_manifest
from longstride.errors import DataError
from longstride.fingerprints import code_version
from longstride.flows.torsion_network import TorsionArchitecture, TorsionNetwork, log_uniform
from longstride.flows.transferable import BoundMolecule
from longstride.flows.transferable_checkpoint import Physics, save_transferable
from longstride.potentials.amber import AmberPotential
from longstride.provenance import provenance
from longstride.seeds import job_seed
from longstride.state import State
from longstride.systems import load_prepared
from longstride.training.module_state import ModuleState
from longstride.training.transfer import MoleculeSamples, Probe, train, validation_loss
from longstride.units import thermal_energy

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from longstride.config import TransferConfig

THREADS = 1  # batches are small, and the order of sums must not depend on the machine's load
HELD_OUT_SAMPLES = 512

Peptide = tuple["Path", "Path"]  # folders of the prepare and of the chains stage


def run(
    section: TransferConfig,
    *,
    training: Sequence[Peptide],
    validation: Sequence[Peptide],
    out: Path,
    state: Path,
    seed: int,
    threads: int,
) -> None:
    """Write `model.safetensors`, `metrics.csv` and the manifest; continue from `state` where an earlier attempt stopped.

    Args:
        section: sizes, rates and limits.
        training: folders of the prepare and chains stages of each training peptide.
        validation: the same of peptides held out.
        out: folder to write.
        state: folder for checkpoints.
        seed: of the job.
        threads: cores granted.

    Raises:
        DataError: no peptides, chains that do not belong to their peptide, or different potentials or temperatures.
        NumericsError: training diverged.
    """
    torch.set_num_threads(min(threads, THREADS))
    if not training:
        raise DataError("no training peptides: give folders of chains")
    loaded = [_load(*peptide) for peptide in (*training, *validation)]
    physics, molecules = _one_physics(loaded), [molecule for molecule, _, _ in loaded]
    kept, held_out = molecules[: len(training)], molecules[len(training) :]
    probes = [_probe(section, *peptide, physics) for peptide in validation] if section.acceptance_frames else []
    if shared := {m.name for m in kept} & {m.name for m in held_out}:
        raise DataError(
            f"{', '.join(sorted(shared))}: both a training and a held-out peptide; a test of transfer needs them apart"
        )
    trainer = _untrained(section, seed)
    draws = job_seed(seed, "held-out")

    def evaluate(network: TorsionNetwork) -> dict[str, float]:
        losses = validation_loss(network, held_out, count=HELD_OUT_SAMPLES, seed=draws)
        if not losses:
            return {}
        found = {"validation_nll_per_torsion": float(np.mean(list(losses.values())))}
        if probes:
            quality = np.array([probe.measure(network, seed=draws) for probe in probes])
            found |= {"validation_acceptance": float(np.median(quality[:, 0]))}
            found |= {"validation_least_acceptance": float(quality[:, 0].min())}
            found |= {"validation_log_r_sd": float(np.median(quality[:, 1]))}
        return found

    key = fingerprint(section.model_dump(), [files for _, _, files in loaded], seed, code_version("train_transfer"))
    with open_state(state, key) as folder:
        train(trainer, kept, section, evaluate=evaluate, folder=folder)
        losses = validation_loss(trainer.module, held_out, count=HELD_OUT_SAMPLES, seed=draws)
        content: dict[str, Any] = {
            "physics": vars(physics),
            "training": [m.name for m in kept],
            "validation_nll_per_torsion": losses,
            "validation_acceptance": {p.name: p.measure(trainer.module, seed=draws)[0] for p in probes},
            "samples": sum(len(m.torsions) for m in kept),
            "steps": trainer.step,
            "train_wall_s": trainer.wall_s,
        }
        _write(out, trainer.module, physics, trainer.rows, content)
        folder.clear()


def _load(prepared: Path, chains: Path) -> tuple[MoleculeSamples, Physics, dict[str, Any]]:
    molecule = load_prepared(prepared)
    source = read_manifest(chains, kind="samples")
    if source["system_hash"] != molecule.system_hash:
        raise DataError(f"{chains} belongs to another molecule or force field than {prepared}")
    if source["invariance"] != "exact":
        raise DataError(f"{chains} holds {source['invariance']} samples; a transferable flow learns from exact ones")
    positions = read_arrays(chains / "samples.safetensors")[0]["positions"]
    flat = positions.reshape(-1, *positions.shape[2:])
    samples = MoleculeSamples.of(molecule, flat, kT=thermal_energy(source["temperature_K"]))
    return samples, Physics.of(molecule, source["temperature_K"]), source["files"]


def _probe(section: TransferConfig, prepared: Path, chains: Path, physics: Physics) -> Probe:
    """Return what measures acceptance on a held-out peptide, from frames spread over its chains."""
    molecule = load_prepared(prepared)
    potential = AmberPotential.from_openmm(molecule.openmm_system, molecule.system, name=molecule.target)
    positions = read_arrays(chains / "samples.safetensors")[0]["positions"]
    flat = positions.reshape(-1, *positions.shape[2:])
    spread = np.linspace(0, len(flat) - 1, min(section.acceptance_frames, len(flat))).astype(int)
    kT = thermal_energy(physics.temperature_K)
    bound = BoundMolecule.of(molecule, potential, kT=kT, fitted_states=section.fitted_states)
    return Probe(molecule=bound, x=State(positions=torch.from_numpy(flat[spread]).double()))


def _one_physics(loaded: Sequence[tuple[MoleculeSamples, Physics, dict[str, Any]]]) -> Physics:
    found = {physics for _, physics, _ in loaded}
    if len(found) > 1:
        raise DataError(f"the chains are of different potentials or temperatures: {'; '.join(map(str, found))}")
    return found.pop()


def _untrained(section: TransferConfig, seed: int) -> ModuleState[TorsionNetwork]:
    return ModuleState.fresh(
        _network(section, job_seed(seed, "weights")),
        learning_rate=section.learning_rate,
        weight_decay=section.weight_decay,
        rate_key="transfer.learning_rate",
        seed=job_seed(seed, "training"),
    )


def _network(section: TransferConfig, seed: int) -> TorsionNetwork:
    sizes = TorsionArchitecture(
        width=section.width,
        heads=section.heads,
        layers=section.layers,
        message_rounds=section.message_rounds,
        components=section.components,
    )
    with torch.random.fork_rng(devices=[]):  # layers initialise from torch's global stream; leave that as it was
        torch.manual_seed(seed)
        return TorsionNetwork(sizes)


def _write(out: Path, network: TorsionNetwork, physics: Physics, rows: list[dict[str, float]], content: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    save_transferable(out / "model.safetensors", network, physics, {"training": content["training"]})
    write_text(out / "metrics.csv", pd.DataFrame(rows).to_csv(index=False))
    full = {**content, "architecture": network.architecture.to_meta(), "provenance": provenance()}
    write_manifest(out, kind="transferable", files=["model.safetensors", "metrics.csv"], content=full)
    losses = content["validation_nll_per_torsion"]
    held = f"; held-out loss {np.mean(list(losses.values())):.3f}" if losses else ""
    done = f"{len(content['training'])} peptides, {content['steps']} steps in {content['train_wall_s']:.0f} s"
    print(f"train-transfer: {done}{held} nat per torsion (uniform: {-log_uniform(1):.3f})")
