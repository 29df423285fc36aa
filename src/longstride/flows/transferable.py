"""The transferable flow: proposals q(y | x, label) for any peptide, in internal coordinates.

    q(y | x, label) = q(t(y) | t(x), label) * q(s(y) | t(y)) / volume(y)

The free torsions t come from a network that knows molecules by their force-field features (`torsion_network`), the stiff
coordinates s from the force field itself (`stiff`), so one set of weights serves every sequence. As in `internal`,
densities are with respect to Cartesian volume at fixed rigid motion, and y is placed in the frame of x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from longstride.errors import DataError
from longstride.flows.bound import BoundFlow
from longstride.flows.notes import Noted, Notes
from longstride.flows.stiff import ForceFieldGaussian, calibrate, refine
from longstride.flows.torsion_features import torsion_features
from longstride.flows.zmatrix import build_zmatrix, place_in_frame
from longstride.state import State

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from longstride.flows.torsion_network import Tokens, TorsionNetwork
    from longstride.potentials.base import Potential
    from longstride.state import System
    from longstride.systems import Prepared


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A batch of configurations and what scoring them needs.

    Attributes:
        positions: [batch, atom, 3] nm.
        torsions: [batch, torsion] radian.
        latent: [batch, stiff] of the stiff coordinates.
        log_stiff: log q(s | t) - log volume, [batch]; -inf outside the domain.
    """

    positions: Tensor
    torsions: Tensor
    latent: Tensor
    log_stiff: Tensor

    def at(self, chosen: Tensor) -> Encoded:
        """Return some of the configurations, [chosen] int64 or bool."""
        return Encoded(**{name: value[chosen] for name, value in vars(self).items()})

    def notes(self, owner: BoundMolecule, **more: Tensor) -> Notes:
        """Return what the next proposal from here needs, with more values of the caller's."""
        values = {name: getattr(self, name) for name in ("torsions", "latent", "log_stiff")}
        return Notes(owner=owner, values=values | more)


@dataclass(frozen=True, kw_only=True)
class BoundMolecule:
    """All that does not depend on weights: a molecule, ready for proposals.

    Attributes:
        prepared: the molecule.
        gaussian: density of its stiff coordinates.
        states: [state, atom, 3] nm, relaxed torsion states, the lowest energy first; starting points of chains.
    """

    prepared: Prepared
    gaussian: ForceFieldGaussian
    states: Tensor

    @classmethod
    def of(cls, prepared: Prepared, potential: Potential, *, kT: float, fitted_states: int = 300) -> BoundMolecule:
        """Find the stiff density of a molecule; some hundred gradients of the potential per stiff coordinate and state.

        Args:
            prepared: the molecule.
            potential: the target.
            kT: thermal energy, kJ/mol.
            fitted_states: torsion states to which the stiff density is fitted; fewer are faster and accepted less.
        """
        zmatrix = build_zmatrix(prepared.system)
        first, states = calibrate(zmatrix, potential, reference=prepared.positions, kT=kT)
        return cls(prepared=prepared, gaussian=refine(first, states, count=fitted_states), states=states)

    @property
    def system(self) -> System:
        """The molecule's identity."""
        return self.prepared.system

    def contains(self, x: State) -> Tensor:
        """Return whether each configuration lies in the domain, [batch] bool; chains must start there."""
        target = self.gaussian.target
        return target.contains(target.split(x.positions)[1])

    def encode(self, x: Tensor) -> Encoded:
        """Return the torsions and latent values of positions [batch, atom, 3] nm."""
        target = self.gaussian.target
        here = x.double()
        t, s = target.split(here)
        z, log_q = self.gaussian.to_latent(s, self.gaussian.at(t))
        log_measure = target.zmatrix.log_measure(target.internals(t, s), here)
        log_stiff = torch.where(target.contains(s), log_q - log_measure, -torch.inf)
        return Encoded(positions=here, torsions=t, latent=z, log_stiff=log_stiff)

    def encode_noted(self, x: Tensor, notes: Mapping[str, Tensor]) -> Encoded:
        """Return the same, from notes on x where there are some."""
        if "latent" not in notes:
            return self.encode(x)
        return Encoded(positions=x.double(), torsions=notes["torsions"], latent=notes["latent"], log_stiff=notes["log_stiff"])

    def decode(self, t: Tensor, z: Tensor, frame_of: Tensor) -> Encoded:
        """Return the configurations of torsions and latent values, in the frames of positions [batch, atom, 3].

        log_stiff is NaN outside the domain and where a ring stays open: such a draw must be rejected.
        """
        target = self.gaussian.target
        s, log_q = self.gaussian.from_latent(z, self.gaussian.at(t))
        canonical, log_measure = target.place(t, s)
        y = place_in_frame(canonical, *target.zmatrix.frame(frame_of.double()))
        closed = canonical.isfinite().all(dim=(1, 2))  # an open ring has no positions
        log_stiff = torch.where(target.contains(s) & closed, log_q - log_measure, torch.nan)
        return Encoded(positions=y, torsions=t, latent=z, log_stiff=log_stiff)


@dataclass(frozen=True, kw_only=True)
class TransferableProposal:
    """q(. | ., label) bound to one molecule. Bind it with `bind`.

    Attributes:
        network: the torsion network, in evaluation mode.
        molecule: the molecule.
        tokens: of the molecule, one entry.
        label: index into the network's labels.
    """

    network: TorsionNetwork
    molecule: BoundMolecule
    tokens: Tokens
    label: int

    @property
    def system(self) -> System:
        """The molecule."""
        return self.molecule.system

    def sample(self, x: State, generator: torch.Generator) -> tuple[State, Tensor]:
        """Return y in the frame of x, and log q(y | x) [batch] float64, NaN where y left the domain (reject it)."""
        y, log_forward, _ = self.propose(x, generator)
        return y, log_forward

    def propose(self, x: State, generator: torch.Generator) -> tuple[State, Tensor, Tensor]:
        """Return y, log q(y | x) and log q(x | y); as `sample` and `log_prob`, each configuration converted only once."""
        return self.propose_correlated(x, 0.0, generator)

    def propose_correlated(self, x: State, correlation: float, generator: torch.Generator) -> tuple[State, Tensor, Tensor]:
        """Return y whose stiff coordinates keep a part of the latent values of x, and the log-densities of `propose`.

        z(y) = a z(x) + sqrt(1 - a^2) xi is reversible with respect to N(0, I), so the densities of a move that draws z anew
        (a = 0) differ by what the acceptance ratio needs (see `longstride.mcmc.partial`).

        Args:
            x: current state.
            correlation: a, 0 (all noise anew) to below 1.
            generator: source of the draw.
        """
        drawn = self.propose_noted(x, None, generator, correlation=correlation)
        return drawn.y, drawn.log_forward, drawn.log_backward

    @torch.no_grad()
    def propose_noted(self, x: State, notes: Notes | None, generator: torch.Generator, *, correlation: float = 0.0) -> Noted:
        """Return the draw of `propose_correlated` and notes on both ends; half the work where there are notes on x."""
        known = {} if notes is None else notes.of(self.molecule)
        here = self.molecule.encode_noted(x.positions, known)
        tokens = self.tokens.repeat(len(here.torsions))
        t, log_t = self.network.sample(tokens, self._context(tokens, here.torsions), generator)
        noise = torch.randn(here.latent.shape, generator=generator, dtype=torch.float64, device=generator.device)
        z = correlation * here.latent + math.sqrt(1 - correlation**2) * noise
        there = self.molecule.decode(t.double(), z, x.positions)
        log_t_x = known.get(self._note)
        if log_t_x is None:
            log_t_x = self._log_torsions(tokens, here.torsions, there.torsions)
        own = {} if self._sees_x else {self._note: log_t_x}
        return Noted(
            y=State(positions=there.positions.to(x.positions.dtype)),
            log_forward=log_t.double() + there.log_stiff,
            log_backward=log_t_x + here.log_stiff,
            at_x=here.notes(self.molecule, **own),
            at_y=there.notes(self.molecule, **{name: log_t.double() for name in own}),
        )

    @property
    def _sees_x(self) -> bool:
        return self.label < len(self.network.architecture.lags_ps)

    @property
    def _note(self) -> str:
        """Name of log q(t(x)), a function of x alone where proposals are independent."""
        return f"log q of label {self.label}, network {id(self.network)}"

    @torch.no_grad()
    def log_prob(self, y: State, x: State) -> Tensor:
        """Return log q(y | x), [batch] float64; -inf where y lies outside the domain."""
        t_x, _ = self.molecule.gaussian.target.split(x.positions)
        there = self.molecule.encode(y.positions)
        return self._log_torsions(self.tokens.repeat(len(t_x)), there.torsions, t_x) + there.log_stiff

    def contains(self, x: State) -> Tensor:
        """Return whether each configuration lies in the domain, [batch] bool; chains must start there."""
        return self.molecule.contains(x)

    def _context(self, tokens: Tokens, t_x: Tensor) -> Tensor:
        dtype = tokens.tokens.dtype
        return self.network.context(tokens, t_x.to(dtype), torch.full((len(t_x),), self.label, device=t_x.device))

    def _log_torsions(self, tokens: Tokens, t: Tensor, t_x: Tensor) -> Tensor:
        log_q = self.network.log_prob(tokens, t.to(tokens.tokens.dtype), self._context(tokens, t_x))
        return log_q.double()


@torch.no_grad()
def bind(network: TorsionNetwork, molecule: BoundMolecule, *, label: int) -> TransferableProposal:
    """Return the proposal of a label for a molecule.

    Raises:
        DataError: the network has no such label.
    """
    labels = network.architecture.labels
    if not 0 <= label < len(labels):
        raise DataError(f"the flow has the labels {', '.join(labels)}; none has index {label}")
    prepared, target = molecule.prepared, molecule.gaussian.target
    features = torsion_features(prepared.system, prepared.openmm_system, target.zmatrix, prepared.positions, target.kT)
    tokens = network.encode([features.to(next(network.parameters()).dtype)])
    return TransferableProposal(network=network, molecule=molecule, tokens=tokens, label=label)


@torch.no_grad()
def bind_all(network: TorsionNetwork, molecule: BoundMolecule) -> BoundFlow:
    """Return the proposals of all labels for a molecule, with torsion moves beside them."""
    labels = network.architecture.labels
    proposals = {name: bind(network, molecule, label=index) for index, name in enumerate(labels)}
    return BoundFlow(
        proposals=proposals,
        independent=labels[-1],
        contains=molecule.contains,
        moves=TorsionMoves(molecule=molecule),
        states=molecule.states,
    )


@dataclass(frozen=True, kw_only=True)
class TorsionMoves:
    """Local moves: one or two torsions turn, the stiff coordinates keep most of their latent values. Nothing to train.

    Torsions move by a symmetric step, uniform on the circle or normal; latent values by the autoregression
    z' = a z + sqrt(1 - a^2) xi, reversible with respect to N(0, I). Forward and backward densities therefore differ by the
    reference density of s alone: log q(y | x) - log q(x | y) = log q(s_y | t_y) - log q(s_x | t_x) - log of the volumes.

    Attributes:
        molecule: the molecule.
        correlation: a of moves that turn a torsion.
        refresh_correlation: a of moves that turn none.
        refresh: probability to turn none.
        pair: probability to turn two instead of one.
        uniform: probability of a uniform turn.
        step: standard deviation of the other turns, radian.
    """

    molecule: BoundMolecule
    correlation: float = 0.85
    refresh_correlation: float = 0.3
    refresh: float = 0.25
    pair: float = 0.25
    uniform: float = 0.6
    step: float = 0.4

    def propose(self, x: State, generator: torch.Generator) -> tuple[State, Tensor, Tensor]:
        """Return y and two log-densities whose difference is log q(y | x) - log q(x | y); NaN where y left the domain."""
        drawn = self.propose_noted(x, None, generator)
        return drawn.y, drawn.log_forward, drawn.log_backward

    @torch.no_grad()
    def propose_noted(self, x: State, notes: Notes | None, generator: torch.Generator) -> Noted:
        """Return the draw of `propose` and notes on both ends; half the work where there are notes on x."""
        here = self.molecule.encode_noted(x.positions, {} if notes is None else notes.of(self.molecule))
        t, turned = self._turned(here.torsions, generator)
        a = torch.where(turned, self.correlation, self.refresh_correlation).double()[:, None]
        noise = torch.randn(here.latent.shape, generator=generator, dtype=torch.float64)
        there = self.molecule.decode(t, a * here.latent + (1 - a.square()).sqrt() * noise, x.positions)
        return Noted(
            y=State(positions=there.positions.to(x.positions.dtype)),
            log_forward=there.log_stiff,
            log_backward=here.log_stiff,
            at_x=here.notes(self.molecule),
            at_y=there.notes(self.molecule),
        )

    def _turned(self, t: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        batch, count = t.shape

        def draw() -> Tensor:
            return torch.rand(batch, generator=generator, dtype=torch.float64)

        number = torch.where(draw() < self.refresh, 0, torch.where(draw() < self.pair, 2, 1))
        total = torch.zeros_like(t)
        for turn in range(2):
            chosen = torch.randint(count, (batch, 1), generator=generator)
            small = self.step * torch.randn(batch, generator=generator, dtype=torch.float64)
            size = torch.where(draw() < self.uniform, (draw() * 2 - 1) * math.pi, small)
            total.scatter_add_(1, chosen, torch.where(number > turn, size, 0.0)[:, None])
        return torch.remainder(t + total + math.pi, 2 * math.pi) - math.pi, number > 0
