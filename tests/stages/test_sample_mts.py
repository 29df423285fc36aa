"""The distill, mts and sts stages end to end, with the force field standing in for the expensive teacher."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from longstride.config import DistillConfig, MTSSampling, STSSampling
from longstride.data.atomic import read_arrays
from longstride.data.frames import write_trajectory
from longstride.data.manifest import read_manifest, write_manifest
from longstride.dynamics import replicas
from longstride.errors import DataError, LongstrideError, NumericsError
from longstride.potentials.amber import AmberPotential
from longstride.potentials.teachers import TeacherSpec
from longstride.stages import distill, sample_mts
from longstride.state import State
from longstride.systems import save_prepared
from longstride.training import distillation
from longstride.training.labels import Labelled, LabelPlan

DISTILL = DistillConfig(
    frames=60,
    max_steps=30,
    round_frames=20,
    round_steps=20,
    hole_kJ_per_mol_nm=1.0,
    max_bond_error=10.0,
    batch_size=8,
    checkpoint_every_steps=10,
    channels=4,
    hidden=16,
)
MTS = MTSSampling(
    replicas=2,
    length_ps=0.08,
    outer_timestep_fs=2.0,
    inner_steps=2,
    equilibration_ps=0.02,
    save_every_ps=0.01,
    checkpoint_every_ps=0.02,
    max_slow_force_kJ_per_mol_nm=1e5,
)
STS = STSSampling(
    replicas=2, length_ps=0.04, timestep_fs=1.0, equilibration_ps=0.01, save_every_ps=0.01, checkpoint_every_ps=0.02
)


@pytest.fixture(scope="module")
def reference(alanine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    rng, files = np.random.default_rng(0), []
    for index in range(2):
        positions = (alanine.positions + rng.normal(scale=0.003, size=(10, 22, 3))).astype(np.float32)
        zeros = np.zeros_like(positions)
        frames = {"positions": positions, "velocities": zeros, "forces": zeros}
        frames |= {key: np.zeros(10) for key in ("potential_energy", "kinetic_energy", "time")}
        files += write_trajectory(folder, index, frames)
    write_manifest(folder, kind="reference", files=files, content={"temperature_K": 310.0})
    return folder


class Kill(Exception):
    """Stands for kill -9 at a chosen teacher call."""


@pytest.fixture
def teacher(alanine, monkeypatch):
    """Replace xTB by AMBER; `teacher.dies_at` ends the job at that call."""
    amber = AmberPotential.from_openmm(alanine.openmm_system, alanine.system, name="gfn2-xtb", dtype=torch.float64)

    class Teacher:
        calls, dies_at, nan_at = 0, None, None
        system, name = alanine.system, "gfn2-xtb"

        def __init__(self, spec, molecule, *, charge, threads=1):
            assert (spec.kind, molecule.system.n_atoms, charge) == ("gfn2-xtb", 22, 0)

        def energy_forces(self, x: State):
            Teacher.calls += 1
            if Teacher.calls == Teacher.dies_at:
                raise Kill
            energy, forces = amber.energy_forces(x)
            return energy * (float("nan") if Teacher.calls == Teacher.nan_at else 1.0), forces

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    for module in (distillation, replicas):
        monkeypatch.setattr(module, "open_teacher", Teacher)
    return Teacher


def run_distill(folder, alanine_folder, reference, name="distill", **changes):
    distill.run(
        DISTILL.model_copy(update=changes),
        prepared=alanine_folder,
        reference=reference,
        out=folder / name,
        state=folder / f"{name}.state",
        seed=1,
        threads=1,
    )
    return folder / name


def run_mts(folder, alanine_folder, reference, distilled, *, name="mts", section=MTS, teacher="gfn2-xtb"):
    sample_mts.run_mts(
        section,
        prepared=alanine_folder,
        distill=distilled,
        reference=reference,
        out=folder / name,
        state=folder / f"{name}.state",
        seed=2,
        threads=1,
        teacher=TeacherSpec(kind=teacher),
    )
    return folder / name


def test_the_whole_path(tmp_path, alanine_folder, reference, teacher, capsys):
    distilled = run_distill(tmp_path, alanine_folder, reference)
    found = read_manifest(distilled, kind="distill")
    assert found["frames"]["teacher_calls"] >= teacher.calls  # a call labels many frames
    assert 0 < found["force_relative"] < 1
    assert found["frames"]["held_out"] > 0
    assert len((distilled / "metrics.csv").read_text().splitlines()) == 6
    (driven,) = found["rounds"]
    assert driven["holes"] == driven["frames"] + driven["torn"] == found["frames"]["teacher_calls"] - LabelPlan.of(60).total
    assert driven["largest_error"] > 1.0
    assert found["hessian_relative"] > 0.01
    out = run_mts(tmp_path, alanine_folder, reference, distilled)
    samples = read_arrays(out / "samples.safetensors")[0]
    assert samples["positions"].shape == (8, 2, 22, 3)
    assert samples["velocities"].shape == (8, 2, 22, 3)
    assert samples["potential_energy"].shape == samples["kinetic_energy"].shape == (8, 2)
    found = read_manifest(out, kind="samples")
    assert found["target"] == "gfn2-xtb"
    assert found["counts"]["force_calls"] == 80
    assert found["counts"]["student_calls"] == 160
    assert found["save_every"] == pytest.approx(0.01)
    assert sum(found["masses_Da"]) == pytest.approx(144.2, abs=0.2)
    assert list(found["kinetic_temperature_K"]) == ["H", "C", "N", "O"]
    assert not list((tmp_path / "mts.state").glob("*.safetensors"))
    sample_mts.run_sts(
        STS,
        prepared=alanine_folder,
        reference=reference,
        out=tmp_path / "sts",
        state=tmp_path / "sts.state",
        seed=2,
        threads=1,
        teacher=TeacherSpec(kind="gfn2-xtb"),
    )
    found = read_manifest(tmp_path / "sts", kind="samples")
    assert (found["method"], found["counts"]["student_calls"], found["counts"]["force_calls"]) == ("sts", 0, 80)
    assert "ps/s" in capsys.readouterr().out
    with pytest.raises(DataError, match="not from gfn1-xtb"):
        run_mts(tmp_path, alanine_folder, reference, distilled, name="other", teacher="gfn1-xtb")


def test_one_student_of_a_family_serves_every_member(tmp_path, alanine, alanine_folder, reference, teacher):
    other = tmp_path / "other"
    renamed = dataclasses.replace(alanine, system=dataclasses.replace(alanine.system, name="other"))
    save_prepared(other, renamed, {"temperature_K": 310.0})
    shared = {"out": tmp_path / "family", "state": tmp_path / "family.state", "seed": 3, "threads": 1}
    folders = {"prepared": [alanine_folder, other], "reference": [reference, reference]}
    section = DISTILL.model_copy(update={"family": True})
    teacher.dies_at = 9
    with pytest.raises(Kill):
        distill.run_family(section, **folders, **shared)
    teacher.dies_at = None
    before = teacher.calls
    distill.run_family(section, **folders, **shared)
    once = teacher.calls - before
    found = read_manifest(tmp_path / "family", kind="distill")
    assert found["systems"] == list(found["members"]) == ["alanine-dipeptide", "other"]
    members = found["members"].values()
    assert found["frames"]["train"] == sum(one["frames"]["train"] for one in members)
    assert found["force_relative"] == pytest.approx(sum(one["force_relative"] for one in members) / 2)
    card = (tmp_path / "family" / "README.md").read_text()
    assert f"{100 * found['force_relative']:.1f} %" in card
    assert "| other | 22 |" in card
    # untouched for a member, without any label
    calls = teacher.calls
    for name, prepared in (("first", alanine_folder), ("second", other)):
        job = {"prepared": prepared, "reference": reference, "out": tmp_path / name, "state": tmp_path / f"{name}.state"}
        distill.run(section, **job, seed=1, threads=1, family=tmp_path / "family")
    assert teacher.calls == calls
    same = [(tmp_path / name / "student.safetensors").read_bytes() for name in ("family", "first", "second")]
    assert same[0] == same[1] == same[2]
    assert read_manifest(tmp_path / "second", kind="distill")["system"] == "other"
    # trained further on one of them, from the family's weights
    job |= {"out": tmp_path / "tuned", "state": tmp_path / "tuned.state"}
    tuned = section.model_copy(update={"fine_tune_steps": 40})
    distill.run(tuned, **job, seed=1, threads=1, family=tmp_path / "family")
    after = read_manifest(tmp_path / "tuned", kind="distill")
    assert after["force_relative"] < found["members"]["other"]["force_relative"]
    assert after["family"] == ["alanine-dipeptide", "other"]
    assert once > 0


def test_a_family_of_other_atoms_or_of_another_teacher_is_refused(tmp_path, alanine_folder, reference, teacher):
    distilled = run_distill(tmp_path, alanine_folder, reference)
    job = {"prepared": alanine_folder, "reference": reference, "out": tmp_path / "out", "state": tmp_path / "state"}
    for key, value, message in (("teacher", "gfn1-xtb", "imitates gfn1-xtb"), ("environments", ["H(C)"], "knows no atom like")):
        family = tmp_path / key
        shutil.copytree(distilled, family)
        content = json.loads((family / "manifest.json").read_text())
        (family / "manifest.json").write_text(json.dumps({**content, key: value}))
        with pytest.raises(LongstrideError, match=message) as error:
            distill.run(DISTILL, **job, seed=1, threads=1, family=family)
        assert "\n" not in str(error.value)
    folders = {"prepared": [alanine_folder] * 2, "reference": [reference] * 2}
    with pytest.raises(LongstrideError, match="different names"):
        distill.run_family(DISTILL, **folders, out=tmp_path / "out", state=tmp_path / "state", seed=1, threads=1)


def test_a_student_without_holes_needs_no_more_training(tmp_path, alanine_folder, reference, teacher, monkeypatch):
    monkeypatch.setattr(distillation, "TORN", 1e9)
    out = run_distill(tmp_path, alanine_folder, reference, rounds=3, hole_kJ_per_mol_nm=1e9)
    found = read_manifest(out, kind="distill")
    assert [item["holes"] for item in found["rounds"]] == [0]
    assert len((out / "metrics.csv").read_text().splitlines()) == 4


def test_frames_of_a_molecule_that_was_torn_apart_are_left_out():
    forces = torch.ones(4, 3, 3, dtype=torch.float64)
    forces[2, 1, 0] = 100.0
    frames = Labelled(positions=forces, energies=forces[:, 0, 0], forces=forces, trajectory=torch.arange(4))
    kept, torn = distillation.whole(
        frames, limit=3 * distillation.largest_force(frames.where(torch.tensor([True, True, False, True])))
    )
    assert torn == 1
    assert kept.trajectory.tolist() == [0, 1, 3]


def test_the_worst_frame_of_every_stretch_is_kept():
    n = 12  # two trajectories, which alternate
    forces = torch.zeros(n, 3, 3, dtype=torch.float64)
    frames = Labelled(positions=forces, energies=torch.arange(n).double(), forces=forces, trajectory=torch.arange(n) % 2)
    error = torch.tensor([0.0, 5, 1, 0, 2, 1, 9, 0, 3, 1, 4, 7])
    kept = distillation.worst_of_stretches(frames, error, stretch=3)
    assert kept.energies.tolist() == [1.0, 4.0, 6.0, 11.0]
    assert len(distillation.worst_of_stretches(frames, error, stretch=1)) == n


def test_a_student_that_is_wrong_along_bonds_is_refused(tmp_path, alanine_folder, reference, teacher):
    with pytest.raises(NumericsError, match="max_bond_error") as error:
        run_distill(tmp_path, alanine_folder, reference, rounds=0, max_bond_error=1e-3)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "distill").exists()


def test_killed_jobs_continue_bitwise(tmp_path, alanine_folder, reference, teacher):
    whole = run_distill(tmp_path, alanine_folder, reference, "whole")
    calls = teacher.calls
    teacher.calls, teacher.dies_at = 0, calls // 2
    with pytest.raises(Kill):
        run_distill(tmp_path, alanine_folder, reference, "parts")
    teacher.dies_at = None
    parts = run_distill(tmp_path, alanine_folder, reference, "parts")
    for key, value in read_arrays(whole / "student.safetensors")[0].items():
        assert np.array_equal(value, read_arrays(parts / "student.safetensors")[0][key]), key
    whole_samples = run_mts(tmp_path, alanine_folder, reference, whole, name="mts-whole")
    teacher.calls, teacher.dies_at = 0, 28
    with pytest.raises(Kill):
        run_mts(tmp_path, alanine_folder, reference, whole, name="mts-parts")
    teacher.dies_at = None
    parts_samples = run_mts(tmp_path, alanine_folder, reference, whole, name="mts-parts")
    expected = read_arrays(whole_samples / "samples.safetensors")[0]
    for key, value in read_arrays(parts_samples / "samples.safetensors")[0].items():
        assert np.array_equal(value, expected[key]), key


def test_failing_teacher_stops_with_one_line_and_a_restart_is_possible(tmp_path, alanine_folder, reference, teacher):
    distilled = run_distill(tmp_path, alanine_folder, reference)
    teacher.calls, teacher.nan_at = 0, 30
    with pytest.raises(
        NumericsError, match=r"potential energy is not finite .*\(replica 0\); use a shorter outer_timestep_fs"
    ) as error:
        run_mts(tmp_path, alanine_folder, reference, distilled)
    assert "\n" not in str(error.value)
    assert "hydrogens of 1.008 Da allow about 3 fs) or heavier hydrogens (hydrogen_mass_Da)" in str(error.value)
    assert not (tmp_path / "mts" / "manifest.json").exists()
    before = teacher.calls
    run_mts(tmp_path, alanine_folder, reference, distilled)
    assert teacher.calls - before < 30  # continued from the last good state
