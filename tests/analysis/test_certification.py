import numpy as np
import pytest
from fake_run import torsions_of
from test_map_comparison import torsions as jumping

from longstride.analysis.certification import MIN_RELAXATIONS, certify, split_halves
from longstride.analysis.convergence import split_rhat
from longstride.analysis.estimate import Estimate, undefined
from longstride.analysis.features import Torsions
from longstride.analysis.reference_model import lag_frames, model_reference
from longstride.analysis.samples import SampleSet
from longstride.config import CompareConfig

SECTION = CompareConfig(bootstrap=40, msm_states=12, msm_lags_ps=(1.0,), msm_lag_ps=1.0, tica_lag_ps=1.0)
TORSIONS = Torsions(names=("phi ALA2", "psi ALA2"), indices=np.zeros((2, 4), dtype=int), pair=(0, 1))


def certificate(angles, *, torsions=TORSIONS, spacing=0.2, seed=0, **changes):
    """The certificate of trajectories [time, chain, 2]; `changes` overrules what the comparison would hand over."""
    energy = np.random.default_rng(seed).normal(size=angles.shape[:2])
    manifest = {"frame_spacing_ps": spacing, "target": "toy"}
    samples = SampleSet(manifest=manifest, angles=angles, energy=energy, temperature={}, temperature_note="")
    reference = model_reference(samples, torsions, SECTION, seed=seed)
    slowest = undefined("none")
    if reference.kinetics is not None:
        slowest = reference.kinetics.slowest(lag_frames(SECTION.msm_lag_ps, spacing))
    rhat = split_rhat((angles[..., 0] >= 0).astype(float)).value if angles.shape[-1] else None
    return certify(reference, torsions, SECTION, **({"rhat_max": rhat, "slowest": slowest, "seed": seed} | changes))


def check(found, name):
    return next(one for one in found["checks"] if one["name"].startswith(name))


@pytest.fixture(scope="module")
def long_run():
    return jumping(np.random.default_rng(1), times=8000, chains=8)


def test_a_long_reference_is_certified(long_run):
    found = certificate(long_run)
    assert found["word"] == "certified", found["reason"]
    names = [one["name"] for one in found["checks"]]
    for part in ("independent runs", "R-hat", "crossings of phi ALA2", "kinetic ceiling", "split halves: map"):
        assert part in names
    floor = found["noise_floor"]
    assert 0 < floor["map"]["rmse"] < 1
    assert floor["delta_f_kT"]["phi ALA2"] < 0.5
    assert floor["energy_ks"] < 0.05


def test_too_few_runs_are_not_enough(long_run):
    found = certificate(long_run[:, :3])
    assert found["word"] == "not certified"
    assert not check(found, "independent runs")["passed"]


def test_a_reference_shorter_than_its_slowest_process_is_not_certified(long_run):
    few = long_run[:, :4]
    for factor, passed in ((1.1, True), (0.9, False)):
        longest = few[..., 0].size * 0.2 / (2 * MIN_RELAXATIONS * factor)
        found = certificate(few, slowest=Estimate(value=longest / 4, low=longest / 8, high=longest))
        assert check(found, "kinetic ceiling")["passed"] == passed, "the upper end of the timescale counts"


def test_seeded_runs_that_never_return_are_not_certified():
    generator = np.random.default_rng(2)
    found = certificate(torsions_of(generator, np.repeat(np.arange(6)[None] % 3, 400, axis=0)))
    assert found["word"] == "not certified"
    assert not check(found, "R-hat")["passed"]
    assert not check(found, "crossings")["passed"]
    assert not check(found, "split halves: Delta F")["passed"]


def test_halves_that_differ_are_not_certified(long_run):
    moved = long_run.copy()
    first, second = split_halves(8000, 8, seed=0)
    assert not set(first[1]) & set(second[1])
    from longstride.seeds import job_seed

    _, chains = split_halves(8000, 8, seed=job_seed(0, "split"))[1]
    moved[:, chains, 1] += 0.3  # psi of one half
    found = certificate(moved)
    assert not check(found, "split halves: map")["passed"]
    assert found["word"] == "not certified"


def test_few_chains_are_split_in_time():
    (early, everyone), (late, _) = split_halves(101, 2, seed=0)
    assert (early, late) == (slice(0, 50), slice(50, 100))
    assert everyone.tolist() == [0, 1]


def test_without_torsions_nothing_is_certified():
    none = Torsions(names=(), indices=np.zeros((0, 4), dtype=int), pair=None)
    found = certificate(np.zeros((50, 4, 0)), torsions=none)
    assert found["word"] == "not certified"
    assert "no torsions" in found["reason"]
    assert found["noise_floor"] == {}
