"""A periodic restraint of one torsion, with its own centre for every replica: the bias of umbrella sampling."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longstride.errors import LongstrideError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longstride.state import State, System


class TorsionRestraint:
    """U = stiffness (1 - cos(phi - centre)), smooth on the circle; near the centre a spring of that constant per rad^2.

    Bound to a batch: replica b is held at centre b, so states must have as many replicas as there are centres.

    Attributes:
        system: the molecule.
        name: label of the potential.
        atoms: the four atoms of the torsion.
        centers: [batch] rad.
        stiffness: kJ/mol.
    """

    def __init__(
        self, system: System, *, atoms: Sequence[int], centers: Tensor, stiffness: float, name: str = "torsion-restraint"
    ) -> None:
        """Bind the restraint to four atoms.

        Raises:
            LongstrideError: there are not four different atoms of the molecule.
        """
        if len(set(atoms)) != 4 or not all(0 <= atom < system.n_atoms for atom in atoms):
            raise LongstrideError(f"a torsion needs four different atoms of {system.name!r}, not {list(atoms)}")
        self.system, self.name, self.atoms = system, name, tuple(int(atom) for atom in atoms)
        self.centers, self.stiffness = centers, stiffness

    def angle(self, x: State) -> Tensor:
        """Return the torsion, [batch] rad in (-pi, pi] (IUPAC sign)."""
        return _torsion(x.positions[:, list(self.atoms)])[0]

    def energy(self, x: State) -> Tensor:
        """Return U(x), [batch] kJ/mol."""
        return self.bias(self.angle(x), self._centers(x))

    def energy_forces(self, x: State) -> tuple[Tensor, Tensor]:
        """Return U(x), [batch] kJ/mol, and F, [batch, atom, 3] kJ/mol/nm."""
        phi, gradient = _torsion(x.positions[:, list(self.atoms)])
        centers = self._centers(x)
        forces = torch.zeros_like(x.positions)
        forces[:, list(self.atoms)] = -self.stiffness * (phi - centers).sin()[:, None, None] * gradient
        return self.bias(phi, centers), forces

    def bias(self, phi: Tensor, centers: Tensor) -> Tensor:
        """Return U at torsions and centres of any shapes that broadcast, rad, in kJ/mol."""
        return self.stiffness * (1 - (phi - centers).cos())

    def _centers(self, x: State) -> Tensor:
        if len(x.positions) != len(self.centers):
            raise LongstrideError(f"{self.name} holds {len(self.centers)} replicas, not {len(x.positions)}")
        return self.centers.to(x.positions)


def _torsion(quartet: Tensor) -> tuple[Tensor, Tensor]:
    """Return the torsion [batch] and its gradient [batch, 4, 3] of positions [batch, 4, 3].

    The gradient is that of doi:10.1002/(SICI)1096-987X(19960715)17:9<1132::AID-JCC5>3.0.CO;2-T, which has no
    singularity at 0 and pi.
    """
    f, g, h = quartet[:, 0] - quartet[:, 1], quartet[:, 1] - quartet[:, 2], quartet[:, 3] - quartet[:, 2]
    a, b = torch.linalg.cross(f, g), torch.linalg.cross(h, g)
    length = g.norm(dim=-1, keepdim=True)
    sine = (torch.linalg.cross(b, a) * g).sum(-1) / length[:, 0]
    phi = torch.atan2(sine, (a * b).sum(-1))
    from_a, from_b = a / a.square().sum(-1, keepdim=True), b / b.square().sum(-1, keepdim=True)
    middle = (f * g).sum(-1, keepdim=True) / length * from_a - (h * g).sum(-1, keepdim=True) / length * from_b
    first, last = -length * from_a, length * from_b
    return phi, torch.stack([first, middle - first, -middle - last, last], dim=1)
