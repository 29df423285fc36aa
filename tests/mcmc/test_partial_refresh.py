"""Partial refresh of a flow's latent noise, on a target that is no Gaussian and a flow that does not fit it."""

import math

import pytest
import torch

from longstride.errors import LongstrideError
from longstride.mcmc.metropolis import start_chains
from longstride.mcmc.partial import correlated_latent, partial_refresh
from longstride.state import State


class Toy:
    """Torsion t = first coordinate, drawn as t' = t/2 + 1.2 noise; stiff s = second and third, s = mean(t) + width(t) z.

    Density with respect to dt ds; log q(s | t) = log N(z) - 2 log width(t).
    """

    def latent(self, x):
        t = x[:, 0, :1]
        return (x[:, 0, 1:] - 0.5 * t.sin()) / self.width(t)

    @staticmethod
    def width(t):
        return 0.8 * (1 + 0.3 * t.cos())

    def terms(self, t_y, t_x, z_y):
        torsion = -0.5 * ((t_y - 0.5 * t_x) / 1.2).square().sum(-1)
        return torsion - 0.5 * z_y.square().sum(-1) - 2 * self.width(t_y)[:, 0].log()

    def propose_correlated(self, x, correlation, generator):
        t_x, z_x = x.positions[:, 0, :1], self.latent(x.positions)
        t_y = 0.5 * t_x + 1.2 * torch.randn(t_x.shape, generator=generator, dtype=torch.float64)
        z_y = correlated_latent(z_x, correlation, generator)
        y = torch.cat([t_y, 0.5 * t_y.sin() + self.width(t_y) * z_y], -1)[:, None]
        return State(positions=y), self.terms(t_y, t_x, z_y), self.terms(t_x, t_y, z_x)


class WithoutLatentDensities(Toy):
    """The negative control: as if keeping noise were symmetric in s."""

    def terms(self, t_y, t_x, z_y):
        return -0.5 * ((t_y - 0.5 * t_x) / 1.2).square().sum(-1)


class FlippedVolume(Toy):
    """Another: the log-determinant with the wrong sign."""

    def terms(self, t_y, t_x, z_y):
        return super().terms(t_y, t_x, z_y) + 4 * self.width(t_y)[:, 0].log()


def log_density(x):
    t, s = x.positions[:, 0, 0], x.positions[:, 0, 1:]
    return -(t.square() - 1).square() - 0.4 * t - 0.5 * ((s - 0.4 * t[:, None]) / 0.7).square().sum(-1)


def truth():
    t = torch.linspace(-4, 4, 80001, dtype=torch.float64)
    p = torch.exp(-(t.square() - 1).square() - 0.4 * t)
    mean = ((p * t).sum() / p.sum()).item()
    square = ((p * t.square()).sum() / p.sum()).item()
    return torch.tensor([mean, 0.16 * square + 0.49], dtype=torch.float64)


def deviations(proposal, correlation, chains=800, steps=300):
    kernel = partial_refresh(log_density, proposal, correlation=correlation)
    generator = torch.Generator().manual_seed(3)
    state = start_chains(log_density, State(positions=torch.zeros(chains, 1, 3, dtype=torch.float64)))
    total, accepted = 0.0, 0.0
    for step in range(100 + steps):
        state, info = kernel(state, generator)
        if step >= 100:
            x = state.state.positions[:, 0]
            total = total + torch.stack([x[:, 0], x[:, 1].square()], -1)
            accepted += info.accepted.double().mean().item() / steps
    means = total / steps
    return ((means.mean(0) - truth()) / (means.std(0) / chains**0.5)).abs().max().item(), accepted


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_any_correlation_is_exact(correlation):
    found, _ = deviations(Toy(), correlation)
    assert found < 5


def test_keeping_noise_raises_the_acceptance():
    assert deviations(Toy(), 0.9, steps=50)[1] > deviations(Toy(), 0.0, steps=50)[1] + 0.03


@pytest.mark.parametrize("wrong", [WithoutLatentDensities, FlippedVolume])
def test_wrong_terms_are_detected(wrong):
    assert deviations(wrong(), 0.5)[0] > 5


def test_the_latent_move_is_reversible_and_keeps_the_normal_distribution():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(200000, generator=generator, dtype=torch.float64)
    moved = correlated_latent(z, 0.6, generator)
    error = 1 / math.sqrt(len(z))
    assert abs(moved.mean()) < 5 * error
    assert abs(moved.var() - 1) < 5 * 1.5 * error
    assert abs((z * moved).mean() - 0.6) < 5 * 1.5 * error
    assert abs((z**2 * moved - z * moved**2).mean()) < 5 * 4 * error


def test_what_cannot_be_done_is_one_line():
    with pytest.raises(LongstrideError, match="below 1, not 1"):
        partial_refresh(log_density, Toy(), correlation=1.0)
    with pytest.raises(LongstrideError, match="cannot keep a part of its noise"):
        partial_refresh(log_density, object(), correlation=0.5)
