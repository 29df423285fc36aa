"""The distilled student: a small invariant neural network of short range, fast enough to be called every femtosecond.

Every atom sees its neighbours within the cutoff through moments of their distribution. With rho = r_j - r_i,
radial functions e_n(|rho|) and the monomials M_m of rho up to degree 3 (in Cartesian form, as in moment tensor
potentials, doi:10.1137/15M1054183), the moments of atom i are

    D_i[m, (s, n)] = sum over neighbours j of element s:  M_m(rho / 1.5 Å) e_n(|rho|).

Two learned mixtures A = D U and C = D V, one pair per degree l and element of i, give the rotation invariants
p[l, q] = sum over m of degree l:  A[m, q] (C[m, q] + [l = 0]), which a perceptron per element turns into an atomic
energy. The energy is the sum over atoms, plus one shift per element and a screened nuclear repulsion between pairs,
which keeps atoms apart where there were no data. Everything is even under reflection, symmetric under exchange of
atoms of one element, and twice continuously differentiable at the cutoff. Small isolated molecules look at all pairs
(`Student`), large and periodic systems at neighbour lists (`potentials/student_neighbours`); both have the same energy.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from longstride.data.atomic import read_arrays, write_arrays
from longstride.errors import DataError, LongstrideError
from longstride.potentials.repulsion import ScreenedRepulsion
from longstride.potentials.student_energy import (
    DEGREE,
    ENERGY_KJ,
    LENGTH_NM,
    LOWER,
    AtomWeights,
    atomic_energies,
    monomials,
    radial_functions,
    tables,
)

if TYPE_CHECKING:
    from pathlib import Path

    from longstride.potentials.student_neighbours import NeighbourStudent
    from longstride.state import State, System

    AnyStudent: TypeAlias = "Student | NeighbourStudent"

FORMAT = "longstride student 1"
ALL_PAIRS_ATOMS = 64  # beyond, neighbour lists are faster


@dataclass(frozen=True, kw_only=True)
class StudentMetadata:
    """What a student is and what it may be used for.

    Attributes:
        elements: atomic numbers it knows, ascending.
        teacher: name of the potential that labelled its frames.
        cutoff_nm: range of the interactions.
        radial: radial functions per element.
        channels: invariants per degree.
        hidden: width of the perceptrons.
    """

    elements: tuple[int, ...]
    teacher: str
    cutoff_nm: float = 0.35
    radial: int = 6
    channels: int = 16
    hidden: int = 64


class StudentNetwork(nn.Module):
    """Weights of a student; called with a `System` it gives the `Student` of that molecule.

    Args:
        metadata: elements, teacher and sizes.
        generator: draws the initial weights.
    """

    def __init__(self, metadata: StudentMetadata, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.metadata = metadata
        n = len(metadata.elements)
        mixed, hidden = n * metadata.radial, metadata.hidden
        features = (DEGREE + 1) * metadata.channels

        def weights(*shape: int, fan_in: int, gain: float = 1.0) -> nn.Parameter:
            return nn.Parameter(gain / math.sqrt(fan_in) * torch.randn(shape, generator=generator))

        self.mixing = nn.ParameterList(
            [weights(n, mixed, 2 * metadata.channels, fan_in=mixed, gain=1.5) for _ in range(DEGREE + 1)]
        )
        self.first = weights(n, features, hidden, fan_in=features)
        self.first_bias = weights(n, 1, hidden, fan_in=1, gain=0.1)
        self.second = weights(n, hidden, hidden, fan_in=hidden)
        self.second_bias = weights(n, 1, hidden, fan_in=1, gain=0.1)
        self.last = weights(n, 1, hidden, fan_in=hidden)
        # energy of one atom of each element, kJ/mol; fitted, not trained, since forces do not see it
        self.shifts: Tensor
        self.register_buffer("shifts", torch.zeros(n, dtype=torch.float64))

    def species_of(self, system: System) -> Tensor:
        """Return the index of each atom's element in `metadata.elements`, [atom].

        Raises:
            LongstrideError: the molecule has an element that the student was not trained on.
        """
        known = self.metadata.elements
        unknown = sorted({int(number) for number in system.atomic_numbers} - set(known))
        if unknown:
            raise LongstrideError(
                f"this student knows the elements {list(known)}, but {system.name!r} contains atomic number {unknown[0]};"
                " distil a student for this system"
            )
        return torch.tensor([known.index(int(number)) for number in system.atomic_numbers])

    def bind(self, system: System, *, periodic: bool = False, compile: bool = False) -> AnyStudent:
        """Return the student potential of a system, on all pairs where that is faster, otherwise on neighbour lists.

        Args:
            system: the molecules.
            periodic: whether they are in a box.
            compile: compile the evaluation on neighbour lists; no effect on all pairs.

        Raises:
            LongstrideError: an element that the student was not trained on.
        """
        if not periodic and system.n_atoms <= ALL_PAIRS_ATOMS:
            return Student(self, system)
        from longstride.potentials.student_neighbours import NeighbourStudent

        return NeighbourStudent(self, system, compile=compile)

    def forward(self, system: System) -> Student:
        """Return the student potential of one small isolated molecule, for training or for dynamics.

        Raises:
            LongstrideError: the molecule has an element that the student was not trained on.
        """
        return Student(self, system)

    def per_atom(self, species: Tensor, neighbours: Tensor) -> AtomWeights:
        """Return the weights of every atom, [atom, ...], from those of its element.

        Args:
            species: [atom] index of each atom's element in `metadata.elements`.
            neighbours: [element] indices of the elements that occur; only their rows of the mixtures are returned.
        """
        first_bias, second_bias = self.first_bias[species], self.second_bias[species]
        radial = self.metadata.radial
        rows = (neighbours[:, None] * radial + torch.arange(radial)).flatten()
        mixing = tuple(weight[:, rows][species] for weight in self.mixing)
        return AtomWeights(mixing, self.first[species], first_bias, self.second[species], second_bias, self.last[species])


class Geometry(NamedTuple):
    """What the energy depends on, for centre i, replica b, neighbour j. Lengths in units of LENGTH_NM.

    Attributes:
        rho: [i, b, 3, j] vector from i to j.
        inverse_r: [i, b, j].
        monomials: [i, b, monomial, j].
        radial: [i, b, element x radial, j] radial functions, zero unless j is of that element.
        radial_slope: [i, b, radial, j] derivatives of the radial functions with respect to the distance.
    """

    rho: Tensor
    inverse_r: Tensor
    monomials: Tensor
    radial: Tensor
    radial_slope: Tensor


class Student:
    """The student potential of one molecule: `Potential` for dynamics, `forces` with gradients for training.

    Args:
        network: the weights; read when the student is made, for dynamics, and at every call of `network_forces`.
        system: the molecule.

    Raises:
        LongstrideError: an element the network does not know.
    """

    def __init__(self, network: StudentNetwork, system: System) -> None:
        species = network.species_of(system)
        self.system = system
        self.network = network
        self.name = f"student-of-{network.metadata.teacher}"
        self.dtype = network.first.dtype
        # inside, atoms are sorted by element, so that neighbours of one element are a slice
        self._order = torch.argsort(species, stable=True)
        self._original = torch.argsort(self._order)
        self._species = species[self._order]
        self._present, counts = torch.unique_consecutive(self._species, return_counts=True)
        ends = counts.cumsum(0).tolist()
        self._slices = [slice(end - count, end) for end, count in zip(ends, counts.tolist(), strict=True)]
        self._repulsion = ScreenedRepulsion(system.atomic_numbers[self._order.numpy()])
        # an inverse distance above this one means that the repulsion is not zero
        self._contact = (LENGTH_NM / self._repulsion.reach).to(self.dtype)[:, None]
        self._shift = float(network.shifts[self._species].sum())
        roots, derivative = tables()
        columns = len(self._slices) * network.metadata.radial
        self._roots = roots.to(self.dtype)[:, None].expand(-1, columns).contiguous()
        self._derivative = derivative.to(self.dtype)
        n = system.n_atoms
        self._apart = (1e6 * torch.eye(n, dtype=self.dtype))[:, None, :]  # puts an atom out of its own reach
        self._cutoff = network.metadata.cutoff_nm / LENGTH_NM
        self._waves = (torch.arange(1, network.metadata.radial + 1) * math.pi / self._cutoff).to(self.dtype)[:, None]
        with torch.no_grad():
            self._atom_weights = network.per_atom(self._species, self._present)

    def energy(self, x: State) -> Tensor:
        """Return U(x), [batch] kJ/mol float64."""
        return self.energy_forces(x)[0]

    def energy_forces(self, x: State) -> tuple[Tensor, Tensor]:
        """Return U(x), [batch] kJ/mol, and forces [batch, atom, 3] kJ/mol/nm, both float64 (evaluated in `dtype`)."""
        if x.box is not None:
            raise LongstrideError(f"{self.system.name!r} is in a box: bind its student with periodic=True")
        with torch.inference_mode():
            energy, forces = self._energy_forces(x.positions, self._atom_weights)
        return energy.clone(), forces.to(torch.float64)  # outside, so that both are ordinary tensors

    def network_forces(self, positions: Tensor, box: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return energies without shifts, [batch], and forces as functions of the network's weights, for training.

        Args:
            positions: [batch, atom, 3] nm.
            box: None; see `bind` for periodic systems.
        """
        assert box is None
        energy, forces = self._energy_forces(positions, self.network.per_atom(self._species, self._present))
        return energy - self._shift, forces

    def _energy_forces(self, positions: Tensor, weights: AtomWeights) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            geometry = self._geometry(positions[:, self._order])
            moments = (geometry.monomials @ geometry.radial.transpose(2, 3)) * self._roots
        energy, gradient = atomic_energies(moments, weights)
        pair = self._pair_forces(geometry, gradient * self._roots)
        total = ENERGY_KJ * energy.to(torch.float64).sum(dim=0) + self._shift
        if bool((geometry.inverse_r > self._contact).any()):
            repulsion, slope = self._repulsion.energy_and_slope(LENGTH_NM / geometry.inverse_r)
            total = total + repulsion.sum(dim=(0, 2))
            slope = (slope * geometry.inverse_r * (LENGTH_NM / ENERGY_KJ)).to(pair.dtype)
            pair = pair + slope[:, :, None] * geometry.rho
        # sums over neighbours [i, b, 3], less the reaction on neighbours [b, 3, j]
        forces = pair.sum(dim=3).transpose(0, 1) - pair.sum(dim=0).transpose(1, 2)
        return total, forces[:, self._original] * (ENERGY_KJ / LENGTH_NM)

    def _geometry(self, positions: Tensor) -> Geometry:
        # subtracting the centre in the given precision keeps a drifting molecule accurate in single precision
        x = ((positions - positions.mean(dim=1, keepdim=True)) / LENGTH_NM).to(self.dtype).transpose(1, 2).contiguous()
        rho = x - x.permute(2, 0, 1)[..., None]
        r2 = rho.square().sum(dim=2) + self._apart
        radial = radial_functions(r2, cutoff=self._cutoff, waves=self._waves)
        return Geometry(
            rho=rho,
            inverse_r=radial.inverse_r,
            monomials=monomials(rho),
            radial=self._by_element(radial.value),
            radial_slope=radial.slope,
        )

    def _by_element(self, radial: Tensor) -> Tensor:
        """Spread [i, b, radial, j] to [i, b, element x radial, j], zero unless j is of that element."""
        n, b, width, m = radial.shape
        result = radial.new_zeros(n, b, len(self._slices), width, m)
        for element, at in enumerate(self._slices):
            result[:, :, element, :, at] = radial[..., at]
        return result.flatten(2, 3)

    def _pair_forces(self, geometry: Geometry, gradient: Tensor) -> Tensor:
        """Return dE/drho, [i, b, 3, j]."""
        # along[element, radial, j] matters where j is of that element only
        along = (gradient.transpose(2, 3) @ geometry.monomials).split(geometry.radial_slope.shape[2], dim=2)
        chosen = torch.cat([part[..., at] for part, at in zip(along, self._slices, strict=True)], dim=3)
        slope = (chosen * geometry.radial_slope).sum(dim=2)
        across = self._derivative @ (gradient @ geometry.radial)
        across = across.unflatten(2, (3, LOWER)) * geometry.monomials[:, :, None, :LOWER]
        return torch.addcmul(across.sum(dim=3), (slope * geometry.inverse_r)[:, :, None], geometry.rho)


def save_student(path: Path, network: StudentNetwork, extra: dict[str, object] | None = None) -> None:
    """Write weights and metadata as one safetensors file, atomically.

    Args:
        path: the file.
        network: what to save.
        extra: further JSON values to keep with it, such as the accuracy reached.
    """
    arrays = {key: value.detach().cpu().numpy() for key, value in network.state_dict().items()}
    content = {"format": FORMAT, **asdict(network.metadata), "extra": extra or {}}
    write_arrays(path, arrays, {"longstride": json.dumps(content)})


def load_student(path: Path, *, teacher: str | None = None) -> StudentNetwork:
    """Read what `save_student` wrote.

    Args:
        path: the file.
        teacher: refuse a student of another teacher.

    Raises:
        DataError: not a student file, incomplete, or of another teacher.
    """
    arrays, metadata = read_arrays(path)
    content = json.loads(metadata.get("longstride", "{}"))
    if content.get("format") != FORMAT:
        raise DataError(f"{path} is not a student of this version of longstride; run the distill stage again")
    if teacher is not None and content["teacher"] != teacher:
        raise DataError(
            f"{path} was distilled from {content['teacher']}, not from {teacher}; run the distill stage with teacher: {teacher}"
        )
    names = ("elements", "teacher", "cutoff_nm", "radial", "channels", "hidden")
    values = {name: content[name] for name in names}
    network = StudentNetwork(StudentMetadata(**{**values, "elements": tuple(values["elements"])}))
    try:
        network.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in arrays.items()})
    except RuntimeError as error:
        raise DataError(f"{path} is incomplete ({str(error).splitlines()[0]}); run the distill stage again") from None
    return network
