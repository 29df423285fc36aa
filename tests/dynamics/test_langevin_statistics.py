"""Ensemble averages and time correlations of the Langevin integrators against closed forms, within five standard errors."""

import math

import numpy as np
import pytest
import torch

from longstride.dynamics.integrators import MDState, baoab, half_step_velocities, respa_baoab, start, thermal_velocities
from longstride.state import State, System
from longstride.units import BOLTZMANN_KJ_PER_MOL_K, thermal_energy

TEMPERATURE = 310.0
KT = thermal_energy(TEMPERATURE)
MASSES = torch.tensor([1.008, 12.011, 15.999], dtype=torch.float64)
STIFFNESS = torch.tensor([20_000.0, 60_000.0, 5_000.0], dtype=torch.float64)  # kJ/mol/nm^2, one per atom


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are tiny here
    yield
    torch.set_num_threads(before)


class Wells:
    """Independent isotropic harmonic wells, U = sum k_a |x_a|^2 / 2."""

    name = "wells"
    system = System(
        name="wells",
        atomic_numbers=np.array([1, 6, 8]),
        masses=MASSES.numpy(),
        bonds=np.zeros((0, 2), dtype=np.int64),
        atom_names=("H", "C", "O"),
        residue_names=("WEL",) * 3,
        residue_indices=np.zeros(3, dtype=np.int64),
    )

    def __init__(self, scale: float = 1.0) -> None:
        self.k = scale * STIFFNESS[:, None]

    def energy(self, x: State) -> torch.Tensor:
        return 0.5 * (self.k * x.positions.square()).sum(dim=(1, 2))

    def energy_forces(self, x: State) -> tuple[torch.Tensor, torch.Tensor]:
        return self.energy(x), -self.k * x.positions


def equilibrium(replicas: int, generator: torch.Generator, fast: Wells | None = None) -> MDState:
    shape = torch.Size((replicas, 3, 3))
    x = (KT / STIFFNESS[:, None]).sqrt() * torch.randn(shape, generator=generator, dtype=torch.float64)
    return start(x, thermal_velocities(shape, MASSES, KT, generator), masses=MASSES, potential=Wells(), fast=fast)


def standard_error(samples: torch.Tensor) -> torch.Tensor:
    """Standard error over replicas, which are independent (dimension 0)."""
    return samples.std(dim=0) / math.sqrt(len(samples))


def test_thermal_velocities():
    v = thermal_velocities(torch.Size((20_000, 3, 3)), MASSES, KT, torch.Generator().manual_seed(0))
    square = (MASSES[:, None] * v.square()).mean(dim=2)
    assert ((square.mean(dim=0) - KT).abs() < 5 * standard_error(square)).all()


def test_position_variance_and_kinetic_energy_of_baoab():
    # BAOAB samples the positions of a harmonic well exactly at any stable step; velocities carry an O(dt^2) error,
    # <m v^2> = kT (1 - (w dt)^2 / 4) after a full step, doi:10.1093/amrx/abs010
    generator = torch.Generator().manual_seed(1)
    dt = 4e-3
    md = equilibrium(3000, generator)
    x2, v2 = torch.zeros(3000, 3, dtype=torch.float64), torch.zeros(3000, 3, dtype=torch.float64)
    for _ in range(400):
        md = baoab(md, potential=Wells(), dt=dt, kT=KT, friction=20.0, generator=generator)
        x2 += md.positions.square().mean(dim=2) / 400
        v2 += md.velocities.square().mean(dim=2) / 400
    omega2 = STIFFNESS / MASSES
    assert ((x2.mean(dim=0) - KT / STIFFNESS).abs() < 5 * standard_error(x2)).all()
    expected = KT / MASSES * (1 - omega2 * dt**2 / 4)
    assert ((v2.mean(dim=0) - expected).abs() < 5 * standard_error(v2)).all()
    # negative control: the naive expectation, without the known step error, is excluded for hydrogen
    assert (v2.mean(dim=0) - KT / MASSES)[0].abs() > 5 * standard_error(v2)[0]


def damped_autocorrelation(time: torch.Tensor, omega: float, friction: float) -> torch.Tensor:
    """<x(0) x(t)> / <x^2> of dv = -w^2 x dt - g v dt + noise: e^(-g t/2) (cos(q t) + g/(2 q) sin(q t)), q^2 = w^2 - g^2/4."""
    q = math.sqrt(omega**2 - friction**2 / 4)
    return torch.exp(-friction * time / 2) * (torch.cos(q * time) + friction / (2 * q) * torch.sin(q * time))


def autocorrelation(step, md: MDState, generator: torch.Generator, count: int) -> torch.Tensor:
    """x(0) x(t) averaged over directions, [replica, time, atom]."""
    first, products = md.positions, []
    for _ in range(count):
        md = step(md, generator)
        products.append((first * md.positions).mean(dim=2))
    return torch.stack(products, dim=1)


def test_damped_oscillator_autocorrelation_single_and_multiple_step():
    friction, dt = 15.0, 5e-4
    fast = Wells(0.97)  # a student that is 3 % too soft
    single = lambda md, g: baoab(md, potential=Wells(), dt=dt, kT=KT, friction=friction, generator=g)  # noqa: E731
    multiple = lambda md, g: respa_baoab(  # noqa: E731
        md, fast=fast, slow=Wells(), n_inner=4, dt=4 * dt, kT=KT, friction=friction, generator=g
    )
    for step, spacing in ((single, dt), (multiple, 4 * dt)):
        generator = torch.Generator().manual_seed(2)
        count = round(0.1 / spacing)
        measured = autocorrelation(step, equilibrium(2000, generator, fast), generator, count)
        time = spacing * torch.arange(1, count + 1, dtype=torch.float64)
        for atom in range(3):
            omega = math.sqrt(float(STIFFNESS[atom] / MASSES[atom]))
            error = standard_error(measured[:, :, atom])
            variance = KT / float(STIFFNESS[atom])
            deviation = (measured[:, :, atom].mean(dim=0) - variance * damped_autocorrelation(time, omega, friction)).abs()
            assert (deviation < 5 * error + 0.003 * variance).all()
            # negative control: undamped motion is excluded
            undamped = (measured[:, :, atom].mean(dim=0) - variance * torch.cos(omega * time)).abs()
            assert (undamped > 5 * error + 0.003 * variance).any()


def test_temperature_per_element_of_multiple_time_steps():
    generator = torch.Generator().manual_seed(3)
    fast, dt, n = Wells(0.97), 2e-3, 4
    md = equilibrium(2000, generator, fast)
    total = torch.zeros(2000, 3, dtype=torch.float64)
    for _ in range(300):
        md = respa_baoab(md, fast=fast, slow=Wells(), n_inner=n, dt=dt, kT=KT, friction=5.0, generator=generator)
        v = half_step_velocities(md, dt=dt, n_inner=n)
        total += MASSES * v.square().sum(dim=2) / (3 * BOLTZMANN_KJ_PER_MOL_K) / 300
    error = standard_error(total)
    assert ((total.mean(dim=0) - TEMPERATURE).abs() < 5 * error + 0.01 * TEMPERATURE).all()
    assert (error < 0.01 * TEMPERATURE).all()


def test_half_step_velocities_are_thermal_at_large_steps():
    generator = torch.Generator().manual_seed(6)
    dt, friction = 7e-3, 20.0  # omega dt of the hydrogen is 0.99
    half, end = torch.zeros(2, 3000, 3, dtype=torch.float64)
    md = equilibrium(3000, generator)
    for step in range(240):
        md = baoab(md, potential=Wells(), dt=dt, kT=KT, friction=friction, generator=generator)
        if step >= 40:
            half += MASSES * half_step_velocities(md, dt=dt).square().sum(dim=2) / (3 * KT) / 200
            end += MASSES * md.velocities.square().sum(dim=2) / (3 * KT) / 200
    assert ((half.mean(dim=0) - 1).abs() < 5 * standard_error(half)).all()
    # negative control: the velocities at the end of the step are too cold, by the factor of the docstring
    factor = 1 - (STIFFNESS / MASSES) * dt**2 / 4
    assert ((end.mean(dim=0) - factor).abs() < 5 * standard_error(end)).all()
    assert (end.mean(dim=0)[0] - 1).abs() > 20 * standard_error(end)[0]


def test_half_step_velocities_of_multiple_time_steps():
    """They are the velocities after O of the last inner step, which a step at zero friction shows directly."""
    generator = torch.Generator().manual_seed(7)
    fast, dt, n = Wells(0.97), 2e-3, 4
    md = equilibrium(5, generator, fast)
    after = respa_baoab(md, fast=fast, slow=Wells(), n_inner=n, dt=dt, kT=KT, friction=0.0, generator=generator)
    h, m = dt / n, MASSES[:, None]
    x, v, f = md.positions, md.velocities + 0.5 * dt / m * (md.forces - md.fast_forces), md.fast_forces
    for _ in range(n):
        v = v + 0.5 * h / m * f
        x = x + h * v
        middle, f = v, fast.energy_forces(State(positions=x))[1]
        v = v + 0.5 * h / m * f
    assert torch.allclose(half_step_velocities(after, dt=dt, n_inner=n), middle, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(half_step_velocities(after, dt=dt, n_inner=1), middle, rtol=1e-6)


def test_agrees_with_openmm_langevin_middle():
    import openmm
    from openmm import unit

    system = openmm.System()
    force = openmm.CustomExternalForce("0.5*k*(x^2+y^2+z^2)")
    force.addPerParticleParameter("k")
    for copy in range(300):  # 300 independent copies of the three wells
        for atom in range(3):
            system.addParticle(float(MASSES[atom]))
            force.addParticle(3 * copy + atom, [float(STIFFNESS[atom])])
    system.addForce(force)
    dt, friction, steps = 2e-3, 20.0, 1500
    integrator = openmm.LangevinMiddleIntegrator(TEMPERATURE, friction, dt)
    integrator.setRandomNumberSeed(4)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(np.zeros((900, 3)))
    context.setVelocitiesToTemperature(TEMPERATURE, 5)
    integrator.step(300)
    theirs = np.zeros((300, 3))
    for _ in range(steps // 10):
        integrator.step(10)
        x = context.getState(positions=True).getPositions(asNumpy=True).value_in_unit(unit.nanometer)
        theirs += (x**2).mean(axis=1).reshape(300, 3) / (steps // 10)
    generator = torch.Generator().manual_seed(6)
    md = equilibrium(300, generator)
    ours = torch.zeros(300, 3, dtype=torch.float64)
    for _ in range(steps):
        md = baoab(md, potential=Wells(), dt=dt, kT=KT, friction=friction, generator=generator)
        ours += md.positions.square().mean(dim=2) / steps
    errors = np.hypot(theirs.std(axis=0), ours.numpy().std(axis=0)) / math.sqrt(300)
    assert (np.abs(theirs.mean(axis=0) - ours.numpy().mean(axis=0)) < 5 * errors).all()
