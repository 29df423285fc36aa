"""Distillation from labels to a student without holes: label, train, drive, label what was met, train on, round after round.

One network may learn one molecule (a system-specific student) or many at once (a generic one, for a family). Every member
of a family has labels, driven dynamics and state folders of its own; training is joint.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from longstride.data.checkpoint import open_state
from longstride.errors import LongstrideError
from longstride.potentials.teachers import open_teacher
from longstride.progress import Progress
from longstride.seeds import job_seed
from longstride.training.distill import Quality, Task, hessian_error, largest_errors, measure, train
from longstride.training.labels import Labelled, LabelPlan, ends, label_frames

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from longstride.config import DistillConfig
    from longstride.potentials.base import Potential
    from longstride.potentials.student import AnyStudent, StudentNetwork
    from longstride.potentials.teachers import TeacherSpec
    from longstride.systems import Prepared

HELD_OUT = 0.25  # of the reference trajectories
TORN = 3.0  # a molecule with a force that many times larger than any before was torn apart, and teaches nothing


@dataclass(frozen=True, kw_only=True)
class Pool:
    """What is known of one molecule.

    Attributes:
        frames: all labels to train on and to look at.
        starts: [chain, atom, 3] nm, where the chains stand; the next ones go on there, ever farther from the start.
        first: labels that no student has driven.
        calls: teacher calls so far.
    """

    frames: Labelled
    starts: np.ndarray
    first: int
    calls: int


@dataclass(frozen=True, kw_only=True)
class Member:
    """One molecule of a distillation, with its teacher; every part of its work has a state folder, so nothing is done twice.

    Attributes:
        molecule: the prepared system.
        trajectories: reference positions, [frame, atom, 3] nm, one array each.
        kT: thermal energy, kJ/mol.
        teacher: which teacher.
        threads: cores of the teacher.
        seed: of its chains.
        state: its folder for checkpoints.
        key: what its driven labels depend on.
        label_key: what its first labels depend on.
    """

    molecule: Prepared
    trajectories: list[np.ndarray]
    kT: float
    teacher: TeacherSpec
    threads: int
    seed: int
    state: Path
    key: str
    label_key: str

    def student(self, network: StudentNetwork) -> AnyStudent:
        """Return the network bound to the molecule."""
        return network.bind(self.molecule.system, periodic=self.molecule.box is not None)

    def first_labels(self, teacher: Potential, section: DistillConfig) -> Pool:
        """Return reference frames and Langevin chains on the teacher, labelled."""
        plan = replace(LabelPlan.of(section.frames), stride=section.label_stride, heat=section.label_heat)
        plan = plan.limited(sum(len(part) for part in self.trajectories))
        frames, stand = self._label(teacher, plan, folder="labels")
        return Pool(frames=frames, starts=stand, first=len(frames), calls=plan.total)

    def drive(self, teacher: Potential, network: StudentNetwork, pool: Pool, section: DistillConfig, *, index: int) -> Driven:
        """Return the pool and the frames to which dynamics with the student leads, and what was met there."""
        chains = len(pool.starts)
        steps = max(1, round(section.round_frames * section.round_stride / chains) - 1)
        plan = LabelPlan(
            reference=0, chains=chains, steps=steps, heat=section.label_heat, hole=section.hole_kJ_per_mol_nm
        )  # fmt: skip
        student = self.student(network)
        more, stand = self._label(teacher, plan, folder=f"driven_{index}", fast=student, starts=pool.starts)
        more, torn = whole(more, limit=TORN * largest_force(pool.frames))
        error = largest_errors(student, more)
        holes = int((error > section.hole_kJ_per_mol_nm).sum()) + torn
        # neighbours in time are alike: what is worst of each stretch teaches most
        frames = pool.frames.and_also(worst_of_stretches(more, error, stretch=section.round_stride)) if holes else pool.frames
        return Driven(
            pool=replace(pool, frames=frames, starts=stand, calls=pool.calls + plan.total),
            report={"frames": len(more), "holes": holes, "torn": torn, "largest_error": float(error.max())},
        )

    def _label(
        self,
        teacher: Potential,
        plan: LabelPlan,
        *,
        folder: str,
        fast: Potential | None = None,
        starts: np.ndarray | None = None,
    ) -> tuple[Labelled, np.ndarray]:
        with open_state(self.state / folder, self.label_key if fast is None else self.key) as store:
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
                progress=Progress(f"{folder} of {self.molecule.system.name} on {teacher.name}", plan.total, "frames"),
            )
            stand = ends(store)
        assert stand is not None
        return frames, stand

    def task(self, network: StudentNetwork, pool: Pool) -> Task:
        """Return the frames divided into those to fit and those to look at, with the student."""
        kept, held_out = split(pool.frames, len(self.trajectories))
        return Task(student=self.student(network), frames=kept, held_out=held_out)

    def clear(self, rounds: int) -> None:
        """Remove the state folders of finished work."""
        for folder in ("labels", *(f"driven_{index}" for index in range(rounds))):
            if (self.state / folder).is_dir():
                with open_state(self.state / folder, self.label_key if folder == "labels" else self.key) as store:
                    store.clear()


@dataclass(frozen=True, kw_only=True)
class Driven:
    """A pool after a round, and the round's entry in the manifest."""

    pool: Pool
    report: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """What came out, beside the trained network.

    Attributes:
        rows: of metrics.csv.
        rounds: what driven dynamics met, all members together.
        members: name to frames and errors of one molecule.
        timing: seconds of labels and of training.
    """

    rows: list[dict[str, float]]
    rounds: list[dict[str, Any]]
    members: dict[str, dict[str, Any]]
    timing: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Members that one network learns.

    Attributes:
        members: one or more; no two of one name.
        section: settings.
        steps: of the first training.
        seed: of the batches.
        state: folder for checkpoints of the training.
        key: what the training depends on.
    """

    members: list[Member]
    section: DistillConfig
    steps: int
    seed: int
    state: Path
    key: str
    timing: dict[str, float] = field(default_factory=lambda: {"label_s": 0.0, "train_s": 0.0})

    def run(self, network: StudentNetwork) -> Distilled:
        """Fit `network` in place: to the first frames, then to those that its own dynamics adds, round after round."""
        pools = [self._first(member) for member in self.members]
        rows: list[dict[str, float]] = []
        rounds: list[dict[str, Any]] = []
        for index in range(self.section.rounds + 1):
            rows += self._train(network, pools, index=index)
            if index == self.section.rounds:
                break
            driven = [self._drive(member, network, pool, index=index) for member, pool in zip(self.members, pools, strict=True)]
            pools = [one.pool for one in driven]
            rounds.append(_together([one.report for one in driven]))
            if rounds[-1]["holes"] == 0:
                break
        found = {
            member.molecule.system.name: self._measured(member, network, pool)
            for member, pool in zip(self.members, pools, strict=True)
        }
        return Distilled(rows=rows, rounds=rounds, members=found, timing=self.timing)

    def _first(self, member: Member) -> Pool:
        began = time.perf_counter()
        with _opened(member) as teacher:
            pool = member.first_labels(teacher, self.section)
        self.timing["label_s"] += time.perf_counter() - began
        return pool

    def _drive(self, member: Member, network: StudentNetwork, pool: Pool, *, index: int) -> Driven:
        began = time.perf_counter()
        with _opened(member) as teacher:
            driven = member.drive(teacher, network, pool, self.section, index=index)
        self.timing["label_s"] += time.perf_counter() - began
        return driven

    def _train(self, network: StudentNetwork, pools: list[Pool], *, index: int) -> list[dict[str, float]]:
        began = time.perf_counter()
        steps = self.steps if index == 0 else self.section.round_steps
        tasks = [member.task(network, pool) for member, pool in zip(self.members, pools, strict=True)]
        with open_state(self.state / f"training_{index}", self.key) as store:
            rows = train(
                network,
                tasks,
                section=self.section,
                steps=steps,
                seed=job_seed(self.seed, "batches", index),
                store=store,
                progress=Progress("distillation", steps, "steps"),
            )
        self.timing["train_s"] += time.perf_counter() - began
        return [{"round": index, **row} for row in rows]

    def _measured(self, member: Member, network: StudentNetwork, pool: Pool) -> dict[str, Any]:
        task = member.task(network, pool)
        with _opened(member) as teacher:
            hessian = hessian_error(teacher, task.student, task.held_out, seed=job_seed(member.seed, "directions"))
        counts = {"train": len(task.frames), "held_out": len(task.held_out), "teacher_calls": pool.calls}
        quality: Quality = measure(task.student, task.held_out)
        return {"frames": counts, **asdict(quality), "hessian_relative": hessian, "data": data_card(pool, member)}

    def clear(self) -> None:
        """Remove the state folders of finished work."""
        for member in self.members:
            member.clear(self.section.rounds)
        for index in range(self.section.rounds + 1):
            if (self.state / f"training_{index}").is_dir():
                with open_state(self.state / f"training_{index}", self.key) as store:
                    store.clear()


def _opened(member: Member) -> Any:  # noqa: ANN401 - a context manager that gives a Potential
    return open_teacher(member.teacher, member.molecule, charge=member.molecule.charge, threads=member.threads)


def _together(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the reports of all members as one: numbers added, the largest error of all."""
    added = {name: sum(one[name] for one in reports) for name in ("frames", "holes", "torn")}
    return {**added, "largest_error": max(one["largest_error"] for one in reports)}


def data_card(pool: Pool, member: Member) -> dict[str, Any]:
    """Return what the labels of one molecule are like: numbers of frames, trajectories, energies and forces."""
    frames = pool.frames
    return {
        "atoms": member.molecule.system.n_atoms,
        "reference_trajectories": len(member.trajectories),
        "frames_without_student": pool.first,
        "frames_of_driven_dynamics": len(frames) - pool.first,
        "energy_sd_kJ_per_mol": float(frames.energies.std()),
        "force_rms_kJ_per_mol_nm": float(frames.forces.square().mean().sqrt()),
        "largest_force_kJ_per_mol_nm": largest_force(frames),
    }


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


def split(frames: Labelled, n_trajectories: int) -> tuple[Labelled, Labelled]:
    """Hold out the frames that descend from the last quarter of the reference trajectories.

    Raises:
        LongstrideError: there is only one trajectory.
    """
    if n_trajectories < 2:
        raise LongstrideError("distillation holds out whole trajectories and needs two or more; set reference.trajectories")
    held = frames.trajectory >= n_trajectories - max(1, round(HELD_OUT * n_trajectories))
    return frames.where(~held), frames.where(held)
