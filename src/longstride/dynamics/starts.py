"""Starting structures in different backbone basins."""

from __future__ import annotations

import numpy as np

from longstride.systems import Prepared, backbone_torsions, canonical_labels, minimise, set_torsion

Torsion = tuple[str, tuple[int, int, int, int]]

# (phi, psi) in degrees: polyproline II, left-handed helix, right-handed helix, C7ax, extended C5, C7eq
BASINS = ((-75.0, 145.0), (55.0, 45.0), (-75.0, -20.0), (65.0, -60.0), (-150.0, 155.0), (-80.0, 75.0))


def basin_starts(prepared: Prepared, count: int) -> np.ndarray:
    """Return `count` minimised structures, [count, atom, 3] nm, whose residues start in different (phi, psi) basins.

    Structure k puts residue r in basin (k + r (1 + k // 6)) mod 6, so that the first six differ in every residue
    and later ones mix basins along the chain. Torsions inside rings stay as they are.
    """
    torsions = backbone_torsions(prepared.system)
    residues = 1 + sum(kind == "psi" for kind, _ in torsions[:-1])
    made: dict[tuple[int, ...], np.ndarray] = {}  # combinations of basins repeat, at the latest after 36
    starts = []
    for index in range(count):
        turns = 1 + index // len(BASINS)
        basins = tuple((index + residue * turns) % len(BASINS) for residue in range(residues))
        if basins not in made:
            made[basins] = _structure(prepared, torsions, basins)
        starts.append(made[basins])
    return np.stack(starts)


def _structure(prepared: Prepared, torsions: list[Torsion], basins: tuple[int, ...]) -> np.ndarray:
    """Return a minimised structure, [atom, 3] nm, with residue r in basin `basins[r]`."""
    positions, residue = prepared.positions, 0
    for kind, atoms in torsions:
        angle = BASINS[basins[residue]][kind == "psi"]
        positions = set_torsion(prepared.system, positions, atoms, np.radians(angle))
        residue += kind == "psi"
    # relaxing a clash can turn a methyl group inside out
    return canonical_labels(prepared.system, minimise(prepared.openmm_system, positions, tolerance=10.0))
