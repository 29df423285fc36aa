"""Method `metadynamics`: well-tempered metadynamics of phi and psi with OpenMM, then weighted samples on the frozen bias."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import openmm

from longstride.analysis.features import find_torsions, load_topology
from longstride.analysis.weighted import kish_size
from longstride.data.atomic import write_arrays
from longstride.data.checkpoint import fingerprint, open_state
from longstride.data.frames import start_positions
from longstride.data.manifest import read_manifest, write_manifest
from longstride.dynamics.masses import repartitioned_masses
from longstride.dynamics.metadynamics import MetadynamicsPlan, MetadynamicsResult, run_metadynamics, torsion_variable
from longstride.dynamics.openmm_md import with_masses
from longstride.errors import LongstrideError
from longstride.fingerprints import code_version
from longstride.provenance import provenance
from longstride.seeds import job_seed
from longstride.systems import load_prepared
from longstride.units import FS_PS

if TYPE_CHECKING:
    from pathlib import Path

    from longstride.analysis.features import Torsions
    from longstride.config import MetadynamicsSampling, PhysicsConfig
    from longstride.systems import Prepared


def run_metadynamics_method(
    section: MetadynamicsSampling,
    *,
    physics: PhysicsConfig,
    prepared: Path,
    reference: Path,
    out: Path,
    state: Path,
    seed: int,
    threads: int,
) -> None:
    """Write weighted samples, the bias and the manifest; starts are reference frames from all basins.

    `log_weights` [save, walker] of samples.safetensors is V / kT: averages over exp(log_weights) are those of the target.

    Raises:
        LongstrideError: the molecule has no residue with both phi and psi of that number.
        NumericsError: the dynamics diverged; the last good state is kept.
    """
    molecule = load_prepared(prepared)
    pair = chosen_pair(find_torsions(load_topology(prepared / "structure.pdb")), section.residue, name=molecule.system.name)
    plan = _plan(section, molecule, pair, temperature_K=physics.temperature_K, seed=seed)
    source = read_manifest(reference, kind="reference", verify=False)["files"]
    version = code_version("sample_metadynamics")
    key = fingerprint(section.model_dump(), physics.model_dump(), molecule.system_hash, source, seed, version)
    starts = start_positions(reference, count=section.walkers, seed=job_seed(seed, "starts"))
    result = run_metadynamics(plan, starts, state=state, key=key, workers=threads, label="sample metadynamics")
    _write(section, result, plan=plan, molecule=molecule, pair=pair, out=out, threads=min(threads, section.walkers))
    with open_state(state, key) as folder:
        folder.clear()


def chosen_pair(torsions: Torsions, residue: int, *, name: str) -> dict[str, tuple[int, ...]]:
    """Return {name: four atoms} of the phi and psi that are biased.

    Args:
        torsions: of the molecule.
        residue: 0 for the pair that Ramachandran maps show, else the number of a residue that has both torsions, from 1 on,
            counted over those residues alone.
        name: of the molecule, for the error.

    Raises:
        LongstrideError: there is none.
    """
    atoms = dict(zip(torsions.names, (tuple(int(a) for a in four) for four in torsions.indices), strict=True))
    pairs = [(f"phi {where}", f"psi {where}") for where in (label.removeprefix("phi ") for label in torsions.names)]
    pairs = [pair for pair in pairs if pair[0] in atoms and pair[1] in atoms]
    if residue == 0 and torsions.pair is not None:
        names = tuple(torsions.names[k] for k in torsions.pair)
    elif 0 < residue <= len(pairs):
        names = pairs[residue - 1]
    else:
        raise LongstrideError(
            f"method metadynamics needs a residue with both phi and psi; {name!r} has {len(pairs)} of them, and"
            f" sample.metadynamics.residue is {residue}"
        )
    return {label: atoms[label] for label in names}


def _plan(
    section: MetadynamicsSampling,
    molecule: Prepared,
    pair: dict[str, tuple[int, ...]],
    *,
    temperature_K: float,
    seed: int,
) -> MetadynamicsPlan:
    masses = repartitioned_masses(molecule.system, section.hydrogen_mass_Da)
    dt = section.timestep_fs * FS_PS
    return MetadynamicsPlan(
        system_xml=openmm.XmlSerializer.serialize(with_masses(molecule.openmm_system, masses)),
        variables=tuple(torsion_variable(atoms, width=section.hill_width_rad, grid=section.grid) for atoms in pair.values()),
        temperature_K=temperature_K,
        timestep_fs=section.timestep_fs,
        friction_per_ps=section.friction_per_ps,
        bias_factor=section.bias_factor,
        height_kJ_per_mol=section.hill_height_kJ_per_mol,
        hill_every=round(section.hill_every_ps / dt),
        steps_per_round=round(section.share_every_ps / dt),
        equilibration=round(section.equilibration_ps / dt),
        fill_rounds=round(section.fill_ps / section.share_every_ps),
        rounds=round(section.length_ps / section.share_every_ps),
        steps_per_frame=round(section.save_every_ps / dt),
        seed=seed,
        advice="use a shorter sample.metadynamics.timestep_fs",
    )


def _write(
    section: MetadynamicsSampling,
    result: MetadynamicsResult,
    *,
    plan: MetadynamicsPlan,
    molecule: Prepared,
    pair: dict[str, tuple[int, ...]],
    out: Path,
    threads: int,
) -> None:
    write_arrays(out / "samples.safetensors", result.frames)
    write_arrays(out / "bias.safetensors", {"bias": result.bias})
    steps = plan.rounds * plan.steps_per_round * section.walkers
    before = (plan.equilibration + plan.fill_rounds * plan.steps_per_round) * section.walkers
    weights = result.frames["log_weights"]
    kish = kish_size(weights)
    content: dict[str, Any] = {
        "system": molecule.system.name,
        "method": "metadynamics",
        "target": molecule.target,
        "invariance": "unadjusted",
        # time under a bias is not the time of the target's dynamics
        "physical_time": False,
        "save_every": section.save_every_ps,
        "seed": plan.seed,
        "system_hash": molecule.system_hash,
        "temperature_K": plan.temperature_K,
        "timestep_fs": section.timestep_fs,
        "masses_Da": repartitioned_masses(molecule.system, section.hydrogen_mass_Da).tolist(),
        "weights": "log_weights",
        "kish_ess": kish.size,
        "kish_fraction": kish.fraction,
        "biased_torsions": list(pair),
        "bias": {
            "unit": "kJ/mol",
            "axes": list(pair)[::-1],
            "bias_factor": plan.bias_factor,
            "hills": plan.fill_rounds * plan.steps_per_round // plan.hill_every * section.walkers,
            "largest": float(np.ptp(result.bias)),
        },
        "counts": {
            "force_calls": steps,
            "energy_calls": weights.size,
            "steps": steps,
            "burn_in_force_calls": before,
        },
        "acceptance": None,
        # walkers run side by side, one per core: the machine is busy for the sum divided by the cores
        "timing": {
            "sampling_s": result.production_s / threads,
            "burn_in_s": result.fill_s / threads,
            "threads": threads,
        },
        "provenance": provenance(),
    }
    write_manifest(out, kind="samples", files=["samples.safetensors", "bias.safetensors"], content=content)
    timing = content["timing"]
    print(
        f"metadynamics: {section.walkers} walkers filled {' and '.join(pair)} in {timing['burn_in_s']:.1f} s and sampled"
        f" {section.length_ps:g} ps each in {timing['sampling_s']:.1f} s; weights leave {100 * (kish.fraction or 0):.0f} % of"
        f" {weights.size} frames"
    )
