"""The student network: invariances, exact forces, smooth cutoff, storage and refusals."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from contracts import check_potential
from longstride.data.atomic import read_arrays, write_arrays
from longstride.errors import DataError, LongstrideError
from longstride.potentials.repulsion import ScreenedRepulsion
from longstride.potentials.student import StudentMetadata, StudentNetwork, load_student, save_student
from longstride.state import State, System

METADATA = StudentMetadata(elements=(1, 6, 7, 8), teacher="gfn2-xtb")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def network():
    return StudentNetwork(METADATA, torch.Generator().manual_seed(3)).double()


@pytest.fixture(scope="module")
def student(network, alanine):
    return network(alanine.system)


@pytest.fixture(scope="module")
def frames(alanine):
    noise = torch.randn(3, 22, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.from_numpy(alanine.positions) + 0.003 * noise


def evaluate(student, x):
    return student.energy_forces(State(positions=x))


def test_fulfils_the_contract_of_potentials(student, frames):
    check_potential(student, frames)


def test_forces_are_the_gradient(student, frames):
    forces = evaluate(student, frames[:1])[1][0]
    width = 1e-6
    shifts = width * torch.eye(66, dtype=torch.float64).reshape(66, 22, 3)
    difference = student.energy(State(positions=frames[:1] + shifts)) - student.energy(State(positions=frames[:1] - shifts))
    assert torch.allclose(forces.flatten(), -difference / (2 * width), rtol=1e-5, atol=1e-3)


def test_forces_include_the_repulsion(student, frames):
    x = frames[:1].clone()
    x[0, 1] = x[0, 0] + torch.tensor([0.03, 0.02, 0.01])
    width = 1e-7
    shift = torch.zeros_like(x)
    shift[0, 1, 0] = width
    numeric = -(student.energy(State(positions=x + shift)) - student.energy(State(positions=x - shift))) / (2 * width)
    force = evaluate(student, x)[1][0, 1, 0]
    assert force > 1e4  # pushed away
    assert abs(float(force - numeric)) < 1e-4 * float(force)


def test_translation_rotation_reflection(student, frames):
    energy, forces = evaluate(student, frames)
    matrix, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    for transform in (matrix, -matrix):  # a rotation and an improper rotation
        moved = frames @ transform.T + torch.tensor([5.0, -3.0, 40.0])
        energy_moved, forces_moved = evaluate(student, moved)
        assert torch.allclose(energy, energy_moved, atol=1e-9, rtol=0)
        assert torch.allclose(forces @ transform.T, forces_moved, atol=1e-7, rtol=0)


def test_exchange_of_atoms_of_one_element(student, frames, alanine):
    energy, forces = evaluate(student, frames)
    numbers = alanine.system.atomic_numbers
    order = np.arange(22)
    for element in (1, 6, 7, 8):
        where = np.flatnonzero(numbers == element)
        order[where] = np.roll(where, 1)
    energy_swapped, forces_swapped = evaluate(student, frames[:, order])
    assert torch.allclose(energy, energy_swapped, atol=1e-9, rtol=0)
    assert torch.allclose(forces[:, order], forces_swapped, atol=1e-7, rtol=0)
    # negative control: exchanging different elements is seen
    mixed = np.arange(22)
    first, second = int(np.flatnonzero(numbers == 1)[0]), int(np.flatnonzero(numbers == 8)[0])
    mixed[[first, second]] = mixed[[second, first]]
    assert float((evaluate(student, frames[:, mixed])[0] - energy).abs().min()) > 1e-3


def test_no_net_force_or_torque(student, frames):
    forces = evaluate(student, frames)[1]
    assert float(forces.sum(dim=1).abs().max()) < 1e-8
    assert float(torch.cross(frames, forces, dim=2).sum(dim=1).abs().max()) < 1e-8


def test_batch_equals_single(student, frames):
    energy, forces = evaluate(student, frames)
    for index in range(3):
        one_energy, one_forces = evaluate(student, frames[index : index + 1])
        assert torch.allclose(energy[index], one_energy[0], atol=1e-9, rtol=0)
        assert torch.allclose(forces[index], one_forces[0], atol=1e-8, rtol=0)


def test_single_precision_is_close_to_double(network, alanine, frames):
    double = evaluate(network(alanine.system), frames)[1]
    weights = StudentNetwork(METADATA)
    weights.load_state_dict(network.state_dict())
    far = evaluate(weights.float()(alanine.system), frames + 50.0)[1]  # drifted by 50 nm
    assert far.dtype == torch.float64
    assert float((far - double).abs().max()) < 1e-3 * float(double.abs().max())


def diatomic(network):
    system = System(
        name="CO",
        atomic_numbers=np.array([6, 8]),
        masses=np.array([12.0, 16.0]),
        bonds=np.array([[0, 1]]),
        atom_names=("C", "O"),
        residue_names=("CO", "CO"),
        residue_indices=np.array([0, 0]),
    )
    return network(system)


def along(distances):
    x = torch.zeros(len(distances), 2, 3, dtype=torch.float64)
    x[:, 1, 0] = torch.as_tensor(distances, dtype=torch.float64)
    return x


def test_smooth_at_the_cutoff(network):
    student = diatomic(network)
    cutoff, step = METADATA.cutoff_nm, 1e-4
    r = cutoff + step * torch.arange(-6, 7, dtype=torch.float64)
    energy, forces = evaluate(student, along(r))
    assert torch.allclose(energy[6:], energy[-1].expand(7), atol=1e-12, rtol=0)  # nothing beyond
    assert (forces[6:].abs() < 1e-9).all()
    curvature = (forces[1:, 1, 0] - forces[:-1, 1, 0]) / step
    inside = student.energy_forces(State(positions=along([0.7 * cutoff, 0.7 * cutoff + step])))[1][:, 1, 0]
    typical = abs(float(inside[1] - inside[0])) / step
    assert float((curvature[1:] - curvature[:-1]).abs().max()) < 0.02 * typical  # no jump in the second derivative


def test_atoms_cannot_collapse(network):
    student = diatomic(network)
    energy = evaluate(student, along(np.linspace(0.005, 0.06, 12)))[0]
    assert (energy[1:] < energy[:-1]).all()
    assert float(energy[0]) > 1e5


def test_repulsion_ends_before_bonds():
    repulsion = ScreenedRepulsion(np.array([6, 1, 8]))
    assert float(repulsion.reach[0, 1]) < 0.09  # C-H bonds are 0.109 nm
    r = torch.full((3, 1, 3), 0.2)
    assert not repulsion.acts(r.square())
    energy, slope = repulsion.energy_and_slope(r)
    assert float(energy.abs().max()) == 0
    assert float(slope.abs().max()) == 0
    # value at short range: screened Coulomb, here against the formula by hand for C-H at 0.02 nm
    a = 0.8854 * 0.0529177210903 / (6**0.23 + 1)
    phi = sum(
        c * np.exp(-d * 0.02 / a) for c, d in ((0.18175, 3.1998), (0.50986, 0.94229), (0.28022, 0.4029), (0.02817, 0.20162))
    )
    expected = 138.93545764 * 6 / 0.02 * phi * (1 - (0.02 / float(repulsion.reach[0, 1])) ** 2) ** 3
    energy, _ = repulsion.energy_and_slope(torch.full((3, 1, 3), 0.02))
    assert abs(2 * float(energy[0, 0, 1]) - expected) < 1e-6 * expected


def test_training_forces_are_the_same_forces(network, student, frames):
    energy, forces = evaluate(student, frames)
    energy_training, forces_training = student.network_forces(frames)
    assert torch.allclose(energy, energy_training.detach(), atol=1e-9, rtol=0)
    assert torch.allclose(forces, forces_training.detach(), atol=1e-9, rtol=0)


def test_gradient_with_respect_to_the_weights(network, student, frames):
    """What training descends, against a finite difference along a random direction."""
    parameters = list(network.parameters())
    loss = student.network_forces(frames)[1].square().sum()
    gradients = torch.autograd.grad(loss, parameters)
    generator = torch.Generator().manual_seed(4)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    width, values = 1e-6, []
    with torch.no_grad():
        for sign in (1, -1):
            for p, d in zip(parameters, directions, strict=True):
                p.add_(sign * width * d)
            values.append(float(student.network_forces(frames)[1].square().sum()))
            for p, d in zip(parameters, directions, strict=True):
                p.sub_(sign * width * d)
    numeric = (values[0] - values[1]) / (2 * width)
    analytic = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    assert abs(numeric - analytic) < 1e-4 * abs(analytic)


def test_storage(tmp_path, alanine, frames):
    network = StudentNetwork(METADATA, torch.Generator().manual_seed(5))
    network.shifts.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    save_student(tmp_path / "student.safetensors", network, {"force_rmse": 1.0})
    loaded = load_student(tmp_path / "student.safetensors", teacher="gfn2-xtb")
    assert loaded.metadata == METADATA
    before, after = evaluate(network(alanine.system), frames), evaluate(loaded(alanine.system), frames)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert json.loads(read_arrays(tmp_path / "student.safetensors")[1]["longstride"])["extra"] == {"force_rmse": 1.0}


def test_refusals_are_one_line(tmp_path, alanine):
    path = tmp_path / "student.safetensors"
    network = StudentNetwork(METADATA, torch.Generator().manual_seed(5))
    save_student(path, network)
    with pytest.raises(DataError, match="distilled from gfn2-xtb, not from gfn1-xtb") as error:
        load_student(path, teacher="gfn1-xtb")
    assert "\n" not in str(error.value)
    sulfur = dataclasses.replace(alanine.system, atomic_numbers=np.where(np.arange(22) == 0, 16, alanine.system.atomic_numbers))
    with pytest.raises(LongstrideError, match="contains atomic number 16") as error:
        network(sulfur)
    assert "\n" not in str(error.value)
    arrays, metadata = read_arrays(path)
    write_arrays(tmp_path / "other.safetensors", arrays)
    with pytest.raises(DataError, match="not a student"):
        load_student(tmp_path / "other.safetensors")
    del arrays["first"]
    write_arrays(tmp_path / "less.safetensors", arrays, metadata)
    with pytest.raises(DataError, match="incomplete"):
        load_student(tmp_path / "less.safetensors")


def test_a_box_is_refused_by_the_student_of_all_pairs(student, frames):
    with pytest.raises(LongstrideError, match="periodic=True"):
        student.energy_forces(State(positions=frames, box=3.0 * torch.eye(3, dtype=torch.float64).expand(3, 3, 3)))
