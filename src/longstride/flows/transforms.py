"""Invertible maps of vectors, each with its log-determinant in both directions.

A `Transform` turns data into latent values (`forward`, the density direction) and back (`inverse`, the sampling
direction), given a context vector per batch entry:

    z, logdet = transform(u, context)             logdet = log |det dz/du|, [batch]
    u, logdet = transform.inverse(z, context)     the same log |det dz/du|, so that log p(u) = log p(z) + logdet
"""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """Two hidden layers of SiLU units whose last layer starts at zero, so that a transform starts as the identity."""

    def __init__(self, n_in: int, n_out: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(n_in, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        self.last = nn.Linear(hidden, n_out)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, n_in] to [batch, n_out]."""
        return self.last(self.layers(x))


class Transform(nn.Module, abc.ABC):
    """An invertible map with a context."""

    @abc.abstractmethod
    def forward(self, u: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return z [batch, size] and log |det dz/du| [batch] (density direction)."""

    @abc.abstractmethod
    def inverse(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return u [batch, size] and log |det dz/du| [batch] (sampling direction)."""


class AffineCoupling(Transform):
    """z_b = (u_b + t(u_a, context)) * exp(s(u_a, context)), z_a = u_a, with |s| < limit (RealNVP, arXiv:1605.08803)."""

    def __init__(self, mask: Tensor, n_context: int, hidden: int, limit: float = 1.5) -> None:
        """Make a coupling that changes the entries where mask [size] is true."""
        super().__init__()
        self.limit = limit
        self.changed: Tensor
        self.kept: Tensor
        self.register_buffer("changed", mask.nonzero()[:, 0])
        self.register_buffer("kept", (~mask).nonzero()[:, 0])
        self.network = Network(len(self.kept) + n_context, 2 * len(self.changed), hidden)

    def _coefficients(self, kept: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = self.network(torch.cat([kept, context], -1)).chunk(2, -1)
        return shift, self.limit * torch.tanh(raw / self.limit)

    def forward(self, u: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Density direction."""
        shift, log_scale = self._coefficients(u[:, self.kept], context)
        z_b = (u[:, self.changed] + shift) * log_scale.exp()
        return u.index_copy(1, self.changed, z_b), log_scale.sum(-1)

    def inverse(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Sampling direction."""
        shift, log_scale = self._coefficients(z[:, self.kept], context)
        u_b = z[:, self.changed] * torch.exp(-log_scale) - shift
        return z.index_copy(1, self.changed, u_b), log_scale.sum(-1)
