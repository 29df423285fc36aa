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


class PackedTransformer:
    """An `AtomTransformer` arranged for inference: equal numbers up to rounding, fewer operations, larger matrix products.

    All proposals and atoms are rows of one matrix, and value and output projections of the attention are folded into one
    matrix. Weights are copied, without gradient: make a new one when they change.
    """

    def __init__(self, network: AtomTransformer) -> None:
        self._enter, self._leave = _pack_perceptron(network.enter), _pack_perceptron(network.leave)
        self._layers = [_PackedLayer(layer) for layer in network.layers]

    def __call__(self, features: Tensor, weights: Tensor) -> Tensor:
        """As `AtomTransformer.forward`."""
        batch, n, _ = features.shape
        h = _apply_perceptron(self._enter, features.flatten(0, 1))
        for layer in self._layers:
            gathered = torch.matmul(weights, h.view(batch, n, -1)).view(batch * n, -1)
            h = layer(h, gathered)
        return _apply_perceptron(self._leave, h).view(batch, n, 3)


class PackedPair:
    """The two networks of a half update, arranged for inference."""

    def __init__(self, first: AtomTransformer, second: AtomTransformer) -> None:
        self._both = (PackedTransformer(first), PackedTransformer(second))

    def __call__(self, features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Map features [batch, atom, n_in] and weights [batch or 1, atom * head, atom] to both results [batch, atom, 3]."""
        first, second = self._both
        return first(features, weights), second(features, weights)


class PackedLinear:
    """x -> x W^T + b of rows x, with W laid out once for the fastest product at hand.

    On a CPU in single precision that is oneDNN's blocked layout, which also applies the activation on the way (measured on one
    core: 103-113 GFLOP/s, against 92-99 of the general product).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        weight = weight.detach()
        self._bias = None if bias is None else bias.detach().clone()
        self._blocked = weight.device.type == "cpu" and weight.dtype is torch.float32 and _onednn_available()
        if self._blocked:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _TYPICAL_ROWS)
        else:
            self._weight = weight.T.contiguous()

    def __call__(self, x: Tensor, *, relu: bool = False) -> Tensor:
        """Map rows [row, n_in] to [row, n_out], with relu on top where asked for."""
        if self._blocked:
            activation = "relu" if relu else "none"
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, activation, [], "")
        y = x @ self._weight if self._bias is None else torch.addmm(self._bias, x, self._weight)
        return y.relu_() if relu else y


_TYPICAL_ROWS = 704  # a hint for the layout; any number of rows works


def _onednn_available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class _PackedLayer:
    """The encoder layer on rows h, given the attention's gathered rows (sum_j w_ij^h h_j)_h."""

    def __init__(self, layer: nn.Module) -> None:
        assert isinstance(layer, EncoderLayer)  # for the type checker: a ModuleList forgets what it holds
        self._attention = PackedLinear(layer.attention.folded().T, None)
        self._widen = PackedLinear(layer.widen.weight, layer.widen.bias)
        self._narrow = PackedLinear(layer.narrow.weight, layer.narrow.bias)
        self._norms = [
            (norm.normalized_shape, norm.weight.detach().clone(), norm.bias.detach().clone(), norm.eps)
            for norm in (layer.norm_attention, layer.norm_feed_forward)
        ]

    def __call__(self, h: Tensor, gathered: Tensor) -> Tensor:
        h = nn.functional.layer_norm(self._attention(gathered).add_(h), *self._norms[0])
        inner = self._widen(h, relu=True)
        return nn.functional.layer_norm(self._narrow(inner).add_(h), *self._norms[1])


def _pack_perceptron(layers: nn.Sequential) -> tuple[PackedLinear, PackedLinear]:
    first, last = layers[0], layers[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    return PackedLinear(first.weight, first.bias), PackedLinear(last.weight, last.bias)


def _apply_perceptron(layers: tuple[PackedLinear, PackedLinear], x: Tensor) -> Tensor:
    first, last = layers
    return last(nn.functional.silu(first(x), inplace=True))
