"""Normal modes against closed forms and ASE, temperatures of bands, and the configurational temperature."""

import dataclasses

import numpy as np
import pytest
import torch
from made_runs import WATER, harmonic_run, water

from longstride.analysis.block_statistics import blocks_of
from longstride.analysis.resonance import LIGHT_CM_PER_PS, period_fs
from longstride.analysis.vibrations import (
    configurational_terms,
    hessian,
    minimise,
    mode_temperatures,
    normal_modes,
    rotations_onto,
)
from longstride.errors import DataError, LongstrideError, NumericsError
from longstride.potentials.amber import AmberPotential
from longstride.potentials.analytic import HarmonicWell
from longstride.state import System
from longstride.units import BOLTZMANN_KJ_PER_MOL_K

K_BOND, K_ANGLE = 450_000.0, 400.0  # kJ/mol/nm^2, kJ/mol/rad^2
LENGTH, ANGLE = 0.0957, 1.82


class Springs:
    """Bonds U = k (b - b0)^2 / 2 between all bonded atoms, and one angle where there are three atoms."""

    name = "springs"

    def __init__(self, system):
        self.system = system

    def energy(self, x):
        r = x.positions
        energy = torch.zeros(len(r), dtype=r.dtype)
        for i, j in self.system.bonds:
            energy = energy + 0.5 * K_BOND * ((r[:, i] - r[:, j]).norm(dim=1) - LENGTH) ** 2
        if self.system.n_atoms == 3:
            u, v = r[:, 1] - r[:, 0], r[:, 2] - r[:, 0]
            cosine = (u * v).sum(1) / u.norm(dim=1) / v.norm(dim=1)
            energy = energy + 0.5 * K_ANGLE * (torch.acos(cosine) - ANGLE) ** 2
        return energy

    def energy_forces(self, x):
        r = x.positions.detach().requires_grad_()
        energy = self.energy(dataclasses.replace(x, positions=r))
        return energy.detach(), -torch.autograd.grad(energy.sum(), r)[0]


def diatomic():
    return System(
        name="OH", atomic_numbers=np.array([8, 1]), masses=np.array([15.999, 1.008]), bonds=np.array([(0, 1)]),
        atom_names=("O", "H"), residue_names=("OH",) * 2, residue_indices=np.zeros(2, dtype=np.int64),
    )  # fmt: skip


@pytest.mark.parametrize("hydrogen", [1.008, 3.024])
def test_diatomic(hydrogen):
    system = diatomic()
    masses = np.array([15.999, hydrogen])
    start = np.array([[0.0, 0, 0], [0.08, 0.05, 0]])
    potential = Springs(system)
    minimum = minimise(potential, start)
    modes = normal_modes(potential, minimum, masses=masses)
    reduced = 15.999 * hydrogen / (15.999 + hydrogen)
    expected = np.sqrt(K_BOND / reduced) / (2 * np.pi * LIGHT_CM_PER_PS)
    assert modes.wavenumbers[-1] == pytest.approx(expected, rel=1e-5)
    assert np.abs(modes.wavenumbers[:5]).max() < 20  # five without a restoring force
    assert modes.stretch_shares["H-O"][-1] == pytest.approx(1.0, rel=1e-5)
    assert modes.stiffest == {"H-O": pytest.approx(expected, rel=1e-5)}
    assert modes.periods_fs["H-O"] == pytest.approx(2 * np.pi * np.sqrt(reduced / K_BOND) * 1e3, rel=1e-5)


def water_modes():
    potential = Springs(water())
    return potential, normal_modes(potential, minimise(potential, WATER, max_force=0.5), masses=water().masses)


def test_modes_of_water_against_ase():
    from ase import Atoms
    from ase.calculators.calculator import Calculator
    from ase.vibrations import Vibrations

    from longstride.state import State

    potential, modes = water_modes()

    class Ours(Calculator):
        implemented_properties = ("energy", "forces")

        def calculate(self, atoms=None, properties=("energy",), system_changes=()):
            super().calculate(atoms, properties, system_changes)
            x = torch.as_tensor(atoms.get_positions()[None] * 0.1)
            energy, forces = potential.energy_forces(State(positions=x))
            per_ev = 96.48533212331002
            self.results = {"energy": float(energy[0]) / per_ev, "forces": forces[0].numpy() / per_ev * 0.1}

    atoms = Atoms("OH2", positions=modes.positions * 10, masses=modes.masses, calculator=Ours())
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        vibrations = Vibrations(atoms, delta=1e-3, name=f"{folder}/vib")
        vibrations.run()
        theirs = np.sort(vibrations.get_frequencies().real)[-3:]
    assert modes.wavenumbers[-3:] == pytest.approx(theirs, rel=2e-4)
    assert np.abs(modes.wavenumbers[:6]).max() < 25
    shares = modes.stretch_shares["H-O"]
    assert shares[-3] < 0.05  # the bend stretches nothing
    assert shares[-1] > 0.9
    assert modes.periods_fs["H-O"] == pytest.approx(period_fs(modes.wavenumbers[-1]))
    np.testing.assert_allclose(np.einsum("kax,lax->kl", modes.vectors, modes.vectors), np.eye(9), atol=1e-10)


def test_hessian_of_springs_to_places_is_diagonal():
    well = HarmonicWell(water(), center=torch.as_tensor(WATER), k=torch.tensor([10.0, 20.0, 30.0], dtype=torch.float64))
    found = hessian(well, WATER + 0.01)
    np.testing.assert_allclose(found, np.diag(np.repeat([10.0, 20.0, 30.0], 3)), atol=1e-8)


def test_alanine_dipeptide_has_its_stiffest_bonds_in_order(alanine):
    potential = AmberPotential.from_openmm(alanine.openmm_system, alanine.system, name="amber", dtype=torch.float64)
    modes = normal_modes(potential, minimise(potential, alanine.positions), masses=alanine.system.masses)
    assert np.abs(modes.wavenumbers[:6]).max() < 10 < modes.wavenumbers[6]
    stiffest = modes.stiffest
    assert max(stiffest, key=stiffest.get) == "H-N"
    assert 3300 < stiffest["H-N"] < 3600
    assert 2900 < stiffest["C-H"] < 3150


def test_not_a_minimum_and_not_finite_are_refused():
    potential = Springs(water())
    with pytest.raises(LongstrideError, match="minimise it first"):
        normal_modes(potential, 1.1 * WATER, masses=water().masses)
    with pytest.raises(NumericsError, match="not finite"):
        hessian(potential, np.zeros((3, 3)))
    with pytest.raises(NumericsError, match="minimisation stopped"):
        minimise(potential, 1.3 * WATER, max_steps=1)


def turned_run(seed, *, hot_band=False, **changes):
    """Frames of water in all orientations with Maxwell velocities, in the frame of the turned molecule."""
    from scipy.spatial.transform import Rotation

    _, modes = water_modes()
    generator = np.random.default_rng(seed)
    frames, replicas = 200, 30
    turn = Rotation.random(frames * replicas, rng=generator).as_matrix().reshape(frames, replicas, 3, 3)
    kT = BOLTZMANN_KJ_PER_MOL_K * 300.0
    speeds = np.sqrt(kT) * generator.normal(size=(frames, replicas, 9))
    if hot_band:
        speeds[..., -1] *= np.sqrt(320 / 300)
    body = np.einsum("frk,kax->frax", speeds, modes.vectors) / np.sqrt(modes.masses)[:, None]
    positions = modes.positions + 0.002 * generator.normal(size=(frames, replicas, 3, 3))
    # the rotation that the analysis will find must be the one that was applied: align the noisy frame first
    aligned = np.einsum("frij,fraj->frai", rotations_onto(positions, modes.positions, modes.masses), positions)
    fields = {
        "positions": np.einsum("frij,fraj->frai", turn, aligned), "velocities": np.einsum("frij,fraj->frai", turn, body),
        "potential_energy": None, "squared_gradient": None, "laplacian": None,
    }  # fmt: skip
    return harmonic_run(seed, **(fields | changes)), modes


def test_rotations_are_found():
    from scipy.spatial.transform import Rotation

    turn = Rotation.random(20, rng=np.random.default_rng(0)).as_matrix()
    frames = np.einsum("fij,aj->fai", turn, WATER) + 0.3
    found = rotations_onto(frames, WATER, water().masses)
    np.testing.assert_allclose(found @ turn, np.broadcast_to(np.eye(3), (20, 3, 3)), atol=1e-6)
    np.testing.assert_allclose(np.linalg.det(found), 1.0, atol=1e-12)


def test_temperatures_of_bands_and_a_hot_mode():
    for hot in (False, True):
        run, modes = turned_run(1, hot_band=hot)
        edges = (1000.0, modes.wavenumbers[-1] - 20, 5000.0)
        low, high = mode_temperatures(run, blocks_of(200, 30), modes=modes, edges_per_cm=edges)
        assert abs(low.values - 300) < 5 * low.errors
        assert (abs(high.values - 300) < 3 * high.errors) == (not hot)
    with pytest.raises(DataError, match="other masses"):
        mode_temperatures(
            run,
            blocks_of(200, 30),
            modes=dataclasses.replace(modes, masses=np.array([15.999, 3.024, 3.024])),
            edges_per_cm=edges,
        )
    boxed, _ = turned_run(1, box=np.eye(3))
    with pytest.raises(DataError, match="isolated"):
        mode_temperatures(boxed, blocks_of(200, 30), modes=modes)


def test_configurational_terms_exact_and_by_probes():
    potential = Springs(water())
    generator = np.random.default_rng(2)
    x = minimise(potential, WATER) + 0.004 * generator.normal(size=(4, 3, 3))
    gradient, exact = configurational_terms(potential, x)
    for frame in range(4):
        assert exact[frame] == pytest.approx(np.trace(hessian(potential, x[frame])), rel=1e-6)
    from longstride.state import State

    forces = potential.energy_forces(State(positions=torch.as_tensor(x)))[1].numpy()
    np.testing.assert_allclose(gradient, (forces**2).sum(axis=(1, 2)))
    repeats = np.array([configurational_terms(potential, x[:1], probes=4, seed=seed)[1][0] for seed in range(60)])
    assert abs(repeats.mean() - exact[0]) < 5 * repeats.std(ddof=1) / np.sqrt(60)
    assert repeats.std() > 0


def test_configurational_temperature_of_a_well_from_forces():
    kT = BOLTZMANN_KJ_PER_MOL_K * 300.0
    k = torch.tensor([1e4, 3e4, 2e4], dtype=torch.float64)
    well = HarmonicWell(water(), center=torch.as_tensor(WATER), k=k)
    generator = np.random.default_rng(3)
    x = WATER + np.sqrt(kT / k.numpy())[:, None] * generator.normal(size=(2000, 3, 3))
    gradient, laplacian = configurational_terms(well, x[:200], probes=2)
    np.testing.assert_allclose(laplacian, 3 * k.sum().item(), rtol=1e-8)
    gradient = (k.numpy()[:, None] * (x - WATER)) ** 2
    series = gradient.sum(axis=(1, 2)) / (3 * k.sum().item()) / BOLTZMANN_KJ_PER_MOL_K
    error = series.std() / np.sqrt(2000)
    assert abs(series.mean() - 300) < 5 * error
    assert abs(series.mean() * 32 / 30 - 300) > 3 * error
