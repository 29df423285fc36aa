"""Processes that train one network together, each on batches of its own, started by `torchrun`.

    gradient = (1 / n) sum over ranks r = 0 .. n - 1 of the gradient of rank r

All ranks start from the same weights and take the same steps, so that they hold the same weights at any time; only the first
one writes. The gradients of a step travel in one sum at its end: a batch's graph changes from step to step and leaves some
parameters out, which hooks on every single parameter would have to be told of.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import distributed

from longstride.compute import die_with_parent
from longstride.errors import ConfigError, LongstrideError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

Value = TypeVar("Value")

# the others wait while the first one evaluates, or while it waits for another job to leave the state folder
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those that train together. Every method but `first` is to be called by all of them.

    Attributes:
        rank: number of this process.
        count: number of processes.
        local: number of this process among those of its node.
    """

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, value: Value) -> Value:
        """Return the value of the first process; what the others give is ignored.

        Raises:
            LongstrideError: another process ended.
        """
        if self.count == 1:
            return value
        shared = [value]
        with _unless_one_ended():
            distributed.broadcast_object_list(shared, src=0)
        return shared[0]

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all processes, in the order of ranks, in the first one, and nothing elsewhere.

        Raises:
            LongstrideError: another process ended.
        """
        if self.count == 1:
            return [value]
        values: list[Any] | None = [None] * self.count if self.first else None
        with _unless_one_ended():
            distributed.gather_object(value, values, dst=0)
        return values or []

    def average_gradients(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        """Replace each gradient by its mean over the processes, and return the mean loss.

        A parameter that had no part in any process keeps no gradient; where it had one in some, it counts as zero elsewhere.

        Args:
            parameters: in the same order in every process.
            loss: [] of this process.

        Raises:
            LongstrideError: another process ended.
        """
        if self.count == 1:
            return loss
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        used = torch.tensor([float(p.grad is not None) for p in parameters]).to(gradients[0])
        flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), used, loss.to(gradients[0]).reshape(1)])
        with _unless_one_ended():
            distributed.all_reduce(flat)
        *means, present, total = flat.split([*(p.numel() for p in parameters), len(used), 1])
        for parameter, mean, anywhere in zip(parameters, means, present.tolist(), strict=True):
            parameter.grad = (mean / self.count).view(parameter.shape) if anywhere else None
        return total[0] / self.count

    def once(self, run: Callable[[Callable[[], None]], bool], make: Callable[[], None]) -> None:
        """Let all processes `make` what the first one finds to do.

        Args:
            run: called in the first process with what it is to run; returns whether it ran it (such as `run_once`).
            make: the work of this process.
        """
        if not self.first:
            if self.share(value=False):
                make()
            return

        def start() -> None:
            self.share(value=True)
            make()

        if not run(start):
            self.share(value=False)


ALONE = Ranks()


def started_processes() -> int | None:
    """Return how many processes `torchrun` started, None where it started none."""
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None


@contextlib.contextmanager
def joined(*, cuda: bool) -> Iterator[Ranks]:
    """Yield this process among those that `torchrun` started, connected to each other; `ALONE` without it.

    Args:
        cuda: whether gradients lie on GPUs (nccl carries them; gloo carries everything else).

    Raises:
        ConfigError: there are to be several processes, and nothing says where the others are.
    """
    count = started_processes() or 1
    if count == 1:
        yield ALONE
        return
    die_with_parent()  # torchrun that was killed leaves its processes behind, and the first would keep the state folder
    try:
        ranks = Ranks(rank=int(os.environ["RANK"]), count=count, local=int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_PATIENCE)
    except (KeyError, ValueError) as error:
        raise ConfigError("WORLD_SIZE is set without the addresses of the processes; start them with torchrun") from error
    yield ranks
    # after an error the process ends anyway, and leaving in good order could wait for the others
    distributed.destroy_process_group()


@contextlib.contextmanager
def _unless_one_ended() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo and nccl raise nothing more specific
        raise LongstrideError(
            f"lost the other processes of this training ({str(error).splitlines()[0]});"
            " the same command continues from the last checkpoint"
        ) from error
