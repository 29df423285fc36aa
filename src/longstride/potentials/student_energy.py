"""The mathematics of a student that does not depend on how neighbours are stored.

Arrays have a group of centres i (atoms, or elements), a second axis b of centres (replicas, or atoms of an element), and
neighbours j. Forces are the exact gradient of the energy, written out by hand: for a small molecule most time goes into
starting tensor operations, and this starts fewer than automatic differentiation would.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

DEGREE = 3
LENGTH_NM = 0.15  # lengths inside the network are in units of about one bond
ENERGY_KJ = 100.0  # energies inside the network are in units of about kT per bond stretch


def exponents(degree: int) -> list[tuple[int, int, int]]:
    """Return the exponents (a, b, c) of x^a y^b z^c of one degree, in a fixed order."""
    return [(a, b, degree - a - b) for a in range(degree, -1, -1) for b in range(degree - a, -1, -1)]


COUNTS = [len(exponents(degree)) for degree in range(DEGREE + 1)]  # monomials of each degree
LOWER = sum(COUNTS[:-1])  # monomials below the highest degree


class AtomWeights(NamedTuple):
    """Weights by centre: mixing [i, element x radial, 2 channels] per degree, then the perceptron."""

    mixing: tuple[Tensor, ...]
    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor
    last: Tensor


class Radial(NamedTuple):
    """Distances and radial functions of neighbours, in units of LENGTH_NM.

    Attributes:
        inverse_r: [i, b, j].
        value: [i, b, radial, j] e_n(r) = 2 sin(n pi r / rc) / r (1 - r^2/rc^2)^3 for r < rc, else 0.
        slope: [i, b, radial, j] de_n/dr.
    """

    inverse_r: Tensor
    value: Tensor
    slope: Tensor


def tables() -> tuple[Tensor, Tensor]:
    """Return constant matrices of the monomials up to DEGREE.

    First [monomial]: square roots of the multinomial coefficients w, which make sum_m w M_m(a) M_m(b) = (a . b)^degree
    rotation invariant. Second [3 x lower, monomial]: dM_m/dx_a = sum over lower k of derivative[a k, m] M_k.
    """
    rows = [item for degree in range(DEGREE + 1) for item in exponents(degree)]
    lower = [item for item in rows if sum(item) < DEGREE]
    roots = torch.zeros(len(rows), dtype=torch.float64)
    derivative = torch.zeros(3, len(lower), len(rows), dtype=torch.float64)
    for m, item in enumerate(rows):
        roots[m] = math.sqrt(math.factorial(sum(item)) / math.prod(math.factorial(power) for power in item))
        for axis in range(3):
            if item[axis]:
                below = [power - (k == axis) for k, power in enumerate(item)]
                derivative[axis, lower.index((below[0], below[1], below[2])), m] = item[axis]
    return roots, derivative.flatten(0, 1)


def monomials(rho: Tensor) -> Tensor:
    """Return all monomials up to DEGREE of vectors [i, b, 3, j], [i, b, monomial, j], in the order of `exponents`."""
    n, b, _, m = rho.shape
    result = rho.new_empty(n, b, LOWER + COUNTS[-1], m)
    result[:, :, 0] = 1.0
    result[:, :, 1:4] = rho
    first = 4  # of the degree being made; x times all of the degree below, y times those without x, z times z^(d-1)
    for below, counts in ((rho, (3, 2, 1)), (result[:, :, 4:10], (6, 3, 1))):
        for axis, count in enumerate(counts):
            factor = rho[:, :, axis : axis + 1]
            torch.mul(factor, below[:, :, below.shape[2] - count :], out=result[:, :, first : first + count])
            first += count
    return result


def joined_monomials(rho: Tensor) -> Tensor:
    """Return what `monomials` returns, without writing in place, which compilers do not follow."""
    parts = [torch.ones_like(rho[:, :, :1]), rho]
    for counts in ((3, 2, 1), (6, 3, 1)):
        below = parts[-1]
        parts.append(
            torch.cat(
                [rho[:, :, axis : axis + 1] * below[:, :, below.shape[2] - count :] for axis, count in enumerate(counts)],
                dim=2,
            )
        )
    return torch.cat(parts, dim=2)


def radial_functions(r2: Tensor, *, cutoff: float, waves: Tensor) -> Radial:
    """Return the radial functions of squared distances.

    Args:
        r2: [i, b, j], above zero, in units of LENGTH_NM^2.
        cutoff: rc, in units of LENGTH_NM.
        waves: [radial, 1], n pi / rc.
    """
    inverse_r = r2.rsqrt()
    r = r2 * inverse_r
    inside = (1 - r2 * cutoff**-2).clamp(min=0)
    inside2 = inside * inside
    envelope = 2 * inside2 * inside * inverse_r
    slope = (-12 / cutoff**2) * inside2 - envelope * inverse_r
    phase = waves * r[:, :, None]
    sine = phase.sin()
    value = sine * envelope[:, :, None]
    return Radial(inverse_r, value, phase.cos() * (waves * envelope[:, :, None]) + sine * slope[:, :, None])


def atomic_energies(moments: Tensor, weights: AtomWeights) -> tuple[Tensor, Tensor]:
    """Return energies [i, b] and their derivatives with respect to moments [i, b, monomial, element x radial]."""
    n, b = moments.shape[:2]
    mixtures, invariants = [], []
    for degree, (part, mixing) in enumerate(zip(moments.split(COUNTS, dim=2), weights.mixing, strict=True)):
        mixed = torch.bmm(part.flatten(1, 2), mixing).view(n, b, part.shape[2], -1)
        left, right = mixed.chunk(2, dim=3)
        if degree == 0:
            right = right + 1.0
        mixtures.append((left, right))
        invariants.append((left * right).sum(dim=2))
    z1 = torch.baddbmm(weights.first_bias, torch.cat(invariants, dim=2), weights.first)
    h1, d1 = _silu(z1)
    z2 = torch.baddbmm(weights.second_bias, h1, weights.second)
    h2, d2 = _silu(z2)
    energy = (h2 * weights.last).sum(dim=2)
    g1 = d1 * torch.bmm(d2 * weights.last, weights.second.transpose(1, 2))
    gradients = torch.bmm(g1, weights.first.transpose(1, 2)).chunk(DEGREE + 1, dim=2)
    back = []
    for g, (left, right), mixing in zip(gradients, mixtures, weights.mixing, strict=True):
        both = torch.cat([right, left], dim=3) * torch.cat([g, g], dim=2)[:, :, None]
        back.append(torch.bmm(both.flatten(1, 2), mixing.transpose(1, 2)).view(n, b, left.shape[2], -1))
    return energy, torch.cat(back, dim=2)


def _silu(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return z sigmoid(z) and its derivative."""
    sigmoid = torch.sigmoid(z)
    value = z * sigmoid
    return value, sigmoid + value - value * sigmoid
