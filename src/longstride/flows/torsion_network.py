"""Transferable density of the free torsions, q(t(y) | t(x), label): one set of weights for every molecule.

    q(t | t_x, label) = prod_k p(t_k | t_<k, t_x, label)

Each factor is a circular mixture (`longstride.flows.circular`) in the folded angle n_k t_k, n_k the symmetry number, so that
equivalent rotor positions are exactly equally likely. Molecules enter through force-field features only
(`longstride.flows.torsion_features`): messages along the bonds make atom vectors, four of them and the force field's own
torsion profile make the token of a torsion, and a causal transformer over these tokens with biases by graph distance
reads the torsions that are already drawn. Torsions of x enter through a second, bidirectional stack; the independent
label (tau to infinity) does not see x.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longstride.flows import circular
from longstride.flows.torsion_features import ELEMENTS, FARTHEST, PROFILE_HARMONICS, TorsionFeatures, reduced
from longstride.flows.zmatrix import TWO_PI, wrap

if TYPE_CHECKING:
    from collections.abc import Sequence

ATOM_FEATURES = len(ELEMENTS) + 4 + 5
HARMONICS = 4


@dataclass(frozen=True, kw_only=True)
class TorsionArchitecture:
    """Sizes of a `TorsionNetwork`.

    Attributes:
        lags_ps: time lags of the labels 0, 1, ...; the label after the last one is "independent".
        width: of tokens and atom vectors.
        heads: attention heads.
        layers: causal layers over the torsions drawn so far.
        condition_layers: bidirectional layers over the torsions of x.
        message_rounds: rounds of messages along the bonds.
        components: wrapped normals per torsion.
    """

    lags_ps: tuple[float, ...] = ()
    width: int = 64
    heads: int = 4
    layers: int = 3
    condition_layers: int = 1
    message_rounds: int = 4
    components: int = 12

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels, such as ("100 ps", "independent")."""
        return (*(f"{lag:g} ps" for lag in self.lags_ps), "independent")

    def to_meta(self) -> dict[str, Any]:
        """Return the sizes as JSON values."""
        return asdict(self)


def _perceptron(n_in: int, hidden: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_in, hidden), nn.SiLU(), nn.Linear(hidden, n_out))


def harmonics(angles: Tensor) -> Tensor:
    """Return cos and sin of the first harmonics of angles [...], [..., 2 * HARMONICS]."""
    multiples = angles[..., None] * torch.arange(1, HARMONICS + 1, dtype=angles.dtype, device=angles.device)
    return torch.cat([multiples.cos(), multiples.sin()], -1)


class AtomEncoder(nn.Module):
    """Atom vectors [atom, width] from force-field features, by messages along the bonds."""

    def __init__(self, width: int, rounds: int) -> None:
        super().__init__()
        self.first = _perceptron(ATOM_FEATURES, width, width)
        self.messages = nn.ModuleList(_perceptron(2 * width, width, width) for _ in range(rounds))
        self.updates = nn.ModuleList(_perceptron(2 * width, width, width) for _ in range(rounds))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(rounds))

    def forward(self, features: TorsionFeatures) -> Tensor:
        """Map the atoms of one molecule, or of several joined into one graph."""
        h = self.first(features.atoms)
        source, target = features.bonds
        for message, update, norm in zip(self.messages, self.updates, self.norms, strict=True):
            sent = message(torch.cat([h[source], h[target]], -1))
            received = torch.zeros_like(h).index_add(0, target, sent.to(h.dtype))
            h = norm(h + update(torch.cat([h, received], -1)))
        return h


class TokenEncoder(nn.Module):
    """Tokens [torsion, width] of the free torsions of one molecule."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.substituent = _perceptron(width + 2, width, width)
        self.token = _perceptron(6 * width + 4 * PROFILE_HARMONICS + 5, 2 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, atoms: Tensor, features: TorsionFeatures) -> Tensor:
        """Combine the four atoms, what else sits at both ends and where, and the torsion profile."""
        ends = atoms[features.ends].flatten(1)
        present = (features.substituents >= 0)[..., None]
        around = self.substituent(torch.cat([atoms[features.substituents.clamp(min=0)], features.placements], -1))
        pooled = torch.where(present, around, 0.0).sum(2).flatten(1)
        profile = torch.asinh(features.profiles)
        return self.norm(self.token(torch.cat([ends, pooled, profile, features.kinds], -1)))


class Layer(nn.Module):
    """Pre-norm attention with an additive bias per head, then a perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.pair = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.inner = _perceptron(width, 2 * width, width)
        self.bias = nn.Embedding(FARTHEST + 1, heads)
        nn.init.zeros_(self.bias.weight)

    def keys_values(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of tokens h [batch, token, width], each [batch, head, token, size]."""
        keys, values = self.pair(self.norm1(h)).chunk(2, -1)
        return self._split(keys), self._split(values)

    def attend(self, h: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """Return updated tokens h [batch, token, width]; bias [batch or 1, head, token, key], -inf where hidden."""
        query = self._split(self.query(self.norm1(h)))
        mixed = nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=bias)
        h = h + self.out(mixed.transpose(1, 2).flatten(2))
        return h + self.inner(self.norm2(h))

    def _split(self, h: Tensor) -> Tensor:
        return h.unflatten(-1, (self.heads, -1)).transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Static tokens of the molecules of a batch, padded to the longest.

    Attributes:
        tokens: [molecule, torsion, width].
        distances: [molecule, torsion, torsion] int64.
        present: [molecule, torsion] bool.
        symmetry: [molecule, torsion], 1 in the padding.
    """

    tokens: Tensor
    distances: Tensor
    present: Tensor
    symmetry: Tensor

    def repeat(self, count: int) -> Tokens:
        """Return every molecule `count` times in a row."""
        return Tokens(**{name: value.repeat_interleave(count, 0) for name, value in vars(self).items()})


class TorsionNetwork(nn.Module):
    """q(t | t_x, label) for every molecule. Torsions are [batch, torsion] radian, the batch as in `Tokens`."""

    def __init__(self, architecture: TorsionArchitecture) -> None:
        super().__init__()
        self.architecture = size = architecture
        self.atoms = AtomEncoder(size.width, size.message_rounds)
        self.tokens = TokenEncoder(size.width)
        self.start = nn.Parameter(torch.zeros(2 * HARMONICS))
        self.enter = _perceptron(2 * size.width + 2 * HARMONICS, size.width, size.width)
        self.enter_x = _perceptron(size.width + 2 * HARMONICS, size.width, size.width)
        self.label = _perceptron(2, size.width, size.width)
        self.condition = nn.ModuleList(Layer(size.width, size.heads) for _ in range(size.condition_layers))
        self.causal = nn.ModuleList(Layer(size.width, size.heads) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.out = nn.Linear(size.width, circular.n_parameters(size.components))
        with torch.no_grad():
            self.out.weight.mul_(0.1)
            self.out.bias.copy_(torch.randn(self.out.bias.shape))  # components start at different angles

    def encode(self, molecules: Sequence[TorsionFeatures]) -> Tokens:
        """Return the static tokens of molecules."""
        vectors = [self.tokens(self.atoms(features), features) for features in molecules]
        longest = max(len(item) for item in vectors)
        pad = [longest - len(item) for item in vectors]
        functional = nn.functional
        return Tokens(
            tokens=torch.stack([functional.pad(item, (0, 0, 0, p)) for item, p in zip(vectors, pad, strict=True)]),
            distances=torch.stack(
                [functional.pad(m.distances, (0, p, 0, p), value=FARTHEST) for m, p in zip(molecules, pad, strict=True)]
            ),
            present=torch.stack([torch.arange(longest, device=item.device) < len(item) for item in vectors]),
            symmetry=torch.stack([functional.pad(m.symmetry, (0, p), value=1.0) for m, p in zip(molecules, pad, strict=True)]),
        )

    def context(self, tokens: Tokens, t_x: Tensor, label: Tensor) -> Tensor:
        """Return what each torsion knows of x and of the label, [batch, torsion, width].

        Args:
            tokens: of the batch.
            t_x: torsions of x.
            label: [batch] int64.
        """
        lags = torch.tensor([*self.architecture.lags_ps, 1.0], dtype=t_x.dtype, device=t_x.device)
        seen = (label < len(self.architecture.lags_ps)).to(t_x.dtype)[:, None]
        lag = self.label(torch.cat([lags[label].log10()[:, None], 1.0 - seen], -1))[:, None]
        h = self.enter_x(torch.cat([tokens.tokens, harmonics(reduced(t_x, tokens.symmetry))], -1)) + lag
        hidden = torch.zeros_like(tokens.present, dtype=t_x.dtype).masked_fill(~tokens.present, -torch.inf)
        for layer in self.condition:
            assert isinstance(layer, Layer)  # for the type checker: a ModuleList forgets what it holds
            bias = layer.bias(tokens.distances).permute(0, 3, 1, 2) + hidden[:, None, None]
            h = layer.attend(h, *layer.keys_values(h), bias)
        return h * seen[..., None] + lag

    def _entries(self, tokens: Tokens, context: Tensor, angles: Tensor) -> Tensor:
        """Return what enters the causal stack at torsion k: its token, the torsion before it, and the context."""
        features = harmonics(reduced(angles, tokens.symmetry))
        before = torch.cat([self.start.expand(len(features), 1, -1), features[:, :-1]], 1)
        token_before = torch.cat([torch.zeros_like(tokens.tokens[:, :1]), tokens.tokens[:, :-1]], 1)
        return self.enter(torch.cat([tokens.tokens, token_before, before], -1)) + context

    @staticmethod
    def _bias(layer: Layer, tokens: Tokens) -> Tensor:
        """Return the additive bias of the causal stack; key j carries torsion j - 1."""
        shifted = torch.cat([tokens.distances[:, :, :1], tokens.distances[:, :, :-1]], 2)
        return layer.bias(shifted).permute(0, 3, 1, 2)

    def log_prob(self, tokens: Tokens, t: Tensor, context: Tensor) -> Tensor:
        """Return log q(t | context), [batch]; the padding counts nothing."""
        h = self._entries(tokens, context, t)
        length = t.shape[1]
        causal = torch.full((length, length), -torch.inf, dtype=t.dtype, device=t.device).triu(1)
        for layer in self.causal:
            assert isinstance(layer, Layer)
            h = layer.attend(h, *layer.keys_values(h), self._bias(layer, tokens) + causal)
        parameters = self.out(self.norm(h))
        # under autocast the density itself keeps its precision
        parameters = parameters.to(torch.promote_types(parameters.dtype, t.dtype))
        log_p = circular.log_prob(reduced(t, tokens.symmetry), parameters)
        return torch.where(tokens.present, log_p, 0.0).sum(-1)

    def sample(self, tokens: Tokens, context: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return torsions drawn one after another, and log q of them [batch]; zeros in the padding."""
        batch, length, _ = tokens.tokens.shape
        t = context.new_zeros(batch, length)
        total = context.new_zeros(batch)
        cache: list[list[Tensor]] = [[] for _ in range(2 * len(self.causal))]
        biases = [self._bias(layer, tokens) for layer in self.causal if isinstance(layer, Layer)]
        previous, token_before = self.start.expand(batch, -1), torch.zeros_like(tokens.tokens[:, 0])
        for k in range(length):
            entry = torch.cat([tokens.tokens[:, k], token_before, previous], -1)
            h = (self.enter(entry) + context[:, k])[:, None]
            for index, (layer, bias) in enumerate(zip(self.causal, biases, strict=True)):
                assert isinstance(layer, Layer)
                for slot, item in zip(cache[2 * index : 2 * index + 2], layer.keys_values(h), strict=True):
                    slot.append(item)
                keys, values = (torch.cat(slot, 2) for slot in cache[2 * index : 2 * index + 2])
                h = layer.attend(h, keys, values, bias[:, :, k : k + 1, : k + 1])
            parameters = self.out(self.norm(h[:, 0]))
            folded = circular.sample(parameters, generator)
            symmetry = tokens.symmetry[:, k].to(folded.dtype)
            # one of the n equivalent positions, each equally likely
            turn = (torch.rand(batch, generator=generator, dtype=folded.dtype, device=folded.device) * symmetry).floor()
            drawn = wrap((folded + TWO_PI * turn) / symmetry)
            total = total + torch.where(tokens.present[:, k], circular.log_prob(folded, parameters), 0.0)
            t[:, k] = torch.where(tokens.present[:, k], drawn, 0.0)
            previous, token_before = harmonics(folded), tokens.tokens[:, k]
        return t, total


def log_uniform(count: int) -> float:
    """Return log q of `count` uniform torsions, the scale on which to read a likelihood."""
    return -count * math.log(TWO_PI)
