"""What a network may know about a molecule before it sees a configuration: force-field features of atoms and torsions.

Names of residues and atoms are left out on purpose. A network that reads the element, charge, Lennard-Jones and Born
parameters of the atoms, the bond graph, and the force field's own torsion profiles meets nothing new in a sequence it was
not trained on, where embeddings of names would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import openmm
import torch
from openmm import unit

from longstride.flows.zmatrix import ZMatrix, wrap
from longstride.potentials.amber_parameters import AmberParameters, NonbondedParameters, read_parameters
from longstride.systems import neighbours

if TYPE_CHECKING:
    from torch import Tensor

    from longstride.state import System

ELEMENTS = (1, 6, 7, 8, 16)
PROFILE_HARMONICS = 6
FARTHEST = 12  # graph distances between torsions are counted up to here
MOST_SUBSTITUENTS = 3
_GRID = 48
_PROFILE_CAP = 12.0  # kT; a profile above is a clash, whose height says nothing more


@dataclass(frozen=True, kw_only=True)
class TorsionFeatures:
    """Static features of one molecule. Torsions are in the order of `ZMatrix.free`.

    Attributes:
        atoms: [atom, feature] element, charge, Lennard-Jones, Born radius, number of neighbours and of hydrogens, ring.
        bonds: [2, 2 * bond] int64, both directions.
        ends: [torsion, 4] int64 atoms of each free dihedral (placed, parent, angle, reference).
        substituents: [torsion, 2, 3] int64 neighbours of the parent and of the angle atom, -1 where there are fewer.
        placements: [torsion, 2, 3, 2] cos and sin of their angle about the bond, from the placed atom (for neighbours of
            the parent) and from the reference atom (for those of the angle atom), in the reference geometry.
        profiles: [torsion, 4 * harmonics] Fourier coefficients (cos, sin) in kT of the torsion terms about the bond, and of
            the pairs at its two ends, as functions of the free dihedral.
        kinds: [torsion, 5] symmetry number 1, 2 or 3 (one-hot), pucker, bond in a ring.
        symmetry: [torsion] float64 symmetry number n: the density has period 2 pi / n.
        distances: [torsion, torsion] int64 graph distance between the axes, at most `FARTHEST`.
    """

    atoms: Tensor
    bonds: Tensor
    ends: Tensor
    substituents: Tensor
    placements: Tensor
    profiles: Tensor
    kinds: Tensor
    symmetry: Tensor
    distances: Tensor

    @property
    def n_torsions(self) -> int:
        """Number of free torsions."""
        return len(self.ends)

    def to(self, dtype: torch.dtype | None = None, *, device: torch.device | None = None) -> TorsionFeatures:
        """Return a copy on another device, or with real features in another precision; the symmetry numbers keep theirs."""
        values = {item.name: getattr(self, item.name).to(device=device) for item in fields(self)}
        changed = {k: v.to(dtype=dtype) for k, v in values.items() if v.is_floating_point() and k != "symmetry"}
        return TorsionFeatures(**{**values, **changed})


def torsion_features(
    system: System, openmm_system: openmm.System, zmatrix: ZMatrix, reference: np.ndarray, kT: float
) -> TorsionFeatures:
    """Return the features of a molecule.

    Args:
        system: identity and bonds.
        openmm_system: its force field.
        zmatrix: its internal coordinates.
        reference: [atom, 3] nm, a relaxed geometry; only its stiff coordinates matter.
        kT: thermal energy, kJ/mol.
    """
    bonded = neighbours(system)
    parameters = read_parameters(openmm_system)
    x = torch.from_numpy(np.asarray(reference, dtype=np.float64))[None]
    ends = zmatrix.rows[zmatrix.free + 3]
    pucker = np.isin(zmatrix.free + 3, zmatrix.closures)
    here = zmatrix.from_cartesian(x).dihedrals[0, torch.from_numpy(zmatrix.free)].numpy()
    found = [
        _substituents(x, row, bonded, closes=bool(closes)) for row, closes in zip(ends.tolist(), pucker.tolist(), strict=True)
    ]
    symmetry = _symmetry_numbers(system, openmm_system, bonded, ends, pucker)
    ring = _ring_bonds(zmatrix, bonded, ends)
    kinds = np.concatenate([np.eye(3)[symmetry - 1], pucker[:, None], ring[:, None]], axis=1)
    profiles = [
        np.zeros(4 * PROFILE_HARMONICS) if closes else _profile(parameters, x, row, value, bonded) / kT
        for row, value, closes in zip(ends.tolist(), here.tolist(), pucker.tolist(), strict=True)
    ]
    pairs = np.concatenate([system.bonds, system.bonds[:, ::-1]]).T
    return TorsionFeatures(
        atoms=torch.from_numpy(_atom_features(system, openmm_system, bonded, zmatrix)),
        bonds=torch.from_numpy(np.ascontiguousarray(pairs)),
        ends=torch.from_numpy(ends.copy()),
        substituents=torch.stack([item[0] for item in found]),
        placements=torch.stack([item[1] for item in found]),
        profiles=torch.from_numpy(np.stack(profiles)),
        kinds=torch.from_numpy(kinds),
        symmetry=torch.from_numpy(symmetry.astype(np.float64)),
        distances=torch.from_numpy(_axis_distances(bonded, ends)),
    )


def _nonbonded(openmm_system: openmm.System) -> np.ndarray:
    """Return charge (e), sigma (nm), epsilon (kJ/mol), [atom, 3]; zeros without a NonbondedForce."""
    for force in openmm_system.getForces():
        if isinstance(force, openmm.NonbondedForce):
            rows = [force.getParticleParameters(i) for i in range(force.getNumParticles())]
            units = (unit.elementary_charge, unit.nanometer, unit.kilojoule_per_mole)
            return np.array([[value.value_in_unit(u) for value, u in zip(row, units, strict=True)] for row in rows])
    return np.zeros((openmm_system.getNumParticles(), 3))


def _atom_features(system: System, openmm_system: openmm.System, bonded: list[list[int]], zmatrix: ZMatrix) -> np.ndarray:
    charge, sigma, epsilon = _nonbonded(openmm_system).T
    element = np.array([[number == known for known in ELEMENTS] for number in system.atomic_numbers], dtype=np.float64)
    degree = np.array([[len(around) == count for count in (1, 2, 3, 4)] for around in bonded], dtype=np.float64)
    hydrogens = np.array([sum(system.atomic_numbers[other] == 1 for other in around) for around in bonded])
    in_ring = _ring_atoms(zmatrix)
    ring = np.array([atom in in_ring for atom in range(system.n_atoms)])
    columns = [charge, 10 * (sigma - 0.3), np.sqrt(np.maximum(epsilon, 0)), hydrogens / 3.0, ring]
    return np.concatenate([element, degree, np.stack(columns, axis=1)], axis=1)


def _ring_atoms(zmatrix: ZMatrix) -> set[int]:
    parent = {int(row[0]): int(row[1]) for row in zmatrix.rows}
    found: set[int] = set()
    for atom, first, second, _ in zmatrix.rows[zmatrix.closures].tolist():
        paths = []
        for end in (first, second):
            path = [end]
            while parent[path[-1]] >= 0:
                path.append(parent[path[-1]])
            paths.append(path)
        shared = next(node for node in paths[0] if node in paths[1])
        found |= {atom, *paths[0][: paths[0].index(shared) + 1], *paths[1][: paths[1].index(shared)]}
    return found


def _ring_bonds(zmatrix: ZMatrix, bonded: list[list[int]], ends: np.ndarray) -> np.ndarray:
    """Return whether the axis of each torsion is part of a ring, [torsion] bool."""
    atoms = _ring_atoms(zmatrix)
    return np.array([row[1] in atoms and row[2] in atoms and row[2] in bonded[row[1]] for row in ends.tolist()])


def _angle_about(x: Tensor, start: int, parent: int, angle: int, end: int) -> float:
    """Return the dihedral from `end` (on the side of `angle`) to `start` (on that of `parent`), sign as in `ZMatrix`."""
    rows = torch.tensor([[start, parent, angle, end]])
    i, j, k, m = (x[:, rows[:, column]] for column in range(4))
    axis = (k - j) / (k - j).norm(dim=-1, keepdim=True)
    n1, n2 = torch.linalg.cross(i - j, axis), torch.linalg.cross(m - k, axis)
    return float(torch.atan2((torch.linalg.cross(n1, n2) * axis).sum(-1), (n1 * n2).sum(-1)))


def _substituents(x: Tensor, row: list[int], bonded: list[list[int]], *, closes: bool) -> tuple[Tensor, Tensor]:
    placed, parent, angle, reference = row
    atoms = torch.full((2, MOST_SUBSTITUENTS), -1)
    places = torch.zeros(2, MOST_SUBSTITUENTS, 2, dtype=torch.float64)
    if closes:
        return atoms, places
    here = _angle_about(x, placed, parent, angle, reference)
    for slot, other in enumerate([a for a in bonded[parent] if a != angle][:MOST_SUBSTITUENTS]):
        delta = _angle_about(x, other, parent, angle, reference) - here
        atoms[0, slot], places[0, slot] = other, torch.tensor([math.cos(delta), math.sin(delta)])
    for slot, other in enumerate([a for a in bonded[angle] if a != parent][:MOST_SUBSTITUENTS]):
        delta = here - _angle_about(x, placed, parent, angle, other)
        atoms[1, slot], places[1, slot] = other, torch.tensor([math.cos(delta), math.sin(delta)])
    return atoms, places


def _profile(parameters: AmberParameters, x: Tensor, row: list[int], here: float, bonded: list[list[int]]) -> np.ndarray:
    """Return Fourier coefficients (cos, sin; kJ/mol) of the torsion terms and of the end-to-end pairs, as functions of t."""
    parent, angle = row[1:3]
    grid = np.arange(_GRID) * 2 * np.pi / _GRID
    bonded_part = np.zeros(_GRID)
    if parameters.torsions is not None:
        p = parameters.torsions
        for atoms, cosine, sine in zip(p.atoms.tolist(), p.cosine, p.sine, strict=True):
            if {atoms[1], atoms[2]} != {parent, angle}:
                continue
            i, m = (atoms[0], atoms[3]) if atoms[1] == parent else (atoms[3], atoms[0])
            phi = _angle_about(x, i, parent, angle, m) - here + grid
            order = np.arange(len(cosine))[:, None]
            bonded_part += (cosine[:, None] * np.cos(order * phi) + sine[:, None] * np.sin(order * phi)).sum(0)
    ends = [(i, m) for i in bonded[parent] for m in bonded[angle] if i != angle and m != parent]
    turns = {(i, m): _angle_about(x, i, parent, angle, m) - here + grid for i, m in ends}
    pair_part = (
        np.zeros(_GRID) if parameters.nonbonded is None else _pair_profile(parameters.nonbonded, x, (parent, angle), turns)
    )
    return np.concatenate([_fourier(bonded_part), _fourier(pair_part)])


def _pair_profile(
    p: NonbondedParameters, x: Tensor, bond: tuple[int, int], turns: dict[tuple[int, int], np.ndarray]
) -> np.ndarray:
    """Return the energy of the scaled pairs across a bond, on the grid; `turns` holds the dihedral of each pair."""
    parent, angle = bond
    table = {
        tuple(sorted(pair)): (q, a, b)
        for pair, q, a, b in zip(p.exceptions.tolist(), p.exception_qq, p.exception_a, p.exception_b, strict=True)
    }
    total = np.zeros(_GRID)
    centre = x[0].numpy()
    axis = centre[angle] - centre[parent]
    axis = axis / np.linalg.norm(axis)
    for (i, m), phi in turns.items():
        key = (min(i, m), max(i, m))
        if key not in table:
            continue
        qq, a, b = table[key]
        arm_i, arm_m = centre[i] - centre[parent], centre[m] - centre[parent]
        along = np.dot(arm_i - arm_m, axis)
        rho_i = np.linalg.norm(arm_i - np.dot(arm_i, axis) * axis)
        rho_m = np.linalg.norm(arm_m - np.dot(arm_m, axis) * axis)
        r2 = along**2 + rho_i**2 + rho_m**2 - 2 * rho_i * rho_m * np.cos(phi)
        total += qq / np.sqrt(r2) + a / r2**6 - b / r2**3
    return total


def _fourier(values: np.ndarray) -> np.ndarray:
    """Return cos and sin coefficients of harmonics 1, 2, ... of a capped profile on the grid."""
    capped = np.minimum(values - values.min(), _PROFILE_CAP * 2.5)
    spectrum = np.fft.rfft(capped)[1 : PROFILE_HARMONICS + 1] * 2 / _GRID
    return np.concatenate([spectrum.real, -spectrum.imag])


def _symmetry_numbers(
    system: System, openmm_system: openmm.System, bonded: list[list[int]], ends: np.ndarray, pucker: np.ndarray
) -> np.ndarray:
    """Return 3 for rotors of three equivalent atoms, 2 for flat ones of two, else 1, [torsion] int64."""
    colour = _equivalence(system, openmm_system, bonded)
    result = []
    for (_, parent, angle, _), closes in zip(ends.tolist(), pucker.tolist(), strict=True):
        number = 1
        if not closes:
            # either end of the bond may be the symmetric one
            for near, far in ((parent, angle), (angle, parent)):
                outer = [atom for atom in bonded[near] if atom != far]
                if len({colour[atom] for atom in outer}) == 1 and len(outer) in (2, 3):
                    number = max(number, len(outer))
        result.append(number)
    return np.array(result, dtype=np.int64)


def _equivalence(system: System, openmm_system: openmm.System, bonded: list[list[int]]) -> list[int]:
    """Return a colour per atom; atoms of one colour have the same parameters and the same surroundings."""
    values = np.round(_nonbonded(openmm_system), 6)
    keys: list[object] = [(int(z), *row) for z, row in zip(system.atomic_numbers, values.tolist(), strict=True)]
    for _ in range(system.n_atoms):
        names = {key: index for index, key in enumerate(sorted(set(keys), key=repr))}
        colours = [names[key] for key in keys]
        refined: list[object] = [(colours[a], tuple(sorted(colours[b] for b in bonded[a]))) for a in range(system.n_atoms)]
        if len(set(refined)) == len(names):
            return colours
        keys = refined
    return colours


def _axis_distances(bonded: list[list[int]], ends: np.ndarray) -> np.ndarray:
    n = len(bonded)
    graph = np.full((n, n), FARTHEST)
    for start in range(n):
        graph[start, start] = 0
        frontier, depth = [start], 0
        while frontier and depth < FARTHEST:
            depth += 1
            frontier = [other for atom in frontier for other in bonded[atom] if graph[start, other] > depth and other != start]
            for other in frontier:
                graph[start, other] = min(graph[start, other], depth)
    axes = ends[:, 1:3]
    between = graph[axes[:, None, :, None], axes[None, :, None, :]]
    return between.min(axis=(2, 3))


def reduced(angles: Tensor, symmetry: Tensor) -> Tensor:
    """Return the torsions [..., torsion] folded to their symmetry, wrap(n t): equivalent configurations coincide."""
    return wrap(angles * symmetry.to(angles.dtype))
