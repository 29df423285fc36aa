"""Labels and distillation: plans, hold-out, bitwise continuation, quality measures with known answers."""

import dataclasses

import numpy as np
import pytest
import torch

from longstride.config import DistillConfig
from longstride.data.checkpoint import open_state
from longstride.errors import LongstrideError, NumericsError
from longstride.potentials.student import StudentMetadata, StudentNetwork
from longstride.state import State, System
from longstride.training.distill import (
    Task,
    fit_shifts,
    hessian_error,
    largest_errors,
    learning_rate,
    measure,
    predict,
    stiff_errors,
    train,
)
from longstride.training.labels import FRAME_FIELDS, LabelPlan, label_frames
from longstride.units import thermal_energy

KT = thermal_energy(310.0)
METADATA = StudentMetadata(elements=(1, 8), teacher="springs", channels=4, hidden=16)
SECTION = DistillConfig(max_steps=60, batch_size=8, checkpoint_every_steps=20, learning_rate=4e-2)
WATER = System(
    name="water",
    atomic_numbers=np.array([8, 1, 1]),
    masses=np.array([15.999, 1.008, 1.008]),
    bonds=np.array([[0, 1], [0, 2]]),
    atom_names=("O", "H1", "H2"),
    residue_names=("HOH",) * 3,
    residue_indices=np.zeros(3, dtype=np.int64),
)
MINIMUM = 0.1 * np.array([[0.0, 0.0, 0.1173], [0.0, 0.7572, -0.4692], [0.0, -0.7572, -0.4692]])


class Springs:
    """A teacher: springs between all pairs of a water molecule, and a constant."""

    name, system = "springs", WATER

    def __init__(self, fails=()):
        self.calls, self.fails = 0, set(fails)
        first, second = torch.triu_indices(3, 3, 1)
        x = torch.from_numpy(MINIMUM)
        self.pairs, self.r0 = (first, second), (x[first] - x[second]).norm(dim=-1)
        self.k = torch.tensor([3e5, 3e5, 5e4], dtype=torch.float64)

    def energy(self, x):
        return self.energy_forces(x)[0]

    def energy_forces(self, x):
        self.calls += 1
        first, second = self.pairs
        apart = x.positions[:, first] - x.positions[:, second]
        r = apart.norm(dim=-1)
        pull = (-self.k * (r - self.r0) / r)[..., None] * apart
        forces = torch.zeros_like(x.positions).index_add(1, first, pull).index_add(1, second, -pull)
        energy = 0.5 * (self.k * (r - self.r0) ** 2).sum(dim=1) - 12_345.0
        if self.calls in self.fails:
            energy = energy * float("nan")
        return energy, forces


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trajectories():
    noise = np.random.default_rng(0).normal(scale=0.003, size=(4, 40, 3, 3))
    return list((MINIMUM + noise).astype(np.float32))


def label(store, trajectories, *, teacher=None, frames=160):
    return label_frames(teacher or Springs(), trajectories, plan=LabelPlan.of(frames, chains=4), kT=KT, seed=1, store=store)


@pytest.fixture(scope="module")
def frames(trajectories, tmp_path_factory):
    with open_state(tmp_path_factory.mktemp("labels"), "key") as store:
        return label(store, trajectories)


def test_plan_spends_what_it_is_given():
    for total in (20, 100, 2800):
        plan = LabelPlan.of(total)
        assert abs(plan.total - total) <= plan.chains
        assert plan.reference > 0
        assert plan.steps > 0


def test_few_reference_frames_make_longer_chains(trajectories, tmp_path):
    plan = LabelPlan.of(2000, chains=4).limited(160)
    assert plan.reference == 160
    assert abs(plan.total - 2000) <= 2 * plan.chains
    with open_state(tmp_path, "key") as store, pytest.raises(LongstrideError, match="fewer than 400 reference frames"):
        label_frames(Springs(), trajectories, plan=LabelPlan.of(2000), kT=KT, seed=1, store=store)


def test_labels_are_the_teachers(frames):
    energy, forces = Springs().energy_forces(State(positions=frames.positions))
    assert torch.equal(energy, frames.energies)
    assert torch.equal(forces, frames.forces)
    assert set(frames.trajectory.tolist()) == {0, 1, 2, 3}
    assert len(frames) == LabelPlan.of(160, chains=4).total


def test_chains_are_hot_and_sane(frames):
    moved = frames.where(torch.arange(len(frames)) >= 32)
    # three springs hold kT/2 each at every chain's temperature; mean heat of four chains is 1.325
    expected = 1.5 * KT * (1.0 + 1.3 + 1.7 + 1.0) / 4
    assert 0.5 * expected < float((moved.energies + 12_345.0)[20:].mean()) < 2 * expected


def test_labelling_continues_bitwise(trajectories, frames, tmp_path):
    class Killed(Springs):
        def energy_forces(self, x):
            if self.calls == 11:
                raise KeyboardInterrupt
            return super().energy_forces(x)

    with open_state(tmp_path / "state", "key") as store:
        with pytest.raises(KeyboardInterrupt):
            label(store, trajectories, teacher=Killed())
        teacher = Springs()
        continued = label(store, trajectories, teacher=teacher)
    assert teacher.calls < 30  # finished blocks were kept
    for key in FRAME_FIELDS:
        assert torch.equal(getattr(frames, key), getattr(continued, key)), key


def test_failed_frames_are_dropped_and_many_are_an_error(trajectories, tmp_path):
    with open_state(tmp_path / "few", "key") as store:
        found = label(store, trajectories, teacher=Springs(fails={12}))
    assert torch.isfinite(found.energies).all()
    with open_state(tmp_path / "many", "key") as store, pytest.raises(NumericsError, match="the teacher failed on"):
        label(store, trajectories, teacher=Springs(fails=range(1, 100, 2)))


class Scaled(Springs):
    """A student: the teacher's forces times a factor."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def energy_forces(self, x):
        energy, forces = super().energy_forces(x)
        return energy, self.factor * forces


def driven(store, trajectories, student):
    plan = LabelPlan(reference=0, chains=6, steps=40)
    return label_frames(Springs(), trajectories, plan=plan, kT=KT, seed=4, store=store, fast=student)


def test_driven_frames_are_labelled_by_the_teacher_and_go_where_the_student_leads(trajectories, tmp_path):
    found = {}
    for factor in (1.0, 0.6):
        with open_state(tmp_path / str(factor), "key") as store:
            found[factor] = driven(store, trajectories, Scaled(factor))
        energy, forces = Springs().energy_forces(State(positions=found[factor].positions))
        assert torch.equal(energy, found[factor].energies)
        assert torch.equal(forces, found[factor].forces)
        assert len(found[factor]) == 6 * 41
    # between teacher calls a student that is too soft lets bonds go farther
    error, control = (float((frames.energies + 12_345.0)[60:].mean()) for frames in (found[0.6], found[1.0]))
    assert error > 1.1 * control


def test_driven_labelling_continues_bitwise(trajectories, tmp_path):
    class Killed(Scaled):
        def energy_forces(self, x):
            if self.calls == 90:
                raise KeyboardInterrupt
            return super().energy_forces(x)

    with open_state(tmp_path / "whole", "key") as store:
        whole = driven(store, trajectories, Scaled(0.9))
    with open_state(tmp_path / "parts", "key") as store:
        with pytest.raises(KeyboardInterrupt):
            driven(store, trajectories, Killed(0.9))
        parts = driven(store, trajectories, Scaled(0.9))
    for key in FRAME_FIELDS:
        assert torch.equal(getattr(whole, key), getattr(parts, key)), key


def test_beyond_a_hole_the_chain_starts_again(trajectories, tmp_path):
    found = {}
    for hole in (1500.0, float("inf")):
        plan = LabelPlan(reference=0, chains=6, steps=40, hole=hole)
        student = Scaled(0.6)
        with open_state(tmp_path / str(hole), "key") as store:
            frames = label_frames(Springs(), trajectories, plan=plan, kT=KT, seed=4, store=store, fast=student)
        error = (0.4 * frames.forces).norm(dim=2).amax(dim=1).reshape(41, 6)
        again = frames.positions.reshape(41, 6, 3, 3)[1:] - frames.positions.reshape(41, 6, 3, 3)[:1]
        found[hole] = (error, again.abs().amax(dim=(2, 3)))
    error, moved = found[1500.0]
    beyond = error[:-1] > 1500.0
    assert 5 < int(beyond.sum()) < beyond.numel() / 2
    # one step after a hole a chain is one step away from its start; without the rule it is wherever it was led
    one_step = moved[0].max() * 2
    assert float(moved[1:][beyond[1:]].max()) < one_step
    error, moved = found[float("inf")]
    assert float(moved[1:][error[1:-1] > 1500.0].max()) > one_step


def test_a_stride_makes_chains_longer_and_frames_fewer(trajectories, tmp_path):
    teacher, plan = Springs(), LabelPlan(reference=0, chains=4, steps=6, stride=5, heat=(1.0,))
    with open_state(tmp_path, "key") as store:
        sparse = label_frames(teacher, trajectories, plan=plan, kT=KT, seed=1, store=store)
    assert (len(sparse), plan.total, teacher.calls) == (28, 124, 31)
    plan = LabelPlan(reference=0, chains=4, steps=30, heat=(1.0,))
    with open_state(tmp_path / "all", "key") as store:
        every = label_frames(Springs(), trajectories, plan=plan, kT=KT, seed=1, store=store)
    assert torch.equal(every.positions.reshape(31, 4, 3, 3)[::5], sparse.positions.reshape(7, 4, 3, 3))


def test_largest_errors_find_the_frame_with_a_hole(frames):
    student = StudentNetwork(METADATA, torch.Generator().manual_seed(1))(WATER)
    forces = predict(student, frames)[1]
    forces[17, 1] += torch.tensor([0.0, 300.0, 400.0])
    error = largest_errors(student, dataclasses.replace(frames, forces=forces))
    assert int(error.argmax()) == 17
    assert abs(float(error[17]) - 500.0) < 1e-6
    assert float(error.topk(2).values[1]) < 1e-6


def test_hessian_error_of_scaled_springs(frames):
    assert hessian_error(Springs(), Springs(), frames, seed=3) < 1e-12
    assert abs(hessian_error(Springs(), Scaled(1.02), frames, seed=3) - 0.02) < 1e-9


def fit(frames, store, *, section=SECTION, stop_at=None):
    network = StudentNetwork(METADATA, torch.Generator().manual_seed(1))

    class Stop:
        def update(self, step, note=""):
            if step == stop_at:
                raise KeyboardInterrupt

    held = frames.trajectory == 3
    rows = train(
        network,
        [Task(student=network(WATER), frames=frames.where(~held), held_out=frames.where(held))],
        section=section,
        steps=section.max_steps,
        seed=2,
        store=store,
        progress=Stop(),
    )
    return network, rows


def test_training_learns_and_continues_bitwise(frames, tmp_path):
    with open_state(tmp_path / "whole", "key") as store:
        network, rows = fit(frames, store)
    assert [row["step"] for row in rows] == [20, 40, 60]
    assert rows[-1]["held_out_force_relative"] < 0.2
    assert rows[-1]["held_out_force_relative"] < rows[0]["held_out_force_relative"]
    with open_state(tmp_path / "parts", "key") as store:
        for stop_at in (25, 45):
            with pytest.raises(KeyboardInterrupt):
                fit(frames, store, stop_at=stop_at)
        continued, again = fit(frames, store)
    assert rows == again
    for key, value in network.state_dict().items():
        assert torch.equal(value, continued.state_dict()[key]), key


def test_weight_along_bonds_trades_for_them(frames, tmp_path):
    found = {}
    for weight in (0.0, 20.0):
        with open_state(tmp_path / str(weight), "key") as store:
            _, rows = fit(frames, store, section=SECTION.model_copy(update={"bond_weight": weight}))
        found[weight] = rows[-1]["held_out_bond_relative"] / rows[-1]["held_out_force_relative"]
    assert found[20.0] < found[0.0]


def test_divergence_is_one_line(frames, tmp_path):
    broken = dataclasses.replace(frames, forces=frames.forces * float("inf"))
    with open_state(tmp_path / "state", "key") as store, pytest.raises(NumericsError, match="learning_rate") as error:
        fit(broken, store)
    assert "\n" not in str(error.value)


def test_shifts_make_energies_agree(frames, tmp_path):
    network = StudentNetwork(METADATA, torch.Generator().manual_seed(1))
    fit_shifts(network, [Task(student=network(WATER), frames=frames, held_out=frames)])
    energies = network(WATER).energy(State(positions=frames.positions))
    assert abs(float((energies - frames.energies).mean())) < 1e-3
    # measured quality does not depend on the constant
    moved = dataclasses.replace(frames, energies=frames.energies + 1e4)
    student = network(WATER)
    assert abs(measure(student, frames).energy_mae - measure(student, moved).energy_mae) < 1e-6


def test_stiff_errors_of_a_student_that_is_too_soft(frames):
    bonds = torch.from_numpy(WATER.bonds)
    relative, stiffness = stiff_errors(frames.positions, frames.forces, 0.97 * frames.forces, bonds)
    assert abs(relative - 0.03) < 1e-9
    assert torch.allclose(stiffness, torch.full((2,), -0.03, dtype=torch.float64))
    # a transverse error is invisible to both, though not to the force error
    across = torch.zeros_like(frames.forces)
    across[:, :, 0] = 50.0
    relative, stiffness = stiff_errors(frames.positions, frames.forces, frames.forces + across, bonds)
    assert relative < 0.05
    assert float(stiffness.abs().max()) < 0.02


def test_learning_rate_warms_up_and_decays():
    rates = [learning_rate(step, peak=1.0, steps=1000) for step in range(1000)]
    assert rates[0] == pytest.approx(0.02, rel=1e-3)
    assert max(rates) > 0.98
    assert rates[-1] < 0.011


def test_predictions_do_not_depend_on_chunks(frames):
    network = StudentNetwork(METADATA, torch.Generator().manual_seed(1))
    student = network(WATER)
    energies, forces = predict(student, frames)
    one = predict(student, frames.where(torch.arange(len(frames)) == 100))
    assert torch.allclose(energies[100], one[0][0], atol=1e-3)
    assert torch.allclose(forces[100], one[1][0], atol=1e-2)
