"""From exact chains of peptides to a transferable flow and to chains of a peptide that no step has seen."""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from longstride.cli import main
from longstride.config import ChainsConfig, ExploreSampling, PhysicsConfig, ReferenceConfig, TimewarpSampling, TransferConfig
from longstride.data.atomic import read_arrays
from longstride.data.manifest import read_manifest, write_manifest
from longstride.errors import ConfigError, DataError, NumericsError
from longstride.flows.torsion_network import log_uniform
from longstride.flows.transferable import BoundMolecule
from longstride.flows.transferable_checkpoint import load_transferable
from longstride.mcmc import run as chain_loop
from longstride.mcmc.timewarp import MOVES
from longstride.stages import reference, train_transfer
from longstride.stages.chains import run_chains
from longstride.stages.sample_flow import run_explore, run_timewarp
from longstride.systems import prepare_sequence, save_prepared
from longstride.training import module_state
from molecules import PHYSICS

CHAINS = ChainsConfig(chains=16, steps=24, burn_in=8, save_every=4, compile_energy=False, checkpoint_every=8, fitted_states=20)
TRANSFER = TransferConfig(
    max_steps=60, molecules_per_step=2, samples_per_molecule=32, width=16, heads=2, layers=1, message_rounds=1, components=4,
    metrics_every_steps=20, checkpoint_every_steps=20, warm_up_steps=5, learning_rate=0.01, ema_decay=0.9,
    acceptance_frames=32, fitted_states=20,
)  # fmt: skip
DYNAMICS = ReferenceConfig(
    engine="batched", trajectories=6, length_ps=0.16, equilibration_ps=0, save_every_ps=0.02, checkpoint_every_ps=0.16,
    compile_energy=False,
)  # fmt: skip
LAGS = TRANSFER.model_copy(update={"lags_ps": (0.04, 0.1)})
TUNED = TRANSFER.model_copy(update={"acceptance_steps": 60, "acceptance_rate": 3e-3, "acceptance_weight": 4.0})
PEPTIDES = ("ACE-GLY-NME", "GA", "AG")


def make_chains(prepared, out, *, section=CHAINS, flow=None, physics=None, seed=1):
    physics = physics or PhysicsConfig()
    state = out.parent / f"{out.name}.state"
    run_chains(section, physics=physics, prepared=prepared, flow=flow, out=out, state=state, seed=seed, threads=1)
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("transfer")
    for name in PEPTIDES:
        save_prepared(base / name, prepare_sequence(name, name=name, **PHYSICS), {})
    for name in PEPTIDES:
        make_chains(base / name, base / f"chains-{name}")
    return base


def train(base, out, *, training=PEPTIDES[:2], validation=PEPTIDES[2:], section=TRANSFER):
    pairs = [[(base / name, base / f"chains-{name}") for name in names] for names in (training, validation)]
    return train_on(pairs[0], out, validation=pairs[1], section=section)


def train_on(pairs, out, *, validation=(), section=TRANSFER, start=None):
    job = {"training": pairs, "validation": validation, "out": out, "state": out.parent / "state", "start": start}
    train_transfer.run(section, **job, seed=3, threads=1)
    return out


@pytest.fixture(scope="module")
def trained(folders):
    return train(folders, folders / "model")


@pytest.fixture(scope="module")
def tuned(folders):
    return train(folders, folders / "tuned" / "model", section=TUNED)


@pytest.fixture(scope="module")
def peptides(folders):
    """The three folders of each peptide, the last of them with short molecular dynamics."""
    for name in PEPTIDES:
        job = {"prepared": folders / name, "out": folders / f"reference-{name}", "state": folders / "reference.state"}
        reference.run(DYNAMICS, physics=PhysicsConfig(), **job, seed=1, threads=1)
    return [(folders / name, folders / f"chains-{name}", folders / f"reference-{name}") for name in PEPTIDES]


@pytest.fixture(scope="module")
def lagged(folders, peptides):
    return train_on(peptides[:2], folders / "lagged" / "model", validation=peptides[2:], section=LAGS)


def test_chains_hold_exact_samples_at_a_thermal_energy(folders):
    manifest = read_manifest(folders / "chains-AG", kind="samples")
    assert manifest["invariance"] == "exact"
    assert manifest["acceptance_by_label"][MOVES] > 0.15
    samples = read_arrays(folders / "chains-AG" / "samples.safetensors")[0]
    assert samples["positions"].shape == (6, 16, 20, 3)
    assert np.isfinite(samples["potential_energy"]).all()


def test_training_lowers_the_loss_of_a_held_out_peptide(trained):
    network, physics = load_transferable(trained / "model.safetensors")
    assert physics.target == "amber14-all-obc1"
    assert physics.temperature_K == 310.0
    found = read_manifest(trained, kind="transferable")["validation_nll_per_torsion"]
    assert list(found) == ["AG"]
    assert found["AG"] < -log_uniform(1) - 0.2
    rows = list(csv.DictReader((trained / "metrics.csv").open()))
    assert [float(row["step"]) for row in rows] == [20.0, 40.0, 60.0]
    assert all(0 < float(row["validation_acceptance"]) < 1 and float(row["validation_log_r_sd"]) > 0 for row in rows)
    assert list(read_manifest(trained, kind="transferable")["validation_acceptance"]) == ["AG"]
    assert not any(value.requires_grad for value in network.parameters())


def test_a_trained_flow_proposes_for_an_unseen_peptide(folders, trained):
    section = CHAINS.model_copy(update={"flow_probability": 0.5, "steps": 40})
    out = make_chains(folders / "AG", folders / "second", section=section, flow=trained)
    rates = read_manifest(out, kind="samples")["acceptance_by_label"]
    assert set(rates) == {MOVES, "independent"}
    assert rates["independent"] > 0


def test_lags_are_learned_from_dynamics_and_measured_one_by_one(lagged, trained):
    network, _ = load_transferable(lagged / "model.safetensors")
    assert network.architecture.labels == ("0.04 ps", "0.1 ps", "independent")
    rows = list(csv.DictReader((lagged / "metrics.csv").open()))
    plain = next(csv.DictReader((trained / "metrics.csv").open()))
    alone = ["validation_slowest_acceptance"]  # of the label "independent" only
    metrics = [name for name in plain if name.startswith("validation_") and name not in alone]
    assert len(metrics) == 4
    assert list(rows[0]) == [*plain, *(f"{name}_{lag}_ps" for lag in ("0.04", "0.1") for name in metrics)]
    manifest = read_manifest(lagged, kind="transferable")
    found = {end: manifest[f"validation_nll_per_torsion{end}"]["AG"] for end in ("", "_0.04_ps", "_0.1_ps")}
    assert found["_0.04_ps"] < found[""] - 0.2  # what comes 0.04 ps later is close to x
    for end, value in found.items():
        assert 0 < manifest[f"validation_acceptance{end}"]["AG"] < 1
        assert float(rows[-1][f"validation_nll_per_torsion{end}"]) == pytest.approx(value, abs=1e-6)


def test_a_flow_with_lags_proposes_with_every_label(folders, lagged, tmp_path):
    labels = {"0.04 ps", "0.1 ps", "independent"}
    chains = make_chains(folders / "AG", tmp_path / "chains", flow=lagged)
    assert set(read_manifest(chains, kind="samples")["acceptance_by_label"]) == {MOVES, *labels}
    section = TimewarpSampling(
        chains=8, proposals=16, save_every=4, burn_in=4, checkpoint_every=4, compile_energy=False, fitted_states=20
    )
    job = {"prepared": folders / "AG", "flow": lagged, "reference": None, "out": tmp_path / "out", "state": tmp_path / "state"}
    run_timewarp(section, **job, seed=1, threads=1)
    manifest = read_manifest(tmp_path / "out", kind="samples")
    assert manifest["invariance"] == "exact"
    assert labels <= set(manifest["acceptance_by_label"])


def test_lags_that_do_not_fit_the_dynamics_are_one_line(folders, peptides, tmp_path):
    def refused(message, *, lags=(0.04,), peptide=peptides[0]):
        section = TRANSFER.model_copy(update={"lags_ps": lags})
        with pytest.raises(DataError, match=message) as error:
            train_on([peptide], tmp_path / "model", section=section)
        assert "\n" not in str(error.value)

    refused(r"transfer\.lags_ps: 0\.05 ps is not a whole multiple of .* 0\.02 ps \(reference\.save_every_ps\)", lags=(0.05,))
    refused(r"transfer\.lags_ps: 0\.16 ps is not shorter .* \(0\.16 ps\).* \(reference\.length_ps\)", lags=(0.04, 0.16))
    refused(r"transfer\.lags_ps: AG has no dynamics; .*PREPARED:CHAINS:REFERENCE", peptide=peptides[2][:2])
    refused(r"transfer\.lags_ps is empty; give lags to learn from .*reference-GA", lags=(), peptide=peptides[1])
    refused("reference-GA belongs to another molecule", peptide=(*peptides[2][:2], peptides[1][2]))
    hot = tmp_path / "hot"
    shutil.copytree(peptides[2][2], hot)
    manifest = json.loads((hot / "manifest.json").read_text())
    (hot / "manifest.json").write_text(json.dumps({**manifest, "temperature_K": 320.0}))
    refused("hot is at 320 K, the chains are at 310 K", peptide=(*peptides[2][:2], hot))


def test_starts_that_could_never_move_are_one_line(folders, tmp_path, monkeypatch):
    of, mirror = BoundMolecule.of, torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)

    def half_mirrored(*arguments, **options):
        found = of(*arguments, **options)
        return replace(found, states=torch.cat([found.states[::2], found.states[1::2] * mirror]))

    monkeypatch.setattr(BoundMolecule, "of", half_mirrored)
    with pytest.raises(DataError, match=r"^\d+ of 16 starting .* would never move; check the structure that .*AG was") as error:
        make_chains(folders / "AG", tmp_path / "chains")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "chains").exists()


class Kill(Exception):
    """Stands for kill -9."""


def test_chains_continue_with_the_same_samples(folders, monkeypatch, tmp_path):
    whole = read_arrays(folders / "chains-GA" / "samples.safetensors")[0]
    save, count = chain_loop._checkpoint, [0]

    def dying(*arguments, **options):
        result = save(*arguments, **options)
        count[0] += 1
        if count[0] == 2:
            raise Kill
        return result

    monkeypatch.setattr(chain_loop, "_checkpoint", dying)
    with pytest.raises(Kill):
        make_chains(folders / "GA", tmp_path / "chains")
    assert not (tmp_path / "chains" / "manifest.json").exists()
    make_chains(folders / "GA", tmp_path / "chains")
    parts = read_arrays(tmp_path / "chains" / "samples.safetensors")[0]
    for name, value in whole.items():
        assert np.array_equal(value, parts[name]), name
    other = make_chains(folders / "GA", tmp_path / "other", seed=2)  # negative control: another seed
    assert not np.array_equal(whole["positions"], read_arrays(other / "samples.safetensors")[0]["positions"])


@pytest.mark.slow
def test_training_by_acceptance_raises_it_on_training_peptides(folders, trained, tuned):
    manifest = read_manifest(tuned, kind="transferable")
    assert (manifest["steps"], manifest["acceptance_steps"]) == (120, 60)
    same_steps = TUNED.model_copy(update={"acceptance_weight": 1e-9})  # negative control: likelihood alone
    control = train(folders, folders / "control" / "model", section=same_steps)
    networks, physics = zip(*(load_transferable(p / "model.safetensors") for p in (tuned, control)), strict=True)
    probe = train_transfer._probe(TRANSFER, folders / "GA", folders / "chains-GA", physics[0])
    raised, plain = (probe.measure(network, label=0, seed=1)[0] for network in networks)
    assert raised > 1.1 * plain


def test_training_starts_from_another_flow(folders, trained, tmp_path):
    section = TUNED.model_copy(update={"max_steps": 0, "acceptance_steps": 0})
    pairs = [(folders / name, folders / f"chains-{name}") for name in PEPTIDES[:2]]
    same = train_on(pairs, tmp_path / "same", section=section, start=trained)
    one, two = (read_arrays(folder / "model.safetensors")[0] for folder in (trained, same))
    assert all(np.array_equal(value, two[name]) for name, value in one.items())
    before = read_manifest(trained, kind="transferable")["files"]
    assert read_manifest(same, kind="transferable")["started_from"] == before
    with pytest.raises(DataError, match=r"has width 16, not 24; set transfer\.width as there"):
        train_on(pairs, tmp_path / "wide", section=section.model_copy(update={"width": 24}), start=trained)
    with pytest.raises(DataError, match="describes 'samples', expected 'transferable'"):
        train_on(pairs, tmp_path / "none", section=section, start=folders / "chains-AG")
    with pytest.raises(ConfigError, match=r"max_steps is 0, and there is no flow to start from: give steps, or --start DIR"):
        train_on(pairs, tmp_path / "nothing", section=section)


SLOW_CASES = [pytest.param(f"tuned {saves}", marks=pytest.mark.slow) for saves in (3, 4)]


@pytest.mark.parametrize("case", ["trained 2", "lagged 2", *SLOW_CASES])
def test_training_continues_with_the_same_weights(case, folders, request, monkeypatch, tmp_path):
    """Killed after some checkpoint; the third of `tuned` lies where its second part begins."""
    kind, saves = case.split()
    whole = request.getfixturevalue(kind)
    if kind == "lagged":
        peptides = request.getfixturevalue("peptides")
    else:
        peptides = [(folders / name, folders / f"chains-{name}") for name in PEPTIDES]
    job = {"validation": peptides[2:], "section": {"trained": TRANSFER, "lagged": LAGS, "tuned": TUNED}[kind]}
    save, count = module_state.ModuleState.save, [0]

    def dying(self, folder):
        save(self, folder)
        count[0] += 1
        if count[0] == int(saves):
            raise Kill

    monkeypatch.setattr(module_state.ModuleState, "save", dying)
    with pytest.raises(Kill):
        train_on(peptides[:2], tmp_path / "model", **job)
    train_on(peptides[:2], tmp_path / "model", **job)
    one, two = (read_arrays(folder / "model.safetensors")[0] for folder in (whole, tmp_path / "model"))
    assert all(np.array_equal(value, two[name]) for name, value in one.items())


def test_a_training_that_diverges_names_its_key(folders, tmp_path):
    with pytest.raises(NumericsError, match=r"lower transfer\.learning_rate$"):
        train(folders, tmp_path / "model", section=TRANSFER.model_copy(update={"learning_rate": 1e30}))


def test_refusals_are_one_line(folders, trained, tmp_path):
    with pytest.raises(DataError, match=r"temperature \(K\) of 310.0, not 320.0"):
        make_chains(folders / "AG", tmp_path / "hot", flow=trained, physics=PhysicsConfig(temperature_K=320.0))
    without_cutoff = tmp_path / "AG-no-cutoff"
    save_prepared(without_cutoff, prepare_sequence("AG", name="AG", **{**PHYSICS, "cutoff_nm": None}), {})
    with pytest.raises(DataError, match=r"cutoff \(nm\) of 2.0, not None"):
        make_chains(without_cutoff, tmp_path / "vacuum", flow=trained)
    with pytest.raises(DataError, match="describes 'samples', expected 'transferable'"):
        make_chains(folders / "AG", tmp_path / "wrong", flow=folders / "chains-AG")
    with pytest.raises(DataError, match="not a transferable flow"):
        load_transferable(folders / "chains-AG" / "samples.safetensors")
    with pytest.raises(DataError, match="AG: both a training and a held-out peptide"):
        train(folders, tmp_path / "model", training=("AG", "GA"), validation=("AG",))
    with pytest.raises(DataError, match="belongs to another molecule"):
        train_on([(folders / "AG", folders / "chains-GA")], tmp_path / "model")
    with pytest.raises(DataError, match="no training peptides"):
        train(folders, tmp_path / "model", training=())


def test_samples_that_are_not_exact_are_refused(folders, tmp_path):
    source = read_manifest(folders / "chains-AG", kind="samples")
    (tmp_path / "samples.safetensors").write_bytes((folders / "chains-AG" / "samples.safetensors").read_bytes())
    content = {key: source[key] for key in ("system_hash", "temperature_K", "method")}
    write_manifest(tmp_path, kind="samples", files=["samples.safetensors"], content={**content, "invariance": "biased"})
    with pytest.raises(DataError, match="holds biased samples"):
        train_on([(folders / "AG", tmp_path)], tmp_path / "model")


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("method", ["timewarp", "explore"])
def test_a_transferable_flow_samples_without_a_reference(method, folders, trained, tmp_path):
    sections = {"timewarp": (TimewarpSampling, run_timewarp), "explore": (ExploreSampling, run_explore)}
    kind, run = sections[method]
    section = kind(chains=8, proposals=8, save_every=4, burn_in=4, checkpoint_every=4, compile_energy=False, fitted_states=20)
    job = {"prepared": folders / "AG", "flow": trained, "reference": None, "out": tmp_path / "out", "state": tmp_path / "state"}
    run(section, **job, seed=1, threads=1)
    manifest = read_manifest(tmp_path / "out", kind="samples")
    assert manifest["invariance"] == ("exact" if method == "timewarp" else "biased")
    assert manifest["temperature_K"] == 310.0
    assert ("torsion moves" in manifest["acceptance_by_label"]) is (method == "timewarp")
    assert read_arrays(tmp_path / "out" / "samples.safetensors")[0]["positions"].shape == (2, 8, 20, 3)


def torchrun(peptides, place, *, kill_after=None):
    """Train in two processes in the folder `place`; kill -9 what started them once there are checkpoints. Return the model."""
    settings = {**LAGS.model_dump(mode="json"), "max_steps": 120, "metrics_every_steps": 60, "acceptance_frames": 0}
    place.mkdir(exist_ok=True)
    (place / "config.yaml").write_text(yaml.safe_dump({"transfer": {**settings, "device": "cpu"}}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "longstride.cli"]
    command += ["train-transfer", "--config", str(place / "config.yaml"), "--out", str(place / "out"), "--threads", "2"]
    folders = [":".join(map(str, peptide)) for peptide in peptides]
    command += ["--training", *folders[:2], "--held-out", *folders[2:]]
    source = Path(train_transfer.__file__).parents[2]
    with (place / "log.txt").open("w") as log:
        environment = {**os.environ, "PYTHONPATH": str(source)}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    if kill_after is not None:
        while process.poll() is None and len(list((place / "out" / ".state").glob("checkpoint_*"))) < kill_after:
            time.sleep(0.05)
        process.kill()
    status = process.wait(timeout=300)
    assert (status == 0) is (kill_after is None), (place / "log.txt").read_text()
    return place / "out"


@pytest.mark.slow
def test_two_processes_that_are_killed_continue_with_the_same_weights(peptides, tmp_path):
    whole = torchrun(peptides, tmp_path / "whole")
    out = torchrun(peptides, tmp_path / "killed", kill_after=2)
    assert not (out / "manifest.json").exists()
    assert torchrun(peptides, tmp_path / "killed") == out
    one, two = (read_arrays(folder / "model.safetensors")[0] for folder in (whole, out))
    assert all(np.array_equal(value, two[name]) for name, value in one.items())
    manifest = read_manifest(out, kind="transferable")
    assert (manifest["processes"], manifest["device"], manifest["steps"]) == (2, "cpu", 120)
    assert len((whole / "metrics.csv").read_text().splitlines()) == 3
    log = (tmp_path / "whole" / "log.txt").read_text()
    assert log.count("train-transfer: 2 peptides") == 1
    assert log.count("100% 120/120") == 1


def test_more_processes_than_were_started_are_one_line(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    pair = f"{folders / 'AG'}:{folders / 'chains-AG'}"
    assert main(["train-transfer", "--training", pair, "--out", str(tmp_path / "out"), "--processes", "2"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "transfer.processes is 2, but 1 started: use torchrun --standalone --nproc-per-node 2 -m longstride.cli" in said
    assert not (tmp_path / "out").exists() or not (tmp_path / "out" / "manifest.json").exists()
