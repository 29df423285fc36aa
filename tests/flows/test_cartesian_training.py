"""Likelihood training of the Cartesian flow: augmentation, a known optimum, continuation to the bit, the stages around it."""

import json
import math

import numpy as np
import pytest
import torch

from longstride.config import CartesianConfig, ExploreSampling, FlowConfig, TimewarpSampling
from longstride.data.atomic import read_arrays
from longstride.data.checkpoint import open_state
from longstride.data.manifest import read_manifest, write_manifest
from longstride.errors import DataError, LongstrideError, NumericsError
from longstride.flows.cartesian import CartesianArchitecture, CartesianFlow, log_normal
from longstride.stages import flow as stage
from longstride.stages.sample_flow import run_explore, run_timewarp
from longstride.state import State
from longstride.training.cartesian import (
    AcceptanceLoss,
    MoleculePairs,
    RelativeStep,
    draw_batch,
    nll_per_atom,
    random_rotations,
    small_rotations,
    superposed,
    train,
    validation_nll,
)
from longstride.training.device import training_device
from longstride.training.module_state import ModuleState

TINY = CartesianArchitecture(
    couplings=2, layers=1, embedding=4, width=8, feed_forward=16, hidden=16, lengthscales_nm=(0.2, 0.6), lags_ps=(1.0,)
)
SPREAD, ATOMS = 0.04, 4


def section(**changes):
    shared = {"max_steps": 12, "metrics_every_steps": 6, "checkpoint_every_steps": 5, "ema_decay": 0.9, **changes}
    cartesian = {"batch_size": 16, "learning_rate": 3e-3, "warm_up_steps": 5, **shared.pop("cartesian", {})}
    return FlowConfig(coordinates="cartesian", cartesian=CartesianConfig(**cartesian), **shared)


def noisy_pairs(atoms=ATOMS, count=400, *, seed=0):
    """Return pairs whose y is x plus independent normal noise of width SPREAD, with centres far apart."""
    generator = torch.Generator().manual_seed(seed)
    shape = torch.randn(atoms, 3, generator=generator) * 0.2
    x = shape + 0.05 * torch.randn(count, atoms, 3, generator=generator)
    y = x + SPREAD * torch.randn(count, atoms, 3, generator=generator)
    x, y = (value - value.mean(1, keepdim=True) for value in (x, y))
    return MoleculePairs(x=x, y=y, elements=torch.arange(atoms) % 5)


def fresh(settings, *, seed=1):
    torch.manual_seed(seed)
    options = {"learning_rate": settings.cartesian.learning_rate, "weight_decay": 0.0, "rate_key": "a.key", "seed": seed}
    return ModuleState.fresh(CartesianFlow(TINY), **options)


def weights(state):
    return {name: value.detach().clone() for name, value in state.module.named_parameters()}


def test_training_reaches_the_entropy_of_the_data_and_does_not_go_below():
    # with this width of the centre's step, y - x is normal with the covariance SPREAD^2 in all directions
    step = SPREAD / math.sqrt(ATOMS)
    settings = section(
        max_steps=150, cartesian={"batch_size": 32, "learning_rate": 2e-2, "centre_step_nm": step, "warm_up_steps": 10}
    )
    train_pairs, held_out = noisy_pairs(count=2000), noisy_pairs(count=1000)
    state = fresh(settings)
    before = validation_nll(state.module, held_out, step=RelativeStep(centre_nm=step), seed=3)
    train(state, [train_pairs], settings)
    after = validation_nll(state.module, held_out, step=RelativeStep(centre_nm=step), seed=3)
    optimum = 3 * (math.log(2 * math.pi * math.e) + math.log(SPREAD))
    assert before > optimum + 3
    assert optimum - 0.1 < after < optimum + 0.15


def test_without_a_step_of_the_centre_the_data_lie_on_a_sheet():
    pairs = noisy_pairs()
    generator = torch.Generator().manual_seed(0)
    frozen = draw_batch([pairs], 200, step=RelativeStep(centre_nm=0.0), generator=generator)
    free = draw_batch([pairs], 200, step=RelativeStep(centre_nm=0.1), generator=generator)
    widths = [(batch.y - batch.x).mean(1).std().item() for batch in (frozen, free)]
    assert widths[0] < 1e-7
    assert widths[1] == pytest.approx(0.1, rel=0.1)


def test_the_centre_is_the_mass_weighted_one():
    from longstride.state import System

    system = System(
        name="pair", atomic_numbers=np.array([8, 1]), masses=np.array([15.0, 1.0]), bonds=np.array([(0, 1)]),
        atom_names=("O", "H"), residue_names=("HOH",) * 2, residue_indices=np.zeros(2, dtype=np.int64),
    )  # fmt: skip
    x = np.random.default_rng(0).normal(size=(5, 2, 3)).astype(np.float32) + 3
    pairs = MoleculePairs.from_arrays({"x": x, "y": x + 1}, system)
    torch.testing.assert_close(pairs.x, pairs.y, atol=1e-6, rtol=0)
    assert (15 * pairs.x[:, 0] + pairs.x[:, 1]).abs().max() < 1e-5
    assert pairs.x.mean(1).abs().max() > 0.1


def distances(x, y):
    return (x[:, :, None] - y[:, None]).norm(dim=-1)


def test_x_and_y_turn_together_each_pair_by_itself_and_in_both_directions_of_time():
    pairs = noisy_pairs(count=1)
    batch = draw_batch([pairs], 64, step=RelativeStep(centre_nm=0.0), generator=torch.Generator().manual_seed(0))
    here, back = distances(pairs.x, pairs.y), distances(pairs.y, pairs.x)
    found = distances(batch.x, batch.y)
    forward = (found - here).abs().amax((1, 2)) < 1e-5
    backward = (found - back).abs().amax((1, 2)) < 1e-5
    assert (forward ^ backward).all()
    assert 15 < forward.sum() < 49
    assert len(torch.unique(batch.x[:, 0, 0])) == 64
    # the control: y turned on its own
    turned = distances(batch.x, batch.y @ random_rotations(64, torch.Generator().manual_seed(1)).mT)
    assert ((turned - here).abs().amax((1, 2)) > 1e-3).all()


def test_superposed_pairs_turn_by_the_step_alone():
    pairs = noisy_pairs(count=300)
    weights = torch.full((ATOMS,), 1 / ATOMS, dtype=torch.float64)
    x, y = pairs.x.double(), pairs.y.double()
    tumbled = y @ random_rotations(300, torch.Generator().manual_seed(2)).double().mT
    back = superposed(tumbled, x, weights)
    # the best rotation does not depend on how y was turned before, and no nearby one is better
    torch.testing.assert_close(back, superposed(y, x, weights))
    assert torch.linalg.det(torch.linalg.lstsq(tumbled, back).solution).min() > 0.999
    nudged = back @ small_rotations(300, 0.05, torch.Generator().manual_seed(3)).double().mT
    assert ((nudged - x).square().sum((1, 2)) > (back - x).square().sum((1, 2))).all()
    step = RelativeStep(centre_nm=0.0, turn_rad=0.1)
    moved = step(back.float(), torch.Generator().manual_seed(4))
    cosine = (torch.linalg.lstsq(back, moved.double()).solution.diagonal(dim1=1, dim2=2).sum(-1) - 1) / 2
    angle = torch.arccos(cosine.clamp(max=1))
    assert angle.square().mean().sqrt().item() == pytest.approx(0.1 * math.sqrt(3), rel=0.1)


def test_random_rotations_are_proper_and_uniform():
    turn = random_rotations(4000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(turn @ turn.mT, torch.eye(3).expand(4000, 3, 3), atol=1e-5, rtol=0)
    assert torch.linalg.det(turn).min() > 0.999
    # the trace of a uniform rotation has mean 0 and variance 1
    trace = turn.diagonal(dim1=1, dim2=2).sum(-1)
    assert abs(trace.mean().item()) < 5 / math.sqrt(4000)
    assert abs(trace.var().item() - 1) < 0.15


def test_molecules_of_different_sizes_share_a_batch():
    molecules = [noisy_pairs(atoms) for atoms in (3, 6)]
    batch = draw_batch(molecules, 40, step=RelativeStep(centre_nm=0.1), generator=torch.Generator().manual_seed(0))
    assert set(batch.mask.sum(1).tolist()) == {3, 6}
    flow = fresh(section()).module
    together = nll_per_atom(flow, batch)
    small = batch.mask.sum(1) == 3
    condition = flow.condition(batch.x[small, :3], batch.elements[small, :3])
    alone = -flow.log_prob(batch.y[small, :3], batch.v[small, :3], condition) / 3
    torch.testing.assert_close(together[small], alone, rtol=1e-5, atol=1e-5)


class Triangle:
    """U = sum over pairs of (d - d0)^2 / 2 w^2 in kT: what it says of a configuration does not depend on its frame."""

    name, system = "triangle", None

    def energy(self, x):
        here = x.positions.double()
        d = torch.stack([(here[:, i] - here[:, j]).norm(dim=-1) for i, j in ((0, 1), (0, 2), (1, 2))])
        return ((d - 0.3) / 0.02).square().sum(0) / 2


def triangles(count, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = torch.tensor([[0.0, 0.0, 0.0], [0.3, 0.0, 0.0], [0.15, 0.26, 0.0]])
    x, y = (shape + 0.012 * torch.randn(count, 3, 3, generator=generator) for _ in range(2))
    x, y = (value - value.mean(1, keepdim=True) for value in (x, y))
    return MoleculePairs(x=x, y=y, elements=torch.tensor([0, 1, 2]))


def log_ratios(flow, pairs):
    """Return log r of one proposal from each randomly turned x."""
    generator = torch.Generator().manual_seed(11)
    x = pairs.x @ random_rotations(len(pairs), generator).mT
    with torch.no_grad():
        y, v_y, forward = flow.sample(flow.condition(x, pairs.elements), generator)
        v_x = torch.randn(x.shape, generator=generator)
        backward = flow.log_prob(x, v_x, flow.condition(y, pairs.elements)) + log_normal(v_y) - log_normal(v_x)
        at_x, at_y = (-Triangle().energy(State(positions=value)) for value in (x, y))
    return at_y - at_x + backward - forward


def test_the_acceptance_loss_raises_acceptance():
    pairs = triangles(500)
    loss = AcceptanceLoss(potential=Triangle(), kT=1.0, size=32, entropy_weight=0.1)
    sizes = {"batch_size": 32, "learning_rate": 1e-2, "centre_step_nm": 0.02, "acceptance_from_step": 30}
    found = {}
    for share in (0.0, 0.9):
        settings = section(max_steps=90, cartesian={**sizes, "acceptance_weight": share})
        state = fresh(settings)
        train(state, [pairs], settings, acceptance_loss=loss if share else None)
        found[share] = log_ratios(state.module, pairs).clamp(max=0).exp().mean().item()
    assert found[0.9] > 1.2 * found[0.0]
    assert found[0.9] > 0.1


def test_the_acceptance_loss_is_clamped_on_the_right_side():
    pairs = triangles(200)
    flow = fresh(section()).module

    class Downhill(Triangle):
        """Every y is far better than x: all proposals are accepted."""

        calls = 0

        def energy(self, x):
            self.calls += 1
            return super().energy(x) * 0.0 + (0.0 if self.calls % 2 == 0 else 1e6)

    def gradient(potential):
        flow.zero_grad()
        AcceptanceLoss(potential=potential, kT=1.0, size=16, entropy_weight=0.0)(
            flow, pairs, torch.Generator().manual_seed(0)
        ).backward()
        return max(value.grad.abs().max().item() for value in flow.parameters() if value.grad is not None)

    assert gradient(Downhill()) == 0.0
    assert gradient(Triangle()) > 0.0


class Dying(ModuleState):
    def update(self, loss, **options):
        if self.step == 8:
            raise KeyboardInterrupt
        super().update(loss, **options)


def test_killed_training_continues_to_the_same_bits(tmp_path):
    settings, pairs = section(), [noisy_pairs()]
    whole = fresh(settings)
    train(whole, pairs, settings, evaluate=lambda flow: {"some": 1.0})
    dying = Dying(**vars(fresh(settings)))
    with open_state(tmp_path, "key") as folder, pytest.raises(KeyboardInterrupt):
        train(dying, pairs, settings, evaluate=lambda flow: {"some": 1.0}, folder=folder)
    resumed = fresh(settings, seed=9)
    with open_state(tmp_path, "key") as folder:
        train(resumed, pairs, settings, evaluate=lambda flow: {"some": 1.0}, folder=folder)
    assert resumed.step == settings.max_steps
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())
    assert [row["step"] for row in resumed.rows] == [6.0, 12.0]
    other = fresh(settings, seed=9)
    train(other, pairs, settings)
    assert not all(torch.equal(value, weights(other)[name]) for name, value in weights(whole).items())


def test_the_average_is_lent_and_given_back():
    state = fresh(section())
    before = weights(state)
    state.average = {name: value + 1 for name, value in before.items()}
    with state.averaged() as flow:
        assert all(torch.equal(value, before[name] + 1) for name, value in flow.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in state.module.named_parameters())


def test_divergence_and_the_time_limit():
    settings = section()
    state = fresh(settings)
    with torch.no_grad():
        next(iter(state.module.parameters())).fill_(math.nan)
    with pytest.raises(NumericsError, match=r"at step 0; lower a\.key$"):
        train(state, [noisy_pairs()], settings)
    limited = section(max_steps=500, max_seconds=1e-6)
    state = fresh(limited)
    train(state, [noisy_pairs()], limited)
    assert state.cooldown_from == 1
    assert state.step == 1 + 500 // 20


def test_stages_train_sample_and_explore_with_the_cartesian_flow(folders):
    root = folders["root"]
    stage.run(section(), **folders["inputs"], out=root / "flow", state=root / "s0", seed=1, threads=1)
    trained = read_manifest(root / "flow", kind="flow")
    assert trained["coordinates"] == "cartesian"
    assert trained["labels"] == ["10 ps"]
    assert {"validation_nll_per_atom", "acceptance_10_ps", "log_r_sd_10_ps"} <= trained["final"].keys()
    assert (root / "flow" / "metrics.csv").read_text().count("\n") == 3
    chains = {"chains": 4, "proposals": 6, "save_every": 2, "burn_in": 1, "checkpoint_every": 4, "compile_energy": False}
    jobs = {"timewarp": (run_timewarp, TimewarpSampling(**chains)), "explore": (run_explore, ExploreSampling(**chains))}
    inputs = {"prepared": folders["inputs"]["prepared"], "flow": root / "flow", "reference": folders["reference"]}
    for method, (function, settings) in jobs.items():
        function(settings, **inputs, out=root / method, state=root / f"s-{method}", seed=3, threads=1)
        manifest = read_manifest(root / method, kind="samples")
        arrays, _ = read_arrays(root / method / "samples.safetensors")
        assert manifest["invariance"] == {"timewarp": "exact", "explore": "biased"}[method]
        assert arrays["positions"].shape == (3, 4, 22, 3)
        assert manifest["counts"]["proposals"] == 24
        assert json.dumps(manifest["acceptance_by_label"])


def test_a_training_that_diverges_names_its_key(folders):
    root = folders["root"]
    job = {"out": root / "flow", "state": root / "s0", "seed": 1, "threads": 1}
    with pytest.raises(NumericsError, match=r"lower flow\.cartesian\.learning_rate$"):
        stage.run(section(cartesian={"learning_rate": 1e30}), **folders["inputs"], **job)


def test_several_lags_and_absent_gpus_are_one_clear_line(folders):
    root = folders["root"]
    job = {"out": root / "flow", "state": root / "s0", "seed": 1, "threads": 1}
    two = {**folders["content"], "lags_ps": [10.0, 20.0]}
    write_manifest(folders["inputs"]["shards"], kind="shards", files=folders["names"], content=two)
    with pytest.raises(DataError, match="holds 2 lags"):
        stage.run(section(), **folders["inputs"], **job)
    assert not (root / "flow").exists()
    if not torch.cuda.is_available():
        with pytest.raises(LongstrideError, match="sees no GPU"):
            training_device("cuda", key="flow.cartesian.device")


def test_a_published_checkpoint_samples_any_peptide(folders, shared_data, tmp_path):
    train_cartesian_out = tmp_path / "imported"
    from longstride.cli import main

    published = shared_data / "data" / "timewarp" / "published_format_small.pt"
    assert main(["import-timewarp", "checkpoint", str(published), "--out", str(train_cartesian_out)]) == 0
    chains = {"chains": 4, "proposals": 4, "save_every": 2, "burn_in": 0, "checkpoint_every": 4, "compile_energy": False}
    inputs = {"prepared": folders["inputs"]["prepared"], "flow": train_cartesian_out, "reference": folders["reference"]}
    run_timewarp(TimewarpSampling(**chains), **inputs, out=tmp_path / "samples", state=tmp_path / "s", seed=3, threads=1)
    manifest = read_manifest(tmp_path / "samples", kind="samples")
    assert manifest["acceptance_by_label"].keys() == {"500 ps"}
