"""The `Potential` protocol: what every energy function, cheap or expensive, looks like."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from longstride.state import State, System


@runtime_checkable
class Potential(Protocol):
    """An energy function bound to one System.

    Attributes:
        system: the molecule it is bound to.
        name: label of the target distribution, such as "amber14-obc1" or "gfn2-xtb"; methods are compared only
            within one name.
    """

    system: System
    name: str

    def energy(self, x: State) -> Tensor:
        """Return the potential energy U(x), [batch] kJ/mol. NaN where it cannot be evaluated."""
        ...

    def energy_forces(self, x: State) -> tuple[Tensor, Tensor]:
        """Return U(x), [batch] kJ/mol, and F = -dU/dx, [batch, atom, 3] kJ/mol/nm."""
        ...
