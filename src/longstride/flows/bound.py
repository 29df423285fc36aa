"""A flow of any kind, ready to propose for one molecule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    from torch import Tensor

    from longstride.flows.transferable import TorsionMoves
    from longstride.state import State


class FlowProposal(Protocol):
    """q(y | x) of one label: draws y and scores both directions."""

    def sample(self, x: State, generator: torch.Generator) -> tuple[State, Tensor]:
        """Return y and log q(y | x), [chain]; NaN marks an invalid draw."""
        ...

    def log_prob(self, y: State, x: State) -> Tensor:
        """Return log q(y | x), [chain]."""
        ...


@dataclass(frozen=True, kw_only=True)
class BoundFlow:
    """Proposals for one molecule, whatever made them.

    Attributes:
        proposals: label to proposal, in the order of the flow's labels.
        independent: label of proposals that do not see x, if there is one.
        contains: whether configurations lie in the domain of the proposals, [chain] bool; chains must start there.
        moves: local moves in the same coordinates, where the flow offers them.
        states: [state, atom, 3] nm, possible starting points, where the flow knows some.
    """

    proposals: Mapping[str, FlowProposal]
    independent: str | None
    contains: Callable[[State], Tensor]
    moves: TorsionMoves | None = None
    states: Tensor | None = None

    def probabilities(self, independent_probability: float) -> tuple[float, ...]:
        """Return the fixed probability of each label: the lags share evenly what "independent" leaves."""
        lags = len(self.proposals) - (self.independent is not None)
        if self.independent is None or not lags:
            return (1.0 / len(self.proposals),) * len(self.proposals)
        share = (1.0 - independent_probability) / lags
        return tuple(independent_probability if name == self.independent else share for name in self.proposals)
