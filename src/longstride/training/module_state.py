"""Everything that training a module changes, in one value that a checkpoint holds bit for bit."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor, nn

from longstride.errors import DataError, NumericsError
from longstride.training.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from longstride.data.checkpoint import StateFolder

Module = TypeVar("Module", bound=nn.Module)

_GENERATOR = "generator"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(kw_only=True)
class ModuleState(Generic[Module]):
    """A module in training, on any device.

    Attributes:
        module: the network.
        optimizer: AdamW over all of its parameters.
        rate_key: configuration key of the learning rate, for messages.
        average: exponential moving average of the weights, by parameter name.
        generator: the only random stream of training in this process; on the CPU, so that a checkpoint continues on any device.
        ranks: this process among those that train together; all of them make the same steps.
        step: optimiser steps done.
        wall_s: seconds spent, summed over attempts.
        cooldown_from: the step at which a time limit began to end training early; None where it did not.
        rows: metrics so far.
    """

    module: Module
    optimizer: torch.optim.AdamW
    rate_key: str
    average: dict[str, Tensor]
    generator: torch.Generator
    ranks: Ranks = ALONE
    step: int = 0
    wall_s: float = 0.0
    cooldown_from: int | None = None
    rows: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def fresh(
        cls,
        module: Module,
        *,
        learning_rate: float,
        weight_decay: float,
        rate_key: str,
        seed: int,
        ranks: Ranks = ALONE,
    ) -> ModuleState[Module]:
        """Return the state of step 0; the weights are the same in all `ranks`, the seeds are not."""
        optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=weight_decay)
        average = {name: value.detach().clone() for name, value in module.named_parameters()}
        generator = torch.Generator().manual_seed(seed)
        return cls(module=module, optimizer=optimizer, rate_key=rate_key, average=average, generator=generator, ranks=ranks)

    def save(self, folder: StateFolder) -> None:
        """Write a checkpoint from which `load` continues bit for bit, with the generators of all ranks."""
        generators = self.ranks.gather(self.generator.get_state().numpy())
        if not self.ranks.first:
            return
        arrays = {f"average.{name}": value.cpu().numpy() for name, value in self.average.items()}
        for name, value in self.module.named_parameters():
            arrays[f"weight.{name}"] = value.detach().cpu().numpy()
            for key, moment in self.optimizer.state.get(value, {}).items():
                arrays[f"adam.{key}.{name}"] = moment.cpu().numpy().reshape(-1)
        arrays |= {_generator_of(rank): value for rank, value in enumerate(generators)}
        folder.save(self.step, arrays, {"wall_s": self.wall_s, "cooldown_from": self.cooldown_from, "rows": self.rows})

    @torch.no_grad()
    def load(self, folder: StateFolder) -> None:
        """Continue from the newest checkpoint, if there is one.

        Raises:
            DataError: another number of processes wrote it; their random streams would not continue.
        """
        saved = self.ranks.share(folder.latest() if self.ranks.first else None)
        if saved is None:
            return
        count = sum(name.startswith(_GENERATOR) for name in saved.arrays)
        if count != self.ranks.count:
            raise DataError(
                f"{folder.path} was written by a training in {_processes(count)}, not {_processes(self.ranks.count)};"
                " continue with as many, or delete it to start afresh"
            )
        self.step, self.rows = saved.step, saved.meta["rows"]
        self.wall_s, self.cooldown_from = saved.meta["wall_s"], saved.meta["cooldown_from"]
        tensors = {name: torch.from_numpy(value.copy()) for name, value in saved.arrays.items()}
        self.generator.set_state(tensors[_generator_of(self.ranks.rank)])
        for name, value in self.module.named_parameters():
            # files hold single numbers as arrays of one
            value.copy_(tensors[f"weight.{name}"].view(value.shape))
            self.average[name].copy_(tensors[f"average.{name}"].view(value.shape))
            shapes = dict.fromkeys(_MOMENTS, value.shape) | {"step": torch.Size([])}
            moments = {key: tensors[f"adam.{key}.{name}"].reshape(shape) for key, shape in shapes.items()}
            # the step counter stays on the CPU, as AdamW keeps it
            self.optimizer.state[value] = {
                key: moment if key == "step" else moment.to(value.device) for key, moment in moments.items()
            }

    def update(self, loss: Tensor, *, rate: float, decay: float, max_gradient: float) -> None:
        """As `update_from`, along the gradient of a single loss."""
        self.update_from([loss], rate=rate, decay=decay, max_gradient=max_gradient)

    @torch.no_grad()
    def update_from(self, losses: Iterable[Tensor], *, rate: float, decay: float, max_gradient: float) -> Tensor:
        """One optimiser step along the clipped mean gradient of `losses` in all ranks, and one of the moving average.

        Args:
            losses: [] each; drawn one after another, so that of an iterator only one graph is in memory at a time.
            rate: learning rate of the step.
            decay: of the moving average.
            max_gradient: norm to which the gradient is clipped.

        Returns:
            The mean loss, [].

        Raises:
            NumericsError: the gradient is not finite.
            LongstrideError: another rank ended.
        """
        self.optimizer.zero_grad()
        with torch.enable_grad():
            found = [_differentiated(loss) for loss in losses]
        parameters = list(self.module.parameters())
        if len(found) > 1:
            for gradient in (value.grad for value in parameters if value.grad is not None):
                gradient.div_(len(found))
        loss = self.ranks.average_gradients(parameters, torch.stack(found).mean() if len(found) > 1 else found[0])
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), max_gradient)
        if not bool(norm.isfinite()):
            raise NumericsError(f"training diverged at step {self.step}; lower {self.rate_key}")
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        # early on the average follows the weights, so that it never remembers the initial ones
        weight = 1.0 - min(decay, (1 + self.step) / (10 + self.step))
        for name, value in self.module.named_parameters():
            self.average[name].lerp_(value, weight)
        self.step += 1
        return loss

    @contextlib.contextmanager
    def averaged(self) -> Iterator[Module]:
        """Lend the module with averaged weights."""
        kept = {name: value.detach().clone() for name, value in self.module.named_parameters()}
        self.adopt_average()
        try:
            yield self.module
        finally:
            _copy(self.module, kept)

    def adopt_average(self) -> None:
        """Put the averaged weights into the module."""
        _copy(self.module, self.average)


def _differentiated(loss: Tensor) -> Tensor:
    loss.backward()
    return loss.detach()


def _generator_of(rank: int) -> str:
    return f"{_GENERATOR}.{rank}" if rank else _GENERATOR


def _processes(count: int) -> str:
    return f"{count} processes" if count > 1 else "one process"


@torch.no_grad()
def _copy(module: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, value in module.named_parameters():
        value.copy_(weights[name])
