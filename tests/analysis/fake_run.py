"""A small made-up run folder that obeys the on-disk contract: alanine dipeptide with torsions from a known process.

Three basins with known populations; molecular dynamics is a Markov jump process between them, started in chosen basins, with
Ornstein-Uhlenbeck motion inside; an exact Monte Carlo method keeps its state or draws a fresh one from equilibrium.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longstride.config import CompareConfig
from longstride.data.atomic import write_arrays
from longstride.data.manifest import write_manifest
from longstride.systems import load_prepared, prepare_sequence, save_prepared
from longstride.units import BOLTZMANN_KJ_PER_MOL_K

SECTION = CompareConfig(bootstrap=40, msm_states=20, msm_lags_ps=(1.0, 5.0))

CENTRES = np.radians([[-75.0, 145.0], [-75.0, -20.0], [55.0, 45.0]])
POPULATIONS = np.array([0.55, 0.33, 0.12])
WIDTH = np.radians(14.0)
TEMPERATURE = 310.0
TRUE_DELTA_F = float(np.log(0.88 / 0.12))
# jump probabilities per frame, in detailed balance with POPULATIONS
EXCHANGE = np.array([[0.0, 0.03, 0.002], [0.03, 0.0, 0.002], [0.002, 0.002, 0.0]])
JUMPS = EXCHANGE * POPULATIONS[None, :]
JUMPS = JUMPS + np.diag(1 - JUMPS.sum(axis=1))


@dataclass(frozen=True)
class Sizes:
    """How much data the fake run has."""

    frames: int = 400
    trajectories: int = 6
    saves: int = 60
    chains: int = 24
    seeds: int = 2
    md_chains: int = 4


def jump_chain(generator, *, times, starts):
    """States [time, chain] of the jump process from given starts [chain]."""
    cumulative = JUMPS.cumsum(axis=1)
    states = np.empty((times, len(starts)), dtype=int)
    states[0] = starts
    for t in range(1, times):
        draw = generator.random(len(starts))
        states[t] = (draw[:, None] > cumulative[states[t - 1]]).sum(axis=1)
    return states


def torsions_of(generator, states, *, memory=0.8):
    """(phi, psi) [time, chain, 2] around the basin centres, with memory inside a basin."""
    noise = generator.normal(size=(*states.shape, 2))
    for t in range(1, len(states)):
        noise[t] = memory * noise[t - 1] + np.sqrt(1 - memory**2) * noise[t]
    return CENTRES[states] + WIDTH * noise


def monte_carlo(generator, *, saves, chains, acceptance, populations=POPULATIONS):
    """(phi, psi) [save, chain, 2] of an independence sampler that keeps its state with probability 1 - acceptance."""
    fresh = generator.choice(3, p=populations, size=(saves, chains))
    angles = CENTRES[fresh] + WIDTH * generator.normal(size=(saves, chains, 2))
    keep = generator.random((saves, chains)) > acceptance
    for t in range(1, saves):
        angles[t] = np.where(keep[t][:, None], angles[t - 1], angles[t])
    return angles


def rotate(positions, axis, moving, angle):
    """Rotate atoms `moving` of positions [frame, atom, 3] about the bond `axis` by angle [frame]."""
    origin = positions[:, axis[0]]
    unit = positions[:, axis[1]] - origin
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    vector = positions[:, moving] - origin[:, None]
    c, s = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    along = np.einsum("fax,fx->fa", vector, unit)[..., None] * unit[:, None]
    turned = along + (vector - along) * c + np.cross(np.broadcast_to(unit[:, None], vector.shape), vector) * s
    result = positions.copy()
    result[:, moving] = turned + origin[:, None]
    return result


def _downstream(system, first, second):
    neighbours = {k: set() for k in range(system.n_atoms)}
    for a, b in system.bonds:
        neighbours[int(a)].add(int(b))
        neighbours[int(b)].add(int(a))
    seen, queue = {second}, [second]
    while queue:
        for other in neighbours[queue.pop()] - seen - {first}:
            seen.add(other)
            queue.append(other)
    return sorted(seen - {second})


class Builder:
    """Turns torsions into coordinates of one prepared molecule."""

    def __init__(self, prepared):
        self.prepared = prepared
        names, residues = prepared.system.atom_names, prepared.system.residue_indices
        alanine = next(k for k, name in enumerate(prepared.system.residue_names) if name == "ALA")
        residue = residues[alanine]

        def atom(name, index):
            return next(k for k in range(len(names)) if names[k] == name and residues[k] == index)

        self.n, self.ca, self.c = (atom(name, residue) for name in ("N", "CA", "C"))
        self.before, self.after = atom("C", residue - 1), atom("N", residue + 1)

    def positions(self, generator, angles):
        """Coordinates [time, chain, atom, 3] float32 with the given (phi, psi)."""
        flat = angles.reshape(-1, 2)
        base = np.repeat(self.prepared.positions[None], len(flat), axis=0)
        quartets = ((self.before, self.n, self.ca, self.c), (self.n, self.ca, self.c, self.after))
        for column, quartet in enumerate(quartets):
            axis = quartet[1:3]
            moving = _downstream(self.prepared.system, *axis)
            base = rotate(base, axis, moving, flat[:, column] - _dihedral(base[0], quartet))
        noisy = base + generator.normal(scale=1e-4, size=base.shape)
        return noisy.reshape(*angles.shape[:-1], -1, 3).astype(np.float32)


def _dihedral(x, quartet):
    b = [x[quartet[k + 1]] - x[quartet[k]] for k in range(3)]
    n1, n2 = np.cross(b[0], b[1]), np.cross(b[1], b[2])
    return np.arctan2(np.dot(b[0], n2) * np.linalg.norm(b[1]), np.dot(n1, n2))


def energies(generator, shape, *, temperature=TEMPERATURE, mean=-100.0, modes=60):
    """Potential energies [time, chain] of `modes` harmonic modes: mean + kT chi2_modes / 2, kJ/mol."""
    return mean + BOLTZMANN_KJ_PER_MOL_K * temperature * generator.chisquare(modes, size=shape) / 2


def maxwell(generator, shape, masses, *, temperature=TEMPERATURE):
    """Velocities [..., atom, 3] nm/ps."""
    scale = np.sqrt(BOLTZMANN_KJ_PER_MOL_K * temperature / masses)
    return (generator.normal(size=(*shape, len(masses), 3)) * scale[:, None]).astype(np.float32)


def _kinetic(velocities, masses):
    return 0.5 * np.einsum("...ax,...ax,a->...", velocities.astype(float), velocities.astype(float), masses)


def write_reference(folder, builder, sizes, generator):
    """Write trajectories started in the basins in turn."""
    starts = np.arange(sizes.trajectories) % 3
    angles = torsions_of(generator, jump_chain(generator, times=sizes.frames, starts=starts))
    masses = builder.prepared.system.masses
    files = []
    for k in range(sizes.trajectories):
        velocities = maxwell(generator, (sizes.frames,), masses)
        name = f"trajectory_{k:02d}.safetensors"
        arrays = {
            "positions": builder.positions(generator, angles[:, [k]])[:, 0],
            "velocities": velocities,
            "forces": np.zeros_like(velocities),
            "potential_energy": energies(generator, (sizes.frames,)),
            "kinetic_energy": _kinetic(velocities, masses),
            "time": np.arange(sizes.frames) * 0.2,
        }
        write_arrays(folder / name, arrays)
        files.append(name)
    content = {
        "system": "fake", "target": builder.prepared.target, "system_hash": builder.prepared.system_hash,
        "temperature_K": TEMPERATURE, "trajectories": sizes.trajectories, "frame_spacing_ps": 0.2, "timestep_fs": 2.0,
        "wall_s": 40.0, "provenance": {},
    }  # fmt: skip
    write_manifest(folder, kind="reference", files=files, content=content)


def write_samples(folder, builder, *, method, angles, energy, generator, target=None, counts=None, seconds=5.0, seed=123):
    """Write one sample folder; dynamics also get velocities."""
    dynamics = method not in ("timewarp", "explore")
    arrays = {"positions": builder.positions(generator, angles), "potential_energy": energy}
    if dynamics:
        masses = builder.prepared.system.masses
        arrays["velocities"] = maxwell(generator, energy.shape, masses)
        arrays["kinetic_energy"] = _kinetic(arrays["velocities"], masses)
    acceptance = 0.5 if method == "timewarp" else None
    if acceptance is not None:
        arrays["acceptance"] = np.full(energy.shape, acceptance)
    write_arrays(folder / "samples.safetensors", arrays)
    invariance = {"timewarp": "exact", "explore": "biased"}.get(method, "unadjusted")
    content = {
        "system": "fake", "method": method, "target": target or builder.prepared.target, "invariance": invariance,
        "physical_time": dynamics, "save_every": 0.2 if dynamics else 10, "seed": seed, "temperature_K": TEMPERATURE,
        "system_hash": builder.prepared.system_hash, "counts": counts or {"energy_calls": int(energy.size * 10)},
        "acceptance": acceptance, "timing": {"sampling_s": seconds, "burn_in_s": 0.5, "threads": 1}, "provenance": {},
    }  # fmt: skip
    if method in ("mts", "sts"):
        content |= {"masses_Da": masses.tolist(), "friction_per_ps": 1.0, "timestep_fs": 4.0 if method == "mts" else 1.0}
        content["counts"]["student_calls"] = 0
    write_manifest(folder, kind="samples", files=["samples.safetensors"], content=content)


def _write_method(folder, builder, method, sizes, generator):
    if method in ("timewarp", "explore"):
        populations = POPULATIONS if method == "timewarp" else np.array([0.3, 0.3, 0.4])
        angles = monte_carlo(generator, saves=sizes.saves, chains=sizes.chains, acceptance=0.5, populations=populations)
        hotter = TEMPERATURE + (20 if method == "explore" else 0)
        energy = energies(generator, angles.shape[:2], temperature=hotter)
        write_samples(folder, builder, method=method, angles=angles, energy=energy, generator=generator)
        return
    chains = sizes.md_chains * (3 if method == "tuned-md" else 1)
    if method in ("md", "tuned-md"):
        starts = generator.integers(0, 3, size=chains)
        angles = torsions_of(generator, jump_chain(generator, times=sizes.frames, starts=starts))
        target, mean, seconds = None, -100.0, 30.0 if method == "md" else 10.0
    else:
        angles = torsions_of(generator, np.zeros((sizes.saves, chains), dtype=int))
        target, mean, seconds = "gfn2-xtb", -9e4, 8.0 if method == "mts" else 20.0
    energy = energies(generator, angles.shape[:2], mean=mean)
    counts = {"energy_calls": 0, "force_calls": int(energy.size * (50 if method != "mts" else 25))}
    write_samples(
        folder, builder, method=method, angles=angles, energy=energy, generator=generator, target=target, counts=counts,
        seconds=seconds, seed=int(generator.integers(2**31)),
    )  # fmt: skip


def make_run(root: Path, *, sizes: Sizes | None = None, seed: int = 11) -> Path:
    """Write prepare, reference and sample folders of system "fake" under `root` and return it."""
    sizes = sizes or Sizes()
    generator = np.random.default_rng(seed)
    prepared_folder = root / "prepare" / "fake"
    prepared_folder.mkdir(parents=True)
    prepared = prepare_sequence("ACE-ALA-NME", name="fake", force_field=("amber14-all.xml", "implicit/obc1.xml"), cutoff_nm=2.0)
    save_prepared(prepared_folder, prepared, {"temperature_K": TEMPERATURE})
    builder = Builder(load_prepared(prepared_folder))
    write_reference(root / "reference" / "fake", builder, sizes, generator)
    for method in ("md", "tuned-md", "timewarp", "explore", "mts", "sts"):
        for k in range(sizes.seeds):
            _write_method(root / "sample" / "fake" / method / f"seed{k}", builder, method, sizes, generator)
    return root


def sample_folders(root: Path) -> list[Path]:
    """Every sample folder of the run, in the order a workflow would give."""
    return sorted((root / "sample" / "fake").glob("*/seed*"))
