"""Runs with known statistics: harmonic atoms about a structure, exact in positions, velocities and energies."""

import numpy as np

from longstride.analysis.dynamics_run import DynamicsRun
from longstride.state import System
from longstride.units import BOLTZMANN_KJ_PER_MOL_K

WATER = np.array([[0.0, 0.0, 0.0], [0.0957, 0.0, 0.0], [-0.024, 0.0927, 0.0]])
STIFFNESS = 40_000.0  # kJ/mol/nm^2, every atom to its place


def water(molecules=1):
    triples = 3 * np.arange(molecules)
    bonds = np.concatenate([[(i, i + 1), (i, i + 2)] for i in triples]) if molecules else np.zeros((0, 2), dtype=np.int64)
    return System(
        name="water",
        atomic_numbers=np.tile([8, 1, 1], molecules),
        masses=np.tile([15.999, 1.008, 1.008], molecules),
        bonds=bonds,
        atom_names=("O", "H1", "H2") * molecules,
        residue_names=("HOH",) * (3 * molecules),
        residue_indices=np.repeat(np.arange(molecules), 3),
    )


def free_atoms(numbers, masses=None):
    n = len(numbers)
    return System(
        name="atoms",
        atomic_numbers=np.asarray(numbers),
        masses=np.full(n, 10.0) if masses is None else np.asarray(masses, dtype=float),
        bonds=np.zeros((0, 2), dtype=np.int64),
        atom_names=tuple(f"A{i}" for i in range(n)),
        residue_names=("ATM",) * n,
        residue_indices=np.arange(n),
    )


def correlated(generator, shape, decay):
    """A stationary AR(1) process along the first axis, unit variance."""
    x = generator.normal(size=shape)
    for t in range(1, shape[0]):
        x[t] = decay * x[t - 1] + np.sqrt(1 - decay**2) * x[t]
    return x


def harmonic_run(
    seed,
    *,
    temperature_K=300.0,
    real_temperature_K=None,
    frames=100,
    replicas=10,
    decay=0.5,
    shift_nm=0.0,
    label="run",
    **changes,
):
    """Atoms of one water on springs; `real_temperature_K` is what they have, `temperature_K` what the run claims."""
    generator = np.random.default_rng(seed)
    kT = BOLTZMANN_KJ_PER_MOL_K * (real_temperature_K or temperature_K)
    system = water()
    shape = (frames, replicas, 3, 3)
    away = np.sqrt(kT / STIFFNESS) * correlated(generator, shape, decay)
    velocities = np.sqrt(kT / system.masses)[:, None] * correlated(generator, shape, decay)
    reference = WATER + np.array([[0, 0, 0], [shift_nm, 0, 0], [0, 0, 0]])
    fields = {
        "label": label,
        "target": "springs",
        "seed": seed,
        "system": system,
        "masses": system.masses,
        "temperature_K": temperature_K,
        "friction_per_ps": 1.0,
        "save_interval_ps": 0.004,
        "positions": reference + away,
        "velocities": velocities,
        "potential_energy": 0.5 * STIFFNESS * (away**2).sum(axis=(2, 3)),
        "squared_gradient": STIFFNESS**2 * (away**2).sum(axis=(2, 3)),
        "laplacian": np.full(shape[:2], 9 * STIFFNESS),
        "charges": np.array([-0.8, 0.4, 0.4]),
    }
    return DynamicsRun(**(fields | changes))
