"""Method metadynamics end to end on a tiny molecule: weighted samples, killed at any moment, one-line refusals."""

import numpy as np
import pytest

from longstride.analysis.features import find_torsions, load_topology, torsion_angles
from longstride.analysis.samples import load_cell, load_molecule
from longstride.config import Config, MetadynamicsSampling, validate
from longstride.data.atomic import read_arrays
from longstride.data.frames import write_trajectory
from longstride.data.manifest import read_manifest, write_manifest
from longstride.dynamics import metadynamics
from longstride.errors import ConfigError, LongstrideError
from longstride.potentials.openmm import OpenMMPotential
from longstride.stages import sample
from longstride.stages.sample_metadynamics import chosen_pair
from longstride.state import State
from longstride.units import thermal_energy

SECTION = MetadynamicsSampling(
    walkers=2,
    fill_ps=0.8,
    length_ps=0.4,
    hill_every_ps=0.02,
    share_every_ps=0.2,
    save_every_ps=0.04,
    equilibration_ps=0.02,
    hill_height_kJ_per_mol=3.0,
)


class Now:
    """A pool that works at once and in this process."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def submit(self, work, *args, **kwargs):
        result = work(*args, **kwargs)
        return type("Done", (), {"result": lambda self: result})()


@pytest.fixture(autouse=True)
def no_processes(monkeypatch):
    """Starting processes takes longer than what these runs take."""
    monkeypatch.setattr(metadynamics, "pinned_workers", Now)


@pytest.fixture(scope="module")
def reference(alanine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    positions = np.repeat(alanine.positions[None], 3, axis=0).astype(np.float32)
    frames = {name: positions for name in ("positions", "velocities", "forces")}
    frames |= {key: np.zeros(3) for key in ("potential_energy", "kinetic_energy", "time")}
    files = write_trajectory(folder, 0, frames)
    write_manifest(folder, kind="reference", files=files, content={"temperature_K": 310.0})
    return folder


def make(folder, alanine_folder, reference, *, section=SECTION):
    out = folder / "metadynamics" / "seed0"
    config = Config().model_copy(update={"sample": Config().sample.model_copy(update={"metadynamics": section})})
    inputs = sample.SampleInputs(prepared=alanine_folder, reference=reference)
    sample.run("metadynamics", config, inputs=inputs, out=out, state=folder / "state", seed=4, threads=1)
    return out


def test_samples_carry_the_weights_of_the_bias(tmp_path, alanine, alanine_folder, reference, capsys):
    out = make(tmp_path, alanine_folder, reference)
    arrays = read_arrays(out / "samples.safetensors")[0]
    assert arrays["positions"].shape == arrays["velocities"].shape == (10, 2, 22, 3)
    assert arrays["potential_energy"].shape == arrays["kinetic_energy"].shape == arrays["log_weights"].shape == (10, 2)
    manifest = read_manifest(out, kind="samples")
    assert (manifest["method"], manifest["invariance"], manifest["physical_time"]) == ("metadynamics", "unadjusted", False)
    assert manifest["biased_torsions"] == ["phi ALA2", "psi ALA2"]
    assert manifest["counts"]["steps"] == 2 * 200
    assert manifest["counts"]["burn_in_force_calls"] == 2 * (10 + 400)
    assert manifest["bias"]["hills"] == 2 * 40
    weights = np.exp(arrays["log_weights"])
    assert manifest["kish_ess"] == pytest.approx(weights.sum() ** 2 / (weights**2).sum())
    energy = OpenMMPotential(alanine.openmm_system, alanine.system, name="x").energy(State(positions=_last(arrays)))
    assert np.allclose(arrays["potential_energy"][-1], energy, atol=0.05), "energies are those of the target"
    # V from the grid, bilinear between its points: the torsions are the molecule's own, in the right order
    bias = read_arrays(out / "bias.safetensors")[0]["bias"]
    topology = load_topology(alanine_folder / "structure.pdb")
    phi, psi = torsion_angles(arrays["positions"], topology, find_torsions(topology)).transpose(2, 0, 1)
    at = _bilinear(bias, psi, phi) / thermal_energy(310.0)
    swapped = _bilinear(bias, phi, psi) / thermal_energy(310.0)
    assert np.abs(at - arrays["log_weights"]).max() < 0.1
    assert np.abs(swapped - arrays["log_weights"]).max() > 1.0
    assert not list((tmp_path / "state").glob("block_*"))
    assert "metadynamics: 2 walkers filled phi ALA2 and psi ALA2" in capsys.readouterr().out
    cell = load_cell(out, load_molecule(alanine_folder))
    assert (cell.method, cell.status) == ("metadynamics", "complete")


def _last(arrays):
    import torch

    return torch.from_numpy(arrays["positions"][-1]).double()


def _bilinear(bias, row_angle, column_angle):
    places = [(angle + np.pi) / (2 * np.pi) * 72 for angle in (row_angle, column_angle)]
    (i, j), (a, b) = ([place.astype(int) for place in places], [place % 1 for place in places])
    corners = ((0, 0, (1 - a) * (1 - b)), (1, 0, a * (1 - b)), (0, 1, (1 - a) * b), (1, 1, a * b))
    return sum(bias[i + di, j + dj] * share for di, dj, share in corners)


class Kill(BaseException):
    """Stands for kill -9."""


def test_a_killed_job_continues_bitwise(tmp_path, alanine_folder, reference, monkeypatch):
    section = SECTION.model_copy(update={"fill_ps": 0.4, "length_ps": 0.2})
    whole = make(tmp_path / "whole", alanine_folder, reference, section=section)
    fill, calls = metadynamics._fill, [0]

    def mortal(*args, **kwargs):
        calls[0] += 1
        if calls[0] in (2, 5):
            raise Kill
        return fill(*args, **kwargs)

    monkeypatch.setattr(metadynamics, "_fill", mortal)
    for _ in range(2):
        with pytest.raises(Kill):
            make(tmp_path / "parts", alanine_folder, reference, section=section)
    parts = make(tmp_path / "parts", alanine_folder, reference, section=section)
    for file in ("samples.safetensors", "bias.safetensors"):
        before, after = read_arrays(whole / file)[0], read_arrays(parts / file)[0]
        for name, value in before.items():
            assert np.array_equal(value, after[name]), name


def test_the_residue_is_chosen_by_number(alanine_folder):
    torsions = find_torsions(load_topology(alanine_folder / "structure.pdb"))
    assert list(chosen_pair(torsions, 0, name="x")) == list(chosen_pair(torsions, 1, name="x")) == ["phi ALA2", "psi ALA2"]
    with pytest.raises(LongstrideError, match=r"'x' has 1 of them, and sample\.metadynamics\.residue is 2"):
        chosen_pair(torsions, 2, name="x")


@pytest.mark.parametrize("change", [{"hill_every_ps": 0.3}, {"save_every_ps": 0.003}, {"fill_ps": 3.0}, {"length_ps": 5.0}])
def test_rounds_hold_whole_hills_and_frames(change):
    with pytest.raises(ConfigError, match="must be a whole multiple"):
        validate({"sample": {"metadynamics": change}})
