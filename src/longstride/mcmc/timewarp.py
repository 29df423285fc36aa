"""The Timewarp kernel: exact Metropolis-Hastings with proposals of a conditional flow, over all of its labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from longstride.mcmc.kernel import Info, Kernel, mixture
from longstride.mcmc.metropolis import NotingProposal, boltzmann, metropolis, noting
from longstride.mcmc.speculative import speculative

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from longstride.flows.bound import BoundFlow
    from longstride.mcmc.kernel import ChainState, LogDensity
    from longstride.mcmc.metropolis import Proposal
    from longstride.potentials.base import Potential

MOVES = "torsion moves"  # label of the local moves of flows in internal coordinates


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
        noting_itself = batch == 1 and isinstance(proposal, NotingProposal)
        propose = None if noting_itself else getattr(proposal, "propose", None)
        if batch == 1:
            kernels.append(metropolis(log_density, proposal, label=label, propose=propose))
        else:
            kernels.append(speculative(log_density, proposal, batch=batch, label=label, propose=propose))
    return mixture(kernels, probabilities)


def timewarp(
    flow: BoundFlow,
    potential: Potential,
    *,
    kT: float,
    independent_probability: float,
    batch: int = 1,
    moves_probability: float = 0.0,
) -> Kernel:
    """Return the kernel that picks a label with fixed probability and proposes with it (arXiv:2302.01170).

    Each label's kernel is exact, so the mixture is. Proposals at a finite lag move within what molecular dynamics
    reaches in that time; independent ones also cross between basins that it does not connect.

    Args:
        flow: proposals for the molecule.
        potential: the target.
        kT: thermal energy, kJ/mol.
        independent_probability: probability of the independent label, 0 to 1.
        batch: proposals drawn at once per chain, for few chains.
        moves_probability: share of local torsion moves, where the flow offers them.
    """
    log_density = boltzmann(potential, kT)
    jumps = flow_moves(log_density, flow.proposals, flow.probabilities(independent_probability), batch=batch)
    if flow.moves is None or moves_probability == 0:
        return jumps
    moves = noting(log_density, flow.moves, label=MOVES)
    return mixture((jumps, repeated(moves, batch)), (1.0 - moves_probability, moves_probability))


def repeated(kernel: Kernel, count: int) -> Kernel:
    """Return `count` steps of a kernel as one, whose Info counts all of them."""
    if count == 1:
        return kernel

    def step(chains: ChainState, generator: torch.Generator) -> tuple[ChainState, Info]:
        infos = []
        for _ in range(count):
            chains, info = kernel(chains, generator)
            infos.append(info)
        return chains, Info(
            accepted=torch.stack([info.accepted.long() for info in infos]).sum(0),
            log_alpha=infos[-1].log_alpha,
            label=infos[-1].label,
            energy_calls=sum(info.energy_calls for info in infos),
            force_calls=sum(info.force_calls for info in infos),
            proposals=sum(info.proposals for info in infos),
        )

    return Kernel(step=step, invariance=kernel.invariance, labels=kernel.labels)
