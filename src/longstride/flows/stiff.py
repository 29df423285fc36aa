"""Conditional density of the stiff coordinates that the force field itself provides, with nothing to train.

Given the free torsions t, the stiff coordinates s (bonds, angles, sibling offsets, ring closures) fluctuate by a few
hundredths about a minimum of V(s, t) = U/kT - log(volume), nearly as a Gaussian:

    q(s | t) = N(s; m(t), C),   m(t) = c - C g(t),   g(t) = dV/ds at (c, t)

c and C are the mean minimum and the inverse mean Hessian of V over a few relaxed torsion states of the molecule, found
once. m(t) is one Newton step towards the minimum for these torsions, one gradient of the potential: the force field says how
each torsion state strains bonds and angles. So the density fits molecules that no network has seen, near and far
contacts included. The step is bounded in standard deviations, so that overlapping atoms, whose gradients mean nothing,
give a poor proposal and no overflow. The Hessian is that of the target itself (Laplace's approximation; Tierney and
Kadane 1986, doi:10.1080/01621459.1986.10478240).

Domain: as in `longstride.flows.internal`; a draw outside has log q = NaN and must be rejected.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from longstride.errors import NumericsError
from longstride.flows.zmatrix import TWO_PI, Internals, ZMatrix, wrap
from longstride.state import State
from longstride.systems import neighbours

if TYPE_CHECKING:
    from torch import Tensor

    from longstride.potentials.base import Potential
    from longstride.state import System

CHIRAL_SINE = 0.5  # offsets with a larger |sin| belong to tetrahedral atoms, where the sign is the handedness
LARGEST_STEP = 4.0  # bound of the Newton step, standard deviations
_CANDIDATES, _KEPT = 256, 16  # torsion states tried and relaxed to find c and C
_STEPS = (1e-4, 1e-3)  # of finite differences: nm, radian
_SOFTEST = 5.0  # smallest eigenvalue kept of a Hessian, in kT per squared unit
_RELAX_CLIP = 3.0


@dataclass(frozen=True, kw_only=True)
class InternalTarget:
    """A molecule's Boltzmann density in internal coordinates, split into free torsions t and stiff coordinates s.

    Attributes:
        zmatrix: the coordinates.
        potential: U.
        kT: thermal energy, kJ/mol.
        handed: [offset] radian, offsets of a reference structure; their signs define the handedness of the domain.
    """

    zmatrix: ZMatrix
    potential: Potential
    kT: float
    handed: Tensor

    @property
    def n_torsions(self) -> int:
        """Number of free torsions."""
        return len(self.zmatrix.free)

    @property
    def n_plain(self) -> int:
        """Number of stiff coordinates that are not angles on a circle; they come first in s."""
        return 2 * self.zmatrix.n_atoms - 3

    @property
    def n_stiff(self) -> int:
        """Number of stiff coordinates."""
        return self.n_plain + len(self.zmatrix.offsets)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return t [batch, torsion] and s [batch, stiff] of positions [batch, atom, 3] nm, float64."""
        internals = self.zmatrix.from_cartesian(x.double())
        offsets = internals.dihedrals[:, torch.from_numpy(self.zmatrix.offsets)]
        t = internals.dihedrals[:, torch.from_numpy(self.zmatrix.free)]
        return t, torch.cat([internals.bonds, internals.angles, offsets], -1)

    def internals(self, t: Tensor, s: Tensor) -> Internals:
        """Return the internal coordinates of t and s."""
        n = self.zmatrix.n_atoms
        bonds, angles, offsets = s.split([n - 1, n - 2, len(self.zmatrix.offsets)], dim=-1)
        dihedrals = s.new_zeros(len(s), n - 3).index_copy(1, torch.from_numpy(self.zmatrix.free), t.to(s.dtype))
        dihedrals = dihedrals.index_copy(1, torch.from_numpy(self.zmatrix.offsets), wrap(offsets))
        return Internals(bonds=bonds, angles=angles, dihedrals=dihedrals)

    def place(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return positions [batch, atom, 3] in the canonical frame and the log of the volume factor [batch]."""
        internals = self.internals(t, s)
        x = self.zmatrix.to_cartesian(internals)
        return x, self.zmatrix.log_measure(internals, x)

    def difference(self, s: Tensor, reference: Tensor) -> Tensor:
        """Return s - reference, offsets the short way round."""
        plain, circular = (s - reference).split([self.n_plain, len(self.zmatrix.offsets)], dim=-1)
        return torch.cat([plain, wrap(circular)], -1)

    def contains(self, s: Tensor) -> Tensor:
        """Return whether stiff coordinates lie in the domain, [batch] bool."""
        n = self.zmatrix.n_atoms
        bonds, angles, offsets = s.split([n - 1, n - 2, len(self.zmatrix.offsets)], dim=-1)
        angular = torch.from_numpy(self.zmatrix.angular)
        near = wrap(offsets - self.handed).abs() < math.pi / 2
        same_side = (offsets.sin() * self.handed.sin() > 0) | (self.handed.sin().abs() < CHIRAL_SINE)
        inside = (bonds > 0).all(-1) & (angles > 0).all(-1) & (angles[:, angular] < math.pi).all(-1)
        return inside & (near & same_side).all(-1)

    @torch.no_grad()
    def log_density(self, t: Tensor, s: Tensor) -> Tensor:
        """Return -V = log volume - U/kT, [batch]; -inf outside the domain and where atoms overlap."""
        x, log_measure = self.place(t, s)
        value = log_measure - self.potential.energy(State(positions=x)).double() / self.kT
        return torch.where(value.isfinite() & self.contains(s), value, -torch.inf)

    def gradient(self, t: Tensor, s: Tensor) -> Tensor:
        """Return dV/ds, [batch, stiff]; zero where it is not a number."""
        with torch.enable_grad():
            s = s.detach().requires_grad_()
            x, log_measure = self.place(t, s)
            _, forces = self.potential.energy_forces(State(positions=x.detach()))
            outputs = (-forces.double() / self.kT, -torch.ones_like(log_measure))
            (gradient,) = torch.autograd.grad((x, log_measure), s, outputs)
        return gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def hessian(self, t: Tensor, s: Tensor) -> Tensor:
        """Return d2V/ds2 of each configuration by central differences, [batch, stiff, stiff]."""
        n = self.zmatrix.n_atoms
        steps = torch.full((self.n_stiff,), _STEPS[1], dtype=torch.float64)
        steps[: n - 1] = _STEPS[0]
        steps[torch.arange(n - 1, self.n_plain)[torch.from_numpy(~self.zmatrix.angular)]] = _STEPS[0]
        rows = []
        for torsions, stiff in zip(t, s, strict=True):
            moved = torch.cat([stiff + torch.diag(steps), stiff - torch.diag(steps)])
            plus, minus = self.gradient(torsions.expand(len(moved), -1), moved).chunk(2)
            rows.append((plus - minus) / (2 * steps[:, None]))
        found = torch.stack(rows)
        return (found + found.transpose(1, 2)) / 2


@dataclass(frozen=True, kw_only=True)
class ForceFieldGaussian:
    """q(s | t) of one molecule.

    Attributes:
        target: the molecule's density.
        centre: [stiff] c.
        lower: [stiff, stiff] Cholesky factor of C.
    """

    target: InternalTarget
    centre: Tensor
    lower: Tensor

    def mean(self, t: Tensor) -> Tensor:
        """Return m(t), [batch, stiff]; one gradient of the potential."""
        s = self.centre.expand(len(t), -1)
        step = self.target.gradient(t, s) @ self.lower
        return s - (LARGEST_STEP * torch.tanh(step / LARGEST_STEP)) @ self.lower.T

    def from_latent(self, z: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Return s = m + L z and log q(s | t), [batch]."""
        return mean + z @ self.lower.T, self._log_q(z)

    def to_latent(self, s: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Return z = L^-1 (s - m) and log q(s | t), [batch]."""
        difference = self.target.difference(s, mean)
        z = torch.linalg.solve_triangular(self.lower, difference.T, upper=False).T
        return z, self._log_q(z)

    def _log_q(self, z: Tensor) -> Tensor:
        return -0.5 * z.square().sum(-1) - self.lower.diagonal().log().sum() - 0.5 * z.shape[-1] * math.log(TWO_PI)


def calibrate(
    zmatrix: ZMatrix, potential: Potential, *, reference: np.ndarray, kT: float, seed: int = 0
) -> tuple[ForceFieldGaussian, Tensor]:
    """Find c and C for a molecule, and torsion states of low energy.

    Random torsions are relaxed in s with the Hessian of the reference structure; c and C come from the best ones, relaxed
    further. Torsions that are narrow by nature (amide bonds, puckers) stay near the reference.

    Args:
        zmatrix: internal coordinates.
        potential: the target; its molecule's.
        reference: [atom, 3] nm, a minimised structure of the right handedness.
        kT: thermal energy, kJ/mol.
        seed: of the torsion states.

    Returns:
        The density, and the relaxed states as positions [state, atom, 3] nm, the lowest energy first.

    Raises:
        NumericsError: too few states have a finite energy.
    """
    x = torch.from_numpy(reference).double()[None]
    internals = zmatrix.from_cartesian(x)
    target = InternalTarget(
        zmatrix=zmatrix, potential=potential, kT=kT, handed=internals.dihedrals[0, torch.from_numpy(zmatrix.offsets)]
    )
    t_ref, s_ref = target.split(x)
    covariance = _covariance(target.hessian(t_ref, s_ref)[0])
    t = _torsion_states(target, t_ref, torch.linalg.cholesky(covariance), seed)
    s = _relax(target, t, s_ref.expand(len(t), -1), covariance, steps=12)
    value = target.log_density(t, s)
    best = value.argsort(descending=True)[:_KEPT]
    if not bool(value[best].isfinite().all()):
        raise NumericsError(
            f"too few torsion states of {potential.system.name!r} relax to a finite energy; check its structure"
        )
    t, s = t[best], s[best]
    for _ in range(2):
        covariance = _covariance(target.hessian(t, s).mean(0))
        s = _relax(target, t, s, covariance, steps=4)
    centre = s_ref[0] + target.difference(s, s_ref).mean(0)
    gaussian = ForceFieldGaussian(target=target, centre=centre, lower=torch.linalg.cholesky(covariance))
    return gaussian, target.place(t, s)[0]


def _covariance(hessian: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(hessian)
    return (vectors / values.clamp(min=_SOFTEST)) @ vectors.T


def _torsion_states(target: InternalTarget, t_ref: Tensor, lower: Tensor, seed: int) -> Tensor:
    """Return torsion states [candidate, torsion]: uniform, but near the reference where torsions are narrow by nature."""
    generator = torch.Generator().manual_seed(seed)
    uniform = (torch.rand(_CANDIDATES, target.n_torsions, generator=generator, dtype=torch.float64) * 2 - 1) * math.pi
    near = t_ref + 0.15 * torch.randn(uniform.shape, generator=generator, dtype=torch.float64)
    narrow = torch.from_numpy(narrow_torsions(target.zmatrix, target.potential.system))
    return torch.where(narrow, near, uniform)


def narrow_torsions(zmatrix: ZMatrix, system: System) -> np.ndarray:
    """Return which free torsions stay near planar or near a pucker, [torsion] bool: bonds of flat atoms, and rings."""
    bonded = neighbours(system)
    tetrahedral = 4
    found = []
    for number in (zmatrix.free + 3).tolist():
        _, parent, angle, _ = zmatrix.rows[number].tolist()
        flat = max(len(bonded[parent]), len(bonded[angle])) < tetrahedral
        found.append(flat or number in zmatrix.closures or _same_ring(bonded, parent, angle))
    return np.array(found)


def _same_ring(bonded: list[list[int]], first: int, second: int) -> bool:
    """Whether the bond first-second is part of a ring: a path leads back without it."""
    seen, todo = {first}, [first]
    while todo:
        atom = todo.pop()
        for other in bonded[atom]:
            if {atom, other} != {first, second} and other not in seen:
                seen.add(other)
                todo.append(other)
    return second in seen


def _relax(target: InternalTarget, t: Tensor, s: Tensor, covariance: Tensor, *, steps: int) -> Tensor:
    """Return s after clipped Newton steps with one common Hessian."""
    lower = torch.linalg.cholesky(covariance)
    for _ in range(steps):
        step = target.gradient(t, s) @ lower
        length = step.norm(dim=-1, keepdim=True)
        s = s - (step * (_RELAX_CLIP / length.clamp(min=_RELAX_CLIP))) @ lower.T
    return s
