"""The xTB teacher: forces, batching, independence of history and of workers, refusals, failures as NaN."""

import numpy as np
import pytest
import torch

from contracts import Tolerance, check_potential
from longstride.errors import LongstrideError, NumericsError
from longstride.potentials.xtb import XTBPotential
from longstride.state import State, System

WATER_NM = 0.1 * np.array([[0.0, 0.0, 0.1173], [0.0, 0.7572, -0.4692], [0.0, -0.7572, -0.4692]])


def molecule(numbers=(8, 1, 1), name="water") -> System:
    n = len(numbers)
    return System(
        name=name,
        atomic_numbers=np.array(numbers),
        masses=np.ones(n),
        bonds=np.array([[0, 1], [0, 2]])[: n - 1],
        atom_names=("X",) * n,
        residue_names=("MOL",) * n,
        residue_indices=np.zeros(n, dtype=np.int64),
    )


def geometries(count: int) -> torch.Tensor:
    noise = torch.randn(count, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.from_numpy(WATER_NM) + 0.005 * noise


@pytest.fixture(scope="module")
def water():
    with XTBPotential(molecule(), threads=1) as potential:
        yield potential


def test_fulfils_the_contract_of_potentials(water):
    assert water.name == "gfn2-xtb"
    # the self-consistent cycle ends at a finite accuracy, so differences need a long step
    check_potential(water, geometries(3), tolerance=Tolerance(energy=1e-6, force=0.1, step=1e-4))


def test_known_energy(water):
    # GFN2-xTB total energy of water near its minimum, -5.07 hartree
    energy = water.energy(State(positions=torch.from_numpy(WATER_NM)[None]))
    assert abs(float(energy) / 2625.4996 + 5.0703) < 2e-3


def test_forces_are_the_gradient(water):
    x = geometries(1)
    forces = water.energy_forces(State(positions=x))[1][0]
    width = 1e-4
    shifts = width * torch.eye(9, dtype=torch.float64).reshape(9, 3, 3)
    difference = water.energy(State(positions=x + shifts)) - water.energy(State(positions=x - shifts))
    numeric = -(difference / (2 * width)).reshape(3, 3)
    assert float((forces - numeric).abs().max()) < 2e-3 * float(forces.abs().max())


def test_batch_equals_single_and_history_does_not_matter(water):
    x = geometries(5)
    energies, forces = water.energy_forces(State(positions=x))
    for index in reversed(range(5)):
        energy, force = water.energy_forces(State(positions=x[index : index + 1]))
        assert torch.equal(energy[0], energies[index])
        assert torch.equal(force[0], forces[index])


def test_number_of_workers_does_not_matter(water):
    x = geometries(5)
    expected = water.energy_forces(State(positions=x))
    with XTBPotential(molecule(), threads=3) as several:
        found = several.energy_forces(State(positions=x))
    assert torch.equal(expected[0], found[0])
    assert torch.equal(expected[1], found[1])


def test_failures_are_nan_and_do_not_spread(water):
    x = geometries(3)
    x[0, 0] = float("nan")
    x[1] = 0.0  # all atoms at one point
    energies, forces = water.energy_forces(State(positions=x))
    assert not torch.isfinite(energies[0])
    assert torch.isnan(forces[0]).all()
    assert not torch.isfinite(energies[1]) or not torch.isfinite(forces[1]).all()
    assert torch.equal(energies[2:], water.energy(State(positions=x[2:])))


def test_methods_differ():
    with XTBPotential(molecule(), method="gfn1-xtb") as other:
        assert abs(float(other.energy(State(positions=torch.from_numpy(WATER_NM)[None]))) / 2625.4996 + 5.77) < 0.05


@pytest.mark.parametrize(
    ("numbers", "options", "message"),
    [
        ((95, 1, 1), {}, "no parameters for atomic number 95"),
        ((8, 1, 1), {"charge": 1}, "9 electrons"),
        ((8, 1, 1), {"method": "pm6"}, "unknown xTB method"),
    ],
)
def test_refusals_are_one_line(numbers, options, message):
    with pytest.raises(LongstrideError, match=message) as error:
        XTBPotential(molecule(numbers), **options)
    assert "\n" not in str(error.value)


def test_charge_changes_the_energy(water):
    with XTBPotential(molecule((8, 1), "hydroxide"), charge=-1) as anion:
        energy = anion.energy(State(positions=torch.tensor([[[0.0, 0, 0], [0.096, 0, 0]]], dtype=torch.float64)))
    assert torch.isfinite(energy).all()


def test_a_dead_worker_and_a_closed_pool_are_reported():
    potential = XTBPotential(molecule(), threads=1)
    x = State(positions=geometries(2))
    potential._workers[0]._process.kill()
    with pytest.raises(NumericsError, match="ended unexpectedly"):
        potential.energy_forces(x)
    potential.close()
    with pytest.raises(NumericsError, match="closed"):
        potential.energy(x)


def test_workers_end_with_the_pool():
    potential = XTBPotential(molecule(), threads=2)
    processes = [worker._process for worker in potential._workers]
    potential.close()
    assert all(process.poll() is not None for process in processes)
