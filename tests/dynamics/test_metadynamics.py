"""Well-tempered metadynamics on toys with known answers: weights, walkers that share hills, killed runs, wrong variants."""

import math
from dataclasses import replace

import numpy as np
import openmm
import pytest

from longstride.dynamics import metadynamics
from longstride.dynamics.metadynamics import MetadynamicsPlan, Variable, run_metadynamics, torsion_variable
from longstride.errors import LongstrideError, NumericsError
from longstride.units import thermal_energy

T_K = 300.0
KT = thermal_energy(T_K)
BARRIER, SLOPE, WIDTH = 8 * KT, 6.0, 0.15  # kJ/mol, kJ/mol/nm, nm
K = 2000.0


def wells_xml(*, forces=()):
    """One atom in a tilted double well along x, springs along y and z."""
    system = openmm.System()
    system.addParticle(12.0)
    force = openmm.CustomExternalForce(f"{BARRIER}*((x/{WIDTH})^2-1)^2 + {SLOPE}*x + 0.5*{K}*(y^2+z^2)")
    force.addParticle(0, [])
    for part in (force, *forces):
        system.addForce(part)
    return openmm.XmlSerializer.serialize(system)


def along_x(**changes):
    force = openmm.CustomExternalForce("x")
    force.addParticle(0, [])
    xml = openmm.XmlSerializer.serialize(force)
    return Variable(**{"force_xml": xml, "low": -0.35, "high": 0.35, "width": 0.02, "grid": 141, "periodic": False, **changes})


PLAN = MetadynamicsPlan(
    system_xml=wells_xml(),
    variables=(along_x(),),
    temperature_K=T_K,
    timestep_fs=5.0,
    friction_per_ps=5.0,
    bias_factor=12.0,
    height_kJ_per_mol=0.5,
    hill_every=50,
    steps_per_round=500,
    equilibration=100,
    fill_rounds=40,
    rounds=36,
    steps_per_frame=10,
    seed=3,
    platform="Reference",
)
STARTS = np.array([[[-WIDTH, 0, 0]], [[-WIDTH, 0, 0]], [[WIDTH, 0, 0]], [[WIDTH, 0, 0]]] * 2, dtype=float)


class Now:
    """A pool that works at once and in this process."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def submit(self, work, *args, **kwargs):
        result = work(*args, **kwargs)
        return type("Done", (), {"result": lambda self: result})()


@pytest.fixture(autouse=True)
def no_processes(monkeypatch):
    """Starting processes takes longer than what these runs take."""
    monkeypatch.setattr(metadynamics, "pinned_workers", Now)


def made(folder, plan=PLAN, starts=STARTS):
    return run_metadynamics(plan, starts, state=folder, key="key", workers=1, label="metadynamics")


def truth():
    x = np.linspace(-0.6, 0.6, 60001)
    p = np.exp(-(BARRIER * ((x / WIDTH) ** 2 - 1) ** 2 + SLOPE * x) / KT)
    return float(p[x > 0].sum() / p.sum())


def right_share(result, *, weighted):
    """Return the weighted share of x > 0 and its error by leaving out one walker after the other."""
    right = result.frames["positions"][..., 0, 0] > 0
    weights = np.exp(result.frames["log_weights"]) if weighted else np.ones(right.shape)
    top, bottom = (weights * right).sum(0), weights.sum(0)
    count = len(top)
    without = (top.sum() - top) / (bottom.sum() - bottom)
    error = math.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum())
    return top.sum() / bottom.sum(), error


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadynamics, "pinned_workers", Now)
        return made(tmp_path_factory.mktemp("toy"))


def test_weights_lead_back_to_the_double_well(toy):
    share, error = right_share(toy, weighted=True)
    assert abs(share - truth()) < 5 * error
    assert error < 0.05
    x = toy.frames["positions"][..., 0, 0]
    crossings = (np.diff(np.sign(x), axis=0) != 0).sum(0)
    assert (crossings > 3).all(), "every walker crosses 8 kT and more"


def test_without_weights_the_answer_is_wrong(toy):
    share, error = right_share(toy, weighted=False)
    assert abs(share - truth()) > 5 * error


def test_hills_of_all_walkers_are_shared(tmp_path):
    """After one round the bias is the sum of what every walker laid alone."""
    plan = replace(PLAN, fill_rounds=1, rounds=1)
    bias = made(tmp_path / "together", plan).bias
    alone = np.zeros(plan.shape)
    for walker, start in enumerate(STARTS):
        begun = metadynamics._equilibrate(plan, start, walker)
        phase = (begun["positions"], begun["velocities"])
        alone += metadynamics._fill(plan, phase, np.zeros(plan.shape), walker=walker, index=0)["hills"]
    assert np.allclose(bias, alone, atol=1e-12)
    per_walker = plan.steps_per_round // plan.hill_every
    largest = per_walker * len(STARTS) * plan.height_kJ_per_mol
    assert largest / 20 < bias.sum() * (0.7 / 140) / (0.02 * math.sqrt(2 * math.pi)) < largest, "later hills are lower"


def test_the_bias_flattens_the_variable(toy):
    """Well-tempered hills leave F / bias_factor: what is sampled with the frozen bias is nearly flat between the wells."""
    x = np.linspace(-0.35, 0.35, 141)
    inside = np.abs(x) < 0.18
    free = BARRIER * ((x / WIDTH) ** 2 - 1) ** 2 + SLOPE * x
    left = (free + toy.bias)[inside]
    assert np.ptp(free[inside]) > 8 * KT - 2
    assert np.ptp(left) < 2 * KT


def test_weights_are_those_of_the_bias_at_every_frame(toy):
    x = toy.frames["positions"][..., 0, 0].astype(float)
    tabulated = np.interp(x, np.linspace(-0.35, 0.35, 141), toy.bias) / KT
    assert np.abs(toy.frames["log_weights"] - tabulated).max() < 0.05, "up to the spline between grid points"
    y, z = (toy.frames["positions"][..., 0, k].astype(float) for k in (1, 2))
    unbiased = BARRIER * ((x / WIDTH) ** 2 - 1) ** 2 + SLOPE * x + 0.5 * K * (y**2 + z**2)
    assert np.allclose(toy.frames["potential_energy"], unbiased, atol=0.01), "energies are those of the target"


class Kill(BaseException):
    """Stands for kill -9."""


def test_a_killed_run_continues_bitwise_and_loses_no_hill(tmp_path, monkeypatch):
    plan = replace(PLAN, steps_per_round=200, fill_rounds=3, rounds=3)
    whole = made(tmp_path / "whole", plan, STARTS[:3])
    for work, deaths in (("_equilibrate", (2,)), ("_fill", (2, 5)), ("_sample", (1, 6))):
        act, calls = getattr(metadynamics, work), [0]

        def mortal(*args, act=act, calls=calls, deaths=deaths, **kwargs):
            calls[0] += 1
            if calls[0] in deaths:
                raise Kill
            return act(*args, **kwargs)

        monkeypatch.setattr(metadynamics, work, mortal)
    for _ in range(5):
        with pytest.raises(Kill):
            made(tmp_path / "parts", plan, STARTS[:3])
    parts = made(tmp_path / "parts", plan, STARTS[:3])
    assert np.array_equal(whole.bias, parts.bias)
    for name, value in whole.frames.items():
        assert np.array_equal(value, parts.frames[name]), name
    assert whole.frames["log_weights"].shape == (3 * 20, 3)


def test_torsions_are_periodic_variables():
    variable = torsion_variable((0, 1, 2, 3), width=0.35, grid=36)
    assert (variable.low, variable.high, variable.grid, variable.periodic) == (-math.pi, math.pi, 37, True)
    plan = replace(PLAN, variables=(variable, torsion_variable((1, 2, 3, 4), width=0.35, grid=24)))
    assert plan.shape == (25, 37), "the first variable varies fastest"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variables": ()}, "one or two variables, not 0"),
        ({"bias_factor": 1.0}, "bias factor above 1"),
        ({"hill_every": 30}, "rounds of whole hills and frames"),
        ({"steps_per_frame": 30}, "rounds of whole hills and frames"),
    ],
)
def test_impossible_plans_are_refused(change, message):
    with pytest.raises(LongstrideError, match=message):
        replace(PLAN, **change)


def test_atoms_that_fly_apart_are_one_clear_line(tmp_path):
    push = openmm.CustomExternalForce("-1e7*x^4")
    push.addParticle(0, [])
    plan = replace(PLAN, system_xml=wells_xml(forces=[push]), timestep_fs=50.0, advice="mend key x")
    with pytest.raises(NumericsError, match=r"metadynamics, walker \d: the energy is not finite .*; mend key x") as caught:
        made(tmp_path, plan)
    assert "\n" not in str(caught.value)
