"""Static observables against closed forms within five of their own standard errors."""

import dataclasses
import itertools

import numpy as np
import pytest
from made_runs import STIFFNESS, WATER, correlated, free_atoms, harmonic_run, water

from longstride.analysis.block_statistics import Observable, blocks_of, component, mean_and_spread, pool
from longstride.analysis.dynamics_run import DynamicsRun, thinned
from longstride.analysis.observables import (
    angle_triples,
    bond_angles,
    bond_lengths,
    configurational_temperature,
    energy_distribution,
    energy_grid,
    energy_moments,
    nve_drift,
    pair_distributions,
    temperatures,
)
from longstride.errors import DataError, LongstrideError
from longstride.units import BOLTZMANN_KJ_PER_MOL_K


def blocks(run, **options):
    return blocks_of(run.n_frames, run.n_replicas, **options)


def named(observables):
    return {(item.name, item.part): item for item in observables}


def z(observable, truth):
    return np.abs(observable.values - truth) / observable.errors


def test_jackknife_of_a_mean_and_of_a_spread():
    generator = np.random.default_rng(0)
    x = generator.normal(loc=2.0, scale=3.0, size=(400, 50))
    moments = np.stack([x.mean(axis=1), (x**2).mean(axis=1)], axis=1)
    mean, sd = (
        Observable(name="x", unit="", statistics=moments, chains=np.arange(400), reduction=component(mean_and_spread, i))
        for i in (0, 1)
    )
    assert mean.errors == pytest.approx(x.mean(axis=1).std(ddof=1) / 20, rel=1e-9)  # the plain standard error
    assert sd.errors == pytest.approx(3 / np.sqrt(2 * x.size), rel=0.15)  # delta method for normal data
    assert z(mean, 2.0) < 5
    assert z(sd, 3.0) < 5


def test_correlated_blocks_have_larger_errors():
    x = correlated(np.random.default_rng(1), (4000, 1, 400), 0.95)[:, 0]  # tau = 39 frames

    def observable(series, count):
        means = series.reshape(count, -1).mean(axis=1)[:, None]
        return Observable(name="x", unit="", statistics=means, chains=np.zeros(count, dtype=int))

    # blocks of 40 frames are as long as the correlation: without the inflation the errors would be too small
    found = [observable(x[:, k], 100) for k in range(150)]
    truth = x.mean(axis=0).std()
    plain = np.sqrt(np.mean([item.errors[0] ** 2 / item.inflation for item in found]))
    inflated = np.sqrt(np.mean([item.errors[0] ** 2 for item in found]))
    assert plain < 0.85 * truth
    assert abs(inflated - truth) < 0.12 * truth
    independent = Observable(
        name="x", unit="", statistics=np.random.default_rng(2).normal(size=(100, 1)), chains=np.zeros(100, dtype=int)
    )
    assert independent.inflation == 1.0


def test_replicas_in_different_basins_are_as_many_units_as_replicas():
    generator = np.random.default_rng(3)
    chains = np.repeat(np.arange(4), 6)
    ratios = []
    for _ in range(80):
        offsets = generator.normal(size=(4, 12))
        blocks_of_chains = offsets[chains] + 0.3 * generator.normal(size=(24, 12))
        stuck = Observable(name="x", unit="", statistics=blocks_of_chains, chains=chains, grid=np.arange(12.0))
        ratios.append((stuck.errors**2).mean())
    truth = (1 + 0.3**2 / 6) / 4  # variance of a mean of four replica means
    assert np.mean(ratios) > 0.9 * truth
    assert truth / 24 * 4 < 0.3 * np.mean(ratios)  # as if all 24 blocks were independent


def test_blocks_and_pool():
    parts = blocks_of(103, 3, minimum=20)
    assert len(parts) == 21
    assert len({(p.replica, p.frames.start) for p in parts}) == 21
    assert all(p.frames.stop - p.frames.start == 14 for p in parts)
    assert len(blocks_of(103, 3, minimum=20, shortest=40)) == 6
    with pytest.raises(LongstrideError, match="too few"):
        blocks_of(5, 1, shortest=10)
    runs = [harmonic_run(seed, replicas=4) for seed in (1, 2)]
    single = [temperatures(run, blocks(run))[0] for run in runs]
    both = pool(single)
    assert both.values == pytest.approx((single[0].values + single[1].values) / 2)
    assert len(np.unique(both.chains)) == 8
    with pytest.raises(LongstrideError, match="not the same observable"):
        pool([single[0], temperatures(runs[1], blocks(runs[1]))[1]])


def test_temperatures_of_all_and_of_elements_and_controls():
    run = harmonic_run(3, frames=400, replicas=40)
    found = named(temperatures(run, blocks(run)))
    assert set(found) == {("temperature", part) for part in ("all", "O", "H")}
    for item in found.values():
        assert z(item, 300.0) < 5
    hot = harmonic_run(3, frames=400, replicas=40, real_temperature_K=320.0)
    assert z(temperatures(hot, blocks(hot))[0], 300.0) > 8
    # hydrogens that were thought to weigh 3.024 Da
    wrong = harmonic_run(3, frames=400, replicas=40, masses=np.array([15.999, 3.024, 3.024]))
    assert z(named(temperatures(wrong, blocks(wrong)))["temperature", "H"], 300.0) > 10


def test_configurational_temperature_and_control():
    run = harmonic_run(4, frames=400, replicas=40)
    assert z(configurational_temperature(run, blocks(run)), 300.0) < 5
    hot = harmonic_run(4, frames=400, replicas=40, real_temperature_K=320.0)
    found = configurational_temperature(hot, blocks(hot))
    assert z(found, 320.0) < 5
    assert z(found, 300.0) > 10
    with pytest.raises(DataError, match="no laplacian"):
        configurational_temperature(harmonic_run(4, laplacian=None), blocks_of(100, 10))


def test_potential_energy_of_springs():
    run = harmonic_run(5, frames=400, replicas=40)
    kT = BOLTZMANN_KJ_PER_MOL_K * 300.0
    for origin in (0.0, 10.0):
        mean, sd = energy_moments(run, blocks(run), origin=origin)
        assert z(mean, 4.5 * kT) < 5  # 9 coordinates
        assert z(sd, np.sqrt(4.5) * kT) < 5  # a gamma distribution
    grid = energy_grid([run])
    distribution = energy_distribution(run, blocks(run), grid=grid)
    from scipy import stats

    assert np.abs(distribution.values - stats.gamma.cdf(grid, 4.5, scale=kT)).max() < 5 * distribution.errors.max()
    assert np.abs(distribution.values - stats.gamma.cdf(grid, 4.5, scale=kT * 32 / 30)).max() > 10 * distribution.errors.max()


def test_bonds_and_angles():
    run = harmonic_run(6, frames=200, replicas=20)
    lengths, angles = named(bond_lengths(run, blocks(run))), named(bond_angles(run, blocks(run)))
    x = run.positions
    plain = np.linalg.norm(x[:, :, [1, 2]] - x[:, :, [0, 0]], axis=-1)
    assert lengths["bond length mean", "H-O"].values == pytest.approx(plain.mean(), rel=1e-5)
    assert lengths["bond length sd", "H-O"].values == pytest.approx(plain.std(), rel=1e-3)
    u = (x[:, :, [1, 2]] - x[:, :, [0, 0]]) / plain[..., None]
    degrees = np.degrees(np.arccos((u[:, :, 0] * u[:, :, 1]).sum(-1)))
    assert angles["bond angle mean", "H-O-H"].values == pytest.approx(degrees.mean(), rel=1e-4)
    density = lengths["bond length density", "H-O"]
    assert density.values.sum() * 0.001 == pytest.approx(1.0, abs=1e-9)
    # the radial distribution of a bond whose two ends are on springs: d = ref + N(0, 2 kT/k), so <d^2> is known
    variance = 2 * BOLTZMANN_KJ_PER_MOL_K * 300.0 / STIFFNESS
    square = (plain**2).mean(axis=(0, 2))
    truth = ((WATER[1:] - WATER[0]) ** 2).sum(axis=1).mean() + 3 * variance
    assert abs(square.mean() - truth) < 5 * square.std() / np.sqrt(20)


def test_angle_triples():
    assert angle_triples(np.array([(0, 1), (1, 2), (1, 3)]), 4).tolist() == [[0, 1, 2], [0, 1, 3], [2, 1, 3]]
    assert angle_triples(np.zeros((0, 2), dtype=int), 2).shape == (0, 3)


def ideal_gas(seed, *, box, frames=20, replicas=10, n=60):
    generator = np.random.default_rng(seed)
    fractions = generator.random((frames, replicas, n, 3))
    return DynamicsRun(
        label="gas", target="none", seed=seed, system=free_atoms([18, 10] * (n // 2)), masses=np.full(n, 10.0),
        temperature_K=300.0, friction_per_ps=1.0, save_interval_ps=0.1, positions=fractions @ box, box=box,
    )  # fmt: skip


@pytest.mark.parametrize("box", [2.5 * np.eye(3), np.array([[2.5, 0, 0], [0.5, 2.4, 0], [-0.4, 0.6, 2.6]])])
def test_ideal_gas_has_g_of_one(box):
    run = ideal_gas(7, box=box)
    for item in pair_distributions(run, blocks(run), r_max_nm=1.0, bins=20):
        inner = item.grid > 0.2  # below that a bin holds a handful of pairs
        assert (np.abs(item.values - 1.0)[inner] < 5 * item.errors[inner]).all()
        assert item.errors[item.grid > 0.5].max() < 0.05
    # neon in one half of the box only: twice as dense around itself, unchanged around argon
    fractions = run.positions @ np.linalg.inv(box)
    fractions[:, :, 1::2, 0] *= 0.5
    found = named(pair_distributions(dataclasses.replace(run, positions=fractions @ box), blocks(run), bins=20))
    far = found["g(r)", "Ne-Ne"].grid > 0.5
    for part, dense in (("Ne-Ne", True), ("Ar-Ne", False)):
        item = found["g(r)", part]
        assert (np.abs(item.values - 1.0) > 5 * item.errors)[far].any() == dense


def test_pairs_leave_out_bonds_and_angles_and_know_the_box():
    gas = ideal_gas(8, box=2.5 * np.eye(3))
    with pytest.raises(LongstrideError, match="half the box"):
        pair_distributions(gas, blocks(gas), r_max_nm=1.3)
    generator = np.random.default_rng(0)
    positions = np.tile(WATER, (10, 2, 2, 1)).reshape(10, 2, 6, 3) + 0.001 * generator.normal(size=(10, 2, 6, 3))
    positions[..., 3:, 0] += 0.5
    system = water(2)
    run = harmonic_run(
        9, system=system, masses=system.masses, positions=positions, velocities=None, potential_energy=None,
        squared_gradient=None, laplacian=None, charges=None,
    )  # fmt: skip
    found = named(pair_distributions(run, blocks(run)))
    assert set(part for _, part in found) == {"H-H", "H-O", "O-O"}
    density = found["distance density", "O-O"]
    assert density.grid[density.values > 0] == pytest.approx([0.495, 0.505])
    assert density.values.sum() * 0.01 == pytest.approx(1.0)
    # 4 intermolecular H-H pairs, none of the two H-H within a molecule at 0.15 nm
    assert found["distance density", "H-H"].values[:30].sum() == 0


def test_drift_of_a_line_and_its_error():
    generator = np.random.default_rng(10)
    time_ns = np.arange(500) * 4e-6
    energy = 5.0 + 9 * 12.0 * time_ns[:, None] + 1e-4 * generator.normal(size=(500, 30))
    run = harmonic_run(10, frames=500, replicas=30, total_energy=energy, friction_per_ps=0.0)
    drift = nve_drift(run)
    assert z(drift, 12.0) < 5
    assert drift.errors[0] < 0.1
    flat = nve_drift(harmonic_run(10, frames=500, replicas=30, total_energy=energy[::-1] * 0 + 1e-4, friction_per_ps=0.0))
    assert flat.values == pytest.approx(0.0)
    with pytest.raises(LongstrideError, match="without friction"):
        nve_drift(harmonic_run(10, frames=500, replicas=30, total_energy=energy))


def test_bad_runs_are_refused():
    with pytest.raises(DataError, match="velocities has shape"):
        harmonic_run(1, velocities=np.zeros((1, 1, 3, 3)))
    broken = harmonic_run(1).positions.copy()
    broken[50, 2, 1] = np.nan
    with pytest.raises(DataError, match="NaN"):
        harmonic_run(1, positions=broken)
    with pytest.raises(LongstrideError, match="at least 1"):
        thinned(harmonic_run(1), 0)
    run = thinned(harmonic_run(1), 4)
    assert (run.n_frames, run.save_interval_ps) == (25, 0.016)


def test_torsion_densities_and_free_energies(alanine):
    from longstride.analysis.features import find_torsions, torsion_angles
    from longstride.analysis.observables import torsion_densities, torsion_free_energies

    runs = [peptide_run(seed, alanine) for seed in (1, 2)]
    densities = named(
        pool([item for item in group]) for group in zip(*(torsion_densities(r, blocks(r)) for r in runs), strict=True)
    )
    free = torsion_free_energies(runs, seed=0)
    assert set(free) == {part for _, part in densities}
    assert len(free) == 2
    angles = torsion_angles(runs[0].positions, runs[0].topology, find_torsions(runs[0].topology))
    assert np.abs(np.degrees(angles)).max() <= 180
    for (_, name), density in densities.items():
        assert density.values.sum() * 10 == pytest.approx(1.0)
        sampled = free[name].sampled
        expected = -np.log(density.values[sampled])
        np.testing.assert_allclose(free[name].values[sampled], expected - expected.min(), atol=1e-9)
    assert all(a != b for a, b in itertools.combinations(free, 2))


def peptide_run(seed, prepared):
    generator = np.random.default_rng(seed)
    positions = prepared.positions + 0.01 * generator.normal(size=(40, 6, prepared.system.n_atoms, 3))
    return DynamicsRun(
        label="peptide", target="none", seed=seed, system=prepared.system, masses=prepared.system.masses, temperature_K=300.0,
        friction_per_ps=1.0, save_interval_ps=0.1, positions=positions,
    )  # fmt: skip
