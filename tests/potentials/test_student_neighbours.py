"""Neighbour tables miss nothing, and the student on them has the energy of the student that looks at all pairs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from contracts import check_potential
from longstride.errors import LongstrideError
from longstride.potentials.neighbours import NeighbourList
from longstride.potentials.student import StudentMetadata, StudentNetwork
from longstride.potentials.student_neighbours import NeighbourStudent
from longstride.state import State, System

METADATA = StudentMetadata(elements=(1, 6, 7, 8), teacher="gfn2-xtb", cutoff_nm=0.3)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def network():
    return StudentNetwork(METADATA, seeded(3)).double()


@pytest.fixture(scope="module")
def frames(alanine):
    return torch.from_numpy(alanine.positions) + 0.003 * torch.randn(3, 22, 3, generator=seeded(1), dtype=torch.float64)


@pytest.fixture(scope="module")
def liquid():
    """64 water molecules on a grid in a skewed box, turned at random, with one overlap of two hydrogens."""
    generator = seeded(5)
    edge = 1.24
    box = torch.tensor([[edge, 0.0, 0.0], [0.1, edge, 0.0], [-0.05, 0.15, edge]], dtype=torch.float64)
    cells = torch.stack(torch.meshgrid(*[torch.arange(4.0, dtype=torch.float64)] * 3, indexing="ij"), dim=-1).reshape(-1, 3) / 4
    shape = torch.tensor([[0.0, 0.0, 0.0], [0.0957, 0.0, 0.0], [-0.024, 0.0927, 0.0]], dtype=torch.float64)
    turns, _ = torch.linalg.qr(torch.randn(64, 3, 3, generator=generator, dtype=torch.float64))
    positions = (cells @ box)[:, None] + shape @ turns
    positions = positions.reshape(1, -1, 3) + 0.004 * torch.randn(1, 192, 3, generator=generator, dtype=torch.float64)
    numbers = np.tile([8, 1, 1], 64)
    system = System(
        name="liquid",
        atomic_numbers=numbers,
        masses=np.where(numbers == 1, 1.008, 15.999),
        bonds=np.zeros((0, 2), dtype=np.int64),
        atom_names=("X",) * 192,
        residue_names=("HOH",) * 192,
        residue_indices=np.arange(192) // 3,
    )
    return system, positions, box[None]


def images(system, positions, box):
    """The atoms of a box and all images near it, as one isolated cluster; the first atoms are those of the box."""
    shifts = torch.stack(torch.meshgrid(*[torch.arange(-1.0, 2.0, dtype=torch.float64)] * 3, indexing="ij"), dim=-1).reshape(
        -1, 3
    )
    shifts = torch.cat([shifts[(shifts == 0).all(dim=1)], shifts[(shifts != 0).any(dim=1)]]) @ box[0]
    inside = positions[0] - torch.floor(torch.linalg.solve(box[0].T, positions[0].T).T) @ box[0]
    everything = (inside[None] + shifts[:, None]).reshape(-1, 3)
    n = system.n_atoms
    near = torch.cdist(everything, inside).min(dim=1).values < 0.66  # two cutoffs: an image's own neighbours count as well
    near[:n] = True
    numbers = np.tile(system.atomic_numbers, len(shifts))[near.numpy()]
    cluster = dataclasses.replace(system, atomic_numbers=numbers, name="images")
    return cluster, everything[near][None]


def test_fulfils_the_contract_of_potentials(network, alanine, frames):
    check_potential(NeighbourStudent(network, alanine.system), frames)


def test_equals_the_student_of_all_pairs(network, alanine, frames):
    x = frames.clone()
    x[0, 1] = x[0, 0] + torch.tensor([0.03, 0.02, 0.01])  # in contact: the repulsion acts
    energy, forces = network(alanine.system).energy_forces(State(positions=x))
    found, found_forces = NeighbourStudent(network, alanine.system).energy_forces(State(positions=x))
    assert torch.allclose(found, energy, atol=1e-8, rtol=0)
    assert torch.allclose(found_forces, forces, atol=1e-6, rtol=0)


def test_a_box_is_its_images(network, liquid):
    system, positions, box = liquid
    _, forces = NeighbourStudent(network, system, skin_nm=0.02).energy_forces(State(positions=positions, box=box))
    cluster, everything = images(system, positions, box)
    _, truth = NeighbourStudent(network, cluster, skin_nm=0.02).energy_forces(State(positions=everything))
    assert torch.allclose(forces[0], truth[0, : system.n_atoms], atol=1e-7, rtol=0)
    # negative control: without the box, atoms at its faces lack neighbours
    _, isolated = NeighbourStudent(network, system).energy_forces(State(positions=positions))
    assert float((isolated - forces).abs().max()) > 1.0


def test_lattice_translations_of_atoms_change_nothing(network, liquid):
    system, positions, box = liquid
    student = NeighbourStudent(network, system)
    energy, forces = student.energy_forces(State(positions=positions, box=box))
    shifts = torch.randint(-3, 4, (192, 3), generator=seeded(8)).double() @ box[0]
    moved, moved_forces = student.energy_forces(State(positions=positions + shifts, box=box))
    assert torch.allclose(moved, energy, atol=1e-8, rtol=0)
    assert torch.allclose(moved_forces, forces, atol=1e-7, rtol=0)
    assert float(forces.sum(dim=1).abs().max()) < 1e-9


def test_forces_in_a_box_are_the_gradient(network, liquid):
    system, positions, box = liquid
    student = NeighbourStudent(network, system)
    direction = torch.randn(positions.shape, generator=seeded(9), dtype=torch.float64)
    width = 1e-6
    ahead = student.energy(State(positions=positions + width * direction, box=box))
    behind = student.energy(State(positions=positions - width * direction, box=box))
    forces = student.energy_forces(State(positions=positions, box=box))[1]
    slope = float((behind - ahead) / (2 * width))
    assert abs(slope - float((forces * direction).sum())) < 1e-7 * float(forces.norm() * direction.norm())


def test_replicas_in_one_batch_are_what_they_are_alone(network, liquid):
    system, positions, box = liquid
    both = torch.cat([positions, positions + 0.002 * torch.randn(positions.shape, generator=seeded(4), dtype=torch.float64)])
    boxes = torch.cat([box, 1.02 * box])
    student = NeighbourStudent(network, system)
    energy, forces = student.energy_forces(State(positions=both, box=boxes))
    for index in range(2):
        alone = NeighbourStudent(network, system)
        one, one_forces = alone.energy_forces(State(positions=both[index : index + 1], box=boxes[index : index + 1]))
        assert torch.allclose(one, energy[index], atol=1e-8, rtol=0)
        assert torch.allclose(one_forces[0], forces[index], atol=1e-7, rtol=0)


def walk(network, liquid, *, step_nm):
    """Largest difference between a table that is kept and one that is made anew, along a walk of 30 steps."""
    system, positions, box = liquid
    kept, generator, worst = NeighbourStudent(network, system, skin_nm=0.08), seeded(6), 0.0
    for _ in range(30):
        positions = positions + step_nm * torch.randn(positions.shape, generator=generator, dtype=torch.float64)
        state = State(positions=positions, box=box)
        fresh = NeighbourStudent(network, system, skin_nm=0.01).energy_forces(state)[1]
        worst = max(worst, float((kept.energy_forces(state)[1] - fresh).abs().max() / fresh.abs().max()))
    return worst, kept._list.rebuilds


def test_a_table_serves_until_an_atom_has_moved_half_the_skin(network, liquid, monkeypatch):
    worst, rebuilds = walk(network, liquid, step_nm=0.004)
    assert worst < 1e-10
    assert 1 < rebuilds < 30
    assert walk(network, liquid, step_nm=0.012)[0] < 1e-10
    # negative control: a table that is never rebuilt misses neighbours
    monkeypatch.setattr(NeighbourList, "_stale", lambda *_: False)
    assert walk(network, liquid, step_nm=0.012)[0] > 1e-4


def test_a_box_thinner_than_twice_the_reach_is_refused(network, liquid):
    system, positions, box = liquid
    student = NeighbourStudent(network, system, skin_nm=0.05)
    with pytest.raises(LongstrideError, match=r"'liquid' is 0\.6\d\d nm wide, less than twice the reach of the student"):
        student.energy_forces(State(positions=positions, box=0.55 * box))


def test_gradients_of_weights_equal_those_of_all_pairs(network, alanine, frames):
    found = []
    for student in (network(alanine.system), NeighbourStudent(network, alanine.system)):
        network.zero_grad()
        energy, forces = student.network_forces(frames)
        (energy.sum() + forces.square().sum()).backward()
        found.append([weight.grad.clone() for weight in network.parameters()])
    network.zero_grad()
    for first, second in zip(*found, strict=True):
        assert torch.allclose(first, second, rtol=1e-8, atol=1e-6 * float(first.abs().max()))


@pytest.mark.slow
def test_compiled_equals_plain(liquid):
    system, positions, box = liquid
    network = StudentNetwork(METADATA, seeded(3)).float()
    plain = NeighbourStudent(network, system).energy_forces(State(positions=positions, box=box))
    compiled = NeighbourStudent(network, system, compile=True).energy_forces(State(positions=positions, box=box))
    assert torch.allclose(plain[1], compiled[1], atol=1e-4 * float(plain[1].abs().max()), rtol=0)
