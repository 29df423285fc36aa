"""Time correlations against closed forms: damped oscillators, Brownian motion, rotational diffusion, a two-site jump."""

from dataclasses import replace

import numpy as np
import pytest
from made_runs import free_atoms, water
from scipy.linalg import expm

from longstride.analysis.block_statistics import blocks_of
from longstride.analysis.dynamics_run import DynamicsRun
from longstride.analysis.spectra import (
    LIGHT_CM_PER_PS,
    cosine_transform,
    infrared_spectrum,
    lagged_products,
    largest_wavenumber,
    velocity_spectra,
)
from longstride.analysis.transport import (
    corrected_diffusion,
    cubic_edge,
    diffusion,
    rotational_relaxation,
    squared_displacement,
    torsional_relaxation,
    viscosity_from_boxes,
    yeh_hummer,
)
from longstride.errors import DataError, LongstrideError
from longstride.systems import backbone_torsions, set_torsion
from longstride.units import thermal_energy

KT = thermal_energy(300.0)
NU = 500.0  # 1/cm
OMEGA = 2 * np.pi * LIGHT_CM_PER_PS * NU
GAMMA = 20.0  # 1/ps
DT = 0.004


def make(system, positions, *, velocities=None, dt=DT, **changes):
    fields = {
        "label": "made", "target": "none", "seed": 0, "system": system, "masses": system.masses, "temperature_K": 300.0,
        "friction_per_ps": GAMMA, "save_interval_ps": dt, "positions": positions, "velocities": velocities,
    }  # fmt: skip
    return DynamicsRun(**(fields | changes))


def damped(seed, *, frames=800, replicas=24, omega=OMEGA, mass=10.0):
    """Exact samples of damped oscillators: x'' = -w^2 x - g x' + noise, two atoms."""
    generator = np.random.default_rng(seed)
    step = expm(np.array([[0, 1], [-(omega**2), -GAMMA]]) * DT)
    stationary = np.diag([KT / mass / omega**2, KT / mass])
    noise = np.linalg.cholesky(stationary - step @ stationary @ step.T)
    state = np.sqrt(np.diag(stationary)) * generator.normal(size=(replicas, 2, 3, 2))
    saved = np.empty((frames, *state.shape))
    for t in range(frames):
        saved[t] = state
        state = state @ step.T + generator.normal(size=state.shape) @ noise.T
    system = free_atoms([6, 8], masses=[mass, mass])
    return make(system, saved[..., 0], velocities=saved[..., 1], charges=np.array([0.5, -0.5]))


def damped_vacf(t, omega=OMEGA):
    shifted = np.sqrt(omega**2 - GAMMA**2 / 4)
    return np.exp(-GAMMA * t / 2) * (np.cos(shifted * t) - GAMMA / (2 * shifted) * np.sin(shifted * t))


def named(observables):
    return {(item.name, item.part): item for item in observables}


def test_lagged_products_equal_the_double_sum():
    x = np.random.default_rng(0).normal(size=(15, 4, 3))
    direct = [(x[: 15 - t] * x[t:]).sum(axis=(1, 2)).mean() for t in range(9)]
    np.testing.assert_allclose(lagged_products(x, 9), direct, atol=1e-12)


def test_damped_oscillator_vacf_and_spectrum():
    run = damped(1)
    grid = np.arange(50.0, 1500.0, 50.0)
    found = named(velocity_spectra(run, blocks_of(800, 24), max_lag_ps=0.5, wavenumbers=grid, window="none"))
    assert set(part for _, part in found) == {"all", "C", "O"}
    for part in ("all", "C", "O"):
        vacf, spectrum = found["velocity autocorrelation", part], found["velocity spectrum", part]
        assert (np.abs(vacf.values - damped_vacf(vacf.grid))[1:] < 5 * vacf.errors[1:]).all()
        w = 2 * np.pi * LIGHT_CM_PER_PS * grid
        truth = 4 * LIGHT_CM_PER_PS * GAMMA * w**2 / ((OMEGA**2 - w**2) ** 2 + GAMMA**2 * w**2)
        peak = truth.max()
        assert (np.abs(spectrum.values - truth) < 5 * spectrum.errors + 0.01 * peak).all()  # 1 %: C(t) cut at 0.5 ps, e^-5
        assert spectrum.grid[spectrum.values.argmax()] == NU
    # a 20 % error of the mass moves the line by 10 %, and is seen
    wrong = damped(1, omega=OMEGA / np.sqrt(1.2))
    off = named(velocity_spectra(wrong, blocks_of(800, 24), max_lag_ps=0.5, wavenumbers=grid, window="none"))
    vacf = off["velocity autocorrelation", "all"]
    assert (np.abs(vacf.values - damped_vacf(vacf.grid))[1:] / vacf.errors[1:]).max() > 20


def test_transform_of_a_known_function():
    t = np.arange(2001) * 0.001
    grid = np.linspace(0, 3000, 601)
    spectrum = np.exp(-20 * t) @ cosine_transform(2001, 0.001, grid, window="none")
    w = 2 * np.pi * LIGHT_CM_PER_PS * grid
    np.testing.assert_allclose(spectrum, 4 * LIGHT_CM_PER_PS * 20 / (400 + w**2), rtol=0, atol=2e-5)
    smooth = np.exp(-20 * t) @ cosine_transform(2001, 0.001, np.arange(0, 16678, 5.0), window="hann")
    assert smooth.sum() * 5 - smooth[0] * 2.5 == pytest.approx(1.0, abs=2e-3)  # area C(0)
    assert largest_wavenumber(0.004) == pytest.approx(4169.6, abs=0.2)
    with pytest.raises(LongstrideError, match="save more often"):
        cosine_transform(100, 0.006, np.array([3500.0]))
    with pytest.raises(LongstrideError, match="window"):
        cosine_transform(100, 0.001, np.array([3500.0]), window="box")


def test_infrared_spectrum_from_charges_and_from_dipoles():
    run = damped(2)
    grid = np.arange(50.0, 1500.0, 50.0)
    units = blocks_of(800, 24)
    charges = infrared_spectrum(run, units, max_lag_ps=0.5, wavenumbers=grid, window="none")
    w = 2 * np.pi * LIGHT_CM_PER_PS * grid
    shape = 4 * LIGHT_CM_PER_PS * GAMMA * w**2 / ((OMEGA**2 - w**2) ** 2 + GAMMA**2 * w**2)
    truth = 3 * 2 * 0.25 * KT / 10.0 * shape  # <|sum q v|^2> = 3 sum q^2 kT / m
    assert (np.abs(charges.values - truth) < 5 * charges.errors + 0.01 * truth.max()).all()
    dipoles = np.einsum("frax,a->frx", run.positions, run.charges)
    given = infrared_spectrum(replace(run, dipoles=dipoles), units, max_lag_ps=0.5, wavenumbers=grid, window="none")
    damping = (np.sin(w * DT) / (w * DT)) ** 2  # of a central difference
    np.testing.assert_allclose(given.values, truth * damping, atol=5 * charges.errors.max() + 0.01 * truth.max())
    # without a dipole there is no line
    neutral = infrared_spectrum(replace(run, charges=np.zeros(2)), units, max_lag_ps=0.5, wavenumbers=grid)
    assert np.abs(neutral.values).max() == 0
    with pytest.raises(DataError, match="dipoles, or charges"):
        infrared_spectrum(replace(run, charges=None), units, max_lag_ps=0.5, wavenumbers=grid)


def brownian(seed, *, D=2.3e-3, frames=1000, replicas=10, molecules=4, edge=1.8644, dt=0.1, wrap=False):
    generator = np.random.default_rng(seed)
    steps = np.sqrt(2 * D * dt) * generator.normal(size=(frames, replicas, molecules, 1, 3))
    start = edge * generator.random((1, replicas, molecules, 1, 3))
    centres = start + np.cumsum(steps, axis=0)
    shape = 0.05 * generator.normal(size=(1, 1, molecules, 3, 3)) * np.ones((frames, replicas, 1, 1, 1))
    positions = (centres + shape).reshape(frames, replicas, 3 * molecules, 3)
    if wrap:
        positions = positions % edge
    return make(water(molecules), positions, dt=dt, box=edge * np.eye(3))


def test_squared_displacement_equals_the_double_sum():
    x = np.cumsum(np.random.default_rng(0).normal(size=(30, 5, 3)), axis=0) + 1000.0
    direct = [((x[t:] - x[: 30 - t]) ** 2).sum(axis=2).mean() for t in range(10)]
    np.testing.assert_allclose(squared_displacement(x, 10), direct, atol=1e-9)


def test_brownian_diffusion_and_its_control():
    run = brownian(3)
    msd, D = diffusion(run, blocks_of(1000, 10, shortest=40), fit_from_ps=0.5, fit_to_ps=4.0)
    assert abs(D.values - 2.3e-3) < 5 * D.errors
    assert D.errors < 0.1 * D.values
    assert (np.abs(msd.values - 6 * 2.3e-3 * msd.grid) <= 5 * msd.errors).all()
    faster = diffusion(brownian(3, D=3.3e-3), blocks_of(1000, 10, shortest=40), fit_from_ps=0.5, fit_to_ps=4.0)[1]
    assert (faster.values - 2.3e-3) > 8 * faster.errors


def test_wrapped_positions_give_a_wrong_coefficient_and_are_refused():
    run = brownian(4, frames=2000, wrap=True)
    with pytest.raises(DataError, match="unwrapped"):
        diffusion(run, blocks_of(2000, 10), fit_from_ps=0.5, fit_to_ps=4.0)
    blind = replace(run, box=None)  # the same frames without the knowledge of a box
    wrong = diffusion(blind, blocks_of(2000, 10, shortest=40), fit_from_ps=0.5, fit_to_ps=4.0)[1]
    assert abs(wrong.values - 2.3e-3) > 8 * wrong.errors


def test_yeh_hummer_by_hand():
    # 2.837297 * 2.49434 / (6 * 3.14159265 * 0.85 * 602.214 * 1.8644) = 7.07718 / 17989.3
    found = yeh_hummer(temperature_K=300.0, viscosity_mPa_s=0.85, box_edge_nm=1.8644)
    assert found == pytest.approx(7.07718 / 17989.3, rel=1e-4)
    assert found == pytest.approx(3.93e-4, rel=2e-3)  # 0.39e-5 cm^2/s
    # the same in SI: xi k_B T / (6 pi eta L) in m^2/s; 1 nm^2/ps = 1e-6 m^2/s
    assert found * 1e-6 == pytest.approx(2.837297 * 1.380649e-23 * 300 / (6 * np.pi * 0.85e-3 * 1.8644e-9), rel=1e-6)
    with pytest.raises(LongstrideError, match="positive"):
        yeh_hummer(temperature_K=300.0, viscosity_mPa_s=0.0, box_edge_nm=1.0)
    assert cubic_edge(2.0 * np.eye(3)) == 2.0
    with pytest.raises(LongstrideError, match="cubic"):
        cubic_edge(np.diag([2.0, 2.0, 2.1]))


def test_corrected_diffusion_shifts_the_value_and_keeps_the_error():
    run = brownian(5)
    D = diffusion(run, blocks_of(1000, 10, shortest=40), fit_from_ps=0.5, fit_to_ps=4.0)[1]
    corrected = corrected_diffusion(D, box=run.box, temperature_K=300.0, viscosity_mPa_s=0.85)
    shift = yeh_hummer(temperature_K=300.0, viscosity_mPa_s=0.85, box_edge_nm=1.8644)
    assert corrected.values == pytest.approx(D.values + shift)
    assert corrected.errors == pytest.approx(D.errors)


def test_viscosity_from_boxes_of_several_sizes():
    edges = np.array([1.6, 2.0, 2.5, 3.2])
    true = np.array([2.3e-3 - yeh_hummer(temperature_K=300.0, viscosity_mPa_s=0.7, box_edge_nm=edge) for edge in edges])
    errors = np.full(4, 1e-5)
    exact = viscosity_from_boxes(diffusion=true, errors=errors, box_edges_nm=edges, temperature_K=300.0)
    assert exact.viscosity_mPa_s == pytest.approx(0.7, rel=1e-9)
    assert exact.diffusion == pytest.approx(2.3e-3, rel=1e-9)
    generator = np.random.default_rng(6)
    fits = [
        viscosity_from_boxes(
            diffusion=true + errors * generator.normal(size=4), errors=errors, box_edges_nm=edges, temperature_K=300.0
        )
        for _ in range(400)
    ]
    assert np.std([fit.viscosity_mPa_s for fit in fits]) == pytest.approx(exact.viscosity_error_mPa_s, rel=0.15)
    assert np.std([fit.diffusion for fit in fits]) == pytest.approx(exact.diffusion_error, rel=0.15)
    with pytest.raises(LongstrideError, match="at least two sizes"):
        viscosity_from_boxes(diffusion=true[:1], errors=errors[:1], box_edges_nm=edges[:1], temperature_K=300.0)
    with pytest.raises(LongstrideError, match="does not grow"):
        viscosity_from_boxes(diffusion=true[::-1], errors=errors, box_edges_nm=edges, temperature_K=300.0)


def rotor(seed, *, D=0.5, frames=600, replicas=20, dt=0.01):
    """One water that turns by small random rotations: C_l = exp(-l (l+1) D t) up to O(D dt)."""
    from scipy.spatial.transform import Rotation

    generator = np.random.default_rng(seed)
    shape = np.array([[0.0, 0, 0], [0.0957, 0, 0], [-0.024, 0.0927, 0]])
    turn = Rotation.random(replicas, rng=generator)
    positions = np.empty((frames, replicas, 3, 3))
    for t in range(frames):
        positions[t] = np.einsum("rij,aj->rai", turn.as_matrix(), shape)
        turn = Rotation.from_rotvec(np.sqrt(2 * D * dt) * generator.normal(size=(replicas, 3))) * turn
    return make(water(), positions, dt=dt)


@pytest.mark.parametrize("order", [1, 2])
def test_rotational_diffusion(order):
    run = rotor(7)
    curve, time = rotational_relaxation(run, blocks_of(600, 20), max_lag_ps=1.0, order=order)
    rate = order * (order + 1) * 0.5
    assert curve.values[0] == pytest.approx(1.0, abs=1e-6)
    assert (np.abs(curve.values - np.exp(-rate * curve.grid))[1:] < 5 * curve.errors[1:]).all()
    assert abs(time.values - (1 - np.exp(-rate)) / rate) < 5 * time.errors
    if order == 1:  # e^-1 is left
        assert "% of the correlation is left at the longest lag" in time.note
    slower = rotational_relaxation(rotor(7, D=0.25), blocks_of(600, 20), max_lag_ps=1.0, order=order)[1]
    assert abs(slower.values - (1 - np.exp(-rate)) / rate) > 5 * slower.errors
    with pytest.raises(LongstrideError, match="order"):
        rotational_relaxation(run, blocks_of(600, 20), max_lag_ps=1.0, order=3)


def test_torsional_relaxation_of_a_two_site_jump(alanine):
    generator = np.random.default_rng(8)
    x = alanine.positions
    (name, atoms), *_ = backbone_torsions(alanine.system)
    assert name.startswith("phi")
    sites = np.stack([set_torsion(alanine.system, x, atoms, angle) for angle in (-1.2, 1.2)])
    frames, replicas, rate = 500, 30, 0.05  # probability of a jump per frame, C(t) = (1 - 2 rate)^t
    jumps = generator.random((frames, replicas)) < rate
    state = (np.cumsum(jumps, axis=0) + generator.integers(2, size=replicas)) % 2
    run = make(alanine.system, sites[state], dt=0.1)
    curve, time, *_ = torsional_relaxation(run, blocks_of(frames, replicas), max_lag_ps=2.0)
    truth = (1 - 2 * rate) ** np.arange(21)
    assert (np.abs(curve.values - truth)[1:] < 5 * curve.errors[1:]).all()
    assert abs(time.values - np.trapezoid(truth, dx=0.1)) < 5 * time.errors


def test_lags_longer_than_a_run_are_refused():
    run = rotor(9, frames=20, replicas=2)
    with pytest.raises(LongstrideError, match="longest lag"):
        rotational_relaxation(run, blocks_of(20, 2, minimum=2), max_lag_ps=1.0)
