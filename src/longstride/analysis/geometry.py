"""Whether structures are chemically sound: bonds, angles, contacts, handedness and peptide bonds, against the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import mdtraj

TAIL = 0.0005  # of every bond and angle of the reference, at either side
BROKEN = 0.25  # a bond further outside the range of the reference than this share of its length is broken
HEAVY_CONTACT, HYDROGEN_CONTACT = 0.75, 0.5  # of the sum of two van der Waals radii
RADII_NM = {"H": 0.11, "C": 0.17, "N": 0.155, "O": 0.152, "S": 0.18, "F": 0.147, "P": 0.18, "Cl": 0.175}
BOND_SEPARATION = 4  # atoms fewer bonds apart than this never clash
CHUNK = 2_000


@dataclass(frozen=True, kw_only=True)
class GeometryTerms:
    """What is measured in a structure.

    Attributes:
        bonds: [bond, 2] atom indices.
        angles: [angle, 3] atom indices, the middle one is the vertex.
        pairs: [pair, 2] atoms at least four bonds apart.
        contacts: [pair] nm, a pair that is nearer clashes.
    """

    bonds: np.ndarray
    angles: np.ndarray
    pairs: np.ndarray
    contacts: np.ndarray


def _separations(bonds: np.ndarray, n_atoms: int) -> np.ndarray:
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import shortest_path

    graph = coo_matrix((np.ones(len(bonds)), (bonds[:, 0], bonds[:, 1])), shape=(n_atoms, n_atoms))
    return shortest_path(graph, directed=False, unweighted=True)


def find_terms(topology: mdtraj.Topology) -> GeometryTerms:
    """Return the bonds, angles and non-bonded pairs of a molecule.

    A pair clashes below 0.75 times the sum of its van der Waals radii (doi:10.1021/j100785a001, doi:10.1021/jp8111556), with a
    hydrogen below 0.5 times, so that hydrogen bonds do not count.
    """
    bonds = np.array(sorted(sorted((a.index, b.index)) for a, b in topology.bonds), dtype=int).reshape(-1, 2)
    neighbours: dict[int, list[int]] = {}
    for a, b in bonds.tolist():
        neighbours.setdefault(a, []).append(b)
        neighbours.setdefault(b, []).append(a)
    angles = [
        (one, vertex, other)
        for vertex in sorted(neighbours)
        for one in sorted(neighbours[vertex])
        for other in sorted(neighbours[vertex])
        if one < other
    ]
    first, second = np.nonzero(np.triu(_separations(bonds, topology.n_atoms) >= BOND_SEPARATION, k=1))
    symbols = [atom.element.symbol for atom in topology.atoms]
    radii = np.array([RADII_NM.get(symbol, 0.17) for symbol in symbols])
    hydrogen = np.array([symbol == "H" for symbol in symbols], dtype=bool)
    share = np.where(hydrogen[first] | hydrogen[second], HYDROGEN_CONTACT, HEAVY_CONTACT)
    return GeometryTerms(
        bonds=bonds,
        angles=np.array(angles, dtype=int).reshape(-1, 3),
        pairs=np.stack([first, second], axis=1),
        contacts=share * (radii[first] + radii[second]),
    )


def bond_lengths(positions: np.ndarray, bonds: np.ndarray) -> np.ndarray:
    """Return bond lengths of positions [frame, atom, 3] nm, [frame, bond] nm."""
    return np.linalg.norm(positions[:, bonds[:, 0]] - positions[:, bonds[:, 1]], axis=-1)


def bond_angles(positions: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Return bond angles of positions [frame, atom, 3], [frame, angle] rad."""
    a = positions[:, angles[:, 0]] - positions[:, angles[:, 1]]
    b = positions[:, angles[:, 2]] - positions[:, angles[:, 1]]
    cross = np.linalg.norm(np.cross(a, b), axis=-1)
    return np.arctan2(cross, (a * b).sum(axis=-1))


@dataclass(frozen=True, kw_only=True)
class GeometryLimits:
    """What the reference allows.

    Attributes:
        bonds: [2, bond] nm, lower and upper 0.05 % quantiles.
        angles: [2, angle] rad, the same.
        intact: [2, bond] nm, lengths of a bond that is not broken.
    """

    bonds: np.ndarray
    angles: np.ndarray
    intact: np.ndarray


def limits_of(structures: np.ndarray, terms: GeometryTerms) -> GeometryLimits:
    """Return the limits that structures [frame, atom, 3] nm of the reference set; 0.1 % of the reference lies outside each."""
    lengths, angles = bond_lengths(structures, terms.bonds), bond_angles(structures, terms.angles)
    wide = np.array([lengths.min(axis=0) * (1 - BROKEN), lengths.max(axis=0) * (1 + BROKEN)])
    tails = [TAIL, 1 - TAIL]
    return GeometryLimits(bonds=np.quantile(lengths, tails, axis=0), angles=np.quantile(angles, tails, axis=0), intact=wide)


@dataclass(frozen=True, kw_only=True)
class GeometryFlags:
    """What is wrong with each frame.

    Attributes:
        bond_outliers: [frame] share of bonds outside the quantiles of the reference.
        angle_outliers: [frame] share of angles outside the quantiles of the reference.
        broken: [frame] 1 where a bond is broken.
        clashes: [frame] number of clashing pairs.
    """

    bond_outliers: np.ndarray
    angle_outliers: np.ndarray
    broken: np.ndarray
    clashes: np.ndarray


def _outside(values: np.ndarray, limits: np.ndarray) -> np.ndarray:
    # NaN is outside of everything
    return ~((values >= limits[0]) & (values <= limits[1]))


def flag_geometry(structures: np.ndarray, terms: GeometryTerms, limits: GeometryLimits) -> GeometryFlags:
    """Return what is wrong with structures [frame, atom, 3] nm, in chunks of 2 000 frames."""
    parts: dict[str, list[np.ndarray]] = {"bond_outliers": [], "angle_outliers": [], "broken": [], "clashes": []}
    for start in range(0, len(structures), CHUNK):
        x = structures[start : start + CHUNK]
        lengths = bond_lengths(x, terms.bonds)
        parts["bond_outliers"].append(_share(_outside(lengths, limits.bonds)))
        parts["angle_outliers"].append(_share(_outside(bond_angles(x, terms.angles), limits.angles)))
        parts["broken"].append(_outside(lengths, limits.intact).any(axis=1).astype(float))
        near = bond_lengths(x, terms.pairs) < terms.contacts
        parts["clashes"].append(near.sum(axis=1).astype(float))
    return GeometryFlags(**{name: np.concatenate(values) if values else np.zeros(0) for name, values in parts.items()})


def _share(flags: np.ndarray) -> np.ndarray:
    return flags.mean(axis=1) if flags.shape[1] else np.zeros(len(flags))
