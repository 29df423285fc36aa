"""Sample folders of methods mts and sts with known statistics: atoms on springs about a structure, exact in everything."""

from __future__ import annotations

import numpy as np

from longstride.data.atomic import write_arrays
from longstride.data.manifest import write_manifest
from longstride.dynamics.masses import repartitioned_masses
from longstride.units import BOLTZMANN_KJ_PER_MOL_K

STIFFNESS = 80_000.0  # kJ/mol/nm^2, every atom to its place
TEMPERATURE_K = 310.0


def write_dynamics(
    folder, molecule, *, method, seed, frames=60, replicas=3, heat=1.0, timestep_fs=None, seconds=None, drift_nm=0.0, **changes
):
    """Write one sample folder; `heat` is the real temperature over the nominal one, `drift_nm` a shift per frame."""
    generator = np.random.default_rng(seed)
    kT = BOLTZMANN_KJ_PER_MOL_K * TEMPERATURE_K * heat
    masses = repartitioned_masses(molecule.system, 3.024)
    shape = (frames, replicas, molecule.system.n_atoms, 3)
    away = np.sqrt(kT / STIFFNESS) * generator.normal(size=shape)
    velocities = np.sqrt(kT / masses)[:, None] * generator.normal(size=shape)
    walk = np.cumsum(drift_nm * generator.normal(size=(frames, replicas, 1, 3)), axis=0)
    arrays = {
        "positions": (molecule.positions + away + walk).astype(np.float32),
        "velocities": velocities.astype(np.float32),
        "potential_energy": -9e4 + 0.5 * STIFFNESS * (away**2).sum(axis=(2, 3)),
        "kinetic_energy": 0.5 * (masses[:, None] * velocities**2).sum(axis=(2, 3)),
    }
    folder.mkdir(parents=True)
    write_arrays(folder / "samples.safetensors", arrays)
    content = {
        "system": molecule.system.name, "method": method, "target": "springs", "invariance": "unadjusted",
        "physical_time": True, "save_every": 0.02, "seed": seed, "system_hash": molecule.system_hash,
        "temperature_K": TEMPERATURE_K, "masses_Da": masses.tolist(), "friction_per_ps": 1.0,
        "timestep_fs": timestep_fs or (4.0 if method == "mts" else 1.0),
        "box_nm": None if molecule.box is None else molecule.box.tolist(),
        "counts": {"force_calls": 300, "energy_calls": 0, "student_calls": 1200 * (method == "mts"), "steps": 300},
        "acceptance": None, "provenance": {},
        "timing": {"sampling_s": seconds or (2.0 if method == "mts" else 8.0), "burn_in_s": 0.5, "threads": 1},
    }  # fmt: skip
    content = {key: value for key, value in (content | changes).items() if value != "left out"}
    write_manifest(folder, kind="samples", files=["samples.safetensors"], content=content)
    return folder


def write_sides(root, molecule, *, seeds=3, mts=None, sts=None, **both):
    """Write all seeds of both methods under `root`/<method>/seed<k> and return the two lists of folders."""
    changes = {"mts": {**both, **(mts or {})}, "sts": {**both, **(sts or {})}}
    return tuple(
        [
            write_dynamics(root / method / f"seed{k}", molecule, method=method, seed=100 * offset + k, **changes[method])
            for k in range(seeds)
        ]
        for offset, method in enumerate(("mts", "sts"), start=1)
    )
