"""Kernel self-attention and the atom transformer built on it, as in Timewarp (arXiv:2302.01170, equations 10 and 11).

The weights of atom i on atom j in head h depend on the conditioning positions x alone,

    w_ij^h = exp(-|x_i - x_j|^2 / l_h^2) / (sum_j' exp(-|x_i - x_j'|^2 / l_h^2) + 1e-5),

so they are computed once for each x (`attention_weights`) and serve every layer of every network and every proposal from
that x. There are no queries and keys. Each head is as wide as the model; the projections have no bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

REGULARISER = 1e-5  # keeps the weights finite where a row is fully masked; part of the published definition


def attention_weights(x: Tensor, lengthscales: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the weights of one set of conditioning positions.

    Args:
        x: [batch, atom, 3] nm.
        lengthscales: [head] nm.
        mask: [batch, atom] bool, true for real atoms; padding gets weight zero as a column and is never seen.

    Returns:
        [batch, atom * head, atom], rows ordered atom by atom. The layout makes `weights @ features` of
        features [batch, atom, size] the heads of each atom side by side in memory.
    """
    squared = (x[:, :, None] - x[:, None]).square().sum(-1)
    kernel = torch.exp(-squared[:, :, None] / lengthscales.square()[:, None])
    if mask is not None:
        # a padded atom may lie anywhere, so that its distance may be anything, also infinite
        kernel = torch.where(mask[:, None, None], kernel, 0.0)
    return (kernel / (kernel.sum(-1, keepdim=True) + REGULARISER)).flatten(1, 2)


@dataclass(frozen=True, kw_only=True)
class TransformerSizes:
    """Sizes of one `AtomTransformer`.

    Attributes:
        n_in: features per atom that enter.
        width: width of the model, and of each attention head.
        feed_forward: hidden width of the feed-forward blocks.
        hidden: hidden width of the perceptrons at both ends.
        layers: encoder layers.
        heads: attention heads.
    """

    n_in: int
    width: int
    feed_forward: int
    hidden: int
    layers: int
    heads: int


class KernelSelfAttention(nn.Module):
    """r_i -> W_o [sum_j w_ij^1 V_1 r_j, ..., sum_j w_ij^H V_H r_j], with weights that are given."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.values = nn.Linear(width, heads * width, bias=False)
        self.out = nn.Linear(heads * width, width, bias=False)

    def forward(self, r: Tensor, weights: Tensor) -> Tensor:
        """Map r [batch, atom, width] with weights [batch, atom * head, atom] to [batch, atom, width]."""
        batch, n, width = r.shape
        values = self.values(r).view(batch, n, self.heads, width)
        weights = weights.unflatten(1, (n, self.heads)).expand(batch, n, self.heads, n)
        heads = torch.einsum("bnhm,bmhw->bnhw", weights, values)
        return self.out(heads.flatten(2))

    def folded(self) -> Tensor:
        """Return V and W_o as one matrix [head * width, width] that maps (sum_j w_ij^h r_j)_h to the output.

        W_o^h V_h r is one matrix per head, so a third of the attention's multiplications need not be done.
        """
        width = self.out.out_features
        values = self.values.weight.view(self.heads, width, width)
        out = self.out.weight.view(width, self.heads, width)
        return torch.einsum("hvr,ohv->hro", values.double(), out.double()).flatten(0, 1).to(self.out.weight.dtype)


class EncoderLayer(nn.Module):
    """Post-norm encoder layer: h = LN(h + Attention(h)); h = LN(h + W2 relu(W1 h))."""

    def __init__(self, sizes: TransformerSizes) -> None:
        super().__init__()
        self.attention = KernelSelfAttention(sizes.width, sizes.heads)
        self.widen = nn.Linear(sizes.width, sizes.feed_forward)
        self.narrow = nn.Linear(sizes.feed_forward, sizes.width)
        self.norm_attention = nn.LayerNorm(sizes.width)
        self.norm_feed_forward = nn.LayerNorm(sizes.width)

    def forward(self, h: Tensor, weights: Tensor) -> Tensor:
        """Map [batch, atom, width] to the same shape."""
        h = self.norm_attention(h + self.attention(h, weights))
        return self.norm_feed_forward(h + self.narrow(torch.relu(self.widen(h))))


def perceptron(n_in: int, hidden: int, n_out: int) -> nn.Sequential:
    """Return Linear, SiLU, Linear."""
    return nn.Sequential(nn.Linear(n_in, hidden), nn.SiLU(), nn.Linear(hidden, n_out))


class AtomTransformer(nn.Module):
    """Three numbers per atom from features per atom: perceptron, encoder layers, perceptron."""

    def __init__(self, sizes: TransformerSizes) -> None:
        super().__init__()
        self.enter = perceptron(sizes.n_in, sizes.hidden, sizes.width)
        self.layers = nn.ModuleList(EncoderLayer(sizes) for _ in range(sizes.layers))
        self.leave = perceptron(sizes.width, sizes.hidden, 3)

    def forward(self, features: Tensor, weights: Tensor) -> Tensor:
        """Map features [batch, atom, n_in] and weights [batch or 1, atom * head, atom] to [batch, atom, 3]."""
        h = self.enter(features)
        for layer in self.layers:
            h = layer(h, weights)
        return self.leave(h)


class PackedPair:
    """Two `AtomTransformer`s of equal sizes on the same input, arranged for inference: equal numbers up to rounding.

    Both networks advance together as batched matrix products over all proposals and atoms, and value and output projections of
    the attention are folded into one matrix. Weights are copied, without gradient: make a new one when they change.
    """

    def __init__(self, first: AtomTransformer, second: AtomTransformer, *, compile: bool = False) -> None:
        both = (first, second)
        self._enter = _pack_perceptron([network.enter for network in both])
        self._leave = _pack_perceptron([network.leave for network in both])
        self._layers = [_pack_layer(pair) for pair in zip(first.layers, second.layers, strict=True)]
        # one compiled function serves all layers of all networks, whose shapes are the same
        self._run = torch.compile(_encoder_layer, dynamic=False) if compile else _encoder_layer

    def __call__(self, features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Map features [batch, atom, n_in] and weights [batch or 1, atom * head, atom] to both results [batch, atom, 3]."""
        batch, n, size = features.shape
        h = _apply_perceptron(self._enter, features.reshape(1, batch * n, size).expand(2, -1, -1))
        for layer in self._layers:
            h = self._run(h, weights, layer)
        first, second = _apply_perceptron(self._leave, h).view(2, batch, n, 3)
        return first, second


_EPS = nn.LayerNorm(1).eps


def _encoder_layer(h: Tensor, weights: Tensor, layer: tuple[Tensor, ...]) -> Tensor:
    """One encoder layer of two networks, [2, batch * atom, width]."""
    folded, gain_attention, bias_attention, widen, widen_bias, narrow, narrow_bias, gain, bias = layer
    _, rows, width = h.shape
    n = weights.shape[-1]
    gathered = torch.matmul(weights, h.view(2, rows // n, n, width)).view(2, rows, -1)
    h = torch.baddbmm(h, gathered, folded)
    h = torch.addcmul(bias_attention, nn.functional.layer_norm(h, (width,), eps=_EPS), gain_attention)
    inner = torch.baddbmm(widen_bias, h, widen).relu_()
    h = torch.baddbmm(narrow_bias, inner, narrow).add_(h)
    return torch.addcmul(bias, nn.functional.layer_norm(h, (width,), eps=_EPS), gain)


def _pack_layer(layers: tuple[nn.Module, nn.Module]) -> tuple[Tensor, ...]:
    first, second = layers
    assert isinstance(first, EncoderLayer)  # for the type checker: a ModuleList forgets what it holds
    assert isinstance(second, EncoderLayer)
    both = (first, second)
    return (
        torch.stack([layer.attention.folded() for layer in both]).detach(),
        *_pack_norm([layer.norm_attention for layer in both]),
        *_pack_linear([layer.widen for layer in both]),
        *_pack_linear([layer.narrow for layer in both]),
        *_pack_norm([layer.norm_feed_forward for layer in both]),
    )


def _pack_linear(layers: list[nn.Linear]) -> tuple[Tensor, Tensor]:
    weight = torch.stack([layer.weight.detach().T for layer in layers]).contiguous()
    return weight, torch.stack([layer.bias.detach() for layer in layers])[:, None]


def _pack_norm(layers: list[nn.LayerNorm]) -> tuple[Tensor, Tensor]:
    gain, bias = (torch.stack([getattr(layer, name).detach() for layer in layers])[:, None] for name in ("weight", "bias"))
    return gain, bias


def _pack_perceptron(both: list[nn.Sequential]) -> tuple[Tensor, ...]:
    first = [layers[0] for layers in both]
    last = [layers[2] for layers in both]
    return (*_pack_linear(first), *_pack_linear(last))  # type: ignore[arg-type]


def _apply_perceptron(packed: tuple[Tensor, ...], x: Tensor) -> Tensor:
    first, first_bias, last, last_bias = packed
    return torch.baddbmm(last_bias, nn.functional.silu(torch.baddbmm(first_bias, x, first), inplace=True), last)
