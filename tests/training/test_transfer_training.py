"""Training of the transferable flow: several batches in a step, several processes, other devices and precisions."""

import multiprocessing
import os
import socket
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longstride.config import TransferConfig
from longstride.data.atomic import read_arrays, write_arrays
from longstride.data.checkpoint import StateFolder
from longstride.errors import ConfigError, DataError, LongstrideError
from longstride.flows.torsion_features import ELEMENTS, FARTHEST, PROFILE_HARMONICS, TorsionFeatures
from longstride.flows.torsion_network import TorsionArchitecture, TorsionNetwork
from longstride.seeds import job_seed
from longstride.training.device import training_device
from longstride.training.module_state import ModuleState
from longstride.training.ranks import ALONE, Ranks, joined
from longstride.training.transfer import Dynamics, MoleculeSamples, leaving, negative_log_likelihood, rarity, train

LAG = 3
SIZES = TorsionArchitecture(lags_ps=(10.0,), width=16, heads=2, layers=1, message_rounds=2, components=3)
SECTION = TransferConfig(
    max_steps=12, molecules_per_step=2, samples_per_molecule=8, warm_up_steps=2, learning_rate=1e-3, ema_decay=0.9,
    metrics_every_steps=4, checkpoint_every_steps=4,
)  # fmt: skip
SEED, RANKS = 7, 2


def molecule(name, n_atoms, n_torsions, *, dtype=torch.float64):
    """Return a molecule of random features, with torsions near zero and dynamics of its own."""
    generator = torch.Generator().manual_seed(n_atoms)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    chain = torch.arange(n_atoms - 1)
    bonds = torch.stack([torch.cat([chain, chain + 1]), torch.cat([chain + 1, chain])])
    k = torch.arange(n_torsions)
    features = TorsionFeatures(
        atoms=random(n_atoms, len(ELEMENTS) + 9),
        bonds=bonds,
        ends=k[:, None] + torch.arange(4),
        substituents=torch.randint(-1, n_atoms, (n_torsions, 2, 3), generator=generator),
        placements=random(n_torsions, 2, 3, 2),
        profiles=random(n_torsions, 4 * PROFILE_HARMONICS),
        kinds=random(n_torsions, 5),
        symmetry=1.0 + (k % 3).double(),
        distances=(k[:, None] - k).abs().clamp(max=FARTHEST),
    )
    trajectories = [(0.1 * random(20, n_torsions)).cumsum(0) for _ in range(2)]
    dynamics = Dynamics.of(trajectories, lags=(LAG,), independent_fraction=0.5)
    return MoleculeSamples(name=name, features=features, torsions=0.3 * random(40, n_torsions), dynamics=dynamics)


def molecules(dtype=torch.float64):
    return [molecule(f"m{index}", 8 + index, 3 + index, dtype=dtype) for index in range(4)]


def network(dtype=torch.float64):
    torch.manual_seed(SEED)
    return TorsionNetwork(SIZES).to(dtype)


def fresh(ranks=ALONE, dtype=torch.float64):
    seed = SEED if ranks.first else job_seed(SEED, ranks.rank)
    rates = {"learning_rate": 1e-3, "weight_decay": 0.01, "rate_key": "transfer.learning_rate"}
    return ModuleState.fresh(network(dtype), **rates, seed=seed, ranks=ranks)


def weights(state):
    return {name: value.detach().numpy() for name, value in state.module.named_parameters()}


def gradients(state):
    return {name: value.grad.clone() for name, value in state.module.named_parameters()}


def same(one, two):
    return all(np.array_equal(one[name], two[name]) for name in one)


def close(one, two):
    return all(np.allclose(one[name], two[name], rtol=1e-9, atol=1e-11) for name in one)


STEP = {"rate": 1e-3, "decay": 0.9, "max_gradient": float("inf")}


def test_accumulated_batches_have_the_gradient_of_one_batch_of_all_their_molecules():
    def after(*batches):
        state, drawn = fresh(), torch.Generator().manual_seed(1)
        losses = (negative_log_likelihood(state.module, batch, 8, drawn).mean() for batch in batches)
        return state.update_from(losses, **STEP).item(), gradients(state)

    a, b, c, d = molecules()
    loss, whole = after([a, b, c, d])
    parts_loss, parts = after([a, b], [c, d])
    _, uneven = after([a, b, c], [d])  # negative control: batches of different size weigh their molecules differently
    assert parts_loss == pytest.approx(loss, rel=1e-12)
    assert close(whole, parts)
    assert not close(whole, uneven)


def test_a_batch_is_drawn_only_when_the_one_before_is_done():
    state, seen = fresh(), []

    def losses():
        for batch in molecules():
            seen.append(state.module.start.grad is None)
            yield negative_log_likelihood(state.module, [batch], 4, state.generator).mean()

    state.update_from(losses(), **STEP)
    assert seen == [True, False, False, False]


def test_a_step_of_training_averages_as_many_batches_as_the_configuration_says(monkeypatch):
    drawn = []

    def counted(*arguments):
        drawn.append([item.name for item in arguments[1]])
        return negative_log_likelihood(*arguments)

    monkeypatch.setattr("longstride.training.transfer.negative_log_likelihood", counted)
    state = fresh()
    train(state, molecules(), SECTION.model_copy(update={"accumulate": 3}))
    assert state.step == SECTION.max_steps
    assert len(drawn) == 3 * SECTION.max_steps
    assert len({tuple(names) for names in drawn[:3]}) > 1


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_loss_falls_in_either_precision(precision):
    state, seen = fresh(dtype=torch.float32), []
    section = SECTION.model_copy(
        update={"precision": precision, "max_steps": 60, "learning_rate": 5e-3, "metrics_every_steps": 20}
    )
    kept = molecules(torch.float32)

    def evaluate(current):
        loss = negative_log_likelihood(current, kept, 20, torch.Generator().manual_seed(1)).mean()
        seen.append(loss.dtype)
        return {"loss": loss.item()}

    before = evaluate(state.module)["loss"]
    train(state, kept, section, evaluate=torch.no_grad()(evaluate))
    assert all(value.dtype == torch.float32 for value in state.module.parameters())
    assert set(seen) == {torch.float32}
    assert state.rows[-1]["loss"] < before - 0.3


def test_low_precision_rounds_the_matrix_products_alone():
    kept, one = molecules(torch.float32), fresh(dtype=torch.float32).module
    exact = negative_log_likelihood(one, kept, 20, torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = negative_log_likelihood(one, kept, 20, torch.Generator().manual_seed(1))
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).abs().mean() < 0.02


class OnlyOn(TorchDispatchMode):
    """Refuses every operation whose result lies on another device than the given one; single numbers may."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.dim():
                assert value.device == self.device, f"{func} made a tensor on {value.device}"
        return result


def test_no_tensor_of_the_network_is_made_on_another_device():
    """The device "meta" computes shapes alone; what is made without naming a device would be on the CPU, as beside a GPU."""
    device = torch.device("meta")
    there = TorsionNetwork(SIZES).to(device)
    kept = [item.on(device) for item in molecules(torch.float32)]
    shape = (len(kept), max(item.torsions.shape[1] for item in kept))
    t, label = torch.zeros(shape, device=device), torch.zeros(len(kept), dtype=torch.int64, device=device)
    with OnlyOn(device):
        tokens = there.encode([item.features for item in kept])
        context = there.context(tokens, t, label)
        assert there.log_prob(tokens, t, context).shape == (len(kept),)
        there.sample(tokens, context, None)
        with pytest.raises(AssertionError, match="made a tensor on cpu"):  # negative control
            torch.arange(3)
    loss = negative_log_likelihood(there, kept, 8, torch.Generator())
    assert loss.device == device
    loss.mean().backward()
    assert {value.grad.device for value in there.parameters() if value.grad is not None} == {device}


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert training_device("auto", key="transfer.device", index=1) == torch.device("cuda", 1)
    assert training_device("cpu", key="transfer.device", index=5) == torch.device("cpu")
    with pytest.raises(LongstrideError, match=r"process 2 of this node has no GPU of its own .* set transfer\.device to cpu$"):
        training_device("auto", key="transfer.device", index=2)


def test_processes_that_cannot_find_each_other_are_one_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("longstride.training.ranks.die_with_parent", lambda: None)
    with pytest.raises(ConfigError, match=r"start them with torchrun$"), joined(cuda=False):
        pass
    monkeypatch.delenv("WORLD_SIZE")
    with joined(cuda=False) as ranks:
        assert ranks is ALONE


class Kill(Exception):
    """Stands for kill -9."""


def work(rank, port, base):
    """Run every scenario in one of two processes and leave what came of it in files."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    torch.set_num_threads(1)
    with joined(cuda=False) as ranks:
        whole = fresh(ranks)
        train(whole, molecules(), SECTION, evaluate=lambda _: {"called": 1.0}, folder=StateFolder(base / "whole"))
        write_arrays(base / f"whole-{rank}.safetensors", weights(whole), {"rows": str(len(whole.rows))})
        _killed(ranks, base / "killed")
        again = fresh(ranks)
        train(again, molecules(), SECTION, evaluate=lambda _: {"called": 1.0}, folder=StateFolder(base / "killed"))
        write_arrays(base / f"again-{rank}.safetensors", weights(again), {"rows": str(len(again.rows))})
        made = []
        for finished in (True, False):
            ranks.once(lambda make, finished=finished: not finished and make() is None, lambda: made.append(1))
        partial = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
        partial[0].grad = torch.full((2,), 1.0 + rank)
        partial[1].grad = None if rank else torch.ones(2)
        mean = ranks.average_gradients(partial, torch.tensor(float(rank)))
        found = {"first": partial[0].grad, "some": partial[1].grad, "loss": mean.reshape(1), "made": torch.ones(len(made))}
        assert partial[2].grad is None
        write_arrays(base / f"other-{rank}.safetensors", {name: value.numpy() for name, value in found.items()})


def _killed(ranks, folder):
    save, count = ModuleState.save, [0]

    def dying(self, place):
        save(self, place)
        count[0] += 1
        if count[0] == 2:
            raise Kill

    ModuleState.save = dying
    with pytest.raises(Kill):
        train(fresh(ranks), molecules(), SECTION, evaluate=lambda _: {"called": 1.0}, folder=StateFolder(folder))
    ModuleState.save = save


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder in which two processes have worked."""
    base = tmp_path_factory.mktemp("pair")
    for name in ("whole", "killed"):
        (base / name).mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["longstride.training.transfer"])
    started = [context.Process(target=work, args=(rank, port, base), daemon=True) for rank in range(RANKS)]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=240)
    assert [process.exitcode for process in started] == [0] * RANKS
    return base


def left_by(pair, name):
    return [read_arrays(pair / f"{name}-{rank}.safetensors") for rank in range(RANKS)]


@pytest.mark.slow
def test_both_ranks_end_with_the_same_weights_and_one_keeps_the_metrics(pair):
    (first, of_first), (second, of_second) = left_by(pair, "whole")
    assert same(first, second)
    assert not same(first, weights(fresh()))
    assert (of_first["rows"], of_second["rows"]) == ("3", "0")


@pytest.mark.slow
def test_two_ranks_do_what_one_process_does_with_the_batches_of_both(pair):
    def combined(seeds):
        alone, streams = fresh(), [fresh(Ranks(rank=rank, count=RANKS)).generator for rank in seeds]
        kept = alone.update_from

        def update_from(losses, **step):
            del losses  # those of the process's own stream
            return kept(((_loss(alone.module, stream)) for stream in streams), **step)

        alone.update_from = update_from
        train(alone, molecules(), SECTION)
        return weights(alone)

    found = left_by(pair, "whole")[0][0]
    assert close(combined([0, 1]), found)
    assert not close(combined([0, 0]), found)  # negative control: the ranks draw different batches


def _loss(module, generator):
    kept = molecules()
    chosen = torch.randperm(len(kept), generator=generator)[: SECTION.molecules_per_step].tolist()
    return negative_log_likelihood(module, [kept[k] for k in chosen], SECTION.samples_per_molecule, generator).mean()


@pytest.mark.slow
def test_killed_ranks_continue_with_the_same_weights(pair):
    for (whole, _), (again, _) in zip(left_by(pair, "whole"), left_by(pair, "again"), strict=True):
        assert same(whole, again)
    assert left_by(pair, "again")[0][1]["rows"] == "3"


@pytest.mark.slow
def test_a_checkpoint_of_another_number_of_processes_is_refused(pair, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="whole was written by a training in 2 processes, not one process; continue with as"):
        train(fresh(), molecules(), SECTION, folder=StateFolder(pair / "whole"))
    alone = fresh()
    train(alone, molecules(), SECTION, folder=StateFolder(tmp_path))
    two = fresh(Ranks(count=2))
    monkeypatch.setattr(Ranks, "share", lambda _, value: value)
    with pytest.raises(DataError, match="in one process, not 2 processes"):
        two.load(StateFolder(tmp_path))


@pytest.mark.slow
def test_gradients_that_some_ranks_lack_count_as_zero_there(pair):
    for found, _ in left_by(pair, "other"):
        assert found["first"].tolist() == [1.5, 1.5]
        assert found["some"].tolist() == [0.5, 0.5]
        assert found["loss"].tolist() == [0.5]
        assert len(found["made"]) == 1  # of finished work none, of unfinished work once


def test_rare_basins_are_drawn_more_often_and_common_states_alike():
    torch.manual_seed(1)
    rare = torch.arange(1000) < 20  # a basin of 2 % in the second torsion; the third has twice the period
    torsions = torch.randn(1000, 3) * 0.3
    torsions[rare, 1] += 3.0
    torsions[::2, 2] += torch.pi
    symmetry = torch.tensor([1.0, 1.0, 2.0])
    weights = rarity(torsions, symmetry, exponent=0.5)
    density = 0.02 * 2 * torch.pi / (2 * torch.pi * (0.3**2 + 0.5**2)) ** 0.5  # of the basin, smoothed, at its centre
    centre = weights[rare][(torsions[rare, 1] - 3.0).abs() < 0.1]
    assert len(centre) > 2
    assert torch.allclose(centre, torch.tensor(density**-0.5).double(), rtol=0.15)
    assert weights[~rare].median() == 1
    assert bool((rarity(torsions, torch.ones(3), exponent=0.0) == 1).all())
    samples = molecule("m", 8, 3)
    samples = replace(samples, features=replace(samples.features, symmetry=symmetry), torsions=torsions, dynamics=None)
    drawn = samples.rare_more_often(0.5).draw(20000, torch.Generator().manual_seed(2))[1]
    share = (drawn[:, 1] > 1.8).double().mean().item()
    expected = (weights[torsions[:, 1] > 1.8].sum() / weights.sum()).item()
    assert abs(share - expected) < 5 * (expected / 20000) ** 0.5
    plain = samples.draw(20000, torch.Generator().manual_seed(2))[1]  # negative control
    assert abs((plain[:, 1] > 1.8).double().mean().item() - expected) > 5 * (expected / 20000) ** 0.5


def test_leaving_is_the_acceptance_of_an_independence_sampler():
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.1, 0.3, 0.6]).double()
    w = (p / q).log()
    draws = torch.multinomial(q, 200_000, replacement=True, generator=torch.Generator().manual_seed(3))
    found = leaving(w, w[draws])
    exact = torch.stack([(q * ((p / q) / (p[x] / q[x])).clamp(max=1)).sum() for x in range(3)])
    assert torch.allclose(found, exact, atol=5e-3)
    assert leaving(w, torch.tensor([torch.nan, 9.0]).double()).tolist() == [0.5] * 3
