"""A density on the circle: a mixture of wrapped normals and a uniform floor.

    p(a) = w_0 / (2 pi) + sum_m w_m sum_{n=-1..1} N(a - mu_m + 2 pi n; 0, sigma_m^2),   sigma_m <= SCALE_MAX

Wrapped normals are as flexible as von Mises components (Mardia and Jupp, Directional Statistics, 2000,
doi:10.1002/9780470316979, section 3.5.7) and, unlike them, are drawn without a rejection loop. With sigma <= 1 rad
the terms left out of the sum over n are below 1e-15, so the density integrates to one to double precision.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longstride.flows.zmatrix import TWO_PI, wrap

SCALE_MIN = 0.03
SCALE_MAX = 1.0
_LOG_SQRT_TWO_PI = 0.5 * math.log(TWO_PI)


def n_parameters(components: int) -> int:
    """Return how many network outputs one mixture takes: weight, direction (2) and width each, and the floor's weight."""
    return 4 * components + 1


def _split(parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    components = (parameters.shape[-1] - 1) // 4
    log_w = torch.log_softmax(parameters[..., : components + 1], dim=-1)
    direction = parameters[..., components + 1 : 3 * components + 1].unflatten(-1, (2, components))
    mean = torch.atan2(direction[..., 0, :], direction[..., 1, :])
    ratio = math.log(SCALE_MAX / SCALE_MIN)
    sigma = SCALE_MIN * torch.exp(ratio * torch.sigmoid(parameters[..., 3 * components + 1 :]))
    return log_w, mean, sigma


def log_prob(angle: Tensor, parameters: Tensor) -> Tensor:
    """Return log p(angle), [...], of angles [...] radian under network outputs [..., n_parameters]."""
    log_w, mean, sigma = _split(parameters)
    deviation = wrap(angle[..., None] - mean)
    turns = torch.stack([deviation - TWO_PI, deviation, deviation + TWO_PI], -1) / sigma[..., None]
    log_normal = torch.logsumexp(-0.5 * turns.square(), -1) - sigma.log() - _LOG_SQRT_TWO_PI
    floor = log_w[..., :1] - math.log(TWO_PI)
    return torch.logsumexp(torch.cat([floor, log_w[..., 1:] + log_normal], -1), -1)


def sample(parameters: Tensor, generator: torch.Generator) -> Tensor:
    """Return one angle in [-pi, pi) per mixture, [...], from network outputs [..., n_parameters]."""
    log_w, mean, sigma = _split(parameters)
    shape = log_w.shape[:-1]
    choice = torch.multinomial(log_w.exp().flatten(0, -2), 1, generator=generator).view(*shape, 1)
    normal = torch.randn(shape, generator=generator, dtype=mean.dtype, device=mean.device)
    uniform = torch.rand(shape, generator=generator, dtype=mean.dtype, device=mean.device) * TWO_PI
    component = (choice - 1).clamp(min=0)
    drawn = mean.gather(-1, component)[..., 0] + sigma.gather(-1, component)[..., 0] * normal
    return wrap(torch.where(choice[..., 0] == 0, uniform, drawn))
