"""Local moves by dynamics: known averages, detailed balance in phase space, domain, centre of mass, and wrong variants."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from longstride.data.checkpoint import open_state
from longstride.errors import LongstrideError
from longstride.mcmc.kernel import ChainState, cycle, mixture
from longstride.mcmc.local import Dynamics, ghmc, hmc, langevin
from longstride.mcmc.metropolis import boltzmann, metropolis, start_chains
from longstride.mcmc.run import Schedule, run
from longstride.mcmc.speculative import speculative
from longstride.potentials.analytic import DoubleWell, HarmonicWell
from longstride.state import State, System

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
MASSES = torch.from_numpy(PAIR.masses)
K = 500.0
WELL = HarmonicWell(PAIR, center=torch.zeros(2, 3, dtype=torch.float64), k=K)
DOUBLE = DoubleWell(PAIR, barrier=6.0, half_width=0.15, k=K)


class Tilted(DoubleWell):
    """The double well with a slope, so that its two sides differ: E = ... + 8 s, kJ/mol."""

    def energy(self, x):
        return super().energy(x) + 8 * x.positions[:, 0, 0]

    def energy_forces(self, x):
        _, forces = super().energy_forces(x)
        forces[:, 0, 0] -= 8
        return self.energy(x), forces


TILTED = Tilted(PAIR, barrier=6.0, half_width=0.15, k=K)


def dynamics(potential=WELL, *, dt=0.03, steps=4, **changes):
    return Dynamics(potential=potential, kT=KT, masses=MASSES, dt=dt, steps=steps, **{"anchored": False, **changes})


def starts(potential, chains, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = 0.05 * torch.randn(chains, 2, 3, generator=generator, dtype=torch.float64)
    return start_chains(boltzmann(potential, KT), State(positions=x))


def averages(kernel, potential, observe, *, chains=400, steps=150, burn_in=50, seed=1):
    """Return mean and MCSE over independent chains of each column of observe(ChainState) [chain, column]."""
    state, generator = starts(potential, chains), torch.Generator().manual_seed(seed)
    total = 0.0
    for step in range(burn_in + steps):
        state, _ = kernel(state, generator)
        if step >= burn_in:
            total = total + observe(state)
    means = total / steps
    return means.mean(0), means.std(0) / chains**0.5


def squares(state):
    return torch.stack([state.state.positions[:, 0].square().sum(-1), state.state.positions[:, 1].square().sum(-1)], -1)


def side(state):
    s = state.state.positions[:, 0, 0]
    return torch.stack([(s > 0).double(), s], -1)


def truth_of_side():
    s = torch.linspace(-0.6, 0.6, 60001, dtype=torch.float64)
    p = torch.exp(-(6 * ((s / 0.15) ** 2 - 1) ** 2 + 8 * s) / KT)
    p = p / p.sum()
    return torch.stack([p[s > 0].sum(), (p * s).sum()])


def drift(scale=0.05):
    """A proposal far from symmetric."""

    class Drift:
        def sample(self, x, generator):
            y = 0.7 * x.positions + scale * torch.randn(x.positions.shape, generator=generator, dtype=torch.float64)
            return State(positions=y), self.log_prob(State(positions=y), x)

        def log_prob(self, y, x):
            return -0.5 * ((y.positions - 0.7 * x.positions) / scale).square().sum((1, 2))

    return Drift()


def kernels(potential):
    move = dynamics(potential)
    log_density = boltzmann(potential, KT)
    flow = metropolis(log_density, drift(), label="flow")
    return {
        "ghmc": ghmc(move, friction=2.0),
        "ghmc, strong friction": ghmc(move, friction=50.0),
        "hmc": hmc(move),
        "mixture": mixture([flow, ghmc(move, friction=2.0)], [0.4, 0.6]),
        "cycle": cycle(flow, ghmc(move, friction=2.0)),
        "speculative": cycle(speculative(log_density, drift(), batch=3), hmc(move)),
    }


SLOWER = ("ghmc, strong friction", "mixture", "speculative")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOWER else name for name in kernels(WELL)]
)
def test_exact_kernels_have_the_averages_of_a_gaussian_and_of_a_double_well(name):
    kernel = kernels(WELL)[name]
    assert kernel.invariance == "exact"
    mean, error = averages(kernel, WELL, squares)
    assert ((mean - 3 * KT / K).abs() < 5 * error).all(), (mean, error)
    assert (error < 0.02 * mean).all()
    mean, error = averages(kernels(TILTED)[name], TILTED, side, chains=600, steps=300)
    assert ((mean - truth_of_side()).abs() < 5 * error).all(), (mean, truth_of_side(), error)


class Ripple(HarmonicWell):
    """E = 5 (1 - cos(s / 0.03)) kJ/mol in one coordinate: its density is von Mises', and no step makes dynamics diverge."""

    def energy(self, x):
        s = x.positions[:, 0, 0]
        return super().energy(x) - 0.5 * K * s.square() + 5 * (1 - (s / 0.03).cos())

    def energy_forces(self, x):
        _, forces = super().energy_forces(x)
        forces[:, 0, 0] = -5 / 0.03 * (x.positions[:, 0, 0] / 0.03).sin()
        return self.energy(x), forces


def test_the_unadjusted_kernel_is_biased_at_a_large_step_and_not_at_a_small_one():
    potential = Ripple(PAIR, center=torch.zeros(2, 3, dtype=torch.float64), k=K)
    order = torch.tensor(5 / KT, dtype=torch.float64)
    exact = torch.special.i1(order) / torch.special.i0(order)

    def deviation(make, dt, steps):
        move = replace(dynamics(potential, dt=dt, steps=steps), masses=torch.ones(2, dtype=torch.float64))

        def observe(state):
            return (state.state.positions[:, :1, 0] / 0.03).cos()

        mean, error = averages(make(move, friction=5.0), potential, observe, chains=400, steps=60, burn_in=20)
        return ((mean - exact).abs() / error).item()

    assert langevin(dynamics(), friction=1.0).invariance == "unadjusted"
    assert deviation(langevin, 0.024, 10) > 5
    assert deviation(langevin, 0.004, 40) < 5
    assert deviation(ghmc, 0.024, 10) < 5


def test_dynamics_that_diverges_repeats_where_it_was():
    move = replace(dynamics(DOUBLE, dt=0.1, steps=5), masses=torch.ones(2, dtype=torch.float64))
    state, generator, repeated = starts(DOUBLE, 200), torch.Generator().manual_seed(0), 0
    for _ in range(20):
        state, info = langevin(move, friction=1.0)(state, generator)
        repeated += int((~info.accepted).sum())
        assert state.log_density.min() > -1000
    assert repeated > 0


def unflipped(move, friction):
    """The negative control: velocities are kept instead of turned when a step is rejected."""
    right = ghmc(replace(move, steps=1), friction=friction)

    def step(chains, generator):
        moved, info = right(chains, generator)
        rejected = (info.accepted == 0)[:, None, None]
        # -(-v) before the last refresh differs from v only by where the fresh noise goes, whose sign is immaterial
        return replace(moved, velocities=torch.where(rejected, -moved.velocities, moved.velocities)), info

    return replace(right, step=step)


@pytest.mark.slow
def test_velocities_that_are_not_turned_on_rejection_are_detected():
    move = replace(dynamics(TILTED, dt=0.05, steps=1), masses=torch.ones(2, dtype=torch.float64))
    observe = {"chains": 2000, "steps": 400, "burn_in": 100}
    mean, error = averages(unflipped(move, 0.5), TILTED, side, **observe)
    assert ((mean - truth_of_side()).abs() > 5 * error).any(), (mean, truth_of_side(), error)
    mean, error = averages(ghmc(move, friction=0.5), TILTED, side, **observe)
    assert ((mean - truth_of_side()).abs() < 5 * error).all(), (mean, truth_of_side(), error)


def test_verlet_is_reversible_and_keeps_volume():
    move = dynamics(TILTED)
    generator = torch.Generator().manual_seed(0)
    x = 0.1 * torch.randn(5, 2, 3, generator=generator, dtype=torch.float64)
    v = torch.randn(5, 2, 3, generator=generator, dtype=torch.float64)
    y, w, _, forces = move.verlet(x, v, move.evaluate(x)[1])
    back, minus, _, _ = move.verlet(y, -w, forces)
    assert torch.allclose(back, x, atol=1e-12)
    assert torch.allclose(minus, -v, atol=1e-12)

    def flow(z):
        x, v = z[:6].reshape(1, 2, 3), z[6:].reshape(1, 2, 3)
        kick = 0.5 * move.dt / MASSES[:, None]
        half = v + kick * slope(x)
        y = x + move.dt * half
        return torch.cat([y.flatten(), (half + kick * slope(y)).flatten()])

    def slope(x):
        s = x[0, 0, 0]
        first = torch.stack([-4 * 6.0 * ((s / 0.15) ** 2 - 1) * s / 0.15**2 - 8, -K * x[0, 0, 1], -K * x[0, 0, 2]])
        return torch.stack([first, -K * x[0, 1]])[None]

    jacobian = torch.autograd.functional.jacobian(flow, torch.cat([x[0].flatten(), v[0].flatten()]))
    assert torch.linalg.det(jacobian).item() == pytest.approx(1.0, abs=1e-10)


def equilibrium(chains, generator):
    """Return independent draws of positions and velocities of the tilted double well at unit masses."""
    s = torch.linspace(-0.6, 0.6, 60001, dtype=torch.float64)
    p = torch.exp(-(6 * ((s / 0.15) ** 2 - 1) ** 2 + 8 * s) / KT).cumsum(0)
    x = (KT / K) ** 0.5 * torch.randn(chains, 2, 3, generator=generator, dtype=torch.float64)
    uniform = torch.rand(chains, generator=generator, dtype=torch.float64)
    x[:, 0, 0] = s[torch.searchsorted(p / p[-1], uniform).clamp(max=60000)]
    v = KT**0.5 * torch.randn(chains, 2, 3, generator=generator, dtype=torch.float64)
    return replace(start_chains(boltzmann(TILTED, KT), State(positions=x)), velocities=v)


def test_pairs_of_states_are_in_detailed_balance_in_phase_space():
    """P(a -> b) = P(b* -> a*) in equilibrium, * turning velocities; keeping v on rejection breaks it."""

    def asymmetry(kernel):
        generator = torch.Generator().manual_seed(5)
        first = equilibrium(150000, generator)
        second, _ = kernel(first, generator)

        def cell(one, sign):
            s, v = one.state.positions[:, 0, 0], sign * one.velocities[:, 0, 0]
            return (s > -0.05).long() * 4 + (s > 0.1).long() * 2 + (v > 0).long()

        forward = torch.stack([cell(first, 1), cell(second, 1)])
        backward = torch.stack([cell(second, -1), cell(first, -1)])
        a = torch.bincount(forward[0] * 8 + forward[1], minlength=64).double()
        b = torch.bincount(backward[0] * 8 + backward[1], minlength=64).double()
        return ((a - b).abs() / (a + b + 1).sqrt()).max().item()

    move = replace(dynamics(TILTED, dt=0.05, steps=1), masses=torch.ones(2, dtype=torch.float64))
    assert asymmetry(ghmc(move, friction=0.5)) < 5
    assert asymmetry(unflipped(move, 0.5)) > 5


def test_a_domain_is_never_left_and_leaving_it_unchecked_is_noticed():
    inside = {"contains": lambda x: x.positions[:, 0, 0] < 0}
    generator = torch.Generator().manual_seed(0)
    for make, friction in ((ghmc, {"friction": 2.0}), (hmc, {}), (langevin, {"friction": 2.0})):
        state = starts(TILTED, 200)
        state = replace(state, state=State(positions=-state.state.positions.abs()))
        state = start_chains(boltzmann(TILTED, KT), state.state)
        free = state
        for _ in range(60):
            state, _ = make(dynamics(TILTED, **inside), **friction)(state, generator)
            free, _ = make(dynamics(TILTED), **friction)(free, generator)
            assert (state.state.positions[:, 0, 0] < 0).all()
        assert (free.state.positions[:, 0, 0] > 0).any()  # negative control
    mean, error = averages(
        ghmc(dynamics(TILTED, **inside), friction=2.0),
        TILTED,
        lambda one: torch.where(one.state.positions[:, :1, 0] < 0, one.state.positions[:, :1, 0], torch.nan).nan_to_num(0.0),
        chains=10,
    )
    assert torch.isfinite(mean).all()
    assert torch.isfinite(error).all()


class Bond:
    """A spring between the two atoms: free to translate and rotate."""

    system, name = PAIR, "bond"

    def energy(self, x):
        return self.energy_forces(x)[0]

    def energy_forces(self, x):
        d = x.positions[:, 1] - x.positions[:, 0]
        r = d.norm(dim=-1)
        pull = (4000 * (r - 0.15) / r)[:, None] * d
        return 2000 * (r - 0.15).square(), torch.stack([pull, -pull], 1)


def length(state):
    return (state.state.positions[:, 1] - state.state.positions[:, 0]).norm(dim=-1)[:, None]


@pytest.mark.parametrize(
    "make", [ghmc, pytest.param(hmc, marks=pytest.mark.slow), pytest.param(langevin, marks=pytest.mark.slow)]
)
def test_the_centre_of_mass_stays_and_the_shape_has_its_distribution(make):
    friction = {} if make is hmc else {"friction": 2.0}
    r = torch.linspace(0.01, 0.4, 40001, dtype=torch.float64)
    p = r.square() * torch.exp(-2000 * (r - 0.15).square() / KT)
    exact = ((p * r).sum() / p.sum()).item()
    centre = {}
    for anchored in (True, False):
        kernel = make(dynamics(Bond(), dt=0.005, steps=8, anchored=anchored), **friction)
        begin = starts(Bond(), 400)
        mean, error = averages(kernel, Bond(), length, steps=100)
        assert abs(mean - exact) < 5 * error
        state, generator = begin, torch.Generator().manual_seed(0)
        for _ in range(50):
            state, _ = kernel(state, generator)
        weights = (MASSES / MASSES.sum())[:, None]
        centre[anchored] = ((state.state.positions - begin.state.positions) * weights).sum(1).abs().max().item()
    assert centre[True] < 1e-12
    assert centre[False] > 0.05  # without the anchor it drifts


def test_an_anchor_in_an_external_field_is_detected():
    mean, error = averages(ghmc(dynamics(WELL, anchored=True), friction=2.0), WELL, squares)
    assert ((mean - 3 * KT / K).abs() > 5 * error).any()


class Cliff(HarmonicWell):
    """Energy overflows, or is not a number, beyond a plane."""

    value = math.nan

    def energy(self, x):
        return torch.where(x.positions[:, 0, 0] > 0.05, self.value, super().energy(x))

    def energy_forces(self, x):
        _, forces = super().energy_forces(x)
        return self.energy(x), torch.where((x.positions[:, 0, 0] > 0.05)[:, None, None], self.value, forces)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_energies_that_are_no_numbers_are_rejections(value):
    potential = Cliff(PAIR, center=torch.zeros(2, 3, dtype=torch.float64), k=K)
    potential.value = value
    below = State(positions=-torch.full((300, 2, 3), 0.01, dtype=torch.float64))
    for make, friction in ((ghmc, {"friction": 2.0}), (hmc, {}), (langevin, {"friction": 2.0})):
        state, generator, refused = start_chains(boltzmann(potential, KT), below), torch.Generator().manual_seed(0), 0
        for _ in range(40):
            state, info = make(dynamics(potential), **friction)(state, generator)
            refused += int((info.accepted < info.proposals).sum())
            assert state.state.positions.isfinite().all()
            assert state.log_density.isfinite().all()
            assert (state.state.positions[:, 0, 0] <= 0.05).all()
        assert refused > 0
        assert state.velocities is None or state.velocities.isfinite().all()


def test_rejected_chains_repeat_their_positions_and_cached_density_to_the_bit():
    state = starts(TILTED, 300)
    moved, info = ghmc(dynamics(TILTED, dt=0.15, steps=1), friction=1.0)(state, torch.Generator().manual_seed(0))
    still = info.accepted == 0
    assert 10 < int(still.sum()) < 290
    assert torch.equal(moved.state.positions[still], state.state.positions[still])
    assert torch.equal(moved.log_density[still], state.log_density[still])


def test_velocities_survive_flow_moves_and_a_killed_run(tmp_path):
    kernel = cycle(metropolis(boltzmann(TILTED, KT), drift(), label="flow"), ghmc(dynamics(TILTED), friction=1.0))
    assert kernel.labels == ("flow", "ghmc")
    schedule = Schedule(steps=12, burn_in=3, save_every=2, checkpoint_every=4)

    def complete(path, one):
        with open_state(path, "k") as folder:
            generator = torch.Generator().manual_seed(7)
            return run(one, starts(TILTED, 5), schedule, generator=generator, folder=folder, label="x")

    whole, tally = complete(tmp_path / "whole", kernel)
    left = [9]

    def dying(chains, generator):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return kernel(chains, generator)

    with pytest.raises(KeyboardInterrupt):
        complete(tmp_path / "killed", replace(kernel, step=dying))
    resumed, other = complete(tmp_path / "killed", kernel)
    assert np.array_equal(whole.positions, resumed.positions)
    assert np.array_equal(whole.acceptance, resumed.acceptance)
    assert tally.proposed == other.proposed == {"flow": 12 * 5, "ghmc": 12 * 5 * 4}
    assert tally.force_calls == other.force_calls == 15 * 5 * 5
    assert tally.acceptance("ghmc") > 0.5
    state, _ = ghmc(dynamics(TILTED), friction=1.0)(starts(TILTED, 5), torch.Generator().manual_seed(0))
    after, _ = metropolis(boltzmann(TILTED, KT), drift())(state, torch.Generator().manual_seed(0))
    assert torch.equal(after.velocities, state.velocities)


def test_labels_follow_the_weakest_part_and_settings_are_checked():
    exact, loose = ghmc(dynamics(), friction=1.0), langevin(dynamics(), friction=1.0)
    flow = metropolis(boltzmann(WELL, KT), drift())
    assert cycle(flow, exact).invariance == "exact"
    assert cycle(flow, loose).invariance == "unadjusted"
    assert mixture([cycle(flow, loose), flow], [0.5, 0.5]).invariance == "unadjusted"
    assert isinstance(starts(WELL, 2), ChainState)
    with pytest.raises(LongstrideError, match="positive timestep"):
        dynamics(dt=0.0)
