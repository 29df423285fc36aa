"""Method tempering end to end on a tiny molecule: cold samples, what the ladders report, killed at any moment."""

import numpy as np
import pytest
import torch

from longstride.analysis.samples import load_cell, load_molecule
from longstride.config import Config, TemperingSampling
from longstride.data.atomic import read_arrays
from longstride.data.frames import write_trajectory
from longstride.data.manifest import read_manifest, write_manifest
from longstride.errors import LongstrideError
from longstride.mcmc import tempering
from longstride.potentials.amber import AmberPotential
from longstride.stages import sample
from longstride.state import State

SECTION = TemperingSampling(
    ladders=3,
    cycles=12,
    burn_in=3,
    save_every=2,
    checkpoint_every=4,
    local_moves="ghmc",
    local_steps=2,
    torsion_moves=0,
    hottest_K=450.0,
    compile_energy=False,
)


@pytest.fixture(scope="module")
def reference(alanine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    positions = np.repeat(alanine.positions[None], 40, axis=0).astype(np.float32)
    frames = {name: positions for name in ("positions", "velocities", "forces")}
    frames |= {key: np.zeros(40) for key in ("kinetic_energy", "time")}
    frames["potential_energy"] = np.random.default_rng(0).normal(scale=14.0, size=40)  # that of 60 harmonic coordinates
    files = write_trajectory(folder, 0, frames)
    write_manifest(folder, kind="reference", files=files, content={"temperature_K": 310.0})
    return folder


def make(folder, alanine_folder, reference, *, section=SECTION):
    out = folder / "tempering" / "seed0"
    config = Config().model_copy(update={"sample": Config().sample.model_copy(update={"tempering": section})})
    inputs = sample.SampleInputs(prepared=alanine_folder, reference=reference)
    sample.run("tempering", config, inputs=inputs, out=out, state=folder / "state", seed=4, threads=2)
    return out


def test_samples_are_those_of_the_cold_rung(tmp_path, alanine, alanine_folder, reference, capsys):
    out = make(tmp_path, alanine_folder, reference)
    arrays = read_arrays(out / "samples.safetensors")[0]
    assert arrays["positions"].shape == (6, 3, 22, 3)
    manifest = read_manifest(out, kind="samples")
    ladder = manifest["temperatures_K"]
    assert (ladder[0], ladder[-1]) == (310.0, 450.0)
    assert arrays["rung_energies"].shape == (6, 3, len(ladder))
    assert len(manifest["swap_acceptance"]) == len(ladder) - 1 >= 1
    assert (manifest["method"], manifest["invariance"], manifest["physical_time"]) == ("tempering", "exact", False)
    assert manifest["counts"]["force_calls"] == 15 * 3 * 3 * len(ladder)
    assert set(manifest["acceptance_by_label"]) == {"ghmc"}
    assert manifest["timing"]["threads"] == 1
    assert sum(manifest["round_trips_per_ladder"]) == manifest["round_trips"]
    exact = AmberPotential.from_openmm(alanine.openmm_system, alanine.system, name="amber")
    energy = exact.energy(State(positions=torch.from_numpy(arrays["positions"][-1]).double()))
    assert np.allclose(arrays["potential_energy"][-1], energy, atol=0.05)
    assert np.array_equal(arrays["potential_energy"], arrays["rung_energies"][..., 0])
    assert not list((tmp_path / "state").glob("block_*"))
    assert f"tempering: 3 ladders of {len(ladder)} rungs to 450 K" in capsys.readouterr().out
    cell = load_cell(out, load_molecule(alanine_folder))
    assert (cell.method, cell.status) == ("tempering", "complete")


class Kill(BaseException):
    """Stands for kill -9."""


@pytest.mark.parametrize(
    "extra", [{"local_moves": "hmc"}, pytest.param({"torsion_moves": 2}, marks=pytest.mark.slow)], ids=["hmc", "torsion moves"]
)
def test_a_killed_job_continues_bitwise(tmp_path, alanine_folder, reference, monkeypatch, extra):
    section = SECTION.model_copy(update=extra)
    whole = make(tmp_path / "whole", alanine_folder, reference, section=section)
    swap, calls = tempering.exchange, [0]

    def mortal(*args, **kwargs):
        calls[0] += 1
        if calls[0] in (2, 9):
            raise Kill
        return swap(*args, **kwargs)

    monkeypatch.setattr(tempering, "exchange", mortal)
    for _ in range(2):
        with pytest.raises(Kill):
            make(tmp_path / "parts", alanine_folder, reference, section=section)
    parts = make(tmp_path / "parts", alanine_folder, reference, section=section)
    before, after = (read_arrays(folder / "samples.safetensors")[0] for folder in (whole, parts))
    for name, value in before.items():
        assert np.array_equal(value, after[name]), name


def test_a_hottest_temperature_below_the_target_is_refused(tmp_path, alanine_folder, reference):
    with pytest.raises(LongstrideError, match="hottest temperature above 310 K, not 300 K"):
        make(tmp_path, alanine_folder, reference, section=SECTION.model_copy(update={"hottest_K": 300.0}))
