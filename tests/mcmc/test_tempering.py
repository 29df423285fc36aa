"""Parallel tempering: stationarity by linear algebra, known averages, barriers crossed, killed runs, wrong variants."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from longstride.data.checkpoint import open_state
from longstride.errors import LongstrideError
from longstride.mcmc import tempering
from longstride.mcmc.kernel import ChainState
from longstride.mcmc.local import Dynamics, ghmc, hmc
from longstride.mcmc.metropolis import boltzmann, start_chains
from longstride.mcmc.run import Schedule, run
from longstride.mcmc.tempering import ScaledPotential, TemperingPlan, exchange, geometric_ladder, run_tempering, scales_of
from longstride.potentials.analytic import DoubleWell, HarmonicWell
from longstride.state import State, System

COLD_K = 300.0
KT = 2.5
PAIR = System(
    name="pair",
    atomic_numbers=np.array([6, 1]),
    masses=np.array([12.0, 1.0]),
    bonds=np.array([(0, 1)]),
    atom_names=("C", "H"),
    residue_names=("RES",) * 2,
    residue_indices=np.zeros(2, dtype=np.int64),
)
K = 500.0
WELL = HarmonicWell(PAIR, center=torch.zeros(2, 3, dtype=torch.float64), k=K)
HIGH = DoubleWell(PAIR, barrier=15 * KT, half_width=0.15, k=K)
LADDER_K = (300.0, 500.0, 850.0, 1450.0)
LEVELS = torch.tensor([0.0, 1.0, 2.7], dtype=torch.float64)  # U / kT of a discrete target
SCALES = torch.tensor([1.0, 0.6, 0.25], dtype=torch.float64)


def swap_matrix(parity, log_ratio, monkeypatch):
    """Return the transition matrix of one round of swaps of three rungs on three levels, read off `exchange` itself."""
    states = list(itertools.product(range(3), repeat=3))
    where = torch.tensor(states)
    seen = []

    def always(log_alpha, generator):
        seen.append(log_alpha)
        return torch.ones_like(log_alpha, dtype=torch.bool)

    monkeypatch.setattr(tempering, "accept", always)
    monkeypatch.setattr(tempering, "log_ratio", log_ratio)
    chains = ChainState(
        state=State(positions=where.flatten().double()[:, None, None].expand(-1, 1, 3)),
        log_density=-(SCALES * LEVELS[where]).flatten(),
    )
    after, _ = exchange(chains, SCALES, parity=parity, generator=torch.Generator())
    target = after.state.positions[:, 0, 0].reshape(-1, 3).long()
    assert torch.allclose(after.log_density, -(SCALES * LEVELS[target]).flatten()), "densities belong to their new rungs"
    probability = seen[0].clamp(max=0).exp()[:, 0].numpy()
    matrix = np.zeros((27, 27))
    for row, (end, p) in enumerate(zip(target.tolist(), probability, strict=True)):
        matrix[row, states.index(tuple(end))] += p
        matrix[row, row] += 1 - p
    return matrix


def product_density():
    states = torch.tensor(list(itertools.product(range(3), repeat=3)))
    density = torch.exp(-(SCALES * LEVELS[states]).sum(1)).numpy()
    return density / density.sum()


def reversed_sign(here, there, backward, forward):
    return -tempering_log_ratio(here, there, backward, forward)


def without_difference(here, there, backward, forward):
    """Compares energies as if both rungs had the same temperature: every swap is accepted."""
    return torch.zeros_like(here)


tempering_log_ratio = tempering.log_ratio


@pytest.mark.parametrize(
    ("rule", "stationary"), [(tempering_log_ratio, True), (reversed_sign, False), (without_difference, False)]
)
def test_even_odd_swaps_leave_the_product_of_all_rungs_stationary(rule, stationary, monkeypatch):
    even, odd = (swap_matrix(parity, rule, monkeypatch) for parity in (0, 1))
    density = product_density()
    for matrix in (even, odd, even @ odd):
        assert np.allclose(matrix.sum(1), 1)
        change = np.abs(density @ matrix - density).max()
        assert change < 1e-15 if stationary else change > 1e-3
    detailed = density[:, None] * (even @ odd)
    assert not np.allclose(detailed, detailed.T), "swaps in turn are stationary but not reversible"


def local(potential, scales, ladders, *, kind="ghmc", dt=0.03, steps=4):
    scaled = ScaledPotential(potential, scales.repeat(ladders))
    masses = torch.from_numpy(PAIR.masses)
    dynamics = Dynamics(potential=scaled, kT=KT, masses=masses, dt=dt, steps=steps, anchored=False)
    return scaled, ghmc(dynamics, friction=2.0) if kind == "ghmc" else hmc(dynamics)


def tempered(tmp_path, potential, *, ladders, kind="ghmc", cycles=200, burn_in=50, seed=1, side=0.0, every=60):
    scales = scales_of(LADDER_K)
    scaled, kernel = local(potential, scales, ladders, kind=kind)
    x = 0.03 * torch.randn(ladders * len(scales), 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 0, 0] += side
    chains = start_chains(boltzmann(scaled, KT), State(positions=x))
    plan = TemperingPlan(temperatures_K=LADDER_K, cycles=cycles, burn_in=burn_in, save_every=2, checkpoint_every=every)
    with open_state(tmp_path, "key") as folder:
        generator = torch.Generator().manual_seed(seed)
        return run_tempering(kernel, chains, plan, generator=generator, folder=folder, label="tempering")


@pytest.mark.parametrize("kind", ["ghmc", "hmc"])
def test_every_rung_has_the_mean_energy_of_its_temperature(tmp_path, kind):
    result = tempered(tmp_path, WELL, ladders=100, kind=kind)
    reduced = -result.log_density  # s U / kT, on average half the number of coordinates at every temperature
    means = reduced.mean(0)
    error = means.std(0, ddof=1) / math.sqrt(100)
    assert (np.abs(means.mean(0) - 3.0) < 5 * error).all()
    assert (error < 0.05).all()
    direct = 0.5 * K * (result.positions.astype(np.float64) ** 2).sum((2, 3)) / KT
    assert np.allclose(direct, reduced[..., 0], atol=1e-4), "the samples are those of the cold rung"
    # six normal coordinates: energies are Gamma(3, T), and the acceptance is an integral over two of them
    rng = np.random.default_rng(0)
    u = rng.gamma(3.0, size=(2, 200_000)) * np.array([[1.0], [LADDER_K[1] / LADDER_K[0]]])
    expected = np.exp(np.minimum(0, (1 - LADDER_K[0] / LADDER_K[1]) * (u[0] - u[1]))).mean()
    assert result.swap_acceptance[0] == pytest.approx(expected, abs=5 * math.sqrt(0.25 / (100 * 100)))
    assert (result.round_trips > 0).all()


def test_a_swap_rule_without_temperatures_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(tempering, "log_ratio", without_difference)
    means = -tempered(tmp_path, WELL, ladders=100).log_density.mean(0)
    error = means.std(0, ddof=1) / math.sqrt(100)
    assert (np.abs(means.mean(0) - 3.0) > 5 * error)[0]


def test_ladders_cross_what_plain_chains_do_not(tmp_path):
    ladders = 40
    result = tempered(tmp_path / "ladders", HIGH, ladders=ladders, cycles=800, burn_in=400, side=0.15, every=10_000)
    right = result.positions[..., 0, 0] > 0
    share = right.mean(0)
    assert abs(share.mean() - 0.5) < 5 * share.std(ddof=1) / math.sqrt(ladders)
    assert share.std(ddof=1) / math.sqrt(ladders) < 0.08
    assert (right[1:] != right[:-1]).any(0).all(), "every ladder's cold rung crosses"

    scaled, kernel = local(HIGH, torch.ones(1, dtype=torch.float64), ladders)
    x = torch.zeros(ladders, 2, 3, dtype=torch.float64)
    x[:, 0, 0] = 0.15
    schedule = Schedule(steps=1200, burn_in=0, save_every=4, checkpoint_every=10_000)
    with open_state(tmp_path / "plain", "key") as folder:
        chains = start_chains(boltzmann(scaled, KT), State(positions=x))
        saved, _ = run(kernel, chains, schedule, generator=torch.Generator().manual_seed(1), folder=folder, label="plain")
    assert (saved.positions[..., 0, 0] > 0).mean() > 0.99


class Kill(BaseException):
    """Stands for kill -9."""


def test_a_killed_run_continues_bitwise(tmp_path, monkeypatch):
    settings = {"ladders": 5, "cycles": 40, "burn_in": 10, "every": 8}
    whole = tempered(tmp_path / "whole", WELL, **settings)
    swap, calls = tempering.exchange, [0]

    def mortal(*args, **kwargs):
        calls[0] += 1
        if calls[0] in (6, 25, 47):
            raise Kill
        return swap(*args, **kwargs)

    monkeypatch.setattr(tempering, "exchange", mortal)
    for _ in range(3):
        with pytest.raises(Kill):
            tempered(tmp_path / "parts", WELL, **settings)
    parts = tempered(tmp_path / "parts", WELL, **settings)
    for name in ("positions", "log_density", "swap_acceptance", "round_trips"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name)), name
    keep = ("proposed", "accepted", "energy_calls", "force_calls")
    assert {key: getattr(whole.tally, key) for key in keep} == {key: getattr(parts.tally, key) for key in keep}


def test_round_trips_are_those_of_walkers():
    walk = tempering._Walk.begin(1, 3)

    def swap(*source):
        moved = torch.tensor([source])
        accepted = torch.ones(1, 1, dtype=torch.bool)
        walk.follow(tempering.Swaps(first=torch.tensor([0]), accepted=accepted, source=moved), production=True)

    swap(0, 1, 2)  # walker 0 is at the cold end, walker 2 at the hot one
    swap(1, 0, 2)
    swap(0, 2, 1)  # walker 0 arrives at the hot end
    swap(0, 2, 1)
    assert int(walk.round_trips) == 0
    swap(1, 0, 2)
    assert int(walk.round_trips) == 1, "walker 0 is back"
    swap(1, 0, 2)
    swap(1, 0, 2)
    assert int(walk.round_trips) == 1, "to the middle and back is no trip"


def test_a_ladder_reaches_the_wanted_acceptance():
    coordinates = 60  # harmonic: Var(U) = d/2 kT^2 at every temperature
    ladder = geometric_ladder(COLD_K, 700.0, energy_variance=coordinates / 2 * KT**2, kT=KT, swap_acceptance=0.3)
    ratios = np.array(ladder[1:]) / np.array(ladder[:-1])
    assert np.allclose(ratios, ratios[0])
    assert (ladder[0], ladder[-1]) == (COLD_K, 700.0)
    u = np.random.default_rng(0).gamma(coordinates / 2, size=(2, 100_000)) * np.array([[1.0], [ratios[0]]])
    rate = np.exp(np.minimum(0, (1 - 1 / ratios[0]) * (u[0] - u[1]))).mean()
    fewer = (700.0 / COLD_K) ** (1 / (len(ratios) - 1))
    u = u * np.array([[1.0], [fewer / ratios[0]]])
    worse = np.exp(np.minimum(0, (1 - 1 / fewer) * (u[0] - u[1]))).mean()
    assert worse < 0.3 < rate, "one rung less would not do"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hottest_K": 300.0}, "above 300 K"),
        ({"energy_variance": 0.0}, "variance must be positive"),
        ({"energy_variance": math.nan}, "variance must be positive"),
        ({"energy_variance": 1e6}, "would have .* rungs; lower"),
    ],
)
def test_impossible_ladders_are_refused(change, message):
    settings = {"cold_K": 300.0, "hottest_K": 600.0, "energy_variance": 180.0, "kT": KT, "swap_acceptance": 0.3, **change}
    with pytest.raises(LongstrideError, match=message):
        geometric_ladder(**settings)


def test_half_a_ladder_is_refused(tmp_path):
    scaled, kernel = local(WELL, torch.ones(1, dtype=torch.float64), 3)
    chains = start_chains(boltzmann(scaled, KT), State(positions=torch.zeros(3, 2, 3, dtype=torch.float64)))
    plan = TemperingPlan(temperatures_K=(300.0, 400.0), cycles=2, burn_in=0, save_every=1, checkpoint_every=1)
    with open_state(tmp_path, "key") as folder, pytest.raises(LongstrideError, match="whole ladders of 2"):
        run_tempering(kernel, replace(chains), plan, generator=torch.Generator(), folder=folder, label="x")
