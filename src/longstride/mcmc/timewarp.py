"""The Timewarp kernel: exact Metropolis-Hastings with proposals of a conditional flow, over all of its labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longstride.mcmc.kernel import Kernel, mixture
from longstride.mcmc.metropolis import boltzmann, metropolis
from longstride.mcmc.speculative import speculative

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from longstride.flows.internal import InternalFlow
    from longstride.mcmc.kernel import LogDensity
    from longstride.mcmc.metropolis import Proposal
    from longstride.potentials.base import Potential


def label_probabilities(flow: InternalFlow, independent_probability: float) -> tuple[float, ...]:
    """Return the fixed probability of each label: the lags share evenly what "independent" leaves."""
    n_lags = len(flow.architecture.lags_ps)
    return (*([(1.0 - independent_probability) / n_lags] * n_lags), independent_probability)


def flow_moves(
    log_density: LogDensity, proposals: Mapping[str, Proposal], probabilities: Sequence[float], *, batch: int = 1
) -> Kernel:
    """Return the mixture of Metropolis-Hastings kernels with several proposals, one per label; exact.

    Args:
        log_density: log pi up to a constant.
        proposals: label to q(y | x), or to an object whose `propose` returns both log-densities at once.
        probabilities: of the labels, constants.
        batch: proposals drawn at once per chain; more than one makes a kernel step as many sequential proposals with one
            label (see `speculative`).
    """
    kernels = []
    for label, proposal in proposals.items():
        propose = getattr(proposal, "propose", None)
        if batch == 1:
            kernels.append(metropolis(log_density, proposal, label=label, propose=propose))
        else:
            kernels.append(speculative(log_density, proposal, batch=batch, label=label, propose=propose))
    return mixture(kernels, probabilities)


def timewarp(flow: InternalFlow, potential: Potential, *, kT: float, independent_probability: float, batch: int = 1) -> Kernel:
    """Return the kernel that picks a label with fixed probability and proposes with it (arXiv:2302.01170).

    Each label's kernel is exact, so the mixture is. Proposals at a finite lag move within what molecular dynamics
    reaches in that time; independent ones also cross between basins that it does not connect.

    Args:
        flow: the trained flow.
        potential: the target; its molecule binds the flow.
        kT: thermal energy, kJ/mol.
        independent_probability: probability of the independent label, 0 to 1.
        batch: proposals drawn at once per chain, for few chains.
    """
    proposals = {name: flow.bind(potential.system, label=index) for index, name in enumerate(flow.architecture.labels)}
    probabilities = label_probabilities(flow, independent_probability)
    return flow_moves(boltzmann(potential, kT), proposals, probabilities, batch=batch)
