"""Metropolis-Hastings with any proposal, many chains at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from longstride.errors import DataError
from longstride.flows.notes import Notes
from longstride.mcmc.kernel import ChainState, Info, Kernel
from longstride.state import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from longstride.flows.notes import Noted
    from longstride.mcmc.kernel import LogDensity
    from longstride.potentials.base import Potential

    Propose = Callable[[State, torch.Generator], tuple[State, Tensor, Tensor]]
    Decide = Callable[[Tensor, torch.Generator], Tensor]

_FEWEST_FINITE = 2


class Proposal(Protocol):
    """A conditional density q(y | x) bound to one System, with respect to the same measure as the target's density."""

    def sample(self, x: State, generator: torch.Generator) -> tuple[State, Tensor]:
        """Return y ~ q(. | x), one independent draw per chain, and log q(y | x) [chain]; NaN marks an invalid draw."""
        ...

    def log_prob(self, y: State, x: State) -> Tensor:
        """Return log q(y | x), [chain]."""
        ...


@runtime_checkable
class NotingProposal(Protocol):
    """A proposal that takes notes on x and y, so that each configuration is analysed once while a chain stays there."""

    def propose_noted(self, x: State, notes: Notes | None, generator: torch.Generator) -> Noted:
        """Draw y from x; `notes` are on x, by whatever kernel moved there, or None."""
        ...


def boltzmann(potential: Potential, kT: float) -> LogDensity:
    """Return x -> -U(x)/kT, [chain] float64."""

    @torch.no_grad()
    def log_density(x: State) -> Tensor:
        return -potential.energy(x).double() / kT

    return log_density


def start_chains(log_density: LogDensity, state: State) -> ChainState:
    """Return chains at `state` with their log-density cached.

    Raises:
        DataError: a starting configuration has no finite density.
    """
    value = log_density(state)
    if not bool(value.isfinite().all()):
        count = int((~value.isfinite()).sum())
        raise DataError(f"{count} of {len(value)} starting configurations have no finite energy; start from reference frames")
    return ChainState(state=state, log_density=value)


def select(accepted: Tensor, proposed: ChainState, current: ChainState) -> ChainState:
    """Return `proposed` where accepted and `current`, repeated, elsewhere; the velocities are those of `current`.

    Notes stay where both have them, of one owner and one name.
    """
    positions = torch.where(accepted[:, None, None], proposed.state.positions, current.state.positions)
    log_density = torch.where(accepted, proposed.log_density, current.log_density)
    notes = None
    if proposed.notes is not None and current.notes is not None:
        there, here = proposed.notes.values, current.notes.of(proposed.notes.owner)
        shared = {
            name: torch.where(accepted.view(-1, *(1,) * (value.ndim - 1)), value, here[name])
            for name, value in there.items()
            if name in here
        }
        notes = Notes(owner=proposed.notes.owner, values=shared)
    return ChainState(state=State(positions=positions), log_density=log_density, velocities=current.velocities, notes=notes)


def log_ratio(at_x: Tensor, at_y: Tensor, log_backward: Tensor, log_forward: Tensor) -> Tensor:
    """Return log r = log pi(y) - log pi(x) + log q(x | y) - log q(y | x), [chain]; -inf where it is not a number.

    An invalid draw or an overflowing energy gives NaN somewhere, and is to be rejected. A ratio of +inf can only come from an
    energy of -inf, which no valid configuration has, and is rejected too.
    """
    log_r = at_y - at_x + log_backward - log_forward
    return torch.where(log_r.isnan() | (log_r == torch.inf), -torch.inf, log_r)


def proposal_quality(log_density: LogDensity, propose: Propose, x: State, generator: torch.Generator) -> tuple[float, float]:
    """Return the mean acceptance of one proposal from each x, and the standard deviation of log r.

    Clashes make the lower tail of log r arbitrarily long: its last twentieth is left out. NaN where hardly any is finite.
    """
    y, log_forward, log_backward = propose(x, generator)
    log_r = log_ratio(log_density(x), log_density(y), log_backward, log_forward)
    finite = log_r[log_r.isfinite()]
    spread = finite[finite > finite.quantile(0.05)].std().item() if len(finite) > _FEWEST_FINITE else math.nan
    return log_r.clamp(max=0).exp().mean().item(), spread


def draw_and_score(proposal: Proposal) -> Propose:
    """Return (x, generator) -> y, log q(y | x), log q(x | y) from a proposal's two methods."""

    def propose(x: State, generator: torch.Generator) -> tuple[State, Tensor, Tensor]:
        y, log_forward = proposal.sample(x, generator)
        return y, log_forward, proposal.log_prob(x, y)

    return propose


def metropolis(
    log_density: LogDensity,
    proposal: Proposal,
    *,
    label: str = "metropolis",
    propose: Propose | None = None,
    decide: Decide | None = None,
) -> Kernel:
    """Return the Metropolis-Hastings kernel; exact for the distribution of `log_density`.

    Accept y with probability min(1, pi(y) q(x | y) / (pi(x) q(y | x))), else repeat x (Hastings 1970,
    doi:10.1093/biomet/57.1.97). Each chain has its own proposal and its own uniform, drawn fresh each step: sharing any
    auxiliary variable between the proposals of a batch that stops at the first acceptance would bias the chain. A
    proposal whose ratio is NaN (invalid draw, overflowing energy) is rejected.

    Args:
        log_density: log pi up to a constant.
        proposal: q(y | x).
        label: name in `Info`.
        propose: draws y and returns both log-densities, where the proposal can do so for less than `sample` and
            `log_prob` one after the other.
        decide: turns log acceptance ratios into decisions; by default `accept`, with a fresh uniform for each.
    """
    if propose is None and isinstance(proposal, NotingProposal):
        return noting(log_density, proposal, label=label, decide=decide)
    return hastings(log_density, propose or draw_and_score(proposal), label=label, decide=decide)


def noting(log_density: LogDensity, proposal: NotingProposal, *, label: str, decide: Decide | None = None) -> Kernel:
    """Return the kernel of `hastings` for a proposal that takes notes, which travel with the chains.

    Args:
        log_density: log pi up to a constant.
        proposal: as in `hastings`, both log-densities may lack the same function of (x, y).
        label: name in `Info`.
        decide: as in `metropolis`.
    """
    choose = decide or accept

    def step(chains: ChainState, generator: torch.Generator) -> tuple[ChainState, Info]:
        drawn = proposal.propose_noted(chains.state, chains.notes, generator)
        at_y = log_density(drawn.y)
        log_alpha = log_ratio(chains.log_density, at_y, drawn.log_backward, drawn.log_forward)
        accepted = choose(log_alpha, generator)
        moved = select(
            accepted,
            ChainState(state=drawn.y, log_density=at_y, notes=drawn.at_y),
            replace(chains, notes=drawn.at_x),
        )
        return moved, Info(accepted=accepted, log_alpha=log_alpha, label=label, energy_calls=len(at_y))

    return Kernel(step=step, invariance="exact", labels=(label,))


def hastings(log_density: LogDensity, propose: Propose, *, label: str, decide: Decide | None = None) -> Kernel:
    """Return the same kernel from a function that draws y and returns two terms with log q(x | y) - log q(y | x) between them.

    Args:
        log_density: log pi up to a constant.
        propose: (x, generator) -> y, log q(y | x), log q(x | y); both terms may lack the same function of (x, y).
        label: name in `Info`.
        decide: as in `metropolis`.
    """
    choose = decide or accept

    def step(chains: ChainState, generator: torch.Generator) -> tuple[ChainState, Info]:
        y, log_forward, log_backward = propose(chains.state, generator)
        at_y = log_density(y)
        log_alpha = log_ratio(chains.log_density, at_y, log_backward, log_forward)
        accepted = choose(log_alpha, generator)
        moved = select(accepted, ChainState(state=y, log_density=at_y), chains)
        return moved, Info(accepted=accepted, log_alpha=log_alpha, label=label, energy_calls=len(at_y))

    return Kernel(step=step, invariance="exact", labels=(label,))


def accept(log_alpha: Tensor, generator: torch.Generator) -> Tensor:
    """Return decisions of the shape of `log_alpha`: True with probability min(1, exp(log_alpha)), independently."""
    uniform = torch.rand(log_alpha.shape, generator=generator, dtype=torch.float64, device=log_alpha.device)
    return uniform.log() < log_alpha


def checked_starts(
    contains: Callable[[State], Tensor],
    state: State,
    *,
    advice: str = "start from frames of the reference that the flow was trained on",
) -> State:
    """Return `state` if all of it lies in the domain of the chains.

    Args:
        contains: whether configurations lie in the domain, [chain] bool.
        state: where the chains are to start.
        advice: what to do where they do not, for the message.

    Raises:
        DataError: some chain would start where no proposal can come from, and would never move.
    """
    inside = contains(state)
    if not bool(inside.all()):
        raise DataError(
            f"{int((~inside).sum())} of {len(inside)} starting configurations have another handedness than the domain of the"
            f" chains and would never move; {advice}"
        )
    return state
