"""Teacher labels for distillation: reference frames, hot Langevin dynamics on the teacher, and dynamics that a student drives.

Reference frames come from another potential, so their stiff coordinates are displaced and too narrow for the teacher.
Short Langevin runs on the teacher, at the target temperature and above, give frames of its own distribution and of what lies
around it, where a student is used between two teacher calls. Only positions matter there, so every atom weighs 12 Da,
which slows all bonds down to where one step decorrelates stiff forces, and every teacher call can be a label. A liquid relaxes
from the reference potential to the teacher over a picosecond, so there only every so many of them is kept.

A student that was trained on such frames may still be wrong where its own dynamics leads (a hole). Multi-time-step dynamics
with it in the inner steps goes there, and each of its teacher calls is the label of just the frame that was missing. Beyond
a hole such dynamics is about nothing: the chain starts again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from longstride.dynamics.integrators import MDState, baoab, respa_baoab, start, thermal_velocities
from longstride.errors import LongstrideError, NumericsError
from longstride.state import State

if TYPE_CHECKING:
    from longstride.data.checkpoint import StateFolder
    from longstride.potentials.base import Potential
    from longstride.progress import Progress

MASS_DA = 12.0
TIMESTEP_PS = 3.5e-3
DRIVEN_STEPS = 3  # of the student between two teacher calls; with all atoms of 12 Da below half the period of any bond
FRICTION_PER_PS = 5.0
MAX_TEMPERATURE_RATIO = 4.0  # of a whole chain
MAX_ATOM_RATIO = 20.0  # of one atom; by chance once in 2e12 times
REFERENCE_BLOCK = 64
STEPS_PER_BLOCK = 8
MAX_FAILED = 0.05
SHORTEST_CHAIN = 24  # steps, where there are enough labels for four chains
STATE_FIELDS = ("positions", "velocities", "forces", "potential_energy", "fast_forces")
FRAME_FIELDS = ("positions", "energies", "forces", "trajectory")


@dataclass(frozen=True, kw_only=True)
class LabelPlan:
    """How many frames of each kind: `reference` frames as they are, and those of Langevin chains.

    Attributes:
        reference: frames of the reference trajectories.
        chains: Langevin chains.
        steps: frames of each chain after its first.
        stride: teacher calls per frame of a chain.
        heat: chain temperatures, relative to the target; chains take them in turn.
        hole: where the student that drives a chain is wrong by more on any atom, kJ/mol/nm, the chain starts again.
    """

    reference: int
    chains: int
    steps: int
    stride: int = 1
    heat: tuple[float, ...] = (1.0, 1.3, 1.7)
    hole: float = math.inf

    @classmethod
    def of(cls, frames: int, *, chains: int = 24, reference_fraction: float = 0.2) -> LabelPlan:
        """Divide a total number of frames. Few frames make few chains, not short ones."""
        reference = max(1, round(reference_fraction * frames))
        dynamics = frames - reference
        chains = max(1, min(chains, dynamics // 4, max(4, dynamics // SHORTEST_CHAIN)))
        return cls(reference=reference, chains=chains, steps=max(1, round((frames - reference) / chains) - 1))

    def limited(self, available: int) -> LabelPlan:
        """Return the plan with no more reference frames than there are; chains take the others' place."""
        spare = max(0, self.reference - available)
        return replace(self, reference=self.reference - spare, steps=self.steps + spare // self.chains)

    @property
    def blocks(self) -> tuple[int, int]:
        """Number of blocks of reference frames, and of dynamics."""
        return -(-self.reference // REFERENCE_BLOCK), -(-self.steps // self.block_steps)

    @property
    def block_steps(self) -> int:
        """Frames of every chain that are computed, and kept on disk, at a time."""
        return max(1, STEPS_PER_BLOCK // self.stride)

    @property
    def total(self) -> int:
        """Teacher calls, the first of every chain included."""
        return self.reference + self.chains * (self.steps * self.stride + 1)


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Frames with teacher energies and forces.

    Attributes:
        positions: [frame, atom, 3] nm, float64.
        energies: [frame] kJ/mol.
        forces: [frame, atom, 3] kJ/mol/nm.
        trajectory: [frame] reference trajectory that a frame descends from; frames are held out by it.
        box: [3, 3] nm, the box of all frames, or None for isolated molecules.
    """

    positions: torch.Tensor
    energies: torch.Tensor
    forces: torch.Tensor
    trajectory: torch.Tensor
    box: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.energies)

    def where(self, keep: torch.Tensor) -> Labelled:
        """Return the frames where the mask is true."""
        return Labelled(**{key: getattr(self, key)[keep] for key in FRAME_FIELDS}, box=self.box)

    def and_also(self, more: Labelled) -> Labelled:
        """Return these frames and others of the same system."""
        joined = {key: torch.cat([getattr(self, key), getattr(more, key)]) for key in FRAME_FIELDS}
        return Labelled(**joined, box=self.box)

    def boxes(self, count: int) -> torch.Tensor | None:
        """Return the box for so many frames, [count, 3, 3] nm, or None."""
        return repeated(self.box, count)


def repeated(box: torch.Tensor | None, count: int) -> torch.Tensor | None:
    """Return one box [3, 3] for so many replicas, [count, 3, 3], or None."""
    return None if box is None else box.expand(count, 3, 3)


def label_frames(
    teacher: Potential,
    trajectories: list[np.ndarray],
    *,
    plan: LabelPlan,
    kT: float,
    seed: int,
    store: StateFolder,
    box: np.ndarray | None = None,
    fast: Potential | None = None,
    starts: np.ndarray | None = None,
    progress: Progress | None = None,
) -> Labelled:
    """Return teacher-labelled frames; finished blocks in `store` are not computed again.

    Args:
        teacher: labels frames and drives the chains.
        trajectories: reference positions, [frame, atom, 3] nm, one array each.
        plan: how many frames of which kind.
        kT: thermal energy of the target, kJ/mol.
        seed: of chain starts and noise.
        store: open state folder; continued bitwise.
        box: [3, 3] nm of a periodic system.
        fast: a student that drives the chains between teacher calls; None: the teacher alone.
        starts: [chain, atom, 3] nm, where chains start, instead of frames of the trajectories; chain k counts as a
            descendant of trajectory k modulo their number.
        progress: told the number of labels.

    Raises:
        NumericsError: the teacher failed on too many frames.
    """
    saved = store.latest()
    done, arrays = (saved.step, saved.arrays) if saved else (0, {})
    n_reference, n_dynamics = plan.blocks
    reference, origin = _spread(trajectories, plan.reference) if plan.reference else (np.zeros(0), np.zeros(0))
    if plan.reference > sum(len(frames) for frames in trajectories):
        raise LongstrideError(f"there are fewer than {plan.reference} reference frames to label; see LabelPlan.limited")
    cell = None if box is None else torch.from_numpy(box)
    chains = _Chains(teacher, trajectories, plan, kT=kT, seed=seed, box=cell, fast=fast, starts=starts)
    for index in range(done, n_reference + n_dynamics):
        if index < n_reference:
            part = slice(index * REFERENCE_BLOCK, (index + 1) * REFERENCE_BLOCK)
            x = torch.from_numpy(reference[part])
            energies, forces = teacher.energy_forces(State(positions=x, box=repeated(cell, len(x))))
            block = {"positions": x, "energies": energies, "forces": forces, "trajectory": torch.from_numpy(origin[part])}
            following = arrays
        else:
            first = (index - n_reference) * plan.block_steps
            block, following = chains.advance(arrays, min(plan.block_steps, plan.steps - first))
        store.save_block(index, {key: value.numpy() for key, value in block.items()})
        store.save(index + 1, following or {"empty": np.zeros(0)})
        arrays = following
        if progress is not None:
            progress.update(_labels_after(plan, index + 1))
    return _collect(store, sum(plan.blocks), cell)


def ends(store: StateFolder) -> np.ndarray | None:
    """Return where the chains of finished labelling stand, [chain, atom, 3] nm; None before it began."""
    saved = store.latest()
    return None if saved is None or "positions" not in saved.arrays else saved.arrays["positions"].copy()


def _labels_after(plan: LabelPlan, blocks: int) -> int:
    n_reference = plan.blocks[0]
    steps = max(0, blocks - n_reference) * plan.block_steps
    moved = plan.chains * (min(plan.steps, steps) * plan.stride + (steps > 0))
    return min(plan.reference, blocks * REFERENCE_BLOCK) + moved


def _spread(trajectories: list[np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `count` frames spread evenly over all trajectories, and which trajectory each is from."""
    lengths = np.array([len(frames) for frames in trajectories])
    origin = np.repeat(np.arange(len(trajectories)), lengths)
    chosen = np.unique(np.linspace(0, lengths.sum() - 1, count).round().astype(int))
    first = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    frames = [trajectories[k][index - first[k]] for index, k in zip(chosen, origin[chosen], strict=True)]
    return np.stack(frames).astype(np.float64), origin[chosen]


class _Chains:
    """Langevin chains on the teacher, from frames of all trajectories, at several temperatures."""

    def __init__(
        self,
        teacher: Potential,
        trajectories: list[np.ndarray],
        plan: LabelPlan,
        *,
        kT: float,
        seed: int,
        box: torch.Tensor | None,
        fast: Potential | None,
        starts: np.ndarray | None,
    ) -> None:
        generator = np.random.default_rng(seed)
        self._fast, self._teacher, self._seed, self._box = fast, teacher, seed, repeated(box, plan.chains)
        self.origin = torch.arange(plan.chains) % len(trajectories)
        frames = [trajectories[k][generator.integers(len(trajectories[k]))] for k in self.origin.tolist()]
        self._starts = torch.from_numpy((np.stack(frames) if starts is None else starts).astype(np.float64))
        # trajectories and temperatures are combined, not aligned, where their numbers share a factor
        heat = [plan.heat[(chain + chain // len(trajectories)) % len(plan.heat)] for chain in range(plan.chains)]
        self._stride, self._hole = plan.stride, plan.hole
        self._kT = kT * torch.tensor(heat, dtype=torch.float64)[:, None, None]
        self._masses = torch.full((self._starts.shape[1],), MASS_DA, dtype=torch.float64)

    def advance(self, arrays: dict[str, np.ndarray], steps: int) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray]]:
        """Return the next `steps` labels of every chain, after the saved state (or the start), and the state after them."""
        generator = torch.Generator().manual_seed(self._seed)
        found: list[MDState] = []
        if "velocities" in arrays:
            generator.set_state(torch.from_numpy(arrays["generator"].copy()))
            names = [name for name in STATE_FIELDS if name in arrays]
            md = MDState(masses=self._masses, box=self._box, **{key: torch.from_numpy(arrays[key].copy()) for key in names})
        else:
            velocities = thermal_velocities(self._starts.shape, self._masses, self._kT, generator)
            md = self._begin(velocities)
            found.append(md)
        for step in range(1, steps * self._stride + 1):
            md = self._step(md, generator)
            if step % self._stride == 0:
                found.append(md)
            md = self._back_to_start(md, generator)
        labels = {
            "positions": torch.cat([item.positions for item in found]),
            "energies": torch.cat([item.potential_energy for item in found]),
            "forces": torch.cat([item.forces for item in found]),
            "trajectory": self.origin.repeat(len(found)),
        }
        state = {key: getattr(md, key).numpy() for key in STATE_FIELDS if getattr(md, key) is not None}
        return labels, {**state, "generator": generator.get_state().numpy()}

    def _begin(self, velocities: torch.Tensor) -> MDState:
        return start(self._starts, velocities, masses=self._masses, potential=self._teacher, fast=self._fast, box=self._box)

    def _step(self, md: MDState, generator: torch.Generator) -> MDState:
        kT, friction = self._kT, FRICTION_PER_PS
        if self._fast is None:
            return baoab(md, potential=self._teacher, dt=TIMESTEP_PS, kT=kT, friction=friction, generator=generator)
        return respa_baoab(
            md,
            fast=self._fast,
            slow=self._teacher,
            n_inner=DRIVEN_STEPS,
            dt=DRIVEN_STEPS * TIMESTEP_PS,
            kT=kT,
            friction=friction,
            generator=generator,
        )

    def _back_to_start(self, md: MDState, generator: torch.Generator) -> MDState:
        """Return chains that failed, ran hot or met a hole to where they began, with fresh velocities."""
        per_atom = 0.5 * self._masses * md.velocities.square().sum(dim=2)
        ratio = per_atom / (1.5 * self._kT[:, :, 0])
        bad = (ratio.mean(dim=1) > MAX_TEMPERATURE_RATIO) | (ratio.amax(dim=1) > MAX_ATOM_RATIO)
        if md.fast_forces is not None:
            bad |= (md.forces - md.fast_forces).norm(dim=2).amax(dim=1) > self._hole
        bad |= ~(torch.isfinite(md.potential_energy) & torch.isfinite(ratio).all(dim=1))
        if not bad.any():
            return md
        velocities = thermal_velocities(self._starts.shape, self._masses, self._kT, generator)
        fresh, chain = self._begin(velocities), bad[:, None, None]

        def chosen(name: str) -> torch.Tensor:
            new, old = getattr(fresh, name), getattr(md, name)
            return torch.where(chain if new.ndim == 3 else bad, new, old)

        return replace(md, **{name: chosen(name) for name in STATE_FIELDS if getattr(md, name) is not None})


def _collect(store: StateFolder, blocks: int, box: torch.Tensor | None) -> Labelled:
    parts = [store.read_block(index) for index in range(blocks)]
    merged = {key: torch.from_numpy(np.concatenate([part[key] for part in parts])) for key in parts[0]}
    frames = Labelled(**merged, box=box)
    good = torch.isfinite(frames.energies) & torch.isfinite(frames.forces).all(dim=(1, 2))
    if (~good).double().mean() > MAX_FAILED:
        raise NumericsError(
            f"the teacher failed on {int((~good).sum())} of {len(frames)} frames; check the total charge and the structure"
        )
    return frames.where(good)
