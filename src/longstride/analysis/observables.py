"""Static observables that a multiple time step must not change, each with its error over replicas and blocks.

Every function takes a `DynamicsRun` and its units (`blocks_of`) and returns `Observable`s; runs of several seeds are put
together with `pool`. Lengths in nm, angles in degrees, energies in kJ/mol, temperatures in K.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from longstride.analysis.block_statistics import Observable, component, mean_and_spread, ratio_of_means
from longstride.analysis.energies import kinetic_temperature
from longstride.analysis.features import find_torsions, torsion_angles
from longstride.analysis.free_energy import FreeEnergy, bin_edges, bin_index, from_chains
from longstride.errors import DataError, LongstrideError
from longstride.units import BOLTZMANN_KJ_PER_MOL_K

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from longstride.analysis.block_statistics import Block
    from longstride.analysis.dynamics_run import DynamicsRun

BOND_EDGES_NM = np.linspace(0.05, 0.35, 301)
ANGLE_EDGES_DEGREES = np.linspace(0.0, 180.0, 181)
CHUNK_DISTANCES = 20_000_000
SHARE_OF_SPREAD = 0.2  # a shift of a mean by this many standard deviations of the distribution matters


def chains_of(blocks: Sequence[Block]) -> np.ndarray:
    """Return the replica of each unit, [unit] int."""
    return np.array([block.replica for block in blocks])


def per_block(blocks: Sequence[Block], statistic: Callable[[Block], np.ndarray]) -> np.ndarray:
    """Return statistics [unit, statistic]."""
    return np.stack([np.atleast_1d(statistic(block)) for block in blocks])


def series_mean(series: np.ndarray, blocks: Sequence[Block], *, power: Iterable[int] = (1,)) -> np.ndarray:
    """Return the block means of powers of a series [frame, replica], [unit, power]."""
    return per_block(blocks, lambda b: np.array([(series[b.frames, b.replica].astype(np.float64) ** p).mean() for p in power]))


def atom_types(elements: Sequence[str], indices: np.ndarray) -> dict[str, np.ndarray]:
    """Group tuples of atoms [tuple, 2 or 3] by element label, such as "C-H" or "H-O-H"; the order of the ends is alphabetic."""
    groups: dict[str, list[int]] = {}
    for row, atoms in enumerate(indices):
        names = [elements[i] for i in atoms]
        groups.setdefault("-".join(min(names, names[::-1])), []).append(row)
    return {label: indices[rows] for label, rows in sorted(groups.items())}


def angle_triples(bonds: np.ndarray, n_atoms: int) -> np.ndarray:
    """Return all pairs of bonds that share an atom as (end, middle, end), [angle, 3] int."""
    neighbours: list[list[int]] = [[] for _ in range(n_atoms)]
    for first, second in bonds:
        neighbours[first].append(int(second))
        neighbours[second].append(int(first))
    triples = [(a, middle, b) for middle in range(n_atoms) for a, b in itertools.combinations(sorted(neighbours[middle]), 2)]
    return np.array(triples, dtype=int).reshape(-1, 3)


def far_pairs(run: DynamicsRun) -> dict[str, np.ndarray]:
    """Return pairs of atoms that share no bond and no angle, by element pair, [pair, 2]."""
    triples = angle_triples(run.system.bonds, run.system.n_atoms)
    near = np.zeros((run.system.n_atoms,) * 2, dtype=bool)
    for pairs in (run.system.bonds, triples[:, [0, 2]]):
        near[pairs[:, 0], pairs[:, 1]] = near[pairs[:, 1], pairs[:, 0]] = True
    first, second = np.triu_indices(run.system.n_atoms, k=1)
    kept = ~near[first, second]
    return atom_types(run.elements, np.stack([first[kept], second[kept]], axis=1))


def _density(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.histogram(values, bins=edges)[0] / (values.size * np.diff(edges))


def bond_lengths(run: DynamicsRun, blocks: Sequence[Block]) -> list[Observable]:
    """Return mean, standard deviation and density (1/nm) of bond lengths per element pair, in nm."""
    import mdtraj

    def measure(block: Block, pairs: np.ndarray) -> np.ndarray:
        frames = run.trajectory(run.positions[block.frames, block.replica])
        return mdtraj.compute_distances(frames, pairs, periodic=run.box is not None)

    return _internal(blocks, atom_types(run.elements, run.system.bonds), measure, BOND_EDGES_NM, ("bond length", "nm"))


def bond_angles(run: DynamicsRun, blocks: Sequence[Block]) -> list[Observable]:
    """Return mean, standard deviation and density (1/degree) of angles between bonds per element triple, in degrees."""
    import mdtraj

    def measure(block: Block, triples: np.ndarray) -> np.ndarray:
        frames = run.trajectory(run.positions[block.frames, block.replica])
        return np.degrees(mdtraj.compute_angles(frames, triples, periodic=run.box is not None))

    triples = atom_types(run.elements, angle_triples(run.system.bonds, run.system.n_atoms))
    return _internal(blocks, triples, measure, ANGLE_EDGES_DEGREES, ("bond angle", "degree"))


def _internal(
    blocks: Sequence[Block],
    groups: dict[str, np.ndarray],
    measure: Callable[[Block, np.ndarray], np.ndarray],
    edges: np.ndarray,
    name_and_unit: tuple[str, str],
) -> list[Observable]:
    (name, unit), chains, found = name_and_unit, chains_of(blocks), []
    for label, atoms in groups.items():
        values = [measure(block, atoms).astype(np.float64) for block in blocks]
        moments = np.array([(v.mean(), (v**2).mean()) for v in values])
        spread = float(mean_and_spread(moments.mean(axis=0))[1])
        for index, kind in enumerate(("mean", "sd")):
            found.append(
                Observable(
                    name=f"{name} {kind}", part=label, unit=unit, statistics=moments, chains=chains,
                    reduction=component(mean_and_spread, index), matters=SHARE_OF_SPREAD * spread,
                )
            )  # fmt: skip
        found.append(
            Observable(
                name=f"{name} density", part=label, unit=f"1/{unit}", statistics=np.stack([_density(v, edges) for v in values]),
                chains=chains, grid=(edges[1:] + edges[:-1]) / 2, grid_unit=unit, matters_relative=0.1,
            )
        )  # fmt: skip
    return found


def pair_distributions(
    run: DynamicsRun, blocks: Sequence[Block], *, r_max_nm: float = 1.0, bins: int = 100
) -> list[Observable]:
    """Return the radial distribution function per element pair, or the density of distances of an isolated molecule.

    Equation: in a box g(r) = <n(r)> V / (n_pairs 4 pi r^2 dr), minimum image (MDTraj); without one the density p(r) of the
    distance in 1/nm. Pairs that share a bond or an angle are left out: their distributions are their own observables.

    Raises:
        LongstrideError: `r_max_nm` beyond half the smallest height of the box, where images would be missed.
    """
    edges = np.linspace(0.0, r_max_nm, bins + 1)
    if run.box is not None:
        heights = 1 / np.linalg.norm(np.linalg.inv(run.box), axis=0)
        if r_max_nm > heights.min() / 2:
            raise LongstrideError(
                f"r_max_nm = {r_max_nm:g} is beyond half the box, {heights.min() / 2:.4g} nm; use a shorter range"
            )
    found = []
    for label, pairs in far_pairs(run).items():
        found.append(
            Observable(
                name="g(r)" if run.box is not None else "distance density", part=label,
                unit="" if run.box is not None else "1/nm", chains=chains_of(blocks),
                statistics=per_block(blocks, lambda b, pairs=pairs: _pair_histogram(run, b, pairs, edges)),  # type: ignore[misc]
                grid=(edges[1:] + edges[:-1]) / 2, grid_unit="nm", matters_relative=0.05,
            )
        )  # fmt: skip
    return found


def _pair_histogram(run: DynamicsRun, block: Block, pairs: np.ndarray, edges: np.ndarray) -> np.ndarray:
    import mdtraj

    positions = run.positions[block.frames, block.replica]
    step = max(1, CHUNK_DISTANCES // len(pairs))
    total = np.zeros(len(edges) - 1)
    for start in range(0, len(positions), step):
        frames = run.trajectory(positions[start : start + step])
        if run.box is not None:
            part = mdtraj.compute_rdf(frames, pairs, r_range=(edges[0], edges[-1]), n_bins=len(edges) - 1, periodic=True)[1]
        else:
            part = _density(mdtraj.compute_distances(frames, pairs, periodic=False), edges)
        total += part * frames.n_frames
    return total / len(positions)


def torsion_densities(run: DynamicsRun, blocks: Sequence[Block], *, bins: int = 36) -> list[Observable]:
    """Return the density of each phi and psi in 1/degree on a periodic grid; none for molecules without a backbone.

    F = -kT ln of it is the free energy (`torsion_free_energies`); densities have finite errors where F has not.
    """
    torsions = find_torsions(run.topology)
    if not torsions.names:
        return []
    index = bin_index(torsion_angles(run.positions, run.topology, torsions), bins)
    width = 360.0 / bins
    centres = np.degrees(bin_edges(bins))[:-1] + width / 2

    def density(block: Block, t: int) -> np.ndarray:
        own = index[block.frames, block.replica, t]
        return np.bincount(own, minlength=bins) / (len(own) * width)

    return [
        Observable(
            name="torsion density", part=name, unit="1/degree", chains=chains_of(blocks), grid=centres, grid_unit="degree",
            statistics=per_block(blocks, lambda b, t=t: density(b, t)), matters_relative=0.1,  # type: ignore[misc]
        )
        for t, name in enumerate(torsions.names)
    ]  # fmt: skip


def torsion_free_energies(
    runs: Sequence[DynamicsRun], *, seed: int, bins: int = 36, replicates: int = 200
) -> dict[str, FreeEnergy]:
    """Return F = -ln p in kT of each phi and psi over all runs (cut to the shortest), errors by bootstrap.

    Args:
        runs: of one system.
        seed: of the bootstrap.
        bins: of the periodic axis.
        replicates: of the bootstrap.
    """
    torsions = find_torsions(runs[0].topology)
    shortest = min(run.n_frames for run in runs)
    angles = np.concatenate(
        [torsion_angles(run.positions[:shortest], run.topology, torsions) for run in runs], axis=1
    )  # replicas of all runs side by side
    return {
        name: from_chains(bin_index(angles[..., t], bins), bins=bins, replicates=replicates, seed=seed)
        for t, name in enumerate(torsions.names)
    }


def _need(run: DynamicsRun, name: str) -> np.ndarray:
    array = getattr(run, name)
    if array is None:
        raise DataError(f"{run.label}: no {name} saved; save them in the run, or leave this observable out")
    return array


def energy_moments(run: DynamicsRun, blocks: Sequence[Block], *, origin: float = 0.0) -> list[Observable]:
    """Return mean and standard deviation of the reference potential energy in kJ/mol.

    Args:
        run: with `potential_energy`.
        blocks: units.
        origin: kJ/mol, subtracted before squaring; total energies of 1e7 kJ/mol would cost digits otherwise. Runs that are
            pooled must share it.
    """
    energy = _need(run, "potential_energy").astype(np.float64)
    moments = series_mean(energy - origin, blocks, power=(1, 2))
    spread = float(mean_and_spread(moments.mean(axis=0))[1])

    def mean(statistics: np.ndarray) -> np.ndarray:
        return origin + statistics[..., :1]

    pairs = (("mean", mean, SHARE_OF_SPREAD * spread), ("sd", component(mean_and_spread, 1), 0.1 * spread))
    return [
        Observable(
            name=f"potential energy {kind}", unit="kJ/mol", statistics=moments, chains=chains_of(blocks), reduction=reduction,
            matters=matters,
        )
        for kind, reduction, matters in pairs
    ]  # fmt: skip


def energy_grid(runs: Sequence[DynamicsRun], *, points: int = 200) -> np.ndarray:
    """Return quantiles of the potential energies of all runs together, the grid of `energy_distribution`, [point] kJ/mol."""
    energies = np.concatenate([_need(run, "potential_energy").ravel() for run in runs]).astype(np.float64)
    return np.quantile(energies, (np.arange(points) + 0.5) / points)


def energy_distribution(run: DynamicsRun, blocks: Sequence[Block], *, grid: np.ndarray) -> Observable:
    """Return the distribution function P(U <= u) on a grid; two runs differ by the largest difference (Kolmogorov-Smirnov)."""
    energy = _need(run, "potential_energy")

    def below(block: Block) -> np.ndarray:
        own = np.sort(energy[block.frames, block.replica])
        return np.searchsorted(own, grid, side="right") / len(own)

    return Observable(
        name="potential energy distribution", unit="", statistics=per_block(blocks, below), chains=chains_of(blocks), grid=grid,
        grid_unit="kJ/mol", matters=0.05, cumulative=True,
    )  # fmt: skip


def temperatures(run: DynamicsRun, blocks: Sequence[Block], *, matters_K: float = 3.0) -> list[Observable]:
    """Return the kinetic temperature in K of all atoms and of each element, centre-of-mass motion left out."""
    velocities = _need(run, "velocities")
    groups = {"all": np.ones(run.system.n_atoms, dtype=bool)}
    groups |= {symbol: np.array([e == symbol for e in run.elements]) for symbol in sorted(set(run.elements))}
    return [
        Observable(
            name="temperature", part=label, unit="K", chains=chains_of(blocks), matters=matters_K,
            statistics=series_mean(kinetic_temperature(velocities, run.masses, members), blocks),
        )
        for label, members in groups.items()
    ]  # fmt: skip


def configurational_temperature(run: DynamicsRun, blocks: Sequence[Block], *, matters_K: float = 6.0) -> Observable:
    """Return T = <|grad U|^2> / (k_B <lap U>) in K of the reference potential (Rugh, doi:10.1103/PhysRevLett.78.772).

    Needs `squared_gradient` and `laplacian` in the run (`vibrations.configurational_terms`).
    """
    pair = [series_mean(_need(run, name), blocks) for name in ("squared_gradient", "laplacian")]
    pair[1] = pair[1] * BOLTZMANN_KJ_PER_MOL_K
    return Observable(
        name="configurational temperature", unit="K", statistics=np.concatenate(pair, axis=1), chains=chains_of(blocks),
        reduction=ratio_of_means, matters=matters_K,
    )  # fmt: skip


def nve_drift(run: DynamicsRun, *, matters: float = 0.05) -> Observable:
    """Return the slope of the total energy in kJ/mol/ns per degree of freedom, each replica one unit.

    Equation: least-squares slope over time, divided by 3 N; compare with kT = 2.5 kJ/mol.

    Raises:
        LongstrideError: a run with friction, whose energy is not conserved, or fewer than three frames.
    """
    energy = _need(run, "total_energy").astype(np.float64)
    if np.any(np.asarray(run.friction_per_ps) != 0):
        raise LongstrideError(f"{run.label}: energy drift is defined without friction; run with friction 0")
    if run.n_frames < 3:
        raise LongstrideError(f"{run.label}: a drift needs at least three frames, there are {run.n_frames}")
    time_ns = np.arange(run.n_frames) * run.save_interval_ps * 1e-3
    centred = time_ns - time_ns.mean()
    slopes = centred @ (energy - energy.mean(axis=0)) / (centred @ centred) / (3 * run.system.n_atoms)
    return Observable(
        name="energy drift", unit="kJ/mol/ns/dof", statistics=slopes[:, None], chains=np.arange(run.n_replicas), matters=matters
    )
