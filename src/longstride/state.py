"""The two values every layer shares: what a molecule is, and where it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class System:
    """An immutable molecule: identity, masses and bond graph; no coordinates.

    Attributes:
        name: label used in file names and tables.
        atomic_numbers: [atom] int64.
        masses: [atom] float64, Da.
        bonds: [bond, 2] int64, zero-based atom indices, first < second.
        atom_names: one PDB name per atom.
        residue_names: one residue name per atom.
        residue_indices: [atom] int64, zero-based residue of each atom.
    """

    name: str
    atomic_numbers: np.ndarray
    masses: np.ndarray
    bonds: np.ndarray
    atom_names: tuple[str, ...]
    residue_names: tuple[str, ...]
    residue_indices: np.ndarray

    @property
    def n_atoms(self) -> int:
        """Number of atoms."""
        return len(self.atomic_numbers)


@dataclass(frozen=True, kw_only=True)
class State:
    """A batch of configurations of one System. The batch axis is chains or replicas.

    Attributes:
        positions: [batch, atom, 3] nm.
        velocities: [batch, atom, 3] nm/ps, or None where only positions matter.
        box: [batch, 3, 3] nm (rows are box vectors), or None for an isolated molecule.
    """

    positions: Tensor
    velocities: Tensor | None = None
    box: Tensor | None = None


def half_width(boxes: np.ndarray) -> float:
    """Return half the smallest distance between opposite faces of boxes, nm: the largest range of the minimum image.

    Equation: w_i = |V| / |a_j x a_k|, the minimum over i and over boxes, divided by 2; 0 for a flat box.

    Args:
        boxes: [..., 3, 3] nm (rows are box vectors).
    """
    faces = np.linalg.norm(np.cross(boxes[..., [1, 2, 0], :], boxes[..., [2, 0, 1], :]), axis=-1).max(axis=-1)
    volumes = np.abs(np.linalg.det(boxes))
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.nan_to_num(volumes / faces).min() / 2)
