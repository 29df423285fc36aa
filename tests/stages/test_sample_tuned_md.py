"""Method tuned-md end to end on a tiny molecule: samples like those of md, killed at any moment, one-line refusals."""

import dataclasses

import numpy as np
import openmm
import pytest
import torch

from longstride.analysis.samples import load_cell, load_molecule
from longstride.config import DEFAULT_METHODS, METHODS, Config, TunedMDSampling
from longstride.data.atomic import read_arrays
from longstride.data.frames import write_trajectory
from longstride.data.manifest import read_manifest, write_manifest
from longstride.dynamics.masses import repartitioned_masses
from longstride.errors import LongstrideError, NumericsError
from longstride.potentials.amber import AmberPotential
from longstride.stages import sample, sample_tuned_md
from longstride.state import State

SECTION = TunedMDSampling(
    chains=3, length_ps=0.16, equilibration_ps=0.02, save_every_ps=0.016, checkpoint_every_ps=0.05, compile_energy=False
)


@pytest.fixture(scope="module")
def reference(alanine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    rng, files = np.random.default_rng(0), []
    for index in range(2):
        positions = (alanine.positions + rng.normal(scale=0.003, size=(5, 22, 3))).astype(np.float32)
        zeros = np.zeros_like(positions)
        frames = {"positions": positions, "velocities": zeros, "forces": zeros}
        frames |= {key: np.zeros(5) for key in ("potential_energy", "kinetic_energy", "time")}
        files += write_trajectory(folder, index, frames)
    write_manifest(folder, kind="reference", files=files, content={"temperature_K": 310.0})
    return folder


def make(folder, alanine_folder, reference, *, section=SECTION):
    out = folder / "tuned-md" / "seed0"
    config = Config().model_copy(update={"sample": Config().sample.model_copy(update={"tuned_md": section})})
    inputs = sample.SampleInputs(prepared=alanine_folder, reference=reference)
    sample.run("tuned-md", config, inputs=inputs, out=out, state=folder / "state", seed=4, threads=1)
    return out


def test_samples_have_the_form_of_md(tmp_path, alanine, alanine_folder, reference, capsys):
    out = make(tmp_path, alanine_folder, reference)
    arrays = read_arrays(out / "samples.safetensors")[0]
    assert arrays["positions"].shape == arrays["velocities"].shape == (10, 3, 22, 3)
    assert arrays["potential_energy"].shape == arrays["kinetic_energy"].shape == (10, 3)
    assert "forces" not in arrays
    manifest = read_manifest(out, kind="samples")
    assert (manifest["method"], manifest["invariance"], manifest["physical_time"]) == ("tuned-md", "unadjusted", True)
    assert (manifest["target"], manifest["save_every"], manifest["timing"]["threads"]) == (alanine.target, 0.016, 1)
    assert manifest["counts"]["force_calls"] == 3 * 40
    assert np.allclose(manifest["masses_Da"], repartitioned_masses(alanine.system, 3.024))
    exact = AmberPotential.from_openmm(alanine.openmm_system, alanine.system, name="amber")
    energy = exact.energy(State(positions=torch.from_numpy(arrays["positions"][-1]).double()))
    assert np.allclose(arrays["potential_energy"][-1], energy, atol=0.05)
    assert not list((tmp_path / "state").glob("group_*"))
    assert "ps/s on 1 cores" in capsys.readouterr().out
    cell = load_cell(out, load_molecule(alanine_folder))
    assert (cell.method, cell.status) == ("tuned-md", "complete")
    assert set(cell.samples.temperature) == {"all", "C", "H", "N", "O"}


class Kill(BaseException):
    """Stands for kill -9."""


def test_a_killed_job_continues_bitwise(tmp_path, alanine_folder, reference, monkeypatch):
    whole = read_arrays(make(tmp_path / "whole", alanine_folder, reference) / "samples.safetensors")[0]
    evaluate, calls = AmberPotential.energy_forces, [0]

    def mortal(self, x):
        calls[0] += 1
        if calls[0] in (4, 31):
            raise Kill
        return evaluate(self, x)

    monkeypatch.setattr(AmberPotential, "energy_forces", mortal)
    for _ in range(2):
        with pytest.raises(Kill):
            make(tmp_path / "parts", alanine_folder, reference)
    parts = read_arrays(make(tmp_path / "parts", alanine_folder, reference) / "samples.safetensors")[0]
    for name, value in whole.items():
        assert np.array_equal(value, parts[name]), name


def test_too_long_a_step_names_its_key(tmp_path, alanine_folder, reference):
    section = SECTION.model_copy(update={"timestep_fs": 16.0})
    with pytest.raises(NumericsError, match=r"use a shorter sample\.tuned_md\.timestep_fs") as caught:
        make(tmp_path, alanine_folder, reference, section=section)
    assert "\n" not in str(caught.value)


def test_an_unknown_force_is_refused_before_anything_runs(alanine):
    foreign = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(alanine.openmm_system))
    foreign.addForce(openmm.CustomExternalForce("x^2"))
    with pytest.raises(LongstrideError, match=r"method tuned-md cannot run 'alanine-dipeptide': .*md takes any force"):
        sample_tuned_md._potential(dataclasses.replace(alanine, openmm_system=foreign), compile=False)


def test_a_run_has_the_method_only_on_request():
    assert set(METHODS) - set(DEFAULT_METHODS) == {"tuned-md", "metadynamics", "tempering"}
    assert Config().sample.methods == DEFAULT_METHODS
