"""`bench flow`: it counts what it times, its parts are those of a proposal, and its JSON is complete."""

import json
from dataclasses import replace

import pytest
import torch

from longstride.cli import main
from longstride.config import TransferConfig
from longstride.data.manifest import write_manifest
from longstride.flows.torsion_network import TorsionArchitecture, TorsionNetwork
from longstride.flows.transferable import BoundMolecule
from longstride.flows.transferable_checkpoint import Physics, save_transferable
from longstride.stages import bench_flow
from longstride.stages.bench_flow import ENERGIES, MD_STEPS, PARTS, WHOLE, Settings

SEQUENCE, ATOMS = "GG", 17
FAST = Settings(sequence=SEQUENCE, compile=False, batches=(1, 5), sequences=(SEQUENCE,), chains=5, rounds=1, window_s=0.001)


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch):
    """No fresh process, which would import torch anew, and every molecule bound once; the slow test does both."""
    monkeypatch.setattr(bench_flow, "in_fresh_process", bench_flow.measure)
    original = BoundMolecule.of

    def once(prepared, potential, *, kT, fitted_states=0):
        if prepared.system.name not in BOUND:
            BOUND[prepared.system.name] = original(prepared, potential, kT=kT, fitted_states=20)
        return BOUND[prepared.system.name]

    monkeypatch.setattr(BoundMolecule, "of", once)


BOUND = {}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder like one of train-transfer, with a label for a time lag."""
    folder = tmp_path_factory.mktemp("transfer")
    torch.manual_seed(0)
    network = TorsionNetwork(TorsionArchitecture(lags_ps=(10.0,), width=16, heads=2, layers=1, message_rounds=1, components=3))
    save_transferable(
        folder / "model.safetensors", network, Physics(target="amber14-all-obc1", cutoff_nm=2.0, temperature_K=310.0)
    )
    write_manifest(folder, kind="transferable", files=["model.safetensors"], content={})
    return folder


def check_figures(found, chains):
    times = found["milliseconds_per_call"]
    assert set(times) == {*WHOLE, *PARTS}
    assert all(value > 0 for value in times.values())
    assert set(found["spread_per_s"]) == {*WHOLE, *PARTS, ENERGIES, MD_STEPS}
    assert set(found["proposals_per_s"]) == set(WHOLE)
    for name, rate in found["proposals_per_s"].items():
        assert rate == pytest.approx(1e3 * chains / times[name])
        lowest, highest = found["spread_per_s"][name]
        assert 0 < lowest <= rate <= highest
    assert found["parts_over_step"] == pytest.approx(sum(times[name] for name in PARTS) / times["step"])
    step, openmm = found["proposals_per_s"]["step"], found["openmm"]
    assert found["ratios"] == pytest.approx(
        {
            "exact_proposals_per_openmm_energy": step / openmm["energies_per_s"],
            "openmm_md_steps_per_exact_proposal": openmm["md_steps_per_s"] / step,
        }
    )  # of a single round


def check_point(row, chains):
    assert (row["system"], row["atoms"], row["chains"], row["proposals_per_call"]) == (SEQUENCE, ATOMS, chains, chains)
    assert row["torsions"] + row["stiff_coordinates"] == 3 * ATOMS - 6
    assert row["core_share"] > 0
    for clock in ("wall_time", "cpu_time"):
        check_figures(row[clock], chains)
    memory = row["memory_MiB"]
    assert memory["peak"] is None or 0 < memory["steps"] <= memory["peak"]
    assert set(row["set_up_s"]) == {"prepare", "bind", "first_step"}


def test_result_is_complete_json():
    result = json.loads(json.dumps(bench_flow.flow(FAST), allow_nan=False))
    for row, chains in zip(result["by_batch"], FAST.batches, strict=True):
        check_point(row, chains)
    check_point(result["by_atoms"][0], FAST.chains)
    assert result["by_atoms"][0] == result["by_batch"][1]  # one and the same point is measured once
    assert result["flow"] == "untrained"
    assert (result["device"], result["threads"], result["timing"]["rounds"]) == ("cpu", 1, 1)
    assert result["provenance"]["versions"]["torch"] != "absent"
    assert f"{SEQUENCE:<14}" in bench_flow.table(result)


def test_a_trained_flow_is_measured_likewise(trained):
    result = bench_flow.flow(replace(FAST, flow=trained, batches=(3,), sequences=()))
    check_point(result["by_batch"][0], 3)
    assert "model.safetensors" in result["flow"]
    assert "trained flow" in bench_flow.table(result)


def test_the_parts_are_those_of_a_proposal():
    sampler, _ = bench_flow._sampler(replace(FAST, chains=4))
    molecule, x = sampler.proposal.molecule, sampler.x.positions
    plain = molecule.encode(x)
    conditional = molecule.gaussian.at(plain.torsions)
    known = bench_flow._with_known(molecule, conditional)
    assert torch.equal(known.encode(x).log_stiff, plain.log_stiff)
    again, truth = (m.decode(plain.torsions, plain.latent, x) for m in (known, molecule))
    assert torch.equal(again.positions, truth.positions)
    # the control: another mean is another density
    moved = bench_flow._with_known(molecule, replace(conditional, mean=conditional.mean + 1e-2))
    assert not torch.allclose(moved.encode(x).log_stiff, plain.log_stiff)


def test_the_untrained_network_has_the_default_sizes():
    sizes = bench_flow.untrained().architecture
    section = TransferConfig()
    for name in ("width", "heads", "layers", "message_rounds", "components"):
        assert getattr(sizes, name) == getattr(section, name)


def test_a_folder_without_a_transferable_flow_is_refused(tmp_path, capsys):
    assert main(["bench", "flow", "--quick", "--flow", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("longstride: error:")
    assert "manifest" in captured.err
    assert captured.out == ""


@pytest.mark.slow
def test_the_command_in_fresh_processes(monkeypatch, capsys):
    monkeypatch.undo()
    assert main(["bench", "flow", "--quick", "--system", SEQUENCE, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["chains"] for row in result["by_batch"]] == [1, 16]
    for row in (*result["by_batch"], *result["by_atoms"]):
        assert row["proposals_per_call"] == row["chains"]
        assert row["memory_MiB"]["peak"] > 0
