"""Internal coordinates of a molecule: bonds, angles and torsions along a spanning tree of its bond graph.

Atoms are placed one after another. Row i of the Z-matrix names the atom it places, the atom it is bonded to (parent),
the atom that closes its angle, and the atom that closes its dihedral. Each bond about which the molecule can rotate
carries exactly one *free* dihedral; every other dihedral is measured from a sibling on the same parent (an *offset*),
so it is stiff: near +-120 degrees at a tetrahedral atom and 180 degrees at a planar one. A sampler of the free
dihedrals therefore moves whole groups, and handedness is the sign of an offset.

Rings. A ring is closed by its last atom A, which is placed by its distances r1, r2 to both ring neighbours B and D and by
its angle psi about the axis B -> D, measured from the atom before B. Both closing bonds are then stiff coordinates, and
psi is the pucker: free where the ring has a tetrahedral atom (proline), stiff in a flat ring. No other placement of
ring atoms keeps the closing bond at its length.

Density. Write x = g . X(b, theta, phi) with g a rigid motion (three translations, three rotations) and X the canonical
placement of `ZMatrix.to_cartesian`. The volume elements obey

    d^{3N}x = dmu(g) * prod_i b_i^2 sin(theta_i) db_i dtheta_i dphi_i * prod_A (r1 r2 / |B - D|) dr1 dr2 dpsi

with mu the invariant measure of rigid motions; the first product is over the atoms placed by a bond and an angle (Go and
Scheraga 1976, doi:10.1021/ma60052a001), the second over those that close a ring (bipolar coordinates). A potential that
does not change under rigid motions therefore gives the internal coordinates the density exp(-U/kT) times these factors,
independent of g.
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
        angles: [batch, atom - 2] radian in (0, pi), of rows 2, 3, ...; nm, the second distance, where a row closes a ring.
        dihedrals: [batch, atom - 3] radian in [-pi, pi), of rows 3, 4, ...
    """

    bonds: Tensor
    angles: Tensor
    dihedrals: Tensor


@dataclass(frozen=True, kw_only=True)
class ZMatrix:
    """The placement table. Build it with `build_zmatrix`.

    Attributes:
        rows: [atom, 4] int64 (atom, bonded to, angle with, dihedral with); -1 where a root row has no such atom. A row
            that closes a ring holds (A, B, D, the atom before B).
        free: dihedral indices (row - 3) that turn a bond or pucker a ring, the one that moves most atoms first.
        closures: row numbers that close a ring.
        levels: rows that can be placed at the same time, as arrays of row numbers, from row 3 on; a level holds either
            no row that closes a ring or only such rows.
    """

    rows: np.ndarray
    free: np.ndarray
    closures: np.ndarray
    levels: tuple[np.ndarray, ...]

    @property
    def n_atoms(self) -> int:
        """Number of atoms."""
        return len(self.rows)

    @property
    def offsets(self) -> np.ndarray:
        """Dihedral indices (row - 3) that are stiff: measured from a sibling, or inside a flat ring."""
        return np.setdiff1d(np.arange(self.n_atoms - 3), self.free)

    @property
    def angular(self) -> np.ndarray:
        """[atom - 2] bool, which entries of `Internals.angles` are angles; the others are distances."""
        return ~np.isin(np.arange(2, self.n_atoms), self.closures)

    def from_cartesian(self, x: Tensor) -> Internals:
        """Return the internal coordinates of positions [batch, atom, 3] nm, in the precision of x."""
        rows = torch.from_numpy(self.rows).to(x.device)
        to_atom = x[:, rows[1:, 0]] - x[:, rows[1:, 1]]
        to_angle = x[:, rows[2:, 2]] - x[:, rows[2:, 1]]
        normal = torch.linalg.cross(to_atom[:, 1:], to_angle)
        # atan2 keeps full precision near 0 and pi, where acos loses half of the digits
        angles = torch.atan2(normal.norm(dim=-1), (to_atom[:, 1:] * to_angle).sum(-1))
        dihedrals = _dihedral(x, rows[3:])
        if len(self.closures):
            ring = torch.from_numpy(self.closures).to(x.device)
            angles = angles.index_copy(1, ring - 2, (x[:, rows[ring, 0]] - x[:, rows[ring, 2]]).norm(dim=-1))
            dihedrals = dihedrals.index_copy(1, ring - 3, _pucker(x, rows[ring]))
        return Internals(bonds=to_atom.norm(dim=-1), angles=angles, dihedrals=dihedrals)

    def to_cartesian(self, internals: Internals) -> Tensor:
        """Return positions [batch, atom, 3] nm in the canonical frame.

        Row 0 is the origin, row 1 lies on +x, row 2 in the half plane y > 0; the inverse of `from_cartesian` up to a
        rigid motion. Positions are NaN where the two distances that close a ring cannot meet.
        """
        b, theta, phi = internals.bonds, internals.angles, internals.dihedrals
        rows = torch.from_numpy(self.rows).to(b.device)
        zero = torch.zeros_like(b[:, 0])
        first = torch.stack([b[:, 0], zero, zero], -1)
        second = torch.stack([b[:, 1] * theta[:, 0].cos(), b[:, 1] * theta[:, 0].sin(), zero], -1)
        x = b.new_zeros(len(b), self.n_atoms, 3)
        x = x.index_copy(1, rows[1:3, 0], torch.stack([first, second], 1))
        closing = set(self.closures.tolist())
        for level in self.levels:
            index = torch.from_numpy(level).to(b.device)
            place = _close if int(level[0]) in closing else _place
            placed = place(x, rows[index], b[:, index - 1], theta[:, index - 2], phi[:, index - 3])
            x = x.index_copy(1, rows[index, 0], placed)
        return x

    def log_measure(self, internals: Internals, x: Tensor) -> Tensor:
        """Return the log of the density of Cartesian volume (see the module), [batch].

        Args:
            internals: the internal coordinates.
            x: [batch, atom, 3] nm, the positions they stand for, in any frame.
        """
        if not len(self.closures):
            return 2.0 * internals.bonds.log().sum(-1) + internals.angles.sin().log().sum(-1)
        ring = torch.from_numpy(self.closures).to(x.device)
        rows = torch.from_numpy(self.rows).to(x.device)[ring]
        angular = torch.from_numpy(self.angular).to(x.device)
        total = 2.0 * internals.bonds.log().sum(-1) + internals.angles[:, angular].sin().log().sum(-1)
        foci = (x[:, rows[:, 1]] - x[:, rows[:, 2]]).norm(dim=-1)
        return total + (internals.angles[:, ring - 2] / internals.bonds[:, ring - 1] / foci).log().sum(-1)

    def frame(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rigid motion of positions [batch, atom, 3]: origin [batch, 3], axes as rows [batch, 3, 3]."""
        origin, first, second = (x[:, int(atom)] for atom in self.rows[:3, 0])
        e1 = _unit(first - origin)
        e3 = _unit(torch.linalg.cross(e1, second - origin))
        return origin, torch.stack([e1, torch.linalg.cross(e3, e1), e3], dim=1)

    def to_meta(self) -> dict[str, Any]:
        """Return the table as JSON values, for checkpoints."""
        return {"rows": self.rows.tolist(), "free": self.free.tolist(), "closures": self.closures.tolist()}


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


def _ring_frame(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return B, the unit axis B -> D, |B - D|, and the unit vector across it towards the atom before B."""
    first, second, before = (x[:, rows[:, column]] for column in (1, 2, 3))
    between = second - first
    axis = _unit(between)
    reference = before - first
    across = _unit(reference - (reference * axis).sum(-1, keepdim=True) * axis)
    return first, axis, between.norm(dim=-1), across


def _pucker(x: Tensor, rows: Tensor) -> Tensor:
    """Return the angle of A about the axis B -> D, from the atom before B."""
    first, axis, _, across = _ring_frame(x, rows)
    arm = x[:, rows[:, 0]] - first
    up = torch.linalg.cross(axis, across)
    return wrap(torch.atan2((arm * up).sum(-1), (arm * across).sum(-1)))


def _close(x: Tensor, rows: Tensor, r1: Tensor, r2: Tensor, psi: Tensor) -> Tensor:
    first, axis, distance, across = _ring_frame(x, rows)
    along = (r1.square() + distance.square() - r2.square()) / (2.0 * distance)
    height = (r1.square() - along.square()).sqrt()  # NaN where the circles do not meet
    radial = psi.cos()[..., None] * across + psi.sin()[..., None] * torch.linalg.cross(axis, across)
    return first + along[..., None] * axis + height[..., None] * radial


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


@dataclass(frozen=True)
class _Tree:
    """A breadth-first tree: parents, children (largest branch first), and the bonds that it leaves out."""

    root: int
    parent: list[int]
    children: list[list[int]]
    closing: dict[int, int]  # atom that closes a ring -> its neighbour outside the tree

    @classmethod
    def of(cls, system: System, bonded_to: list[list[int]]) -> _Tree:
        root = _centre(bonded_to)
        order, parent = _spanning_tree(bonded_to, root)
        rank = {atom: index for index, atom in enumerate(order)}
        size = _branch_sizes(order, parent)
        closing: dict[int, int] = {}
        for first, second in system.bonds.tolist():
            if parent[first] == second or parent[second] == first:
                continue
            last, other = (first, second) if rank[first] > rank[second] else (second, first)
            if last in closing or parent[last] == root:
                raise DataError(
                    f"the rings at atom {last} are fused in a way, or so small, that internal coordinates do not cover"
                )
            closing[last] = other
        children: list[list[int]] = [[] for _ in order]
        for atom in order[1:]:
            children[parent[atom]].append(atom)
        for bonded in children:
            # an atom that closes a ring leads its siblings: they are measured from it
            bonded.sort(key=lambda c: (c not in closing, -size[c], -int(system.atomic_numbers[c]), c))
        return cls(root, parent, children, closing)

    def partners(self, atom: int) -> list[int]:
        """Neighbours of `atom` outside the tree."""
        found = [last for last, other in self.closing.items() if other == atom]
        return found + ([self.closing[atom]] if atom in self.closing else [])


def _table(tree: _Tree) -> list[list[int]]:
    """Return Z-matrix rows in an order in which every row only refers to earlier ones."""
    root, closing = tree.root, tree.closing
    first, second, *others = tree.children[root]
    rows = [[root, -1, -1, -1], [first, root, -1, -1], [second, root, first, -1]]
    waiting = [[other, root, first, second] for other in others]
    queue = [(first, root, second), (second, root, first), *((other, root, first) for other in others)]
    for atom, before, behind in queue:
        partners = tree.partners(atom)
        for child in tree.children[atom]:
            leader = partners[0] if partners else tree.children[atom][0]
            if child in closing:
                waiting.append([child, atom, closing[child], before])
            else:
                waiting.append([child, atom, before, behind if child == leader else leader])
            queue.append((child, atom, before))
    placed = {first, second, root}
    while waiting:
        ready = next((row for row in waiting if placed.issuperset(row[1:])), None)
        if ready is None:
            raise DataError(f"the rings at atom {waiting[0][0]} are fused in a way that internal coordinates do not cover")
        waiting.remove(ready)
        rows.append(ready)
        placed.add(ready[0])
    return rows


def _levels(rows: list[list[int]], closing: dict[int, int]) -> tuple[np.ndarray, ...]:
    depth = {row[0]: 0 for row in rows[:3]}
    members: dict[tuple[int, bool], list[int]] = {}
    for number, row in enumerate(rows[3:], start=3):
        depth[row[0]] = 1 + max(depth[atom] for atom in row[1:])
        members.setdefault((depth[row[0]], row[0] in closing), []).append(number)
    return tuple(np.array(members[level]) for level in sorted(members))


def _ring_of(tree: _Tree, last: int) -> list[int]:
    """Return the atoms of the ring that `last` closes."""

    def upwards(atom: int) -> list[int]:
        path = [atom]
        while tree.parent[path[-1]] >= 0:
            path.append(tree.parent[path[-1]])
        return path

    left, right = upwards(last), upwards(tree.closing[last])
    shared = next(atom for atom in left if atom in right)
    return left[: left.index(shared) + 1] + right[: right.index(shared)]


def _free_rows(rows: list[list[int]], tree: _Tree, bonded_to: list[list[int]]) -> list[int]:
    """Return the rows whose dihedral turns a bond or puckers a ring.

    A dihedral measured from a sibling (or from the partner that closes a ring) is stiff; so is one about a bond between
    two flat atoms of a ring, and the pucker of a ring of flat atoms.
    """
    rings = [_ring_of(tree, last) for last in tree.closing]
    tetrahedral = 4
    found = []
    for number, (atom, parent, before, reference) in enumerate(rows[3:], start=3):
        if atom in tree.closing:
            ring = rings[list(tree.closing).index(atom)]
            if any(len(bonded_to[member]) == tetrahedral for member in ring):
                found.append(number)
            continue
        if reference in bonded_to[parent]:
            continue
        flat_bond = any(parent in ring and before in ring for ring in rings) and all(
            len(bonded_to[end]) < tetrahedral for end in (parent, before)
        )
        if not flat_bond:
            found.append(number)
    return found


def build_zmatrix(system: System) -> ZMatrix:
    """Return the Z-matrix of a molecule, from its bond graph alone (no coordinates).

    The root is the centre of the bond graph; at every atom the child with the largest branch carries the free
    dihedral, so in a peptide these are phi, psi, omega and the side-chain torsions.

    Raises:
        DataError: fewer than three atoms, more than one molecule, rings of three atoms or with more than two rings at
            one atom.
    """
    bonded_to = neighbours(system)
    tree = _Tree.of(system, bonded_to)
    rows = _table(tree)
    free = _free_rows(rows, tree, bonded_to)
    order, parent = _spanning_tree(bonded_to, tree.root)
    size = _branch_sizes(order, parent)
    moved = {row: min(size[rows[row][1]], system.n_atoms - size[rows[row][1]]) for row in free}
    ranked = sorted(free, key=lambda row: (-moved[row], row))
    return ZMatrix(
        rows=np.array(rows),
        free=np.array(ranked, dtype=np.int64) - 3,
        closures=np.array([n for n, row in enumerate(rows) if row[0] in tree.closing], dtype=np.int64),
        levels=_levels(rows, tree.closing),
    )
