"""The students of the package: who may use them, and that they imitate their teachers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import longstride
from longstride.config import DistillConfig
from longstride.data.manifest import read_manifest, write_manifest
from longstride.errors import LongstrideError
from longstride.potentials.shipped_students import environments, shipped_student, shipped_students
from longstride.potentials.student import load_student
from longstride.potentials.xtb import XTBPotential
from longstride.stages import distill
from longstride.state import State
from longstride.systems import prepare_sequence
from molecules import PHYSICS


def test_kinds_of_atoms_are_elements_with_their_bonded_elements(alanine):
    assert environments(alanine.system) == [
        "C(C,C,H,N)", "C(C,H,H,H)", "C(C,N,O)", "C(H,H,H,N)", "H(C)", "H(N)", "N(C,C,H)", "O(C)",
    ]  # fmt: skip


@pytest.mark.parametrize("path", shipped_students(), ids=lambda path: path.parent.name)
def test_every_student_is_small_and_has_a_card_with_its_errors(path):
    folder = path.parent
    manifest = read_manifest(folder, kind="distill")
    network = load_student(path, teacher=manifest["teacher"])
    assert path.stat().st_size < 5e6
    assert network.metadata.cutoff_nm == pytest.approx(0.35)
    card = (folder / "README.md").read_text()
    assert f"{100 * manifest['force_relative']:.1f} %" in card
    assert f"{100 * manifest['bond_relative']:.1f} %" in card
    assert "snakemake --configfile" in card


def test_the_student_of_alanine_imitates_xtb_on_new_frames(alanine):
    path = shipped_student(alanine.system, teacher="gfn2-xtb")
    student = load_student(path)(alanine.system)
    noise = torch.randn(6, 22, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    x = State(positions=torch.from_numpy(alanine.positions) + 0.004 * noise)
    with XTBPotential(alanine.system) as teacher:
        truth = teacher.energy_forces(x)[1]
    found = student.energy_forces(x)[1]
    assert float((found - truth).norm() / truth.norm()) < 0.06
    # negative control: frames that belong to the atoms in another order are no such frames
    order = np.arange(22)[::-1].copy()
    assert float((student.energy_forces(State(positions=x.positions[:, order]))[1] - truth).norm() / truth.norm()) > 1


def test_other_kinds_of_atoms_and_other_teachers_are_refused(alanine):
    serine = prepare_sequence("ACE-SER-NME", name="serine", **PHYSICS)
    with pytest.raises(LongstrideError, match="kinds of atoms of 'serine'"):
        shipped_student(serine.system, teacher="gfn2-xtb")
    with pytest.raises(LongstrideError, match="no student of gfn1-xtb"):
        shipped_student(alanine.system, teacher="gfn1-xtb")


def test_the_stage_copies_the_student_and_says_so(alanine_folder, tmp_path, capsys):
    reference = tmp_path / "reference"
    reference.mkdir()
    write_manifest(reference, kind="reference", files=[], content={"temperature_K": 310.0})
    folders = {"prepared": alanine_folder, "reference": reference, "out": tmp_path / "out", "state": tmp_path / "state"}
    distill.run(DistillConfig(shipped=True), **folders, seed=1, threads=1)
    found = read_manifest(tmp_path / "out", kind="distill")
    assert found["shipped"] == "alanine-gfn2-xtb"
    shipped = Path(longstride.__file__).parent / "weights" / "students" / "alanine-gfn2-xtb"
    assert (tmp_path / "out" / "student.safetensors").read_bytes() == (shipped / "student.safetensors").read_bytes()
    assert found["force_rmse"] == json.loads((shipped / "manifest.json").read_text())["force_rmse"]
    assert "of the package" in capsys.readouterr().out
