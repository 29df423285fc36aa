"""Stages `distill` and `distill-family`: teacher labels, then a student of short range that reproduces its forces.

`distill` makes a student of one system: from nothing, from the student of a family, or the one that comes with the package.
`distill-family` makes one student of several systems; it serves each of them, and other molecules of the same kinds of atoms.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from longstride.data.atomic import atomic_path, write_text
from longstride.data.checkpoint import fingerprint
from longstride.data.frames import read_trajectories
from longstride.data.manifest import read_manifest, write_manifest
from longstride.errors import LongstrideError, NumericsError
from longstride.fingerprints import code_version
from longstride.potentials.shipped_students import environments, shipped_student
from longstride.potentials.student import StudentMetadata, StudentNetwork, load_student, save_student
from longstride.potentials.teachers import TeacherSpec
from longstride.provenance import provenance
from longstride.seeds import job_seed
from longstride.stages.distill_card import card
from longstride.systems import load_prepared
from longstride.training.distillation import Distillation, Distilled, Member
from longstride.units import thermal_energy

if TYPE_CHECKING:
    from pathlib import Path

    from longstride.config import DistillConfig
    from longstride.systems import Prepared

FILES = ("student.safetensors", "metrics.csv", "README.md")
QUALITY = ("force_rmse", "force_relative", "bond_relative", "stiffness_rms", "stiffness_max", "energy_mae", "hessian_relative")


def run(
    section: DistillConfig,
    *,
    prepared: Path,
    reference: Path,
    out: Path,
    state: Path,
    seed: int,
    threads: int,
    family: Path | None = None,
) -> None:
    """Write `student.safetensors`, `metrics.csv`, `README.md` (its card) and the manifest; continue from `state`.

    Args:
        section: settings.
        prepared: folder of the prepare stage.
        reference: folder of the reference stage.
        out: folder to write.
        state: folder for checkpoints.
        seed: of weights, chains and batches.
        threads: cores of the teacher.
        family: folder of a student of several systems to start from (stage distill-family).

    Raises:
        LongstrideError: the teacher cannot treat the molecule, there is only one reference trajectory, or the family has
            another teacher or lacks an element.
        NumericsError: the teacher failed on many frames, training diverged, or the student is too bad.
    """
    molecule = load_prepared(prepared)
    target = TeacherSpec.of(section).label_for(molecule)
    if section.shipped:
        source = shipped_student(molecule.system, teacher=target).parent
        _copy(source, read_manifest(source, kind="distill"), molecule, out, origin={"shipped": source.name})
        return
    begun = None if family is None else _family_manifest(family, molecule, target)
    if begun is not None and section.fine_tune_steps == 0:
        assert family is not None
        members = begun["members"]
        own = {**begun, **members.get(molecule.system.name, {})}
        _copy(family, own, molecule, out, origin={"family": sorted(members)})
        return
    member = _member(section, molecule, reference, state=state, seed=seed, threads=threads)
    if family is None:
        network = StudentNetwork(
            _metadata(section, [molecule], target), torch.Generator().manual_seed(job_seed(seed, "weights"))
        )
    else:
        network = load_student(family / FILES[0], teacher=target)
    work = _distillation(section, [member], state=state, seed=seed, start=None if begun is None else begun["files"])
    extra = {} if begun is None else {"family": sorted(begun["members"])}
    _finish(work, network, section, {"system": molecule.system.name, "system_hash": molecule.system_hash, **extra}, out=out)


def run_family(
    section: DistillConfig,
    *,
    prepared: list[Path],
    reference: list[Path],
    out: Path,
    state: Path,
    seed: int,
    threads: int,
) -> None:
    """Write one student of several systems, as `run` does of one; `members` of the manifest holds the errors of each.

    Args:
        section: settings.
        prepared: folders of the prepare stage.
        reference: folders of the reference stage, in the same order.
        out: folder to write.
        state: folder for checkpoints.
        seed: of weights, chains and batches.
        threads: cores of the teacher.

    Raises:
        LongstrideError: as `run`, or the systems are at different temperatures, or two have one name.
        NumericsError: as `run`.
    """
    molecules = [load_prepared(folder) for folder in prepared]
    names = [molecule.system.name for molecule in molecules]
    if len(set(names)) < len(names) or len(reference) != len(prepared):
        raise LongstrideError("distill-family needs the folders of systems with different names, prepare and reference of each")
    targets = {TeacherSpec.of(section).label_for(molecule) for molecule in molecules}
    if len(targets) > 1:
        raise LongstrideError(
            f"one student cannot imitate {len(targets)} potentials; teacher {section.teacher} is another one for each system"
        )
    members = [
        _member(section, molecule, folder, state=state / name, seed=job_seed(seed, name), threads=threads)
        for molecule, folder, name in zip(molecules, reference, names, strict=True)
    ]
    if len({member.kT for member in members}) > 1:
        raise LongstrideError("the systems of a family were simulated at different temperatures; use one")
    metadata = _metadata(section, molecules, targets.pop())
    network = StudentNetwork(metadata, torch.Generator().manual_seed(job_seed(seed, "weights")))
    _finish(_distillation(section, members, state=state, seed=seed), network, section, {"systems": names}, out=out)


def _member(section: DistillConfig, molecule: Prepared, reference: Path, *, state: Path, seed: int, threads: int) -> Member:
    source = read_manifest(reference, kind="reference")
    spec = TeacherSpec.of(section)
    target = spec.label_for(molecule)
    common = (molecule.system_hash, target, spec.options, molecule.charge, source["files"], source["temperature_K"], seed)
    labelling = (section.frames, section.label_stride, section.label_heat)
    return Member(
        molecule=molecule,
        trajectories=[item["positions"] for item in read_trajectories(reference, fields=("positions",))],
        kT=thermal_energy(source["temperature_K"]),
        teacher=spec,
        threads=threads,
        seed=seed,
        state=state,
        key=fingerprint("distill", *common, section.model_dump(), code_version("distill")),
        label_key=fingerprint("labels", *common, *labelling, code_version("distill")),
    )


def _distillation(
    section: DistillConfig, members: list[Member], *, state: Path, seed: int, start: dict[str, Any] | None = None
) -> Distillation:
    # batches are small: two threads gain little on an idle machine, lose much on a busy one, and change last digits
    torch.set_num_threads(1)
    keys = [member.key for member in members]
    steps = section.max_steps if start is None else section.fine_tune_steps
    return Distillation(
        members=members, section=section, steps=steps, seed=seed, state=state, key=fingerprint("training", *keys, start)
    )


def _finish(
    work: Distillation, network: StudentNetwork, section: DistillConfig, identity: dict[str, Any], *, out: Path
) -> None:
    """Run the work, refuse a bad student, write the folder."""
    result = work.run(network)
    first = work.members[0]
    content = {
        **identity,
        "teacher": network.metadata.teacher,
        "charge": first.molecule.charge if len(work.members) == 1 else None,
        "environments": sorted({kind for member in work.members for kind in environments(member.molecule.system)}),
        "cutoff_nm": network.metadata.cutoff_nm,
        "temperature_K": read_temperature(first),
        "units": {"force_rmse": "kJ/mol/nm", "energy_mae": "kJ/mol"},
        "rounds": result.rounds,
        **_summary(result),
        "members": result.members,
        "labels": {"stride": section.label_stride, "heat": list(section.label_heat)},
        "timing": {**result.timing, "label_threads": first.threads, "train_threads": 1},
    }
    _check_quality(content, section)
    _write(out, network, result.rows, content)
    work.clear()
    print(_sentence(content))


def read_temperature(member: Member) -> float:
    """Return the temperature of a member in K."""
    return member.kT / thermal_energy(1.0)


def _summary(result: Distilled) -> dict[str, Any]:
    """Return numbers of frames added over members, and errors: those of the only one, or means over all."""
    found = list(result.members.values())
    frames = {name: sum(one["frames"][name] for one in found) for name in found[0]["frames"]}
    quality = {name: float(np.mean([one[name] for one in found])) for name in QUALITY}
    return {"frames": frames, **quality, "stiffness_max": max(one["stiffness_max"] for one in found)}


def _sentence(content: dict[str, Any]) -> str:
    holes = content["rounds"][-1]["holes"] if content["rounds"] else "unknown"
    return (
        f"distill: force error {content['force_rmse']:.1f} kJ/mol/nm ({100 * content['force_relative']:.1f} %), along bonds"
        f" {100 * content['bond_relative']:.1f} %, of Hessian-vector products {100 * content['hessian_relative']:.1f} %;"
        f" {content['frames']['teacher_calls']} labels in {content['timing']['label_s']:.0f} s, training"
        f" {content['timing']['train_s']:.0f} s; {holes} holes left"
    )


def _check_quality(content: dict[str, Any], section: DistillConfig) -> None:
    """Refuse a student whose errors of stiff modes would make multi-time-step dynamics resonate."""
    name, worst = max(content["members"].items(), key=lambda item: item[1]["bond_relative"])
    if worst["bond_relative"] > section.max_bond_error:
        raise NumericsError(
            f"the student's force along bonds of {name} is wrong by {100 * worst['bond_relative']:.1f} %, more than"
            f" distill.max_bond_error ({100 * section.max_bond_error:g} %); distil with more max_steps, frames or channels"
        )


def _family_manifest(family: Path, molecule: Prepared, target: str) -> dict[str, Any]:
    """Return the manifest of a family's student, which must know the molecule's kinds of atoms."""
    found = read_manifest(family, kind="distill")
    if found["teacher"] != target:
        raise LongstrideError(f"the student in {family} imitates {found['teacher']}, not {target}; distil the family again")
    if unknown := sorted(set(environments(molecule.system)) - set(found["environments"])):
        raise LongstrideError(
            f"the student in {family} knows no atom like {unknown[0]} of {molecule.system.name!r}; distil a family that has it"
        )
    return found


def _copy(source: Path, manifest: dict[str, Any], molecule: Prepared, out: Path, *, origin: dict[str, Any]) -> None:
    """Write what the stage writes, with a student that exists and its figures, which are of the systems it learned from."""
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        with atomic_path(out / name) as temporary:
            shutil.copyfile(source / name, temporary)
    dropped = ("kind", "files", "system", "system_hash", "systems", "members")
    content = {key: value for key, value in manifest.items() if key not in dropped}
    content |= {"system": molecule.system.name, "system_hash": molecule.system_hash, **origin}
    write_manifest(out, kind="distill", files=list(FILES), content=content)
    shipped = origin.get("shipped")
    what = f"the student {shipped} of the package" if shipped else f"the student of {', '.join(origin['family'])}"
    print(f"distill: {what}, force error {100 * manifest['force_relative']:.1f} %")


def _metadata(section: DistillConfig, molecules: list[Prepared], target: str) -> StudentMetadata:
    return StudentMetadata(
        elements=tuple(sorted({int(number) for molecule in molecules for number in molecule.system.atomic_numbers})),
        teacher=target,
        cutoff_nm=section.cutoff_nm,
        radial=section.radial,
        channels=section.channels,
        hidden=section.hidden,
    )


def _write(out: Path, network: StudentNetwork, rows: list[dict[str, float]], content: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    content = {**content, "architecture": asdict(network.metadata)}
    save_student(out / "student.safetensors", network, content)
    write_text(out / "metrics.csv", pd.DataFrame(rows).to_csv(index=False))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    write_text(out / "README.md", card(content, parameters=parameters, size_bytes=(out / "student.safetensors").stat().st_size))
    write_manifest(out, kind="distill", files=list(FILES), content={**content, "provenance": provenance()})
