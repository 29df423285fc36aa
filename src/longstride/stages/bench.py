"""Speed and agreement of the energy functions, measured in one run on one machine.

Every rate is configurations per second, the best of several windows after a warm-up, so that a disturbance by
other work on the machine slows neither side of a ratio. Both sides get their best arrangement: torch with one
thread or all, OpenMM with one pinned process, its default threads, or one pinned process per core.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import openmm
import torch

from longstride.compute import available_cores, pinned_workers
from longstride.config import validate
from longstride.potentials.amber import AmberPotential, compiler_available
from longstride.potentials.openmm import OpenMMPotential
from longstride.provenance import provenance
from longstride.state import State, System
from longstride.systems import prepare_sequence
from longstride.units import thermal_energy

if TYPE_CHECKING:
    from collections.abc import Callable

    from longstride.config import PhysicsConfig
    from longstride.systems import Prepared

PARITY_CONFIGURATIONS = 64  # the Reference platform interprets the Born expressions, about 2 ms each
OPENMM_CONFIGURATIONS = 128
KINDS = ("energies_per_s", "energies_and_forces_per_s")
WINDOWS, WINDOW_SECONDS = 5, 0.3


def energies(*, sequence: str, batch: int, threads: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Measure batched torch energies against OpenMM's CPU platform, and their agreement in float64.

    Args:
        sequence: peptide, such as "ACE-ALA-NME" or "AA".
        batch: configurations per torch call.
        threads: cores for either side.
        dtype: precision of the timed torch evaluation.

    Returns:
        JSON values: `torch` (eager, compiled; null without a compiler) and `openmm` rates in 1/s, `ratio` of each torch
        mode to OpenMM, both in their best arrangement, `parity` in float64, `precision` of the timed type in kJ/mol and
        kT, peak memory, provenance.
    """
    physics = validate({}).physics
    molecule = prepared(sequence, physics)
    exact = AmberPotential.from_openmm(molecule.openmm_system, molecule.system, name=molecule.target)
    generator = torch.Generator().manual_seed(0)
    x = thermal_configurations(exact, molecule.positions, count=batch, temperature_K=physics.temperature_K, generator=generator)
    ours = _torch_rates(molecule, x.to(dtype), threads)
    theirs = _openmm_rates(molecule, x[:OPENMM_CONFIGURATIONS].numpy(), threads)
    return {
        "system": sequence,
        "atoms": molecule.system.n_atoms,
        "target": molecule.target,
        "batch": batch,
        "threads": threads,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": ours,
        "openmm": theirs,
        "ratio": {mode: _ratio(rates, theirs) for mode, rates in ours.items() if rates is not None},
        "parity": parity(exact, molecule.openmm_system, x[:PARITY_CONFIGURATIONS]),
        "precision": _precision(exact, molecule, x, dtype=dtype, kT=thermal_energy(physics.temperature_K)),
        "peak_memory_MiB": round(
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        ),
        "provenance": provenance(),
    }


def prepared(sequence: str, physics: PhysicsConfig) -> Prepared:
    """Return the molecule of a sequence in some physics, as `longstride prepare` makes it."""
    return prepare_sequence(sequence, name=sequence, force_field=physics.force_field, cutoff_nm=physics.cutoff_nm)


def thermal_configurations(
    potential: AmberPotential,
    minimum: np.ndarray,
    *,
    count: int,
    temperature_K: float,
    generator: torch.Generator,
    softest: float = 3000.0,
) -> torch.Tensor:
    """Draw from the harmonic approximation of exp(-U/kT) around a minimum.

    x = x0 + sum_m sqrt(kT/lambda_m) xi_m v_m over the Hessian's modes m with xi_m standard normal; overall translation,
    rotation and other modes softer than `softest` get its width, so that bonds stay thermal.

    Args:
        potential: float64; its Hessian is taken by central differences of the forces.
        minimum: [atom, 3] nm.
        count: configurations.
        temperature_K: temperature.
        generator: source of randomness.
        softest: kJ/mol/nm^2.

    Returns:
        [count, atom, 3] nm float64.
    """
    step = 1e-5
    start = torch.from_numpy(minimum).double()
    n = start.numel()
    shifts = step * torch.eye(n, dtype=torch.float64).reshape(n, -1, 3)
    ahead = potential.energy_forces(State(positions=start + shifts))[1].reshape(n, n)
    behind = potential.energy_forces(State(positions=start - shifts))[1].reshape(n, n)
    hessian = (behind - ahead) / (2 * step)
    stiffness, modes = torch.linalg.eigh((hessian + hessian.T) / 2)
    width = torch.sqrt(thermal_energy(temperature_K) / stiffness.clamp(min=softest))
    xi = torch.randn(count, n, generator=generator, dtype=torch.float64)
    return start + ((xi * width) @ modes.T).reshape(count, -1, 3)


def parity(exact: AmberPotential, openmm_system: openmm.System, x: torch.Tensor) -> dict[str, float]:
    """Compare a float64 potential with OpenMM's Reference platform.

    Returns:
        maximum over configurations of |dE|/max(|E|, 1 kJ/mol), of rms |dF| / rms |F| over the atoms, and of the largest |dF|
        of an atom / rms |F|.
    """
    state = State(positions=x)
    energy, forces = exact.energy_forces(state)
    truth, true_forces = OpenMMPotential(openmm_system, exact.system, name=exact.name, platform="Reference").energy_forces(
        state
    )
    wrong = (forces - true_forces).norm(dim=2)
    rms = true_forces.norm(dim=(1, 2)) / math.sqrt(x.shape[1])
    return {
        "max_relative_energy_error": float(((energy - truth).abs() / truth.abs().clamp(min=1.0)).max()),
        "max_relative_force_error": float((wrong.square().mean(1).sqrt() / rms).max()),
        "max_relative_force_error_of_an_atom": float((wrong.amax(1) / rms).max()),
        "configurations": len(x),
    }


def _precision(
    exact: AmberPotential, molecule: Prepared, x: torch.Tensor, *, dtype: torch.dtype, kT: float
) -> dict[str, float]:
    """Energy error of the timed type against float64 at the same (rounded) positions."""
    rounded = x.to(dtype)
    rough = AmberPotential.from_openmm(molecule.openmm_system, molecule.system, name=molecule.target, dtype=dtype)
    error = rough.energy(State(positions=rounded)).double() - exact.energy(State(positions=rounded.double()))
    rms, largest = float(error.square().mean().sqrt()), float(error.abs().max())
    return {
        "rms_kJ_per_mol": rms,
        "max_kJ_per_mol": largest,
        "rms_kT": rms / kT,
        "max_kT": largest / kT,
    }


def _rate(call: Callable[[], object], count: int) -> float:
    """Return configurations per second of a call that evaluates `count`: the best window after a warm-up."""
    call()
    start = time.perf_counter()
    call()
    repeats = max(1, round(WINDOW_SECONDS / (time.perf_counter() - start)))
    best = 0.0
    for _ in range(WINDOWS):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        best = max(best, repeats * count / (time.perf_counter() - start))
    return best


def _rates(potential: AmberPotential | OpenMMPotential, x: torch.Tensor) -> dict[str, float]:
    state = State(positions=x)
    return {
        "energies_per_s": _rate(lambda: potential.energy(state), len(x)),
        "energies_and_forces_per_s": _rate(lambda: potential.energy_forces(state), len(x)),
    }


def _torch_rates(molecule: Prepared, x: torch.Tensor, threads: int) -> dict[str, Any]:
    """Rates of eager and compiled torch; compiled is None where there is no compiler."""
    result: dict[str, Any] = {}
    for mode in ("eager", "compiled"):
        if mode == "compiled" and not compiler_available():
            result[mode] = None
            continue
        potential = AmberPotential.from_openmm(
            molecule.openmm_system, molecule.system, name=molecule.target, dtype=x.dtype, compile=mode == "compiled"
        )
        found, first = {}, {}
        for count in sorted({1, threads}):
            torch.set_num_threads(count)
            name = f"{count} thread{'s' if count > 1 else ''}"
            start = time.perf_counter()
            potential.energy(State(positions=x))
            potential.energy_forces(State(positions=x))
            first[name] = time.perf_counter() - start
            found[name] = _rates(potential, x)
        result[mode] = {"best": _best(found), "arrangements": found, "first_calls_s": first, "block": potential.block}
    return result


def _best(found: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Return the best rate of each kind and the arrangement that gave it."""
    best: dict[str, Any] = {}
    for kind in KINDS:
        name = max(found, key=lambda item: found[item][kind])
        best |= {kind: found[name][kind], f"{kind}_by": name}
    return best


def _ratio(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    return {kind: ours["best"][kind] / theirs["best"][kind] for kind in KINDS}


def _openmm_rates(molecule: Prepared, x: np.ndarray, threads: int) -> dict[str, Any]:
    """Rates of OpenMM's CPU platform in its sensible arrangements, and the best of each."""
    xml = openmm.XmlSerializer.serialize(molecule.openmm_system)
    arrangements = {"one pinned process, 1 thread": (1, 1)}
    if threads > 1:
        arrangements[f"one process, {threads} threads, not pinned"] = (0, threads)
        arrangements[f"{threads} pinned processes, 1 thread each"] = (threads, 1)
    found = {name: _openmm_arrangement(xml, molecule.system, x, plan=plan) for name, plan in arrangements.items()}
    return {"platform": "CPU", "best": _best(found), "arrangements": found}


def _openmm_arrangement(xml: str, system: System, x: np.ndarray, *, plan: tuple[int, int]) -> dict[str, float]:
    """Sum the rates of `processes` pinned workers running at once; 0 stands for this process, not pinned."""
    processes, threads = plan
    if processes == 0:
        return _openmm_worker(xml, system, x, threads)
    with pinned_workers(min(processes, len(available_cores()))) as pool:
        results = list(pool.map(_openmm_worker, *zip(*[(xml, system, x, threads)] * processes, strict=True)))
    return {kind: sum(result[kind] for result in results) for kind in results[0]}


def _openmm_worker(xml: str, system: System, x: np.ndarray, threads: int) -> dict[str, float]:
    potential = OpenMMPotential(openmm.XmlSerializer.deserialize(xml), system, name="openmm", platform="CPU", threads=threads)
    return _rates(potential, torch.from_numpy(x))


def table(result: dict[str, Any]) -> str:
    """Return the result of `energies` as text."""
    sides = {f"torch {mode}": rates for mode, rates in result["torch"].items() if rates is not None}
    sides["OpenMM CPU"] = result["openmm"]
    lines = [
        f"{result['system']}: {result['atoms']} atoms, {result['target']}, batch {result['batch']}, {result['dtype']},"
        f" {result['threads']} cores",
        f"  {'':<24}{'energies/s':>14}{'energy+forces/s':>18}",
    ]
    for name, rates in sides.items():
        lines.append(
            f"  {name:<24}"
            + "".join(f"{rates['best'][kind]:>{width},.0f}" for kind, width in zip(KINDS, (14, 18), strict=True))
        )
    for mode, ratio in result["ratio"].items():
        name = f"{mode} / OpenMM"
        lines.append(
            f"  {name:<24}" + "".join(f"{ratio[kind]:>{width}.1f}" for kind, width in zip(KINDS, (14, 18), strict=True))
        )
    agreement, rough = result["parity"], result["precision"]
    return "\n".join(
        [
            *lines,
            *(f"  best arrangement of {name}: {rates['best']['energies_per_s_by']}" for name, rates in sides.items()),
            f"  float64 parity: energies {agreement['max_relative_energy_error']:.1e} (max relative),"
            f" forces {agreement['max_relative_force_error']:.1e} (rms relative)",
            f"  {result['dtype']} energy error: {rough['rms_kT']:.1e} kT rms, {rough['max_kT']:.1e} kT max",
            f"  peak memory {result['peak_memory_MiB']} MiB",
        ]
    )
