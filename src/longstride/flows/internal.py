"""Conditional normalising flow over internal coordinates: the proposal q(y | x) of Timewarp, in 3N - 6 coordinates.

The density factorises along the time scales of a peptide,

    q(y | x, label) = prod_k q(t_k(y) | t_<k(y), t(x), label) * q(s(y) | t(y))

with t the free torsions (autoregressive circular mixtures) and s the stiff coordinates: bonds, angles and sibling
offsets (whitened by the covariance of the data, then affine couplings). Stiff coordinates
forget x(t) within about a picosecond, so beyond the torsions they carry no dependence on x. A label is a time lag tau
of the training pairs, or "independent": tau -> infinity, where x is not seen at all. An independent label carries
chains across barriers that no pair at a finite lag crosses; every label is exact on its own under Metropolis-Hastings.

Densities are with respect to Cartesian volume at fixed rigid motion: log q over internal coordinates minus
log prod b^2 sin(theta) (see `longstride.flows.zmatrix`), so that they compare with exp(-U/kT) directly. y is placed in
the frame of x. The kernel then leaves position and orientation alone and updates the internal coordinates; as
the target is the product of the rigid-motion measure and the internal density, such a conditional update leaves it
invariant, and it is reversible because the frame of y is the frame of x.

Domain. Bonds are positive, angles lie in (0, pi), and an offset stays within 90 degrees of its centre and, at a
tetrahedral atom, on its side of the plane, which fixes the handedness of every centre. The networks' range is larger than this
domain D. A draw outside D has log q = NaN and must be rejected; log q(y | x) of a y outside D is -inf. As D does not
depend on x, rejecting these draws leaves exp(-U/kT) restricted to D invariant; D leaves out only inverted centres,
which no dynamics reaches either.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longstride.errors import DataError
from longstride.flows import circular
from longstride.flows.bound import BoundFlow
from longstride.flows.transforms import AffineCoupling, Transform
from longstride.flows.zmatrix import Internals, ZMatrix, place_in_frame, wrap
from longstride.state import State

if TYPE_CHECKING:
    from longstride.state import System

HARMONICS = 3  # sin and cos of one, two and three times a torsion: threefold methyl barriers are linear in them
_CHIRAL_SINE = 0.5  # offsets with a larger |sin| belong to tetrahedral atoms, where the sign is the handedness


@dataclass(frozen=True, kw_only=True)
class FlowArchitecture:
    """Sizes of an `InternalFlow`.

    Attributes:
        lags_ps: time lags of the labels 0, 1, ...; the label after the last one is "independent".
        hidden: width of the torsion and coupling networks.
        couplings: affine couplings over the stiff coordinates.
        torsion_components: wrapped normals per free torsion.
    """

    lags_ps: tuple[float, ...]
    hidden: int = 64
    couplings: int = 6
    torsion_components: int = 12

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels, such as ("100 ps", "independent")."""
        return (*(f"{lag:g} ps" for lag in self.lags_ps), "independent")

    def to_meta(self) -> dict[str, Any]:
        """Return the sizes as JSON values."""
        return asdict(self)


def torsion_features(torsions: Tensor) -> Tensor:
    """Return sin and cos of the first harmonics, [..., 2 * HARMONICS * K], torsion by torsion, from [..., K] radian."""
    angles = torsions[..., None] * torch.arange(1, HARMONICS + 1, dtype=torsions.dtype, device=torsions.device)
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)


class TorsionNetwork(nn.Module):
    """q(t_k | t_<k, context) for all k: K small networks held as stacked weights, masked so that k sees only t_<k."""

    def __init__(self, n_torsions: int, n_context: int, hidden: int, components: int) -> None:
        super().__init__()
        self.n_torsions = n_torsions
        per_torsion = 2 * HARMONICS
        n_in = n_context + n_torsions * per_torsion
        sizes = ((n_in, hidden), (hidden, hidden), (hidden, circular.n_parameters(components)))
        self.weights = nn.ParameterList(torch.randn(n_torsions, a, b) / math.sqrt(a) for a, b in sizes)
        self.biases = nn.ParameterList(torch.zeros(n_torsions, 1, b) for _, b in sizes)
        with torch.no_grad():
            self.weights[-1].mul_(0.1)
            self.biases[-1].copy_(torch.randn(self.biases[-1].shape))  # components start at different angles
        visible = torch.tril(torch.ones(n_torsions, n_torsions), diagonal=-1).repeat_interleave(per_torsion, dim=1)
        self.mask: Tensor
        self.register_buffer("mask", torch.cat([torch.ones(n_torsions, n_context), visible], -1)[:, None], persistent=False)

    def parameters_of(self, features: Tensor, chosen: slice = slice(None)) -> Tensor:
        """Return mixture parameters [chosen torsion, batch, ...] from features [batch, context and torsions]."""
        h = features[None] * self.mask[chosen]
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            h = nn.functional.silu(torch.baddbmm(bias[chosen], h, weight[chosen]))
        return torch.baddbmm(self.biases[-1][chosen], h, self.weights[-1][chosen])

    def log_prob(self, torsions: Tensor, context: Tensor) -> Tensor:
        """Return sum_k log q(t_k | t_<k, context), [batch]."""
        features = torch.cat([context, torsion_features(torsions)], -1)
        parameters = self.parameters_of(features)
        return circular.log_prob(torsions.T, parameters).sum(0)

    def sample(self, context: Tensor, generator: torch.Generator) -> Tensor:
        """Return torsions [batch, K] drawn one after another."""
        torsions = context.new_zeros(len(context), self.n_torsions)
        for k in range(self.n_torsions):
            features = torch.cat([context, torsion_features(torsions)], -1)
            drawn = circular.sample(self.parameters_of(features, slice(k, k + 1))[0], generator)
            torsions = torsions.index_copy(1, torch.tensor([k], device=torsions.device), drawn[:, None])
        return torsions


class InternalFlow(nn.Module):
    """The conditional flow. Encoded configurations are (torsions [batch, K] radian, stiff [batch, S] centred values)."""

    def __init__(self, zmatrix: ZMatrix, architecture: FlowArchitecture) -> None:
        super().__init__()
        self.zmatrix, self.architecture = zmatrix, architecture
        n = zmatrix.n_atoms
        self.n_torsions, self.n_stiff = len(zmatrix.free), 2 * n - 3 + len(zmatrix.offsets)
        self.free: Tensor
        self.offsets: Tensor
        self.centre: Tensor
        self.whiten: Tensor
        self.register_buffer("free", torch.from_numpy(zmatrix.free), persistent=False)
        self.register_buffer("offsets", torch.from_numpy(zmatrix.offsets), persistent=False)
        self.register_buffer("centre", torch.zeros(self.n_stiff, dtype=torch.float64))
        self.register_buffer("whiten", torch.eye(self.n_stiff, dtype=torch.float64))
        n_features = 2 * HARMONICS * self.n_torsions
        size = architecture
        self.torsion_network = TorsionNetwork(self.n_torsions, n_features + 2, size.hidden, size.torsion_components)
        transforms: list[Transform] = []
        shuffle = torch.Generator().manual_seed(0)  # part of the architecture, not of the run's random streams
        mask = torch.zeros(self.n_stiff, dtype=torch.bool)
        for index in range(size.couplings):
            if index % 2 == 0:
                mask = torch.zeros(self.n_stiff, dtype=torch.bool)
                mask[torch.randperm(self.n_stiff, generator=shuffle)[: (self.n_stiff + 1) // 2]] = True
            else:
                mask = ~mask
            transforms.append(AffineCoupling(mask, n_features, size.hidden))
        self.transforms = nn.ModuleList(transforms)

    @torch.no_grad()
    def set_statistics(self, internals: Internals) -> None:
        """Centre and standardise the stiff coordinates by the training configurations (mean and full covariance).

        Raises:
            DataError: fewer configurations than twice the stiff coordinates, whose covariance is then singular.
        """
        offsets = internals.dihedrals[:, self.offsets]
        circular_mean = torch.atan2(offsets.sin().mean(0), offsets.cos().mean(0))
        raw = torch.cat([internals.bonds, internals.angles, wrap(offsets - circular_mean)], -1)
        if len(raw) < 2 * self.n_stiff:
            raise DataError(
                f"{len(raw)} training frames are too few for {self.n_stiff} stiff coordinates; lengthen the reference"
            )
        mean = raw.mean(0)
        mean[-len(self.offsets) :] += circular_mean if len(self.offsets) else 0.0
        self.centre.copy_(mean)
        self.whiten.copy_(torch.linalg.inv(torch.linalg.cholesky(torch.cov(raw.T))))

    def encode(self, internals: Internals) -> tuple[Tensor, Tensor]:
        """Return torsions [batch, K] and centred stiff coordinates [batch, S], float64."""
        stiff = torch.cat([internals.bonds, internals.angles, internals.dihedrals[:, self.offsets]], -1) - self.centre
        n = 2 * self.zmatrix.n_atoms - 3
        return internals.dihedrals[:, self.free], torch.cat([stiff[:, :n], wrap(stiff[:, n:])], -1)

    def decode(self, torsions: Tensor, stiff: Tensor) -> tuple[Internals, Tensor]:
        """Return the internal coordinates of encoded values, and whether each configuration lies in the domain, [batch]."""
        n_bonds = self.zmatrix.n_atoms - 1
        bonds, angles, offsets = (stiff + self.centre).split([n_bonds, n_bonds - 1, len(self.offsets)], dim=-1)
        dihedrals = torsions.new_zeros(len(torsions), self.zmatrix.n_atoms - 3, dtype=stiff.dtype)
        dihedrals = dihedrals.index_copy(1, self.free, torsions.to(stiff.dtype)).index_copy(1, self.offsets, wrap(offsets))
        inside = (bonds > 0).all(-1) & (angles > 0).all(-1) & (angles < math.pi).all(-1) & self.contains(stiff)
        return Internals(bonds=bonds, angles=angles, dihedrals=dihedrals), inside

    def contains(self, stiff: Tensor) -> Tensor:
        """Return whether the offsets of centred stiff coordinates [batch, S] lie in the domain, [batch] bool."""
        deviation, centre = stiff[:, 2 * self.zmatrix.n_atoms - 3 :], self.centre[2 * self.zmatrix.n_atoms - 3 :]
        same_side = ((deviation + centre).sin() * centre.sin() > 0) | (centre.sin().abs() < _CHIRAL_SINE)
        return ((deviation.abs() < math.pi / 2) & same_side).all(-1)

    def context(self, torsions_x: Tensor, label: int | Tensor) -> Tensor:
        """Return [batch, context]: features of x (zero for the independent label), log tau, and the independent flag."""
        lags = torch.tensor([*self.architecture.lags_ps, 1.0], dtype=torsions_x.dtype, device=torsions_x.device)
        index = torch.as_tensor(label, device=torsions_x.device).expand(len(torsions_x))
        seen = (index < len(self.architecture.lags_ps)).to(torsions_x.dtype)[:, None]
        return torch.cat([torsion_features(torsions_x) * seen, lags[index].log10()[:, None], 1.0 - seen], -1)

    def log_prob_torsions(self, torsions_y: Tensor, torsions_x: Tensor, label: int | Tensor) -> Tensor:
        """Return log q(t(y) | t(x), label), [batch], density per radian^K. label: one index, or one per batch entry."""
        return self.torsion_network.log_prob(torsions_y, self.context(torsions_x, label))

    def log_prob_stiff(self, stiff: Tensor, torsions: Tensor) -> Tensor:
        """Return log q(s | t), [batch] float64, density of the centred stiff coordinates."""
        dtype = self.network_dtype
        context = torsion_features(torsions.to(dtype))
        z = (stiff.double() @ self.whiten.T).to(dtype)
        total = self.whiten.diagonal().log().sum().expand(len(z))
        for transform in self.transforms:
            z, logdet = transform(z, context)
            total = total + logdet
        return total - 0.5 * z.double().square().sum(-1) - 0.5 * self.n_stiff * math.log(2 * math.pi)

    def sample_stiff(self, torsions: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return stiff coordinates [batch, S] and log q(s | t) [batch], float64; differentiable in the weights."""
        dtype = self.network_dtype
        context = torsion_features(torsions.to(dtype))
        z = torch.randn(len(torsions), self.n_stiff, generator=generator, dtype=dtype, device=context.device)
        total = self.whiten.diagonal().log().sum() - 0.5 * self.n_stiff * math.log(2 * math.pi)
        total = total - 0.5 * z.double().square().sum(-1)
        for transform in reversed(self.transforms):
            assert isinstance(transform, Transform)  # for the type checker: a ModuleList forgets what it holds
            z, logdet = transform.inverse(z, context)
            total = total + logdet
        return torch.linalg.solve_triangular(self.whiten, z.double().T, upper=False).T, total

    @property
    def network_dtype(self) -> torch.dtype:
        """Precision of the networks; internal coordinates and sums stay in float64."""
        return self.torsion_network.weights[0].dtype

    def bind(self, system: System, *, label: int = 0) -> FlowProposal:
        """Return q(. | ., label) as a `Proposal` for a molecule.

        Raises:
            DataError: the molecule has another number of atoms, or there is no such label.
        """
        if system.n_atoms != self.zmatrix.n_atoms:
            raise DataError(f"the flow was trained for {self.zmatrix.n_atoms} atoms and {system.name!r} has {system.n_atoms}")
        if not 0 <= label <= len(self.architecture.lags_ps):
            raise DataError(f"the flow has the labels {', '.join(self.architecture.labels)}; none has index {label}")
        return FlowProposal(flow=self, system=system, label=label)

    def bound(self, system: System) -> BoundFlow:
        """Return the proposals of all labels for a molecule.

        Raises:
            DataError: the molecule has another number of atoms.
        """
        labels = self.architecture.labels
        proposals = {name: self.bind(system, label=index) for index, name in enumerate(labels)}
        return BoundFlow(proposals=proposals, independent=labels[-1], contains=proposals[labels[-1]].contains)


@dataclass(frozen=True, kw_only=True)
class FlowProposal:
    """q(y | x, label) bound to one molecule; densities per Cartesian volume at fixed rigid motion, in nm.

    Attributes:
        flow: the conditional flow.
        system: the molecule.
        label: index into `flow.architecture.labels`.
    """

    flow: InternalFlow
    system: System
    label: int

    def sample(self, x: State, generator: torch.Generator) -> tuple[State, Tensor]:
        """Return y in the frame of x, and log q(y | x) [batch] float64, NaN where y left the domain (reject it)."""
        y, log_forward, _ = self.propose(x, generator)
        return y, log_forward

    @torch.no_grad()
    def propose(self, x: State, generator: torch.Generator) -> tuple[State, Tensor, Tensor]:
        """Return y, log q(y | x) and log q(x | y); as `sample` and `log_prob`, with each coordinate converted only once."""
        flow, dtype = self.flow, self.flow.network_dtype
        here = x.positions.double()
        internals_x = flow.zmatrix.from_cartesian(here)
        torsions_x, stiff_x = flow.encode(internals_x)
        context = flow.context(torsions_x.to(dtype), self.label)
        torsions_y = flow.torsion_network.sample(context, generator)
        stiff_y, log_stiff_y = flow.sample_stiff(torsions_y, generator)
        internals_y, inside = flow.decode(torsions_y, stiff_y)
        canonical = flow.zmatrix.to_cartesian(internals_y)
        log_measure = flow.zmatrix.log_measure(internals_y, canonical)
        log_forward = flow.torsion_network.log_prob(torsions_y, context) + log_stiff_y - log_measure
        y = place_in_frame(canonical, *flow.zmatrix.frame(here))
        log_backward = self._log_prob(torsions_x, stiff_x, torsions_y) - flow.zmatrix.log_measure(internals_x, here)
        return State(positions=y.to(x.positions.dtype)), torch.where(inside, log_forward, torch.nan), log_backward

    @torch.no_grad()
    def log_prob(self, y: State, x: State) -> Tensor:
        """Return log q(y | x), [batch] float64; -inf where y lies outside the domain."""
        torsions_x, _ = self.flow.encode(self.flow.zmatrix.from_cartesian(x.positions.double()))
        there = y.positions.double()
        internals = self.flow.zmatrix.from_cartesian(there)
        log_q = self._log_prob(*self.flow.encode(internals), torsions_x)
        return log_q - self.flow.zmatrix.log_measure(internals, there)

    def _log_prob(self, torsions: Tensor, stiff: Tensor, given: Tensor) -> Tensor:
        """Return log q of encoded values given the torsions of the condition, before the measure, [batch]."""
        dtype = self.flow.network_dtype
        log_torsions = self.flow.log_prob_torsions(torsions.to(dtype), given.to(dtype), self.label)
        log_q = log_torsions + self.flow.log_prob_stiff(stiff, torsions)
        return torch.where(self.flow.contains(stiff), log_q, -torch.inf)

    def contains(self, x: State) -> Tensor:
        """Return whether each configuration lies in the domain, [batch] bool; chains must start there."""
        return self.flow.contains(self.flow.encode(self.flow.zmatrix.from_cartesian(x.positions.double()))[1])
