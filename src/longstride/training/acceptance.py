"""Acceptance of independent proposals as a goal of training, beside the likelihood.

With w = pi / q the mean acceptance of an independence sampler at equilibrium is

    A = E_{x ~ pi, y ~ q} min(1, w(y) / w(x)) = integral of min(pi(x) q(y), pi(y) q(x))

and its gradient needs that of log q alone, no derivative of an energy:

    grad A = E_{x, y}[1(w(y) > w(x)) grad log q(y)] + E_{x, y}[1(w(y) < w(x)) w(y) / w(x) grad log q(x)]

All factors lie between 0 and 1, so single clashes cannot dominate, as they do in the reverse Kullback-Leibler divergence. The
first term raises q at draws of large w, where q is too thin, by true energies of fresh draws; the second, at exact samples.
Acceptance alone would narrow q; the entropy is kept by the likelihood of exact samples, which is the cross entropy of q.

The clamp is on the ratio of each pair: past w(y) = w(x) more is not better.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from longstride.flows.transferable import TransferableProposal
from longstride.mcmc.metropolis import boltzmann
from longstride.state import State

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from longstride.flows.torsion_features import TorsionFeatures
    from longstride.flows.torsion_network import TorsionNetwork
    from longstride.flows.transferable import BoundMolecule, Encoded
    from longstride.mcmc.kernel import LogDensity

_LEAST = 0.02  # acceptance below which a molecule's weight grows no more


@dataclass(frozen=True, kw_only=True)
class Frames:
    """Frames of an exact chain of one molecule, with all that scoring them needs and no weights change.

    Attributes:
        molecule: ready for proposals.
        features: of its torsions, in the precision of the network.
        log_density: log pi of the target, up to a constant.
        here: the frames.
        log_pi: [frame] of the frames.
    """

    molecule: BoundMolecule
    features: TorsionFeatures
    log_density: LogDensity
    here: Encoded
    log_pi: Tensor

    @classmethod
    def of(cls, molecule: BoundMolecule, features: TorsionFeatures, positions: Tensor) -> Frames:
        """Return the frames of positions [frame, atom, 3] nm."""
        target = molecule.gaussian.target
        log_density = boltzmann(target.potential, target.kT)
        here = molecule.encode(positions)
        log_pi = log_density(State(positions=here.positions))
        return cls(molecule=molecule, features=features, log_density=log_density, here=here, log_pi=log_pi)


def gradient_weights(log_w_x: Tensor, log_w_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the acceptance and what multiplies grad log q of samples and of draws in its gradient.

    Args:
        log_w_x: [sample] log pi - log q of samples from pi.
        log_w_y: [draw] the same of draws from q; NaN where invalid, which counts as w = 0.

    Returns:
        A [], weights of the samples [sample], weights of the draws [draw], centred because E_q grad log q = 0.
    """
    usable = log_w_y.nan_to_num(nan=-torch.inf, posinf=-torch.inf)
    log_r = usable - log_w_x[:, None]
    ratio = log_r.clamp(max=0).exp()
    clamped = log_r >= 0
    draws = clamped.double().mean(0)
    count = len(draws)
    centred = (draws - draws.mean()) * (count / max(count - 1, 1))  # the baseline leaves each draw itself out
    return ratio.mean(), (ratio * ~clamped).mean(1), centred


def acceptance_losses(network: TorsionNetwork, molecules: Sequence[Frames], count: int, generator: torch.Generator) -> Tensor:
    """Return a loss whose gradient is that of the mean of -log A over molecules, [].

    Args:
        network: in training, on any device; the label is the independent one.
        molecules: frames of each; force fields are on the CPU, where the network draws as well.
        count: samples, and draws, of each molecule.
        generator: source of both.
    """
    proposer = network if network.start.device.type == "cpu" else copy.deepcopy(network).cpu()
    return torch.stack([_loss(network, proposer, frames, count, generator) for frames in molecules]).mean()


def _loss(network: TorsionNetwork, proposer: TorsionNetwork, frames: Frames, count: int, generator: torch.Generator) -> Tensor:
    label, device = len(network.architecture.lags_ps), network.start.device
    with torch.no_grad():
        tokens = proposer.encode([frames.features])
    proposal = TransferableProposal(network=proposer, molecule=frames.molecule, tokens=tokens, label=label)
    chosen = torch.randint(len(frames.log_pi), (count,), generator=generator)
    here = frames.here.at(chosen)
    drawn = proposal.propose_noted(State(positions=here.positions), here.notes(frames.molecule), generator)
    log_w_y = frames.log_density(drawn.y) - drawn.log_forward
    accepted, samples, draws = gradient_weights(frames.log_pi[chosen] - drawn.log_backward, log_w_y)
    torsions = torch.cat([here.torsions, drawn.at_y.of(frames.molecule)["torsions"]]).float().to(device)
    repeated = network.encode([frames.features.to(device=device)]).repeat(2 * count)
    labels = torch.full((2 * count,), label, device=device)
    log_q = network.log_prob(repeated, torsions, network.context(repeated, torsions, labels))
    weights = torch.cat([samples, draws]) / (count * accepted.clamp(min=_LEAST))
    return -(weights.to(log_q) * log_q).sum()
