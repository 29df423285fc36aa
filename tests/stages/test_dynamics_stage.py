"""The dynamics stage on sample folders with known statistics: verdicts, cost, refusals, the teacher's part, the report."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
import torch
from made_samples import STIFFNESS, TEMPERATURE_K, write_dynamics, write_sides

from longstride.analysis.mts_comparison import DynamicsComparison
from longstride.config import Config, DynamicsConfig, SystemConfig, stage_view, validate
from longstride.data.manifest import read_manifest
from longstride.errors import ConfigError, DataError, LongstrideError
from longstride.potentials.analytic import HarmonicWell
from longstride.potentials.teachers import TeacherSpec
from longstride.stages import compare, dynamics, report
from longstride.systems import prepare_water, save_prepared

SECTION = DynamicsConfig(permutations=99, pair_bins=30, vacf_lag_ps=0.1, relaxation_lag_ps=0.1)
SPEC = TeacherSpec(kind="gfn2-xtb")


@pytest.fixture
def no_figures(monkeypatch):
    """Leave out what takes half of the time."""
    monkeypatch.setattr(dynamics.dynamics_figures, "draw", lambda found, out: [])


def run_stage(prepared, sides, out, *, section=SECTION, seed=1):
    dynamics.run(
        section, prepared=prepared, mts=sides[0], sts=sides[1], out=out, state=out.with_name("state"), seed=seed, threads=1,
        teacher=SPEC,
    )  # fmt: skip
    return json.loads((out / "dynamics.json").read_text())


def rows_of(content):
    return {(row["observable"], row["part"]): row for row in content["rows"]}


@pytest.fixture(scope="module")
def equal(alanine, alanine_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("equal")
    sides = write_sides(root / "sample", alanine)
    return root / "dynamics", run_stage(alanine_folder, sides, root / "dynamics")


def test_equal_ensembles_pass_and_everything_is_written(equal):
    out, content = equal
    manifest = read_manifest(out, kind="dynamics")
    assert {"dynamics.csv", "curves.csv", "dynamics.json", "deviations.svg", "bonds.svg", "angles.svg"} <= set(
        manifest["files"]
    )
    assert {"energy.svg", "pairs.svg", "spectra.svg", "torsions.svg"} <= set(manifest["files"])
    assert all(figure["alt"] and figure["title"] for figure in content["figures"])
    rows = rows_of(content)
    judged = [row for row in rows.values() if row["z"] is not None]
    assert len(judged) > 60
    # 4.6 % of equal rows lie beyond two errors; rows of one observable are correlated, so twice the chance of independent ones
    beyond = sum(abs(row["z"]) > 2 for row in judged)
    assert beyond <= 0.0455 * len(judged) + 2 * math.sqrt(2 * 0.0455 * len(judged))
    assert (content["candidate"], content["baseline"]) == ("mts 4 fs", "sts 1 fs")
    assert "configurational_frames" in rows["configurational temperature", ""]["note"]
    with (out / "dynamics.csv").open(newline="") as handle:
        assert len(list(csv.DictReader(handle))) == len(content["rows"])
    with (out / "curves.csv").open(newline="") as handle:
        curve = [row for row in csv.DictReader(handle) if (row["observable"], row["part"]) == ("bond length density", "C-H")]
    x, y = (np.array([float(row[key]) for row in curve]) for key in ("x", "baseline"))
    assert np.sum(y) * (x[1] - x[0]) == pytest.approx(1.0, rel=1e-3)


def test_heat_is_found(alanine, alanine_folder, tmp_path, equal, no_figures):
    sides = write_sides(tmp_path / "sample", alanine, mts={"heat": 1.1})
    content = run_stage(alanine_folder, sides, tmp_path / "dynamics")
    hot = rows_of(content)["temperature", "all"]
    assert hot["verdict"] == "differs"
    assert hot["difference"] == pytest.approx(31.0, abs=4 * hot["combined_se"])
    assert rows_of(content)["potential energy mean", ""]["verdict"] == "differs"
    assert rows_of(equal[1])["temperature", "all"]["verdict"] != "differs"  # the control: no heat, no difference


def test_gain_is_the_ratio_of_simulated_time_per_second(equal, alanine, alanine_folder, tmp_path, no_figures):
    cost = equal[1]["cost"]
    # 60 frames of 3 replicas every 0.02 ps: 3.6 ps a seed, in 2 s and in 8 s
    assert cost["mts"]["ps_per_s"] == pytest.approx(1.8)
    assert cost["sts"]["ps_per_s"] == pytest.approx(0.45)
    assert (cost["gain"], cost["gain_se"]) == (pytest.approx(4.0), pytest.approx(0.0))
    folders = [
        write_dynamics(tmp_path / "mts" / f"seed{k}", alanine, method="mts", seed=k, frames=4, seconds=s)
        for k, s in enumerate((0.1, 0.3))
    ]
    base = [write_dynamics(tmp_path / "sts" / "seed0", alanine, method="sts", seed=9, frames=8, seconds=0.4)]
    found = run_stage(alanine_folder, (folders, base), tmp_path / "dynamics")["cost"]
    assert found["mts"]["ps_per_s"] == pytest.approx(2 * 4 * 3 * 0.02 / 0.4)
    assert found["sts"]["ps_per_s"] == pytest.approx(8 * 3 * 0.02 / 0.4)
    assert found["gain"] == pytest.approx(1.0)
    assert found["gain_se"] is None  # one seed has no spread
    assert "seeds of mts differ in speed by a factor of 3" in found["note"]
    assert cost["note"] == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"friction_per_ps": 5.0}, "friction.*run both at one friction"),
        ({"hydrogen_friction_per_ps": 20.0}, "friction.*by up to 19.*run both at one friction"),
        ({"masses_Da": "light"}, "masses.*repartition both alike"),
        ({"target": "gfn1-xtb"}, "other targets"),
        ({"temperature_K": 300.0}, "temperature"),
    ],
)
def test_unequal_conditions_are_refused_in_one_line(alanine, alanine_folder, tmp_path, change, words):
    if change.get("masses_Da") == "light":
        change = {"masses_Da": alanine.system.masses.tolist()}
    sides = write_sides(tmp_path / "sample", alanine, frames=4, mts=change)
    with pytest.raises(LongstrideError, match=words) as caught:
        run_stage(alanine_folder, sides, tmp_path / "dynamics")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "dynamics").exists()


def test_samples_that_do_not_fit_are_refused(alanine, alanine_folder, tmp_path):
    sides = write_sides(tmp_path / "sample", alanine, frames=4, seeds=1)
    with pytest.raises(DataError, match="method sts, expected mts"):
        run_stage(alanine_folder, (sides[1], sides[1]), tmp_path / "dynamics")
    old = write_dynamics(tmp_path / "old", alanine, method="mts", seed=5, frames=4, friction_per_ps="left out")
    with pytest.raises(DataError, match=r"no friction_per_ps; delete .* run the sample stage again"):
        run_stage(alanine_folder, ([old], sides[1]), tmp_path / "dynamics")
    other = write_dynamics(tmp_path / "other", alanine, method="mts", seed=5, frames=4, system_hash="0")
    with pytest.raises(DataError, match="another prepared system"):
        run_stage(alanine_folder, ([other], sides[1]), tmp_path / "dynamics")


class Springs:
    """The potential of the made-up samples, as a teacher that can be killed."""

    calls, dies_at = 0, None

    def __init__(self, spec, molecule, *, charge, threads=1):
        self.name, self.system = "springs", molecule.system
        self._well = HarmonicWell(molecule.system, center=torch.from_numpy(molecule.positions), k=STIFFNESS)

    def energy_forces(self, x):
        Springs.calls += 1
        if Springs.calls == Springs.dies_at:
            raise KeyboardInterrupt
        return self._well.energy_forces(x)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def springs(monkeypatch):
    monkeypatch.setattr(Springs, "calls", 0)
    monkeypatch.setattr(Springs, "dies_at", None)
    monkeypatch.setattr(dynamics, "open_teacher", Springs)
    monkeypatch.setattr(TeacherSpec, "label_for", lambda self, molecule: "springs")
    others = DynamicsComparison(candidate="mts 4 fs", baseline="sts 1 fs", rows=(dynamics.NOT_ASKED,))
    monkeypatch.setattr(dynamics, "compare_dynamics", lambda *_, **__: others)  # tested above
    return Springs


def test_the_teacher_gives_the_configurational_temperature_and_may_be_killed(
    alanine, alanine_folder, tmp_path, springs, no_figures
):  # with friction of their own for hydrogens, alike in both methods
    section = SECTION.model_copy(update={"configurational_frames": 30, "configurational_probes": 1})
    sides = write_sides(tmp_path / "sample", alanine, frames=20, mts={"heat": 1.2}, hydrogen_friction_per_ps=20.0)
    content = run_stage(alanine_folder, sides, tmp_path / "whole", section=section)
    assert content["conditions"] | {"friction_per_ps": 1.0, "hydrogen_friction_per_ps": 20.0} == content["conditions"]
    row = rows_of(content)["configurational temperature", ""]
    # exact: <k^2 x^2> / (3 N k) = T whatever the probes, the Hessian being a constant
    assert row["baseline"] == pytest.approx(TEMPERATURE_K, abs=4 * row["combined_se"])
    assert row["candidate"] == pytest.approx(1.2 * TEMPERATURE_K, abs=4 * row["combined_se"])
    assert row["verdict"] == "differs"
    # a frame of 66 coordinates has a spread of T sqrt(2 / 66), 90 frames a side
    assert row["combined_se"] == pytest.approx(TEMPERATURE_K * math.sqrt((1 + 1.44) * 2 / 66 / 90), rel=0.3)
    calls = springs.calls
    springs.calls, springs.dies_at = 0, calls // 2
    out = tmp_path / "again" / "dynamics"
    with pytest.raises(KeyboardInterrupt):
        run_stage(alanine_folder, sides, out, section=section)
    springs.dies_at = None
    springs.calls = 0
    again = run_stage(alanine_folder, sides, out, section=section)
    assert springs.calls <= calls // 2 + 7  # continued: at most the seven calls of one frame are repeated
    assert rows_of(again)["configurational temperature", ""] == row


def test_another_teacher_than_that_of_the_samples_is_refused(alanine, alanine_folder, tmp_path):
    """Before anything that takes time."""
    section = SECTION.model_copy(update={"configurational_frames": 4})
    sides = write_sides(tmp_path / "sample", alanine, frames=8)
    with pytest.raises(DataError, match="'springs' and the configuration's teacher is 'gfn2-xtb'"):
        run_stage(alanine_folder, sides, tmp_path / "dynamics", section=section)


@pytest.fixture(scope="module")
def water_run(tmp_path_factory):
    """A run folder of a box of water, without a comparison by torsions."""
    root = tmp_path_factory.mktemp("water")
    water = prepare_water(64, name="water", force_field=("amber14-all.xml", "amber14/tip3p.xml"), cutoff_nm=0.6)
    save_prepared(root / "prepare" / "water", water, {"temperature_K": TEMPERATURE_K})
    sides = write_sides(root / "sample" / "water", water, frames=40, replicas=2, drift_nm=0.01)
    section = SECTION.model_copy(update={"diffusion_fit_ps": (0.1, 0.2), "viscosity_mPa_s": 0.85})
    run_stage(root / "prepare" / "water", sides, root / "dynamics" / "water", section=section)
    compare.summarise([], root / "summary.csv", dynamics_files=[root / "dynamics/water/dynamics.json"])
    return root


def test_a_box_of_water_goes_from_samples_to_the_report(water_run):
    content = json.loads((water_run / "dynamics/water/dynamics.json").read_text())
    rows = rows_of(content)
    assert rows["g(r)", "O-O"]["z"] is not None
    assert rows["diffusion coefficient", ""]["verdict"] != "not available"
    corrected = next(row for (name, _), row in rows.items() if name == "diffusion coefficient, infinite box")
    assert corrected["baseline"] > rows["diffusion coefficient", ""]["baseline"]
    with (water_run / "summary.csv").open(newline="") as handle:
        table = list(csv.DictReader(handle))
    assert [(row["method"], row["seed"]) for row in table] == [(m, str(k)) for m in ("mts", "sts") for k in range(3)]
    assert all(float(row["simulated_ps"]) == pytest.approx(1.6) for row in table)
    config = Config(
        systems=(SystemConfig(name="water", water=64),), sample=Config().sample.model_copy(update={"methods": ("mts", "sts")})
    )
    report.run(config, run_folder=water_run, out=water_run / "report.html")
    page = (water_run / "report.html").read_text()
    for text in (
        "Multi-time-step dynamics",
        "diffusion coefficient",
        "expected by chance",
        "a gain of 4 ± 0.00 ×",
        "Table of every observable",
    ):
        assert text in page
    assert "No comparison for" not in page
    assert "Effective sample size of every observable" not in page  # torsions: there are none


def test_an_edit_of_this_section_is_an_edit_of_this_stage_alone():
    before, after = Config(), validate({"dynamics": {"pair_bins": 50}})
    for stage in ("prepare", "reference", "distill", "sample", "compare", "dynamics"):
        changed = stage_view(before, stage, system="alanine-dipeptide") != stage_view(after, stage, system="alanine-dipeptide")
        assert changed == (stage == "dynamics")
    assert "teacher" not in stage_view(before, "dynamics")
    assert stage_view(validate({"dynamics": {"configurational_frames": 5}}), "dynamics")["teacher"]["teacher"] == "gfn2-xtb"


def test_configurations_that_cannot_be_compared_are_refused_before_anything_runs():
    unequal = {"sample": {"mts": {"friction_per_ps": 2.0}}}
    with pytest.raises(ConfigError, match=r"sample\.mts\.friction_per_ps is 2\.0 and sample\.sts\.friction_per_ps is 1\.0"):
        validate(unequal)
    with pytest.raises(ConfigError, match="hydrogen_mass_Da"):
        validate({"sample": {"sts": {"hydrogen_mass_Da": None}}})
    validate(unequal | {"dynamics": {"enabled": False}})
    validate({"sample": {**unequal["sample"], "methods": ["mts"]}})
    with pytest.raises(ConfigError, match="diffusion_fit_ps"):
        validate({"dynamics": {"diffusion_fit_ps": [1.0, 0.5]}})
    with pytest.raises(ConfigError, match="system 'w' lies in a periodic box, where only mts and sts sample"):
        validate({"systems": [{"name": "w", "water": 64}], "sample": {"methods": ["md", "timewarp"]}})
    mixed = validate({"systems": [{"name": "w", "water": 64}, {"name": "a", "sequence": "ACE-ALA-NME"}]})
    assert mixed.methods_of("w") == ("mts", "sts")
    assert mixed.methods_of("a") == mixed.sample.methods
