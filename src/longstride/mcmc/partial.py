"""Partial refresh: a flow move in which the latent noise of y is correlated with that of x.

A flow writes the stiff coordinates of a configuration as s = T(z; t), z standard normal, given its torsions t. A move that
draws z anew pays for every coordinate at once in its acceptance ratio; one that keeps most of z moves less and is accepted
more (preconditioned Crank-Nicolson, doi:10.1214/13-STS421).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from longstride.errors import LongstrideError
from longstride.mcmc.metropolis import hastings

if TYPE_CHECKING:
    from torch import Tensor

    from longstride.mcmc.kernel import Kernel, LogDensity
    from longstride.mcmc.metropolis import Decide
    from longstride.state import State


def correlated_latent(z: Tensor, correlation: float, generator: torch.Generator) -> Tensor:
    """Return z' = a z + sqrt(1 - a^2) xi, xi ~ N(0, I), of the shape of z; reversible with respect to N(0, I)."""
    noise = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
    return correlation * z + math.sqrt(1 - correlation**2) * noise


@runtime_checkable
class CorrelatedProposal(Protocol):
    """A flow proposal that can keep a part of the latent noise of x."""

    def propose_correlated(self, x: State, correlation: float, generator: torch.Generator) -> tuple[State, Tensor, Tensor]:
        """Draw y with z(y) = `correlated_latent`(z(x), a) and everything else as in `propose`.

        Returns y and two terms whose difference is log q_a(x | y) - log q_a(y | x). The transition density of z' cancels
        against the normal densities, N(z) k_a(z, z') = N(z') k_a(z', z), so the terms are the log-densities of the move
        that draws z anew (a = 0), evaluated at x and y: [log q(t(y) | t(x)) + log q(s(y) | t(y))] and with x and y swapped,
        each with its measure. NaN in the first marks an invalid draw.
        """
        ...


def partial_refresh(
    log_density: LogDensity,
    proposal: CorrelatedProposal,
    *,
    correlation: float,
    label: str = "partial refresh",
    decide: Decide | None = None,
) -> Kernel:
    """Return the Metropolis-Hastings kernel that keeps the fraction `correlation` of the latent noise; exact.

    Args:
        log_density: log pi up to a constant.
        proposal: a flow proposal that offers `propose_correlated`.
        correlation: a, 0 (all noise anew) to below 1.
        label: name in `Info`.
        decide: as in `metropolis`.

    Raises:
        LongstrideError: the proposal cannot correlate its noise, or a is not in [0, 1).
    """
    if not 0 <= correlation < 1:
        raise LongstrideError(f"the correlation of a partial refresh must be at least 0 and below 1, not {correlation:g}")
    if not isinstance(proposal, CorrelatedProposal):
        raise LongstrideError(f"{type(proposal).__name__} cannot keep a part of its noise; use moves that draw it anew")

    def propose(x: State, generator: torch.Generator) -> tuple[State, Tensor, Tensor]:
        return proposal.propose_correlated(x, correlation, generator)

    return hastings(log_density, propose, label=label, decide=decide)
