"""Batched Langevin dynamics: replicas are independent, averages are right, a killed run continues bitwise."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from longstride.data.checkpoint import open_state
from longstride.dynamics import batched_md
from longstride.dynamics.batched_md import EQUILIBRATION_FRICTION_PER_PS, BatchedJob, run_batched, run_group
from longstride.dynamics.integrators import MDState, baoab
from longstride.dynamics.masses import repartitioned_masses
from longstride.dynamics.runner import RunPlan
from longstride.errors import NumericsError
from longstride.potentials.amber import AmberPotential
from longstride.potentials.analytic import DoubleWell, HarmonicWell
from longstride.seeds import job_seed
from longstride.state import State, System
from longstride.units import BOLTZMANN_KJ_PER_MOL_K, thermal_energy

TEMPERATURE = 310.0
KT = thermal_energy(TEMPERATURE)
MASSES = np.array([3.024, 12.011])
SYSTEM = System(
    name="pair",
    atomic_numbers=np.array([1, 6]),
    masses=MASSES,
    bonds=np.zeros((0, 2), dtype=np.int64),
    atom_names=("H", "C"),
    residue_names=("PAR",) * 2,
    residue_indices=np.zeros(2, dtype=np.int64),
)
WELL = partial(HarmonicWell, SYSTEM, center=torch.zeros(2, 3, dtype=torch.float64), k=20_000.0)
BARRIER, HALF_WIDTH = 4.0, 0.05
DOUBLE_WELL = partial(DoubleWell, SYSTEM, barrier=BARRIER, half_width=HALF_WIDTH, k=20_000.0, atom=1)


def job_of(potential, *, plan, friction=5.0, masses=MASSES, system=SYSTEM):
    return BatchedJob(
        system=system,
        masses=masses,
        temperature_K=TEMPERATURE,
        friction_per_ps=friction,
        plan=plan,
        potential=potential,
        advice="use a shorter reference.timestep_fs",
        seed=5,
    )


def one_by_one(potential, masses, x, v, noise, *, dt, friction):
    """BAOAB of one replica [atom, 3], written out; noise [step, atom, 3], friction [step]."""
    m = masses[:, None]
    force = potential.energy_forces(State(positions=x[None]))[1][0]
    for xi, gamma in zip(noise, friction, strict=True):
        v = v + dt / 2 * force / m
        x = x + dt / 2 * v
        c = math.exp(-gamma * dt)
        v = c * v + ((1 - c**2) * KT / m).sqrt() * xi
        x = x + dt / 2 * v
        force = potential.energy_forces(State(positions=x[None]))[1][0]
        v = v + dt / 2 * force / m
    return x, v


def test_a_batch_moves_as_its_replicas_alone_for_the_same_noise(alanine, tmp_path):
    plan = RunPlan(dt=0.004, n_discard=3, n_steps=9, save_every=3, checkpoint_every=100)
    system, replicas = alanine.system, 3
    potential = AmberPotential.from_openmm(alanine.openmm_system, system, name="amber")
    masses = repartitioned_masses(system, 3.024)
    starts = np.repeat(alanine.positions[None], replicas, axis=0)
    job = job_of(lambda: potential, plan=plan, friction=0.3, masses=masses, system=system)
    run_group(job, 0, starts, folder=tmp_path, key="k")
    with open_state(tmp_path, "k") as store:
        final = store.latest().arrays
    shape, m = (replicas, system.n_atoms, 3), torch.from_numpy(masses)
    thermal = torch.Generator().manual_seed(job_seed(job.seed, "velocities", 0))
    v = (KT / m[:, None]).sqrt() * torch.randn(shape, generator=thermal, dtype=torch.float64)
    source = torch.Generator().manual_seed(job_seed(job.seed, "noise", 0))
    noise = torch.stack([torch.randn(shape, generator=source, dtype=torch.float64) for _ in range(plan.total)])
    friction = [EQUILIBRATION_FRICTION_PER_PS] * plan.n_discard + [0.3] * plan.n_steps

    def alone(replica, stream):
        found = one_by_one(
            potential, m, torch.from_numpy(starts[replica]), v[replica], noise[:, stream], dt=plan.dt, friction=friction
        )
        return [value.numpy() for value in found]

    for replica in range(replicas):
        x, w = alone(replica, replica)
        assert np.allclose(final["positions"][replica], x, rtol=0, atol=1e-12)
        assert np.allclose(final["velocities"][replica], w, rtol=0, atol=1e-9)
    assert np.abs(final["positions"][0] - alone(0, 1)[0]).max() > 1e-4  # negative control: the noise of another replica


def averages(folder, *, steps=1000, replicas=200):
    """Replica means of what the double well fixes, [replica] each; frames are centred, so differences of the two atoms."""
    plan = RunPlan(dt=0.004, n_discard=200, n_steps=steps, save_every=4, checkpoint_every=10_000)
    starts = np.zeros((replicas, 2, 3))
    starts[::2, 1, 0], starts[1::2, 1, 0] = HALF_WIDTH, -HALF_WIDTH
    result = run_batched(job_of(DOUBLE_WELL, plan=plan), starts, state=folder, key="k", threads=1, label="test")
    assert len(result.folders) == 2
    frames = result.frames()
    assert frames["positions"].shape == (plan.n_frames, replicas, 2, 3)
    square = (frames["positions"][:, :, 1].astype(float) - frames["positions"][:, :, 0]) ** 2
    return {
        "springs": square[..., 1:].mean(axis=(0, 2)),
        "double well": square[..., 0].mean(axis=0),
        "temperature": (2 * frames["kinetic_energy"] / (6 * BOLTZMANN_KJ_PER_MOL_K)).mean(axis=0),
    }


def expected():
    """Exact averages: Gaussian springs, quadrature over the double well."""
    s = np.linspace(-0.2, 0.2, 20_001)
    weight = np.exp(-BARRIER * ((s / HALF_WIDTH) ** 2 - 1) ** 2 / KT)
    spring = KT / 20_000.0
    well = float((weight * s**2).sum() / weight.sum())
    return {"springs": 2 * spring, "double well": well + spring, "temperature": TEMPERATURE}


def deviations(found):
    """Distance of every average from its exact value in Monte Carlo standard errors (replicas are independent)."""
    exact = expected()
    return {
        name: float(abs(values.mean() - exact[name]) / (values.std(ddof=1) / math.sqrt(len(values))))
        for name, values in found.items()
    }


def test_temperature_and_configurations_on_an_analytic_potential(tmp_path):
    assert max(deviations(averages(tmp_path)).values()) < 5


def without_last_kick(md, *, potential, dt, kT, friction, generator):
    """Negative control: BAOA, with the kick before the next step still only half a step."""
    after = baoab(md, potential=potential, dt=dt, kT=kT, friction=friction, generator=generator)
    half = 0.5 * dt / md.masses[:, None]
    return MDState(**{**vars(after), "velocities": after.velocities - half * after.forces})


def wrong_noise(md, *, potential, dt, kT, friction, generator):
    """Negative control: the noise of O belongs to friction 1.2 times as large as its decay."""
    colder = (1 - math.exp(-2 * 1.2 * friction * dt)) / (1 - math.exp(-2 * friction * dt))
    return baoab(md, potential=potential, dt=dt, kT=kT * colder, friction=friction, generator=generator)


@pytest.mark.parametrize(("broken", "seen_in"), [(without_last_kick, "springs"), (wrong_noise, "temperature")])
def test_a_wrong_integrator_is_noticed(broken, seen_in, tmp_path, monkeypatch):
    monkeypatch.setattr(batched_md, "baoab", broken)
    assert deviations(averages(tmp_path, steps=400, replicas=130))[seen_in] > 10


class Kill(BaseException):
    """Stands for kill -9."""


class Mortal(HarmonicWell):
    """A well that ends the process at a chosen call."""

    calls, dies_at = 0, None

    def energy_forces(self, x):
        Mortal.calls += 1
        if Mortal.calls == Mortal.dies_at:
            raise Kill
        return super().energy_forces(x)


def test_a_killed_run_continues_bitwise(tmp_path, monkeypatch):
    monkeypatch.setattr(batched_md, "GROUP", 3)
    plan = RunPlan(dt=0.002, n_discard=5, n_steps=30, save_every=3, checkpoint_every=8, save_forces=True)
    potential = partial(Mortal, SYSTEM, center=torch.zeros(2, 3, dtype=torch.float64), k=20_000.0)
    starts = np.full((7, 2, 3), 0.01)

    def frames(folder):
        return run_batched(job_of(potential, plan=plan), starts, state=folder, key="k", threads=1, label="test").frames()

    whole = frames(tmp_path / "whole")
    assert whole["forces"].shape == (10, 7, 2, 3)
    for dies_at in (3, 12, 29, 22):  # in equilibration, in production, in the second group, in the third
        Mortal.calls, Mortal.dies_at = 0, dies_at
        with pytest.raises(Kill):
            frames(tmp_path / "parts")
    Mortal.dies_at = None
    parts = frames(tmp_path / "parts")
    for name, value in whole.items():
        assert np.array_equal(value, parts[name]), name
    assert not np.array_equal(whole["positions"][:, 0], whole["positions"][:, 3])  # groups have noise of their own


@pytest.mark.slow
def test_processes_do_not_change_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(batched_md, "GROUP", 2)
    plan = RunPlan(dt=0.002, n_discard=2, n_steps=10, save_every=5, checkpoint_every=4)
    found = [
        run_batched(job_of(WELL, plan=plan), np.zeros((5, 2, 3)), state=tmp_path / str(n), key="k", threads=n, label="test")
        for n in (1, 2)
    ]
    one, two = (result.frames() for result in found)
    assert [result.processes for result in found] == [1, 2]
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_a_diverging_run_is_one_line_that_names_the_timestep(tmp_path):
    plan = RunPlan(dt=0.03, n_discard=0, n_steps=200, save_every=10, checkpoint_every=50)  # omega dt = 2.4
    with pytest.raises(NumericsError, match=r"dynamics stopped .*use a shorter reference\.timestep_fs") as caught:
        run_batched(job_of(WELL, plan=plan), np.full((4, 2, 3), 0.01), state=tmp_path, key="k", threads=1, label="test")
    assert "\n" not in str(caught.value)
