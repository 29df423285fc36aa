"""Potentials of other packages: the checks, units and failures that they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from longstride.errors import LongstrideError
from longstride.potentials.periodic import check_box
from longstride.units import ANGSTROM_NM

if TYPE_CHECKING:
    from collections.abc import Iterable

    from longstride.state import State, System

ATOMS_PER_CALL = 4096  # larger batches are cut, for memory


class ExternalPotential(ABC):
    """A `longstride.potentials.base.Potential` that another package evaluates, in Å and in float64 at its borders.

    Energies and forces are NaN where positions are not finite.

    Attributes:
        system: the molecule, or all molecules of a box.
        name: label of the target distribution.
    """

    def __init__(self, system: System, *, name: str) -> None:
        self.system, self.name = system, name

    @property
    @abstractmethod
    def cutoff_nm(self) -> float | None:
        """The longest range of its lists of neighbours, nm; None where it makes no list or does not say."""

    @abstractmethod
    def _call(self, positions: np.ndarray, boxes: np.ndarray | None, *, forces: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Return energies [batch] kJ/mol and forces [batch, atom, 3] kJ/mol/nm, or None, of finite positions.

        Args:
            positions: [batch, atom, 3] Å, in the central box, or around the origin where there is none.
            boxes: [batch, 3, 3] Å, rows are vectors, or None.
            forces: whether forces are wanted.
        """

    def energy(self, x: State) -> torch.Tensor:
        """Return U(x), [batch] kJ/mol float64."""
        return self._evaluate(x, forces=False)[0]

    def energy_forces(self, x: State) -> tuple[torch.Tensor, torch.Tensor]:
        """Return U(x), [batch] kJ/mol, and F = -dU/dx, [batch, atom, 3] kJ/mol/nm, both float64.

        Raises:
            LongstrideError: the shape is another system's, or the box is narrower than twice the cutoff.
        """
        return self._evaluate(x, forces=True)

    def close(self) -> None:  # noqa: B027 - most have nothing to release
        """Release what the package holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _evaluate(self, x: State, *, forces: bool) -> tuple[torch.Tensor, torch.Tensor]:
        positions, boxes = self._checked(x)
        energies = np.full(len(positions), np.nan)
        slopes = np.full(positions.shape if forces else (0,), np.nan)
        good = np.isfinite(positions).all(axis=(1, 2))
        if good.any():
            # a place holder keeps the number of replicas, and with it functions compiled for it
            positions = np.where(good[:, None, None], positions, positions[good.argmax()])
            per_call = max(1, ATOMS_PER_CALL // max(1, self.system.n_atoms))
            for first in range(0, len(positions), per_call):
                part = slice(first, first + per_call)
                found, slope = self._call(positions[part], None if boxes is None else boxes[part], forces=forces)
                energies[part] = found
                if slope is not None:
                    slopes[part] = slope
            energies[~good] = np.nan
            if forces:
                slopes[~good] = np.nan
        device = x.positions.device
        return torch.from_numpy(energies).to(device), torch.from_numpy(slopes).to(device)

    def _checked(self, x: State) -> tuple[np.ndarray, np.ndarray | None]:
        if x.positions.dim() != 3 or x.positions.shape[1:] != (self.system.n_atoms, 3):
            raise LongstrideError(
                f"positions have shape {tuple(x.positions.shape)}, expected [batch, {self.system.n_atoms}, 3] for"
                f" {self.system.name!r}"
            )
        positions = x.positions.detach().to(device="cpu", dtype=torch.float64).numpy() / ANGSTROM_NM
        if x.box is None:
            # far from the origin float32 would lose digits
            return positions - positions.mean(axis=1, keepdims=True), None
        boxes = x.box.detach().to(device="cpu", dtype=torch.float64).numpy() / ANGSTROM_NM
        boxes = np.broadcast_to(boxes, (len(positions), 3, 3))
        if self.cutoff_nm is not None:
            check_box(boxes * ANGSTROM_NM, self.cutoff_nm, self.system.name)
        inside = np.where(np.isfinite(positions), positions, 0.0) @ np.linalg.inv(boxes)
        return positions - np.floor(inside) @ boxes, boxes


def check_elements(system: System, known: Iterable[int], *, teacher: str) -> None:
    """Refuse a system with an element that a teacher has no parameters for.

    Args:
        system: the molecule.
        known: atomic numbers.
        teacher: its name, for the message.

    Raises:
        LongstrideError: naming the unknown elements and the known ones.
    """
    from ase.data import chemical_symbols

    numbers = sorted(set(known))
    unknown = sorted({int(number) for number in system.atomic_numbers} - set(numbers))
    if unknown:
        raise LongstrideError(
            f"teacher {teacher} does not know {', '.join(chemical_symbols[number] for number in unknown)} of {system.name!r};"
            f" it knows {', '.join(chemical_symbols[number] for number in numbers)}"
        )


def check_neutral(system: System, charge: int, *, teacher: str) -> None:
    """Refuse a net charge for a teacher without an input for it.

    Raises:
        LongstrideError: the charge is not zero.
    """
    if charge:
        raise LongstrideError(
            f"{system.name!r} has a net charge of {charge:+d} and teacher {teacher} has no input for it; choose a teacher for"
            " ions (gfn2-xtb, aimnet2, a FENNIX-Bio1 model)"
        )


def missing_package(kind: str) -> LongstrideError:
    """Return the error for a teacher whose package is not installed."""
    return LongstrideError(f"teacher {kind} needs a package that is not installed: pip install 'longstride[{kind}]'")
