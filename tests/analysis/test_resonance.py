"""The linear model of resonance against the published numbers and against a run of the integrator itself."""

import numpy as np
import pytest
import torch

from longstride.analysis.resonance import (
    PALETTE,
    MeasuredScan,
    draw_resonance,
    friction_needed,
    growth_per_outer_step,
    linear_scan,
    period_fs,
    respa_matrix,
    second_moment_matrix,
)
from longstride.dynamics.integrators import respa_baoab, start
from longstride.errors import LongstrideError
from longstride.potentials.analytic import HarmonicWell
from longstride.state import System

OH, CH = 3700.0, 3000.0


@pytest.mark.parametrize(
    ("wavenumber", "period", "half", "third"), [(3700, 9.02, 4.51, 3.01), (3400, 9.81, 4.905, 3.27), (3000, 11.12, 5.56, 3.71)]
)
def test_periods(wavenumber, period, half, third):
    assert period_fs(wavenumber) == pytest.approx(period, abs=0.006)
    assert period_fs(wavenumber) / 2 == pytest.approx(half, abs=0.006)
    assert period_fs(wavenumber) / 3 == pytest.approx(third, abs=0.006)


@pytest.mark.parametrize(
    ("wavenumber", "share", "low", "high"),
    [
        (OH, 0.01, 4.47, 4.50),
        (OH, 0.03, 4.42, 4.55),
        (OH, 0.10, 4.26, 4.72),
        (CH, 0.01, 5.52, 5.56),
        (CH, 0.03, 5.46, 5.62),
        (CH, 0.10, 5.27, 5.84),
    ],
)
def test_unstable_windows(wavenumber, share, low, high):
    grid = np.arange(400, 620) / 100  # 0.01 fs, the digits of the numbers
    (window,) = linear_scan(grid, wavenumber_per_cm=wavenumber, slow_share=share).windows_fs
    assert window == pytest.approx((low, high), abs=0.0101)


@pytest.mark.parametrize(("share", "growth"), [(0.03, 0.048), (0.10, 0.18)])
def test_growth_at_the_peak(share, growth):
    # theory: the peak is pi d / 2 to first order
    scan = linear_scan(np.arange(4.0, 5.2, 0.001), wavenumber_per_cm=OH, slow_share=share)
    assert scan.largest_growth == pytest.approx(growth, rel=0.04)
    small = linear_scan(np.arange(4.3, 4.7, 0.0005), wavenumber_per_cm=OH, slow_share=0.001)
    assert small.largest_growth == pytest.approx(np.pi * 0.001 / 2, rel=0.05)


@pytest.mark.parametrize(("share", "friction"), [(0.01, 10), (0.03, 50), (0.10, 100)])
def test_friction_that_calms_the_oh_mode(share, friction):
    grid = np.arange(400, 520) / 100
    assert friction_needed(grid, (1, 10, 20, 50, 100), wavenumber_per_cm=OH, slow_share=share) == friction


@pytest.mark.parametrize(("share", "friction"), [(0.01, 10), (0.03, 20), (0.10, 100)])
def test_friction_that_calms_the_ch_mode(share, friction):
    grid = np.arange(500, 620) / 100
    assert friction_needed(grid, (1, 10, 20, 50, 100), wavenumber_per_cm=CH, slow_share=share) == friction


def test_a_perfect_fast_force_has_no_window_and_a_map_of_area_one():
    scan = linear_scan(np.arange(2.0, 12.0, 0.01), wavenumber_per_cm=OH, slow_share=0.0)
    assert scan.windows_fs == ()
    # one level, the whole force at the outer step: unstable beyond T / pi (Verlet), not around T/2
    whole = [growth_per_outer_step(wavenumber_per_cm=OH, slow_share=1.0, dt_outer_fs=t, n_inner=6) for t in (2.85, 2.90)]
    assert whole[0] == pytest.approx(1.0, abs=1e-7)
    assert whole[1] > 1.1
    for share in (-0.1, 0.02, 0.5):
        step = respa_matrix(wavenumber_per_cm=OH, slow_share=share, dt_outer_fs=4.3, n_inner=4)
        assert np.linalg.det(step) == pytest.approx(1.0, abs=1e-12)


def test_second_moments_are_those_of_the_map():
    generator = np.random.default_rng(0)
    step = generator.normal(size=(2, 2))
    x = generator.normal(size=(2, 500))
    y = step @ x

    def moments(z):
        return np.array([(z[0] ** 2).mean(), (z[0] * z[1]).mean(), (z[1] ** 2).mean()])

    np.testing.assert_allclose(second_moment_matrix(step) @ moments(x), moments(y), rtol=1e-12)


def atom(mass=1.008):
    return System(
        name="H", atomic_numbers=np.array([1]), masses=np.array([mass]), bonds=np.zeros((0, 2), dtype=np.int64),
        atom_names=("H",), residue_names=("H",), residue_indices=np.zeros(1, dtype=np.int64),
    )  # fmt: skip


@pytest.mark.parametrize("friction", [0.0, 20.0])
@pytest.mark.parametrize(("dt", "n_inner", "share"), [(4.5, 9, 0.1), (4.0, 4, 0.03), (3.0, 3, -0.05)])
def test_the_matrix_is_the_integrator(dt, n_inner, share, friction):
    mass = 1.008
    k = mass * (2 * np.pi * 2.99792458e-2 * OH) ** 2
    centre = torch.zeros(1, 3, dtype=torch.float64)
    reference, fast = (HarmonicWell(atom(), center=centre, k=scale * k) for scale in (1.0, 1 - share))
    x = torch.tensor([[[1e-3, 0.0, 2e-3]]], dtype=torch.float64)
    v = torch.tensor([[[0.3, 1.0, 0.0]]], dtype=torch.float64)
    md = start(x, v, masses=torch.tensor([mass], dtype=torch.float64), potential=reference, fast=fast)
    generator = torch.Generator().manual_seed(0)
    md = respa_baoab(  # at kT = 0 the noise vanishes and the mean of the map remains
        md, fast=fast, slow=reference, n_inner=n_inner, dt=dt * 1e-3, kT=0.0, friction=friction, generator=generator
    )
    step = respa_matrix(wavenumber_per_cm=OH, slow_share=share, dt_outer_fs=dt, n_inner=n_inner, friction_per_ps=friction)
    expected = step @ np.stack([x.numpy().ravel(), v.numpy().ravel()])
    np.testing.assert_allclose(md.positions.numpy().ravel(), expected[0], atol=1e-14)
    np.testing.assert_allclose(md.velocities.numpy().ravel(), expected[1], atol=1e-11)


def test_bad_input_is_one_line():
    with pytest.raises(LongstrideError, match="positive wavenumber"):
        respa_matrix(wavenumber_per_cm=OH, slow_share=0.1, dt_outer_fs=4.0, n_inner=0)
    with pytest.raises(LongstrideError, match="at least one"):
        draw_resonance("nowhere.svg", linear=(), periods_fs={})


def test_figure(tmp_path):
    grid = np.arange(2.0, 6.5, 0.05)
    scans = [linear_scan(grid, wavenumber_per_cm=OH, slow_share=d, label="O-H") for d in (0.03, 0.1)]
    measured = MeasuredScan(
        label="hydrogen", quantity="T(H) in K", dt_outer_fs=np.array([2.0, 4.0, 6.0]), values=np.array([300.0, 310.0, np.nan]),
        errors=np.array([2.0, 2.0, np.nan]),
    )  # fmt: skip
    paths = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for path in paths:
        draw_resonance(path, linear=scans, periods_fs={"O-H": period_fs(OH)}, measured=[measured])
    text = paths[0].read_text()
    assert paths[1].read_text() == text
    for piece in ("T/2 O-H", "T/3 O-H", "T(H) in K", "blew up", "outer step in fs", PALETTE[0].lower()):
        assert piece in text
