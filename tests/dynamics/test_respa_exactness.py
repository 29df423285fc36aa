"""Multi-time-step dynamics without sampling error: covariances, orders, resonances, symmetries; and broken steps that fail.

A step on a harmonic well is a linear map of position, velocity and noise. Its matrices are read off the integrator itself
to round-off, and with them every covariance and time correlation function follows without a single random error.
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from longstride.dynamics.integrators import MDState, baoab, respa_baoab, start, thermal_velocities
from longstride.potentials.amber import AmberPotential
from longstride.potentials.analytic import HarmonicWell
from longstride.potentials.student import StudentMetadata, StudentNetwork
from longstride.state import State, System
from longstride.units import FS_PS, thermal_energy

KT = thermal_energy(310.0)
MASS, STIFFNESS, FRICTION = 1.008, 250_000.0, 20.0  # about 2 650 per cm, kJ/mol/nm^2, 1/ps
OMEGA = math.sqrt(STIFFNESS / MASS)
FAULTS = ("O at the outer step", "one inner step too many", "full slow kicks", "fast force of old positions")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are tiny here
    yield
    torch.set_num_threads(before)


def molecule(*numbers: int, masses: list[float]) -> System:
    count = len(numbers)
    return System(
        name="model",
        atomic_numbers=np.array(numbers),
        masses=np.array(masses),
        bonds=np.array([(0, i) for i in range(1, count)]).reshape(-1, 2),
        atom_names=tuple("ABC"[:count]),
        residue_names=("MOD",) * count,
        residue_indices=np.zeros(count, dtype=np.int64),
    )


def respa(md: MDState, g: torch.Generator, *, fast, slow, dt: float, n: int, friction=0.0, kT=KT, fault: str = "none"):
    """The step under test, or the same algorithm written out with one deliberate fault."""
    if fault == "none":
        return respa_baoab(md, fast=fast, slow=slow, n_inner=n, dt=dt, kT=kT, friction=friction, generator=g)
    inner = n + 1 if fault == FAULTS[1] else n
    h, m = dt / n, md.masses[:, None]
    outer = dt if fault == FAULTS[2] else dt / 2
    c = math.exp(-friction * (dt if fault == FAULTS[0] else h))
    x, f_fast = md.positions, md.fast_forces
    stale = f_fast
    v = md.velocities + outer / m * (md.forces - f_fast)
    for _ in range(inner):
        x = x + h / 2 * (v := v + h / 2 / m * f_fast)
        if friction > 0:
            noise = torch.randn(v.shape, generator=g, dtype=v.dtype)
            v = c * v + ((1 - c * c) * kT / m) ** 0.5 * noise
        x = x + h / 2 * v
        f_fast = fast.energy_forces(State(positions=x))[1]
        v = v + h / 2 / m * f_fast
    energy, f_slow = slow.energy_forces(State(positions=x))
    v = v + outer / m * (f_slow - (stale if fault == FAULTS[3] else f_fast))
    return replace(md, positions=x, velocities=v, forces=f_slow, fast_forces=f_fast, potential_energy=energy)


# One harmonic well: exact linear maps.


def well(scale: float = 1.0) -> HarmonicWell:
    return HarmonicWell(molecule(1, masses=[MASS]), center=torch.zeros(1, 3, dtype=torch.float64), k=scale * STIFFNESS)


def at(x: torch.Tensor, v: torch.Tensor, fast: HarmonicWell | None) -> MDState:
    return start(x, v, masses=torch.tensor([MASS], dtype=torch.float64), potential=well(), fast=fast)


def linear_maps(step, fast: HarmonicWell | None, draws: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return M [2, 2] and N [2, 2] of (x, v)' = M (x, v) + noise of covariance N, in one dimension, to round-off."""
    unit_x = torch.tensor([[[1.0, 0, 0]]], dtype=torch.float64)
    columns = []
    for x, v in ((unit_x, 0 * unit_x), (0 * unit_x, unit_x)):
        rested = at(0 * x, 0 * v, fast), at(x, v, fast)
        zero, moved = (step(md, torch.Generator().manual_seed(4)) for md in rested)  # the same noise
        columns.append([(moved.positions - zero.positions)[0, 0, 0], (moved.velocities - zero.velocities)[0, 0, 0]])
    nothing = torch.zeros(20, 1, 3, dtype=torch.float64)
    after = step(at(nothing, nothing, fast), torch.Generator().manual_seed(5))
    again = torch.Generator().manual_seed(5)
    xi = torch.stack([torch.randn(nothing.shape, generator=again, dtype=torch.float64) for _ in range(draws)], dim=-1)
    response = torch.stack([after.positions, after.velocities], dim=-1).reshape(-1, 2)
    gain = torch.linalg.lstsq(xi.reshape(-1, draws), response).solution
    assert float((xi.reshape(-1, draws) @ gain - response).abs().max()) < 1e-12 * float(response.abs().max())
    return torch.tensor(columns, dtype=torch.float64).T, gain.T @ gain


def stationary(matrix: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Solve S = M S M^T + N."""
    identity = torch.eye(4, dtype=torch.float64)
    return torch.linalg.solve(identity - torch.kron(matrix, matrix), noise.flatten()).reshape(2, 2)


def single(dt: float, *, kT: float = KT, friction: float = FRICTION):
    return linear_maps(lambda md, g: baoab(md, potential=well(), dt=dt, kT=kT, friction=friction, generator=g), None, draws=1)


def multiple(dt: float, n: int, share: float, *, kT: float = KT, friction: float = FRICTION, fault: str = "none"):
    """Maps of an outer step whose student misses the share `share` of the stiffness."""
    fast = well(1 - share)
    return linear_maps(
        lambda md, g: respa(md, g, fast=fast, slow=well(), dt=dt, n=n, friction=friction, kT=kT, fault=fault),
        fast,
        draws=n + (fault == FAULTS[1]),
    )


@pytest.mark.parametrize("dt_fs", [0.5, 2.0, 3.5])
def test_stationary_covariance_of_baoab(dt_fs):
    # <x^2> = kT/k at every stable step, <x v> = 0, <v^2> = kT/m (1 - (w dt)^2/4), doi:10.1093/amrx/abs010
    dt = dt_fs * FS_PS
    covariance = stationary(*single(dt))
    expected = torch.diag(torch.tensor([KT / STIFFNESS, KT / MASS * (1 - (OMEGA * dt) ** 2 / 4)], dtype=torch.float64))
    scale = torch.tensor([[KT / STIFFNESS, KT / math.sqrt(STIFFNESS * MASS)], [KT / math.sqrt(STIFFNESS * MASS), KT / MASS]])
    assert float(((covariance - expected) / scale).abs().max()) < 1e-11
    # negative control: 1 K too warm
    assert float(((stationary(*single(dt, kT=KT * 311 / 310)) - expected) / scale).abs().max()) > 1e-3


def test_stationary_covariance_of_a_perfect_student_is_that_of_the_inner_step():
    covariance = stationary(*multiple(6e-3, 6, 0.0))
    expected = stationary(*single(1e-3))
    assert torch.allclose(covariance, expected, rtol=1e-11, atol=1e-16)


def position_bias(dt: float, *, share: float = 0.1, fault: str = "none") -> float:
    return abs(float(stationary(*multiple(dt, 4, share, fault=fault))[0, 0]) * STIFFNESS / KT - 1)


def order(steps: np.ndarray, errors: np.ndarray) -> tuple[float, float]:
    """Return the exponent of the two smallest steps, and how far it can be from its limit.

    With e(dt) = a dt^p (1 + b dt^q + ...), q >= 1, the exponents between neighbouring steps approach p at least as fast as
    dt: halving the step halves what is missing, so that no more than the last change is missing.
    """
    slopes = np.diff(np.log(errors)) / np.diff(np.log(steps))
    return float(slopes[-1]), float(abs(slopes[-1] - slopes[-2]))


def test_bias_of_an_imperfect_student_is_of_second_order_in_the_outer_step():
    steps = np.array([2e-3, 1e-3, 5e-4, 2.5e-4])
    slope, missing = order(steps, np.array([position_bias(dt) for dt in steps]))
    assert abs(slope - 2) <= missing < 0.1
    assert position_bias(2e-3) < 0.1 * (OMEGA * 2e-3) ** 2 / 4  # the slow share of what a single step would cost
    # negative controls: slow kicks of twice the size sample another well at any step, a stale force is of first order
    doubled = position_bias(2.5e-4, fault="full slow kicks")
    assert doubled == pytest.approx(1 - 1 / 1.1, rel=1e-2)  # stiffness 0.9 k + 2 x 0.1 k
    slope, _ = order(steps, np.array([position_bias(dt, fault="fast force of old positions") for dt in steps]))
    assert slope < 1.5


@pytest.mark.parametrize("fault", ["none", *FAULTS])
def test_phase_space_shrinks_by_the_friction_of_the_outer_step(fault):
    # det M = exp(-friction dt) in one dimension: O acts n times for dt/n, all else preserves the area
    dt = 4e-3
    area = float(torch.linalg.det(multiple(dt, 4, 0.1, fault=fault)[0]))
    error = abs(area - math.exp(-FRICTION * dt))
    if fault in ("none", "full slow kicks"):
        assert error < 1e-12
    else:
        assert error > 1e-3


def correlations(matrix: torch.Tensor, noise: torch.Tensor, spacing: float, length: float) -> torch.Tensor:
    """Return <z(t) z(0)^T> for z = (x, v) in units of the thermal amplitudes, [time, 2, 2]."""
    amplitude = torch.tensor([math.sqrt(KT / STIFFNESS), math.sqrt(KT / MASS)], dtype=torch.float64)
    now, rows = stationary(matrix, noise), []
    for _ in range(round(length / spacing)):
        now = matrix @ now
        rows.append(now / torch.outer(amplitude, amplitude))
    return torch.stack(rows)


def exact_correlations(spacing: float, length: float, friction: float = FRICTION) -> torch.Tensor:
    """exp(A t) for dx = v dt, dv = -w^2 x dt - friction v dt + noise, in the same units."""
    drift = torch.tensor([[0.0, OMEGA], [-OMEGA, -friction]], dtype=torch.float64)
    times = spacing * torch.arange(1, round(length / spacing) + 1, dtype=torch.float64)
    return torch.linalg.matrix_exp(times[:, None, None] * drift)


def correlation_error(maps, spacing: float, friction: float = FRICTION) -> float:
    found = correlations(*maps, spacing, 0.1)
    return float((found - exact_correlations(spacing, 0.1, friction)).abs().max())


def test_autocorrelations_of_the_damped_oscillator():
    # the closed form of the underdamped oscillator for the velocity, against the matrix exponential used below
    q = math.sqrt(OMEGA**2 - FRICTION**2 / 4)
    t = 1e-3 * torch.arange(1, 101, dtype=torch.float64)
    vacf = torch.exp(-FRICTION * t / 2) * (torch.cos(q * t) - FRICTION / (2 * q) * torch.sin(q * t))
    assert torch.allclose(exact_correlations(1e-3, 0.1)[:, 1, 1], vacf, atol=1e-10)
    steps = np.array([1e-3, 5e-4, 2.5e-4, 1.25e-4])
    for errors in (
        np.array([correlation_error(single(dt), dt) for dt in steps]),
        np.array([correlation_error(multiple(dt, 4, 0.05), dt) for dt in steps]),
    ):
        slope, missing = order(steps, errors)
        assert abs(slope - 2) <= missing + 0.01  # the largest error moves between sampled times
        assert missing < 0.1
        assert errors[-1] < (OMEGA * steps[-1]) ** 2 / 24 * OMEGA * 0.1  # the phase error of a Verlet step after 0.1 ps
    # negative controls, at the smallest step: friction off by 5 %, temperature off by 3 K, no friction at all
    assert correlation_error(single(1.25e-4), 1.25e-4, friction=1.05 * FRICTION) > 4 * errors[-1]
    assert correlation_error(single(1.25e-4, kT=KT * 313 / 310), 1.25e-4) > 4 * errors[-1]
    assert correlation_error(multiple(1.25e-4, 4, 0.05, fault="O at the outer step"), 1.25e-4) > 100 * errors[-1]


def test_covariance_on_the_way_to_equilibrium():
    # from rest at the origin: C(t) = C - exp(A t) C exp(A^T t)
    dt = 2.5e-4
    matrix, noise = multiple(4 * dt, 4, 0.05)
    amplitude = torch.tensor([math.sqrt(KT / STIFFNESS), math.sqrt(KT / MASS)], dtype=torch.float64)
    now, exact = torch.zeros(2, 2, dtype=torch.float64), exact_correlations(4 * dt, 0.1)
    for propagator in exact:
        now = matrix @ now @ matrix.T + noise
        expected = torch.eye(2, dtype=torch.float64) - propagator @ propagator.T
        assert float((now / torch.outer(amplitude, amplitude) - expected).abs().max()) < 0.02  # (w dt)^2 / 12 = 0.02
    assert float(now[0, 0] * STIFFNESS / KT) > 0.8  # most of the way


# Water-like molecule with Morse bonds: order, drift, resonance.

WATER = molecule(8, 1, 1, masses=[15.999, 1.008, 1.008])
WATER_MASSES = torch.from_numpy(WATER.masses)
HYDROXYL = molecule(8, 1, masses=[15.999, 1.008])
WAVENUMBER = 3700.0
PERIOD = 1 / (2.99792458e-2 * WAVENUMBER)  # ps
REDUCED = 15.999 * 1.008 / (15.999 + 1.008)
BOND_STIFFNESS = REDUCED * (2 * math.pi / PERIOD) ** 2


class MorseBonds:
    """U = share * (sum over bonds D (1 - exp(-a (r - 0.1)))^2 + sum over 1-3 distances k13/2 (r13 - 0.16)^2), D = 450 kJ/mol.

    `harmonic` replaces the Morse curve by its parabola. `share` is what a student gets of the stiffness.
    """

    name = "morse"

    def __init__(self, system: System, *, share: float = 1.0, harmonic: bool = False) -> None:
        self.system, self.share, self.harmonic = system, share, harmonic

    def energy(self, x: State) -> torch.Tensor:
        return self.energy_forces(x)[0]

    def energy_forces(self, x: State) -> tuple[torch.Tensor, torch.Tensor]:
        depth = 450.0
        a = math.sqrt(BOND_STIFFNESS / (2 * depth))
        apart = x.positions[:, 1:] - x.positions[:, :1]
        r = apart.norm(dim=2, keepdim=True)
        if self.harmonic:
            energy, slope = 0.5 * BOND_STIFFNESS * (r - 0.1) ** 2, BOND_STIFFNESS * (r - 0.1)
        else:
            e = torch.exp(-a * (r - 0.1))
            energy, slope = depth * (1 - e) ** 2, 2 * depth * a * (1 - e) * e
        pull = self.share * slope * apart / r  # on the first atom
        total, forces = self.share * energy.sum(dim=(1, 2)), torch.cat([pull.sum(dim=1, keepdim=True), -pull], dim=1)
        if self.system.n_atoms == 3:
            across = x.positions[:, 2] - x.positions[:, 1]
            d = across.norm(dim=1, keepdim=True)
            total = total + (self.share * 0.5 * 40_000.0 * (d - 0.16) ** 2)[:, 0]
            push = self.share * 40_000.0 * (d - 0.16) * across / d
            forces = forces + torch.stack([torch.zeros_like(push), push, -push], dim=1)
        return total, forces


def total_energy(md: MDState) -> torch.Tensor:
    return md.potential_energy + md.kinetic_energy


def water(fast: MorseBonds, slow: MorseBonds, replicas: int = 4) -> MDState:
    x = torch.tensor([[[0.0, 0, 0], [0.097, 0, 0], [-0.025, 0.1, 0]]], dtype=torch.float64).repeat(replicas, 1, 1)
    v = thermal_velocities(x.shape, WATER_MASSES, KT, torch.Generator().manual_seed(2))
    return start(x, v, masses=WATER_MASSES, potential=slow, fast=fast)


def energies(dt_fs: float, n: int, fault: str = "none") -> torch.Tensor:
    """Total energy minus its first value, every 1.6 fs for 64 fs, [time, replica]."""
    slow, fast = MorseBonds(WATER), MorseBonds(WATER, share=0.9)
    md = water(fast, slow)
    first, rows, per_row = total_energy(md), [], round(1.6 / dt_fs)
    for step in range(40 * per_row):
        md = respa(md, torch.Generator(), fast=fast, slow=slow, dt=dt_fs * FS_PS, n=n, fault=fault)
        if (step + 1) % per_row == 0:
            rows.append(total_energy(md) - first)
    return torch.stack(rows)


def rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


STEPS_FS = np.array([0.8, 0.4, 0.2, 0.1])


def test_energy_error_is_of_second_order_at_a_fixed_number_of_inner_steps():
    slope, missing = order(STEPS_FS, np.array([rms(energies(dt, 4)) for dt in STEPS_FS]))
    assert abs(slope - 2) <= missing < 0.1


@pytest.mark.parametrize(("fault", "at_most"), [("full slow kicks", 0.5), ("fast force of old positions", 1.5)])
def test_energy_error_of_a_broken_step_is_of_lower_order(fault, at_most):
    slope, _ = order(STEPS_FS, np.array([rms(energies(dt, 4, fault)) for dt in STEPS_FS]))
    assert slope < at_most


def test_energy_error_is_of_second_order_in_the_inner_step_at_a_fixed_outer_step():
    # E(h) = E(0) + c h^2 + ...: halving h leaves a quarter of the change
    runs = [energies(0.8, n) for n in (2, 4, 8, 16, 32)]
    changes = np.array([rms(one - other) for one, other in itertools.pairwise(runs)])
    slope, missing = order(1 / np.array([2, 4, 8, 16]), changes)
    assert abs(slope - 2) <= missing < 0.1
    assert rms(runs[-1]) > 10 * changes[-1]  # what is left is the error of the outer step


def hydroxyl_run(
    dt_fs: float, *, share: float = 0.1, harmonic: bool = False, kT: float = 0.1, inner_fs: float = 0.75
) -> torch.Tensor:
    """Change of total energy in kT, [time, replica], of O-H bonds in 2 ps, whose student misses `share`."""
    generator = torch.Generator().manual_seed(1)
    x = torch.zeros(48, 2, 3, dtype=torch.float64)
    x[:, 1, 0] = 0.1
    masses = torch.from_numpy(HYDROXYL.masses)
    slow = MorseBonds(HYDROXYL, harmonic=harmonic)
    fast = MorseBonds(HYDROXYL, share=1 - share, harmonic=harmonic)
    md = start(x, thermal_velocities(x.shape, masses, kT, generator), masses=masses, potential=slow, fast=fast)
    first, rows = total_energy(md), []
    for _ in range(round(2.0 / (dt_fs * FS_PS))):
        n = math.ceil(dt_fs / inner_fs)
        md = respa(md, generator, fast=fast, slow=slow, dt=dt_fs * FS_PS, n=n)
        rows.append((total_energy(md) - first) / kT)
    return torch.stack(rows)


def excursion(dt_fs: float, **options) -> float:
    return float(hydroxyl_run(dt_fs, **options).abs().max())


def test_resonance_at_half_the_period():
    # predicted window of a slow share of 10 %: 4.26-4.72 fs around T/2 = 4.51 fs
    assert PERIOD / FS_PS / 2 == pytest.approx(4.508, abs=1e-3)
    for inside in (4.5, 4.6, 4.7):
        assert excursion(inside) > 1000
    for outside in (2.5, 3.5, 5.0, 5.5):
        assert excursion(outside) < 10
    # a better student has a narrower window: 4.42-4.55 fs at 3 %
    assert excursion(4.7, share=0.03) < 10
    # negative control: without a slow share there is nothing to resonate with
    assert excursion(4.5, share=0.0) < 1


def test_nonlinear_resonance_at_a_third_of_the_period():
    third = PERIOD / FS_PS / 3
    assert third == pytest.approx(3.005, abs=1e-3)
    inside = excursion(0.998 * third, inner_fs=0.5)  # the step makes the bond faster by (w h)^2/24, h the inner step
    nearby = max(excursion(0.97 * third, inner_fs=0.5), excursion(1.02 * third, inner_fs=0.5))
    assert inside > 20 * nearby
    # negative control: it is the anharmonic part that does it; a linear well is stable there
    assert excursion(0.998 * third, inner_fs=0.5, harmonic=True) < 2 * nearby


def drift(dt_fs: float, **options) -> tuple[float, float]:
    """Return the linear drift in kT per ns and degree of freedom, and its standard error over replicas."""
    changes = hydroxyl_run(dt_fs, kT=KT, **options)[round(0.5 / (dt_fs * FS_PS)) :]  # the bonds have lost their common phase
    time_ns = FS_PS**2 * dt_fs * np.arange(len(changes))
    slopes = np.polyfit(time_ns, changes.numpy(), 1)[0] / 6
    return float(slopes.mean()), float(slopes.std(ddof=1) / math.sqrt(len(slopes)))


def test_energy_does_not_drift_below_the_resonances():
    value, error = drift(2.0, share=0.03)
    assert abs(value) < 5 * error
    assert error < 5e-3  # kT per ns and degree of freedom: 2.5 % of kT per ns would be seen
    # negative control: in the window around T/2
    hot, _ = drift(4.55, share=0.1)
    assert hot > 100


# Symmetries.


@pytest.mark.parametrize("fault", ["none", *FAULTS])
def test_jacobian_determinant(fault):
    # of Morse bonds, so that no part is linear: exp(-3 N friction dt), and 1 without friction
    slow, fast = MorseBonds(WATER), MorseBonds(WATER, share=0.8)
    dt, begin = 2e-3, water(fast, slow, replicas=1)

    def determinant(friction: float) -> float:
        def flow(z: torch.Tensor) -> torch.Tensor:
            md = start(z[:9].reshape(1, 3, 3), z[9:].reshape(1, 3, 3), masses=WATER_MASSES, potential=slow, fast=fast)
            generator = torch.Generator().manual_seed(0)
            for _ in range(2):
                md = respa(md, generator, fast=fast, slow=slow, dt=dt, n=3, friction=friction, fault=fault)
            return torch.cat([md.positions.flatten(), md.velocities.flatten()])

        z = torch.cat([begin.positions.flatten(), begin.velocities.flatten()])
        return float(torch.linalg.det(torch.autograd.functional.jacobian(flow, z)))

    newtonian, langevin = abs(determinant(0.0) - 1), abs(determinant(5.0) / math.exp(-9 * 5.0 * 2 * dt) - 1)
    if fault in ("none", "full slow kicks"):  # kicks of any size preserve the volume
        assert max(newtonian, langevin) < 1e-9
    else:
        assert langevin > 1e-2
    if fault == "fast force of old positions":
        assert newtonian > 1e-2


def test_time_reversal_needs_both_forces_at_the_same_positions():
    slow, fast = MorseBonds(WATER), MorseBonds(WATER, share=0.9)

    def return_error(fault: str) -> float:
        begin = water(fast, slow)
        md = begin
        for _ in range(2):
            for _ in range(100):
                md = respa(md, torch.Generator(), fast=fast, slow=slow, dt=1e-3, n=4, fault=fault)
            md = replace(md, velocities=-md.velocities)
        return float((md.positions - begin.positions).abs().max())

    assert return_error("none") < 1e-10
    assert return_error("fast force of old positions") > 1e-6


@pytest.fixture(scope="module")
def pair(alanine):
    """Teacher: the force field. Student: a network of random weights, as unlike the teacher as can be."""
    network = StudentNetwork(StudentMetadata(elements=(1, 6, 7, 8), teacher="amber"), torch.Generator().manual_seed(3)).double()
    return AmberPotential.from_openmm(alanine.openmm_system, alanine.system, name="amber"), network(alanine.system)


class Field:
    """A student in an external field, U + sum (50 x^2 + 100 y^2) / 2: it obeys no third law."""

    strength = torch.tensor([50.0, 100.0, 0.0], dtype=torch.float64)

    def __init__(self, student) -> None:
        self.student, self.system, self.name = student, student.system, "field"

    def energy(self, x: State) -> torch.Tensor:
        return self.energy_forces(x)[0]

    def energy_forces(self, x: State) -> tuple[torch.Tensor, torch.Tensor]:
        energy, forces = self.student.energy_forces(x)
        return energy + 0.5 * (self.strength * x.positions.square()).sum(dim=(1, 2)), forces - self.strength * x.positions


def alanine_start(alanine, fast, slow, *, transform=lambda x: x, order=slice(None)) -> MDState:
    generator = torch.Generator().manual_seed(6)
    masses = torch.from_numpy(alanine.system.masses)
    x = torch.from_numpy(alanine.positions)[None] + 0.002 * torch.randn(1, 22, 3, generator=generator, dtype=torch.float64)
    v = thermal_velocities(x.shape, masses, KT, generator)
    turn = transform(v) - transform(torch.zeros_like(v))  # velocities do not translate
    return start(transform(x)[:, order], turn[:, order], masses=masses[order], potential=slow, fast=fast)


def newtonian(md: MDState, fast, slow, *, steps: int = 20, n: int = 2) -> MDState:
    for _ in range(steps):
        md = respa(md, torch.Generator(), fast=fast, slow=slow, dt=1e-3, n=n)
    return md


def test_momentum_and_angular_momentum_with_a_network(alanine, pair):
    slow, student = pair

    def changes(fast) -> tuple[float, float]:
        before = alanine_start(alanine, fast, slow)
        after = newtonian(before, fast, slow)
        assert float((after.positions - before.positions).abs().max()) > 1e-3  # it moved
        values = []
        for md in (before, after):
            p = md.masses[:, None] * md.velocities
            values.append((p.sum(dim=1), torch.cross(md.positions, p, dim=2).sum(dim=1)))
        return tuple(float((a - b).abs().max()) for a, b in zip(*values, strict=True))

    momentum, angular = changes(student)
    assert momentum < 1e-9  # of about 20 Da nm/ps
    assert angular < 1e-9
    # negative control: the inner steps feel a force from outside, which the outer kicks cancel at their positions only
    momentum, angular = changes(Field(student))
    assert min(momentum, angular) > 1e-6


def test_a_moved_molecule_has_the_moved_trajectory(alanine, pair):
    slow, student = pair
    matrix, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64))

    def moved(x: torch.Tensor) -> torch.Tensor:
        return x @ (matrix * torch.det(matrix)).T + torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64)

    def mismatch(fast) -> float:
        plain = newtonian(alanine_start(alanine, fast, slow), fast, slow)
        turned = newtonian(alanine_start(alanine, fast, slow, transform=moved), fast, slow)
        return float((moved(plain.positions) - turned.positions).abs().max())

    assert mismatch(student) < 1e-10
    assert mismatch(Field(student)) > 1e-6  # negative control


def test_renamed_atoms_have_the_renamed_trajectory(alanine, pair):
    # the student alone, as teacher and in the inner steps: it knows elements only, so any order of the atoms will do
    _, student = pair
    order = torch.randperm(22, generator=torch.Generator().manual_seed(8))
    shuffled = replace(
        alanine.system,
        atomic_numbers=alanine.system.atomic_numbers[order.numpy()],
        masses=alanine.system.masses[order.numpy()],
        bonds=np.zeros((0, 2), dtype=np.int64),
    )
    renamed = student.network(shuffled)
    plain = newtonian(alanine_start(alanine, student, student), student, student)
    other = newtonian(alanine_start(alanine, renamed, renamed, order=order), renamed, renamed)
    assert float((plain.positions[:, order] - other.positions).abs().max()) < 1e-10
    # negative control: the order matters to what is not told of it
    assert float((plain.positions - other.positions).abs().max()) > 1e-2


@pytest.mark.parametrize("fault", ["none", *FAULTS])
def test_identities_with_a_network(alanine, pair, fault):
    # one inner step is the teacher's single step whatever the network says; teacher = student is the single step at h
    slow, student = pair

    def trajectory(fast, teacher, *, dt: float, n: int, steps: int) -> torch.Tensor:
        md, generator = alanine_start(alanine, fast, teacher), torch.Generator().manual_seed(9)
        for _ in range(steps):
            if n:
                md = respa(md, generator, fast=fast, slow=teacher, dt=dt, n=n, friction=5.0, fault=fault)
            else:
                md = baoab(md, potential=teacher, dt=dt, kT=KT, friction=5.0, generator=generator)
        return md.positions

    teacher = trajectory(slow, slow, dt=1e-3, n=0, steps=12)
    any_student = float((trajectory(student, slow, dt=1e-3, n=1, steps=12) - teacher).abs().max())
    same_student = float((trajectory(slow, slow, dt=3e-3, n=3, steps=4) - teacher).abs().max())
    if fault == "none":
        assert max(any_student, same_student) < 1e-11
    else:
        assert max(any_student, same_student) > 1e-5
