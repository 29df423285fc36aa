"""Stage `free-energy`: an independent reference for the free energy of phi, by umbrella sampling and WHAM.

No flow and no Metropolis-Hastings take part, only Langevin dynamics under restraints, so that an agreement of this
number with an exact chain's tests both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from longstride.analysis.estimate import undefined
from longstride.analysis.features import find_torsions, load_topology
from longstride.analysis.free_energy import bin_edges
from longstride.analysis.tables import write_csv
from longstride.analysis.umbrella import UmbrellaResult, analyse_umbrella
from longstride.data.atomic import write_arrays
from longstride.data.checkpoint import fingerprint, open_state
from longstride.data.manifest import write_manifest
from longstride.dynamics.integrators import whole_steps
from longstride.dynamics.masses import repartitioned_masses
from longstride.dynamics.umbrella import UmbrellaPlan, UmbrellaSamples, can_turn, run_umbrella
from longstride.fingerprints import code_version
from longstride.progress import format_duration
from longstride.provenance import provenance
from longstride.seeds import job_seed
from longstride.stages.target import target_potential
from longstride.systems import load_prepared
from longstride.units import FS_PS, thermal_energy

if TYPE_CHECKING:
    from pathlib import Path

    from longstride.analysis.features import Torsions
    from longstride.config import FreeEnergyConfig, PhysicsConfig
    from longstride.systems import Prepared

THREADS = 1  # a batch of small molecules gains little from more; the other stages use the other cores


def run(
    section: FreeEnergyConfig, *, physics: PhysicsConfig, prepared: Path, out: Path, state: Path, seed: int, threads: int
) -> None:
    """Write free_energy_phi.csv, umbrella.safetensors and the manifest with Delta F; continue where a killed attempt stopped.

    A molecule without a (phi, psi) pair that can be turned gets a manifest that says so instead of a number.

    Raises:
        LongstrideError: the batched engine does not know a force.
        NumericsError: the dynamics diverged.
        DataError: the windows do not overlap.
    """
    used = min(threads, THREADS)
    torch.set_num_threads(used)
    molecule = load_prepared(prepared)
    torsions = find_torsions(load_topology(prepared / "structure.pdb"))
    identity = {
        "system": molecule.system.name,
        "target": molecule.target,
        "system_hash": molecule.system_hash,
        "temperature_K": physics.temperature_K,
        "method": "umbrella",
        "invariance": "unadjusted",
    }
    reason = unsuitable(molecule, torsions)
    if reason is not None:
        _write_undefined(identity, reason, out)
        return
    plan = plan_of(section, torsions, kT=thermal_energy(physics.temperature_K))
    # single precision is wrong by 1e-4 kT, far below the statistical error, and several times faster
    potential = target_potential(
        molecule, section.energies, compile=section.compile_energy, dtype=torch.float32, key="free_energy.energies"
    )
    masses = torch.from_numpy(repartitioned_masses(molecule.system, section.hydrogen_mass_Da))
    generator = torch.Generator().manual_seed(job_seed(seed, "umbrella"))
    key = fingerprint(section.model_dump(), physics.model_dump(), molecule.system_hash, seed, code_version("free_energy"))
    with open_state(state, key) as folder:
        samples = run_umbrella(plan, molecule, potential, masses=masses, generator=generator, folder=folder)
        result = analyse_umbrella(
            samples.torsions,
            centers=(plan.centers(0), plan.centers(1)),
            stiffness_kT=[value / plan.kT for value in plan.stiffness],
            bins=section.bins,
            replicates=section.bootstrap,
            seed=job_seed(seed, "bootstrap"),
        )
        timing = {"sampling_s": samples.wall_s, "threads": used}
        content = {**identity, "torsions": [torsions.names[k] for k in torsions.pair or ()], "timing": timing}
        _write(section, plan, samples, result, content=content, out=out)
        folder.clear()


def unsuitable(molecule: Prepared, torsions: Torsions) -> str | None:
    """Return why umbrella sampling cannot be done for this molecule, or None."""
    if torsions.pair is None:
        return "no (phi, psi) pair"
    for k in torsions.pair:
        atoms = tuple(int(atom) for atom in torsions.indices[k])
        if not can_turn(molecule.system, atoms):
            return f"{torsions.names[k]} lies in a ring"
    return None


def _write_undefined(identity: dict[str, Any], reason: str, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    content = {
        **identity,
        "torsions": [],
        "delta_f": undefined(reason).to_json(),
        "simulated_ps": 0.0,
        "counts": {"force_calls": 0},
        "timing": {"sampling_s": 0.0},
        "smallest_overlap": None,
        "provenance": provenance(),
    }
    write_manifest(out, kind="free-energy", files=[], content=content)
    print(f"free-energy: undefined for {identity['system']}: {reason}")


def plan_of(section: FreeEnergyConfig, torsions: Torsions, *, kT: float) -> UmbrellaPlan:
    """Return the plan for the (phi, psi) pair that `compare` shows; `unsuitable` has found that there is one."""
    assert torsions.pair is not None
    phi, psi = ((int(a), int(b), int(c), int(d)) for a, b, c, d in (torsions.indices[k] for k in torsions.pair))
    dt = section.timestep_fs * FS_PS
    return UmbrellaPlan(
        torsions=(phi, psi),
        windows=section.windows,
        stiffness=section.stiffness_kJ_per_mol,
        kT=kT,
        dt=dt,
        friction=section.friction_per_ps,
        steps_per_cycle=whole_steps(section.save_every_ps, dt),
        n_discard=round(section.equilibration_ps / section.save_every_ps),
        n_cycles=round(section.length_ps / section.save_every_ps),
        checkpoint_every=max(1, round(section.checkpoint_every_ps / section.save_every_ps)),
    )


def _write(
    section: FreeEnergyConfig,
    plan: UmbrellaPlan,
    samples: UmbrellaSamples,
    result: UmbrellaResult,
    *,
    content: dict[str, Any],
    out: Path,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_arrays(out / "umbrella.safetensors", {"torsions": samples.torsions})
    edges = np.degrees(bin_edges(section.bins))
    profile = result.profile
    rows = [
        {"phi_deg": float(middle), "F_kT": float(value), "error_kT": float(error)}
        for middle, value, error in zip((edges[1:] + edges[:-1]) / 2, profile.values, profile.errors, strict=True)
    ]
    write_csv(out / "free_energy_phi.csv", ("phi_deg", "F_kT", "error_kT"), rows)
    windows = plan.windows[0] * plan.windows[1]
    delta_f = result.delta_f
    full = {
        **content,
        "delta_f": delta_f.to_json(),
        "windows": list(plan.windows),
        "stiffness_kJ_per_mol": list(plan.stiffness),
        "length_ps": section.length_ps,
        "simulated_ps": windows * plan.total * section.save_every_ps,
        "counts": {"force_calls": windows * plan.total * (plan.steps_per_cycle + 1)},
        "exchange": [float(value) for value in samples.exchange],
        "smallest_overlap": result.smallest_overlap,
        "provenance": provenance(),
    }
    files = ["umbrella.safetensors", "free_energy_phi.csv"]
    write_manifest(out, kind="free-energy", files=files, content=full)
    print(
        f"free-energy: {full['torsions'][0]} < 0 to >= 0: {delta_f.value:.3f} kT ({delta_f.low:.3f} to {delta_f.high:.3f});"
        f" {full['simulated_ps']:.0f} ps in {format_duration(samples.wall_s)}, overlap {result.smallest_overlap:.2f}"
    )
