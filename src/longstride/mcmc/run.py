"""Advance chains, save states, and continue after being killed with the same result to the bit."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from longstride.mcmc.kernel import ChainState, Info, Kernel
from longstride.progress import Progress
from longstride.state import State

if TYPE_CHECKING:
    from longstride.data.checkpoint import StateFolder


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long to run, in steps of the kernel.

    Attributes:
        steps: steps of the production part.
        burn_in: steps before it, not saved.
        save_every: steps between two saved states.
        checkpoint_every: steps between two checkpoints, counted from the first step of all.
    """

    steps: int
    burn_in: int
    save_every: int
    checkpoint_every: int

    @property
    def total(self) -> int:
        """Burn-in and production."""
        return self.burn_in + self.steps


@dataclass(kw_only=True)
class Tally:
    """Counts and times of a run, summed over attempts; JSON values.

    Attributes:
        proposed: proposals per label, in production.
        accepted: accepted proposals per label, in production.
        energy_calls: target energies, burn-in included.
        force_calls: target energies with forces, burn-in included.
        sampling_s: wall time of production.
        burn_in_s: wall time of burn-in.
        blocks: blocks of saved states written.
    """

    proposed: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    energy_calls: int = 0
    force_calls: int = 0
    sampling_s: float = 0.0
    burn_in_s: float = 0.0
    blocks: int = 0

    def count(self, info: Info, *, production: bool) -> None:
        """Add one step; the kernels of a cycle count one by one."""
        self.energy_calls += info.energy_calls
        self.force_calls += info.force_calls
        for part in (info.parts or (info,)) if production else ():
            self.proposed[part.label] = self.proposed.get(part.label, 0) + part.proposals * len(part.accepted)
            self.accepted[part.label] = self.accepted.get(part.label, 0) + int(part.accepted.sum())

    def acceptance(self, *labels: str) -> float | None:
        """Return the accepted fraction over the proposals of these labels, or of all; None without proposals."""
        labels = labels or tuple(self.proposed)
        proposed = sum(self.proposed.get(name, 0) for name in labels)
        return sum(self.accepted.get(name, 0) for name in labels) / proposed if proposed else None


@dataclass(frozen=True, kw_only=True)
class Saved:
    """States along the chains.

    Attributes:
        positions: [saved, chain, atom, 3] float32 nm.
        log_density: [saved, chain] float64.
        acceptance: [saved, chain] float64, accepted fraction since the last saved state; of a cycle the fraction of passes
            that moved the chain.
    """

    positions: np.ndarray
    log_density: np.ndarray
    acceptance: np.ndarray


@dataclass(kw_only=True)
class _Buffer:
    accepted: torch.Tensor  # [chain] accepted since the last saved state
    proposals: int = 0  # per chain, since the last saved state
    positions: list[np.ndarray] = field(default_factory=list)
    log_density: list[np.ndarray] = field(default_factory=list)
    acceptance: list[np.ndarray] = field(default_factory=list)

    def count(self, info: Info) -> None:
        self.accepted = self.accepted + info.accepted.cpu()
        self.proposals += info.proposals

    def save(self, chains: ChainState) -> None:
        self.positions.append(chains.state.positions.cpu().numpy().astype(np.float32))
        self.log_density.append(chains.log_density.cpu().numpy())
        self.acceptance.append(self.accepted.cpu().numpy() / self.proposals)
        self.accepted, self.proposals = torch.zeros_like(self.accepted), 0

    def arrays(self) -> dict[str, np.ndarray]:
        return {key: np.stack(getattr(self, key)) for key in ("positions", "log_density", "acceptance")}


def run(
    kernel: Kernel, chains: ChainState, schedule: Schedule, *, generator: torch.Generator, folder: StateFolder, label: str
) -> tuple[Saved, Tally]:
    """Run burn-in and production, or continue them from the newest checkpoint in `folder`.

    Args:
        kernel: the Markov kernel.
        chains: starting point; ignored where there is a checkpoint.
        schedule: how many steps, and how often to save.
        generator: the run's only random stream.
        folder: where blocks and checkpoints go.
        label: what progress is called.
    """
    buffer = _Buffer(accepted=torch.zeros(len(chains.log_density), dtype=torch.float64))
    first, tally = 0, Tally()
    saved = folder.latest()
    if saved is not None:
        chains, tally, buffer, first = _restore(saved.arrays, saved.meta, generator=generator, like=chains, step=saved.step)
    progress = Progress(label, schedule.total, "proposals per chain", start=first)
    begin = time.monotonic()
    for step in range(first + 1, schedule.total + 1):
        chains, info = kernel(chains, generator)
        tally.count(info, production=step > schedule.burn_in)
        if step > schedule.burn_in:
            buffer.count(info)
            if (step - schedule.burn_in) % schedule.save_every == 0:
                buffer.save(chains)
        if step == schedule.burn_in or step % schedule.checkpoint_every == 0 or step == schedule.total:
            begin = _lap(tally, begin, production=step > schedule.burn_in)
            buffer = _checkpoint(folder, step, chains, generator, tally=tally, buffer=buffer)
            chains = replace(chains, notes=None)  # a checkpoint has none, and both must go on with the same rounding
            begin = _lap(tally, begin, production=step > schedule.burn_in)
        progress.update(step, _note(tally))
    return _collect(folder, tally), tally


def _lap(tally: Tally, begin: float, *, production: bool) -> float:
    now = time.monotonic()
    if production:
        tally.sampling_s += now - begin
    else:
        tally.burn_in_s += now - begin
    return now


def _note(tally: Tally) -> str:
    value = tally.acceptance()
    return "burn-in" if value is None else f"acceptance {value:.3f}"


def _checkpoint(
    folder: StateFolder, step: int, chains: ChainState, generator: torch.Generator, *, tally: Tally, buffer: _Buffer
) -> _Buffer:
    """Write finished states as a block and everything needed to continue; return an empty buffer."""
    if buffer.positions:
        folder.save_block(tally.blocks, buffer.arrays())
        tally.blocks += 1
    arrays = {
        "positions": chains.state.positions.cpu().numpy(),
        "log_density": chains.log_density.cpu().numpy(),
        "accepted": buffer.accepted.cpu().numpy(),
        "proposals": np.array(buffer.proposals),
        "generator": generator.get_state().numpy(),
    }
    if chains.velocities is not None:
        arrays["velocities"] = chains.velocities.cpu().numpy()
    folder.save(step, arrays, vars(tally))
    return _Buffer(accepted=buffer.accepted, proposals=buffer.proposals)


def _restore(
    arrays: dict[str, np.ndarray], meta: dict[str, Any], *, generator: torch.Generator, like: ChainState, step: int
) -> tuple[ChainState, Tally, _Buffer, int]:
    generator.set_state(torch.from_numpy(arrays["generator"].copy()))
    device = like.log_density.device
    found = {name: torch.from_numpy(value.copy()).to(device) for name, value in arrays.items() if name != "generator"}
    chains = ChainState(
        state=State(positions=found["positions"]), log_density=found["log_density"], velocities=found.get("velocities")
    )
    buffer = _Buffer(accepted=found["accepted"].cpu(), proposals=int(found["proposals"]))
    return chains, Tally(**meta), buffer, step


def _collect(folder: StateFolder, tally: Tally) -> Saved:
    blocks = [folder.read_block(index) for index in range(tally.blocks)]
    return Saved(
        **{key: np.concatenate([block[key] for block in blocks]) for key in ("positions", "log_density", "acceptance")}
    )
