"""Exactness of the integrators: identities to round-off, time reversal, symplecticity, order; and broken variants that fail."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from longstride.dynamics.integrators import MDState, baoab, respa_baoab, start, thermal_velocities, verlet, whole_steps
from longstride.errors import LongstrideError
from longstride.state import State, System
from longstride.units import thermal_energy

KT = thermal_energy(300.0)
MASSES = torch.tensor([12.0, 1.008, 15.999], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are tiny here
    yield
    torch.set_num_threads(before)


def molecule(n_atoms: int = 3) -> System:
    return System(
        name="toy",
        atomic_numbers=np.array([6, 1, 8][:n_atoms]),
        masses=MASSES.numpy()[:n_atoms],
        bonds=np.array([[0, 1], [0, 2]]),
        atom_names=("C", "H", "O")[:n_atoms],
        residue_names=("TOY",) * n_atoms,
        residue_indices=np.zeros(n_atoms, dtype=np.int64),
    )


class PairSprings:
    """Anharmonic springs between all pairs, k/2 (r - r0)^2 + c (r - r0)^4: translation and rotation invariant."""

    def __init__(self, k: float, r0: float = 0.12, c: float = 0.0) -> None:
        self.system, self.name, self.calls = molecule(), "springs", 0
        self.k, self.r0, self.c = k, r0, c

    def energy(self, x: State) -> torch.Tensor:
        first, second = torch.triu_indices(3, 3, 1)
        stretch = (x.positions[:, first] - x.positions[:, second]).norm(dim=-1) - self.r0
        return (0.5 * self.k * stretch**2 + self.c * stretch**4).sum(dim=1)

    def energy_forces(self, x: State) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        first, second = torch.triu_indices(3, 3, 1)
        apart = x.positions[:, first] - x.positions[:, second]
        r = apart.norm(dim=-1, keepdim=True)
        stretch = r - self.r0
        pull = -(self.k * stretch + 4 * self.c * stretch**3) * apart / r
        forces = torch.zeros_like(x.positions).index_add(1, first, pull).index_add(1, second, -pull)
        return self.energy(x), forces


class Zero(PairSprings):
    def __init__(self) -> None:
        super().__init__(0.0)


class RandomField(PairSprings):
    """An arbitrary smooth potential, unrelated to the teacher: sum sin(w . x)."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.w = 20 * torch.randn(5, 9, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def energy(self, x: State) -> torch.Tensor:
        return 30 * torch.sin(x.positions.flatten(1) @ self.w.T).sum(dim=1)

    def energy_forces(self, x: State) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        return self.energy(x), -30 * (torch.cos(x.positions.flatten(1) @ self.w.T) @ self.w).reshape(x.positions.shape)


TEACHER = PairSprings(50_000.0, c=2e6)


def begin(fast: PairSprings | None = None, replicas: int = 3, slow: PairSprings = TEACHER) -> MDState:
    generator = torch.Generator().manual_seed(1)
    x = torch.tensor([[[0.0, 0, 0], [0.11, 0, 0], [-0.03, 0.12, 0]]], dtype=torch.float64).repeat(replicas, 1, 1)
    v = thermal_velocities(x.shape, MASSES, KT, generator)
    return start(x, v, masses=MASSES, potential=slow, fast=fast)


def run(step, md: MDState, count: int, seed: int = 7) -> MDState:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        md = step(md, generator)
    return md


def single(dt: float, potential: PairSprings = TEACHER, friction: float = 5.0):
    return lambda md, g: baoab(md, potential=potential, dt=dt, kT=KT, friction=friction, generator=g)


def multiple(dt: float, n: int, fast: PairSprings, slow: PairSprings = TEACHER, friction: float = 5.0):
    return lambda md, g: respa_baoab(md, fast=fast, slow=slow, n_inner=n, dt=dt, kT=KT, friction=friction, generator=g)


def difference(a: MDState, b: MDState) -> float:
    return max(float((a.positions - b.positions).abs().max()), float((a.velocities - b.velocities).abs().max()))


def test_one_inner_step_is_single_step_dynamics_for_any_student():
    fast = RandomField()
    assert difference(run(multiple(1e-3, 1, fast), begin(fast), 200), run(single(1e-3), begin(), 200)) < 1e-10


def test_perfect_student_is_single_step_dynamics_at_the_inner_step():
    assert difference(run(multiple(4e-3, 4, TEACHER), begin(TEACHER), 50), run(single(1e-3), begin(), 200)) < 1e-10


def test_absent_student_is_single_step_dynamics_at_the_outer_step():
    # without forces inside, the drifts add up; without friction there is no noise to place
    mts = run(multiple(2e-3, 4, Zero(), friction=0.0), begin(Zero()), 100)
    assert difference(mts, run(single(2e-3, friction=0.0), begin(), 100)) < 1e-10


def test_frictionless_baoab_is_verlet_and_leaves_the_generator_alone():
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    md = begin()
    langevin = baoab(md, potential=TEACHER, dt=1e-3, kT=KT, friction=0.0, generator=generator)
    assert difference(langevin, verlet(md, potential=TEACHER, dt=1e-3)) < 1e-13
    assert torch.equal(generator.get_state(), before)


def test_costs_n_student_calls_and_one_teacher_call():
    fast, slow = RandomField(), PairSprings(40_000.0)
    md = begin(fast, slow=slow)
    fast.calls = slow.calls = 0
    run(multiple(4e-3, 4, fast, slow), md, 10)
    assert (fast.calls, slow.calls) == (40, 10)


def test_reported_energy_and_forces_belong_to_the_teacher():
    fast = RandomField()
    md = run(multiple(2e-3, 2, fast), begin(fast), 5)
    energy, forces = TEACHER.energy_forces(State(positions=md.positions))
    assert torch.equal(md.potential_energy, energy)
    assert torch.equal(md.forces, forces)
    assert torch.equal(md.fast_forces, fast.energy_forces(State(positions=md.positions))[1])


def only(md, index):
    """One replica of a state."""
    arrays = ("positions", "velocities", "forces", "potential_energy", "fast_forces")
    return replace(md, **{key: getattr(md, key)[index : index + 1] for key in arrays})


def test_replicas_do_not_interact():
    fast = PairSprings(48_000.0)
    one = replace(begin(fast), velocities=begin(fast).velocities.clone())
    together = run(multiple(2e-3, 2, fast, friction=0.0), one, 50)
    for index in range(3):
        alone = only(one, index)
        assert difference(run(multiple(2e-3, 2, fast, friction=0.0), alone, 50), only(together, index)) < 1e-11


@pytest.mark.parametrize(("dt", "n"), [(5e-4, 1), (1e-3, 4)])
def test_time_reversal(dt, n):
    fast = PairSprings(47_000.0)
    there = run(multiple(dt, n, fast, friction=0.0), begin(fast), 300)
    back = run(multiple(dt, n, fast, friction=0.0), replace(there, velocities=-there.velocities), 300)
    assert float((back.positions - begin(fast).positions).abs().max()) < 1e-8
    assert float((back.velocities + begin(fast).velocities).abs().max()) < 1e-6


def energy_error(step, fast: PairSprings | None, dt: float) -> float:
    md = begin(fast)
    first = md.potential_energy + md.kinetic_energy
    worst = torch.zeros_like(first)
    generator = torch.Generator()
    for _ in range(round(0.05 / dt)):
        md = step(md, generator)
        worst = torch.maximum(worst, (md.potential_energy + md.kinetic_energy - first).abs())
    return float(worst.mean())


def test_energy_error_has_slope_two_at_fixed_n():
    fast = PairSprings(45_000.0)
    steps = np.array([4e-4, 2e-4, 1e-4, 5e-5])
    errors = [energy_error(multiple(dt, 4, fast, friction=0.0), fast, dt) for dt in steps]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(slope - 2) < 0.1


def test_inner_map_is_symplectic():
    fast = PairSprings(45_000.0)
    step = multiple(2e-3, 2, fast, friction=0.0)
    md = begin(fast, replicas=1)
    m = MASSES.repeat_interleave(3)

    def flow(z: torch.Tensor) -> torch.Tensor:  # phase point (x, p) -> phase point after three outer steps
        x, p = z[:9].reshape(1, 3, 3), z[9:]
        now = start(x, (p / m).reshape(1, 3, 3), masses=MASSES, potential=TEACHER, fast=fast)
        now = run(step, now, 3)
        return torch.cat([now.positions.flatten(), now.velocities.flatten() * m])

    z = torch.cat([md.positions.flatten(), md.velocities.flatten() * m])
    columns = []
    for k in range(18):
        width = 1e-6 * max(1.0, float(z[k].abs()))
        shift = torch.zeros(18, dtype=torch.float64)
        shift[k] = width
        columns.append((flow(z + shift) - flow(z - shift)) / (2 * width))
    jacobian = torch.stack(columns, dim=1)
    omega = torch.zeros(18, 18, dtype=torch.float64)
    omega[:9, 9:], omega[9:, :9] = torch.eye(9), -torch.eye(9)
    assert abs(float(torch.linalg.det(jacobian)) - 1) < 1e-5
    assert float((jacobian.T @ omega @ jacobian - omega).abs().max()) < 1e-3 * float(jacobian.abs().max())


def test_total_momentum_is_conserved():
    fast = PairSprings(44_000.0)
    md = begin(fast)
    before = (MASSES[:, None] * md.velocities).sum(dim=1)
    after = run(multiple(2e-3, 2, fast, friction=0.0), md, 300)
    assert float(((MASSES[:, None] * after.velocities).sum(dim=1) - before).abs().max()) < 1e-10


def test_whole_steps():
    assert whole_steps(4.0, 1.0) == 4
    assert whole_steps(0.004, 0.0005) == 8
    for outer, inner in ((4.0, 1.5), (1.0, 2.0), (4.0, 3.9)):
        with pytest.raises(LongstrideError, match="whole multiple"):
            whole_steps(outer, inner)
    with pytest.raises(LongstrideError, match="whole number"):
        run(multiple(4e-3, 2.5, TEACHER), begin(TEACHER), 1)
    with pytest.raises(LongstrideError, match="fast forces"):
        run(multiple(4e-3, 2, TEACHER), begin(), 1)


# Broken variants: each must violate the identity that the correct step satisfies, or the identities test nothing.


def broken_respa(md: MDState, g: torch.Generator, *, fast, dt: float, n: int, fault: str) -> MDState:
    """The multi-time-step integrator written out, with one deliberate fault."""
    inner = n + 1 if fault == "n rounded up" else n
    h = dt / inner
    noise_time = dt if fault == "noise at the outer step" else dt / n
    m = MASSES[:, None]
    x, f_fast, f_slow = md.positions, md.fast_forces, md.forces
    v = md.velocities + 0.5 * dt / m * (f_slow - f_fast)
    stale = f_fast
    for _ in range(inner):
        v = v + 0.5 * h / m * f_fast
        x = x + 0.5 * h * v
        c = math.exp(-5.0 * noise_time)
        v = c * v + torch.sqrt((1 - c * c) * KT / m) * torch.randn(v.shape, generator=g, dtype=v.dtype)
        x = x + 0.5 * h * v
        f_fast = fast.energy_forces(State(positions=x))[1]
        v = v + 0.5 * h / m * f_fast
    energy, f_slow = TEACHER.energy_forces(State(positions=x))
    v = v + 0.5 * dt / m * (f_slow - (stale if fault == "fast force of old positions" else f_fast))
    return replace(md, positions=x, velocities=v, forces=f_slow, fast_forces=f_fast, potential_energy=energy)


@pytest.mark.parametrize("fault", ["none", "fast force of old positions", "noise at the outer step", "n rounded up"])
def test_negative_controls(fault):
    fast = RandomField()
    step = lambda md, g: broken_respa(md, g, fast=fast, dt=1e-3, n=1, fault=fault)  # noqa: E731
    any_student = difference(run(step, begin(fast), 50), run(single(1e-3), begin(), 50))
    step = lambda md, g: broken_respa(md, g, fast=TEACHER, dt=4e-3, n=4, fault=fault)  # noqa: E731
    perfect_student = difference(run(step, begin(TEACHER), 20), run(single(1e-3), begin(), 80))
    if fault == "none":
        assert max(any_student, perfect_student) < 1e-10
    else:
        assert max(any_student, perfect_student) > 1e-3


def test_every_atom_may_have_its_own_friction():
    class Nothing:
        name, system = "nothing", None

        def energy_forces(self, x):
            return x.positions.new_zeros(len(x.positions)), torch.zeros_like(x.positions)

    masses = torch.tensor([1.0, 16.0, 1.0], dtype=torch.float64)
    velocities = torch.ones(2, 3, 3, dtype=torch.float64)
    md = start(torch.zeros(2, 3, 3, dtype=torch.float64), velocities, masses=masses, potential=Nothing())
    rates = torch.tensor([20.0, 1.0, 0.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    cold = baoab(md, potential=Nothing(), dt=0.01, kT=0.0, friction=rates, generator=generator)
    assert torch.allclose(cold.velocities, torch.exp(-0.01 * rates)[:, None].expand(2, 3, 3), rtol=1e-14)
    inner = respa_baoab(
        start(md.positions, velocities, masses=masses, potential=Nothing(), fast=Nothing()),
        fast=Nothing(),
        slow=Nothing(),
        n_inner=4,
        dt=0.01,
        kT=0.0,
        friction=rates,
        generator=generator,
    )
    assert torch.allclose(inner.velocities, cold.velocities, rtol=1e-14)
    # no friction on an atom, no noise
    warm = baoab(md, potential=Nothing(), dt=0.01, kT=2.5, friction=rates, generator=generator)
    assert torch.equal(warm.velocities[:, 2], velocities[:, 2])
    assert float((warm.velocities[:, 0] - cold.velocities[:, 0]).abs().min()) > 0
