"""Starting structures in different backbone basins."""

from __future__ import annotations

import numpy as np

from longstride.systems import Prepared, backbone_torsions, minimise, set_torsion

# (phi, psi) in degrees: polyproline II, left-handed helix, right-handed helix, C7ax, extended C5, C7eq
BASINS = ((-75.0, 145.0), (55.0, 45.0), (-75.0, -20.0), (65.0, -60.0), (-150.0, 155.0), (-80.0, 75.0))


def basin_starts(prepared: Prepared, count: int) -> np.ndarray:
    """Return `count` minimised structures, [count, atom, 3] nm, whose residues start in different (phi, psi) basins.

    Structure k puts residue r in basin (k + r (1 + k // 6)) mod 6, so that the first six differ in every residue
    and later ones mix basins along the chain. Torsions inside rings stay as they are.
    """
    torsions = backbone_torsions(prepared.system)
    starts = []
    for index in range(count):
        positions, residue = prepared.positions, 0
        for kind, atoms in torsions:
            basin = BASINS[(index + residue * (1 + index // len(BASINS))) % len(BASINS)]
            positions = set_torsion(prepared.system, positions, atoms, np.radians(basin[kind == "psi"]))
            residue += kind == "psi"
        starts.append(minimise(prepared.openmm_system, positions, tolerance=10.0))
    return np.stack(starts)
