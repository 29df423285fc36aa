"""Training of the torsion network on exact chains of many molecules.

    loss = -mean over molecules and samples of log q(t | label) / n_torsions

A batch holds the same number of samples from each of a few random molecules, so that small and large ones count alike. The
samples of a molecule are positions of an exact chain at equilibrium; they train the independent label. Held-out molecules,
whose sequences no step sees, give the validation loss.

A step follows the mean gradient of `accumulate` batches in each of the processes that train together; memory is that of one
batch. Samples are drawn on the CPU, from a random stream of every process, and move to the network's device.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from longstride.errors import DataError
from longstride.flows.torsion_features import TorsionFeatures, torsion_features
from longstride.flows.transferable import bind
from longstride.flows.zmatrix import build_zmatrix
from longstride.mcmc.metropolis import boltzmann, proposal_quality
from longstride.progress import Progress
from longstride.training.schedule import RateSchedule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    from torch import Tensor

    from longstride.config import TransferConfig
    from longstride.data.checkpoint import StateFolder
    from longstride.flows.torsion_network import TorsionNetwork
    from longstride.flows.transferable import BoundMolecule
    from longstride.state import State
    from longstride.systems import Prepared
    from longstride.training.module_state import ModuleState

_MAX_GRADIENT = 1.0


@dataclass(frozen=True, kw_only=True)
class MoleculeSamples:
    """Equilibrium samples of one molecule.

    Attributes:
        name: of the molecule.
        features: of its torsions, in the precision of the network.
        torsions: [sample, torsion] radian float32.
    """

    name: str
    features: TorsionFeatures
    torsions: Tensor

    def on(self, device: torch.device) -> MoleculeSamples:
        """Return the same with features on a device; samples stay where they are until they are drawn."""
        return replace(self, features=self.features.to(device=device))

    @classmethod
    def of(cls, prepared: Prepared, positions: np.ndarray, *, kT: float) -> MoleculeSamples:
        """Return the samples of positions [sample, atom, 3] nm.

        Raises:
            DataError: no samples, or of another number of atoms.
        """
        system = prepared.system
        if not len(positions) or positions.shape[1] != system.n_atoms:
            raise DataError(f"no samples of {system.n_atoms} atoms for {system.name}; sample it again")
        zmatrix = build_zmatrix(system)
        internals = zmatrix.from_cartesian(torch.from_numpy(positions).double())
        features = torsion_features(system, prepared.openmm_system, zmatrix, prepared.positions, kT)
        torsions = internals.dihedrals[:, torch.from_numpy(zmatrix.free)].float()
        return cls(name=system.name, features=features.to(torch.float32), torsions=torsions)


def negative_log_likelihood(
    network: TorsionNetwork, molecules: Sequence[MoleculeSamples], count: int, generator: torch.Generator
) -> Tensor:
    """Return -log q(t) / n_torsions of `count` random samples of each molecule, [molecule, count] nats per torsion."""
    tokens = network.encode([molecule.features for molecule in molecules]).repeat(count)
    longest = tokens.tokens.shape[1]
    drawn = []
    for molecule in molecules:
        rows = torch.randint(len(molecule.torsions), (count,), generator=generator)
        padding = (0, longest - molecule.torsions.shape[1])
        drawn.append(torch.nn.functional.pad(molecule.torsions[rows], padding))
    t = torch.cat(drawn).to(tokens.tokens.device)
    independent = torch.full((len(t),), len(network.architecture.lags_ps), device=t.device)
    log_q = network.log_prob(tokens, t, network.context(tokens, t, independent))
    return -(log_q / tokens.present.sum(1)).view(len(molecules), count)


@torch.no_grad()
def validation_loss(
    network: TorsionNetwork, molecules: Sequence[MoleculeSamples], *, count: int, seed: int
) -> dict[str, float]:
    """Return the loss of each molecule by name, from the same samples at every call."""
    generator = torch.Generator().manual_seed(seed)
    return {m.name: negative_log_likelihood(network, [m], count, generator).mean().item() for m in molecules}


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Frames of a held-out molecule, from which the acceptance of independent proposals is measured.

    Attributes:
        molecule: ready for proposals.
        x: [frame, atom, 3] nm, equilibrium frames.
    """

    molecule: BoundMolecule
    x: State

    @property
    def name(self) -> str:
        """Of the molecule."""
        return self.molecule.system.name

    def measure(self, network: TorsionNetwork, *, seed: int) -> tuple[float, float]:
        """Return acceptance and standard deviation of log r, from the same random numbers at every call."""
        proposal = bind(network, self.molecule, label=len(network.architecture.lags_ps))
        target = self.molecule.gaussian.target
        log_density = boltzmann(target.potential, target.kT)
        return proposal_quality(log_density, proposal.propose, self.x, torch.Generator().manual_seed(seed))


def train(
    state: ModuleState[TorsionNetwork],
    molecules: Sequence[MoleculeSamples],
    section: TransferConfig,
    *,
    evaluate: Callable[[TorsionNetwork], dict[str, float]] | None = None,
    folder: StateFolder | None = None,
) -> None:
    """Train to `section.max_steps`, leaving the averaged weights in `state.module`.

    Args:
        state: where training stands; continues from the newest checkpoint in `folder`.
        molecules: the training molecules, their features on the network's device; the same in all ranks.
        section: sizes and rates.
        evaluate: metrics of a network with averaged weights, called every `section.metrics_every_steps` in the first rank.
        folder: where checkpoints go.

    Raises:
        DataError: another number of processes wrote the checkpoint.
        LongstrideError: another rank ended.
        NumericsError: training diverged.
    """
    network = state.module
    if folder is not None:
        state.load(folder)
    schedule = RateSchedule(peak=section.learning_rate, warm_up=section.warm_up_steps, total=section.max_steps)
    progress = Progress("transferable flow", section.max_steps, "steps", start=state.step)
    begin = time.monotonic() - state.wall_s
    while state.step < schedule.last_step(state):
        losses = _losses(network, molecules, section, state.generator)
        loss = state.update_from(losses, rate=schedule.rate(state), decay=section.ema_decay, max_gradient=_MAX_GRADIENT)
        schedule.count(state, time.monotonic() - begin)
        last = state.step == schedule.last_step(state)
        if evaluate is not None and state.ranks.first and (last or state.step % section.metrics_every_steps == 0):
            with state.averaged():
                row = {"step": float(state.step), "wall_s": state.wall_s, "train_nll_per_torsion": loss.item()}
                state.rows.append(row | evaluate(network))
        if folder is not None and not last and state.step % section.checkpoint_every_steps == 0:
            state.save(folder)
        if state.ranks.first:
            progress.update(state.step, f"loss {loss.item():.3f} nat per torsion")
    state.adopt_average()


def _losses(
    network: TorsionNetwork, molecules: Sequence[MoleculeSamples], section: TransferConfig, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield the losses [] of the batches of one step, each drawn when it is asked for."""
    low, device = section.precision == "bfloat16", network.start.device.type
    for _ in range(section.accumulate):
        chosen = torch.randperm(len(molecules), generator=generator)[: section.molecules_per_step].tolist()
        batch = [molecules[index] for index in chosen]
        with torch.autocast(device, dtype=torch.bfloat16, enabled=low):
            losses = negative_log_likelihood(network, batch, section.samples_per_molecule, generator)
        yield losses.mean()
