"""The optimiser: orthogonalised momentum, and a badly conditioned problem on which it beats Adam."""

import torch
from torch import nn

from longstride.training.muon import Muon, orthogonalised


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_singular_values_become_equal_and_vectors_stay():
    for shape in ((3, 20, 8), (3, 8, 20)):
        matrices = drawn(*shape) * torch.logspace(0, -2, shape[-1], dtype=torch.float64)
        found = orthogonalised(matrices)
        values = torch.linalg.svdvals(found)
        assert float(values.min()) > 0.6
        assert float(values.max()) < 1.3
        assert float(torch.linalg.svdvals(matrices).amax() / torch.linalg.svdvals(matrices).amin()) > 10  # they were not
        u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
        inside = u.mT @ found @ vh.mT  # diagonal in the singular vectors of the momentum
        assert torch.allclose(inside, torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1)), atol=1e-10)


def test_matrices_of_a_stack_do_not_mix():
    matrices = drawn(4, 6, 5, seed=1)
    assert torch.allclose(orthogonalised(matrices)[2], orthogonalised(matrices[2:3])[0], atol=1e-14)


def loss_after(make, steps=400):
    """Least squares with strongly correlated inputs, so that no scaling of single weights helps."""
    turn, _ = torch.linalg.qr(drawn(16, 16, seed=4))
    x = drawn(2, 400, 16, seed=2) * torch.logspace(0, -1.5, 16, dtype=torch.float64) @ turn
    truth = drawn(2, 16, 16, seed=3)
    weight, bias = (
        nn.Parameter(torch.zeros(2, 16, 16, dtype=torch.float64)),
        nn.Parameter(torch.zeros(2, 1, 16, dtype=torch.float64)),
    )
    optimiser = make([weight, bias])
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 0.1 * (1 - step / steps)
        loss = ((x @ (weight - truth) + bias - 0.3) / x.std(dim=1, keepdim=True).mean()).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return float(loss.detach()), float(bias.detach().mean())


def test_a_badly_conditioned_problem_is_solved_faster_than_by_adam():
    ours, bias = loss_after(lambda weights: Muon(weights, lr=0.1))
    adam, _ = loss_after(lambda weights: torch.optim.Adam(weights, lr=0.1))
    assert ours < 0.01 * adam
    assert abs(bias - 0.3) < 0.05  # vectors learn, too
