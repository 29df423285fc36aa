"""Backbone torsions and their sine and cosine, with MDTraj."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import mdtraj
import numpy as np

from longstride.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

CHUNK = 20_000


@dataclass(frozen=True, kw_only=True)
class Torsions:
    """Which torsions a molecule has.

    Attributes:
        names: one name per torsion, such as "phi ALA2".
        indices: [torsion, 4] atom indices.
        pair: positions in `names` of the (phi, psi) shown in Ramachandran maps, or None. The first residue that has
            both; in an uncapped dipeptide no residue has both and the pair is phi of residue 2 and psi of residue 1.
    """

    names: tuple[str, ...]
    indices: np.ndarray
    pair: tuple[int, int] | None

    @property
    def phis(self) -> list[int]:
        """Positions of all phi torsions."""
        return [index for index, name in enumerate(self.names) if name.startswith("phi")]


def load_topology(structure: Path) -> mdtraj.Topology:
    """Return the MDTraj topology of a PDB file.

    Raises:
        DataError: the file is missing or unreadable.
    """
    try:
        return mdtraj.load_topology(str(structure))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"cannot read the structure {structure} ({error}); run the prepare stage again") from error


def find_torsions(topology: mdtraj.Topology) -> Torsions:
    """Return all phi and psi torsions of a topology, phi first, both in residue order.

    phi is C(i-1) N CA C, psi is N CA C N(i+1) (IUPAC). A molecule without a backbone has none.
    """
    frame = mdtraj.Trajectory(np.zeros((1, topology.n_atoms, 3), dtype=np.float32), topology)
    phi, _ = mdtraj.compute_phi(frame)
    psi, _ = mdtraj.compute_psi(frame)
    names, residues = [], []
    for kind, table, alpha in (("phi", phi, 2), ("psi", psi, 1)):
        for quartet in table:
            residue = topology.atom(int(quartet[alpha])).residue
            names.append(f"{kind} {residue.name}{residue.index + 1}")
            residues.append(residue.index)
    n_phi = len(phi)
    pair = next(
        ((i, n_phi + j) for i in range(n_phi) for j in range(len(psi)) if residues[i] == residues[n_phi + j]),
        (0, n_phi) if n_phi and len(psi) else None,
    )
    return Torsions(names=tuple(names), indices=np.concatenate([phi, psi]).reshape(-1, 4).astype(int), pair=pair)


def torsion_angles(positions: np.ndarray, topology: mdtraj.Topology, torsions: Torsions) -> np.ndarray:
    """Return the torsions of positions [..., atom, 3] nm as [..., torsion] rad in (-pi, pi], float64.

    Frames are handled in chunks, so memory stays at one chunk of float32 copies.

    Raises:
        DataError: the number of atoms differs from the topology.
    """
    if positions.shape[-2:] != (topology.n_atoms, 3):
        raise DataError(f"positions have shape {positions.shape}, the topology has {topology.n_atoms} atoms")
    leading = positions.shape[:-2]
    flat = positions.reshape(-1, topology.n_atoms, 3)
    angles = np.empty((len(flat), len(torsions.names)))
    for start in range(0, len(flat), CHUNK):
        part = flat[start : start + CHUNK]
        frames = mdtraj.Trajectory(np.ascontiguousarray(part, dtype=np.float32), topology)
        angles[start : start + len(part)] = mdtraj.compute_dihedrals(frames, torsions.indices, periodic=False)
    return angles.reshape(*leading, len(torsions.names))


def circular_features(angles: np.ndarray) -> np.ndarray:
    """Return (cos, sin) of angles [..., torsion] rad as [..., 2 * torsion]: all cosines first, then all sines."""
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)


def circular_feature_names(torsions: Torsions) -> tuple[str, ...]:
    """Return the names of `circular_features` in its order."""
    return tuple(f"cos {name}" for name in torsions.names) + tuple(f"sin {name}" for name in torsions.names)
