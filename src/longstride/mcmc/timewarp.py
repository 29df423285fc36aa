"""The Timewarp kernel: exact Metropolis-Hastings with proposals of a conditional flow, over all of its labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longstride.mcmc.kernel import Kernel, mixture
from longstride.mcmc.metropolis import boltzmann, metropolis

if TYPE_CHECKING:
    from longstride.flows.internal import InternalFlow
    from longstride.potentials.base import Potential


def label_probabilities(flow: InternalFlow, independent_probability: float) -> tuple[float, ...]:
    """Return the fixed probability of each label: the lags share evenly what "independent" leaves."""
    n_lags = len(flow.architecture.lags_ps)
    return (*([(1.0 - independent_probability) / n_lags] * n_lags), independent_probability)


def timewarp(flow: InternalFlow, potential: Potential, *, kT: float, independent_probability: float) -> Kernel:
    """Return the kernel that picks a label with fixed probability and proposes with it (arXiv:2302.01170).

    Each label's kernel is exact, so the mixture is. Proposals at a finite lag move within what molecular dynamics
    reaches in that time; independent ones also cross between basins that it does not connect.

    Args:
        flow: the trained flow.
        potential: the target; its molecule binds the flow.
        kT: thermal energy, kJ/mol.
        independent_probability: probability of the independent label, 0 to 1.
    """
    log_density = boltzmann(potential, kT)
    kernels = []
    for index, name in enumerate(flow.architecture.labels):
        proposal = flow.bind(potential.system, label=index)
        kernels.append(metropolis(log_density, proposal, label=name, propose=proposal.propose))
    return mixture(kernels, label_probabilities(flow, independent_probability))
