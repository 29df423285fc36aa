"""Labels of time lags, trained on torsions whose transition density is known.

The torsion t of a chain of four atoms has the stationary density f of a wrapped Cauchy distribution with distribution function
F, and u = 2 pi F(t) makes normal steps of width s on the circle from frame to frame. Then x and y, k frames apart, have the
density 2 pi g_k(u(y) - u(x)) f(x) f(y), which is reversible (Wehrly and Johnson 1980, doi:10.1093/biomet/67.1.255), and the
entropies are

    H = log(2 pi (1 - rho^2))                                of f, which the independent label can reach
    H_k = H + log(s sqrt(2 pi e k)) - log(2 pi)              of the step, which the label of lag k can reach
"""

import math

import numpy as np
import pytest
import torch

from four_atom_chain import KT, prepared
from longstride.config import TransferConfig
from longstride.flows.torsion_features import torsion_features
from longstride.flows.torsion_network import TorsionArchitecture, TorsionNetwork
from longstride.flows.zmatrix import build_zmatrix, wrap
from longstride.training.module_state import ModuleState
from longstride.training.transfer import Dynamics, MoleculeSamples, negative_log_likelihood, train

RHO, STEP, LAGS = 0.3, 0.35, (1, 4)
INDEPENDENT = len(LAGS)
ENTROPY = math.log(2 * math.pi * (1 - RHO**2))
ENTROPIES = [ENTROPY + math.log(STEP * math.sqrt(2 * math.pi * math.e * lag)) - math.log(2 * math.pi) for lag in LAGS]
SECTION = TransferConfig(
    max_steps=500, molecules_per_step=1, samples_per_molecule=512, learning_rate=0.01, warm_up_steps=20, ema_decay=0.97,
    weight_decay=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def features():
    chain = prepared()
    zmatrix = build_zmatrix(chain.system)
    return torsion_features(chain.system, chain.openmm_system, zmatrix, chain.positions, KT).to(torch.float32)


def trajectories(count, frames, *, seed):
    """Return trajectories at equilibrium, a list of [frame, 1] radian."""
    generator = torch.Generator().manual_seed(seed)
    steps = STEP * torch.randn(count, frames, 1, generator=generator, dtype=torch.float64)
    steps[:, 0] = 2 * math.pi * torch.rand(count, 1, generator=generator, dtype=torch.float64)
    half = wrap(steps.cumsum(1)) / 2
    return list((2 * torch.atan((1 - RHO) / (1 + RHO) * half.tan())).float())


def samples_of(features, made, *, shuffled=False):
    """Return the samples of a molecule with that dynamics, or with its frames in a random order within each trajectory."""
    generator = torch.Generator().manual_seed(5)
    if shuffled:
        made = [torsions[torch.randperm(len(torsions), generator=generator)] for torsions in made]
    dynamics = Dynamics.of(made, lags=LAGS, independent_fraction=0.4)
    return MoleculeSamples(name="m", features=features, torsions=torch.cat(made), dynamics=dynamics)


def trained(samples, *, steps=SECTION.max_steps):
    torch.manual_seed(1)
    sizes = {"width": 24, "heads": 2, "layers": 1, "message_rounds": 1, "components": 4}
    network = TorsionNetwork(TorsionArchitecture(lags_ps=tuple(map(float, LAGS)), **sizes))
    rates = {"learning_rate": SECTION.learning_rate, "weight_decay": SECTION.weight_decay, "rate_key": "transfer.learning_rate"}
    state = ModuleState.fresh(network, **rates, seed=2)
    train(state, [samples], SECTION.model_copy(update={"max_steps": steps}))
    return network


@torch.no_grad()
def excess(network, samples, label):
    """Return the loss above the entropy of a label, and its Monte-Carlo error."""
    losses = negative_log_likelihood(network, [samples], 6000, torch.Generator().manual_seed(3), label=label)
    return losses.mean().item() - [*ENTROPIES, ENTROPY][label], losses.std().item() / losses.numel() ** 0.5


@pytest.fixture(scope="module")
def held_out(features):
    return samples_of(features, trajectories(20000, max(LAGS) + 1, seed=11))


def test_each_label_reaches_its_entropy(features, held_out):
    network = trained(samples_of(features, trajectories(1000, 60, seed=0)))
    for label in range(INDEPENDENT + 1):
        found, error = excess(network, held_out, label)
        assert abs(found) < 5 * error, (label, found, error)


def test_pairs_shuffled_in_time_do_not_reach_the_entropy_of_the_step(features, held_out):
    network = trained(samples_of(features, trajectories(40, 1500, seed=0), shuffled=True), steps=150)
    for label, entropy in enumerate(ENTROPIES):
        found, error = excess(network, held_out, label)
        assert found > 20 * error
        assert found > 0.7 * (ENTROPY - entropy)  # what is left is the stationary density


def test_pairs_lie_in_one_trajectory_in_both_directions_and_all_occur():
    lengths, lags = (5, 9, 4), (3, 1)
    made = [torch.arange(length, dtype=torch.float32)[:, None] + 100.0 * index for index, length in enumerate(lengths)]
    dynamics = Dynamics.of(made, lags=lags, independent_fraction=0.5)
    for label, lag in enumerate(lags):
        x, y = dynamics.pairs(label, 3000, torch.Generator().manual_seed(0))
        assert torch.equal((y - x).abs(), torch.full_like(x, lag))
        assert torch.equal((x / 100).floor(), (y / 100).floor())
        assert 0.4 < (y > x).float().mean() < 0.6
        assert len(torch.minimum(x, y).unique()) == sum(length - lag for length in lengths)


def test_a_batch_mixes_labels_and_takes_independent_samples_from_the_chains(features):
    count = 4000
    chains = torch.full((10, 1), 2.0)
    dynamics = Dynamics.of([torch.zeros(20, 1)], lags=LAGS, independent_fraction=0.3)
    samples = MoleculeSamples(name="m", features=features, torsions=chains, dynamics=dynamics)
    x, y, labels = samples.draw(count, torch.Generator().manual_seed(0))
    shares = np.bincount(labels.numpy(), minlength=INDEPENDENT + 1) / count
    assert np.abs(shares - [0.35, 0.35, 0.3]).max() < 5 * 0.5 / count**0.5
    assert torch.equal(y[:, 0] == 2.0, labels == INDEPENDENT)
    assert torch.equal(x[:, 0] == 2.0, labels == INDEPENDENT)
    for label in range(INDEPENDENT + 1):
        assert (samples.draw(50, torch.Generator().manual_seed(0), label=label)[2] == label).all()


def test_without_lags_the_random_stream_is_that_of_the_chains_alone(features):
    torsions = torch.arange(70.0)[:, None].expand(-1, 1)
    samples = MoleculeSamples(name="m", features=features, torsions=torsions)
    x, y, labels = samples.draw(40, torch.Generator().manual_seed(4))
    assert torch.equal(y, torsions[torch.randint(70, (40,), generator=torch.Generator().manual_seed(4))])
    assert torch.equal(x, y)
    assert not labels.any()
