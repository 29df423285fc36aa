"""The trajectory runner: frames, bitwise continuation after a kill, and the monitor."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from longstride.data.checkpoint import open_state
from longstride.dynamics.integrators import MDState, baoab, half_step_velocities, respa_baoab, start, thermal_velocities
from longstride.dynamics.runner import Monitor, RunPlan, run_trajectory
from longstride.errors import NumericsError
from longstride.state import State, System
from longstride.units import thermal_energy

KT = thermal_energy(300.0)
MASSES = torch.tensor([1.008, 12.011], dtype=torch.float64)
SYSTEM = System(
    name="pair",
    atomic_numbers=np.array([1, 6]),
    masses=MASSES.numpy(),
    bonds=np.array([[0, 1]]),
    atom_names=("HA", "CA"),
    residue_names=("ALA", "ALA"),
    residue_indices=np.array([1, 1]),
)
PLAN = RunPlan(dt=1e-3, n_discard=7, n_steps=60, save_every=4, checkpoint_every=9, n_inner=2)


class Well:
    """Harmonic wells; from call `fails_at` on, replica 1 gives NaN."""

    system, name = SYSTEM, "well"

    def __init__(self, k=20_000.0, fails_at=None):
        self.k, self.calls, self.fails_at = k, 0, fails_at

    def energy(self, x):
        return 0.5 * self.k * x.positions.square().sum(dim=(1, 2))

    def energy_forces(self, x: State):
        self.calls += 1
        energy = self.energy(x)
        if self.fails_at is not None and self.calls >= self.fails_at:
            energy[1] = float("nan")
        return energy, -self.k * x.positions


def job(store, *, slow=None, fast=None, stop_at=None, monitor=None, step=None):
    slow, fast = slow or Well(), fast or Well(19_000.0)
    done = [0]

    def begin():
        generator = torch.Generator().manual_seed(1)
        x = 0.01 * torch.randn(3, 2, 3, generator=generator, dtype=torch.float64)
        return start(x, thermal_velocities(x.shape, MASSES, KT, generator), masses=MASSES, potential=slow, fast=fast)

    def advance(md, generator):
        done[0] += 1
        if stop_at is not None and done[0] > stop_at:
            raise KeyboardInterrupt
        return respa_baoab(md, fast=fast, slow=slow, n_inner=2, dt=PLAN.dt, kT=KT, friction=5.0, generator=generator)

    return run_trajectory(
        begin,
        step or advance,
        plan=PLAN,
        generator=torch.Generator().manual_seed(2),
        monitor=monitor or Monitor(system=SYSTEM, temperature_K=300.0),
        store=store,
    )


@pytest.fixture
def folder(tmp_path):
    with open_state(tmp_path / "state", "key") as store:
        yield store


def test_frames(folder):
    result = job(folder)
    assert result.frames["positions"].shape == (15, 3, 2, 3)
    assert result.frames["potential_energy"].shape == (15, 3)
    assert result.frames["positions"].dtype == np.float32
    assert result.frames["potential_energy"].dtype == np.float64
    final = result.final
    half = half_step_velocities(final, dt=PLAN.dt, n_inner=PLAN.n_inner)
    assert np.allclose(result.frames["kinetic_energy"][-1], 0.5 * (MASSES[:, None] * half.square()).sum(dim=(1, 2)))
    assert np.allclose(result.frames["velocities"][-1], half, atol=1e-5)
    assert np.allclose(result.frames["potential_energy"][-1], Well().energy(State(positions=final.positions)))
    centre = np.einsum("a,frax->frx", MASSES.numpy(), result.frames["positions"]) / MASSES.numpy().sum()
    assert np.abs(centre).max() < 1e-7
    assert result.production_s > 0


@pytest.mark.parametrize("kills", [[3], [9], [20, 1, 30], [12, 25]])
def test_continuation_is_bitwise(tmp_path, kills):
    with open_state(tmp_path / "whole", "key") as store:
        whole = job(store)
    with open_state(tmp_path / "parts", "key") as store:
        for stop_at in kills:
            with pytest.raises(KeyboardInterrupt):
                job(store, stop_at=stop_at)
        parts = job(store)
    for key, value in whole.frames.items():
        assert np.array_equal(value, parts.frames[key]), key
    for name in ("positions", "velocities", "forces", "fast_forces"):
        assert torch.equal(getattr(whole.final, name), getattr(parts.final, name))


def test_continuation_needs_the_noise(tmp_path):
    """Negative control: a checkpoint without the generator's state would be noticed."""
    with open_state(tmp_path / "whole", "key") as store:
        whole = job(store)
    with open_state(tmp_path / "parts", "key") as store:
        with pytest.raises(KeyboardInterrupt):
            job(store, stop_at=30)
        saved = store.latest()
        arrays = {**saved.arrays, "generator": torch.Generator().manual_seed(2).get_state().numpy()}
        store.save(saved.step, arrays, saved.meta)
        parts = job(store)
    assert not np.array_equal(whole.frames["positions"], parts.frames["positions"])


def test_equilibration_has_its_own_step(folder):
    seen = []

    def recorder(label):
        def step(md, generator):
            seen.append(label)
            return baoab(md, potential=Well(), dt=PLAN.dt, kT=KT, friction=5.0, generator=generator)

        return step

    x = torch.zeros(1, 2, 3, dtype=torch.float64)
    run_trajectory(
        lambda: start(x, x, masses=MASSES, potential=Well()),
        recorder("run"),
        plan=PLAN,
        generator=torch.Generator().manual_seed(2),
        monitor=Monitor(system=SYSTEM, temperature_K=300.0),
        store=folder,
        equilibrate=recorder("equilibrate"),
    )
    assert seen == ["equilibrate"] * 7 + ["run"] * 60


def test_monitor_stops_on_nan_and_keeps_the_last_good_state(folder):
    with pytest.raises(
        NumericsError, match=r"stopped at 0\.0250 ps: the potential energy is not finite.*\(replica 1\)"
    ) as error:
        job(folder, slow=Well(fails_at=33))  # one call at the start, then one per step: step 32 fails
    message = str(error.value)
    assert "\n" not in message
    assert "last good state, 0.0240 ps" in message
    saved = folder.latest()
    assert saved.step == 31
    assert np.isfinite(saved.arrays["positions"]).all()
    result = job(folder)  # with a healthy teacher the run continues from there
    assert result.frames["positions"].shape == (15, 3, 2, 3)
    assert np.isfinite(result.frames["positions"]).all()


def test_monitored_continuation_is_bitwise(tmp_path):
    with open_state(tmp_path / "whole", "key") as store:
        whole = job(store)
    with open_state(tmp_path / "parts", "key") as store:
        with pytest.raises(NumericsError):
            job(store, slow=Well(fails_at=33))
        parts = job(store)
    for key, value in whole.frames.items():
        assert np.array_equal(value, parts.frames[key]), key


class Hole(Well):
    """A student that pulls the hydrogen outwards where it had no data."""

    def energy_forces(self, x):
        energy, forces = super().energy_forces(x)
        distance = x.positions[:, 0].norm(dim=-1, keepdim=True)
        forces[:, 0] += torch.where(distance > 0.02, 5e3 * x.positions[:, 0] / distance, 0.0)
        return energy, forces


def test_monitor_stops_on_a_hole_of_the_student(folder):
    monitor = Monitor(system=SYSTEM, temperature_K=300.0, max_slow_force=2_000.0, advice="distil with more frames")
    with pytest.raises(NumericsError, match=r"differ too much.*atom 0 \(ALA2 HA\)\); distil with more frames"):
        job(folder, fast=Hole(19_000.0), monitor=monitor)


def test_monitor_stops_on_a_blow_up(folder):
    def step(md, generator):
        return baoab(md, potential=Well(), dt=0.02, kT=KT, friction=0.0, generator=generator)  # far beyond stability

    with pytest.raises(NumericsError, match=r"the temperature of \w+ is \d+ K, target 300 K"):
        job(folder, step=step)


def test_monitor_stops_when_one_element_is_hot():
    # 400 heavy atoms hide 20 hot hydrogens from the temperature of all
    numbers = np.array([6] * 400 + [1] * 20)
    system = replace(
        SYSTEM,
        atomic_numbers=numbers,
        masses=np.where(numbers == 1, 1.008, 12.011),
        bonds=np.zeros((0, 2), dtype=np.int64),
        atom_names=("X",) * 420,
        residue_names=("ALA",) * 420,
        residue_indices=np.zeros(420, dtype=np.int64),
    )
    monitor = Monitor(system=system, temperature_K=300.0)
    masses = torch.from_numpy(system.masses)
    velocities = thermal_velocities((2, 420, 3), masses, KT, torch.Generator().manual_seed(0))
    nothing = torch.zeros(2, 420, 3, dtype=torch.float64)
    md = MDState(positions=nothing, velocities=velocities, forces=nothing, potential_energy=nothing[:, 0, 0], masses=masses)
    monitor.check(md, time_ps=0.0)
    hot = velocities.clone()
    hot[1, 400:] *= 6**0.5
    with pytest.raises(NumericsError, match=r"the temperature of H is \d+ K, target 300 K \(replica 1\)"):
        monitor.check(replace(md, velocities=hot), time_ps=0.0)
    assert float(replace(md, velocities=hot).temperature_K.max()) < monitor.max_temperature_K(420)  # all atoms do not tell


def test_the_limit_of_temperatures_is_that_of_chi_squared():
    monitor = Monitor(system=SYSTEM, temperature_K=300.0)
    samples = np.random.default_rng(0).chisquare(66, size=200_000) / 66 * 300.0
    assert samples.max() < monitor.max_temperature_K(22)
    assert monitor.max_temperature_K(22) < 1000.0
    assert monitor.max_temperature_K(1) > monitor.max_temperature_K(22) > monitor.max_temperature_K(1000) > 300.0


def test_monitor_stops_on_a_nan_force(folder):
    def step(md, generator):
        following = baoab(md, potential=Well(), dt=1e-3, kT=KT, friction=0.0, generator=generator)
        following.forces[2, 1, 0] = float("nan")
        return following

    with pytest.raises(NumericsError, match=r"force or velocity is not finite \(replica 2, atom 1 \(ALA2 CA\)\)"):
        job(folder, step=step)


def test_a_healthy_trajectory_is_left_alone(folder):
    monitor = Monitor(system=SYSTEM, temperature_K=300.0, max_slow_force=2_000.0)
    job(folder, monitor=monitor)
