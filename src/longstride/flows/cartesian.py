"""Cartesian Timewarp: the published augmented conditional normalising flow q(y, v_y | x) (arXiv:2302.01170).

A configuration y at lag tau after x is proposed together with auxiliary variables v_y, three per atom, whose target is N(0, 1)
independent of everything else. With d = y - x, affine couplings change d and v in turn (RealNVP, arXiv:1605.08803):

    density direction, l = 0, 1, ...    z <- z * s_l + t_l,    log|det| += sum log s_l     (even l: d given v; odd l: v given d)
    sampling direction, reversed        z <- (z - t_l) / s_l
    log q(y, v | x) = log N(z_d; 0, S_d^2) + log N(z_v; 0, S_v^2) + sum_l sum log s_l

log s_l and t_l come from two atom transformers (`longstride.flows.kernel_attention`) that see, per atom, an embedding of the
element, the centred x, three zeros (the published layout keeps a slot for velocities), and the half that does not change.
Only elements distinguish atoms, so relabelling atoms relabels proposals. Positions in nm; S_d, S_v are two learned scalars.

Centre of mass. x is centred by its plain mean before a network sees it and d is added to the x that was given, so that
q(y + a | x + a) = q(y | x) for every translation a. The density lives on all of R^{3N}, the centre of y included. In the
published data the mass-weighted centre is frozen, so pairs lie on a sheet of 3N - 3 dimensions, where such a density would
diverge and Metropolis-Hastings would pay for three nearly frozen directions; in dynamics that do not remove its motion it
diffuses by nanometres. Training here therefore replaces the motion of the centre by a Gaussian step of known width
(`flow.cartesian.centre_step_nm`), which makes the density proper. The target does not depend on the centre, so the chain is
exact and its centre takes a random walk that no observable sees. Published weights were trained without such a step.

Handedness. The flow could propose a mirror image of a chiral centre, which has the same energy but is another molecule. Such a
draw is marked invalid (log q = NaN), so that the chain keeps the target restricted to the handedness that it started with.

Rotations: the networks are not equivariant; training turns every pair (x and y alike) at random. A chain is exact
in any fixed frame.
"""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from longstride.errors import DataError
from longstride.flows.bound import BoundFlow
from longstride.flows.kernel_attention import AtomTransformer, PackedPair, TransformerSizes, attention_weights
from longstride.state import State
from longstride.systems import neighbours

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from longstride.state import System

    # (features [batch, atom, n_in], attention weights) -> (log s, t), each [batch, atom, 3]
    Networks = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

ELEMENTS = (6, 1, 7, 8, 16)  # atomic numbers in the order of the embedding: C H N O S
LENGTHSCALES_NM = (0.1, 0.2, 0.5, 0.7, 1.0, 1.2)
# rows (proposal x atom) evaluated at once: the widest activations stay in the cache of a CPU, and fill a GPU
BLOCK_ROWS, BLOCK_ROWS_GPU = 1024, 65536


@dataclass(frozen=True, kw_only=True)
class CartesianArchitecture:
    """Sizes of a `CartesianFlow`.

    Attributes:
        couplings: half updates; even ones change positions, odd ones auxiliaries.
        layers: encoder layers of each network.
        embedding: size of the element embedding.
        width: width of the networks and of each attention head.
        feed_forward: hidden width of the feed-forward blocks.
        hidden: hidden width of the perceptrons at both ends of a network.
        lengthscales_nm: one attention head each.
        lags_ps: the lag of the training pairs; one, as the published model has no input for it.
    """

    couplings: int
    layers: int
    embedding: int
    width: int = 128
    feed_forward: int = 2048
    hidden: int = 256
    lengthscales_nm: tuple[float, ...] = LENGTHSCALES_NM
    lags_ps: tuple[float, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the proposals, such as ("500 ps",); ("published",) where the lag is not known."""
        return tuple(f"{lag:g} ps" for lag in self.lags_ps) or ("published",)

    @property
    def network(self) -> TransformerSizes:
        """Sizes of each of the 2 * couplings networks."""
        return TransformerSizes(
            n_in=self.embedding + 9,
            width=self.width,
            feed_forward=self.feed_forward,
            hidden=self.hidden,
            layers=self.layers,
            heads=len(self.lengthscales_nm),
        )

    def to_meta(self) -> dict[str, Any]:
        """Return the sizes as JSON values."""
        return asdict(self)

    @classmethod
    def from_meta(cls, values: dict[str, Any]) -> CartesianArchitecture:
        """Return the sizes that `to_meta` gave."""
        lists = {name: tuple(values[name]) for name in ("lengthscales_nm", "lags_ps")}
        return cls(**{**values, **lists})


# The sizes of the published models: `ad` as in the released configuration for alanine dipeptide, `2aa` as in the released
# checkpoint (106 251 658 parameters). For `4aa` only the size of the released file is known, which these sizes reproduce.
# `small` is ours, to train on a CPU.
PRESETS = {
    "small": CartesianArchitecture(couplings=4, layers=2, embedding=16, width=32, feed_forward=128, hidden=64),
    "ad": CartesianArchitecture(couplings=8, layers=3, embedding=32),
    "2aa": CartesianArchitecture(couplings=12, layers=6, embedding=64),
    "4aa": CartesianArchitecture(couplings=16, layers=17, embedding=64),
}


def element_indices(atomic_numbers: np.ndarray, *, name: str = "the molecule") -> Tensor:
    """Return indices into the element embedding, [atom] int64.

    Raises:
        DataError: an element that the model does not know.
    """
    unknown = sorted(set(np.asarray(atomic_numbers).tolist()) - set(ELEMENTS))
    if unknown:
        raise DataError(
            f"{name} holds the element with atomic number {unknown[0]}; Cartesian Timewarp knows only C, H, N, O and S,"
            " so use the flow in internal coordinates (flow.coordinates: internal)"
        )
    return torch.tensor([ELEMENTS.index(int(z)) for z in atomic_numbers], dtype=torch.int64)


def chiral_centres(system: System) -> Tensor:
    """Return atoms with four bonds to at least three heavy atoms, [centre, 4]: the atom and its first three heavy neighbours.

    This is the published rule. It also keeps the labels of two equal methyl groups on one atom: arbitrary, but harmless.
    """
    heavy = system.atomic_numbers > 1
    found = []
    for atom, bonded in enumerate(neighbours(system)):
        around = [other for other in bonded if heavy[other]]
        if len(bonded) == 4 and len(around) >= 3:
            found.append([atom, *around[:3]])
    return torch.tensor(found, dtype=torch.int64).reshape(-1, 4)


def handedness(x: Tensor, centres: Tensor) -> Tensor:
    """Return on which side the three neighbours of each centre turn, [batch, centre] bool, from positions [batch, atom, 3]."""
    arms = x[:, centres[:, 1:]] - x[:, centres[:, :1]]
    return torch.linalg.det(arms) > 0


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Everything that depends on x alone, computed once and shared by all layers and all proposals from x.

    Attributes:
        x: [batch, atom, 3] nm as given.
        context: [batch, atom, embedding + 6] element embedding, centred x, zeros.
        weights: [batch, atom * head, atom] attention weights.
        mask: [batch, atom] bool, true for real atoms; None where there is no padding.
    """

    x: Tensor
    context: Tensor
    weights: Tensor
    mask: Tensor | None

    def repeated(self, count: int) -> Condition:
        """Return each entry `count` times, one after the other."""
        if count == 1:
            return self
        x, context, weights = (value.repeat_interleave(count, 0) for value in (self.x, self.context, self.weights))
        return Condition(
            x=x, context=context, weights=weights, mask=None if self.mask is None else self.mask.repeat_interleave(count, 0)
        )


class Coupling(nn.Module):
    """The two networks of one half update."""

    def __init__(self, sizes: TransformerSizes) -> None:
        super().__init__()
        self.scale = AtomTransformer(sizes)
        self.shift = AtomTransformer(sizes)

    def forward(self, features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return log s and t, each [batch, atom, 3]."""
        return self.scale(features, weights), self.shift(features, weights)


def to_latent(networks: Sequence[Networks], d: Tensor, v: Tensor, condition: Condition) -> tuple[Tensor, Tensor, Tensor]:
    """Return z_d, z_v [batch, atom, 3] and log |det dz/d(d, v)| [batch] float64 (density direction)."""
    halves, logdet = [d, v], d.new_zeros(len(d), dtype=torch.float64)
    for index, network in enumerate(networks):
        log_s, t = _coefficients(network, halves[1 - index % 2], condition)
        halves[index % 2] = halves[index % 2] * log_s.exp() + t
        logdet = logdet + log_s.double().sum((1, 2))
    return halves[0], halves[1], logdet


def to_data(networks: Sequence[Networks], z_d: Tensor, z_v: Tensor, condition: Condition) -> tuple[Tensor, Tensor, Tensor]:
    """Return d, v [batch, atom, 3] and log |det dz/d(d, v)| [batch] float64, of the same sign as `to_latent` gives."""
    halves, logdet = [z_d, z_v], z_d.new_zeros(len(z_d), dtype=torch.float64)
    for index, network in reversed(list(enumerate(networks))):
        log_s, t = _coefficients(network, halves[1 - index % 2], condition)
        halves[index % 2] = (halves[index % 2] - t) * torch.exp(-log_s)
        logdet = logdet + log_s.double().sum((1, 2))
    return halves[0], halves[1], logdet


def _coefficients(network: Networks, kept: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
    log_s, t = network(torch.cat([condition.context, kept], -1), condition.weights)
    if condition.mask is None:
        return log_s, t
    # padded atoms stay at zero and add nothing to the log-determinant
    real = condition.mask[..., None]
    return torch.where(real, log_s, 0.0), torch.where(real, t, 0.0)


def log_normal(value: Tensor, mask: Tensor | None = None, log_scale: Tensor | float = 0.0) -> Tensor:
    """Return log N(value; 0, exp(2 log_scale)) of [batch, atom, 3], summed over real atoms, [batch] float64."""
    log_scale = torch.as_tensor(log_scale, dtype=torch.float64, device=value.device)
    terms = -0.5 * (value.double() * torch.exp(-log_scale)).square() - log_scale - 0.5 * math.log(2 * math.pi)
    if mask is not None:
        terms = torch.where(mask[..., None], terms, 0.0)
    return terms.sum((1, 2))


class CartesianFlow(nn.Module):
    """The flow; one set of weights for every molecule of the elements C, H, N, O and S."""

    def __init__(self, architecture: CartesianArchitecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.log_scale_positions = nn.Parameter(torch.zeros(()))
        self.log_scale_auxiliaries = nn.Parameter(torch.zeros(()))
        self.embedding = nn.Embedding(len(ELEMENTS), architecture.embedding)
        self.couplings = nn.ModuleList(Coupling(architecture.network) for _ in range(architecture.couplings))
        self.lengthscales: Tensor
        self.register_buffer("lengthscales", torch.tensor(architecture.lengthscales_nm), persistent=False)

    @property
    def networks(self) -> list[Networks]:
        """The networks of all half updates, differentiable."""
        return list(self.couplings)

    def pack(self) -> list[Networks]:
        """Return the networks arranged for inference: equal to rounding, without gradient, of the weights as they are now."""
        packed: list[Networks] = []
        for coupling in self.couplings:
            assert isinstance(coupling, Coupling)  # for the type checker: a ModuleList forgets what it holds
            packed.append(PackedPair(coupling.scale, coupling.shift))
        return packed

    def condition(self, x: Tensor, elements: Tensor, mask: Tensor | None = None) -> Condition:
        """Return what the networks need to know of x.

        Args:
            x: [batch, atom, 3] nm.
            elements: [atom] or [batch, atom] indices from `element_indices`; any value at padding.
            mask: [batch, atom] bool, true for real atoms.
        """
        given = x
        if mask is None:
            centred = x - x.mean(1, keepdim=True)
        else:
            real = mask[..., None]
            given = torch.where(real, x, 0.0)
            centred = torch.where(real, given - given.sum(1, keepdim=True) / real.sum(1, keepdim=True), 0.0)
            elements = torch.where(mask, elements, 0)
        centred = centred.to(self.embedding.weight.dtype)
        embedded = self.embedding(elements).expand(len(x), -1, -1)
        context = torch.cat([embedded, centred, torch.zeros_like(centred)], -1)
        weights = attention_weights(centred, self.lengthscales, mask)
        return Condition(x=given, context=context, weights=weights, mask=mask)

    def log_prob(self, y: Tensor, v: Tensor, condition: Condition, networks: Sequence[Networks] | None = None) -> Tensor:
        """Return log q(y, v | x), [batch] float64, in nats per nm^{3N} and per unit of the auxiliaries.

        Args:
            y: [batch, atom, 3] nm.
            v: auxiliaries [batch, atom, 3].
            condition: from `condition`.
            networks: from `pack`; None for the differentiable ones.
        """
        dtype = self.embedding.weight.dtype
        d, v = (y - condition.x).to(dtype), v.to(dtype)
        if condition.mask is not None:
            real = condition.mask[..., None]
            d, v = torch.where(real, d, 0.0), torch.where(real, v, 0.0)
        z_d, z_v, logdet = to_latent(self.networks if networks is None else networks, d, v, condition)
        return self._log_base(z_d, z_v, condition.mask) + logdet

    def sample(
        self,
        condition: Condition,
        generator: torch.Generator,
        *,
        networks: Sequence[Networks] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw y, v and return them with log q(y, v | x), [batch] float64.

        Args:
            condition: from `condition`.
            generator: source of randomness.
            networks: from `pack`; None for the differentiable ones.
        """
        shape = condition.x.shape
        dtype, device = self.embedding.weight.dtype, self.embedding.weight.device
        # drawn where the generator lives, so that a stream gives the same proposals on every device
        z_d, z_v = (torch.randn(shape, generator=generator, dtype=dtype, device=generator.device).to(device) for _ in range(2))
        z_d, z_v = z_d * self.log_scale_positions.exp(), z_v * self.log_scale_auxiliaries.exp()
        if condition.mask is not None:
            real = condition.mask[..., None]
            z_d, z_v = torch.where(real, z_d, 0.0), torch.where(real, z_v, 0.0)
        d, v, logdet = to_data(self.networks if networks is None else networks, z_d, z_v, condition)
        return condition.x + d.to(condition.x.dtype), v, self._log_base(z_d, z_v, condition.mask) + logdet

    def _log_base(self, z_d: Tensor, z_v: Tensor, mask: Tensor | None) -> Tensor:
        return log_normal(z_d, mask, self.log_scale_positions) + log_normal(z_v, mask, self.log_scale_auxiliaries)

    def bind(self, system: System, *, label: int = 0) -> CartesianProposal:
        """Return q(. | .) as a proposal for a molecule.

        Raises:
            DataError: an element that the model does not know, or no such label.
        """
        if not 0 <= label < len(self.architecture.labels):
            raise DataError(f"the flow has the labels {', '.join(self.architecture.labels)}; none has index {label}")
        elements = element_indices(system.atomic_numbers, name=system.name).to(self.embedding.weight.device)
        return CartesianProposal(flow=self, system=system, elements=elements, centres=chiral_centres(system))

    def bound(self, system: System) -> BoundFlow:
        """Return the proposal of its only label for a molecule.

        Raises:
            DataError: an element that the model does not know.
        """
        proposal = self.bind(system)
        return BoundFlow(proposals={self.architecture.labels[0]: proposal}, independent=None, contains=proposal.contains)


@dataclass(frozen=True)
class CartesianProposal:
    """q(y, v_y | x) bound to one molecule, with the weights of the flow at the first use.

    The auxiliaries travel in `State.velocities` (dimensionless, N(0, 1); they are no physical velocities). `sample` and
    `log_prob` are densities of the pair (y, v_y). A kernel over positions alone uses `propose`, which draws every auxiliary
    fresh, one for each proposal on both sides of the ratio:

        log r = [log pi(y) + log N(v_y) + log q(x, v_x | y)] - [log pi(x) + log N(v_x) + log q(y, v_y | x)],   v_x ~ N(0, 1).

    Attributes:
        flow: the conditional flow.
        system: the molecule.
        elements: [atom] indices of its elements, on the device of the flow.
        centres: [centre, 4] from `chiral_centres`.
    """

    flow: CartesianFlow
    system: System
    elements: Tensor
    centres: Tensor

    @functools.cached_property
    def networks(self) -> list[Networks]:
        """The networks, arranged for inference."""
        return self.flow.pack()

    def sample(self, x: State, generator: torch.Generator) -> tuple[State, Tensor]:
        """Return (y, v_y) and log q(y, v_y | x), [batch] float64; NaN marks an invalid draw."""
        parts = [self._sample(block, generator) for block in self._blocks(x.positions)]
        y, v, log_q = (torch.cat(values) for values in zip(*parts, strict=True))
        return State(positions=y, velocities=v), log_q

    @torch.no_grad()
    def log_prob(self, y: State, x: State) -> Tensor:
        """Return log q(y, v_y | x), [batch] float64.

        Raises:
            DataError: y carries no auxiliaries.
        """
        if y.velocities is None:
            raise DataError("the density of a Cartesian proposal is that of positions and auxiliaries; give both")
        blocks = zip(*(self._blocks(value) for value in (y.positions, y.velocities, x.positions)), strict=True)
        return torch.cat([self._log_prob(*block) for block in blocks])

    @torch.no_grad()
    def propose(self, x: State, generator: torch.Generator) -> tuple[State, Tensor, Tensor]:
        """Draw y with one proposal per chain, for `longstride.mcmc.metropolis.metropolis`.

        Returns:
            y without auxiliaries, log q(y, v_y | x) - log N(v_y) and log q(x, v_x | y) - log N(v_x), [chain] float64.
        """
        parts = [self._propose(block, generator) for block in self._blocks(x.positions)]
        y, forward, backward = (torch.cat(values) for values in zip(*parts, strict=True))
        return State(positions=y), forward, backward

    @torch.no_grad()
    def propose_many(self, x: State, count: int, generator: torch.Generator) -> tuple[State, Tensor, Tensor]:
        """Draw `count` independent proposals from every x, each with auxiliaries of its own; x is prepared once.

        Returns:
            y of chain * count configurations, chain by chain, and the two terms of `propose`.
        """
        limit = self._block_size()
        if count <= limit:
            parts = [self._propose(block, generator, count=count) for block in x.positions.split(max(1, limit // count))]
        else:
            sizes = [min(limit, count - start) for start in range(0, count, limit)]
            parts = [self._propose(here, generator, count=size) for here in x.positions.split(1) for size in sizes]
        y, forward, backward = (torch.cat(values) for values in zip(*parts, strict=True))
        return State(positions=y), forward, backward

    def contains(self, x: State) -> Tensor:
        """Return whether chains may start at x, [batch] bool: everywhere, as the density covers all of space."""
        return torch.ones(len(x.positions), dtype=torch.bool, device=x.positions.device)

    def _propose(self, x: Tensor, generator: torch.Generator, *, count: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        y, v_y, log_forward = self._sample(x, generator, count=count)
        # v_x matters only here: the forward density does not see it
        v_x = torch.randn(v_y.shape, generator=generator, dtype=v_y.dtype, device=generator.device).to(v_y.device)
        log_backward = self._log_prob(x.repeat_interleave(count, 0), v_x, y)
        return y, log_forward - log_normal(v_y), log_backward - log_normal(v_x)

    @torch.no_grad()
    def _sample(self, x: Tensor, generator: torch.Generator, *, count: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Draw `count` proposals from each x, x by x."""
        condition = self.flow.condition(x.to(self.elements.device), self.elements)
        drawn = self.flow.sample(condition.repeated(count), generator, networks=self.networks)
        y, v, log_q = (value.to(x.device) for value in drawn)
        return y, v, torch.where(self._same_hand(x.repeat_interleave(count, 0), y), log_q, torch.nan)

    def _log_prob(self, y: Tensor, v: Tensor, x: Tensor) -> Tensor:
        device = self.elements.device
        condition = self.flow.condition(x.to(device), self.elements)
        log_q = self.flow.log_prob(y.to(device), v.to(device), condition, self.networks).to(x.device)
        return torch.where(self._same_hand(x, y), log_q, -torch.inf)

    def _same_hand(self, x: Tensor, y: Tensor) -> Tensor:
        return (handedness(x, self.centres) == handedness(y, self.centres)).all(-1)

    def _block_size(self) -> int:
        rows = BLOCK_ROWS if self.elements.device.type == "cpu" else BLOCK_ROWS_GPU
        return max(1, rows // len(self.elements))

    def _blocks(self, value: Tensor) -> tuple[Tensor, ...]:
        return value.split(self._block_size())
