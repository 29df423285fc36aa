"""Speed of the transferable flow on one core: proposals, complete exact steps, and what a proposal is made of.

Every point (a molecule and a number of chains) is measured in a fresh process with one thread, pinned to a core where one is
free. Within a point these are timed in turn, round after round after a warm-up, with OpenMM on the same core among them:

    proposal       draws y and scores both directions, log q(y | x) and log q(x | y), with nothing known of x
    step           the proposal, the target energy of y, and the decision: exact Metropolis-Hastings, as along a chain, where
                   what a proposal needs of x is known since x was proposed (`longstride.flows.notes`)
    its parts      sampling by the torsion network, the density of the stiff coordinates (two gradients of the force field at
                   y), coordinates (conversions and their volumes), target energy
    OpenMM         energies one by one, and steps of Langevin dynamics as method `md` makes them, on the CPU platform

Rates are medians over the rounds, ratios medians of the ratios of each round: other work on the machine slows both sides
alike. All is given in wall time and in processor time; `core_share` is how much of the core the process got, and where it is
far below 1 only processor time says what an idle core would do. Weights do not change the cost, so an untrained network of
the default sizes serves where no flow is given. The proposal that does not see x is measured; one that does has to score x
from y at every step as well.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import openmm
import torch

from longstride.compute import pinned_workers
from longstride.config import MDSampling, validate
from longstride.data.manifest import read_manifest
from longstride.dynamics.masses import repartitioned_masses
from longstride.dynamics.openmm_md import with_masses
from longstride.errors import DataError
from longstride.flows.stiff import Conditional, ForceFieldGaussian
from longstride.flows.torsion_network import TorsionArchitecture, TorsionNetwork
from longstride.flows.transferable import BoundMolecule, TransferableProposal, bind_all
from longstride.mcmc.metropolis import boltzmann, start_chains
from longstride.mcmc.timewarp import timewarp
from longstride.potentials.amber import AmberPotential, compiler_available
from longstride.potentials.openmm import OpenMMPotential
from longstride.progress import Progress
from longstride.provenance import provenance
from longstride.stages.bench import prepared
from longstride.stages.bench_mcmc import SEQUENCES
from longstride.stages.bench_measure import memory_MiB, peak_memory_MiB, rates_in_turn
from longstride.stages.flow_models import open_flow
from longstride.state import State
from longstride.units import FS_PS, thermal_energy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from longstride.flows.bound import BoundFlow
    from longstride.systems import Prepared

    Calls = dict[str, tuple[Callable[[], object], float]]  # name to what is called and how many things one call does

BATCHES, CHAINS = (1, 16, 64, 256, 1024), 256
ROUNDS, WINDOW_SECONDS = 5, 0.3
WHOLE = ("proposal", "step")
PARTS = ("network_sampling", "stiff_density", "coordinates", "target_energy")
ENERGIES, MD_STEPS = "openmm_energies", "openmm_md_steps"
OPENMM_CONFIGURATIONS, STEPS_PER_CALL, MD_WARM_UP_STEPS = 16, 20, 200
MEMORY = (
    "resident memory of a fresh process per point: after_set_up with the molecule bound and compiled code loaded, steps the"
    " highest during a proposal and a step, peak the highest of all, set-up included"
)
PRECISION = "torsion network float32; coordinates, stiff density and energies float64"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured.

    Attributes:
        sequence: peptide of the dependence on the number of chains.
        flow: folder of train-transfer; None: an untrained network.
        compile: compile the target; None: where a C++ compiler is found.
        batches: numbers of chains.
        sequences: peptides of the dependence on the number of atoms.
        chains: of that dependence.
        rounds: timings of each call.
        window_s: about how long each is repeated in a round, seconds.
    """

    sequence: str = "ACE-ALA-NME"
    flow: Path | None = None
    compile: bool | None = None
    batches: tuple[int, ...] = BATCHES
    sequences: tuple[str, ...] = SEQUENCES
    chains: int = CHAINS
    rounds: int = ROUNDS
    window_s: float = WINDOW_SECONDS


QUICK = Settings(batches=(1, 16), sequences=("GG",), chains=16, rounds=2, window_s=0.05)


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A flow bound to a molecule.

    Attributes:
        molecule: the molecule.
        potential: the target.
        flow: all proposals.
        proposal: the one that is measured.
        kT: thermal energy, kJ/mol.
        x: where the chains are.
    """

    molecule: Prepared
    potential: AmberPotential
    flow: BoundFlow
    proposal: TransferableProposal
    kT: float
    x: State


@dataclass(frozen=True, kw_only=True)
class KnownConditional(ForceFieldGaussian):
    """A stiff density whose mean and covariance were found before, to time what surrounds it.

    Attributes:
        known: q(s | t) at the torsions that will be asked for.
    """

    known: Conditional

    def at(self, t: Tensor) -> Conditional:
        """Return what is known, whatever the torsions."""
        return self.known


def flow(settings: Settings) -> dict[str, Any]:
    """Measure all points.

    Returns:
        JSON values; rates in 1/s, memory in MiB, `by_batch` and `by_atoms` as `measure` returns them.

    Raises:
        DataError: no transferable flow in the folder, or one for another potential.
    """
    origin = provenance()
    trained = None if settings.flow is None else read_manifest(settings.flow, kind="transferable")
    by_batch = [settings_of(settings, settings.sequence, chains) for chains in settings.batches]
    by_atoms = [settings_of(settings, sequence, settings.chains) for sequence in settings.sequences]
    points = list(dict.fromkeys((*by_batch, *by_atoms)))
    progress = Progress("bench flow", len(points), "points")
    found = {}
    for done, point in enumerate(points, start=1):
        found[point] = in_fresh_process(point)
        progress.update(done, f"{point.sequence}, {point.chains} chains")
    return {
        "system": settings.sequence,
        "flow": "untrained" if trained is None else trained["files"],
        "device": "cpu",
        "threads": 1,
        "precision": PRECISION,
        "timing": {"rates": "medians", "warm_up": "excluded", "rounds": settings.rounds, "window_s": settings.window_s},
        "memory": MEMORY,
        "md": MDSampling().model_dump(include={"timestep_fs", "friction_per_ps", "hydrogen_mass_Da"}),
        "by_batch": [found[point] for point in by_batch],
        "by_atoms": sorted((found[point] for point in by_atoms), key=lambda row: row["atoms"]),
        "provenance": origin,
    }


def settings_of(settings: Settings, sequence: str, chains: int) -> Settings:
    """Return the settings of a single point."""
    return replace(settings, sequence=sequence, chains=chains, batches=(), sequences=())


def in_fresh_process(point: Settings) -> dict[str, Any]:
    """Return `measure` of a point from a process of its own, whose memory nothing else has used."""
    with pinned_workers(1) as pool:
        return pool.submit(measure, point).result()


def measure(point: Settings) -> dict[str, Any]:
    """Measure one molecule with one number of chains in this process.

    Returns:
        JSON values: in wall and in processor time `proposals_per_s`, `milliseconds_per_call` (of `proposals_per_call`) of
        `WHOLE` and `PARTS`, the sum of the parts over the step, `openmm` rates, `ratios`, lowest and highest rates; the share
        of the core; memory; seconds of the set-up.
    """
    torch.set_num_threads(1)
    sampler, set_up_s = _sampler(point)
    resting, highest = memory_MiB("VmRSS"), memory_MiB("VmHWM")
    whole = _whole(sampler)
    used = peak_memory_MiB(*(call for call, _ in whole.values()))
    calls = {**whole, **_parts(sampler), **_openmm(sampler)}
    for call, _ in calls.values():
        call()
    rates = rates_in_turn(calls, rounds=point.rounds, window_s=point.window_s)
    counts = {name: count for name, (_, count) in calls.items()}
    target = sampler.proposal.molecule.gaussian.target
    return {
        "system": point.sequence,
        "atoms": sampler.molecule.system.n_atoms,
        "torsions": target.n_torsions,
        "stiff_coordinates": target.n_stiff,
        "chains": point.chains,
        "proposals_per_call": whole["step"][1],
        "compiled": sampler.potential.compiled,
        "core_share": median(w / c for found in rates.values() for w, c in zip(found.wall, found.cpu, strict=True)),
        "wall_time": _figures({name: found.wall for name, found in rates.items()}, counts),
        "cpu_time": _figures({name: found.cpu for name, found in rates.items()}, counts),
        "memory_MiB": {"after_set_up": resting, "steps": used, "peak": max(filter(None, (highest, used)), default=None)},
        "set_up_s": set_up_s,
        "pinned": hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) == 1,
    }


def _figures(rates: Mapping[str, Sequence[float]], counts: Mapping[str, float]) -> dict[str, Any]:
    """Return what follows from rates of each round, by one clock."""
    middle = {name: median(values) for name, values in rates.items()}
    times = {name: 1e3 * counts[name] / middle[name] for name in (*WHOLE, *PARTS)}
    return {
        "proposals_per_s": {name: middle[name] for name in WHOLE},
        "milliseconds_per_call": times,
        "parts_over_step": sum(times[name] for name in PARTS) / times["step"],
        "openmm": {"energies_per_s": middle[ENERGIES], "md_steps_per_s": middle[MD_STEPS]},
        "ratios": {
            "exact_proposals_per_openmm_energy": _ratio(rates["step"], rates[ENERGIES]),
            "openmm_md_steps_per_exact_proposal": _ratio(rates[MD_STEPS], rates["step"]),
        },
        "spread_per_s": {name: [min(values), max(values)] for name, values in rates.items()},
    }


def _ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return median(a / b for a, b in zip(above, below, strict=True))


def _sampler(point: Settings) -> tuple[Sampler, dict[str, float]]:
    """Return the bound flow, warmed up, and seconds of preparing the molecule, binding it, and the first step."""
    clock = [time.perf_counter()]
    physics = validate({}).physics
    molecule = prepared(point.sequence, physics)
    clock.append(time.perf_counter())
    compiled = compiler_available() if point.compile is None else point.compile
    potential = AmberPotential.from_openmm(molecule.openmm_system, molecule.system, name=molecule.target, compile=compiled)
    if point.flow is None:
        kT = thermal_energy(physics.temperature_K)
        bound = bind_all(untrained(), BoundMolecule.of(molecule, potential, kT=kT))
    else:
        opened = open_flow(point.flow, molecule, potential)
        bound, kT = opened.bound, thermal_energy(opened.temperature_K)
    proposal = bound.proposals[bound.independent] if bound.independent else None
    if not isinstance(proposal, TransferableProposal) or bound.states is None:
        raise DataError(f"{point.flow} holds no transferable flow; give a folder of train-transfer")
    x = State(positions=bound.states.repeat(-(-point.chains // len(bound.states)), 1, 1)[: point.chains])
    clock.append(time.perf_counter())
    sampler = Sampler(molecule=molecule, potential=potential, flow=bound, proposal=proposal, kT=kT, x=x)
    for call, _ in _whole(sampler).values():
        call()
    clock.append(time.perf_counter())
    seconds = [after - before for before, after in pairwise(clock)]
    return sampler, dict(zip(("prepare", "bind", "first_step"), seconds, strict=True))


def untrained() -> TorsionNetwork:
    """Return a network of the default sizes with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TorsionNetwork(TorsionArchitecture()).eval().requires_grad_(requires_grad=False)


def _whole(sampler: Sampler) -> Calls:
    """Return the proposal alone and the exact step, always from the same x, in the step with notes on it."""
    kernel = timewarp(sampler.flow, sampler.potential, kT=sampler.kT, independent_probability=1.0)
    chains = start_chains(boltzmann(sampler.potential, sampler.kT), sampler.x)
    generator = torch.Generator().manual_seed(1)
    chains, info = kernel(chains, generator)
    drawn = len(sampler.proposal.propose(sampler.x, generator)[0].positions)
    return {
        "proposal": (lambda: sampler.proposal.propose(sampler.x, generator), drawn),
        "step": (lambda: kernel(chains, generator), info.proposals * len(info.accepted)),
    }


@torch.no_grad()
def _parts(sampler: Sampler) -> Calls:
    """Return what a step consists of, each part with the inputs it has there."""
    proposal, x = sampler.proposal, sampler.x
    molecule, network = proposal.molecule, proposal.network
    gaussian, chains = molecule.gaussian, len(x.positions)
    generator = torch.Generator().manual_seed(2)
    y = proposal.propose(x, generator)[0]
    latent = molecule.encode(x.positions).latent
    tokens = proposal.tokens.repeat(chains)
    label = torch.full((chains,), proposal.label)
    t_x = gaussian.target.split(x.positions)[0].to(tokens.tokens.dtype)
    t_y = network.sample(tokens, network.context(tokens, t_x, label), generator)[0]
    at_y = _with_known(molecule, gaussian.at(t_y.double()))

    def sampling() -> object:
        copies = proposal.tokens.repeat(chains)
        return network.sample(copies, network.context(copies, t_x, label), generator)

    calls: dict[str, Callable[[], object]] = {
        "network_sampling": sampling,
        "stiff_density": lambda: gaussian.at(t_y.double()),
        "coordinates": lambda: at_y.decode(t_y.double(), latent, x.positions),
        "target_energy": lambda: sampler.potential.energy(y),
    }
    return {name: (torch.no_grad()(calls[name]), chains) for name in PARTS}


def _with_known(molecule: BoundMolecule, known: Conditional) -> BoundMolecule:
    return replace(molecule, gaussian=KnownConditional(**{**vars(molecule.gaussian), "known": known}))


def _openmm(sampler: Sampler) -> Calls:
    """Return energies and Langevin steps of OpenMM's CPU platform with one thread."""
    molecule, plan = sampler.molecule, MDSampling()
    potential = OpenMMPotential(molecule.openmm_system, molecule.system, name="openmm", platform="CPU", threads=1)
    states = sampler.flow.states
    assert states is not None  # for the type checker: `_sampler` has made sure
    x = State(positions=states[:OPENMM_CONFIGURATIONS])
    masses = repartitioned_masses(molecule.system, plan.hydrogen_mass_Da)
    temperature = validate({}).physics.temperature_K
    integrator = openmm.LangevinMiddleIntegrator(temperature, plan.friction_per_ps, plan.timestep_fs * FS_PS)
    integrator.setRandomNumberSeed(1)
    platform = openmm.Platform.getPlatformByName("CPU")
    context = openmm.Context(with_masses(molecule.openmm_system, masses), integrator, platform, {"Threads": "1"})
    context.setPositions(molecule.positions)
    context.setVelocitiesToTemperature(temperature, 1)
    context.getIntegrator().step(MD_WARM_UP_STEPS)
    return {
        ENERGIES: (lambda: potential.energy(x), len(x.positions)),
        MD_STEPS: (lambda: context.getIntegrator().step(STEPS_PER_CALL), STEPS_PER_CALL),
    }


def table(result: dict[str, Any]) -> str:
    """Return the result of `flow` as text."""
    network = "untrained network" if result["flow"] == "untrained" else "trained flow"
    rows = {(row["system"], row["chains"]): row for row in (*result["by_batch"], *result["by_atoms"])}.values()
    head = ("atoms", "chains", "core share", "proposals/s", "exact/s", "exact/CPU s", "MD steps/exact", "MiB")
    lines = [f"transferable flow, {network}, one core, medians of {result['timing']['rounds']} rounds:"]
    lines.append(f"  {'':<14}" + "".join(f"{name:>15}" for name in head))
    for row in rows:
        wall, cpu = row["wall_time"], row["cpu_time"]
        rates = (*wall["proposals_per_s"].values(), cpu["proposals_per_s"]["step"])
        steps = cpu["ratios"]["openmm_md_steps_per_exact_proposal"]
        numbers = (row["atoms"], row["chains"], f"{row['core_share']:.2f}", *(f"{rate:.1f}" for rate in rates), f"{steps:.2f}")
        shown = "".join(f"{value:>15}" for value in (*numbers, row["memory_MiB"]["peak"] or "-"))
        lines.append(f"  {row['system']:<14}{shown}")
    lines.append("CPU milliseconds of a call, one proposal of each chain:")
    lines.append(f"  {'':<14}{'chains':>8}" + "".join(f"{name.replace('_', ' '):>17}" for name in (*PARTS, "step")))
    for row in rows:
        times = row["cpu_time"]["milliseconds_per_call"]
        shown = "".join(f"{times[name]:>17.2f}" for name in (*PARTS, "step"))
        lines.append(f"  {row['system']:<14}{row['chains']:>8}{shown}")
    return "\n".join([*lines, "MiB: highest resident memory of a fresh process per point, set-up included"])
