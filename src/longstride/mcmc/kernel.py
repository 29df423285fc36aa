"""Markov kernels over many chains, and how they are combined.

A kernel maps the state of all chains to the next one, drawing from the generator it is given and nothing else. It
declares what it leaves invariant:

    exact        the target, to floating-point precision
    unadjusted   a distribution that approaches the target as the time step goes to zero
    biased       something else; never used for equilibrium averages
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from longstride.errors import LongstrideError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from longstride.flows.notes import Notes
    from longstride.state import State

    LogDensity = Callable[[State], Tensor]

Invariance = Literal["exact", "unadjusted", "biased"]
_WEAKEST_LAST: tuple[Invariance, ...] = ("exact", "unadjusted", "biased")


@dataclass(frozen=True, kw_only=True)
class ChainState:
    """Where all chains are.

    Attributes:
        state: positions [chain, atom, 3] nm.
        log_density: [chain] float64, log of the target density at `state` up to one constant; never recomputed.
        velocities: [chain, atom, 3] nm/ps, Maxwell-Boltzmann and independent of the positions; None until a kernel that
            moves by dynamics has drawn them. Kernels that move positions alone hand them on.
        notes: what a proposal knows of `state`; None where the last kernel that moved knew nothing.
    """

    state: State
    log_density: Tensor
    velocities: Tensor | None = None
    notes: Notes | None = None


@dataclass(frozen=True, kw_only=True)
class Info:
    """What one step did.

    Attributes:
        accepted: [chain] how many of the step's proposals were accepted (bool where there is one).
        log_alpha: [chain] float64, log acceptance ratio of the last proposal before min(0, .); NaN or -inf where it was
            invalid.
        label: name of the kernel that moved.
        energy_calls: target energies evaluated.
        force_calls: target energies with forces evaluated.
        proposals: proposals per chain that the step stands for.
        parts: what each kernel of a cycle did; empty elsewhere.
    """

    accepted: Tensor
    log_alpha: Tensor
    label: str
    energy_calls: int
    force_calls: int = 0
    proposals: int = 1
    parts: tuple[Info, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A Markov kernel.

    Attributes:
        step: (ChainState, generator) -> (ChainState, Info).
        invariance: what the kernel leaves invariant.
        labels: every label its Info, or the parts of its Info, may carry.
    """

    step: Callable[[ChainState, torch.Generator], tuple[ChainState, Info]]
    invariance: Invariance
    labels: tuple[str, ...]

    def __call__(self, chains: ChainState, generator: torch.Generator) -> tuple[ChainState, Info]:
        """Advance all chains by one step."""
        return self.step(chains, generator)


def _weakest(kernels: Sequence[Kernel]) -> Invariance:
    return max((kernel.invariance for kernel in kernels), key=_WEAKEST_LAST.index)


def _labels(kernels: Sequence[Kernel]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(itertools.chain.from_iterable(kernel.labels for kernel in kernels)))


def mixture(kernels: Sequence[Kernel], probabilities: Sequence[float]) -> Kernel:
    """Return the kernel that picks one of `kernels` at random each step, the same one for all chains.

    The probabilities are constants. If they depended on the state, a mixture of exact kernels would be biased.

    Raises:
        LongstrideError: the probabilities are not as many as the kernels, are negative, or do not sum to one.
    """
    if len(probabilities) != len(kernels) or min(probabilities) < 0 or abs(sum(probabilities) - 1) > 1e-9:
        raise LongstrideError(f"a mixture of {len(kernels)} kernels needs as many probabilities that sum to 1: {probabilities}")
    edges = torch.tensor(list(itertools.accumulate(probabilities)), dtype=torch.float64)

    def step(chains: ChainState, generator: torch.Generator) -> tuple[ChainState, Info]:
        draw = torch.rand((), generator=generator, dtype=torch.float64, device=generator.device).cpu()
        index = min(int(torch.searchsorted(edges, draw, right=True)), len(kernels) - 1)
        return kernels[index](chains, generator)

    return Kernel(step=step, invariance=_weakest(kernels), labels=_labels(kernels))


def cycle(*kernels: Kernel) -> Kernel:
    """Return the kernel that applies `kernels` in turn; one step is one pass.

    Info is that of the pass as a whole: a chain counts as accepted where any kernel moved it, log_alpha is the last; its
    parts are those of the kernels. The pass leaves the target invariant where each kernel does, but is not reversible.
    """

    def step(chains: ChainState, generator: torch.Generator) -> tuple[ChainState, Info]:
        infos = []
        for kernel in kernels:
            chains, info = kernel(chains, generator)
            infos.append(info)
        whole = Info(
            accepted=torch.stack([info.accepted > 0 for info in infos]).any(0),
            log_alpha=infos[-1].log_alpha,
            label="cycle",
            energy_calls=sum(info.energy_calls for info in infos),
            force_calls=sum(info.force_calls for info in infos),
            parts=tuple(part for info in infos for part in (info.parts or (info,))),
        )
        return chains, whole

    return Kernel(step=step, invariance=_weakest(kernels), labels=_labels(kernels))
