"""Handedness and bad energies in the kernels of a real centre: kept by every kernel, lost by the variant without the check."""

import functools
import math

import numpy as np
import pytest
import torch

from longstride.mcmc.explore import filtered
from longstride.mcmc.kernel import cycle
from longstride.mcmc.local import Dynamics, ghmc
from longstride.mcmc.metropolis import metropolis, start_chains
from longstride.mcmc.speculative import speculative
from longstride.state import State, System

KT = 2.5
CENTRE = System(
    name="centre",
    atomic_numbers=np.array([6, 7, 8, 9]),
    masses=np.full(4, 12.0),
    bonds=np.array([(0, 1), (0, 2), (0, 3)]),
    atom_names=("A", "B", "C", "D"),
    residue_names=("RES",) * 4,
    residue_indices=np.zeros(4, dtype=np.int64),
)
CORNERS = 0.1 * torch.tensor([[0, 0, 0], [1, 0, 0.35], [-0.5, 0.87, 0.35], [-0.5, -0.87, 0.35]], dtype=torch.float64)


def hand(x):
    a, b, c = (x.positions[:, k] - x.positions[:, 0] for k in (1, 2, 3))
    return torch.linalg.cross(a, b).mul(c).sum(-1)


class Umbrella:
    """Springs between all pairs: both mirror images have the same energy, and passing through the plane costs little."""

    system, name = CENTRE, "umbrella"

    def energy(self, x):
        return self.energy_forces(x)[0]

    def energy_forces(self, x):
        p = x.positions
        target = torch.cdist(CORNERS, CORNERS)
        d = p[:, :, None] - p[:, None]
        r = d.norm(dim=-1) + torch.eye(4, dtype=p.dtype)
        stretch = (r - target) * (1 - torch.eye(4, dtype=p.dtype))
        return 500 * stretch.square().sum((1, 2)), -2000 * (stretch / r)[..., None].mul(d).sum(2)


POTENTIAL = Umbrella()


def log_density(x):
    return -POTENTIAL.energy(x) / KT


class Jumps:
    """Symmetric: the mirror image half of the time, and noise. `checked`: NaN where the handedness changed."""

    def __init__(self, *, checked):
        self.checked = checked

    def sample(self, x, generator):
        noise = 0.004 * torch.randn(x.positions.shape, generator=generator, dtype=torch.float64)
        flip = torch.where(torch.rand(len(noise), generator=generator) < 0.5, -1.0, 1.0).double()
        y = x.positions.clone()
        y[..., 2] *= flip[:, None]
        y = State(positions=y + noise)
        changed = hand(y) * hand(x) <= 0
        return y, torch.where(changed & self.checked, torch.nan, 0.0).double()

    def log_prob(self, y, x):
        return torch.zeros(len(y.positions), dtype=torch.float64)


def dynamics(*, checked):
    positive = functools.partial(torch.gt, other=0.0)
    contains = (lambda x: positive(hand(x) * hand(State(positions=CORNERS[None])))) if checked else None
    return Dynamics(potential=POTENTIAL, kT=KT, masses=torch.from_numpy(CENTRE.masses), dt=0.005, steps=5, contains=contains)


def kernel(name, *, checked):
    if name == "metropolis":
        return metropolis(log_density, Jumps(checked=checked))
    if name == "speculative":
        return speculative(log_density, Jumps(checked=checked), batch=4)
    if name == "explore":
        return filtered(log_density, Jumps(checked=checked), max_drop=20.0, label="explore")
    return cycle(metropolis(log_density, Jumps(checked=checked)), ghmc(dynamics(checked=checked), friction=5.0))


@pytest.mark.parametrize("name", ["metropolis", "speculative", "explore", "cycle with ghmc"])
def test_handedness_is_kept_and_is_lost_without_the_check(name):
    for checked in (True, False):
        state = start_chains(log_density, State(positions=CORNERS.repeat(100, 1, 1)))
        generator = torch.Generator().manual_seed(0)
        for _ in range(30):
            state, _ = kernel(name, checked=checked)(state, generator)
        kept = (hand(state.state) * hand(State(positions=CORNERS[None])) > 0).double().mean()
        assert kept == 1.0 if checked else kept < 0.9
        assert (state.state.positions[:, 1] - CORNERS[1]).abs().max() > 0.001


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["metropolis", "speculative", "explore"])
def test_densities_that_are_no_numbers_are_refused(name, value):
    def broken(x):
        return torch.where(x.positions[:, 0, 0] > 0.0, value, log_density(x))

    state = start_chains(broken, State(positions=CORNERS.repeat(200, 1, 1) - 1e-3))
    generator = torch.Generator().manual_seed(0)
    makers = {
        "metropolis": lambda: metropolis(broken, Jumps(checked=True)),
        "speculative": lambda: speculative(broken, Jumps(checked=True), batch=4),
        "explore": lambda: filtered(broken, Jumps(checked=True), max_drop=20.0, label="explore"),
    }
    for _ in range(20):
        before = state
        state, info = makers[name]()(state, generator)
        assert (state.state.positions[:, 0, 0] <= 0).all()
        assert state.log_density.isfinite().all()
        still = info.accepted == 0
        assert torch.equal(state.state.positions[still], before.state.positions[still])
        assert torch.equal(state.log_density[still], before.log_density[still])
