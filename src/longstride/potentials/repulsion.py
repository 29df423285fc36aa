"""Screened nuclear repulsion (ZBL) inside the covalent distance: a wall where a learned potential has no data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from ase.data import covalent_radii

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

COULOMB_KJ_NM = 138.93545764  # e^2 / (4 pi eps0) in kJ/mol nm
SCREENING_NM = 0.8854 * 0.0529177210903
AMPLITUDES = (0.18175, 0.50986, 0.28022, 0.02817)
DECAYS = (3.1998, 0.94229, 0.4029, 0.20162)
REACH = 0.8  # of the sum of covalent radii (doi:10.1039/b801115j): inside any bond's thermal range


class ScreenedRepulsion:
    """Ziegler-Biersack-Littmark pair repulsion, switched off smoothly before bonding distances.

    Equation: V(r) = Z_i Z_j e^2 / r sum_k c_k exp(-d_k r / a) (1 - r^2/R^2)^3 for r < R, else 0, with
    a = 0.8854 a0 / (Z_i^0.23 + Z_j^0.23) and R = 0.8 (covalent radius i + j). Twice continuously differentiable at R.
    Source: J. F. Ziegler, J. P. Biersack, U. Littmark, The Stopping and Range of Ions in Solids, Pergamon 1985.

    Args:
        atomic_numbers: [atom].
    """

    def __init__(self, atomic_numbers: np.ndarray) -> None:
        z = torch.as_tensor(atomic_numbers, dtype=torch.float64)
        radii = torch.as_tensor(covalent_radii[atomic_numbers] * 0.1, dtype=torch.float64)
        self.reach = REACH * (radii[:, None] + radii[None, :])
        self._reach_squared = self.reach.square().fill_diagonal_(0.0)
        self._strength = COULOMB_KJ_NM * z[:, None] * z[None, :]
        power = z**0.23
        self._inverse_a = (power[:, None] + power[None, :]) / SCREENING_NM

    def acts(self, distances_squared: Tensor) -> bool:
        """Whether any pair of [atom, batch, atom] nm^2 is within reach; where none is, both results below are zero."""
        return bool((distances_squared < self._reach_squared[:, None].to(distances_squared.dtype)).any())

    def energy_and_slope(self, distances: Tensor) -> tuple[Tensor, Tensor]:
        """Return V and dV/dr of every ordered pair, half of each pair's value: [atom, batch, atom] kJ/mol, kJ/mol/nm.

        Args:
            distances: [atom, batch, atom] nm; the diagonal is ignored.
        """
        r = distances.to(torch.float64)
        off_diagonal = 1 - torch.eye(len(r), dtype=torch.float64)[:, None]
        half = 0.5 * self._strength[:, None] * off_diagonal
        return _screened(r, half, reach=self.reach[:, None], inverse_a=self._inverse_a[:, None])

    def of_pairs(self, first: Tensor, second: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
        """Return V/2 and dV/dr/2 of single pairs: [pair] kJ/mol, kJ/mol/nm.

        Args:
            first: [pair] index of one atom.
            second: [pair] index of the other.
            distances: [pair] nm.
        """
        half = 0.5 * self._strength[first, second]
        reach, inverse_a = self.reach[first, second], self._inverse_a[first, second]
        return _screened(distances.to(torch.float64), half, reach=reach, inverse_a=inverse_a)


def _screened(r: Tensor, strength: Tensor, *, reach: Tensor, inverse_a: Tensor) -> tuple[Tensor, Tensor]:
    """Return strength / r x screening x switch, and its derivative."""
    inside = (1 - (r / reach).square()).clamp(min=0)
    switch, switch_slope = inside**3, -6 * r / reach.square() * inside.square()
    screening = sum(c * torch.exp(-d * inverse_a * r) for c, d in zip(AMPLITUDES, DECAYS, strict=True))
    slope = sum(-c * d * inverse_a * torch.exp(-d * inverse_a * r) for c, d in zip(AMPLITUDES, DECAYS, strict=True))
    energy = strength / r * screening * switch
    return energy, strength / r * (slope * switch + screening * switch_slope) - energy / r
