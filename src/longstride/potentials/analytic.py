"""Potentials with known answers, and arithmetic on potentials."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longstride.errors import LongstrideError

if TYPE_CHECKING:
    from longstride.potentials.base import Potential
    from longstride.state import State, System


class HarmonicWell:
    """Independent springs to fixed points, E = sum_i k_i/2 |x_i - center_i|^2.

    At temperature T every coordinate of atom i is Gaussian with variance kT/k_i and <E> = 3 N kT/2. Not invariant
    under translation or rotation.
    """

    def __init__(self, system: System, *, center: Tensor, k: Tensor | float, name: str = "harmonic-well") -> None:
        """Bind springs to atoms.

        Args:
            system: the molecule.
            center: [atom, 3] nm.
            k: one spring constant, or [atom], kJ/mol/nm^2.
            name: label of the target distribution.
        """
        if center.shape != (system.n_atoms, 3):
            raise LongstrideError(f"center has shape {tuple(center.shape)}, expected [{system.n_atoms}, 3]")
        self.system, self.name = system, name
        self.center = center
        self.k = torch.as_tensor(k, dtype=center.dtype, device=center.device).expand(system.n_atoms)

    def energy(self, x: State) -> Tensor:
        """Return U(x), [batch] kJ/mol."""
        return (0.5 * self._k(x) * (x.positions - self.center.to(x.positions)) ** 2).sum((1, 2))

    def energy_forces(self, x: State) -> tuple[Tensor, Tensor]:
        """Return U(x), [batch] kJ/mol, and F, [batch, atom, 3] kJ/mol/nm."""
        return self.energy(x), -self._k(x) * (x.positions - self.center.to(x.positions))

    def _k(self, x: State) -> Tensor:
        return self.k.to(x.positions)[:, None]


class DoubleWell:
    """Two wells in one coordinate s of one atom, E = barrier ((s/half_width)^2 - 1)^2, and springs in all others.

    Minima at s = -half_width and +half_width with energy 0, a barrier of `barrier` at s = 0; every other coordinate is
    Gaussian with variance kT/k. The density of s is proportional to exp(-E(s)/kT).
    """

    def __init__(
        self,
        system: System,
        *,
        barrier: float,
        half_width: float,
        k: float,
        atom: int = 0,
        axis: int = 0,
        name: str = "double-well",
    ) -> None:
        """Bind the wells to one coordinate.

        Args:
            system: the molecule.
            barrier: kJ/mol.
            half_width: nm, position of the minima.
            k: spring constant of all other coordinates about the origin, kJ/mol/nm^2.
            atom: atom that holds the coordinate.
            axis: 0, 1 or 2.
            name: label of the target distribution.
        """
        self.system, self.name = system, name
        self.barrier, self.half_width, self.k = barrier, half_width, k
        self.coordinate = (atom, axis)

    def energy(self, x: State) -> Tensor:
        """Return U(x), [batch] kJ/mol."""
        atom, axis = self.coordinate
        s = x.positions[:, atom, axis]
        others = (x.positions**2).sum((1, 2)) - s**2
        return self.barrier * ((s / self.half_width) ** 2 - 1) ** 2 + 0.5 * self.k * others

    def energy_forces(self, x: State) -> tuple[Tensor, Tensor]:
        """Return U(x), [batch] kJ/mol, and F, [batch, atom, 3] kJ/mol/nm."""
        atom, axis = self.coordinate
        s = x.positions[:, atom, axis]
        forces = -self.k * x.positions
        forces[:, atom, axis] = -4 * self.barrier * ((s / self.half_width) ** 2 - 1) * s / self.half_width**2
        return self.energy(x), forces


def _check_same_system(parts: tuple[Potential, ...]) -> System:
    first = parts[0].system
    for part in parts[1:]:
        if part.system is not first and (part.system.name, part.system.n_atoms) != (first.name, first.n_atoms):
            raise LongstrideError(f"cannot combine potentials of {first.name!r} and {part.system.name!r}")
    return first


class SumPotential:
    """U = U_1 + U_2 + ..., all bound to one System."""

    def __init__(self, *parts: Potential, name: str | None = None) -> None:
        """Add potentials; `name` defaults to theirs joined by "+"."""
        if not parts:
            raise LongstrideError("SumPotential needs at least one potential")
        self.system = _check_same_system(parts)
        self.parts = parts
        self.name = name or "+".join(part.name for part in parts)

    def energy(self, x: State) -> Tensor:
        """Return U(x), [batch] kJ/mol."""
        first, *rest = (part.energy(x) for part in self.parts)
        return sum(rest, start=first)

    def energy_forces(self, x: State) -> tuple[Tensor, Tensor]:
        """Return U(x), [batch] kJ/mol, and F, [batch, atom, 3] kJ/mol/nm."""
        (energy, forces), *rest = (part.energy_forces(x) for part in self.parts)
        return sum((item[0] for item in rest), start=energy), sum((item[1] for item in rest), start=forces)


class ScaledPotential:
    """U = factor U_1; a change of temperature by 1/factor, or the sign of a difference."""

    def __init__(self, part: Potential, *, factor: float, name: str | None = None) -> None:
        """Scale a potential; `name` defaults to "factor*name"."""
        self.system, self.part, self.factor = part.system, part, factor
        self.name = name or f"{factor:g}*{part.name}"

    def energy(self, x: State) -> Tensor:
        """Return U(x), [batch] kJ/mol."""
        return self.factor * self.part.energy(x)

    def energy_forces(self, x: State) -> tuple[Tensor, Tensor]:
        """Return U(x), [batch] kJ/mol, and F, [batch, atom, 3] kJ/mol/nm."""
        energy, forces = self.part.energy_forces(x)
        return self.factor * energy, self.factor * forces


class DifferencePotential(SumPotential):
    """U = U_large - U_small, the slow part of a multiple-time-step splitting."""

    def __init__(self, large: Potential, small: Potential, *, name: str | None = None) -> None:
        """Subtract a potential; `name` defaults to "large-small"."""
        super().__init__(large, ScaledPotential(small, factor=-1.0), name=name or f"{large.name}-{small.name}")
