"""Method `timewarp` with the options of its section on alanine dipeptide: local moves, batches, OpenMM energies, labels."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from longstride.config import ExploreSampling, TimewarpSampling, validate
from longstride.data.atomic import read_arrays
from longstride.data.frames import write_trajectory
from longstride.data.manifest import read_manifest, write_manifest
from longstride.errors import ConfigError, LongstrideError
from longstride.flows.checkpoint import save_flow
from longstride.flows.internal import FlowArchitecture, InternalFlow
from longstride.flows.zmatrix import build_zmatrix
from longstride.mcmc.local import Dynamics, langevin
from longstride.mcmc.metropolis import boltzmann, start_chains
from longstride.potentials.amber import AmberPotential
from longstride.stages.sample_flow import run_explore, run_timewarp
from longstride.state import State
from longstride.systems import save_prepared

KT = 2.5774834
TINY = {"chains": 2, "proposals": 8, "save_every": 4, "burn_in": 4, "checkpoint_every": 4, "compile_energy": False}


def hashed(molecule):
    import openmm

    text = openmm.XmlSerializer.serialize(molecule.openmm_system)
    return replace(molecule, system_hash=hashlib.sha256(text.encode()).hexdigest())


def folders(top, molecule, frames):
    """Write prepare, reference and flow folders; the flow knows the statistics of the frames and nothing else."""
    save_prepared(top / "prepared", molecule, {"temperature_K": 310.0})
    origin = {"system_hash": molecule.system_hash, "temperature_K": 310.0}
    (top / "reference").mkdir()
    names = write_trajectory(top / "reference", 0, {"positions": frames.numpy().astype(np.float32)})
    write_manifest(top / "reference", kind="reference", files=names, content=origin)
    zmatrix = build_zmatrix(molecule.system)
    torch.manual_seed(0)
    flow = InternalFlow(zmatrix, FlowArchitecture(lags_ps=(10.0,), hidden=8, couplings=2, torsion_components=2))
    flow.set_statistics(zmatrix.from_cartesian(frames))
    (top / "flow").mkdir()
    save_flow(top / "flow" / "model.safetensors", flow, molecule)
    write_manifest(top / "flow", kind="flow", files=["model.safetensors"], content=origin)
    return {"prepared": top / "prepared", "reference": top / "reference", "flow": top / "flow", "seed": 3, "threads": 1}


@pytest.fixture(scope="module")
def frames(alanine):
    """Thermal configurations, [200, atom, 3], from a few steps of dynamics."""
    potential = AmberPotential.from_openmm(alanine.openmm_system, alanine.system, name="x")
    masses = torch.from_numpy(alanine.system.masses)
    kernel = langevin(Dynamics(potential=potential, kT=KT, masses=masses, dt=0.001, steps=60), friction=20.0)
    begin = State(positions=torch.from_numpy(alanine.positions).repeat(200, 1, 1))
    chains, _ = kernel(start_chains(boltzmann(potential, KT), begin), torch.Generator().manual_seed(0))
    return chains.state.positions


@pytest.fixture(scope="module")
def job(alanine, frames, tmp_path_factory):
    return folders(tmp_path_factory.mktemp("job"), alanine, frames)


def sampled(job, path, **options):
    run_timewarp(TimewarpSampling(**{**TINY, **options}), **job, out=path / "out", state=path / "state")
    return read_manifest(path / "out", kind="samples"), read_arrays(path / "out" / "samples.safetensors")[0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("exact", None, None)),
        ({"speculative": 4}, ("exact", None, None)),
        ({"local_moves": "ghmc", "local_steps": 2}, ("exact", "ghmc", 12 * 2 * 3)),
        ({"local_moves": "hmc", "local_steps": 2, "speculative": 4}, ("exact", "hmc", 3 * 2 * 3)),
        ({"local_moves": "langevin", "local_steps": 2}, ("unadjusted", "langevin", 12 * 2 * 3)),
    ],
)
def test_options_make_the_chain_they_name(job, tmp_path, options, expected):
    invariance, local, force_calls = expected
    manifest, arrays = sampled(job, tmp_path, **options)
    assert manifest["invariance"] == invariance
    assert arrays["positions"].shape == (2, 2, 22, 3)
    assert manifest["counts"]["proposals"] == 16
    assert manifest["counts"].get("force_calls") == force_calls
    flow_labels = {"10 ps", "independent"} & set(manifest["acceptance_by_label"])
    assert set(manifest["acceptance_by_label"]) - flow_labels == ({local} if local else set())
    if local:
        assert manifest["acceptance_by_label"][local] > 0.3
        assert (np.diff(arrays["positions"], axis=0) != 0).any()
    assert np.isfinite(arrays["potential_energy"]).all()


def test_openmm_gives_the_same_chain_within_its_precision(job, tmp_path):
    options = {"proposals": 4, "burn_in": 0, "local_moves": "hmc", "local_steps": 2}
    ours, first = sampled(job, tmp_path / "batched", **options)
    theirs, second = sampled(job, tmp_path / "openmm", **options, energies="openmm")
    assert (ours["energies"], theirs["energies"]) == ("batched", "openmm")
    assert np.allclose(first["potential_energy"], second["potential_energy"], atol=0.05)
    assert np.allclose(first["positions"], second["positions"], atol=1e-4)


def test_a_force_the_batched_engine_does_not_know_is_never_dropped(alanine, frames, tmp_path):
    import copy

    import openmm

    system = copy.deepcopy(alanine.openmm_system)
    force = openmm.CustomBondForce("100*(r-0.4)^2")
    force.addBond(4, 16, [])
    system.addForce(force)
    work = folders(tmp_path, hashed(replace(alanine, openmm_system=system)), frames)
    section = {**TINY, "proposals": 4, "burn_in": 0}
    paths = {"out": tmp_path / "out", "state": tmp_path / "state"}
    for run, kind, name in ((run_timewarp, TimewarpSampling, "timewarp"), (run_explore, ExploreSampling, "explore")):
        with pytest.raises(LongstrideError, match=rf"CustomBondForce.*set sample\.{name}\.energies: openmm"):
            run(kind(**section), **work, **paths)
    run_timewarp(TimewarpSampling(**section, energies="openmm"), **work, **paths)
    arrays = read_arrays(tmp_path / "out" / "samples.safetensors")[0]
    x = arrays["positions"][-1, 0]
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(x.astype(np.float64))
    energy = context.getState(getEnergy=True).getPotentialEnergy()._value
    assert arrays["potential_energy"][-1, 0] == pytest.approx(energy, abs=0.05)


def test_a_killed_chain_with_local_moves_continues_to_the_same_bits(job, tmp_path, monkeypatch):
    options = {"local_moves": "ghmc", "local_steps": 2}
    _, whole = sampled(job, tmp_path / "whole", **options)
    real = Dynamics.verlet
    left = [15]

    def dying(self, *arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(Dynamics, "verlet", dying)
    with pytest.raises(KeyboardInterrupt):
        sampled(job, tmp_path / "killed", **options)
    monkeypatch.setattr(Dynamics, "verlet", real)
    _, resumed = sampled(job, tmp_path / "killed", **options)
    for name in whole:
        assert np.array_equal(whole[name], resumed[name])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"speculative": 3}, "proposals must be a whole multiple of speculative"),
        ({"speculative": 8, "burn_in": 4, "proposals": 16, "save_every": 8}, "burn_in must be a whole multiple of speculative"),
        ({"local_moves": "mala"}, "sample.timewarp.local_moves"),
        ({"energies": "gpu"}, "sample.timewarp.energies"),
    ],
)
def test_bad_options_are_one_line(values, message):
    with pytest.raises(ConfigError, match=message):
        validate({"sample": {"timewarp": values}})
