"""Training of the student on teacher forces: one visible loop, force first, bitwise resumable.

The loss of a batch is mean |F_S - F_L|^2 / <F_L^2> + w_b mean (f_S - f_L)^2 / <f_L^2> + w_E var(E_S - E_L) / (sigma_E^2). f is
the force along a bond (see `along_bonds`); the last term is without any constant, since energies of different methods differ
by one. After training, one shift per element makes the constants agree.

In multi-time-step dynamics the slow force is the student's error, and it resonates with a stiff bond once the outer
step nears half its period. What counts there is not the average force error but its share along stiff coordinates, so
two such errors are tracked: of the force along bonds, and of the bonds' stiffness (see `stiff_errors`).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from longstride.errors import NumericsError
from longstride.state import State
from longstride.training.muon import Muon

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longstride.config import DistillConfig
    from longstride.data.checkpoint import StateFolder
    from longstride.potentials.base import Potential
    from longstride.potentials.student import AnyStudent, StudentNetwork
    from longstride.progress import Progress
    from longstride.training.labels import Labelled

MAX_GRADIENT = 1.0
WARMUP_STEPS = 50
FINAL_RATE = 0.01  # of the peak
ENERGY_WEIGHT = 0.01
ATOMS_AT_ONCE = 1408  # when only looking
TRACKED_FRAMES = 128


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How well a student reproduces its teacher on frames it was not trained on.

    Attributes:
        force_rmse: root mean square error of force components, kJ/mol/nm.
        force_relative: the same, divided by the root mean square of the teacher's force components.
        bond_relative: error of the force along bonds, divided by the teacher's force along bonds (root mean squares).
        stiffness_rms: root mean square over bonds of the relative error of the stiffness.
        stiffness_max: the largest of them.
        energy_mae: mean absolute error of energies without their mean difference, kJ/mol.
    """

    force_rmse: float
    force_relative: float
    bond_relative: float
    stiffness_rms: float
    stiffness_max: float
    energy_mae: float


@dataclass(frozen=True, kw_only=True)
class Task:
    """One molecule that a network learns.

    Attributes:
        student: the network bound to it.
        frames: what to fit.
        held_out: frames of other trajectories, only looked at.
    """

    student: AnyStudent
    frames: Labelled
    held_out: Labelled


def train(
    network: StudentNetwork,
    tasks: Sequence[Task],
    *,
    section: DistillConfig,
    steps: int,
    seed: int,
    store: StateFolder,
    progress: Progress | None = None,
) -> list[dict[str, float]]:
    """Fit `network` in place and return the rows of metrics.csv.

    Every step fits a batch of one molecule, drawn with equal probability; rows are means over molecules.

    Args:
        network: the weights; overwritten by a checkpoint where one exists.
        tasks: the molecules, one or more.
        section: batch size, learning rate, checkpoint interval.
        steps: optimiser steps.
        seed: of the order of frames.
        store: open state folder.
        progress: told the number of steps.

    Raises:
        NumericsError: the loss is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    optimiser = Muon(network.parameters(), lr=section.learning_rate)
    step, rows = _restore(store, network, optimiser, generator)
    losses = [_Loss(task.frames, task.student, bond_weight=section.bond_weight) for task in tasks]
    watched = [replace(task, held_out=_first(task.held_out, at_most=TRACKED_FRAMES // len(tasks))) for task in tasks]
    while step < steps:
        rate = learning_rate(step, peak=section.learning_rate, steps=steps)
        for group in optimiser.param_groups:
            group["lr"] = rate
        k = int(torch.randint(len(tasks), (), generator=generator)) if len(tasks) > 1 else 0
        chosen = torch.randint(len(tasks[k].frames), (section.batch_size,), generator=generator)
        loss, force_loss = losses[k](chosen)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), MAX_GRADIENT)
        optimiser.step()
        step += 1
        if step % section.checkpoint_every_steps == 0 or step == steps:
            if not math.isfinite(loss.item()):
                raise NumericsError(f"distillation diverged at step {step}; lower distill.learning_rate")
            rows.append(_row(step, rate, force_loss.item(), mean_quality(watched)))
            _save(store, step, network, optimiser, generator=generator, rows=rows)
        if progress is not None:
            progress.update(step, f"force error {math.sqrt(force_loss.item()):.3f}")
    fit_shifts(network, tasks)
    return rows


def mean_quality(tasks: Sequence[Task]) -> Quality:
    """Return the quality on held-out frames, averaged over molecules; the largest error of a stiffness is that of all."""
    found = [asdict(measure(task.student, task.held_out)) for task in tasks]
    mean = {name: float(np.mean([one[name] for one in found])) for name in found[0]}
    return Quality(**{**mean, "stiffness_max": max(one["stiffness_max"] for one in found)})


class _Loss:
    """The loss of a batch of frames; see the module's text.

    Args:
        frames: all of them, whose mean squares are the scales.
        student: the network bound to their molecule.
        bond_weight: of forces along bonds.
    """

    def __init__(self, frames: Labelled, student: AnyStudent, *, bond_weight: float) -> None:
        self._frames, self._student, self._targets = frames, student, frames.forces.to(student.dtype)
        self._force_scale = self._targets.square().mean().sqrt()
        self._energy_scale = max(float(frames.energies.std()), 1e-6) if len(frames) > 1 else 1.0
        self._bonds = torch.from_numpy(np.asarray(student.system.bonds))
        self._bond_weight = bond_weight if len(self._bonds) else 0.0
        if self._bond_weight:
            self._bond_scale = along_bonds(frames.positions, frames.forces, self._bonds)[0].square().mean().sqrt()

    def __call__(self, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of the frames with these numbers, and its part of the forces."""
        positions, targets = self._frames.positions[chosen], self._targets[chosen]
        energies, forces = self._student.network_forces(positions, self._frames.boxes(len(chosen)))
        force_loss = ((forces - targets) / self._force_scale).square().mean()
        residual = energies - self._frames.energies[chosen]
        energy_loss = ((residual - residual.mean()) / self._energy_scale).square().mean()
        loss = force_loss + ENERGY_WEIGHT * energy_loss.to(force_loss.dtype)
        if self._bond_weight:
            wrong, _ = along_bonds(positions, forces - targets, self._bonds)
            loss = loss + self._bond_weight * (wrong / self._bond_scale).square().mean().to(loss.dtype)
        return loss, force_loss


def learning_rate(step: int, *, peak: float, steps: int) -> float:
    """Return the rate of one step: linear warm-up, then half a cosine to one hundredth of the peak."""
    decay = FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * step / steps))
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * decay


def predict(student: AnyStudent, frames: Labelled) -> tuple[torch.Tensor, torch.Tensor]:
    """Return energies without shifts [frame] and forces [frame, atom, 3] of the network as it is now, float64."""
    count = max(1, ATOMS_AT_ONCE // student.system.n_atoms)
    with torch.no_grad():
        parts = [student.network_forces(part, frames.boxes(len(part))) for part in frames.positions.split(count)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]).to(torch.float64)


def measure(student: AnyStudent, frames: Labelled) -> Quality:
    """Compare student (its network as it is now) and teacher on labelled frames."""
    energies, forces = predict(student, frames)
    error = forces - frames.forces
    bonds = torch.from_numpy(np.asarray(student.system.bonds))
    bond_relative, stiffness = stiff_errors(frames.positions, frames.forces, forces, bonds)
    residual = energies - frames.energies
    rmse = float(error.square().mean().sqrt())
    return Quality(
        force_rmse=rmse,
        force_relative=rmse / float(frames.forces.square().mean().sqrt()),
        bond_relative=bond_relative,
        stiffness_rms=float(stiffness.square().mean().sqrt()),
        stiffness_max=float(stiffness.abs().max()),
        energy_mae=float((residual - residual.mean()).abs().mean()),
    )


def largest_errors(student: AnyStudent, frames: Labelled) -> torch.Tensor:
    """Return the largest |F_S - F_L| on any atom of each frame, [frame] kJ/mol/nm."""
    return (predict(student, frames)[1] - frames.forces).norm(dim=2).amax(dim=1)


def hessian_error(
    teacher: Potential, student: Potential, frames: Labelled, *, seed: int, count: int = 16, step_nm: float = 5e-4
) -> float:
    """Return the relative error of Hessian-vector products along random directions.

    Equation: H v = (F(x - h v) - F(x + h v)) / 2h with v standard normal; rms |H_S v - H_L v| / rms |H_L v|. Random directions
    see all eigenvalues, and the stiffest most. It costs two teacher calls per frame. Source: distillation by Hessians,
    arXiv:2501.09009.

    Args:
        teacher: the expensive potential.
        student: the cheap one.
        frames: where; `count` of them, evenly spread.
        seed: of the directions.
        count: frames looked at, at most.
        step_nm: h.
    """
    x = frames.positions[torch.linspace(0, len(frames) - 1, min(count, len(frames))).round().long()]
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    found = []
    for potential in (teacher, student):
        parts = [
            potential.energy_forces(State(positions=at[k : k + 1], box=frames.boxes(1)))[1]
            for at in (x - step_nm * v, x + step_nm * v)
            for k in range(len(x))
        ]
        before, after = torch.cat(parts).chunk(2)
        found.append((before - after) / (2 * step_nm))
    return float((found[1] - found[0]).norm() / found[0].norm())


def stiff_errors(
    positions: torch.Tensor, teacher: torch.Tensor, student: torch.Tensor, bonds: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """Return errors of the stretching forces of bonds.

    Equation: along bond ij with unit vector u, f = (F_i - F_j) . u / 2. The first result is rms(f_S - f_L) / rms(f_L). The
    second, [bond], is the relative error of the effective stiffness, the regression slope of f on the bond length:
    cov(f_S - f_L, r) / cov(f_L, r), which is the share of the stiffness that is left to the slow force.

    Args:
        positions: [frame, atom, 3] nm.
        teacher: forces, [frame, atom, 3] kJ/mol/nm.
        student: likewise.
        bonds: [bond, 2].
    """
    (pull, length), (wrong, _) = (along_bonds(positions, f, bonds) for f in (teacher, student - teacher))
    along = [pull, wrong]
    displacement = length - length.mean(dim=0)
    slopes = [(f * displacement).mean(dim=0) for f in along]
    return float(along[1].square().mean().sqrt() / along[0].square().mean().sqrt()), slopes[1] / slopes[0]


def along_bonds(positions: torch.Tensor, forces: torch.Tensor, bonds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the stretching force (F_i - F_j) . u / 2 of every bond, and its length in nm, both [frame, bond].

    Args:
        positions: [frame, atom, 3] nm; the atoms of a bond are images next to each other.
        forces: [frame, atom, 3].
        bonds: [bond, 2].
    """
    first, second = bonds[:, 0], bonds[:, 1]
    apart = positions[:, first] - positions[:, second]
    length = apart.norm(dim=-1)
    return 0.5 * ((forces[:, first] - forces[:, second]) * (apart / length[..., None])).sum(dim=-1), length


def fit_shifts(network: StudentNetwork, tasks: Sequence[Task]) -> None:
    """Set one energy per element so that mean energies of all molecules agree (least squares, smallest where undetermined)."""
    elements = np.array(network.metadata.elements)
    counts, differences = [], []
    for task in tasks:
        numbers = np.asarray(task.student.system.atomic_numbers)
        counts.append([(numbers == element).sum() for element in elements])
        differences.append(float((task.frames.energies - predict(task.student, task.frames)[0]).mean()))
    shifts, *_ = np.linalg.lstsq(np.array(counts, dtype=np.float64), np.array(differences), rcond=None)
    network.shifts.copy_(torch.from_numpy(shifts))


def _first(frames: Labelled, *, at_most: int) -> Labelled:
    """A spread of a few frames, for tracking during training."""
    keep = torch.zeros(len(frames), dtype=torch.bool)
    keep[:: max(1, len(frames) // max(1, at_most))] = True
    return frames.where(keep)


def _row(step: int, rate: float, force_loss: float, quality: Quality) -> dict[str, float]:
    return {
        "step": step,
        "learning_rate": rate,
        "train_force_relative": math.sqrt(force_loss),
        "held_out_force_rmse_kJ_per_mol_nm": quality.force_rmse,
        "held_out_force_relative": quality.force_relative,
        "held_out_bond_relative": quality.bond_relative,
        "held_out_stiffness_max": quality.stiffness_max,
        "held_out_energy_mae_kJ_per_mol": quality.energy_mae,
    }


def _save(
    store: StateFolder,
    step: int,
    network: StudentNetwork,
    optimiser: Muon,
    *,
    generator: torch.Generator,
    rows: list[dict[str, float]],
) -> None:
    arrays = {f"network.{key}": value.detach().numpy() for key, value in network.state_dict().items()}
    for index, state in optimiser.state_dict()["state"].items():
        arrays |= {f"optimiser.{index}.{key}": value.numpy() for key, value in state.items()}
    store.save(step, {**arrays, "generator": generator.get_state().numpy()}, {"rows": rows})


def _restore(
    store: StateFolder, network: StudentNetwork, optimiser: Muon, generator: torch.Generator
) -> tuple[int, list[dict[str, float]]]:
    saved = store.latest()
    if saved is None:
        return 0, []
    arrays = {key: torch.from_numpy(value.copy()) for key, value in saved.arrays.items()}
    network.load_state_dict({key.partition(".")[2]: value for key, value in arrays.items() if key.startswith("network.")})
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in arrays.items():
        if key.startswith("optimiser."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
    generator.set_state(arrays["generator"])
    return saved.step, saved.meta["rows"]
