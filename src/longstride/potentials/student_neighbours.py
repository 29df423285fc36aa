"""The student on neighbour lists, for large and for periodic systems; the same energy as `Student` gives for small ones.

Cost is proportional to the number of atoms: every centre looks at a fixed number of slots, centres of one element share
their weights in one matrix product, and the force of a neighbour back on a centre is read from the neighbour's own slot, so
that nothing is scattered. All replicas of a batch are evaluated as one system.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longstride.errors import LongstrideError
from longstride.potentials.neighbours import NeighbourList, NeighbourTable
from longstride.potentials.repulsion import ScreenedRepulsion
from longstride.potentials.student_energy import (
    ENERGY_KJ,
    LENGTH_NM,
    LOWER,
    AtomWeights,
    Radial,
    atomic_energies,
    joined_monomials,
    radial_functions,
    tables,
)

if TYPE_CHECKING:
    from longstride.potentials.student import StudentNetwork
    from longstride.state import State, System

SKIN_NM = 0.05  # the atoms of water move half of it in a few femtoseconds; wider tables cost more than rebuilding

_COMPILED: dict[int, Any] = {}


class Constants(NamedTuple):
    """Numbers of the network's form: multinomial roots, derivatives of monomials, waves [radial, 1], cutoff."""

    roots: Tensor
    derivative: Tensor
    waves: Tensor
    cutoff: float


class Slots(NamedTuple):
    """A `NeighbourTable` in the student's units and precision; `contact` [centre, slot]: beyond that 1/r, repulsion acts."""

    neighbour: Tensor
    offset: Tensor
    reverse: Tensor
    contact: Tensor


class NeighbourStudent:
    """The student potential of a large or periodic system.

    Args:
        network: the weights; read when the student is made, for dynamics, and at every call of `network_forces`.
        system: the molecules.
        compile: compile the evaluation (torch.compile), three times faster after half a minute once.
        skin_nm: by how much neighbour tables reach beyond the cutoff.

    Raises:
        LongstrideError: an element the network does not know.
    """

    def __init__(self, network: StudentNetwork, system: System, *, compile: bool = False, skin_nm: float = SKIN_NM) -> None:
        metadata = network.metadata
        species = network.species_of(system)
        self.system, self.network = system, network
        self.name = f"student-of-{metadata.teacher}"
        self.dtype = network.first.dtype
        self._present, self._local = np.unique(species.numpy(), return_inverse=True)
        self._list = NeighbourList(
            self._local, n_species=len(self._present), cutoff_nm=metadata.cutoff_nm, skin_nm=skin_nm, name=system.name
        )
        self._repulsion = ScreenedRepulsion(np.array([metadata.elements[k] for k in self._present]))
        self._shift = float(network.shifts[species].sum())
        roots, derivative = tables()
        cutoff = metadata.cutoff_nm / LENGTH_NM
        waves = torch.arange(1, metadata.radial + 1)[:, None] * math.pi / cutoff
        self._constants = Constants(roots.to(self.dtype)[:, None], derivative.to(self.dtype), waves.to(self.dtype), cutoff)
        self._table: NeighbourTable | None = None
        self._slots: Slots | None = None
        self._evaluate = _compiled(len(self._present)) if compile else evaluate
        with torch.no_grad():
            self._weights = self._gather()

    def energy(self, x: State) -> Tensor:
        """Return U(x), [batch] kJ/mol float64."""
        return self.energy_forces(x)[0]

    def energy_forces(self, x: State) -> tuple[Tensor, Tensor]:
        """Return U(x), [batch] kJ/mol, and forces [batch, atom, 3] kJ/mol/nm, both float64 (evaluated in `dtype`).

        NaN where a position is not finite.

        Raises:
            LongstrideError: the box is thinner than twice the reach of the neighbour tables.
        """
        positions = x.positions.to(torch.float64)
        finite = torch.isfinite(positions).all(dim=2).all(dim=1)
        if not bool(finite.all()):
            return self._only(finite, positions, x.box)
        with torch.no_grad():
            energy, forces = self._energy_forces(positions, x.box, self._weights, self._evaluate)
        return energy + self._shift, forces.to(torch.float64)

    def network_forces(self, positions: Tensor, box: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return energies without shifts, [batch], and forces as functions of the network's weights, for training.

        Args:
            positions: [batch, atom, 3] nm.
            box: [batch, 3, 3] nm, or None.
        """
        return self._energy_forces(positions, box, self._gather(), evaluate)

    def _only(self, keep: Tensor, positions: Tensor, box: Tensor | None) -> tuple[Tensor, Tensor]:
        energy = torch.full((len(positions),), math.nan, dtype=torch.float64)
        forces = torch.full(positions.shape, math.nan, dtype=torch.float64)
        if bool(keep.any()):
            with torch.no_grad():
                found = self._energy_forces(positions[keep], None if box is None else box[keep], self._weights, self._evaluate)
            energy[keep], forces[keep] = found[0] + self._shift, found[1].to(torch.float64)
        return energy, forces

    def _gather(self) -> list[AtomWeights]:
        present = torch.from_numpy(self._present)
        return [self.network.per_atom(present[k : k + 1], present) for k in range(len(present))]

    def _energy_forces(
        self,
        positions: Tensor,
        box: Tensor | None,
        weights: list[AtomWeights],
        evaluation: Any,  # noqa: ANN401 - plain or compiled
    ) -> tuple[Tensor, Tensor]:
        table, wrapped = self._list.update(positions.detach().to(torch.float64), box)
        if table is not self._table or self._slots is None:
            self._table, self._slots = table, self._convert(table)
        x = (wrapped.reshape(-1, 3)[table.order] / LENGTH_NM).to(self.dtype)
        atomic, forces, contact = evaluation(x, self._slots, weights, self._constants, centres=table.centres, slots=table.slots)
        batch, n = positions.shape[:2]
        replica = table.order // n
        energy = torch.zeros(batch, dtype=torch.float64).index_add(0, replica, ENERGY_KJ * atomic.to(torch.float64))
        forces = forces * (ENERGY_KJ / LENGTH_NM)
        if bool(contact):
            more, push = self._repel(x, table)
            energy, forces = energy.index_add(0, replica, more), forces + push.to(forces.dtype)
        back = torch.empty_like(table.order)
        back[table.order] = torch.arange(len(back))
        return energy, forces[back].view(batch, n, 3)

    def _convert(self, table: NeighbourTable) -> Slots:
        contact = (LENGTH_NM / self._repulsion.reach).to(self.dtype)
        centre, slot = _species(table.centres), _species(table.slots)
        return Slots(
            neighbour=table.neighbour,
            offset=(table.offset / LENGTH_NM).to(self.dtype),
            reverse=table.reverse,
            contact=contact[centre][:, slot].contiguous(),
        )

    def _repel(self, x: Tensor, table: NeighbourTable) -> tuple[Tensor, Tensor]:
        """Return the screened repulsion of the few pairs in contact: energies [centre] and forces [centre, 3]."""
        assert self._slots is not None
        rho = _vectors(x, self._slots)[0]
        close = rho.square().sum(dim=1).rsqrt() > self._slots.contact
        centre, slot = close.nonzero(as_tuple=True)
        vector = rho[centre, :, slot].to(torch.float64) * LENGTH_NM
        distance = vector.norm(dim=1)
        first, second = _species(table.centres)[centre], _species(table.slots)[slot]
        energy, slope = self._repulsion.of_pairs(first, second, distance)
        push = (slope / distance)[:, None] * vector
        energies = torch.zeros(len(x), dtype=torch.float64).index_add(0, centre, energy)
        forces = torch.zeros(len(x), 3, dtype=torch.float64).index_add(0, centre, push)
        return energies, forces.index_add(0, table.neighbour[centre, slot], -push)


def _species(counts: tuple[int, ...]) -> Tensor:
    """Return [0, 0, ..., 1, 1, ...] with the given number of each."""
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


def _vectors(x: Tensor, slots: Slots) -> Tensor:
    """Return vectors to neighbours, [1, centre, 3, slot], from positions [centre, 3]."""
    flat = x.T.contiguous()
    rho = flat[:, slots.neighbour] - flat[:, :, None] + slots.offset
    return rho.transpose(0, 1)[None]


def evaluate(
    x: Tensor,
    neighbours: Slots,
    weights: list[AtomWeights],
    constants: Constants,
    *,
    centres: tuple[int, ...],
    slots: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return atomic energies [centre], forces [centre, 3], and whether any pair is in contact; units of the network.

    Args:
        x: [centre, 3] wrapped positions.
        neighbours: the table.
        weights: of each element.
        constants: of the network.
        centres: centres of each element.
        slots: slots of each element.
    """
    with torch.no_grad():
        rho = _vectors(x, neighbours)
        radial = radial_functions(rho.square().sum(dim=2), cutoff=constants.cutoff, waves=constants.waves)
        terms = joined_monomials(rho)
        parts = zip(terms.split(slots, dim=3), radial.value.split(slots, dim=3), strict=True)
        moments = torch.cat([m @ r.transpose(2, 3) for m, r in parts], dim=3) * constants.roots
    found = [atomic_energies(part, w) for part, w in zip(moments.split(centres, dim=1), weights, strict=True)]
    energy = torch.cat([part[0] for part in found], dim=1)[0]
    gradient = torch.cat([part[1] for part in found], dim=1) * constants.roots
    pair = _pair_forces(rho, radial, terms, gradient, derivative=constants.derivative, slots=slots)
    flat = pair.transpose(0, 1).reshape(3, -1)
    reaction = flat[:, neighbours.reverse].view(3, len(x), -1).sum(dim=2)
    return energy, pair.sum(dim=2) - reaction.T, (radial.inverse_r[0] > neighbours.contact).any()


def _pair_forces(
    rho: Tensor, radial: Radial, terms: Tensor, gradient: Tensor, *, derivative: Tensor, slots: tuple[int, ...]
) -> Tensor:
    """Return dE/drho, [centre, 3, slot], element of the neighbour by element."""
    width = radial.value.shape[2]
    pieces = []
    first = 0
    for element, count in enumerate(slots):
        at = slice(first, first + count)
        first += count
        g = gradient[..., element * width : (element + 1) * width]
        along = ((g.transpose(2, 3) @ terms[..., at]) * radial.slope[..., at]).sum(dim=2)
        across = derivative @ (g @ radial.value[..., at])
        across = (across.unflatten(2, (3, LOWER)) * terms[:, :, None, :LOWER, at]).sum(dim=3)
        pieces.append(torch.addcmul(across, (along * radial.inverse_r[..., at])[:, :, None], rho[..., at]))
    return torch.cat(pieces, dim=3)[0]


def _compiled(n_elements: int) -> Any:  # noqa: ANN401 - what torch.compile returns
    """Return `evaluate`, compiled once per number of elements; sizes that change become symbols."""
    from longstride.potentials.amber import compiler_available

    if not compiler_available():
        raise LongstrideError("compile=True needs a C++ compiler and Python's headers: install g++ and python3-dev")
    if n_elements not in _COMPILED:
        options: dict[str, Any] = {"fullgraph": True, "isolate_recompiles": True}
        _COMPILED[n_elements] = torch.compile(evaluate, **options)
    return _COMPILED[n_elements]
