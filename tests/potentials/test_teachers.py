"""Teachers: chosen by plain values, labelled by what they are, refused by name before any work."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest
import torch
from conftest_potentials import distorted, molecule
from fennol_models import system

from contracts import check_potential
from longstride import runs
from longstride.config import DistillConfig, stage_view, validate
from longstride.errors import ConfigError, DataError, LongstrideError
from longstride.potentials.openmm import OpenMMPotential
from longstride.potentials.teachers import OPTIONS, TeacherSpec, open_teacher
from longstride.state import State

SEQUENCE = "ACE-ALA-NME"
# neither has a network's physics, but every element has parameters and forces are smooth within the cutoff
LENNARD_JONES = {"epsilon": 0.01, "sigma": 1.0, "rc": 30.0, "smooth": False}
LJ = TeacherSpec(kind="ase", calculator="ase.calculators.lj:LennardJones", options=LENNARD_JONES)


def test_every_kind_of_the_configuration_is_known():
    for kind in OPTIONS:
        calculator = "ase.calculators.lj:LennardJones" if kind == "ase" else None
        section = DistillConfig(teacher=kind, teacher_calculator=calculator)
        assert TeacherSpec.of(section).kind == kind


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "dft"}, "unknown teacher 'dft'; known: gfn2-xtb"),
        ({"kind": "gfn2-xtb", "weights": ("a.fnx",)}, "gfn2-xtb has no weight files"),
        ({"kind": "fennol", "model": "ani2x"}, "fennol has no named models"),
        ({"kind": "ase"}, "ase needs distill.teacher_calculator"),
        ({"kind": "mace", "calculator": "a:B"}, "mace has no distill.teacher_calculator"),
        ({"kind": "fennol", "options": {"dtpye": "float64"}}, "has no option 'dtpye' .*it has dtype"),
        ({"kind": "fennol", "options": {"dtype": "half"}}, "dtype is float32 or float64, not 'half'"),
    ],
)
def test_contradictory_settings_are_one_line(values, message):
    with pytest.raises(LongstrideError, match=message) as error:
        TeacherSpec(**values)
    assert "\n" not in str(error.value)


def test_labels_name_the_target(tmp_path):
    weights = tmp_path / "w.pt"
    weights.write_bytes(b"one")
    assert TeacherSpec(kind="gfn2-xtb").label == "gfn2-xtb"
    assert TeacherSpec(kind="torchani").label == TeacherSpec(kind="torchani", model="ani2x").label == "torchani-ani2x"
    assert TeacherSpec(kind="torchani", options={"member": 3}).label == "torchani-ani2x-m3"
    assert TeacherSpec(kind="mace", model="off23-small").label == "mace-off23-small"
    assert LJ.label.startswith("ase-ase.calculators.lj.LennardJones-")
    assert dataclasses.replace(LJ, options={**LENNARD_JONES, "sigma": 1.1}).label != LJ.label
    spec = TeacherSpec(kind="mace", weights=(str(weights),))
    first = spec.label
    weights.write_bytes(b"another")
    assert spec.label != first
    with pytest.raises(DataError, match=r"cannot read the weight file"):
        _ = TeacherSpec(kind="mace", weights=(str(tmp_path / "absent.model"),)).label


def test_weights_enter_job_keys_by_content(tmp_path):
    path = tmp_path / "w.fnx"
    path.write_bytes(b"one")
    config = validate({"distill": {"teacher": "fennol", "teacher_weights": [str(path)]}})
    stages = [("distill", None), ("sample", "mts"), ("sample", "sts")]
    before = [stage_view(config, stage, method=method) for stage, method in stages]
    others = stage_view(config, "sample", method="md")
    path.write_bytes(b"another")
    for (stage, method), view in zip(stages, before, strict=True):
        assert stage_view(config, stage, method=method) != view
    assert stage_view(config, "sample", method="md") == others
    path.unlink()
    with pytest.raises(ConfigError, match=r"distill.teacher_weights: cannot read .*w.fnx"):
        stage_view(config, "distill")


def test_missing_weights_end_a_run_before_its_first_job(tmp_path):
    values = {"distill": {"teacher": "fennol", "teacher_weights": [str(tmp_path / "absent.fnx")]}}
    with pytest.raises(ConfigError, match=r"distill.teacher_weights: cannot read .*absent.fnx"):
        runs.open_run(values, in_job=False)


def test_openmm_is_the_molecules_own_force_field():
    made = molecule(SEQUENCE)
    x = State(positions=distorted(SEQUENCE)[:2])
    spec = TeacherSpec(kind="openmm", options={"platform": "Reference"})
    expected = OpenMMPotential(made.openmm_system, made.system, name="x", platform="Reference").energy_forces(x)
    with open_teacher(spec, made) as teacher:
        assert teacher.name == made.target
        for found, value in zip(teacher.energy_forces(x), expected, strict=True):
            assert torch.equal(found, value)
    with pytest.raises(LongstrideError, match="only its atoms were given"), open_teacher(spec, made.system):
        pass


def test_xtb_opens_and_its_workers_end_with_the_block():
    with open_teacher(TeacherSpec(kind="gfn1-xtb"), molecule(SEQUENCE), threads=1) as teacher:
        assert teacher.name == "gfn1-xtb"
        processes = [worker._process for worker in teacher._workers]
        assert torch.isfinite(teacher.energy(State(positions=distorted(SEQUENCE)[:1]))).all()
    assert all(process.poll() is not None for process in processes)


def test_xtb_refuses_a_box():
    boxed = dataclasses.replace(molecule(SEQUENCE), box=2.0 * np.eye(3))
    with (
        pytest.raises(LongstrideError, match="gfn2-xtb treats isolated molecules, and 'ACE-ALA-NME' is in a periodic box"),
        open_teacher(TeacherSpec(kind="gfn2-xtb"), boxed),
    ):
        pass


def test_ase_calculators_fulfil_the_contract():
    first = slice(0, 6)  # the acetyl group: the calculator loops over atoms
    with open_teacher(LJ, system(tuple(molecule(SEQUENCE).system.atomic_numbers[first]))) as teacher:
        check_potential(teacher, distorted(SEQUENCE)[:3, first])


def test_ase_calculators_see_the_box():
    x = distorted(SEQUENCE)[:1]
    box = 3.0 * torch.eye(3, dtype=torch.float64)[None]
    spec = dataclasses.replace(LJ, options={**LENNARD_JONES, "rc": 8.0})
    with open_teacher(spec, molecule(SEQUENCE)) as teacher:
        wide, narrow = (teacher.energy(State(positions=x, box=scale * box)) for scale in (1.0, 0.3))
        isolated = teacher.energy(State(positions=x))
        moved = x.clone()
        moved[0, 3, 1] -= 3.0
        across = teacher.energy(State(positions=moved, box=box))
    torch.testing.assert_close(wide, isolated)
    torch.testing.assert_close(across, wide)
    assert abs(float(narrow - isolated)) > 1e-3


@pytest.mark.parametrize(
    ("calculator", "options", "message"),
    [
        ("no_such_package.calculators:Best", {}, "cannot import no_such_package.calculators"),
        ("ase.calculators.lj:Best", {}, "there is no Best in ase.calculators.lj"),
        ("fractions:Fraction", {"numerator": "half"}, "fractions:Fraction cannot be made .*half"),
    ],
)
def test_wrong_calculators_are_one_line(calculator, options, message):
    spec = TeacherSpec(kind="ase", calculator=calculator, options=options)
    with pytest.raises(LongstrideError, match=message) as error, open_teacher(spec, molecule(SEQUENCE)):
        pass
    assert "\n" not in str(error.value)


def test_ions_are_refused_by_calculators_that_ignore_the_charge():
    x = State(positions=distorted(SEQUENCE)[:1])
    with (
        open_teacher(LJ, molecule(SEQUENCE), charge=1) as teacher,
        pytest.raises(LongstrideError, match=r"net charge of \+1 and teacher ase-.* has no input for it"),
    ):
        teacher.energy(x)


@pytest.mark.parametrize(
    ("kind", "package"), [("torchani", "torchani"), ("mace", "mace"), ("aimnet2", "aimnet"), ("fennol", "fennol")]
)
def test_a_missing_package_names_the_extra(kind, package, monkeypatch, tmp_path):
    names = [name for name in sys.modules if name == package or name.startswith(f"{package}.")]
    for name in [package, *names]:
        monkeypatch.setitem(sys.modules, name, None)
    weights = tmp_path / "w.fnx"
    weights.write_bytes(b"any")
    spec = TeacherSpec(kind=kind, weights=(str(weights),) if kind == "fennol" else ())
    extra = rf"pip install 'longstride\[{package}\]'"
    with pytest.raises(LongstrideError, match=extra) as error, open_teacher(spec, molecule(SEQUENCE)):
        pass
    assert "\n" not in str(error.value)
