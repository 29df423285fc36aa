"""Training of the Cartesian flow on lagged pairs, one molecule or several of different sizes in a batch.

    loss = (1 - a) L_lik + a (L_acc + b L_ent)
    L_lik = -E_pairs[log q(y, v | x)] / n_atoms,             v ~ N(0, 1) drawn anew for every pair at every step
    L_acc = -E_{y, v_y ~ q(. | x)}[min(0, log r)] / n_atoms,   r the Metropolis-Hastings ratio with a fresh v_x
    L_ent = +E_{y, v_y ~ q(. | x)}[log q(y, v_y | x)] / n_atoms

L_acc and L_ent are the published fine-tuning (arXiv:2302.01170, with a = b = 0.1): acceptance alone would shrink the steps
to nothing, which the entropy prevents. Proposals that are accepted anyway (r > 1) have no gradient in L_acc.

Each pair is drawn in a random direction of time, which the dynamics' reversibility in positions permits, and turned by a
random rotation of its own, the same for x and y (the networks are not equivariant). Absolute translations need no
augmentation: the density does not see them. The relative one is replaced: y is moved so that its centre of mass meets that of
x, which removes the free diffusion or the freezing of the centre in the dynamics, and then gets a Gaussian step of
`centre_step_nm` (see `longstride.flows.cartesian`). The relative orientation is that of the dynamics, as published, or, with
`turn_step_rad`, is replaced in the same way: y is superposed on x and then turned about its centre by a Gaussian step. As the
target does not depend on orientation either, the chain is exact in both cases; the second spares the flow to propose every
orientation that tumbling reaches, each with bonds of the right length.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from longstride.errors import DataError
from longstride.flows.cartesian import CartesianFlow, element_indices, log_normal
from longstride.progress import Progress
from longstride.state import State
from longstride.training.schedule import RateSchedule

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from longstride.config import FlowConfig
    from longstride.data.checkpoint import StateFolder
    from longstride.potentials.base import Potential
    from longstride.state import System
    from longstride.training.module_state import ModuleState

_MAX_GRADIENT = 100.0
_EVALUATED_AT_ONCE = 256
_SHORT_KEPT = 100.0  # nats that log r may fall short of 0


@dataclass(frozen=True, kw_only=True)
class MoleculePairs:
    """Lagged pairs of one molecule; both ends centred on their mass-weighted centre.

    Attributes:
        x: [pair, atom, 3] nm float32.
        y: [pair, atom, 3] nm float32.
        elements: [atom] int64 indices of the element embedding.
    """

    x: Tensor
    y: Tensor
    elements: Tensor

    def __len__(self) -> int:
        return len(self.x)

    @classmethod
    def from_arrays(cls, pairs: Mapping[str, np.ndarray], system: System, *, superpose: bool = False) -> MoleculePairs:
        """Return the pairs x and y, [pair, atom, 3] nm, of a molecule.

        Args:
            pairs: x and y, [pair, atom, 3] nm.
            system: the molecule.
            superpose: turn each y onto its x.

        Raises:
            DataError: no pairs, other atoms, or an element that the flow does not know.
        """
        if not len(pairs["x"]) or pairs["x"].shape[1] != system.n_atoms:
            raise DataError(f"no pairs of {system.n_atoms} atoms for {system.name}; run reference and shard for it")
        share = system.masses / system.masses.sum()

        def centred(end: np.ndarray) -> Tensor:
            value = end.astype(np.float64)
            return torch.from_numpy(value - np.einsum("pax,a->px", value, share)[:, None])

        elements = element_indices(system.atomic_numbers, name=system.name)
        x, y = centred(pairs["x"]), centred(pairs["y"])
        if superpose:
            y = superposed(y, x, torch.from_numpy(share))
        return cls(x=x.float(), y=y.float(), elements=elements)


def superposed(y: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    """Return each y turned by the rotation that brings it closest to x (Kabsch, doi:10.1107/S0567739476001873).

    Args:
        y: [pair, atom, 3], centred.
        x: [pair, atom, 3], centred.
        weights: [atom] of the squared distances.
    """
    left, _, right = torch.linalg.svd(torch.einsum("pai,a,paj->pij", y, weights, x))
    # the least important axis is flipped where the best orthogonal map would be a reflection
    sign = torch.ones_like(y[:, 0])
    sign[:, 2] = torch.linalg.det(left @ right).sign()
    return y @ ((left * sign[:, None]) @ right)


@dataclass(frozen=True, kw_only=True)
class PaddedPairs:
    """Pairs of one step.

    Attributes:
        x: [batch, atom, 3] nm, zero at padding.
        y: [batch, atom, 3] nm, zero at padding.
        v: [batch, atom, 3] auxiliaries.
        elements: [batch, atom] int64.
        mask: [batch, atom] bool, true for real atoms; None where no entry is padded.
    """

    x: Tensor
    y: Tensor
    v: Tensor
    elements: Tensor
    mask: Tensor | None

    def to(self, device: torch.device) -> PaddedPairs:
        """Return the pairs on a device."""
        x, y, v, elements = (value.to(device) for value in (self.x, self.y, self.v, self.elements))
        return PaddedPairs(x=x, y=y, v=v, elements=elements, mask=None if self.mask is None else self.mask.to(device))


def random_rotations(count: int, generator: torch.Generator) -> Tensor:
    """Return uniformly distributed rotation matrices, [count, 3, 3], from random unit quaternions."""
    w, x, y, z = torch.nn.functional.normalize(torch.randn(count, 4, generator=generator), dim=-1).unbind(-1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def small_rotations(count: int, width: float, generator: torch.Generator) -> Tensor:
    """Return rotations [count, 3, 3] by normal rotation vectors of the given width per axis, radian."""
    x, y, z = (width * torch.randn(count, 3, generator=generator)).unbind(-1)
    zero = torch.zeros_like(x)
    rows = ((zero, -z, y), (z, zero, -x), (-y, x, zero))
    return torch.linalg.matrix_exp(torch.stack([torch.stack(row, -1) for row in rows], -2))


@dataclass(frozen=True, kw_only=True)
class RelativeStep:
    """What training puts in place of the dynamics' relative motion as a whole.

    Attributes:
        centre_nm: width of the step of the centre of y, per axis.
        turn_rad: width of the turn of y about its centre, per axis; None keeps the orientation of the data.
    """

    centre_nm: float
    turn_rad: float | None = None

    def __call__(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """Return y [batch, atom, 3], turned and moved."""
        if self.turn_rad is not None:
            y = y @ small_rotations(len(y), self.turn_rad, generator).mT
        return y + self.centre_nm * torch.randn(len(y), 1, 3, generator=generator)


def draw_batch(molecules: Sequence[MoleculePairs], size: int, *, step: RelativeStep, generator: torch.Generator) -> PaddedPairs:
    """Draw pairs with replacement, molecules with equal probability, and augment them as the module describes."""
    which = torch.randint(len(molecules), (size,), generator=generator)
    direction = torch.randint(2, (size,), generator=generator).tolist()
    chosen = []
    for molecule, reverse in zip(which.tolist(), direction, strict=True):
        pairs = molecules[molecule]
        row = int(torch.randint(len(pairs), (), generator=generator))
        ends = (pairs.x[row], pairs.y[row])
        chosen.append((*(ends[::-1] if reverse else ends), pairs.elements))
    return _augmented(chosen, turn=random_rotations(size, generator), step=step, generator=generator)


def _augmented(
    chosen: Sequence[tuple[Tensor, Tensor, Tensor]], *, turn: Tensor, step: RelativeStep, generator: torch.Generator
) -> PaddedPairs:
    """Pad, turn x and y alike, move y by a relative step, and draw auxiliaries."""
    pad = torch.nn.utils.rnn.pad_sequence
    x, y = (pad([entry[end] for entry in chosen], batch_first=True) @ turn.mT for end in (0, 1))
    elements = pad([entry[2] for entry in chosen], batch_first=True)
    sizes = torch.tensor([len(entry[2]) for entry in chosen])
    mask = torch.arange(x.shape[1]) < sizes[:, None]
    y = torch.where(mask[..., None], step(y, generator), 0.0)
    v = torch.randn(x.shape, generator=generator)
    return PaddedPairs(x=x, y=y, v=v, elements=elements, mask=None if bool(mask.all()) else mask)


def nll_per_atom(flow: CartesianFlow, batch: PaddedPairs) -> Tensor:
    """Return -log q(y, v | x) / n_atoms, [batch] nats."""
    condition = flow.condition(batch.x, batch.elements, batch.mask)
    n_atoms = batch.x.shape[1] if batch.mask is None else batch.mask.sum(1)
    return -flow.log_prob(batch.y, batch.v, condition) / n_atoms


@dataclass(frozen=True, kw_only=True)
class AcceptanceLoss:
    """L_acc + b L_ent of one molecule.

    Attributes:
        potential: the target, differentiable through `energy`.
        kT: thermal energy, kJ/mol.
        size: proposals per step.
        entropy_weight: b.
    """

    potential: Potential
    kT: float
    size: int
    entropy_weight: float

    def __call__(self, flow: CartesianFlow, pairs: MoleculePairs, generator: torch.Generator) -> Tensor:
        """Return the loss, from one proposal for each of `size` random x of the molecule, randomly turned."""
        device = flow.embedding.weight.device
        row = torch.randint(len(pairs), (self.size,), generator=generator)
        x = (pairs.x[row] @ random_rotations(self.size, generator).mT).to(device)
        v_x = torch.randn(x.shape, generator=generator).to(device)
        elements = pairs.elements.to(device)
        y, v_y, forward = flow.sample(flow.condition(x, elements), generator)
        backward = flow.log_prob(x, v_x, flow.condition(y, elements))
        at_x, at_y = self._reduced(x), self._reduced(y)
        log_r = at_y - at_x + log_normal(v_y) - log_normal(v_x) + backward - forward
        usable = log_r.isfinite()
        # beyond this the loss grows only logarithmically, so that a clash does not outweigh everything else
        short = (-log_r).clamp(min=0)
        softened = torch.where(short < _SHORT_KEPT, short, _SHORT_KEPT + torch.log1p((short - _SHORT_KEPT).clamp(min=0)))
        acceptance = torch.where(usable, softened, 0.0).sum() / usable.sum().clamp(min=1)
        return (acceptance + self.entropy_weight * forward.mean()) / x.shape[1]

    def _reduced(self, positions: Tensor) -> Tensor:
        """Return -U/kT, [batch]."""
        if positions.requires_grad:
            # a masked loss sends back zero times the force, which is NaN where atoms overlap
            positions = positions.clone()
            positions.register_hook(lambda gradient: gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
        return -self.potential.energy(State(positions=positions)).double() / self.kT


def train(
    state: ModuleState[CartesianFlow],
    molecules: Sequence[MoleculePairs],
    section: FlowConfig,
    *,
    acceptance_loss: AcceptanceLoss | None = None,
    evaluate: Callable[[CartesianFlow], dict[str, float]] | None = None,
    folder: StateFolder | None = None,
) -> None:
    """Train to `section.max_steps`, leaving the averaged weights in `state.module`.

    Args:
        state: where training stands; continues from the newest checkpoint in `folder`.
        molecules: training pairs.
        section: `section.cartesian` holds the settings of this flow, the rest is shared with the internal one.
        acceptance_loss: the fine-tuning terms, of the first molecule; None trains on the likelihood alone.
        evaluate: metrics of the flow with averaged weights, called every `section.metrics_every_steps`.
        folder: where checkpoints go.

    Raises:
        NumericsError: training diverged.
    """
    flow, settings = state.module, section.cartesian
    if folder is not None:
        state.load(folder)
    device = flow.embedding.weight.device
    step = RelativeStep(centre_nm=settings.centre_step_nm, turn_rad=settings.turn_step_rad)
    schedule = RateSchedule(
        peak=settings.learning_rate,
        warm_up=settings.warm_up_steps,
        total=section.max_steps,
        max_seconds=section.max_seconds,
    )
    progress = Progress("flow", section.max_steps, "steps", start=state.step)
    begin = time.monotonic() - state.wall_s
    while state.step < schedule.last_step(state):
        batch = draw_batch(molecules, settings.batch_size, step=step, generator=state.generator).to(device)
        likelihood = nll_per_atom(flow, batch).mean()
        loss = likelihood
        if acceptance_loss is not None and state.step >= settings.acceptance_from_step:
            share = settings.acceptance_weight
            loss = (1 - share) * likelihood + share * acceptance_loss(flow, molecules[0], state.generator)
        state.update(loss, rate=schedule.rate(state), decay=section.ema_decay, max_gradient=_MAX_GRADIENT)
        schedule.count(state, time.monotonic() - begin)
        done = state.step == schedule.last_step(state)
        if evaluate is not None and (done or state.step % section.metrics_every_steps == 0):
            _record(state, evaluate, likelihood.item())
        if folder is not None and not done and state.step % section.checkpoint_every_steps == 0:
            state.save(folder)
        progress.update(state.step, f"loss {likelihood.item():.3f} nat per atom")
    state.wall_s = time.monotonic() - begin
    state.adopt_average()


def _record(state: ModuleState[CartesianFlow], evaluate: Callable[[CartesianFlow], dict[str, float]], train_nll: float) -> None:
    row = {"step": float(state.step), "wall_s": state.wall_s, "train_nll_per_atom": train_nll}
    with state.averaged() as flow:
        state.rows.append(row | evaluate(flow))


@torch.no_grad()
def validation_nll(flow: CartesianFlow, pairs: MoleculePairs, *, step: RelativeStep, seed: int) -> float:
    """Return the mean -log q / n_atoms over the pairs of one molecule; auxiliaries and relative steps come from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    device = flow.embedding.weight.device
    total = 0.0
    for chunk in torch.arange(len(pairs)).split(_EVALUATED_AT_ONCE):
        entries = [(pairs.x[row], pairs.y[row], pairs.elements) for row in chunk.tolist()]
        turn = torch.eye(3).expand(len(entries), 3, 3)
        batch = _augmented(entries, turn=turn, step=step, generator=generator).to(device)
        total += nll_per_atom(flow, batch).sum().item()
    return total / len(pairs)
