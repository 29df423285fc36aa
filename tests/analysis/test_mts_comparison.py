"""Comparison of runs: equal ensembles pass at the nominal rate, others are flagged, unequal conditions are refused."""

import csv
import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from made_runs import WATER, correlated, harmonic_run, water

from longstride.analysis.block_statistics import Observable
from longstride.analysis.dynamics_run import DynamicsRun
from longstride.analysis.mts_comparison import (
    DIFFERS,
    FEW_SEEDS,
    MISSING,
    NOT_RESOLVED,
    SAME,
    ComparisonSettings,
    check_comparable,
    common_interval,
    compare_dynamics,
    compare_observables,
    permutation_p,
)
from longstride.analysis.resonance import growth_per_outer_step
from longstride.analysis.transport import yeh_hummer
from longstride.dynamics.integrators import half_step_velocities, respa_baoab, start, thermal_velocities
from longstride.errors import LongstrideError
from longstride.potentials.analytic import HarmonicWell
from longstride.units import thermal_energy

SETTINGS = ComparisonSettings(vacf_lag_ps=0.04, relaxation_lag_ps=0.04, permutations=399, pair_bins=50)
LONG = {"frames": 200, "replicas": 20}


def side(seeds, label, **options):
    return [harmonic_run(seed, label=label, **options) for seed in seeds]


def verdicts(table):
    return {(row.observable, row.part): row.verdict for row in table.rows}


@pytest.fixture(scope="module")
def equal():
    return compare_dynamics(side((1, 2, 3), "mts", **LONG), side((4, 5, 6), "sts", **LONG), settings=SETTINGS)


def test_rows_cover_every_observable(equal):
    names = {row.observable for row in equal.rows}
    assert names >= {
        "temperature", "configurational temperature", "potential energy mean", "potential energy sd",
        "potential energy distribution", "bond length mean", "bond length sd", "bond length density", "bond angle mean",
        "velocity autocorrelation", "velocity spectrum", "infrared spectrum", "rotational correlation P1",
        "rotational correlation P2 time",
    }  # fmt: skip
    assert {row.part for row in equal.rows if row.observable == "temperature"} == {"all", "O", "H"}
    assert len(equal.differing()) <= 3
    assert FEW_SEEDS not in verdicts(equal).values()
    assert "expected by chance" in equal.statement


def test_rows_are_ready_for_csv(equal, tmp_path):
    records = equal.records()
    with (tmp_path / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    with (tmp_path / "table.csv").open() as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(equal.rows)
    row = next(item for item in read if item["observable"] == "temperature" and item["part"] == "all")
    assert (row["candidate_label"], row["baseline_label"], row["unit"]) == ("mts", "sts", "K")
    assert float(row["difference"]) / float(row["combined_se"]) == pytest.approx(float(row["z"]))
    assert float(row["candidate"]) - float(row["baseline"]) == pytest.approx(float(row["difference"]))
    assert (row["candidate_seeds"], row["baseline_seeds"]) == ("3", "3")
    assert ("velocity spectrum", "H") in equal.curves


def test_twenty_kelvin_are_flagged():
    hot = side((1, 2, 3), "mts", real_temperature_K=320.0, **LONG)
    table = compare_dynamics(hot, side((4, 5, 6), "sts", **LONG), settings=SETTINGS)
    found = verdicts(table)
    for key in (
        ("temperature", "all"), ("configurational temperature", ""), ("potential energy mean", ""),
        ("potential energy distribution", ""), ("bond length sd", "H-O"),
    ):  # fmt: skip
        assert found[key] == DIFFERS, key
    row = next(r for r in table.rows if (r.observable, r.part) == ("temperature", "all"))
    assert row.matters
    assert abs(row.difference - 20) < 5 * row.combined_se


def test_biased_positions_are_flagged_and_nothing_else():
    biased = side((1, 2, 3), "mts", shift_nm=0.003, **LONG)
    found = verdicts(compare_dynamics(biased, side((4, 5, 6), "sts", **LONG), settings=SETTINGS))
    assert found["bond length mean", "H-O"] == DIFFERS
    assert found["bond length density", "H-O"] == DIFFERS
    assert found["temperature", "all"] in {SAME, NOT_RESOLVED}
    assert found["potential energy mean", ""] in {SAME, NOT_RESOLVED}


def test_few_seeds_and_large_errors_are_named():
    few = compare_dynamics(side((1, 2), "mts"), side((4, 5, 6), "sts"), settings=SETTINGS)
    judged = {row.verdict for row in few.rows if row.z is not None}
    assert judged == {FEW_SEEDS}
    assert "too few seeds" in few.statement
    short = {"frames": 20, "replicas": 2}
    poor = compare_dynamics(side((1, 2, 3), "mts", **short), side((4, 5, 6), "sts", **short), settings=SETTINGS)
    row = next(r for r in poor.rows if (r.observable, r.part) == ("temperature", "all"))
    assert 2 * row.combined_se > row.matters_from == 3.0
    assert row.verdict == NOT_RESOLVED


def test_missing_data_are_rows_with_a_reason():
    options = {"potential_energy": None, "laplacian": None, "velocities": None, "charges": None}
    table = compare_dynamics(side((1, 2, 3), "a", **options), side((4, 5, 6), "b", **options), settings=SETTINGS)
    missing = {row.observable: row.note for row in table.rows if row.verdict == MISSING}
    assert set(missing) == {
        "temperature", "configurational temperature", "potential energy", "velocity spectrum", "infrared spectrum"
    }  # fmt: skip
    assert all("save" in note or "needs" in note for note in missing.values())


def test_other_save_intervals_are_thinned_or_named():
    coarse = side((1, 2, 3), "mts", save_interval_ps=0.004)
    fine = [dataclasses.replace(run, save_interval_ps=0.001) for run in side((4, 5, 6), "sts", frames=400)]
    runs, problem = common_interval([*coarse, *fine])
    assert problem == ""
    assert {(run.save_interval_ps, run.n_frames) for run in runs} == {(0.004, 100)}
    table = compare_dynamics(coarse, fine, settings=SETTINGS)
    assert any(row.observable == "velocity autocorrelation" for row in table.rows)
    odd = [dataclasses.replace(run, save_interval_ps=0.003) for run in fine]
    table = compare_dynamics(coarse, odd, settings=SETTINGS)
    notes = {row.observable: row.note for row in table.rows if row.verdict == MISSING}
    assert "no common multiple" in notes["velocity spectrum"]
    assert ("temperature", "all") in verdicts(table)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"masses": np.array([15.999, 3.024, 3.024])}, "masses"),
        ({"friction_per_ps": 5.0}, "friction"),
        ({"friction_per_ps": np.array([1.0, 50.0, 50.0])}, "friction"),
        ({"temperature_K": 310.0}, "temperature"),
        ({"target": "gfn2-xtb"}, "other targets"),
        ({"box": 3 * np.eye(3)}, "only one has a box"),
    ],
)
def test_unequal_conditions_are_refused(change, words):
    other = [dataclasses.replace(run, **change) for run in side((1, 2, 3), "mts")]
    with pytest.raises(LongstrideError, match=words):
        compare_dynamics(other, side((4, 5, 6), "sts"))


def test_other_refusals():
    runs = side((1, 2, 3), "sts")
    with pytest.raises(LongstrideError, match="appears twice"):
        check_comparable([runs[0], runs[0]], runs)
    with pytest.raises(LongstrideError, match="both sides"):
        check_comparable([], runs)
    with pytest.raises(LongstrideError, match="other molecules"):
        check_comparable(
            [dataclasses.replace(runs[0], system=dataclasses.replace(runs[0].system, bonds=np.array([(0, 1)])))], runs
        )


def curve(generator, *, units=30, shift=0.0, cumulative=False, decay=None):
    shape = (units, 40)
    data = generator.normal(size=shape) if decay is None else correlated(generator, shape, decay)
    data = data @ np.exp(-np.abs(np.subtract.outer(np.arange(40), np.arange(40))) / 5.0)  # neighbouring bins are correlated
    chains = np.arange(units) if decay is None else np.zeros(units, dtype=int)
    return Observable(
        name="curve", unit="", statistics=data + shift, chains=chains, grid=np.arange(40.0), cumulative=cumulative
    )


@pytest.mark.parametrize("cumulative", [False, True])
def test_equal_curves_are_flagged_at_the_nominal_rate(cumulative):
    generator = np.random.default_rng(0)
    p = np.array(
        [
            permutation_p(
                curve(generator, cumulative=cumulative),
                curve(generator, units=24, cumulative=cumulative),
                permutations=199,
                seed=k,
            )
            for k in range(400)
        ]
    )
    assert abs((p < 0.05).mean() - 0.05) < 3 * np.sqrt(0.05 * 0.95 / 400)
    assert abs((p < 0.5).mean() - 0.5) < 3 * np.sqrt(0.25 / 400)
    shifted = permutation_p(curve(generator, shift=6.0), curve(generator), permutations=199, seed=0)
    assert shifted == pytest.approx(1 / 200)


def test_numbers_are_flagged_at_the_nominal_rate():
    generator = np.random.default_rng(1)

    def number(units):
        return Observable(
            name="x", unit="", statistics=generator.gamma(4.0, size=(units, 1)), chains=np.arange(units), matters=9.0
        )

    rows = [compare_observables(number(20), number(20)) for _ in range(1000)]
    rate = np.mean([row.verdict == DIFFERS for row in rows])
    nominal = 0.0530  # P(|t| > 2) with 38 degrees of freedom
    assert abs(rate - nominal) < 3 * np.sqrt(nominal * (1 - nominal) / 1000)


@pytest.mark.slow
def test_two_halves_of_one_ensemble_are_flagged_at_the_nominal_rate():
    flagged, judged, seen, rows = 0, 0, [], Counter()
    for k in range(60):
        seeds = range(100 + 10 * k, 106 + 10 * k)
        runs = side(seeds, "half", frames=60, replicas=8)
        table = compare_dynamics(runs[:3], runs[3:], settings=dataclasses.replace(SETTINGS, permutations=199))
        mine = [row for row in table.rows if row.z is not None]
        seen.append(np.mean([abs(row.z) > 2 for row in mine]))
        flagged += sum(abs(row.z) > 2 for row in mine)
        rows.update((row.observable, row.part) for row in mine if abs(row.z) > 2)
        judged += len(mine)
    # of 60 tables no row may be flagged in more than nine (p = 0.002 at 5 %)
    assert max(rows.values()) <= 9
    # rows of one table are correlated: the error comes from the spread between tables
    error = np.std(seen, ddof=1) / np.sqrt(len(seen))
    assert abs(flagged / judged - 0.05) < 3 * error
    assert error < 0.015


def boxed(seed, *, label, D=2.3e-3, wrap=False, frames=60, molecules=8, edge=1.8644):
    """Molecules that diffuse freely in a box, saved every 0.1 ps."""
    generator = np.random.default_rng(seed)
    steps = np.sqrt(2 * D * 0.1) * generator.normal(size=(frames, 7, molecules, 1, 3))
    centres = edge * generator.random((1, 7, molecules, 1, 3)) + np.cumsum(steps, axis=0)
    positions = (centres + WATER + 0.002 * generator.normal(size=(frames, 7, molecules, 3, 3))).reshape(frames, 7, -1, 3)
    system = water(molecules)
    return DynamicsRun(
        label=label, target="none", seed=seed, system=system, masses=system.masses, temperature_K=300.0, friction_per_ps=1.0,
        save_interval_ps=0.1, positions=positions % edge if wrap else positions, box=edge * np.eye(3),
    )  # fmt: skip


@pytest.mark.slow
def test_runs_in_a_box():
    settings = ComparisonSettings(relaxation_lag_ps=0.5, diffusion_fit_ps=(0.5, 2.0), viscosity_mPa_s=0.85, permutations=199)
    baseline = [boxed(seed, label="sts") for seed in (4, 5, 6)]

    def compared(**options):
        table = compare_dynamics([boxed(seed, label="mts", **options) for seed in (1, 2, 3)], baseline, settings=settings)
        return {(row.observable, row.part): row for row in table.rows}

    same, fast, wrapped = compared(), compared(D=4.6e-3), compared(wrap=True)
    key = ("diffusion coefficient", "")
    assert same[key].verdict in {SAME, NOT_RESOLVED}
    assert same[key].matters_from == pytest.approx(0.1 * same[key].baseline)
    assert {part for name, part in same if name == "g(r)"} == {"H-H", "H-O", "O-O"}
    shift = yeh_hummer(temperature_K=300.0, viscosity_mPa_s=0.85, box_edge_nm=1.8644)
    corrected = same["diffusion coefficient, infinite box", ""]
    assert corrected.candidate == pytest.approx(same[key].candidate + shift)
    assert fast[key].verdict == DIFFERS
    assert fast["mean squared displacement", ""].verdict == DIFFERS
    # structure is found through the box's faces: folding the molecules back changes nothing but diffusion
    assert wrapped[key].verdict == MISSING
    assert "unwrapped" in wrapped[key].note
    for name in ("bond length mean", "g(r)"):
        assert wrapped[name, "H-O"].difference == pytest.approx(same[name, "H-O"].difference, abs=1e-4)


def integrated(seed, *, step, n_inner, share):
    """Atoms of water on springs of an O-H frequency for hydrogen, moved by the integrators themselves."""
    k = torch.tensor([4e4, 4.9e5, 4.9e5], dtype=torch.float64)  # hydrogen: 3700 1/cm, T/2 = 4.51 fs
    masses = torch.as_tensor(water().masses)
    reference, fast = (HarmonicWell(water(), center=torch.as_tensor(WATER), k=k * f) for f in (1.0, 1 - share))
    generator = torch.Generator().manual_seed(seed)
    kT = thermal_energy(300.0)
    shape = torch.Size((30, 3, 3))
    x = torch.as_tensor(WATER) + (kT / k[:, None]).sqrt() * torch.randn(shape, generator=generator, dtype=torch.float64)
    md = start(x, thermal_velocities(shape, masses, kT, generator), masses=masses, potential=reference, fast=fast)
    saved = []
    dynamics = {"dt": step * 1e-3, "kT": kT, "friction": 10.0, "generator": generator}
    for index in range(round(2000 / step)):
        md = respa_baoab(md, fast=fast, slow=reference, n_inner=n_inner, **dynamics)
        if index * step >= 400:  # 4 relaxation times
            velocities = half_step_velocities(md, dt=step * 1e-3, n_inner=n_inner)
            saved.append((md.positions.numpy(), velocities.numpy(), md.potential_energy.numpy()))
    positions, velocities, energy = (np.stack(part) for part in zip(*saved, strict=True))
    return DynamicsRun(
        label=f"{step} fs", target="springs", seed=seed, system=water(), masses=water().masses, temperature_K=300.0,
        friction_per_ps=10.0, save_interval_ps=step * 1e-3, positions=positions, velocities=velocities, potential_energy=energy,
    )  # fmt: skip


@pytest.mark.slow
def test_resonance_is_found_where_the_linear_model_puts_it():
    settings = ComparisonSettings(vacf_lag_ps=0.1, relaxation_lag_ps=0.1, permutations=199)
    baseline = [integrated(seed, step=1.0, n_inner=1, share=0.0) for seed in (4, 5, 6)]

    def compared(step, n_inner):
        runs = [integrated(seed, step=step, n_inner=n_inner, share=0.03) for seed in (1, 2, 3)]
        return {(row.observable, row.part): row for row in compare_dynamics(runs, baseline, settings=settings).rows}

    growth = {
        step: growth_per_outer_step(wavenumber_per_cm=3700, slow_share=0.03, dt_outer_fs=step, n_inner=n, friction_per_ps=10.0)
        for step, n in ((3.0, 6), (4.3, 9), (4.48, 9))
    }
    assert growth[3.0] < 0.99
    assert growth[4.48] > 1.02
    calm, near = compared(3.0, 6), compared(4.3, 9)
    assert abs(calm["temperature", "H"].z) < 3
    assert abs(calm["bond length sd", "H-O"].z) < 3
    # beside the window the mode no longer has the temperature of the bath
    assert near["temperature", "H"].verdict == DIFFERS
    assert near["temperature", "H"].matters
    assert compared(4.48, 9)["temperature", "H"].difference > 1000  # inside the window it blows up
