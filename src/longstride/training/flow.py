"""Training of the internal-coordinate flow: one visible loop over lagged pairs.

Three terms are minimised. With t the free torsions and s the stiff coordinates,

    likelihood   -E_data[log q(t(y) | t(x), label) + (1 - w) log q(s(y) | t(y))]
    energy       w E_{y ~ q(. | x)}[log q(s | t) + U(t, s)/kT - log prod b^2 sin(theta)]
    balance      v E_{y ~ q(. | x)}[huber(log r(x, y))],   log r = log pi(y) q(x | y) - log pi(x) q(y | x)

The energy term is the reverse Kullback-Leibler divergence of the stiff coordinates at given torsions (as in Boltzmann
generators, arXiv:1812.01729). It needs no further data, so it ends the overfitting that a few nanoseconds of molecular
dynamics would otherwise cause; torsions, where modes could be lost, are not drawn towards it. The balance term asks the
torsion densities for detailed balance, which is what Metropolis-Hastings acceptance measures; y is a fixed sample in
it, so the likelihood alone decides how far proposals reach. Pairs are used in both directions of time, which
the dynamics' reversibility in positions permits.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from longstride.errors import DataError, NumericsError
from longstride.flows.zmatrix import Internals
from longstride.progress import Progress
from longstride.state import State

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np

    from longstride.config import FlowConfig
    from longstride.data.checkpoint import StateFolder
    from longstride.flows.internal import InternalFlow
    from longstride.potentials.base import Potential

_DROP_KEPT = 30.0  # loss of log-weight against x beyond which the energy term grows only logarithmically
_BALANCE_KEPT = 10.0  # |log r| beyond which a proposal clashes and says nothing about the torsions' balance
_HUBER = 2.0
_MAX_GRADIENT = 10.0


@dataclass(frozen=True, kw_only=True)
class EncodedPairs:
    """Lagged pairs in encoded form, one entry per pair; both ends carry everything, as pairs are used both ways.

    Attributes:
        torsions: [2, pair, K] radian: of x and of y.
        stiff: [2, pair, S] centred stiff coordinates.
        label: [pair] index of the pair's lag.
    """

    torsions: Tensor
    stiff: Tensor
    label: Tensor

    def __len__(self) -> int:
        return self.torsions.shape[1]


def internals_of(flow: InternalFlow, positions: np.ndarray) -> Internals:
    """Return float64 internal coordinates of positions [frame, atom, 3] nm."""
    return flow.zmatrix.from_cartesian(torch.from_numpy(positions).double())


def encode_pairs(flow: InternalFlow, pairs: Sequence[Mapping[str, np.ndarray]]) -> EncodedPairs:
    """Return the encoded pairs of all lags; `pairs` holds one mapping of x and y, [pair, atom, 3] nm, per lag.

    Raises:
        DataError: some frame has another handedness than most, which the flow could not propose.
    """
    torsions, stiff, label = [], [], []
    for index, lagged in enumerate(pairs):
        ends = [flow.encode(internals_of(flow, lagged[end])) for end in ("x", "y")]
        torsions.append(torch.stack([t for t, _ in ends]))
        stiff.append(torch.stack([s for _, s in ends]))
        label.append(torch.full((len(lagged["x"]),), index))
        outside = sum(int((~flow.contains(s)).sum()) for _, s in ends)
        if outside:
            raise DataError(
                f"{outside} frames differ from the others in the handedness of a centre; the flow keeps handedness, so give"
                " structures of one stereoisomer with canonically labelled hydrogens (run prepare and reference again)"
            )
    return EncodedPairs(torsions=torch.cat(torsions, 1), stiff=torch.cat(stiff, 1), label=torch.cat(label))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Pairs of one step: torsions of x and y [batch, K], stiff coordinates of x and y [batch, S], label [batch]."""

    torsions_x: Tensor
    torsions_y: Tensor
    stiff_x: Tensor
    stiff_y: Tensor
    label: Tensor

    def first(self, size: int) -> Batch:
        """Return the first `size` entries."""
        return Batch(**{name: value[:size] for name, value in vars(self).items()})


def draw_batch(pairs: EncodedPairs, size: int, independent_fraction: float, generator: torch.Generator) -> Batch:
    """Draw pairs with replacement, each in a random direction of time, some relabelled as independent.

    An independent pair needs no partner: its x is not seen by the flow.
    """
    chosen = torch.randint(len(pairs), (size,), generator=generator)
    direction = torch.randint(2, (size,), generator=generator)
    independent = torch.rand(size, generator=generator) < independent_fraction
    n_lags = int(pairs.label.max()) + 1
    return Batch(
        torsions_x=pairs.torsions[direction, chosen],
        torsions_y=pairs.torsions[1 - direction, chosen],
        stiff_x=pairs.stiff[direction, chosen],
        stiff_y=pairs.stiff[1 - direction, chosen],
        label=torch.where(independent, n_lags, pairs.label[chosen]),
    )


def negative_log_likelihood(flow: InternalFlow, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return -log q(t(y) | t(x)) and -log q(s(y) | t(y)), each [batch], in nats per radian^K and per stiff coordinates."""
    dtype = flow.network_dtype
    torsions = flow.log_prob_torsions(batch.torsions_y.to(dtype), batch.torsions_x.to(dtype), batch.label)
    return -torsions, -flow.log_prob_stiff(batch.stiff_y, batch.torsions_y)


@dataclass(frozen=True, kw_only=True)
class EnergyLoss:
    """The two terms that ask the potential instead of the data.

    Attributes:
        potential: the target, differentiable through `energy`.
        kT: thermal energy, kJ/mol.
        size: proposals per step.
    """

    potential: Potential
    kT: float
    size: int

    def __call__(self, flow: InternalFlow, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the energy and the balance term, from one proposal for each of the first `size` x of the batch."""
        x = batch.first(self.size)
        dtype = flow.network_dtype
        torsions_x = x.torsions_x.to(dtype)
        with torch.no_grad():
            torsions_y = flow.torsion_network.sample(flow.context(torsions_x, x.label), generator)
            inside_x, _ = flow.decode(x.torsions_x, x.stiff_x)
            log_weight_x = self._reduced(flow, inside_x) - flow.log_prob_stiff(x.stiff_x, x.torsions_x)
        stiff, log_stiff = flow.sample_stiff(torsions_y, generator)
        internals, inside = flow.decode(torsions_y, stiff)
        # log pi(y) - log q(s | t), the log-weight of the stiff part
        log_weight_y = self._reduced(flow, internals) - log_stiff
        drop = log_weight_x - log_weight_y
        softened = torch.where(drop < _DROP_KEPT, drop, _DROP_KEPT + torch.log1p((drop - _DROP_KEPT).clamp(min=0)))
        forward = flow.log_prob_torsions(torsions_y, torsions_x, x.label)
        backward = flow.log_prob_torsions(torsions_x, torsions_y, x.label)
        log_r = -drop.detach() + backward - forward
        usable = inside & drop.isfinite()
        balance = nn.functional.huber_loss(log_r, torch.zeros_like(log_r), reduction="none", delta=_HUBER)
        near = usable & (log_r.detach().abs() < _BALANCE_KEPT)
        return _mean_where(usable, softened), _mean_where(near, balance)

    def _reduced(self, flow: InternalFlow, internals: Internals) -> Tensor:
        """Return log pi in internal coordinates, -U/kT + log measure, [batch]."""
        positions = flow.zmatrix.to_cartesian(internals)
        log_measure = flow.zmatrix.log_measure(internals, positions)
        if positions.requires_grad:
            # a masked loss sends back zero times the force, which is NaN where atoms overlap
            positions.register_hook(lambda gradient: gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
        energy = self.potential.energy(State(positions=positions))
        return log_measure - energy.double() / self.kT


def _mean_where(mask: Tensor, value: Tensor) -> Tensor:
    return torch.where(mask, value, 0.0).sum() / mask.sum().clamp(min=1)


def learning_rate(step: int, *, peak: float, warm_up: int, total: int) -> float:
    """Return the rate of a step: linear warm-up, then a half cosine to zero at `total`; depends on steps only."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(total - warm_up, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


@dataclass(kw_only=True)
class Trainer:
    """Everything that training changes, so that a checkpoint can hold all of it.

    Attributes:
        flow: the network in training.
        optimizer: its optimiser.
        ema: moving average of the weights, by parameter name.
        generator: the only random stream of training.
        step: optimiser steps done.
        wall_s: seconds spent, summed over attempts.
        cooldown_from: the step at which the time limit began to end training early; None where it did not.
        rows: metrics so far.
    """

    flow: InternalFlow
    optimizer: torch.optim.AdamW
    ema: dict[str, Tensor]
    generator: torch.Generator
    step: int = 0
    wall_s: float = 0.0
    cooldown_from: int | None = None
    rows: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def fresh(cls, flow: InternalFlow, section: FlowConfig, seed: int) -> Trainer:
        """Return the trainer of step 0."""
        optimizer = torch.optim.AdamW(flow.parameters(), lr=section.learning_rate, weight_decay=section.weight_decay)
        ema = {name: value.detach().clone() for name, value in flow.named_parameters()}
        return cls(flow=flow, optimizer=optimizer, ema=ema, generator=torch.Generator().manual_seed(seed))

    def save(self, folder: StateFolder) -> None:
        """Write a checkpoint from which `load` continues bit for bit."""
        arrays = {f"weight.{name}": value.detach().numpy() for name, value in self.flow.named_parameters()}
        arrays |= {f"ema.{name}": value.numpy() for name, value in self.ema.items()}
        for name, value in self.flow.named_parameters():
            for key, moment in self.optimizer.state.get(value, {}).items():
                arrays[f"adam.{key}.{name}"] = moment.numpy()
        arrays["generator"] = self.generator.get_state().numpy()
        meta = {"wall_s": self.wall_s, "cooldown_from": self.cooldown_from, "rows": self.rows}
        folder.save(self.step, arrays, meta)

    @torch.no_grad()
    def load(self, folder: StateFolder) -> None:
        """Continue from the newest checkpoint, if there is one."""
        saved = folder.latest()
        if saved is None:
            return
        self.step = saved.step
        self.wall_s, self.cooldown_from = saved.meta["wall_s"], saved.meta["cooldown_from"]
        self.rows = saved.meta["rows"]
        tensors = {name: torch.from_numpy(value.copy()) for name, value in saved.arrays.items()}
        self.generator.set_state(tensors["generator"])
        for name, value in self.flow.named_parameters():
            value.copy_(tensors[f"weight.{name}"])
            self.ema[name].copy_(tensors[f"ema.{name}"])
            keys = ("step", "exp_avg", "exp_avg_sq")
            self.optimizer.state[value] = {key: tensors[f"adam.{key}.{name}"].reshape(_shape(key, value)) for key in keys}

    @torch.no_grad()
    def update(self, loss: Tensor, *, rate: float, decay: float) -> None:
        """One optimiser step along the clipped gradient of `loss`, and one step of the moving average.

        Raises:
            NumericsError: the gradient is not finite.
        """
        self.optimizer.zero_grad()
        with torch.enable_grad():
            loss.backward()
        norm = nn.utils.clip_grad_norm_(self.flow.parameters(), _MAX_GRADIENT)
        if not bool(norm.isfinite()):
            raise NumericsError(f"flow training diverged at step {self.step}; lower flow.learning_rate")
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        # early on the average follows the weights, so that it never remembers the initial ones
        weight = 1.0 - min(decay, (1 + self.step) / (10 + self.step))
        for name, value in self.flow.named_parameters():
            self.ema[name].lerp_(value, weight)
        self.step += 1


def _shape(key: str, value: Tensor) -> torch.Size:
    return torch.Size([]) if key == "step" else value.shape


def train(
    trainer: Trainer,
    pairs: EncodedPairs,
    section: FlowConfig,
    *,
    energy_loss: EnergyLoss | None = None,
    evaluate: Callable[[InternalFlow], dict[str, float]] | None = None,
    folder: StateFolder | None = None,
) -> None:
    """Train to `section.max_steps`, leaving the averaged weights in `trainer.flow`.

    Args:
        trainer: where training stands; continues from the newest checkpoint in `folder`.
        pairs: encoded training pairs.
        section: sizes, rates and limits.
        energy_loss: the reverse Kullback-Leibler term; None trains on the likelihood alone.
        evaluate: metrics of a flow with averaged weights, called every `section.metrics_every_steps`.
        folder: where checkpoints go.
    """
    if folder is not None:
        trainer.load(folder)
    progress = Progress("flow", section.max_steps, "steps", start=trainer.step)
    begin = time.monotonic() - trainer.wall_s
    while trainer.step < _last_step(trainer, section):
        rate = _rate(trainer, section)
        batch = draw_batch(pairs, section.batch_size, section.independent_fraction, trainer.generator)
        torsions, stiff = (value.mean() for value in negative_log_likelihood(trainer.flow, batch))
        likelihood = torsions + stiff
        loss = likelihood
        if energy_loss is not None and trainer.step >= section.energy_from_step:
            energy, balance = energy_loss(trainer.flow, batch, trainer.generator)
            loss = torsions + (1 - section.energy_weight) * stiff
            loss = loss + section.energy_weight * energy + section.balance_weight * balance
        trainer.update(loss, rate=rate, decay=section.ema_decay)
        trainer.wall_s = time.monotonic() - begin
        if trainer.cooldown_from is None and trainer.wall_s > section.max_seconds:
            trainer.cooldown_from = trainer.step
        last = trainer.step == _last_step(trainer, section)
        if evaluate is not None and (last or trainer.step % section.metrics_every_steps == 0):
            _record(trainer, evaluate, likelihood.item())
        if folder is not None and not last and trainer.step % section.checkpoint_every_steps == 0:
            trainer.save(folder)
        progress.update(trainer.step, f"loss {likelihood.item():.2f} nat")
    trainer.wall_s = time.monotonic() - begin
    with torch.no_grad():
        for name, value in trainer.flow.named_parameters():
            value.copy_(trainer.ema[name])


def _cooldown_steps(section: FlowConfig) -> int:
    return max(1, section.max_steps // 20)


def _last_step(trainer: Trainer, section: FlowConfig) -> int:
    if trainer.cooldown_from is None:
        return section.max_steps
    return min(section.max_steps, trainer.cooldown_from + _cooldown_steps(section))


def _rate(trainer: Trainer, section: FlowConfig) -> float:
    """Return the learning rate; past the time limit it falls linearly to zero over the cool-down."""

    def scheduled(step: int) -> float:
        return learning_rate(step, peak=section.learning_rate, warm_up=section.warm_up_steps, total=section.max_steps)

    if trainer.cooldown_from is None:
        return scheduled(trainer.step)
    left = 1.0 - (trainer.step - trainer.cooldown_from) / _cooldown_steps(section)
    return min(scheduled(trainer.step), scheduled(trainer.cooldown_from) * left)


@torch.no_grad()
def _record(trainer: Trainer, evaluate: Callable[[InternalFlow], dict[str, float]], train_nll: float) -> None:
    """Evaluate the averaged weights and append a row of metrics."""
    kept = {name: value.detach().clone() for name, value in trainer.flow.named_parameters()}
    for name, value in trainer.flow.named_parameters():
        value.copy_(trainer.ema[name])
    n_dof = trainer.flow.n_torsions + trainer.flow.n_stiff
    row = {"step": float(trainer.step), "wall_s": trainer.wall_s, "train_nll_per_dof": train_nll / n_dof}
    trainer.rows.append(row | evaluate(trainer.flow))
    for name, value in trainer.flow.named_parameters():
        value.copy_(kept[name])


@torch.no_grad()
def validation_nll(flow: InternalFlow, pairs: EncodedPairs) -> float:
    """Return the mean negative log-likelihood per degree of freedom over validation pairs."""
    total = 0.0
    for chunk in torch.arange(len(pairs)).split(4096):
        batch = Batch(
            torsions_x=pairs.torsions[0, chunk],
            torsions_y=pairs.torsions[1, chunk],
            stiff_x=pairs.stiff[0, chunk],
            stiff_y=pairs.stiff[1, chunk],
            label=pairs.label[chunk],
        )
        total += sum(value.sum().item() for value in negative_log_likelihood(flow, batch))
    return total / len(pairs) / (flow.n_torsions + flow.n_stiff)
