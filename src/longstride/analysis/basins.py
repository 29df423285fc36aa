"""Basins of the Ramachandran map, visited and weighted."""

from __future__ import annotations

import numpy as np

from longstride.analysis.features import Torsions
from longstride.analysis.free_energy import basin_populations


def basin_summary(
    angles: np.ndarray, torsions: Torsions, weights: np.ndarray | None, *, present: bool = False
) -> dict[str, float]:
    """Return basin name to population of angles [time, chain, torsion]; empty without a (phi, psi) pair.

    Args:
        angles: rad.
        torsions: which of them is the pair.
        weights: [time, chain] with sum 1, or None for equal weights.
        present: leave out basins without a sample.
    """
    if torsions.pair is None:
        return {}
    phi, psi = (angles[..., k] for k in torsions.pair)
    found = basin_populations(phi, psi, weights)
    return {name: value for name, value in found.items() if value > 0 or not present}
