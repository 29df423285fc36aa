"""The terms of an AMBER-type energy as torch modules.

Inside this module positions have the shape [3, atom, batch]: with the batch last, every gather copies whole rows,
every sum over pairs runs along contiguous lanes, and the compiler vectorises over the batch. Parameters carry a
trailing axis of length one to match. Lengths nm, energies kJ/mol.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from longstride.potentials.amber_parameters import (
        AmberParameters,
        AngleParameters,
        BondParameters,
        MapParameters,
        NonbondedParameters,
        TorsionParameters,
    )
    from longstride.potentials.born_parameters import BornParameters

Vector = tuple[Tensor, Tensor, Tensor]

HARMONICS = 5  # fewest rows of a table of torsion coefficients; AMBER uses periodicities up to 4


def _dot(a: Vector, b: Vector) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _cross(a: Vector, b: Vector) -> Vector:
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


def _between(x: Tensor, head: Tensor, tail: Tensor) -> Vector:
    """x[head] - x[tail] by component, each [row, batch]."""
    return x[0, head] - x[0, tail], x[1, head] - x[1, tail], x[2, head] - x[2, tail]


class _Term(nn.Module):
    """A module whose arrays become buffers: real ones get a trailing batch axis, indices do not."""

    def __init__(self, **arrays: np.ndarray) -> None:
        super().__init__()
        for name, array in arrays.items():
            value = torch.from_numpy(np.array(array))  # a copy: parameters are often read-only views
            self.register_buffer(name, value.unsqueeze(-1) if value.is_floating_point() else value.contiguous())


class Bonds(_Term):
    """Harmonic bonds, E = sum k/2 (r - length)^2."""

    atoms: Tensor
    length: Tensor
    half_k: Tensor

    def __init__(self, p: BondParameters) -> None:
        super().__init__(atoms=p.atoms.T, length=p.length, half_k=p.k / 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return E [batch] of x [3, atom, batch]."""
        arm = _between(x, self.atoms[0], self.atoms[1])
        stretch = torch.sqrt(_dot(arm, arm)) - self.length
        return (self.half_k * stretch * stretch).sum(0)


class Angles(_Term):
    """Harmonic angles, E = sum k/2 (theta - angle)^2."""

    atoms: Tensor
    angle: Tensor
    half_k: Tensor

    def __init__(self, p: AngleParameters) -> None:
        super().__init__(atoms=p.atoms.T, angle=p.angle, half_k=p.k / 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return E [batch] of x [3, atom, batch]."""
        left, right = _between(x, self.atoms[0], self.atoms[1]), _between(x, self.atoms[2], self.atoms[1])
        cosine = _dot(left, right) * torch.rsqrt(_dot(left, left) * _dot(right, right))
        bend = torch.acos(cosine.clamp(-1, 1)) - self.angle
        return (self.half_k * bend * bend).sum(0)


def _torsion_frame(x: Tensor, atoms: Tensor) -> tuple[Vector, Vector, Vector, Vector]:
    """Return a = x0-x1, b = x2-x1, and the normals m = a x b, n = (x3-x2) x b of torsions atoms [4, row]."""
    a, b = _between(x, atoms[0], atoms[1]), _between(x, atoms[2], atoms[1])
    return a, b, _cross(a, b), _cross(_between(x, atoms[3], atoms[2]), b)


class Torsions(_Term):
    """Fourier series in torsion angles, E = sum_n C_n cos(n phi) + S_n sin(n phi), without ever computing phi.

    cos(n phi) and sin(n phi) are Chebyshev polynomials of cos(phi) (times sin(phi)), which costs no inverse
    trigonometric function and has no branch cut.
    """

    atoms: Tensor
    cosine: Tensor
    sine: Tensor

    def __init__(self, p: TorsionParameters) -> None:
        # molecules differ in their highest harmonic; with the same number of rows they share compiled code
        missing = ((0, max(0, HARMONICS - p.cosine.shape[1])), (0, 0))
        super().__init__(atoms=p.atoms.T, cosine=np.pad(p.cosine.T, missing), sine=np.pad(p.sine.T, missing))
        self.odd, self.rows = bool(np.any(p.sine)), len(self.cosine)

    def forward(self, x: Tensor) -> Tensor:
        """Return E [batch] of x [3, atom, batch]."""
        _, b, m, n = _torsion_frame(x, self.atoms)
        scale = torch.rsqrt(_dot(m, m) * _dot(n, n))
        c = _dot(m, n) * scale
        energy = self.cosine[0] + self.cosine[1] * c
        before, now = torch.ones_like(c), c
        for k in range(2, self.rows):
            before, now = now, 2 * c * now - before
            energy = energy + self.cosine[k] * now
        if self.odd:
            energy = energy + self._sine_series(_dot(_cross(m, n), b) * scale * torch.rsqrt(_dot(b, b)), c)
        return energy.sum(0)

    def _sine_series(self, s: Tensor, c: Tensor) -> Tensor:
        before, now = torch.zeros_like(s), s
        energy = self.sine[1] * now
        for k in range(2, self.rows):
            before, now = now, 2 * c * now - before
            energy = energy + self.sine[k] * now
        return energy


class TorsionMaps(_Term):
    """Correction maps (CMAP): a bicubic surface over two torsions."""

    first: Tensor
    second: Tensor
    index: Tensor
    patches: Tensor

    def __init__(self, p: MapParameters) -> None:
        super().__init__(first=p.first.T, second=p.second.T, index=p.index[:, None], patches=p.patches)
        self.size = p.patches.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """Return E [batch] of x [3, atom, batch]."""
        (i, u), (j, v) = self._locate(x, self.first), self._locate(x, self.second)
        patch = self.patches[..., 0][self.index, i, j]  # [term, batch, 4, 4]
        powers_u = torch.stack([torch.ones_like(u), u, u * u, u * u * u], dim=-1)
        powers_v = torch.stack([torch.ones_like(v), v, v * v, v * v * v], dim=-1)
        return (patch * powers_u[..., :, None] * powers_v[..., None, :]).sum((0, 2, 3))

    def _locate(self, x: Tensor, atoms: Tensor) -> tuple[Tensor, Tensor]:
        """Return the patch number and the distance into it in radians, each [term, batch]."""
        _, b, m, n = _torsion_frame(x, atoms)
        angle = torch.atan2(_dot(_cross(m, n), b) * torch.rsqrt(_dot(b, b)), _dot(m, n))
        angle = torch.where(angle < 0, angle + 2 * torch.pi, angle)
        width = 2 * torch.pi / self.size
        # the index of a NaN angle is clamped into the table, and the distance keeps the NaN
        index = (angle.detach() / width).nan_to_num(0.0).long().clamp(0, self.size - 1)
        return index, angle - index * width


class BornRadii(_Term):
    """Effective Born radii B from pairwise descreening integrals (formulas: `born_parameters.BornParameters`)."""

    radius: Tensor
    scaled: Tensor
    rho: Tensor
    other: Tensor
    same: Tensor
    series: Tensor
    d0: Tensor
    m0: Tensor
    reach: Tensor

    def __init__(self, p: BornParameters) -> None:
        count = len(p.radius)
        arrays = {"radius": p.radius, "scaled": p.scaled, "rho": p.rho, "other": 1.0 - np.eye(count), "same": np.eye(count)}
        if p.series is not None:
            arrays["series"] = p.series.T
        if p.neck is not None:
            arrays |= {"d0": p.neck.d0, "m0": p.neck.m0 * p.neck.scale, "reach": p.rho[:, None] + p.rho + p.neck.reach}
        super().__init__(**arrays)
        self.has_series, self.has_neck = p.series is not None, p.neck is not None
        self.engulf, self.cutoff = p.engulf, p.cutoff

    def forward(self, x: Tensor) -> Tensor:
        """Return B [atom, batch] nm of x [3, atom, batch]."""
        arm = (x[0, :, None] - x[0, None], x[1, :, None] - x[1, None], x[2, :, None] - x[2, None])
        r2 = _dot(arm, arm) + self.same  # an atom is put at 1 nm from itself, where all is finite, and masked out
        integral = (self._descreening(r2) * self.other).sum(1)
        if not self.has_series:
            return 1 / (1 / self.radius - integral)
        psi = integral * self.radius
        alpha, beta, gamma = self.series[0], self.series[1], self.series[2]
        return 1 / (1 / self.radius - torch.tanh(psi * (alpha - psi * (beta - gamma * psi))) / self.rho)

    def _descreening(self, r2: Tensor) -> Tensor:
        """Return the integral over the sphere of atom j seen by atom i, [i, j, batch] 1/nm."""
        inverse = torch.rsqrt(r2)
        r = r2 * inverse
        own, sphere = self.radius[:, None], self.scaled[None]
        upper, lower = 1 / (r + sphere), 1 / torch.maximum(own, (r - sphere).abs())
        value = lower - upper + 0.25 * (r - sphere * sphere * inverse) * (upper * upper - lower * lower)
        value = 0.5 * (value + 0.5 * torch.log(upper / lower) * inverse)
        if self.engulf:
            value = torch.where(own < sphere - r, value + (1 / own - lower), value)
        value = torch.where(r + sphere >= own, value, 0.0)
        if self.has_neck:
            gap = r - self.d0
            gap2 = gap * gap
            neck = self.m0 / (1 + 100 * gap2 + 3e5 * gap2 * gap2 * gap2)
            value = value + torch.where(r <= self.reach, neck, 0.0)
        return value if self.cutoff is None else torch.where(r < self.cutoff, value, 0.0)


class BornEnergy(_Term):
    """Polarisation and surface energy of given Born radii.

    E = -C (1/eps_in - e^{-kappa f}/eps_out) [ sum_i q_i^2/(2 B_i) + sum_{i<j} q_i q_j (1/f_ij - shift) ]
    + sum_i tension_i (rho_i/B_i)^6, f^2 = r^2 + B_i B_j exp(-r^2/(4 B_i B_j)).
    """

    own: Tensor
    qq: Tensor
    rho: Tensor
    tension: Tensor

    def __init__(self, p: BornParameters, pairs: np.ndarray) -> None:
        arrays = {
            "own": -0.5 * p.coulomb * p.charge**2,
            "qq": -p.coulomb * p.charge[pairs[:, 0]] * p.charge[pairs[:, 1]],
            "rho": p.rho,
        }
        if p.tension is not None:
            arrays["tension"] = p.tension
        super().__init__(**arrays)
        self.solute, self.solvent, self.kappa = 1 / p.solute, 1 / p.solvent, p.kappa
        self.cutoff, self.shift, self.has_surface = p.cutoff, p.shift, p.tension is not None

    def atoms(self, born: Tensor) -> Tensor:
        """Return the self and surface energy [batch] of B [atom, batch]."""
        inverse = 1 / born
        energy = self.own * inverse * self._factor(born)
        if self.has_surface:
            ratio2 = (self.rho * inverse) ** 2
            energy = energy + self.tension * ratio2 * ratio2 * ratio2
        return energy.sum(0)

    def pairs(self, r2: Tensor, product: Tensor) -> Tensor:
        """Return the energy [pair, batch] of r^2 and B_i B_j, both [pair, batch]."""
        f2 = r2 + product * torch.exp(-0.25 * r2 / product)
        inverse = torch.rsqrt(f2)
        energy = self.qq * (inverse - self.shift) * self._factor(f2 * inverse)
        return energy if self.cutoff is None else torch.where(r2 < self.cutoff**2, energy, 0.0)

    def _factor(self, f: Tensor) -> Tensor | float:
        if self.kappa == 0:
            return self.solute - self.solvent
        return self.solute - self.solvent * torch.exp(-self.kappa * f)


class Nonbonded(_Term):
    """Coulomb, Lennard-Jones and generalised Born over the upper triangle of pairs, summed pair by pair.

    Coulomb and polarisation of a pair nearly cancel in water, so adding them before the sum over pairs keeps the
    partial sums small and the float32 error with them.
    """

    pair_atoms: Tensor
    qq: Tensor
    a: Tensor
    b: Tensor
    exception_atoms: Tensor
    exception_qq: Tensor
    exception_a: Tensor
    exception_b: Tensor

    def __init__(self, p: NonbondedParameters, born: BornParameters | None) -> None:
        super().__init__(
            pair_atoms=p.pairs.T, qq=p.qq, a=p.a, b=p.b,
            exception_atoms=p.exceptions.T, exception_qq=p.exception_qq, exception_a=p.exception_a, exception_b=p.exception_b,
        )  # fmt: skip
        self.cutoff, self.switch, self.k_rf, self.c_rf = p.cutoff, p.switch, p.k_rf, p.c_rf
        self.radii = None if born is None else BornRadii(born)
        self.polar = None if born is None else BornEnergy(born, p.pairs)

    def forward(self, x: Tensor) -> Tensor:
        """Return E [batch] of x [3, atom, batch]."""
        first, second = self.pair_atoms[0], self.pair_atoms[1]
        arm = _between(x, first, second)
        r2 = _dot(arm, arm)
        energy = self._direct(r2)
        if self.radii is None or self.polar is None:
            return energy.sum(0) + self._exceptions(x)
        born = self.radii(x)
        energy = energy + self.polar.pairs(r2, born[first] * born[second])
        return energy.sum(0) + self.polar.atoms(born) + self._exceptions(x)

    def _direct(self, r2: Tensor) -> Tensor:
        inverse = torch.rsqrt(r2)
        inverse6 = (inverse * inverse) ** 3
        dispersion = (self.a * inverse6 - self.b) * inverse6
        if self.cutoff is None:
            return dispersion + self.qq * inverse
        if self.switch is not None:
            t = ((r2 * inverse - self.switch) / (self.cutoff - self.switch)).clamp(min=0)
            dispersion = dispersion * (1 - t * t * t * (10 - t * (15 - 6 * t)))
        field = inverse - self.c_rf if self.k_rf == 0 else inverse + self.k_rf * r2 - self.c_rf
        return torch.where(r2 < self.cutoff**2, dispersion + self.qq * field, 0.0)

    def _exceptions(self, x: Tensor) -> Tensor:
        arm = _between(x, self.exception_atoms[0], self.exception_atoms[1])
        inverse = torch.rsqrt(_dot(arm, arm))
        inverse6 = (inverse * inverse) ** 3
        return (self.exception_qq * inverse + (self.exception_a * inverse6 - self.exception_b) * inverse6).sum(0)


class AmberEnergy(nn.Module):
    """The sum of all terms of one molecule."""

    def __init__(self, p: AmberParameters) -> None:
        super().__init__()
        kinds: tuple[tuple[Any, Any], ...] = (
            (Bonds, p.bonds), (Angles, p.angles), (Torsions, p.torsions), (TorsionMaps, p.maps)
        )  # fmt: skip
        terms: list[nn.Module] = [kind(values) for kind, values in kinds if values is not None]
        if p.nonbonded is not None:
            terms.append(Nonbonded(p.nonbonded, p.born))
        self.terms = nn.ModuleList(terms)

    def forward(self, x: Tensor) -> Tensor:
        """Return E [batch] kJ/mol of x [3, atom, batch] nm."""
        energy = x[0, 0] * 0
        for term in self.terms:
            energy = energy + term(x)
        return energy

    def structure(self) -> tuple[Any, ...]:
        """Return all that makes the code of an evaluation: kinds of terms, constants and names of arrays, not the arrays."""

        def of(module: nn.Module) -> tuple[Any, ...]:
            constants = sorted((name, value) for name, value in vars(module).items() if not name.startswith("_"))
            return type(module).__name__, tuple(constants), tuple(dict(module.named_buffers(recurse=False)))

        return tuple((name, *of(module)) for name, module in self.named_modules())
