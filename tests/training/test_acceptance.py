"""The gradient of the acceptance, against exact enumeration and automatic differentiation."""

import pytest
import torch

from longstride.training.acceptance import gradient_weights

PI = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64)
Q = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
COUNT = 1000  # of samples and draws; each state comes exactly as often as its probability says


def enumerated():
    """Return A and its gradient with respect to the logits of q, by summation over all pairs of states."""
    logits = Q.log().clone().requires_grad_()
    q = logits.softmax(0)
    flow = torch.minimum(PI[:, None] * q, q[:, None] * PI)
    flow.sum().backward()
    return flow.sum().item(), logits.grad


def estimated(weights=gradient_weights, *, invalid=0):
    """Return A and the gradient from samples and draws; the last `invalid` draws have no density."""
    x, y = (torch.repeat_interleave(torch.arange(4), (p * COUNT).round().long()) for p in (PI, Q))
    log_w = PI.log() - Q.log()
    log_w_y = torch.cat([log_w[y], torch.full((invalid,), torch.nan, dtype=torch.float64)])
    accepted, samples, draws = weights(log_w[x], log_w_y)
    logits = Q.log().clone().requires_grad_()
    log_q = logits.log_softmax(0)
    ((samples * log_q[x]).mean() + (draws[:COUNT] * log_q[y]).mean()).backward()
    return accepted.item(), logits.grad


def test_the_gradient_is_that_of_the_acceptance():
    accepted, gradient = estimated()
    exact, expected = enumerated()
    assert accepted == pytest.approx(exact, abs=1e-12)
    # sums over draws exactly as frequent as q: only the factor n / (n - 1) of the baseline is left
    assert torch.allclose(gradient, expected, rtol=0, atol=2 / COUNT * expected.abs().max().item())


def one_sided(log_w_x, log_w_y):
    accepted, samples, draws = gradient_weights(log_w_x, log_w_y)
    return accepted, torch.zeros_like(samples), draws


def without_clamp(log_w_x, log_w_y):
    accepted, _, draws = gradient_weights(log_w_x, log_w_y)
    return accepted, (log_w_y - log_w_x[:, None]).exp().mean(1), draws


@pytest.mark.parametrize("broken", [one_sided, without_clamp])
def test_a_broken_gradient_is_detected(broken):
    _, gradient = estimated(broken)
    _, expected = enumerated()
    assert (gradient - expected).abs().max() > 0.1 * expected.abs().max()


def test_invalid_draws_count_as_rejections():
    plain, _ = estimated()
    with_invalid, _ = estimated(invalid=COUNT)
    assert with_invalid == pytest.approx(plain / 2, abs=1e-12)
    _, samples, draws = gradient_weights(torch.zeros(3), torch.tensor([torch.nan, torch.inf, 0.0]))
    assert samples.isfinite().all()
    assert torch.equal(draws, torch.tensor([-0.5, -0.5, 1.0], dtype=torch.float64))
