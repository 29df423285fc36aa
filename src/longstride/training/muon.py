"""Muon for stacks of matrices: momentum whose singular values are made equal, and Adam for everything else.

A weight [element, in, out] is one matrix per element. Its momentum M = U S V^T is replaced by nearly U V^T, through five
Newton-Schulz steps X <- a X + (b A + c A^2) X with A = X X^T, so that every direction of the matrix learns at the same pace. On
the student of alanine dipeptide 4 000 steps of it reach the errors of 20 000 steps of Adam.

Sources: K. Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024 (kellerjordan.github.io/posts/muon);
arXiv:2502.16982; Adam, arXiv:1412.6980. torch.optim.Muon takes single matrices only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterable

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
MOMENTUM = 0.95
ADAM_BETAS = (0.9, 0.99)
TINY = 1e-8


class Muon(torch.optim.Optimizer):
    """Update stacks of matrices by orthogonalised Nesterov momentum, vectors by Adam; one learning rate for both.

    Equation of a matrix [m, n]: G the gradient, M <- 0.95 M + G, W <- W - rate sqrt(max(1, m / n)) orthogonal(G + 0.95 M).

    Args:
        parameters: tensors [..., m, n]; those with m = 1 or n = 1 count as vectors.
        lr: learning rate, the root mean square change of a matrix's singular directions per step.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(list(parameters), {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Advance all parameters that have a gradient."""
        del closure
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                if min(weight.shape[-2:]) > 1:
                    self._matrix(weight, weight.grad, group["lr"])
                else:
                    self._vector(weight, weight.grad, group["lr"])

    def _matrix(self, weight: nn.Parameter, gradient: Tensor, rate: float) -> None:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"].mul_(MOMENTUM).add_(gradient)
        update = orthogonalised(torch.add(gradient, momentum, alpha=MOMENTUM))
        rows, columns = weight.shape[-2:]
        weight.add_(update, alpha=-rate * math.sqrt(max(1.0, rows / columns)))

    def _vector(self, weight: nn.Parameter, gradient: Tensor, rate: float) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float64)
            state["mean"], state["square"] = torch.zeros_like(weight), torch.zeros_like(weight)
        first, second = ADAM_BETAS
        state["step"] += 1
        count = float(state["step"])
        mean = state["mean"].lerp_(gradient, 1 - first) / (1 - first**count)
        square = state["square"].lerp_(gradient.square(), 1 - second) / (1 - second**count)
        weight.addcdiv_(mean, square.sqrt() + TINY, value=-rate)


def orthogonalised(matrices: Tensor) -> Tensor:
    """Return matrices with the same singular vectors and singular values near 1 (about 0.7 to 1.2).

    Args:
        matrices: [..., m, n].
    """
    rows, columns = matrices.shape[-2:]
    x = matrices.mT if rows > columns else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + TINY)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if rows > columns else x
