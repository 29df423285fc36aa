"""Exploration: flow proposals without the Metropolis-Hastings correction. Fast, and biased."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from longstride.mcmc.kernel import ChainState, Info, Kernel, mixture
from longstride.mcmc.metropolis import boltzmann, select

if TYPE_CHECKING:
    from longstride.flows.bound import BoundFlow
    from longstride.mcmc.kernel import LogDensity
    from longstride.mcmc.metropolis import Proposal
    from longstride.potentials.base import Potential


def filtered(log_density: LogDensity, proposal: Proposal, *, max_drop: float, label: str) -> Kernel:
    """Return the kernel that takes every valid proposal unless the log-density falls by more than `max_drop`.

    Handedness is kept: a draw outside the proposal's domain, where its log q is NaN, is refused.
    """

    def step(chains: ChainState, generator: torch.Generator) -> tuple[ChainState, Info]:
        y, log_q = proposal.sample(chains.state, generator)
        at_y = log_density(y)
        change = at_y - chains.log_density
        change = torch.where(log_q.isfinite() & change.isfinite(), change, torch.nan)  # NaN is refused by the comparison
        accepted = change > -max_drop
        moved = select(accepted, ChainState(state=y, log_density=at_y), chains)
        return moved, Info(accepted=accepted, log_alpha=change, label=label, energy_calls=len(at_y))

    return Kernel(step=step, invariance="biased", labels=(label,))


def explore(
    flow: BoundFlow, potential: Potential, *, kT: float, independent_probability: float, max_energy_rise: float
) -> Kernel:
    """Return the exploration kernel (arXiv:2302.01170, algorithm 2) over all labels of a flow.

    Args:
        flow: proposals for the molecule.
        potential: the target.
        kT: thermal energy, kJ/mol.
        independent_probability: probability of the independent label, 0 to 1.
        max_energy_rise: kJ/mol; a larger rise in one step is refused.
    """
    log_density = boltzmann(potential, kT)
    kernels = [
        filtered(log_density, proposal, max_drop=max_energy_rise / kT, label=name) for name, proposal in flow.proposals.items()
    ]
    return mixture(kernels, flow.probabilities(independent_probability))
