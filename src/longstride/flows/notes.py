"""What a proposal knows of where chains are, so that each configuration is analysed once while a chain stays there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from longstride.state import State


@dataclass(frozen=True, kw_only=True)
class Notes:
    """Functions of the positions of all chains.

    Attributes:
        owner: whose they are; others must not read them.
        values: [chain, ...] each.
    """

    owner: object
    values: Mapping[str, Tensor]

    def of(self, owner: object) -> Mapping[str, Tensor]:
        """Return the values if they are the owner's, else none."""
        return self.values if self.owner is owner else {}


@dataclass(frozen=True, kw_only=True)
class Noted:
    """A draw and what the proposal now knows of both ends.

    Attributes:
        y: proposed state.
        log_forward: log q(y | x), [chain]; NaN marks an invalid draw.
        log_backward: log q(x | y), [chain]; both may lack the same function of (x, y).
        at_x: notes on x.
        at_y: notes on y.
    """

    y: State
    log_forward: Tensor
    log_backward: Tensor
    at_x: Notes
    at_y: Notes
