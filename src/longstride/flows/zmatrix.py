"""Internal coordinates of a molecule: bonds, angles and torsions along a spanning tree of its bond graph.

Atoms are placed one after another. Row i of the Z-matrix names the atom it places, the atom it is bonded to (parent),
the atom that closes its angle, and the atom that closes its dihedral. Each bond about which the molecule can rotate
carries exactly one *free* dihedral; every other dihedral is measured from a sibling on the same parent (an *offset*),
so it is stiff: near +-120 degrees at a tetrahedral atom and 180 degrees at a planar one. A sampler of the free
dihedrals therefore moves whole groups, and handedness is the sign of an offset.

Density. Write x = g . X(b, theta, phi) with g a rigid motion (three translations, three rotations) and X the canonical
placement of `ZMatrix.to_cartesian`. The volume elements obey

    d^{3N}x = dmu(g) * prod_{i=1}^{N-1} b_i^2 * prod_{i=2}^{N-1} sin(theta_i) * db dtheta dphi

with mu the invariant measure of rigid motions, for every tree, also when rings leave some bonds out of it
(Go and Scheraga 1976, doi:10.1021/ma60052a001). A potential that does not change under rigid motions therefore gives
the internal coordinates the density exp(-U/kT) prod b^2 prod sin(theta), independent of g.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from longstride.errors import DataError
from longstride.systems import neighbours

if TYPE_CHECKING:
    from torch import Tensor

    from longstride.state import System

TWO_PI = 2.0 * np.pi


def wrap(angle: Tensor) -> Tensor:
    """Return the angle (radian) moved into [-pi, pi) by whole turns."""
    return torch.remainder(angle + np.pi, TWO_PI) - np.pi


@dataclass(frozen=True, kw_only=True)
class Internals:
    """Internal coordinates of a batch of configurations.

    Attributes:
        bonds: [batch, atom - 1] nm, of rows 1, 2, ...
        angles: [batch, atom - 2] radian in (0, pi), of rows 2, 3, ...
        dihedrals: [batch, atom - 3] radian in [-pi, pi), of rows 3, 4, ...
    """

    bonds: Tensor
    angles: Tensor
    dihedrals: Tensor

    def log_measure(self) -> Tensor:
        """Return log of prod b^2 prod sin(theta), [batch]: the density of Cartesian volume (see the module)."""
        return 2.0 * self.bonds.log().sum(-1) + self.angles.sin().log().sum(-1)


@dataclass(frozen=True, kw_only=True)
class ZMatrix:
    """The placement table. Build it with `build_zmatrix`.

    Attributes:
        rows: [atom, 4] int64 (atom, bonded to, angle with, dihedral with); -1 where a root row has no such atom.
        free: dihedral indices (row - 3) that turn a bond, the one that moves most atoms first.
        levels: rows that can be placed at the same time, as arrays of row numbers, from row 3 on.
    """

    rows: np.ndarray
    free: np.ndarray
    levels: tuple[np.ndarray, ...]

    @property
    def n_atoms(self) -> int:
        """Number of atoms."""
        return len(self.rows)

    @property
    def offsets(self) -> np.ndarray:
        """Dihedral indices (row - 3) that are measured from a sibling."""
        return np.setdiff1d(np.arange(self.n_atoms - 3), self.free)

    def from_cartesian(self, x: Tensor) -> Internals:
        """Return the internal coordinates of positions [batch, atom, 3] nm, in the precision of x."""
        rows = torch.from_numpy(self.rows).to(x.device)
        to_atom = x[:, rows[1:, 0]] - x[:, rows[1:, 1]]
        to_angle = x[:, rows[2:, 2]] - x[:, rows[2:, 1]]
        normal = torch.linalg.cross(to_atom[:, 1:], to_angle)
        # atan2 keeps full precision near 0 and pi, where acos loses half of the digits
        angles = torch.atan2(normal.norm(dim=-1), (to_atom[:, 1:] * to_angle).sum(-1))
        return Internals(bonds=to_atom.norm(dim=-1), angles=angles, dihedrals=_dihedral(x, rows[3:]))

    def to_cartesian(self, internals: Internals) -> Tensor:
        """Return positions [batch, atom, 3] nm in the canonical frame.

        Row 0 is the origin, row 1 lies on +x, row 2 in the half plane y > 0; the inverse of `from_cartesian` up to a
        rigid motion.
        """
        b, theta, phi = internals.bonds, internals.angles, internals.dihedrals
        rows = torch.from_numpy(self.rows).to(b.device)
        zero = torch.zeros_like(b[:, 0])
        first = torch.stack([b[:, 0], zero, zero], -1)
        second = torch.stack([b[:, 1] * theta[:, 0].cos(), b[:, 1] * theta[:, 0].sin(), zero], -1)
        x = b.new_zeros(len(b), self.n_atoms, 3)
        x = x.index_copy(1, rows[1:3, 0], torch.stack([first, second], 1))
        for level in self.levels:
            index = torch.from_numpy(level).to(b.device)
            placed = _place(x, rows[index], b[:, index - 1], theta[:, index - 2], phi[:, index - 3])
            x = x.index_copy(1, rows[index, 0], placed)
        return x

    def frame(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rigid motion of positions [batch, atom, 3]: origin [batch, 3], axes as rows [batch, 3, 3]."""
        origin, first, second = (x[:, int(atom)] for atom in self.rows[:3, 0])
        e1 = _unit(first - origin)
        e3 = _unit(torch.linalg.cross(e1, second - origin))
        return origin, torch.stack([e1, torch.linalg.cross(e3, e1), e3], dim=1)

    def to_meta(self) -> dict[str, Any]:
        """Return the table as JSON values, for checkpoints."""
        return {"rows": self.rows.tolist(), "free": self.free.tolist()}


def place_in_frame(canonical: Tensor, origin: Tensor, axes: Tensor) -> Tensor:
    """Return canonical positions [batch, atom, 3] moved into the frame (origin, axes) of `ZMatrix.frame`."""
    return canonical @ axes + origin[:, None]


def _unit(v: Tensor) -> Tensor:
    return v / v.norm(dim=-1, keepdim=True)


def _dihedral(x: Tensor, rows: Tensor) -> Tensor:
    """Return the angle about the axis angle-atom -> parent from the dihedral atom to the placed atom."""
    i, j, k, m = (x[:, rows[:, column]] for column in range(4))
    axis = _unit(k - j)
    n1 = torch.linalg.cross(i - j, axis)
    n2 = torch.linalg.cross(m - k, axis)
    return wrap(torch.atan2((torch.linalg.cross(n1, n2) * axis).sum(-1), (n1 * n2).sum(-1)))


def _place(x: Tensor, rows: Tensor, b: Tensor, theta: Tensor, phi: Tensor) -> Tensor:
    parent, angle, dihedral = (x[:, rows[:, column]] for column in (1, 2, 3))
    axis = _unit(angle - parent)
    reference = dihedral - angle
    across = _unit(reference - (reference * axis).sum(-1, keepdim=True) * axis)
    up = torch.linalg.cross(axis, across)
    radial = phi.cos()[..., None] * across - phi.sin()[..., None] * up
    return parent + b[..., None] * (theta.cos()[..., None] * axis + theta.sin()[..., None] * radial)


def _spanning_tree(bonded_to: list[list[int]], root: int) -> tuple[list[int], list[int]]:
    """Return breadth-first order and the parent of each atom (-1 for the root)."""
    parent = [-2] * len(bonded_to)
    parent[root] = -1
    order = [root]
    for atom in order:
        for other in bonded_to[atom]:
            if parent[other] == -2:
                parent[other] = atom
                order.append(other)
    if len(order) < len(bonded_to):
        raise DataError("the bond graph has more than one piece: internal coordinates describe a single molecule; give one")
    return order, parent


def _branch_sizes(order: list[int], parent: list[int]) -> list[int]:
    size = [1] * len(order)
    for atom in reversed(order[1:]):
        size[parent[atom]] += size[atom]
    return size


def _centre(bonded_to: list[list[int]]) -> int:
    """Return the atom with two or more bonds whose removal leaves the smallest largest branch."""
    best, best_size = -1, len(bonded_to) + 1
    for atom, bonded in enumerate(bonded_to):
        if len(bonded) < 2:
            continue
        order, parent = _spanning_tree(bonded_to, atom)
        size = _branch_sizes(order, parent)
        largest = max(size[other] for other in bonded if parent[other] == atom)
        if largest < best_size:
            best, best_size = atom, largest
    if best < 0:
        raise DataError("internal coordinates need a molecule of at least three bonded atoms")
    return best


def _table(children: list[list[int]], root: int) -> tuple[list[list[int]], list[int]]:
    """Return Z-matrix rows and the row numbers whose dihedral is free."""
    first, second, *others = children[root]
    rows = [[root, -1, -1, -1], [first, root, -1, -1], [second, root, first, -1]]
    rows += [[other, root, first, second] for other in others]
    free: list[int] = []
    queue = [(first, root, second), (second, root, first), *((other, root, first) for other in others)]
    for atom, before, behind in queue:
        for child in children[atom]:
            leader = children[atom][0]
            if child == leader:
                free.append(len(rows))
            rows.append([child, atom, before, behind if child == leader else leader])
            queue.append((child, atom, before))
    return rows, free


def _levels(rows: list[list[int]]) -> tuple[np.ndarray, ...]:
    depth = {row[0]: 0 for row in rows[:3]}
    members: dict[int, list[int]] = {}
    for number, row in enumerate(rows[3:], start=3):
        depth[row[0]] = 1 + max(depth[atom] for atom in row[1:])
        members.setdefault(depth[row[0]], []).append(number)
    return tuple(np.array(members[level]) for level in sorted(members))


def build_zmatrix(system: System) -> ZMatrix:
    """Return the Z-matrix of a molecule, from its bond graph alone (no coordinates).

    The root is the centre of the bond graph; at every atom the child with the largest branch carries the free
    dihedral, so in a peptide these are phi, psi, omega and the side-chain torsions. Rings are cut at one bond: the
    density stays exact, but the torsions inside a ring are free and a sampler must learn that they close.

    Raises:
        DataError: fewer than three atoms, or more than one molecule.
    """
    bonded_to = neighbours(system)
    root = _centre(bonded_to)
    order, parent = _spanning_tree(bonded_to, root)
    size = _branch_sizes(order, parent)
    children: list[list[int]] = [[] for _ in order]
    for atom in order[1:]:
        children[parent[atom]].append(atom)
    for bonded in children:
        bonded.sort(key=lambda child: (-size[child], -int(system.atomic_numbers[child]), child))
    rows, free = _table(children, root)
    moved = {row: min(size[rows[row][1]], system.n_atoms - size[rows[row][1]]) for row in free}
    ranked = sorted(free, key=lambda row: (-moved[row], row))
    return ZMatrix(rows=np.array(rows), free=np.array(ranked, dtype=np.int64) - 3, levels=_levels(rows))
