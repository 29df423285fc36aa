"""Training of the torsion network on exact chains of many molecules, and on their dynamics.

    loss = -mean over molecules and samples of log q(t(y) | t(x), label) / n_torsions

A batch holds the same number of samples from each of a few random molecules, so that small and large ones count alike. The
samples of a molecule are positions of an exact chain at equilibrium; they train the independent label, which does not see x.
Where the network has labels of time lags, the other samples are pairs (x(t), x(t + tau)) from molecular dynamics, used in both
directions of time. In a second part, acceptance is a goal beside the likelihood (`acceptance`). Held-out molecules, whose
sequences no step sees, give the validation loss.

A step follows the mean gradient of `accumulate` batches in each of the processes that train together; memory is that of one
batch. Samples are drawn on the CPU, from a random stream of every process, and move to the network's device.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from longstride.errors import DataError
from longstride.flows.torsion_features import TorsionFeatures, reduced, torsion_features
from longstride.flows.transferable import bind
from longstride.flows.zmatrix import build_zmatrix
from longstride.mcmc.metropolis import boltzmann, proposal_quality
from longstride.progress import Progress
from longstride.training.acceptance import acceptance_losses
from longstride.training.schedule import RateSchedule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    from torch import Tensor

    from longstride.config import TransferConfig
    from longstride.data.checkpoint import StateFolder
    from longstride.flows.torsion_network import TorsionNetwork
    from longstride.flows.transferable import BoundMolecule
    from longstride.flows.zmatrix import ZMatrix
    from longstride.state import State
    from longstride.systems import Prepared
    from longstride.training.acceptance import Frames
    from longstride.training.module_state import ModuleState

_MAX_GRADIENT = 1.0
_SMOOTHING, _SMOOTH_ORDERS = 0.5, 8  # of the density of one torsion: radian, harmonics
_MOST_RARE = 5.0


@dataclass(frozen=True, kw_only=True)
class Dynamics:
    """Torsions of a molecule along trajectories, from which lagged pairs are drawn.

    Pairs of both directions of time are drawn alike. They have the same distribution where the trajectories are at
    equilibrium, because Langevin dynamics is reversible in the positions. Where they still remember their starts a label
    learns a mixture of both directions, which costs acceptance, never exactness.

    Attributes:
        torsions: [frame, torsion] radian float32, one trajectory after another.
        lags: in frames, one for each lag of the network.
        starts: for each lag, the frames whose trajectory goes on for that long, [pair] int64.
        independent_fraction: of the samples in a batch that train the independent label all the same.
    """

    torsions: Tensor
    lags: tuple[int, ...]
    starts: tuple[Tensor, ...]
    independent_fraction: float

    @classmethod
    def of(cls, trajectories: Sequence[Tensor], *, lags: tuple[int, ...], independent_fraction: float) -> Dynamics:
        """Return the dynamics of trajectories of torsions, [frame, torsion] each and longer than every lag (frames)."""
        lengths = [len(torsions) for torsions in trajectories]
        first = [sum(lengths[:index]) for index in range(len(lengths))]
        starts = [
            torch.cat([torch.arange(begin, begin + length - lag) for begin, length in zip(first, lengths, strict=True)])
            for lag in lags
        ]
        return cls(
            torsions=torch.cat(list(trajectories)),
            lags=lags,
            starts=tuple(starts),
            independent_fraction=independent_fraction,
        )

    def labels(self, count: int, generator: torch.Generator) -> Tensor:
        """Return labels of a batch, [count] int64; the label after the last lag is the independent one."""
        independent = torch.rand(count, generator=generator) < self.independent_fraction
        return torch.where(independent, len(self.lags), torch.randint(len(self.lags), (count,), generator=generator))

    def pairs(self, label: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return torsions of x and of y, [count, torsion] each, of random pairs in random directions of time."""
        starts = self.starts[label]
        begin = starts[torch.randint(len(starts), (count,), generator=generator)]
        end = begin + self.lags[label]
        forward = torch.randint(2, (count,), generator=generator) == 1
        return self.torsions[torch.where(forward, begin, end)], self.torsions[torch.where(forward, end, begin)]


@dataclass(frozen=True, kw_only=True)
class MoleculeSamples:
    """Equilibrium samples of one molecule.

    Attributes:
        name: of the molecule.
        features: of its torsions, in the precision of the network.
        torsions: [sample, torsion] radian float32.
        dynamics: of the molecule, where the network has labels of time lags.
        weights: [sample], how often each is drawn, up to a constant; None: all alike.
    """

    name: str
    features: TorsionFeatures
    torsions: Tensor
    dynamics: Dynamics | None = None
    weights: Tensor | None = None

    def on(self, device: torch.device) -> MoleculeSamples:
        """Return the same with features on a device; samples and dynamics stay where they are until they are drawn."""
        return replace(self, features=self.features.to(device=device))

    @classmethod
    def of(cls, prepared: Prepared, positions: np.ndarray, *, kT: float, dynamics: Dynamics | None = None) -> MoleculeSamples:
        """Return the samples of positions [sample, atom, 3] nm.

        Raises:
            DataError: no samples, or of another number of atoms.
        """
        system = prepared.system
        if not len(positions) or positions.shape[1] != system.n_atoms:
            raise DataError(f"no samples of {system.n_atoms} atoms for {system.name}; sample it again")
        zmatrix = build_zmatrix(system)
        torsions = free_torsions(zmatrix, positions)
        features = torsion_features(system, prepared.openmm_system, zmatrix, prepared.positions, kT)
        return cls(name=system.name, features=features.to(torch.float32), torsions=torsions, dynamics=dynamics)

    def rare_more_often(self, exponent: float) -> MoleculeSamples:
        """Return the same samples, drawn as often as `rarity` says."""
        return replace(self, weights=rarity(self.torsions, self.features.symmetry, exponent=exponent))

    def draw(self, count: int, generator: torch.Generator, *, label: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return torsions of x and of y, [count, torsion] each, and labels [count]; x is y where the label is independent.

        Args:
            count: samples to draw, with replacement.
            generator: source of the draw.
            label: of all samples; None draws labels as well.
        """
        if self.weights is None:
            chosen = torch.randint(len(self.torsions), (count,), generator=generator)
        else:
            chosen = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        y = self.torsions[chosen]
        if self.dynamics is None:
            return y, y, torch.zeros(count, dtype=torch.int64)
        labels = self.dynamics.labels(count, generator) if label is None else torch.full((count,), label)
        x = y.clone()
        for index in range(len(self.dynamics.lags)):
            chosen = labels == index
            x[chosen], y[chosen] = self.dynamics.pairs(index, int(chosen.sum()), generator)
        return x, y, labels


def rarity(torsions: Tensor, symmetry: Tensor, *, exponent: float) -> Tensor:
    """Return how much more often samples in rare basins are to be drawn, [sample], 1 to `_MOST_RARE`.

        w = max_k (2 pi p_k(t_k))^-exponent

    with p_k the density of torsion k alone, smoothed over half a radian. What is seen too seldom in training is proposed badly,
    and a chain that gets there stays: proposals must be at least as broad as the target.

    Args:
        torsions: [sample, torsion] radian.
        symmetry: [torsion] symmetry numbers.
        exponent: 0 draws all samples alike, 1 all sectors of a torsion.
    """
    angles = reduced(torsions.double(), symmetry)
    order = torch.arange(1, _SMOOTH_ORDERS + 1, dtype=torch.float64)
    waves = torch.exp(1j * angles[..., None] * order)  # [sample, torsion, order]
    damped = waves.mean(0) * torch.exp(-0.5 * (_SMOOTHING * order).square())
    relative = 1 + 2 * (damped.conj() * waves).real.sum(-1)  # 2 pi p_k
    return relative.clamp(min=1e-6).pow(-exponent).amax(1).clamp(1.0, _MOST_RARE)


def free_torsions(zmatrix: ZMatrix, positions: np.ndarray) -> Tensor:
    """Return the free torsions of positions [frame, atom, 3] nm, [frame, torsion] radian float32."""
    internals = zmatrix.from_cartesian(torch.from_numpy(positions).double())
    return internals.dihedrals[:, torch.from_numpy(zmatrix.free)].float()


def negative_log_likelihood(
    network: TorsionNetwork,
    molecules: Sequence[MoleculeSamples],
    count: int,
    generator: torch.Generator,
    *,
    label: int | None = None,
) -> Tensor:
    """Return -log q(t(y) | t(x), label) / n_torsions of random samples of each molecule, nats per torsion.

    Args:
        network: with a label for each lag of the molecules' dynamics, and the independent one.
        molecules: with dynamics, or, where the network has no lags, without.
        count: samples of each molecule.
        generator: source of the draw.
        label: of all samples; None draws labels, too.

    Returns:
        [molecule, count].
    """
    tokens = network.encode([molecule.features for molecule in molecules]).repeat(count)
    longest = tokens.tokens.shape[1]
    drawn = []
    for molecule in molecules:
        x, y, labels = molecule.draw(count, generator, label=label)
        padding = (0, longest - molecule.torsions.shape[1])
        drawn.append((torch.nn.functional.pad(x, padding), torch.nn.functional.pad(y, padding), labels))
    t_x, t_y, chosen = (torch.cat(part).to(tokens.tokens.device) for part in zip(*drawn, strict=True))
    log_q = network.log_prob(tokens, t_y, network.context(tokens, t_x, chosen))
    return -(log_q / tokens.present.sum(1)).view(len(molecules), count)


@torch.no_grad()
def validation_loss(
    network: TorsionNetwork, molecules: Sequence[MoleculeSamples], *, label: int, count: int, seed: int
) -> dict[str, float]:
    """Return the loss of each molecule by name with one label, from the same samples at every call."""
    generator = torch.Generator().manual_seed(seed)
    return {m.name: negative_log_likelihood(network, [m], count, generator, label=label).mean().item() for m in molecules}


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Frames of a held-out molecule, from which the acceptance of proposals is measured.

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

    def measure(self, network: TorsionNetwork, *, label: int, seed: int) -> tuple[float, float]:
        """Return acceptance and standard deviation of log r of a label, from the same random numbers at every call."""
        proposal = bind(network, self.molecule, label=label)
        target = self.molecule.gaussian.target
        log_density = boltzmann(target.potential, target.kT)
        return proposal_quality(log_density, proposal.propose, self.x, torch.Generator().manual_seed(seed))

    def slowest(self, network: TorsionNetwork, *, seed: int) -> float:
        """Return the acceptance from the frames that independent proposals leave most seldom, the first percentile.

        An independence sampler forgets at the rate of the state it leaves last: from x it goes with probability
        mean_y min(1, w(y) / w(x)), w = pi / q (Liu 1996, doi:10.1007/BF00162521). A mean acceptance hides such states.
        """
        label = len(network.architecture.lags_ps)
        proposal = bind(network, self.molecule, label=label)
        target = self.molecule.gaussian.target
        log_density = boltzmann(target.potential, target.kT)
        y, log_forward, log_backward = proposal.propose(self.x, torch.Generator().manual_seed(seed))
        return leaving(log_density(self.x) - log_backward, log_density(y) - log_forward).quantile(0.01).item()


def leaving(log_w_x: Tensor, log_w_y: Tensor) -> Tensor:
    """Return the chance that an independent proposal is accepted from each state, [state].

    Args:
        log_w_x: [state] log pi - log q of the states.
        log_w_y: [draw] of draws from q; NaN where invalid, which counts as a rejection.
    """
    usable = log_w_y.nan_to_num(nan=-torch.inf, posinf=-torch.inf)
    return (usable - log_w_x[:, None]).clamp(max=0).exp().mean(1)


def train(
    state: ModuleState[TorsionNetwork],
    molecules: Sequence[MoleculeSamples],
    section: TransferConfig,
    *,
    frames: Callable[[int], Frames] | None = None,
    evaluate: Callable[[TorsionNetwork], dict[str, float]] | None = None,
    folder: StateFolder | None = None,
) -> None:
    """Train by likelihood for `section.max_steps`, then for `section.acceptance_steps` by acceptance as well.

    The second part starts from the averaged weights with a fresh optimiser. The averaged weights stay in `state.module`.

    Args:
        state: where training stands; continues from the newest checkpoint in `folder`.
        molecules: the training molecules, their features on the network's device; the same in all ranks.
        section: sizes and rates.
        frames: of a training molecule by its index, for the second part; None: there is no second part.
        evaluate: metrics of a network with averaged weights, called every `section.metrics_every_steps` in the first rank.
        folder: where checkpoints go.

    Raises:
        DataError: another number of processes wrote the checkpoint.
        LongstrideError: another rank ended.
        NumericsError: training diverged.
    """
    if folder is not None:
        state.load(folder)
    first = RateSchedule(peak=section.learning_rate, warm_up=section.warm_up_steps, total=section.max_steps)
    more = 0 if frames is None else section.acceptance_steps
    second = RateSchedule(peak=section.acceptance_rate, warm_up=section.warm_up_steps, total=more, begin=section.max_steps)
    progress = Progress("transferable flow", section.max_steps + more, "steps", start=state.step)
    begin = time.monotonic() - state.wall_s
    for step in range(state.step, section.max_steps + more):
        schedule, tuned = (first, None) if step < section.max_steps else (second, frames)
        if tuned is not None and step == section.max_steps:
            state.adopt_average()
            state.optimizer.state.clear()
        losses = _losses(state.module, molecules, section, state.generator, frames=tuned)
        loss = state.update_from(losses, rate=schedule.rate(state), decay=section.ema_decay, max_gradient=_MAX_GRADIENT)
        schedule.count(state, time.monotonic() - begin)
        last = state.step == section.max_steps + more
        if evaluate is not None and state.ranks.first and (last or state.step % section.metrics_every_steps == 0):
            with state.averaged():
                row = {"step": float(state.step), "wall_s": state.wall_s, "train_nll_per_torsion": loss.item()}
                state.rows.append(row | evaluate(state.module))
        if folder is not None and not last and state.step % section.checkpoint_every_steps == 0:
            state.save(folder)
        if state.ranks.first:
            progress.update(state.step, f"loss {loss.item():.3f} nat per torsion")
    state.adopt_average()


def _losses(
    network: TorsionNetwork,
    molecules: Sequence[MoleculeSamples],
    section: TransferConfig,
    generator: torch.Generator,
    *,
    frames: Callable[[int], Frames] | None,
) -> Iterator[Tensor]:
    """Yield the losses [] of the batches of one step, each drawn when it is asked for; acceptance adds to gradients alone."""
    low, device = section.precision == "bfloat16", network.start.device.type
    for _ in range(section.accumulate):
        chosen = torch.randperm(len(molecules), generator=generator)[: section.molecules_per_step].tolist()
        batch = [molecules[index] for index in chosen]
        with torch.autocast(device, dtype=torch.bfloat16, enabled=low):
            losses = negative_log_likelihood(network, batch, section.samples_per_molecule, generator)
        loss = losses.mean()
        if frames is not None:
            lost = acceptance_losses(network, [frames(index) for index in chosen], section.samples_per_molecule, generator)
            loss = loss + section.acceptance_weight * (lost - lost.detach())
        yield loss
