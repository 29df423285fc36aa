"""Stage `distill`: teacher labels, then a student of short range that reproduces its forces."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import openmm
import pandas as pd
import torch
from openmm import unit

from longstride.data.atomic import atomic_path, write_text
from longstride.data.checkpoint import fingerprint, open_state
from longstride.data.frames import read_trajectories
from longstride.data.manifest import read_manifest, write_manifest
from longstride.errors import LongstrideError
from longstride.fingerprints import code_version
from longstride.potentials.shipped_students import shipped_student
from longstride.potentials.student import StudentMetadata, StudentNetwork, save_student
from longstride.potentials.teachers import TeacherSpec, open_teacher
from longstride.progress import Progress
from longstride.provenance import provenance
from longstride.seeds import job_seed
from longstride.systems import load_prepared
from longstride.training.distill import measure, train
from longstride.training.labels import Labelled, LabelPlan, label_frames
from longstride.units import thermal_energy

if TYPE_CHECKING:
    from pathlib import Path

    from longstride.config import DistillConfig
    from longstride.systems import Prepared

HELD_OUT = 0.25  # of the reference trajectories


def run(section: DistillConfig, *, prepared: Path, reference: Path, out: Path, state: Path, seed: int, threads: int) -> None:
    """Write `student.safetensors`, `metrics.csv` and the manifest; continue from `state` where an earlier attempt stopped.

    Raises:
        LongstrideError: the teacher cannot treat the molecule, or there is only one reference trajectory.
        NumericsError: the teacher failed on many frames, or training diverged.
    """
    # batches are small: two threads gain little on an idle machine, lose much on a busy one, and change last digits
    torch.set_num_threads(1)
    molecule = load_prepared(prepared)
    source = read_manifest(reference, kind="reference")
    charge = total_charge(molecule)
    spec = TeacherSpec.of(section)
    target = spec.label_for(molecule)
    if section.shipped:
        _copy_shipped(molecule, target, out)
        return
    common = (molecule.system_hash, target, spec.options, charge, source["files"], seed, code_version("distill"))
    plan = LabelPlan.of(section.frames)
    label_key = fingerprint("labels", *common, asdict(plan), source["temperature_K"])
    train_key = fingerprint("training", *common, source["temperature_K"], section.model_dump())
    with open_state(state / "labels", label_key) as labels, open_state(state / "training", train_key) as training:
        began = time.perf_counter()
        positions = [item["positions"] for item in read_trajectories(reference, fields=("positions",))]
        with open_teacher(spec, molecule, charge=charge, threads=threads) as teacher:
            kT, progress = thermal_energy(source["temperature_K"]), Progress(f"labels of {target}", plan.total, "frames")
            label_seed = job_seed(seed, "labels")
            frames = label_frames(
                teacher, positions, plan=plan, kT=kT, seed=label_seed, store=labels, box=molecule.box, progress=progress
            )
        label_s = time.perf_counter() - began
        kept, held_out = split(frames, len(positions))
        network = StudentNetwork(_metadata(section, molecule, target), torch.Generator().manual_seed(job_seed(seed, "weights")))
        student = network.bind(molecule.system, periodic=molecule.box is not None)
        began = time.perf_counter()
        rows = train(
            network,
            student,
            kept,
            held_out,
            section=section,
            seed=job_seed(seed, "batches"),
            store=training,
            progress=Progress("distillation", section.max_steps, "steps"),
        )
        train_s = time.perf_counter() - began
        quality = asdict(measure(network, student, held_out))
        content = {
            "system": molecule.system.name,
            "system_hash": molecule.system_hash,
            "teacher": target,
            "charge": charge,
            "cutoff_nm": section.cutoff_nm,
            "temperature_K": source["temperature_K"],
            "frames": {"train": len(kept), "held_out": len(held_out), "teacher_calls": plan.total},
            "units": {"force_rmse": "kJ/mol/nm", "energy_mae": "kJ/mol"},
            **quality,
            "timing": {"label_s": label_s, "label_threads": threads, "train_s": train_s, "train_threads": 1},
        }
        _write(out, network, rows, content)
        labels.clear()
        training.clear()
    print(
        f"distill: force error {quality['force_rmse']:.1f} kJ/mol/nm ({100 * quality['force_relative']:.1f} %), along bonds"
        f" {100 * quality['bond_relative']:.1f} %, {len(frames)} labels in {label_s:.0f} s, training {train_s:.0f} s"
    )


def _copy_shipped(molecule: Prepared, target: str, out: Path) -> None:
    """Write what the stage writes, with the student of the package and its figures, which are of the system it learned from."""
    source = shipped_student(molecule.system, teacher=target).parent
    manifest = read_manifest(source, kind="distill")
    out.mkdir(parents=True, exist_ok=True)
    for name in ("student.safetensors", "metrics.csv"):
        with atomic_path(out / name) as temporary:
            shutil.copyfile(source / name, temporary)
    content = {key: value for key, value in manifest.items() if key not in ("kind", "files", "system", "system_hash")}
    content |= {"system": molecule.system.name, "system_hash": molecule.system_hash, "shipped": source.name}
    write_manifest(out, kind="distill", files=["student.safetensors", "metrics.csv"], content=content)
    print(f"distill: the student {source.name} of the package, force error {100 * manifest['force_relative']:.1f} %")


def total_charge(molecule: Prepared) -> int:
    """Return the total charge of the force field's atoms in elementary charges, a whole number.

    Raises:
        LongstrideError: the partial charges do not add up to a whole number.
    """
    for force in molecule.openmm_system.getForces():
        if isinstance(force, openmm.NonbondedForce):
            charges = [force.getParticleParameters(index)[0] for index in range(force.getNumParticles())]
            total = sum(charge.value_in_unit(unit.elementary_charge) for charge in charges)
            if abs(total - round(total)) > 0.01:
                raise LongstrideError(
                    f"the partial charges of {molecule.system.name!r} add up to {total:.3f}, not a whole number"
                )
            return round(total)
    return 0


def split(frames: Labelled, n_trajectories: int) -> tuple[Labelled, Labelled]:
    """Hold out the frames that descend from the last quarter of the reference trajectories.

    Raises:
        LongstrideError: there is only one trajectory.
    """
    if n_trajectories < 2:
        raise LongstrideError("distillation holds out whole trajectories and needs two or more; set reference.trajectories")
    held = frames.trajectory >= n_trajectories - max(1, round(HELD_OUT * n_trajectories))
    return frames.where(~held), frames.where(held)


def _metadata(section: DistillConfig, molecule: Prepared, target: str) -> StudentMetadata:
    return StudentMetadata(
        elements=tuple(sorted({int(number) for number in molecule.system.atomic_numbers})),
        teacher=target,
        cutoff_nm=section.cutoff_nm,
        radial=section.radial,
        channels=section.channels,
        hidden=section.hidden,
    )


def _write(out: Path, network: StudentNetwork, rows: list[dict[str, float]], content: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    save_student(out / "student.safetensors", network, content)
    write_text(out / "metrics.csv", pd.DataFrame(rows).to_csv(index=False))
    write_manifest(
        out,
        kind="distill",
        files=["student.safetensors", "metrics.csv"],
        content={**content, "architecture": asdict(network.metadata), "provenance": provenance()},
    )
