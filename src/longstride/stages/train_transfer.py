"""Stage `train-transfer`: exact chains of many peptides, and their dynamics where there are lags -> one transferable flow."""

from __future__ import annotations

import contextlib
import copy
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from longstride.data.atomic import read_arrays, write_text
from longstride.data.checkpoint import StateFolder, fingerprint, open_state
from longstride.data.frames import read_trajectories
from longstride.data.manifest import read_manifest, write_manifest
from longstride.data.shards import lag_in_frames
from longstride.errors import ConfigError, DataError
from longstride.fingerprints import code_version
from longstride.flows.torsion_network import TorsionArchitecture, TorsionNetwork, log_uniform
from longstride.flows.transferable import BoundMolecule
from longstride.flows.transferable_checkpoint import Physics, load_transferable, save_transferable
from longstride.flows.zmatrix import build_zmatrix
from longstride.potentials.amber import AmberPotential
from longstride.provenance import provenance
from longstride.seeds import job_seed
from longstride.state import State
from longstride.systems import load_prepared
from longstride.training.acceptance import Frames
from longstride.training.device import training_device
from longstride.training.module_state import ModuleState
from longstride.training.ranks import ALONE, Ranks, joined
from longstride.training.transfer import Dynamics, MoleculeSamples, Probe, free_torsions, train, validation_loss
from longstride.units import thermal_energy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from longstride.config import TransferConfig
    from longstride.systems import Prepared

THREADS = 1  # batches are small, and the order of sums must not depend on the machine's load
HELD_OUT_SAMPLES = 512
TUNING_FRAMES = 512  # of each training peptide, from which acceptance is trained
_KEY = "transfer.device"

# folders of the prepare, of the chains and, where there are lags, of the reference stage
Peptide = tuple["Path", "Path"] | tuple["Path", "Path", "Path"]


def run(
    section: TransferConfig,
    *,
    training: Sequence[Peptide],
    validation: Sequence[Peptide],
    out: Path,
    state: Path,
    seed: int,
    threads: int,
    start: Path | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Write `model.safetensors`, `metrics.csv` and the manifest; continue from `state` where an earlier attempt stopped.

    Of several processes the first one evaluates and writes; it does so on the CPU, wherever the network is trained.

    Args:
        section: sizes, rates and limits.
        training: folders of the prepare and chains stages of each training peptide, and of its reference where the section
            has lags.
        validation: the same of peptides held out.
        out: folder to write.
        state: folder for checkpoints.
        seed: of the job.
        threads: cores granted to this process.
        start: folder of a flow whose weights training starts from; None: random weights.
        ranks: this process among those that train together.

    Raises:
        ConfigError: no steps, and no flow to start from.
        DataError: no peptides; chains or dynamics that do not belong to their peptide; different potentials or
            temperatures; a lag that does not fit the dynamics, or lags without dynamics; a checkpoint of another number
            of processes.
        LongstrideError: a GPU is asked for and there is none, or another process ended.
        NumericsError: training diverged.
    """
    _check_count(section, ranks)
    torch.set_num_threads(min(threads, THREADS))
    kept, held_out, physics, files = _load_all(section, training, validation)
    before = _files_of(start, section)
    trainer = _untrained(section, seed, ranks, start=start, physics=physics)
    kept = [molecule.on(trainer.module.start.device) for molecule in kept]
    probed = validation if section.acceptance_frames and ranks.first else ()
    probes = [_probe(section, *peptide[:2], physics) for peptide in probed]
    unseen = HeldOut(molecules=held_out, probes=probes, seed=job_seed(seed, "held-out"))
    # a checkpoint continues on any device; that of another number of processes is refused, which keeps the work in it
    settings = section.model_dump(exclude={"device", "processes"})
    key = fingerprint(settings, files, before, seed, code_version("train_transfer"))
    frames = _frames(section, training, kept, physics) if section.acceptance_steps else None
    with open_state(state, key) if ranks.first else contextlib.nullcontext(StateFolder(state)) as folder:
        train(trainer, kept, section, frames=frames, evaluate=unseen.metrics, folder=folder)
        if not ranks.first:
            return
        content = {"physics": vars(physics), **unseen.by_peptide(trainer.module), "started_from": before}
        content |= _made(trainer, kept, section)
        _write(out, _on_cpu(trainer.module), physics, trainer.rows, content)
        folder.clear()


def _files_of(start: Path | None, section: TransferConfig) -> dict[str, Any] | None:
    """Return the checksums of the flow that training starts from, None where it starts from random weights."""
    if start is not None:
        return read_manifest(start, kind="transferable")["files"]
    if section.max_steps == 0:
        raise ConfigError("transfer.max_steps is 0, and there is no flow to start from: give steps, or --start DIR")
    return None


def _made(trainer: ModuleState[TorsionNetwork], kept: Sequence[MoleculeSamples], section: TransferConfig) -> dict[str, Any]:
    """Return what the manifest says of how the flow was made."""
    return {
        "training": [molecule.name for molecule in kept],
        "samples": sum(len(molecule.torsions) for molecule in kept),
        "steps": trainer.step,
        "acceptance_steps": section.acceptance_steps,
        "train_wall_s": trainer.wall_s,
        "processes": trainer.ranks.count,
        "device": str(trainer.module.start.device),
    }


@contextlib.contextmanager
def together(section: TransferConfig) -> Iterator[Ranks]:
    """Yield this process among those that `torchrun` started to train together, `ALONE` where it started none.

    Raises:
        ConfigError: there are to be several processes, and nothing says where the others are.
        LongstrideError: a GPU is asked for and there is none for this process.
    """
    with joined(cuda=training_device(section.device, key=_KEY).type == "cuda") as ranks:
        device = training_device(section.device, key=_KEY, index=ranks.local)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # what nccl uses
        yield ranks


def _check_count(section: TransferConfig, ranks: Ranks) -> None:
    if section.processes != ranks.count:
        raise ConfigError(
            f"transfer.processes is {section.processes}, but {ranks.count} started: use torchrun --standalone"
            f" --nproc-per-node {section.processes} -m longstride.cli train-transfer ..."
        )


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Peptides that no step sees, measured with the same random numbers at every call, on the CPU.

    Attributes:
        molecules: for the likelihood.
        probes: for the acceptance.
        seed: of the random numbers.
    """

    molecules: Sequence[MoleculeSamples]
    probes: Sequence[Probe]
    seed: int

    def metrics(self, network: TorsionNetwork) -> dict[str, float]:
        """Return one row of metrics.csv: the loss and the acceptance of every label, over the peptides."""
        network = _on_cpu(network)
        found: dict[str, float] = {}
        for label, end in _columns(network).items() if self.molecules else ():
            found[f"validation_nll_per_torsion{end}"] = float(np.mean(list(self._losses(network, label).values())))
            if self.probes:
                quality = np.array(list(self._qualities(network, label).values()))
                found[f"validation_acceptance{end}"] = float(np.median(quality[:, 0]))
                found[f"validation_least_acceptance{end}"] = float(quality[:, 0].min())
                found[f"validation_log_r_sd{end}"] = float(np.median(quality[:, 1]))
                if not end:  # the independent label
                    found["validation_slowest_acceptance"] = float(
                        np.median([p.slowest(network, seed=self.seed) for p in self.probes])
                    )
        return found

    def by_peptide(self, network: TorsionNetwork) -> dict[str, dict[str, float]]:
        """Return the loss and the acceptance of every label and peptide, for the manifest."""
        network = _on_cpu(network)
        found: dict[str, dict[str, float]] = {}
        for label, end in _columns(network).items():
            found[f"validation_nll_per_torsion{end}"] = self._losses(network, label)
            qualities = self._qualities(network, label)
            found[f"validation_acceptance{end}"] = {name: acceptance for name, (acceptance, _) in qualities.items()}
        return found

    def _losses(self, network: TorsionNetwork, label: int) -> dict[str, float]:
        return validation_loss(network, self.molecules, label=label, count=HELD_OUT_SAMPLES, seed=self.seed)

    def _qualities(self, network: TorsionNetwork, label: int) -> dict[str, tuple[float, float]]:
        return {probe.name: probe.measure(network, label=label, seed=self.seed) for probe in self.probes}


def _on_cpu(network: TorsionNetwork) -> TorsionNetwork:
    """Return the network, or a copy where it is elsewhere; chains, force fields and generators live on the CPU."""
    return network if network.start.device.type == "cpu" else copy.deepcopy(network).cpu()


def _columns(network: TorsionNetwork) -> dict[int, str]:
    """Return what ends the names of metrics of each label: nothing for the independent one, which comes first."""
    *lags, _ = network.architecture.labels
    return {len(lags): "", **{label: f"_{name.replace(' ', '_')}" for label, name in enumerate(lags)}}


def _load_all(
    section: TransferConfig, training: Sequence[Peptide], validation: Sequence[Peptide]
) -> tuple[list[MoleculeSamples], list[MoleculeSamples], Physics, list[dict[str, Any]]]:
    """Return the samples of the training and of the held-out peptides, their physics, and the checksums of all files read."""
    if not training:
        raise DataError("no training peptides: give folders of chains")
    loaded = [_load(section, *peptide) for peptide in (*training, *validation)]
    physics, molecules = _one_physics(loaded), [molecule for molecule, _, _ in loaded]
    kept, held_out = molecules[: len(training)], molecules[len(training) :]
    if shared := {m.name for m in kept} & {m.name for m in held_out}:
        raise DataError(
            f"{', '.join(sorted(shared))}: both a training and a held-out peptide; a test of transfer needs them apart"
        )
    return kept, held_out, physics, [files for _, _, files in loaded]


def _load(
    section: TransferConfig, prepared: Path, chains: Path, reference: Path | None = None
) -> tuple[MoleculeSamples, Physics, dict[str, Any]]:
    """Return the samples of a peptide, their physics, and the checksums of what they were read from."""
    molecule = load_prepared(prepared)
    source = read_manifest(chains, kind="samples")
    if source["system_hash"] != molecule.system_hash:
        raise DataError(f"{chains} belongs to another molecule or force field than {prepared}")
    if source["invariance"] != "exact":
        raise DataError(f"{chains} holds {source['invariance']} samples; a transferable flow learns from exact ones")
    if section.lags_ps and reference is None:
        name = molecule.system.name
        raise DataError(f"transfer.lags_ps: {name} has no dynamics; give its folders as PREPARED:CHAINS:REFERENCE")
    if reference is not None and not section.lags_ps:
        raise DataError(f"transfer.lags_ps is empty; give lags to learn from {reference}, or leave it out")
    dynamics, files = None, source["files"]
    if reference is not None:
        dynamics, more = _dynamics(section, molecule, reference, temperature_K=source["temperature_K"])
        files = {"chains": files, "reference": more}
    positions = read_arrays(chains / "samples.safetensors")[0]["positions"]
    flat = positions.reshape(-1, *positions.shape[2:])
    samples = MoleculeSamples.of(molecule, flat, kT=thermal_energy(source["temperature_K"]), dynamics=dynamics)
    if section.rare_exponent:
        samples = samples.rare_more_often(section.rare_exponent)
    return samples, Physics.of(molecule, source["temperature_K"]), files


def _dynamics(
    section: TransferConfig, molecule: Prepared, reference: Path, *, temperature_K: float
) -> tuple[Dynamics, dict[str, Any]]:
    """Return the dynamics of a peptide at the section's lags, and the checksums of its files."""
    source = read_manifest(reference, kind="reference", verify=False)  # the frames are verified as they are read
    if source["system_hash"] != molecule.system_hash:
        raise DataError(f"{reference} belongs to another molecule or force field than the chains of {molecule.system.name}")
    if source["temperature_K"] != temperature_K:
        raise DataError(f"{reference} is at {source['temperature_K']:g} K, the chains are at {temperature_K:g} K")
    zmatrix = build_zmatrix(molecule.system)
    frames = read_trajectories(reference, fields=("positions",))
    trajectories = [free_torsions(zmatrix, fields["positions"]) for fields in frames]
    spacing, shortest = source["frame_spacing_ps"], min(map(len, trajectories))
    lags = tuple(lag_in_frames(lag, spacing, shortest, key="transfer.lags_ps") for lag in section.lags_ps)
    made = Dynamics.of(trajectories, lags=lags, independent_fraction=section.independent_fraction)
    return made, source["files"]


def _probe(section: TransferConfig, prepared: Path, chains: Path, physics: Physics) -> Probe:
    """Return what measures acceptance on a held-out peptide, from frames spread over its chains."""
    bound, positions = _bound(section, prepared, chains, physics, count=section.acceptance_frames)
    return Probe(molecule=bound, x=State(positions=positions))


def _frames(
    section: TransferConfig, training: Sequence[Peptide], molecules: Sequence[MoleculeSamples], physics: Physics
) -> Callable[[int], Frames]:
    """Return what gives the frames of a training peptide by its index; each is made ready when it is first asked for."""

    @functools.cache
    def frames(index: int) -> Frames:
        bound, positions = _bound(section, *training[index][:2], physics, count=TUNING_FRAMES)
        return Frames.of(bound, molecules[index].features.to(device=torch.device("cpu")), positions)

    return frames


def _bound(
    section: TransferConfig, prepared: Path, chains: Path, physics: Physics, *, count: int
) -> tuple[BoundMolecule, Tensor]:
    """Return a peptide ready for proposals, and frames [frame, atom, 3] nm spread over its chains, at most `count`."""
    molecule = load_prepared(prepared)
    potential = AmberPotential.from_openmm(molecule.openmm_system, molecule.system, name=molecule.target)
    positions = read_arrays(chains / "samples.safetensors")[0]["positions"]
    flat = positions.reshape(-1, *positions.shape[2:])
    spread = np.linspace(0, len(flat) - 1, min(count, len(flat))).astype(int)
    kT = thermal_energy(physics.temperature_K)
    bound = BoundMolecule.of(molecule, potential, kT=kT, fitted_states=section.fitted_states)
    return bound, torch.from_numpy(flat[spread]).double()


def _one_physics(loaded: Sequence[tuple[MoleculeSamples, Physics, dict[str, Any]]]) -> Physics:
    found = {physics for _, physics, _ in loaded}
    if len(found) > 1:
        raise DataError(f"the chains are of different potentials or temperatures: {'; '.join(map(str, found))}")
    return found.pop()


def _untrained(
    section: TransferConfig, seed: int, ranks: Ranks, *, start: Path | None, physics: Physics
) -> ModuleState[TorsionNetwork]:
    device = training_device(section.device, key=_KEY, index=ranks.local)
    network = _network(section, job_seed(seed, "weights"))
    if start is not None:
        network = _started(start, sizes=network.architecture, physics=physics)
    return ModuleState.fresh(
        network.to(device),
        learning_rate=section.learning_rate,
        weight_decay=section.weight_decay,
        rate_key="transfer.learning_rate",
        # every process draws its own batches; the first one as if it were alone
        seed=job_seed(seed, "training", *([] if ranks.first else [ranks.rank])),
        ranks=ranks,
    )


def _started(start: Path, *, sizes: TorsionArchitecture, physics: Physics) -> TorsionNetwork:
    """Return the network of a folder, ready to be trained further."""
    path = start / "model.safetensors"
    network, trained_for = load_transferable(path)
    trained_for.check(physics, path=path)
    for name, was in vars(network.architecture).items():
        if was != (asked := getattr(sizes, name)):
            raise DataError(f"{path} has {name} {was}, not {asked}; set transfer.{name} as there, or start from another flow")
    return network.train().requires_grad_()


def _network(section: TransferConfig, seed: int) -> TorsionNetwork:
    sizes = TorsionArchitecture(
        lags_ps=section.lags_ps,
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
