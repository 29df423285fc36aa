"""Conditional density of the stiff coordinates that the force field itself provides, with nothing to train.

Given the free torsions t, the stiff coordinates s (bonds, angles, sibling offsets, ring closures) fluctuate by a few
hundredths about a minimum of V(s, t) = U/kT - log(volume), nearly as a Gaussian:

    q(s | t) = N(s; m(t), C(t)),   m(t) = m1(t) - C(t) g(m1(t), t),   m1(t) = m0(t) - C(t) g(m0(t), t),   g = dV/ds

m0(t), the minimum, and C(t), the inverse Hessian there, are smooth functions of the torsions. `calibrate` finds a first form
of them, constants, from a few relaxed torsion states; `refine` fits both to the minima and Hessians of some hundred torsion
states near thermal equilibrium, linearly in low harmonics of the torsions. Both happen once per molecule. m(t) is two
Newton steps from m0(t), two gradients of the potential: the force field says how each torsion state strains bonds and angles.
So the density fits molecules that no network has seen, near and far contacts included. Steps are bounded in standard
deviations, so that overlapping atoms, whose gradients mean nothing, give a poor proposal and no overflow. The Hessian is
that of the target itself (Laplace's approximation; Tierney and Kadane 1986, doi:10.1080/01621459.1986.10478240).

Domain: as in `longstride.flows.internal`; a draw outside has log q = NaN and must be rejected.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
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
NEWTON_STEPS = 2  # where side chains meet, the second one repairs what the fitted minimum misses
# bound of a proposal's Newton step in each whitened direction, standard deviations: where charged groups touch, the Hessian of
# the fit says little and a longer step leaves the state it should describe (redraws accepted for CH: 4 48 %, 1.5 53 %)
LARGEST_STEP = 1.5
_LARGEST_RELAXING = 4.0  # the same while states are relaxed with Hessians of their own
_CANDIDATES, _KEPT = 256, 16  # torsion states tried and relaxed to find c and C
_STEPS = (1e-4, 1e-3)  # of finite differences: nm, radian
_SOFTEST = 5.0  # smallest eigenvalue kept of a Hessian, in kT per squared unit
_RELAX_CLIP = 3.0
_WALK, _SNAPSHOTS = 90, 3  # steps of the walks that find torsion states to fit to, and states kept of each
_REFINE_STEPS = 6
_STIFFEST = 30.0  # largest ratio of a Hessian to the common one
_SOFTEST_RATIO = 0.05  # and smallest
_FEWEST = 0.5  # share of the states that must relax
_RIDGES = (0.01, 0.1, 0.5, 3.0, 1e6)  # dampings to choose from; the last one leaves the constant
_FOLD = 5  # every fifth state judges them
_RELAXED = 1.0  # largest Newton step of a relaxed state, root mean square in standard deviations
_VARYING = 0.2  # share of the entries of M that follow the torsions


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
        """Return d2V/ds2 of each configuration by forward differences, [batch, stiff, stiff]; one gradient per coordinate."""
        n = self.zmatrix.n_atoms
        steps = torch.full((self.n_stiff,), _STEPS[1], dtype=torch.float64)
        steps[: n - 1] = _STEPS[0]
        steps[torch.arange(n - 1, self.n_plain)[torch.from_numpy(~self.zmatrix.angular)]] = _STEPS[0]
        rows = []
        for torsions, stiff in zip(t, s, strict=True):
            moved = torch.cat([stiff[None], stiff + torch.diag(steps)])
            slopes = self.gradient(torsions.expand(len(moved), -1), moved)
            rows.append((slopes[1:] - slopes[0]) / steps[:, None])
        found = torch.stack(rows)
        return (found + found.transpose(1, 2)) / 2


@dataclass(frozen=True, kw_only=True)
class TorsionBasis:
    """Smooth functions of the torsions: 1, cos and sin of each and of its double, and products for neighbouring torsions.

    Attributes:
        pairs: [2, pair] int64, torsions whose axes share an atom.
    """

    pairs: Tensor

    @classmethod
    def of(cls, zmatrix: ZMatrix) -> TorsionBasis:
        """Return the basis of a molecule's free torsions."""
        axes = [set(row[1:3]) for row in zmatrix.rows[zmatrix.free + 3].tolist()]
        pairs = [(i, j) for i in range(len(axes)) for j in range(i) if axes[i] & axes[j]]
        return cls(pairs=torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T)

    def __call__(self, t: Tensor) -> Tensor:
        """Return the functions at torsions t [batch, torsion], [batch, function]."""
        first, second = t[:, self.pairs[0]], t[:, self.pairs[1]]
        products = [f(first) * g(second) for f in (torch.cos, torch.sin) for g in (torch.cos, torch.sin)]
        return torch.cat([torch.ones_like(t[:, :1]), t.cos(), t.sin(), (2 * t).cos(), (2 * t).sin(), *products], -1)


@dataclass(frozen=True, kw_only=True)
class Response:
    """Values [value] that follow the torsions, linear in a `TorsionBasis` and kept within what was seen.

    Attributes:
        coefficients: [function, value].
        smallest: [value].
        largest: [value].
    """

    coefficients: Tensor
    smallest: Tensor
    largest: Tensor

    @classmethod
    def fit(cls, functions: Tensor, values: Tensor) -> Response:
        """Fit values [state, value] at functions [state, function] by ridge regression; the constant is not damped.

        The damping is the one that predicts every fifth state best from the others. Without an end it leaves the constant.
        """
        held = torch.arange(len(functions)) % _FOLD == 0
        errors = [
            (functions[held] @ _ridge(functions[~held], values[~held], damping) - values[held]).square().sum().item()
            for damping in _RIDGES
        ]
        coefficients = _ridge(functions, values, _RIDGES[int(np.argmin(errors))])
        return cls(coefficients=coefficients, smallest=values.amin(0), largest=values.amax(0))

    def __call__(self, functions: Tensor) -> Tensor:
        """Return the values, [batch, value]."""
        return torch.maximum(torch.minimum(functions @ self.coefficients, self.largest), self.smallest)


def _ridge(functions: Tensor, values: Tensor, damping: float) -> Tensor:
    """Return the coefficients [function, value]; `damping` is per state, in units of the functions' squares."""
    penalty = torch.full((functions.shape[1],), damping * len(functions), dtype=functions.dtype)
    penalty[0] = 0.0
    return torch.linalg.solve(functions.T @ functions + torch.diag(penalty), functions.T @ values)


@dataclass(frozen=True, kw_only=True)
class Conditional:
    """q(s | t) at given torsions, in whitened coordinates u = L^-1 (s - c): u = mean + M^-T z, z normal.

    Attributes:
        mean: [batch, stiff].
        factor: [batch or 1, stiff, stiff] M, the Cholesky factor of the precision of u.
    """

    mean: Tensor
    factor: Tensor


@dataclass(frozen=True, kw_only=True)
class ForceFieldGaussian:
    """q(s | t) of one molecule: s = c + L u with the minimum and the precision M M^T of u as functions of t.

    Attributes:
        target: the molecule's density.
        centre: [stiff] c.
        lower: [stiff, stiff] L, Cholesky factor of the common covariance.
        factor: [stiff, stiff] common part of M, its diagonal as logarithms.
        basis: functions of the torsions; None where m0 and C are constants.
        minimum: u at the minimum.
        entries: [2, entry] row and column of what varies of M.
        varying: what varies of M, the diagonal as logarithms.
    """

    target: InternalTarget
    centre: Tensor
    lower: Tensor
    factor: Tensor
    basis: TorsionBasis | None = None
    minimum: Response | None = None
    entries: Tensor | None = None
    varying: Response | None = None

    def at(self, t: Tensor) -> Conditional:
        """Return q(s | t) at torsions t [batch, torsion]; two gradients of the potential."""
        common = self.factor.tril(-1) + self.factor.diagonal().exp().diag()
        factor, u = common[None], t.new_zeros(len(t), len(self.centre))
        if self.basis is not None and self.minimum is not None and self.varying is not None and self.entries is not None:
            functions = self.basis(t)
            u = self.minimum(functions)
            row, column = self.entries
            varying = self.varying(functions)
            # in place: this is most of the memory traffic of a proposal
            factor = common.repeat(len(t), 1, 1)
            factor[:, row, column] = torch.where(row == column, varying.exp(), varying)
        for _ in range(NEWTON_STEPS):
            slope = self.target.gradient(t, self._unwhitened(u)) @ self.lower
            step = torch.linalg.solve_triangular(factor, slope[..., None], upper=False)
            u = u - _from_unit(factor, LARGEST_STEP * torch.tanh(step / LARGEST_STEP))
        return Conditional(mean=u, factor=factor)

    def mean(self, t: Tensor) -> Tensor:
        """Return m(t), [batch, stiff]."""
        return self._unwhitened(self.at(t).mean)

    def from_latent(self, z: Tensor, conditional: Conditional) -> tuple[Tensor, Tensor]:
        """Return s [batch, stiff] of latent values z [batch, stiff], and log q(s | t), [batch]."""
        u = conditional.mean + _from_unit(conditional.factor, z[..., None])
        return self._unwhitened(u), self._log_q(z, conditional)

    def to_latent(self, s: Tensor, conditional: Conditional) -> tuple[Tensor, Tensor]:
        """Return z [batch, stiff] of stiff coordinates s, and log q(s | t), [batch]."""
        difference = self.target.difference(s, self._unwhitened(conditional.mean))
        u = torch.linalg.solve_triangular(self.lower, difference.T, upper=False).T
        z = (conditional.factor.mT @ u[..., None])[..., 0]
        return z, self._log_q(z, conditional)

    def _unwhitened(self, u: Tensor) -> Tensor:
        return self.centre + u @ self.lower.T

    def _log_q(self, z: Tensor, conditional: Conditional) -> Tensor:
        log_scale = conditional.factor.diagonal(dim1=1, dim2=2).log().sum(-1) - self.lower.diagonal().log().sum()
        return -0.5 * z.square().sum(-1) + log_scale - 0.5 * z.shape[-1] * math.log(TWO_PI)


def _from_unit(factor: Tensor, z: Tensor) -> Tensor:
    """Return M^-T z for columns z [batch, stiff, 1], [batch, stiff]."""
    return torch.linalg.solve_triangular(factor.mT, z, upper=True)[..., 0]


def calibrate(
    zmatrix: ZMatrix, potential: Potential, *, reference: np.ndarray, kT: float, seed: int = 0
) -> tuple[ForceFieldGaussian, Tensor]:
    """Find the first form of q(s | t) for a molecule, with constants m0 and C, and torsion states of low energy.

    Random torsions are relaxed in s with the Hessian of the reference structure; m0 and C are the mean minimum and the
    inverse mean Hessian of the best ones, relaxed further. Torsions that are narrow by nature (amide bonds, puckers) stay
    near the reference.

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
    lower = torch.linalg.cholesky(covariance)
    gaussian = ForceFieldGaussian(target=target, centre=centre, lower=lower, factor=torch.zeros_like(lower))
    return gaussian, target.place(t, s)[0]


def refine(gaussian: ForceFieldGaussian, states: Tensor, *, count: int = 300, seed: int = 0) -> ForceFieldGaussian:
    """Return q(s | t) whose minimum and covariance follow the torsions; some hundred thousand gradients of the potential.

    Args:
        gaussian: the first form, of `calibrate`.
        states: [state, atom, 3] nm, relaxed torsion states.
        count: torsion states to fit to.
        seed: of these states.

    Raises:
        NumericsError: too few states relax.
    """
    target = gaussian.target
    t = _thermal_torsions(gaussian, target.split(states)[0], count, seed)
    s = _relax(target, t, gaussian.mean(t), gaussian.lower @ gaussian.lower.T, steps=_REFINE_STEPS)
    whitened = gaussian.lower.T @ target.hessian(t, s) @ gaussian.lower
    values = torch.linalg.eigvalsh(whitened)
    # states that did not relax, or with clashes that no proposal should follow
    usable = target.log_density(t, s).isfinite() & (values[:, 0] > -_STIFFEST) & (values[:, -1] < _STIFFEST)
    _enough(target, int(usable.sum()), count)
    t, s, whitened = t[usable], s[usable], whitened[usable]
    values, vectors = torch.linalg.eigh(whitened)
    values = values.clamp(min=_SOFTEST_RATIO)
    factor = torch.linalg.cholesky((vectors * values[:, None]) @ vectors.mT)
    # the relaxation used one common Hessian; finish with each state's own
    for _ in range(3):
        slope = (target.gradient(t, s) @ gaussian.lower)[..., None]
        step = torch.linalg.solve_triangular(factor, slope, upper=False)
        bounded = _LARGEST_RELAXING * torch.tanh(step / _LARGEST_RELAXING)
        s = s - _from_unit(factor, bounded) @ gaussian.lower.T
    relaxed = step[..., 0].square().mean(-1).sqrt() < _RELAXED
    _enough(target, int(relaxed.sum()), count)
    return _fitted(gaussian, t[relaxed], s[relaxed], factor[relaxed])


def _enough(target: InternalTarget, found: int, count: int) -> None:
    if found < _FEWEST * count:
        raise NumericsError(
            f"too few torsion states of {target.potential.system.name!r} relax ({found} of {count}); check its structure"
        )


def _fitted(gaussian: ForceFieldGaussian, t: Tensor, s: Tensor, factor: Tensor) -> ForceFieldGaussian:
    """Fit the minima s [state, stiff] and the factors M [state, stiff, stiff]."""
    basis = TorsionBasis.of(gaussian.target.zmatrix)
    functions = basis(t)
    difference = gaussian.target.difference(s, gaussian.centre)
    u = torch.linalg.solve_triangular(gaussian.lower, difference.T, upper=False).T
    raw = factor.tril(-1) + torch.diag_embed(factor.diagonal(dim1=1, dim2=2).log())
    # most entries hardly move: those that carry least stay constant
    spread = raw.std(0).tril()
    kept = spread.flatten().argsort(descending=True)[: max(1, round(_VARYING * spread.numel() / 2))]
    entries = torch.stack([kept // len(spread), kept % len(spread)])
    varying = Response.fit(functions, raw[:, entries[0], entries[1]])
    return replace(
        gaussian,
        factor=raw.mean(0),
        basis=basis,
        minimum=Response.fit(functions, u),
        entries=entries,
        varying=varying,
    )


def _thermal_torsions(gaussian: ForceFieldGaussian, t: Tensor, count: int, seed: int) -> Tensor:
    """Return torsion states near thermal equilibrium, [count, torsion]: Metropolis walks on the density at m(t).

    One or two torsions turn at a time. The walks need not be exact, only typical.
    """
    generator = torch.Generator().manual_seed(seed)
    target = gaussian.target

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    t = t[torch.arange(count // _SNAPSHOTS + 1) % len(t)]
    value = target.log_density(t, gaussian.mean(t))
    kept = []
    for step in range(1, _WALK + 1):
        turn = torch.zeros_like(t)
        for _ in range(2):
            size = torch.where(uniform(len(t)) < 0.5, 2 * math.pi * uniform(len(t)), (uniform(len(t)) - 0.5))
            chosen = torch.randint(t.shape[1], (len(t), 1), generator=generator)
            turn.scatter_add_(1, chosen, torch.where(uniform(len(t)) < 0.7, size, 0.0)[:, None])
        moved = wrap(t + turn)
        there = target.log_density(moved, gaussian.mean(moved))
        accepted = uniform(len(t)).log() < there - value
        t, value = torch.where(accepted[:, None], moved, t), torch.where(accepted, there, value)
        if step % (_WALK // _SNAPSHOTS) == 0:
            kept.append(t)
    return torch.cat(kept)[:count]


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
