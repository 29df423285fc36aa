"""The flow for peptides that comes with the package: samples of a peptide at once, from the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from longstride import weights
from longstride.cli import main
from longstride.config import load_config
from longstride.data.atomic import read_arrays
from longstride.data.manifest import read_manifest
from longstride.flows.transferable import BoundMolecule, TorsionMoves, bind
from longstride.flows.transferable_checkpoint import load_transferable
from longstride.mcmc.metropolis import boltzmann, log_ratio
from longstride.potentials.amber import AmberPotential
from longstride.state import State
from longstride.systems import prepare_sequence
from longstride.units import thermal_energy
from molecules import PHYSICS

LARGEST_MiB = 20
REPOSITORY = Path(__file__).resolve().parents[2]
FEW = ["--set", "chains=16", "--set", "proposals=12", "--set", "burn_in=8", "--set", "save_every=4"]
QUICK = [*FEW, "--set", "compile_energy=false", "--set", "fitted_states=20", "--threads", "1"]


def sample(out, *arguments, sequence="GA"):
    return main(["sample", "--method", "timewarp", "--sequence", sequence, "--out", str(out), *QUICK, *arguments])


def test_the_files_are_whole_small_and_say_where_they_come_from():
    manifest = read_manifest(weights.PEPTIDES, kind="transferable")  # checks every checksum
    assert sum(path.stat().st_size for path in weights.PEPTIDES.iterdir()) < LARGEST_MiB * 2**20
    network, physics = load_transferable(weights.PEPTIDES / "model.safetensors")
    assert physics.temperature_K == 310.0
    assert all(bool(value.isfinite().all()) for value in network.parameters())
    card = (weights.PEPTIDES / "README.md").read_text()
    assert "snakemake --configfile workflow/configs/peptides.yaml" in card
    recipe = load_config(REPOSITORY / "workflow" / "configs" / "peptides.yaml")
    assert sorted(recipe.transfer.train) == sorted(manifest["training"])
    assert not {system.sequence for system in recipe.systems} & set(recipe.peptides)  # the test set is unseen


def test_a_sequence_gives_exact_samples_without_training(tmp_path, capsys):
    assert sample(tmp_path / "GA") == 0
    manifest = read_manifest(tmp_path / "GA", kind="samples")
    assert manifest["invariance"] == "exact"
    assert manifest["acceptance_by_label"]["independent"] > 0.1
    positions = read_arrays(tmp_path / "GA" / "samples.safetensors")[0]["positions"]
    assert positions.shape == (3, 16, 20, 3)
    assert np.isfinite(positions).all()
    assert json.loads((tmp_path / "GA" / "prepared" / "manifest.json").read_text())["system"] == "GA"
    assert "prepared GA" in capsys.readouterr().out


def test_bad_requests_are_one_line(tmp_path, capsys):
    cases = {
        "unknown residue": (sample, (tmp_path / "a",), {"sequence": "AZ"}),
        "give either --prepared or --sequence": (sample, (tmp_path / "b", "--prepared", str(tmp_path)), {}),
    }
    for message, (call, arguments, options) in cases.items():
        assert call(*arguments, **options) == 2
        error = capsys.readouterr().err
        assert error.startswith("longstride: error:")
        assert error.count("\n") == 1
        assert message.lower() in error.lower()
    assert main(["sample", "--method", "timewarp", "--out", str(tmp_path / "c")]) == 2
    assert "--sequence" in capsys.readouterr().err


def test_another_temperature_is_refused(tmp_path, capsys):
    config = tmp_path / "vacuum.yaml"
    config.write_text("physics: {force_field: [amber14-all.xml], cutoff_nm: null}\n")
    assert sample(tmp_path / "out", "--config", str(config)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "amber14-all" in error


@pytest.mark.slow
@pytest.mark.parametrize(("sequence", "least"), [("SY", 0.1), ("HP", 0.05)])
def test_unseen_dipeptides_accept_proposals_for_all_coordinates(sequence, least):
    """Also with proline's ring; the control is a network without training."""
    prepared = prepare_sequence(sequence, name=sequence, **PHYSICS)
    potential = AmberPotential.from_openmm(prepared.openmm_system, prepared.system, name="amber", dtype=torch.float32)
    kT = thermal_energy(310.0)
    molecule = BoundMolecule.of(prepared, potential, kT=kT)
    log_density, generator = boltzmann(potential, kT), torch.Generator().manual_seed(0)
    x = State(positions=molecule.states.repeat(6, 1, 1))
    x, _ = _chain(TorsionMoves(molecule=molecule).propose, log_density, x, 60, generator)
    network, _ = load_transferable(weights.PEPTIDES / "model.safetensors")
    rates = []
    for model in (network, type(network)(network.architecture)):
        proposal = bind(model, molecule, label=len(network.architecture.lags_ps))
        rates.append(_chain(proposal.propose, log_density, x, 12, generator)[1])
    assert rates[0] > least
    assert rates[1] < rates[0] / 3


def _chain(propose, log_density, x, steps, generator):
    """Return where Metropolis-Hastings leads and its acceptance."""
    at_x, accepted = log_density(x), []
    for _ in range(steps):
        y, forward, backward = propose(x, generator)
        at_y = log_density(y)
        log_r = log_ratio(at_x, at_y, backward, forward)
        taken = torch.rand(len(at_x), generator=generator, dtype=torch.float64).log() < log_r
        x = State(positions=torch.where(taken[:, None, None], y.positions, x.positions))
        at_x = torch.where(taken, at_y, at_x)
        accepted.append(taken.double().mean().item())
    return x, float(np.mean(accepted))
