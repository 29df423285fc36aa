"""Metropolis-Hastings for few chains: many proposals from one x evaluated in one batch, used one after the other.

While a chain rejects it stays at x, so its next proposals can be drawn before it is known whether they will be needed. The
first accepted one moves the chain, those before it count as repeats of x, those after it were drawn for nothing and are
thrown away unseen. Every proposal has its own auxiliary variables and its own uniform, so the chain is, draw for draw in
distribution, the sequential one (arXiv:2302.01170, algorithm 1). Sharing an auxiliary draw between the proposals of a
batch would bias it, because the draw would then be replaced at a time that depends on acceptance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from longstride.errors import LongstrideError
from longstride.mcmc.kernel import ChainState, Info, Kernel
from longstride.mcmc.metropolis import accept, draw_and_score, log_ratio
from longstride.state import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from longstride.mcmc.kernel import LogDensity
    from longstride.mcmc.metropolis import Decide, Proposal, Propose

    ProposeMany = Callable[[State, int, torch.Generator], tuple[State, Tensor, Tensor]]


@runtime_checkable
class ManyProposal(Protocol):
    """A proposal that prepares what depends on x alone once for many draws from it."""

    def propose_many(self, x: State, count: int, generator: torch.Generator) -> tuple[State, Tensor, Tensor]:
        """Return y [chain * count], chain by chain, and the two log-densities of each as `metropolis` takes them."""
        ...


def many_of(proposal: Proposal, propose: Propose | None = None) -> ProposeMany:
    """Return the proposal's own `propose_many`, or one that repeats x."""
    if isinstance(proposal, ManyProposal):
        return proposal.propose_many
    single = propose or draw_and_score(proposal)

    def propose_many(x: State, count: int, generator: torch.Generator) -> tuple[State, Tensor, Tensor]:
        return single(State(positions=x.positions.repeat_interleave(count, dim=0)), generator)

    return propose_many


def speculative(
    log_density: LogDensity,
    proposal: Proposal,
    *,
    batch: int,
    steps: int | None = None,
    label: str = "metropolis",
    propose: Propose | None = None,
    decide: Decide | None = None,
) -> Kernel:
    """Return the kernel whose one step is `steps` sequential Metropolis-Hastings steps of every chain; exact.

    Chains advance independently: one that accepts early draws a new batch from where it went, until all have made their
    steps. What depends on x alone (its density, and what `propose_many` prepares) is evaluated once per batch.

    Args:
        log_density: log pi up to a constant.
        proposal: q(y | x).
        batch: proposals drawn at once per chain. Any number gives the same distribution; what is saved is wall time.
        steps: sequential steps per kernel step; `batch` by default.
        label: name in `Info`.
        propose: draws y and returns both log-densities, as in `metropolis`; a proposal's `propose_many` comes first.
        decide: turns log acceptance ratios into decisions, as in `metropolis`.

    Raises:
        LongstrideError: batch or steps is not positive.
    """
    length = batch if steps is None else steps
    if batch < 1 or length < 1:
        raise LongstrideError(f"speculative proposals need positive numbers, not batch {batch} and steps {length}")
    round_ = _Round(log_density, many_of(proposal, propose), decide or accept)

    def step(chains: ChainState, generator: torch.Generator) -> tuple[ChainState, Info]:
        positions, value = chains.state.positions, chains.log_density
        left = torch.full((len(value),), length, device=value.device)
        accepted, last = torch.zeros_like(left), torch.full_like(value, -torch.inf)
        calls = 0
        while bool((left > 0).any()):
            active = left.nonzero()[:, 0]
            count = min(batch, int(left.max()))
            moved = round_(State(positions=positions[active]), value[active], left[active], count, generator)
            positions = positions.index_copy(0, active, moved.positions)
            value = value.index_copy(0, active, moved.log_density)
            last = last.index_copy(0, active, moved.log_alpha)
            accepted = accepted.index_add(0, active, moved.accepted.to(accepted.dtype))
            left = left.index_add(0, active, -moved.used)
            calls += len(active) * count
        state = ChainState(state=State(positions=positions), log_density=value, velocities=chains.velocities)
        return state, Info(accepted=accepted, log_alpha=last, label=label, energy_calls=calls, proposals=length)

    return Kernel(step=step, invariance="exact", labels=(label,))


@dataclass(frozen=True, kw_only=True)
class _Moved:
    """Where one batch took the chains.

    Attributes:
        positions: [chain, atom, 3] nm.
        log_density: [chain] at the positions.
        log_alpha: [chain] of the last proposal that was used.
        accepted: [chain] bool, whether that proposal was accepted.
        used: [chain] proposals used, which is steps made.
    """

    positions: Tensor
    log_density: Tensor
    log_alpha: Tensor
    accepted: Tensor
    used: Tensor


class _Round:
    """One batch from the current states of some chains."""

    def __init__(self, log_density: LogDensity, propose_many: ProposeMany, decide: Decide) -> None:
        self.log_density, self.propose_many, self.decide = log_density, propose_many, decide

    def __call__(self, x: State, at_x: Tensor, left: Tensor, count: int, generator: torch.Generator) -> _Moved:
        y, forward, backward = self.propose_many(x, count, generator)
        at_y = self.log_density(y)
        shape = (len(at_x), count)
        log_alpha = log_ratio(at_x.repeat_interleave(count), at_y, backward, forward).reshape(shape)
        # a chain with fewer steps left than the batch holds ignores the rest
        needed = torch.arange(count, device=at_x.device) < left[:, None]
        taken = self.decide(log_alpha, generator) & needed
        accepted = taken.any(1)
        first = torch.where(accepted, taken.to(torch.int8).argmax(1), torch.clamp(left, max=count) - 1)
        row = torch.arange(len(at_x), device=at_x.device)
        chosen = row * count + first
        return _Moved(
            positions=torch.where(accepted[:, None, None], y.positions[chosen].to(x.positions.dtype), x.positions),
            log_density=torch.where(accepted, at_y[chosen], at_x),
            log_alpha=log_alpha[row, first],
            accepted=accepted,
            used=first + 1,
        )
