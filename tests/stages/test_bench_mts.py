"""The benchmarks of multi-time-step dynamics and of the student: schemes, counting of calls, what a gain is a ratio of."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from longstride.errors import DataError, LongstrideError
from longstride.potentials.shipped_students import shipped_student
from longstride.potentials.student import StudentMetadata, StudentNetwork, save_student
from longstride.potentials.teachers import TeacherSpec
from longstride.stages import bench_mts, bench_student
from longstride.stages.bench_mts import Scheme


def test_schemes_are_read_as_written():
    assert Scheme.parse("4x1") == Scheme(n_inner=4, inner_fs=1.0)
    assert Scheme.parse("3x2@3.024") == Scheme(n_inner=3, inner_fs=2.0, hydrogen_mass_Da=3.024)
    assert Scheme.parse("3x2@3.024").name == "3 x 2 fs, H 3.024 Da"
    for text in ("4", "4x", "x1", "0x1", "4x0", "4x1@heavy", "4x-1"):
        with pytest.raises(LongstrideError, match="scheme"):
            Scheme.parse(text)


def test_gains_are_ratios_of_simulated_time():
    # a teacher of 10 ms, a student of 0.5 ms; steps cost just their calls
    per_core = {"teacher": [100.0], "student": [2000.0], "single step": [100.0]}
    scheme = Scheme(n_inner=4, inner_fs=1.0)
    per_core[scheme.name] = [1 / (0.010 + 4 * 0.0005)]
    row = bench_mts._row(scheme, 2.0, per_core, 4)
    assert row["gain_over_1_fs"] == pytest.approx(4 / 1.2)
    assert row["gain_by_counting_calls"] == pytest.approx(4 / (1 + 4 * 0.05))
    assert row["gain_over_longest_single_step"] == pytest.approx(2 / 1.2)
    assert row["replica_ps_per_s"] == pytest.approx(4 * 4e-3 / 0.012)


@pytest.fixture(scope="module")
def settings(alanine, tmp_path_factory):
    path = tmp_path_factory.mktemp("student") / "student.safetensors"
    metadata = StudentMetadata(elements=(1, 6, 7, 8), teacher=alanine.target, channels=2, hidden=8)
    save_student(path, StudentNetwork(metadata, torch.Generator().manual_seed(0)))
    return bench_mts.Settings(
        teacher=TeacherSpec(kind="openmm"), student=path, schemes=(Scheme(n_inner=2, inner_fs=0.5),), rounds=2, window_s=0.01
    )


def test_everything_is_timed_in_one_process(alanine, settings):
    found = bench_mts._measure(alanine, settings, 0)
    assert found["replicas"] == 4
    assert set(found["rates"]) == {"teacher", "student", "single step", "2 x 0.5 fs, H 1.008 Da"}
    for rates in found["rates"].values():
        assert len(rates) == 2
        assert min(rates) > 0


def test_the_longest_single_step_ends_where_bonds_diverge(alanine, settings, monkeypatch):
    # springs of 3 000 1/cm on hydrogens stand for the student: dt < 2 / omega = T / pi = 3.5 fs
    class Springs:
        name, system = "springs", alanine.system

        def energy_forces(self, x):
            shift = x.positions - torch.from_numpy(alanine.positions)
            k = torch.from_numpy(alanine.system.masses)[:, None] * (2 * np.pi * 3000 * 2.99792458e-2) ** 2
            return 0.5 * (k * shift.square()).sum((1, 2)), -k * shift

    monkeypatch.setattr(bench_mts, "_student", lambda *_: Springs())
    longest = bench_mts.longest_single_step(alanine, settings, None)
    assert 2.5 <= longest <= 3.5


def test_a_student_of_another_teacher_is_refused(alanine, settings):
    with pytest.raises(DataError, match="was distilled from"):
        bench_mts.mts(alanine, dataclasses.replace(settings, teacher=TeacherSpec(kind="gfn2-xtb")))


def test_no_student_of_the_package_is_one_line(alanine):
    with pytest.raises(LongstrideError, match="comes with the package") as error:
        shipped_student(alanine.system, teacher="nobody")
    assert "\n" not in str(error.value)


def test_water_of_the_benchmark_has_the_density_of_water():
    system, positions, box = bench_student.water_lattice(4)
    assert system.n_atoms == positions.shape[1] == 192
    density = system.masses.sum() / 602.214076 / float(torch.linalg.det(box[0]))
    assert density == pytest.approx(0.997, abs=1e-3)
    bonds = torch.from_numpy(system.bonds)
    lengths = (positions[0, bonds[:, 0]] - positions[0, bonds[:, 1]]).norm(dim=1)
    assert torch.allclose(lengths, torch.full_like(lengths, 0.0957), atol=1e-3)


def test_cost_of_the_student_is_measured_by_size(monkeypatch):
    monkeypatch.setattr(bench_student, "compiler_available", lambda: False)
    result = bench_student.student(
        bench_student.Settings(edges=(6, 7), channels=2, radial=2, hidden=8, rounds=1, window_s=0.01)
    )
    assert [row["atoms"] for row in result["sizes"]] == [22, 648, 1029]
    assert result["exponent"] is not None
    assert "atoms^" in bench_student.table(result)
