"""Parallel tempering: ladders of temperatures whose neighbours swap configurations, all of them one batch; exact.

Rung r of a ladder samples exp(-s_r U(x) / kT) with s_r = T_0 / T_r, T_0 being the temperature of interest. Written so, hot
rungs are chains at kT on a scaled potential: every exact kernel serves them unchanged, and velocities mean the same on all.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import special

from longstride.errors import LongstrideError
from longstride.mcmc.kernel import ChainState
from longstride.mcmc.metropolis import accept, log_ratio
from longstride.mcmc.run import Tally
from longstride.progress import Progress
from longstride.state import State

if TYPE_CHECKING:
    from longstride.data.checkpoint import StateFolder
    from longstride.mcmc.kernel import Kernel
    from longstride.potentials.base import Potential

MOST_RUNGS = 64
_AT_COLD, _VIA_HOT = 1, 2  # what a walker has behind it: the cold end; the cold end and then the hot one


def geometric_ladder(
    cold_K: float, hottest_K: float, *, energy_variance: float, kT: float, swap_acceptance: float
) -> tuple[float, ...]:
    """Return temperatures from cold to hot with equal ratios, in K, as few as reach the swap acceptance.

    Equation: with a heat capacity C = Var(U) / kT^2 that does not change along the ladder, energies of neighbours with the
    ratio rho are normal and swap with probability erfc(sqrt(C) ln(rho) / 2) for rho near 1 (doi:10.1063/1.1917749); so
    ln(rho) <= 2 erfcinv(acceptance) / sqrt(C).

    Args:
        cold_K: temperature of interest.
        hottest_K: of the last rung.
        energy_variance: Var(U) at `cold_K`, (kJ/mol)^2.
        kT: thermal energy at `cold_K`, kJ/mol.
        swap_acceptance: wanted between neighbours, in (0, 1).

    Raises:
        LongstrideError: the hottest temperature is not above the cold one; the variance is not positive; more than 64 rungs.
    """
    if not hottest_K > cold_K > 0:
        raise LongstrideError(f"tempering needs a hottest temperature above {cold_K:g} K, not {hottest_K:g} K")
    if not (math.isfinite(energy_variance) and energy_variance > 0 and 0 < swap_acceptance < 1):
        raise LongstrideError(
            f"no ladder for an energy variance of {energy_variance:g} (kJ/mol)^2 and a swap acceptance of {swap_acceptance:g};"
            " the variance must be positive and the acceptance between 0 and 1"
        )
    widest = 2 * float(special.erfcinv(swap_acceptance)) * kT / math.sqrt(energy_variance)
    span = math.log(hottest_K / cold_K)
    pairs = max(1, math.ceil(span / widest - 1e-9))
    if pairs >= MOST_RUNGS:
        raise LongstrideError(
            f"a ladder from {cold_K:g} to {hottest_K:g} K would have {pairs + 1} rungs; lower the hottest temperature or the"
            " swap acceptance"
        )
    return (*(cold_K * math.exp(span * rung / pairs) for rung in range(pairs)), hottest_K)


def scales_of(temperatures_K: tuple[float, ...]) -> torch.Tensor:
    """Return s_r = T_0 / T_r, [rung] float64."""
    return temperatures_K[0] / torch.tensor(temperatures_K, dtype=torch.float64)


class ScaledPotential:
    """s U(x) with one factor per configuration of the batch."""

    def __init__(self, potential: Potential, scales: torch.Tensor) -> None:
        """Bind factors [batch] to the configurations of every call."""
        self.system, self.name = potential.system, potential.name
        self.potential, self.scales = potential, scales

    def energy(self, x: State) -> torch.Tensor:
        """Return s U(x), [batch] kJ/mol float64."""
        return self.scales * self.potential.energy(x).double()

    def energy_forces(self, x: State) -> tuple[torch.Tensor, torch.Tensor]:
        """Return s U(x), [batch] kJ/mol float64, and s F, [batch, atom, 3] kJ/mol/nm."""
        energy, forces = self.potential.energy_forces(x)
        return self.scales * energy.double(), self.scales[:, None, None].to(forces.dtype) * forces


@dataclass(frozen=True, kw_only=True)
class Swaps:
    """What one round of swaps did.

    Attributes:
        first: [pair] lower rung of each pair.
        accepted: [ladder, pair] bool.
        source: [ladder, rung] rung from which each rung's configuration came.
    """

    first: torch.Tensor
    accepted: torch.Tensor
    source: torch.Tensor


def exchange(chains: ChainState, scales: torch.Tensor, *, parity: int, generator: torch.Generator) -> tuple[ChainState, Swaps]:
    """Try to swap rungs (0, 1), (2, 3), ... for parity 0 and (1, 2), (3, 4), ... for parity 1; exact.

    Equation: accept with min(1, exp((s_i - s_j) (U_i - U_j) / kT)), which leaves the product of all rungs' densities
    invariant for either parity, and so for parities in turn (doi:10.1103/PhysRevLett.57.2607; deterministic
    even-odd swaps: doi:10.1111/rssb.12464). Velocities are independent of the rung and go with the positions.

    Args:
        chains: [ladder * rung], rungs innermost; log_density is -s_r U / kT.
        scales: [rung] s_r.
        parity: 0 or 1.
        generator: one uniform per pair.
    """
    rungs = len(scales)
    cold = chains.log_density.reshape(-1, rungs) / scales  # -U / kT
    ladders = len(cold)
    first = torch.arange(parity, rungs - 1, 2)
    second = first + 1
    here = scales[first] * cold[:, first] + scales[second] * cold[:, second]
    there = scales[first] * cold[:, second] + scales[second] * cold[:, first]
    accepted = accept(log_ratio(here, there, torch.zeros_like(here), torch.zeros_like(here)), generator)
    source = torch.arange(rungs).repeat(ladders, 1)
    source[:, first] = torch.where(accepted, second, first)
    source[:, second] = torch.where(accepted, first, second)
    index = (source + rungs * torch.arange(ladders)[:, None]).flatten()
    moved = (source != torch.arange(rungs)).flatten()
    density = (cold.gather(1, source) * scales).flatten()
    velocities = None if chains.velocities is None else chains.velocities[index]
    swapped = ChainState(
        state=State(positions=chains.state.positions[index]),
        log_density=torch.where(moved, density, chains.log_density),  # who stays keeps its density to the last bit
        velocities=velocities,
    )
    return swapped, Swaps(first=first, accepted=accepted, source=source)


@dataclass(frozen=True, kw_only=True)
class TemperingPlan:
    """What is run, in cycles: the local kernel on all rungs, then one round of swaps.

    Attributes:
        temperatures_K: of the rungs, the temperature of interest first.
        cycles: cycles of production.
        burn_in: cycles before it, not saved.
        save_every: cycles between two saved states of the cold rung.
        checkpoint_every: cycles between two checkpoints.
    """

    temperatures_K: tuple[float, ...]
    cycles: int
    burn_in: int
    save_every: int
    checkpoint_every: int

    @property
    def total(self) -> int:
        """Burn-in and production."""
        return self.burn_in + self.cycles


@dataclass(frozen=True, kw_only=True)
class TemperingResult:
    """Samples of the cold rung and how the ladders worked.

    Attributes:
        positions: [saved, ladder, atom, 3] float32 nm.
        log_density: [saved, ladder, rung] float64, -s_r U / kT of every rung.
        swap_acceptance: [pair] accepted fraction of the swaps of rungs r and r + 1 in production; NaN where none was tried.
        round_trips: [ladder] walkers that went from the cold rung to the hottest and back, in production.
        tally: counts and times.
    """

    positions: np.ndarray
    log_density: np.ndarray
    swap_acceptance: np.ndarray
    round_trips: np.ndarray
    tally: Tally


@dataclass(kw_only=True)
class _Walk:
    """Who is where, what the swaps did, and samples since the last checkpoint."""

    walkers: torch.Tensor  # [ladder, rung] who is there
    behind: torch.Tensor  # [ladder, walker] which ends it has behind it
    round_trips: torch.Tensor  # [ladder]
    tried: torch.Tensor  # [pair]
    swapped: torch.Tensor  # [pair]
    positions: list[np.ndarray] = field(default_factory=list)
    log_density: list[np.ndarray] = field(default_factory=list)

    @classmethod
    def begin(cls, ladders: int, rungs: int) -> _Walk:
        pairs = torch.zeros(rungs - 1, dtype=torch.int64)
        walkers = torch.arange(rungs).repeat(ladders, 1)
        trips = torch.zeros(ladders, dtype=torch.int64)
        return cls(walkers=walkers, behind=torch.zeros_like(walkers), round_trips=trips, tried=pairs, swapped=pairs.clone())

    def follow(self, swaps: Swaps, *, production: bool) -> None:
        """Move the walkers; count trips and swaps where this is production."""
        self.walkers = self.walkers.gather(1, swaps.source)
        cold, hot = self.walkers[:, :1], self.walkers[:, -1:]
        returned = self.behind.gather(1, cold) == _VIA_HOT
        self.behind = self.behind.scatter(1, cold, _AT_COLD)
        outward = self.behind.gather(1, hot)
        self.behind = self.behind.scatter(1, hot, torch.where(outward == _AT_COLD, _VIA_HOT, outward))
        if production:
            self.round_trips = self.round_trips + returned[:, 0]
            self.tried[swaps.first] += len(swaps.accepted)
            self.swapped[swaps.first] += swaps.accepted.sum(0)

    def save(self, chains: ChainState) -> None:
        ladders, rungs = self.walkers.shape
        x = chains.state.positions
        self.positions.append(x.reshape(ladders, rungs, *x.shape[1:])[:, 0].numpy().astype(np.float32))
        self.log_density.append(chains.log_density.reshape(ladders, rungs).numpy().copy())

    def counters(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, name).numpy() for name in ("walkers", "behind", "round_trips", "tried", "swapped")}


def run_tempering(
    kernel: Kernel, chains: ChainState, plan: TemperingPlan, *, generator: torch.Generator, folder: StateFolder, label: str
) -> TemperingResult:
    """Run all ladders, or continue them from the newest checkpoint in `folder` with the same result to the bit.

    Args:
        kernel: local moves of all rungs, exact for exp(-s_r U / kT) on rung r (see `ScaledPotential`).
        chains: [ladder * rung], rungs innermost; log_density is -s_r U / kT. Ignored where there is a checkpoint.
        plan: temperatures and lengths.
        generator: the run's only random stream.
        folder: where blocks and checkpoints go.
        label: what progress is called.

    Raises:
        LongstrideError: the chains are not whole ladders of at least two rungs.
    """
    scales = scales_of(plan.temperatures_K)
    rungs = len(scales)
    if rungs < 2 or len(chains.log_density) % rungs:
        raise LongstrideError(f"{len(chains.log_density)} chains are not whole ladders of {rungs} (at least 2) rungs")
    walk, tally, first = _Walk.begin(len(chains.log_density) // rungs, rungs), Tally(), 0
    saved = folder.latest()
    if saved is not None:
        chains, walk, tally, first = *_restore(saved.arrays, saved.meta, generator=generator), saved.step
    progress = Progress(label, plan.total, "cycles", start=first)
    begin = time.monotonic()
    for cycle in range(first + 1, plan.total + 1):
        production = cycle > plan.burn_in
        chains, info = kernel(chains, generator)
        tally.count(info, production=production)
        chains, swaps = exchange(chains, scales, parity=cycle % 2, generator=generator)
        walk.follow(swaps, production=production)
        if production and (cycle - plan.burn_in) % plan.save_every == 0:
            walk.save(chains)
        if cycle == plan.burn_in or cycle % plan.checkpoint_every == 0 or cycle == plan.total:
            begin = _lap(tally, begin, production=production)
            _checkpoint(folder, cycle, chains, walk, tally=tally, generator=generator)
        progress.update(cycle, _note(walk))
    return _collect(folder, walk, tally)


def _lap(tally: Tally, begin: float, *, production: bool) -> float:
    now = time.monotonic()
    tally.sampling_s += (now - begin) * production
    tally.burn_in_s += (now - begin) * (not production)
    return now


def _note(walk: _Walk) -> str:
    if not walk.tried.all():
        return "burn-in"
    return f"swaps {float((walk.swapped / walk.tried).min()):.2f} or more, {int(walk.round_trips.sum())} round trips"


def _checkpoint(
    folder: StateFolder, cycle: int, chains: ChainState, walk: _Walk, *, tally: Tally, generator: torch.Generator
) -> None:
    if walk.positions:
        arrays = {"positions": np.stack(walk.positions), "log_density": np.stack(walk.log_density)}
        folder.save_block(tally.blocks, arrays)
        tally.blocks += 1
        walk.positions, walk.log_density = [], []
    arrays = {
        "positions": chains.state.positions.numpy(),
        "log_density": chains.log_density.numpy(),
        "generator": generator.get_state().numpy(),
        **walk.counters(),
    }
    if chains.velocities is not None:
        arrays["velocities"] = chains.velocities.numpy()
    folder.save(cycle, arrays, vars(tally))


def _restore(
    arrays: dict[str, np.ndarray], meta: dict[str, Any], *, generator: torch.Generator
) -> tuple[ChainState, _Walk, Tally]:
    found: dict[str, Any] = {name: torch.from_numpy(value.copy()) for name, value in arrays.items()}
    generator.set_state(found.pop("generator"))
    chains = ChainState(
        state=State(positions=found.pop("positions")),
        log_density=found.pop("log_density"),
        velocities=found.pop("velocities", None),
    )
    return chains, _Walk(**found), Tally(**meta)


def _collect(folder: StateFolder, walk: _Walk, tally: Tally) -> TemperingResult:
    blocks = [folder.read_block(index) for index in range(tally.blocks)]
    with np.errstate(invalid="ignore"):
        rates = walk.swapped.numpy() / walk.tried.numpy()
    return TemperingResult(
        positions=np.concatenate([block["positions"] for block in blocks]),
        log_density=np.concatenate([block["log_density"] for block in blocks]),
        swap_acceptance=rates,
        round_trips=walk.round_trips.numpy(),
        tally=tally,
    )
