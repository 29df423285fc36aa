"""Stage `distill`: teacher labels, then a student of short range that reproduces its forces."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from longstride.data.atomic import atomic_path, write_text
from longstride.data.checkpoint import fingerprint, open_state
from longstride.data.frames import read_trajectories
from longstride.data.manifest import read_manifest, write_manifest
from longstride.errors import LongstrideError, NumericsError
from longstride.fingerprints import code_version
from longstride.potentials.shipped_students import environments, shipped_student
from longstride.potentials.student import StudentMetadata, StudentNetwork, save_student
from longstride.potentials.teachers import TeacherSpec, open_teacher
from longstride.progress import Progress
from longstride.provenance import provenance
from longstride.seeds import job_seed
from longstride.systems import load_prepared
from longstride.training.distill import hessian_error, largest_errors, measure, train
from longstride.training.labels import Labelled, LabelPlan, ends, label_frames
from longstride.units import thermal_energy

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from longstride.config import DistillConfig
    from longstride.potentials.base import Potential
    from longstride.potentials.student import AnyStudent
    from longstride.systems import Prepared

HELD_OUT = 0.25  # of the reference trajectories
TORN = 3.0  # a molecule with a force that many times larger than any before was torn apart, and teaches nothing


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
    spec = TeacherSpec.of(section)
    target = spec.label_for(molecule)
    if section.shipped:
        _copy_shipped(molecule, target, out)
        return
    positions = [item["positions"] for item in read_trajectories(reference, fields=("positions",))]
    common = (molecule.system_hash, target, spec.options, molecule.charge, source["files"], source["temperature_K"], seed)
    labelling = (section.frames, section.label_stride, section.label_heat)
    work = _Work(
        section=section,
        molecule=molecule,
        trajectories=positions,
        kT=thermal_energy(source["temperature_K"]),
        seed=seed,
        state=state,
        key=fingerprint("distill", *common, section.model_dump(), code_version("distill")),
        label_key=fingerprint("labels", *common, *labelling, code_version("distill")),
    )
    network = StudentNetwork(_metadata(section, molecule, target), torch.Generator().manual_seed(job_seed(seed, "weights")))
    with open_teacher(spec, molecule, charge=molecule.charge, threads=threads) as teacher:
        result = work.distil(network, teacher)
    content = {
        "system": molecule.system.name,
        "system_hash": molecule.system_hash,
        "teacher": target,
        "charge": molecule.charge,
        "environments": environments(molecule.system),
        "cutoff_nm": section.cutoff_nm,
        "temperature_K": source["temperature_K"],
        "units": {"force_rmse": "kJ/mol/nm", "energy_mae": "kJ/mol"},
        **result.content,
        "timing": {**result.timing, "label_threads": threads, "train_threads": 1},
    }
    _check_quality(content, section)
    _write(out, network, result.rows, content)
    work.clear()
    print(
        f"distill: force error {content['force_rmse']:.1f} kJ/mol/nm ({100 * content['force_relative']:.1f} %), along bonds"
        f" {100 * content['bond_relative']:.1f} %, of Hessian-vector products {100 * content['hessian_relative']:.1f} %;"
        f" {content['frames']['teacher_calls']} labels in {result.timing['label_s']:.0f} s, training"
        f" {result.timing['train_s']:.0f} s; {content['rounds'][-1]['holes'] if content['rounds'] else 'unknown'} holes left"
    )


@dataclass(frozen=True, kw_only=True)
class _Result:
    rows: list[dict[str, float]]
    content: dict[str, Any]
    timing: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class _Work:
    """Labels and training in turn; every part has a state folder of its own, so that nothing is done twice."""

    section: DistillConfig
    molecule: Prepared
    trajectories: list[np.ndarray]
    kT: float
    seed: int
    state: Path
    key: str
    label_key: str

    def distil(self, network: StudentNetwork, teacher: Potential) -> _Result:
        """Fit `network` in place: to the first frames, then to those that its own dynamics adds, round after round."""
        timing = {"label_s": 0.0, "train_s": 0.0}
        plan = replace(LabelPlan.of(self.section.frames), stride=self.section.label_stride, heat=self.section.label_heat)
        plan = plan.limited(sum(len(part) for part in self.trajectories))
        frames, starts = self._label(teacher, plan, folder="labels", timing=timing)
        calls, rows, rounds = plan.total, [], []
        for index in range(self.section.rounds + 1):
            kept, held_out = split(frames, len(self.trajectories))
            rows += self._train(network, kept, held_out, index=index, timing=timing)
            if index == self.section.rounds:
                break
            plan = self._driven_plan(starts)
            student = self._student(network)
            more, starts = self._label(teacher, plan, folder=f"driven_{index}", timing=timing, fast=student, starts=starts)
            more, torn = whole(more, limit=TORN * largest_force(frames))
            error = largest_errors(student, more)
            holes = int((error > self.section.hole_kJ_per_mol_nm).sum()) + torn
            rounds.append({"frames": len(more), "holes": holes, "torn": torn, "largest_error": float(error.max())})
            calls += plan.total
            if holes == 0:
                break
            # neighbours in time are alike: what is worst of each stretch teaches most
            frames = frames.and_also(worst_of_stretches(more, error, stretch=self.section.round_stride))
        student = self._student(network)
        content = {
            "frames": {"train": len(kept), "held_out": len(held_out), "teacher_calls": calls},
            "rounds": rounds,
            **asdict(measure(student, held_out)),
            "hessian_relative": hessian_error(teacher, student, held_out, seed=job_seed(self.seed, "directions")),
        }
        return _Result(rows=rows, content=content, timing=timing)

    def _driven_plan(self, starts: np.ndarray) -> LabelPlan:
        chains = len(starts)
        steps = max(1, round(self.section.round_frames * self.section.round_stride / chains) - 1)
        section = self.section
        return LabelPlan(reference=0, chains=chains, steps=steps, heat=section.label_heat, hole=section.hole_kJ_per_mol_nm)

    def _student(self, network: StudentNetwork) -> AnyStudent:
        return network.bind(self.molecule.system, periodic=self.molecule.box is not None)

    def _label(
        self,
        teacher: Potential,
        plan: LabelPlan,
        *,
        folder: str,
        timing: dict[str, float],
        fast: Potential | None = None,
        starts: np.ndarray | None = None,
    ) -> tuple[Labelled, np.ndarray]:
        """Return the labels, and where the chains stand after them: the next ones go on there, ever farther from the start."""
        began = time.perf_counter()
        key = self.label_key if fast is None else self.key
        with open_state(self.state / folder, key) as store:
            frames = label_frames(
                teacher,
                self.trajectories,
                plan=plan,
                kT=self.kT,
                seed=job_seed(self.seed, folder),
                store=store,
                box=self.molecule.box,
                fast=fast,
                starts=starts,
                progress=Progress(f"{folder} of {teacher.name}", plan.total, "frames"),
            )
            stand = ends(store)
        timing["label_s"] += time.perf_counter() - began
        assert stand is not None
        return frames, stand

    def _train(
        self, network: StudentNetwork, kept: Labelled, held_out: Labelled, *, index: int, timing: dict[str, float]
    ) -> list[dict[str, float]]:
        began = time.perf_counter()
        steps = self.section.max_steps if index == 0 else self.section.round_steps
        with open_state(self.state / f"training_{index}", self.key) as store:
            rows = train(
                network,
                self._student(network),
                kept,
                held_out,
                section=self.section,
                steps=steps,
                seed=job_seed(self.seed, "batches", index),
                store=store,
                progress=Progress("distillation", steps, "steps"),
            )
        timing["train_s"] += time.perf_counter() - began
        return [{"round": index, **row} for row in rows]

    def clear(self) -> None:
        """Remove the state folders of finished work."""
        for index in range(self.section.rounds + 1):
            for folder in ("labels", f"driven_{index}", f"training_{index}"):
                if (self.state / folder).is_dir():
                    with open_state(self.state / folder, self.label_key if folder == "labels" else self.key) as store:
                        store.clear()


def largest_force(frames: Labelled) -> float:
    """Return the largest teacher force on any atom of any frame, kJ/mol/nm."""
    return float(frames.forces.norm(dim=2).max())


def whole(frames: Labelled, *, limit: float) -> tuple[Labelled, int]:
    """Return the frames without a teacher force above `limit`, and the number of the others."""
    keep = frames.forces.norm(dim=2).amax(dim=1) <= limit
    return frames.where(keep), int((~keep).sum())


def worst_of_stretches(frames: Labelled, error: torch.Tensor, *, stretch: int) -> Labelled:
    """Return, of every `stretch` frames in a row of one trajectory, that with the largest error.

    Args:
        frames: in the order of time; those of one trajectory alternate with others.
        error: [frame].
        stretch: 1 keeps all.
    """
    chosen = []
    for trajectory in frames.trajectory.unique():
        own = (frames.trajectory == trajectory).nonzero()[:, 0]
        chosen += [part[error[part].argmax()] for part in own.split(stretch)]
    keep = torch.zeros(len(frames), dtype=torch.bool)
    keep[torch.stack(chosen)] = True
    return frames.where(keep)


def _check_quality(content: dict[str, Any], section: DistillConfig) -> None:
    """Refuse a student whose errors of stiff modes would make multi-time-step dynamics resonate."""
    if content["bond_relative"] > section.max_bond_error:
        raise NumericsError(
            f"the student's force along bonds is wrong by {100 * content['bond_relative']:.1f} %, more than"
            f" distill.max_bond_error ({100 * section.max_bond_error:g} %); distil with more max_steps, frames or channels"
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
