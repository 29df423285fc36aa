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

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from longstride.errors import DataError
from longstride.flows.zmatrix import Internals
from longstride.progress import Progress
from longstride.state import State
from longstride.training.schedule import RateSchedule

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np

    from longstride.config import FlowConfig
    from longstride.data.checkpoint import StateFolder
    from longstride.flows.internal import InternalFlow
    from longstride.potentials.base import Potential
    from longstride.training.module_state import ModuleState

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


def train(
    state: ModuleState[InternalFlow],
    pairs: EncodedPairs,
    section: FlowConfig,
    *,
    energy_loss: EnergyLoss | None = None,
    evaluate: Callable[[InternalFlow], dict[str, float]] | None = None,
    folder: StateFolder | None = None,
) -> None:
    """Train to `section.max_steps`, leaving the averaged weights in `state.module`.

    Args:
        state: where training stands; continues from the newest checkpoint in `folder`.
        pairs: encoded training pairs.
        section: sizes, rates and limits.
        energy_loss: the reverse Kullback-Leibler term; None trains on the likelihood alone.
        evaluate: metrics of a flow with averaged weights, called every `section.metrics_every_steps`.
        folder: where checkpoints go.

    Raises:
        NumericsError: training diverged.
    """
    if folder is not None:
        state.load(folder)
    flow = state.module
    schedule = RateSchedule(
        peak=section.learning_rate,
        warm_up=section.warm_up_steps,
        total=section.max_steps,
        max_seconds=section.max_seconds,
    )
    progress = Progress("flow", section.max_steps, "steps", start=state.step)
    begin = time.monotonic() - state.wall_s
    while state.step < schedule.last_step(state):
        batch = draw_batch(pairs, section.batch_size, section.independent_fraction, state.generator)
        torsions, stiff = (value.mean() for value in negative_log_likelihood(flow, batch))
        likelihood = torsions + stiff
        loss = likelihood
        if energy_loss is not None and state.step >= section.energy_from_step:
            energy, balance = energy_loss(flow, batch, state.generator)
            loss = torsions + (1 - section.energy_weight) * stiff
            loss = loss + section.energy_weight * energy + section.balance_weight * balance
        state.update(loss, rate=schedule.rate(state), decay=section.ema_decay, max_gradient=_MAX_GRADIENT)
        schedule.count(state, time.monotonic() - begin)
        last = state.step == schedule.last_step(state)
        if evaluate is not None and (last or state.step % section.metrics_every_steps == 0):
            _record(state, evaluate, likelihood.item())
        if folder is not None and not last and state.step % section.checkpoint_every_steps == 0:
            state.save(folder)
        progress.update(state.step, f"loss {likelihood.item():.2f} nat")
    state.wall_s = time.monotonic() - begin
    state.adopt_average()


@torch.no_grad()
def _record(state: ModuleState[InternalFlow], evaluate: Callable[[InternalFlow], dict[str, float]], train_nll: float) -> None:
    """Evaluate the averaged weights and append a row of metrics."""
    n_dof = state.module.n_torsions + state.module.n_stiff
    row = {"step": float(state.step), "wall_s": state.wall_s, "train_nll_per_dof": train_nll / n_dof}
    with state.averaged() as flow:
        state.rows.append(row | evaluate(flow))


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
