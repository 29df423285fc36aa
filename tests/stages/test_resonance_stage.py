"""The resonance scan on atoms on springs, for which the unstable outer steps are known, and on the force field."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch

from longstride.analysis.resonance import LIGHT_CM_PER_PS, linear_scan
from longstride.analysis.vibrations import minimise, normal_modes
from longstride.cli import build_parser, main
from longstride.data.frames import write_trajectory
from longstride.data.manifest import read_manifest, write_manifest
from longstride.dynamics.masses import repartitioned_masses
from longstride.errors import LongstrideError, NumericsError
from longstride.potentials.amber import AmberPotential
from longstride.potentials.analytic import HarmonicWell
from longstride.potentials.teachers import TeacherSpec
from longstride.stages import resonance

OH_PER_CM = 3700.0  # T/2 = 4.51 fs
STIFFNESS = 1.008 * (2 * np.pi * LIGHT_CM_PER_PS * OH_PER_CM) ** 2  # kJ/mol/nm^2, of every atom
SCAN = resonance.Settings(outer_fs=(3.0, 4.0, 4.5, 5.0), inner_fs=0.5, replicas=2, steps=80, settle_ps=0.02)


class Kill(Exception):
    """Stands for kill -9 at a chosen teacher call."""


@pytest.fixture
def inputs(alanine, alanine_folder, tmp_path):
    """Folders of the stages before, with the structure of the molecule as its reference."""
    rng, files = np.random.default_rng(0), []
    folder = tmp_path / "reference"
    folder.mkdir()
    for index in range(2):
        positions = (alanine.positions + rng.normal(scale=0.002, size=(5, 22, 3))).astype(np.float32)
        frames = {"positions": positions, "velocities": 0 * positions, "forces": 0 * positions}
        frames |= {key: np.zeros(5) for key in ("potential_energy", "kinetic_energy", "time")}
        files += write_trajectory(folder, index, frames)
    write_manifest(folder, kind="reference", files=files, content={"temperature_K": 310.0})
    (tmp_path / "distill").mkdir()
    (tmp_path / "distill" / "student.safetensors").write_text("stands for weights")
    write_manifest(tmp_path / "distill", kind="distill", files=["student.safetensors"], content={})
    return {"prepared": alanine_folder, "reference": folder, "distill": tmp_path / "distill"}


@pytest.fixture
def pair(alanine, monkeypatch):
    """Set teacher and student; the teacher counts its calls and may die at one."""

    class Teacher:
        calls, dies_at, potential = 0, None, None

        def __init__(self, spec, molecule, *, charge, threads):
            self.name, self.system = "springs", molecule.system

        def energy_forces(self, x):
            Teacher.calls += 1
            if Teacher.calls == Teacher.dies_at:
                raise Kill
            return Teacher.potential.energy_forces(x)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    def choose(teacher, student):
        Teacher.potential = teacher
        network = type("Network", (), {"bind": lambda self, system, **_: student})()
        monkeypatch.setattr(resonance, "load_student", lambda path, teacher: network)
        monkeypatch.setattr(resonance, "open_teacher", Teacher)
        return Teacher

    return choose


def springs(alanine, share):
    """Return teacher and student whose stiffness misses `share`."""
    centre = torch.from_numpy(alanine.positions)
    wells = (HarmonicWell(alanine.system, center=centre, k=scale * STIFFNESS) for scale in (1.0, 1 - share))
    return tuple(wells)


def scan(inputs, out, settings=SCAN):
    resonance.run(
        settings, **inputs, out=out, state=out.with_name(f"{out.name}.state"), seed=3, threads=1,
        teacher=TeacherSpec(kind="gfn2-xtb"),
    )  # fmt: skip
    return json.loads((out / "resonance.json").read_text())


def test_springs_blow_up_where_theory_says_and_the_scan_ends_there(alanine, inputs, tmp_path, pair, capsys):
    pair(*springs(alanine, 0.1))
    content = scan(inputs, tmp_path / "out")
    window = linear_scan(np.arange(4.0, 5.0, 0.01), wavenumber_per_cm=OH_PER_CM, slow_share=0.1).windows_fs[0]
    assert window[0] < 4.5 < window[1]
    found = {row["outer_fs"]: row for row in content["rows"]}
    assert list(found) == [3.0, 4.0, 4.5]  # 5.0 was not tried
    assert [found[outer]["blow_up_ps"] for outer in (3.0, 4.0)] == [None, None]
    assert 0 < found[4.5]["blow_up_ps"] < 80 * 4.5e-3
    assert "temperature" in found[4.5]["reason"]
    assert found[4.0]["steps"] == 80
    hydrogen = content["modes"]["stiffest"]["C-H"]
    assert content["modes"]["of"] == "teacher"
    assert hydrogen["wavenumber_per_cm"] == pytest.approx(OH_PER_CM, rel=1e-3)
    assert hydrogen["slow_share"] == pytest.approx(0.1, abs=1e-6)
    assert "stable up to 4 fs, blew up at 4.5 fs" in content["statement"]
    said = [line for line in capsys.readouterr().out.splitlines() if "blew up after" in line]
    assert len(said) == 1
    manifest = read_manifest(tmp_path / "out", kind="resonance")
    assert set(manifest["files"]) == {"resonance.csv", "resonance.json", "resonance.svg"}
    figure = (tmp_path / "out" / "resonance.svg").read_text()
    assert "T/2 C-H" in figure
    assert "blew up" in figure
    with (tmp_path / "out" / "resonance.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert float(rows[0]["temperature_H_K"]) > 0
    assert rows[2]["reason"]


def test_a_perfect_student_never_blows_up(alanine, inputs, tmp_path, pair):
    pair(*springs(alanine, 0.0))
    content = scan(inputs, tmp_path / "out")
    assert [row["blow_up_ps"] for row in content["rows"]] == [None] * 4
    assert "no blow-up in the scan" in content["statement"]
    for row in content["rows"]:
        for mean, error in row["temperatures_K"].values():
            assert abs(mean - 310.0) < 0.35 * 310.0  # 12 frames of few atoms; a blow-up is thousands of kelvin
            assert error >= 0
    assert content["modes"]["stiffest"]["C-H"]["slow_share"] == pytest.approx(0.0, abs=1e-9)


def test_a_killed_scan_continues_bitwise_and_repeats_no_finished_step(alanine, inputs, tmp_path, pair):
    teacher = pair(*springs(alanine, 0.1))
    whole = scan(inputs, tmp_path / "whole")
    calls, teacher.calls = teacher.calls, 0
    teacher.dies_at = calls // 2
    with pytest.raises(Kill):
        scan(inputs, tmp_path / "parts")
    teacher.dies_at, teacher.calls = None, 0
    parts = scan(inputs, tmp_path / "parts")
    assert parts["rows"] == whole["rows"]
    assert teacher.calls <= calls // 2 + resonance.CHECKPOINT_EVERY + 2
    teacher.calls = 0
    longer = scan(inputs, tmp_path / "parts", settings=resonance.Settings(**{**vars(SCAN), "outer_fs": (2.0, *SCAN.outer_fs)}))
    assert longer["rows"][1:] == whole["rows"]  # only the new outer step was run
    assert longer["rows"][0]["outer_fs"] == 2.0


def test_the_force_field_as_teacher_gives_stretching_modes(alanine, inputs, tmp_path, pair):
    amber = AmberPotential.from_openmm(alanine.openmm_system, alanine.system, name="amber", dtype=torch.float64)
    pair(amber, amber)
    content = scan(inputs, tmp_path / "out", resonance.Settings(outer_fs=(2.0,), replicas=2, steps=8, settle_ps=0.004))
    stiff = content["modes"]["stiffest"]
    assert next(iter(stiff)) == "H-N"
    assert 3300 < stiff["H-N"]["wavenumber_per_cm"] < 3600  # amide N-H of AMBER
    assert 2900 < stiff["C-H"]["wavenumber_per_cm"] < 3200
    heavy = resonance.Settings(outer_fs=(2.0,), replicas=2, steps=8, settle_ps=0.004, hydrogen_mass_Da=3.024)
    slower = scan(inputs, tmp_path / "heavy", heavy)["modes"]["stiffest"]["H-N"]
    masses = repartitioned_masses(alanine.system, 3.024)
    minimum = minimise(amber, alanine.positions, max_force=resonance.MAX_FORCE)
    expected = normal_modes(amber, minimum, masses=masses).stiffest["H-N"]
    assert slower["wavenumber_per_cm"] == pytest.approx(expected, rel=2e-3)
    assert slower["wavenumber_per_cm"] < 0.7 * stiff["H-N"]["wavenumber_per_cm"]


def test_modes_that_cannot_be_found_are_named_and_no_failure(alanine, inputs, tmp_path, pair, monkeypatch):
    pair(*springs(alanine, 0.0))

    def refuse(*_, **__):
        raise NumericsError("the minimisation stopped")

    monkeypatch.setattr(resonance, "minimise", refuse)
    content = scan(inputs, tmp_path / "out", resonance.Settings(outer_fs=(2.0,), replicas=2, steps=8, settle_ps=0.004))
    assert content["modes"] == {"of": "teacher", "stiffest": {}, "note": "the minimisation stopped"}
    assert "T/2" not in (tmp_path / "out" / "resonance.svg").read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"outer_fs": (2.5,), "inner_fs": 1.0}, "whole multiple"),
        ({"outer_fs": ()}, "one outer step or more"),
        ({"outer_fs": (2.0, 2.0)}, "each once"),
        ({"replicas": 1}, "2 replicas"),
        ({"steps": 4}, "8 steps"),
        ({"inner_fs": 0.0}, "above zero"),
    ],
)
def test_bad_settings_are_one_line(change, words):
    with pytest.raises(LongstrideError, match=words) as caught:
        resonance.Settings(**change)
    assert "\n" not in str(caught.value)


def test_the_command_line(tmp_path, capsys):
    text = ["resonance-scan", "--prepared", "p", "--distill", "d", "--reference", "r", "--out", str(tmp_path / "out")]
    options = build_parser().parse_args([*text, "--outer-fs", "2", "3", "--hydrogen-mass-Da", "3.024"])
    assert (options.outer_fs, options.hydrogen_mass_Da, options.inner_fs) == ([2.0, 3.0], 3.024, 1.0)
    assert main([*text, "--outer-fs", "2.5"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "whole multiple" in error
