"""Neighbour tables with a skin: every centre has a fixed number of slots, those of one element side by side.

A table is rebuilt (by vesin's cell lists) when an atom has moved more than half the skin since the last time, so that no pair
within the cutoff is ever missed, and no pair beyond it matters, since all interactions are zero there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import vesin

from longstride.potentials.periodic import check_box

if TYPE_CHECKING:
    from torch import Tensor

GROWTH, SPARE = 4, 2  # slots come by so many, with some to spare, so that the shapes of compiled code change seldom
NOWHERE_NM = 30.0  # where empty slots point to, beyond any cutoff


@dataclass(frozen=True, kw_only=True)
class NeighbourTable:
    """Neighbours of all centres of a batch; a centre is an atom of a replica, and centres are sorted by element.

    Attributes:
        order: [centre] int64, index of each centre in the flattened batch, replica x atom.
        centres: number of centres of each element.
        neighbour: [centre, slot] int64; of an empty slot, the centre itself.
        offset: [3, centre, slot] nm float64, the lattice translation that brings the neighbour's wrapped position near; of an
            empty slot, far away.
        reverse: [centre x slot] int64, the slot in which the neighbour holds the centre; of an empty slot, itself.
        slots: number of slots of each element, in the order of the elements.
    """

    order: Tensor
    centres: tuple[int, ...]
    neighbour: Tensor
    offset: Tensor
    reverse: Tensor
    slots: tuple[int, ...]


class NeighbourList:
    """Keeps the table of a batch of configurations up to date.

    Args:
        species: [atom] index of each atom's element.
        n_species: number of elements that occur.
        cutoff_nm: range of the interactions.
        skin_nm: by how much tables reach farther.
        name: of the molecule, for error messages.
    """

    def __init__(self, species: np.ndarray, *, n_species: int, cutoff_nm: float, skin_nm: float, name: str) -> None:
        self._species, self._n_species, self._name = species, n_species, name
        self._cutoff, self._skin = cutoff_nm, skin_nm
        self._search = vesin.NeighborList(cutoff=cutoff_nm + skin_nm, full_list=False, n_threads=1)
        self._capacity = np.zeros(n_species, dtype=np.int64)
        self._positions: Tensor | None = None
        self._box: Tensor | None = None
        self._translation: Tensor | None = None
        self._table: NeighbourTable | None = None
        self.rebuilds = 0

    def update(self, positions: Tensor, box: Tensor | None) -> tuple[NeighbourTable, Tensor]:
        """Return the table of these positions, and the positions wrapped as the table wants them, [replica, atom, 3] nm.

        Args:
            positions: [replica, atom, 3] nm float64, finite.
            box: [replica, 3, 3] nm, or None for isolated molecules.

        Raises:
            LongstrideError: a box is thinner than twice the reach of the table.
        """
        if self._table is None or self._stale(positions, box):
            self._rebuild(positions, box)
        assert self._table is not None
        assert self._translation is not None
        return self._table, positions - self._translation

    def _stale(self, positions: Tensor, box: Tensor | None) -> bool:
        if self._positions is None or self._positions.shape != positions.shape or (box is None) != (self._box is None):
            return True
        if box is not None and self._box is not None and not torch.equal(box, self._box):
            return True
        moved = (positions - self._positions).square().sum(dim=2).max()
        return not bool(moved < (0.5 * self._skin) ** 2)  # NaN is stale, too

    def _rebuild(self, positions: Tensor, box: Tensor | None) -> None:
        self.rebuilds += 1
        # an isolated molecule is centred, so that single precision is spent on its shape
        translation = positions.mean(dim=1, keepdim=True).expand_as(positions)
        if box is not None:
            reach = self._cutoff + self._skin
            check_box(box.numpy(), reach, self._name, whose="the reach of the student's neighbour tables")
            cells = torch.floor(torch.linalg.solve(box.transpose(1, 2), positions.transpose(1, 2)).transpose(1, 2))
            translation = cells @ box
        parts = [
            self._pairs((positions[b] - translation[b]).numpy(), None if box is None else box[b].numpy())
            for b in range(len(positions))
        ]
        counts = np.array([len(part[0]) for part in parts])
        replica = np.repeat(np.arange(len(parts)), counts) * positions.shape[1]
        first, second, offset = (np.concatenate([part[k] for part in parts]) for k in range(3))
        species = np.tile(self._species, len(positions))
        order = np.argsort(species, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        pairs = (place[first + replica], place[second + replica], offset)
        self._table, self._capacity = _table(pairs, order=order, species=species[order], capacity=self._capacity)
        self._positions, self._box, self._translation = positions.clone(), None if box is None else box.clone(), translation

    def _pairs(self, positions: np.ndarray, box: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return every pair once: first, second [pair], and the translation of the second [pair, 3] nm."""
        cell = np.zeros((3, 3)) if box is None else box
        i, j, shift = self._search.compute(positions, cell, box is not None, quantities="ijS")
        return i.astype(np.int64), j.astype(np.int64), shift @ cell


def _table(
    pairs: tuple[np.ndarray, np.ndarray, np.ndarray], *, order: np.ndarray, species: np.ndarray, capacity: np.ndarray
) -> tuple[NeighbourTable, np.ndarray]:
    """Sort pairs (first, second, offset) into slots; return the table and the slots per element, which never shrink."""
    first, second, offset = pairs
    n, n_species = len(species), len(capacity)
    centre, neighbour = np.concatenate([first, second]), np.concatenate([second, first])
    key = centre * n_species + species[neighbour]
    counts = np.bincount(key, minlength=n * n_species)
    needed = counts.reshape(n, n_species).max(axis=0)
    capacity = np.where(needed > capacity, -(-(needed + SPARE) // GROWTH) * GROWTH, capacity)
    # place within the run of equal keys
    run = np.argsort(key.astype(np.uint16) if n * n_species <= 2**16 else key, kind="stable")
    rank = np.empty(len(key), dtype=np.int64)
    rank[run] = np.arange(len(key)) - np.repeat(np.cumsum(counts) - counts, counts)
    slot = (np.cumsum(capacity) - capacity)[species[neighbour]] + rank
    width = int(capacity.sum())
    place = centre * width + slot
    reverse = np.arange(n * width)
    reverse[place] = np.roll(place, len(first))
    neighbours = np.repeat(np.arange(n), width)
    neighbours[place] = neighbour
    offsets = np.zeros((3, n * width))
    offsets[0] = NOWHERE_NM
    offsets[:, place] = np.concatenate([offset, -offset]).T
    table = NeighbourTable(
        order=torch.from_numpy(order),
        centres=tuple(int(count) for count in np.bincount(species, minlength=n_species)),
        neighbour=torch.from_numpy(neighbours.reshape(n, width)),
        offset=torch.from_numpy(offsets.reshape(3, n, width)),
        reverse=torch.from_numpy(reverse),
        slots=tuple(int(count) for count in capacity),
    )
    return table, capacity
