import json
import math

import numpy as np
import pytest
import torch
from thermal_frames import wiggled

from longstride.config import FlowConfig
from longstride.data.atomic import read_arrays, write_arrays
from longstride.data.checkpoint import open_state
from longstride.data.manifest import read_manifest
from longstride.errors import DataError, NumericsError
from longstride.flows.checkpoint import load_flow, save_flow
from longstride.flows.internal import InternalFlow
from longstride.stages import flow as stage
from longstride.stages.sample_flow import run_explore, run_timewarp
from longstride.training.flow import draw_batch, encode_pairs, train, validation_nll
from longstride.training.module_state import ModuleState
from longstride.units import thermal_energy

SECTION = FlowConfig(
    max_steps=12, batch_size=32, hidden=8, couplings=2, torsion_components=2, energy_batch=8,
    energy_from_step=4, warm_up_steps=2, metrics_every_steps=6, checkpoint_every_steps=5,
)  # fmt: skip


def pairs_of(prepared, count=150, seed=0):
    return {"x": wiggled(prepared, count, seed), "y": wiggled(prepared, count, seed + 1)}


def fresh(prepared, section=SECTION, seed=1):
    pairs = [pairs_of(prepared)]
    network = stage.build_flow(
        section, prepared, lags_ps=(10.0,), frames=np.concatenate([pairs[0]["x"], pairs[0]["y"]]), seed=seed
    )
    rates = {"learning_rate": section.learning_rate, "weight_decay": section.weight_decay, "rate_key": "flow.learning_rate"}
    return ModuleState.fresh(network, **rates, seed=seed), encode_pairs(network, pairs)


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.module.named_parameters()}


def test_likelihood_training_lowers_the_loss_and_repeats_itself(alanine):
    section = SECTION.model_copy(update={"max_steps": 80, "learning_rate": 5e-3})
    trainer, pairs = fresh(alanine, section)
    before = validation_nll(trainer.module, pairs)
    train(trainer, pairs, section)
    assert validation_nll(trainer.module, pairs) < before - 0.05
    again, _ = fresh(alanine, section)
    train(again, pairs, section)
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(trainer).items())


class Dying(ModuleState):
    def update(self, loss, **options):
        if self.step == 8:
            raise KeyboardInterrupt
        super().update(loss, **options)


def energy_loss(prepared):
    from longstride.potentials.amber import AmberPotential
    from longstride.training.flow import EnergyLoss

    potential = AmberPotential.from_openmm(prepared.openmm_system, prepared.system, name="amber", dtype=torch.float32)
    return EnergyLoss(potential=potential, kT=thermal_energy(310.0), size=8)


def test_killed_training_continues_to_the_same_bits(alanine, tmp_path):
    energy = energy_loss(alanine)
    whole, pairs = fresh(alanine)
    train(whole, pairs, SECTION, energy_loss=energy)
    dying = Dying(**vars(fresh(alanine)[0]))
    with open_state(tmp_path, "key") as folder, pytest.raises(KeyboardInterrupt):
        train(dying, pairs, SECTION, energy_loss=energy, folder=folder)
    resumed, _ = fresh(alanine)
    with open_state(tmp_path, "key") as folder:
        train(resumed, pairs, SECTION, energy_loss=energy, folder=folder)
    assert resumed.step == SECTION.max_steps
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())


def test_the_time_limit_runs_the_rate_down_and_says_so(alanine):
    section = SECTION.model_copy(update={"max_seconds": 1e-6, "max_steps": 200})
    trainer, pairs = fresh(alanine, section)
    train(trainer, pairs, section)
    assert trainer.cooldown_from == 1
    assert trainer.step == 1 + 200 // 20


def test_divergence_is_an_error(alanine):
    trainer, pairs = fresh(alanine)
    with torch.no_grad():
        next(iter(trainer.module.parameters())).fill_(math.nan)
    with pytest.raises(NumericsError, match=r"at step 0; lower flow\.learning_rate$"):
        train(trainer, pairs, SECTION)


def test_batches_use_both_directions_of_time_and_the_independent_label(alanine):
    trainer, pairs = fresh(alanine)
    batch = draw_batch(pairs, 400, 0.3, trainer.generator)
    from_x = (batch.torsions_x[:, None] == pairs.torsions[0]).all(-1).any(1)
    assert 120 < from_x.sum() < 280
    assert 60 < (batch.label == 1).sum() < 180
    assert set(batch.label.tolist()) == {0, 1}


def test_mixed_handedness_is_refused(alanine):
    trainer, _ = fresh(alanine)
    mirrored = {key: value * np.float32([1, 1, -1]) for key, value in pairs_of(alanine, count=5).items()}
    with pytest.raises(DataError, match="handedness"):
        encode_pairs(trainer.module, [mirrored])


def test_a_saved_flow_comes_back_and_refuses_other_molecules(alanine, tmp_path):
    import dataclasses

    trainer, _ = fresh(alanine)
    path = tmp_path / "model.safetensors"
    save_flow(path, trainer.module, alanine)
    loaded = load_flow(path, alanine)
    for name, value in trainer.module.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])
    assert isinstance(loaded, InternalFlow)
    with pytest.raises(DataError, match="other force-field parameters"):
        load_flow(path, dataclasses.replace(alanine, system_hash="0" * 64))
    with pytest.raises(DataError, match="on the potential"):
        load_flow(path, dataclasses.replace(alanine, target="gfn2"))
    other = dataclasses.replace(
        alanine.system, bonds=alanine.system.bonds[:, ::-1], atomic_numbers=alanine.system.atomic_numbers[::-1]
    )
    with pytest.raises(DataError, match="another molecule"):
        load_flow(path, dataclasses.replace(alanine, system=other))
    write_arrays(path, {"a": np.zeros(2)})
    with pytest.raises(DataError, match="not a flow"):
        load_flow(path, alanine)


def test_a_training_that_diverges_names_its_key(folders):
    section = SECTION.model_copy(update={"learning_rate": 1e30})
    job = {"out": folders["root"] / "flow", "state": folders["root"] / "s0", "seed": 1, "threads": 1}
    with pytest.raises(NumericsError, match=r"lower flow\.learning_rate$"):
        stage.run(section, **folders["inputs"], **job)


def test_stages_train_sample_and_explore(folders):
    from longstride.config import ExploreSampling, TimewarpSampling

    root = folders["root"]
    stage.run(SECTION, **folders["inputs"], out=root / "flow", state=root / "s0", seed=1, threads=1)
    trained = read_manifest(root / "flow", kind="flow")
    assert trained["labels"] == ["10 ps", "independent"]
    assert (root / "flow" / "metrics.csv").read_text().count("\n") == 3
    chains = {"chains": 6, "proposals": 20, "save_every": 5, "burn_in": 5, "checkpoint_every": 8, "compile_energy": False}
    jobs = {"timewarp": (run_timewarp, TimewarpSampling(**chains)), "explore": (run_explore, ExploreSampling(**chains))}
    inputs = {"prepared": folders["inputs"]["prepared"], "flow": root / "flow", "reference": folders["reference"]}
    for method, (function, section) in jobs.items():
        function(section, **inputs, out=root / method, state=root / f"s-{method}", seed=3, threads=1)
        manifest = read_manifest(root / method, kind="samples")
        arrays, _ = read_arrays(root / method / "samples.safetensors")
        assert manifest["invariance"] == {"timewarp": "exact", "explore": "biased"}[method]
        assert arrays["positions"].shape == (4, 6, 22, 3)
        assert arrays["potential_energy"].shape == (4, 6)
        assert manifest["counts"]["proposals"] == 120
        assert json.dumps(manifest["acceptance_by_label"])
