"""`bench parity`: what it compares is complete, what it finds is reported, and a slightly wrong force field does not pass."""

import functools
import json

import openmm
import pytest

from longstride.cli import main
from longstride.potentials.amber import AmberPotential
from longstride.stages import bench_parity
from longstride.systems import ONE_LETTER

ALANINE = "ACE-ALA-NME"
PREPARED = functools.cache(bench_parity.prepared)


@pytest.fixture(autouse=True)
def _few_molecules(monkeypatch):
    """Two molecules in the default physics and one in another; each is prepared once."""

    def few(dipeptides=("GA",)):
        default, *_, last = complete()
        return (
            bench_parity.Group(name="dipeptides", sequences=(ALANINE, *dipeptides), physics=default.physics),
            bench_parity.Group(name=last.name, sequences=(ALANINE,), physics=last.physics),
        )

    complete = bench_parity.all_groups
    monkeypatch.setattr(bench_parity, "all_groups", few)
    monkeypatch.setattr(bench_parity, "prepared", PREPARED)


def test_all_residues_and_solvents_are_compared(monkeypatch):
    monkeypatch.undo()
    groups = {group.name: group for group in bench_parity.all_groups()}
    assert len(groups["capped residues"].sequences) == 20
    assert len(set(groups["dipeptides"].sequences)) == 400
    assert set("".join(groups["tetrapeptides"].sequences)) == set(ONE_LETTER)
    assert {"hct", "obc1", "obc2", "gbn", "gbn2", "vacuum", "reaction field"} < groups.keys()
    assert len({group.physics for group in groups.values()}) == len(groups) - 2  # three groups share the default
    few = bench_parity.a_few(tuple(groups.values()))
    assert [group.name for group in few] == list(groups)
    assert sum(len(group.sequences) for group in few) < 20


def test_the_command_finds_parity(capsys, tmp_path):
    split = tmp_path / "split.yaml"
    split.write_text("train: [GA]\nval: [AG, GA]\n")
    assert main(["bench", "parity", "--list", str(split), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["passed"]
    assert result["molecules"] == 4
    group = result["groups"]["dipeptides"]
    assert group["molecules"] == 3
    assert group["atoms"] == [20, 22]
    for kind, bar in result["bars"].items():
        assert 0 <= group[kind]["largest_error"] < bar
        assert group[kind]["molecule"] in (ALANINE, "GA", "AG")
    assert result["provenance"]["versions"]["openmm"] != "absent"
    assert "passed" in bench_parity.table(result)


def test_the_cutoff_falls_between_the_atoms_of_a_capped_residue():
    x = PREPARED(ALANINE, bench_parity.all_groups()[-1].physics).positions
    assert max(((x - atom) ** 2).sum(1).max() for atom in x) ** 0.5 > 1.2 * bench_parity.SHORT_CUTOFF_NM


def scale_a_charge(system):
    force = next(force for force in system.getForces() if isinstance(force, openmm.NonbondedForce))
    charge, sigma, epsilon = force.getParticleParameters(5)
    force.setParticleParameters(5, charge * 1.0001, sigma, epsilon)


def scale_a_torsion(system):
    force = next(force for force in system.getForces() if isinstance(force, openmm.PeriodicTorsionForce))
    index = max(range(force.getNumTorsions()), key=lambda i: force.getTorsionParameters(i)[6])
    *atoms, n, phase, k = force.getTorsionParameters(index)
    force.setTorsionParameters(index, *atoms, n, phase, k * 1.0001)


@pytest.mark.parametrize(("change", "kind"), [(scale_a_charge, "energies"), (scale_a_torsion, "forces")])
def test_negative_control_a_changed_parameter_misses_a_bar(change, kind, monkeypatch, capsys):
    def wrong(molecule):
        system = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(molecule.openmm_system))
        if molecule.system.name == "GA":
            change(system)
        return AmberPotential.from_openmm(system, molecule.system, name="amber")

    monkeypatch.setattr(bench_parity, "batched", wrong)
    assert main(["bench", "parity", "--quick", "--json"]) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("longstride: error:")]
    assert len(errors) == 1
    assert "GA (dipeptides)" in errors[0]
    result = json.loads(captured.out)
    assert not result["passed"]
    assert result["groups"]["dipeptides"]["missed"] == ["GA"]
    assert result["groups"]["dipeptides"][kind]["largest_error"] > result["bars"][kind]
    assert result["groups"]["obc1 with cutoff"]["passed"]
    assert "MISSED" in bench_parity.table(result)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [AA, XA]", "unknown residue 'X'"),
        ("train: AA", "lists of sequences"),
        ("- AA", "lists of sequences"),
        ("train: [1, 2]", "lists of sequences"),
        ("train: [", "not valid YAML"),
    ],
)
def test_a_bad_list_is_refused(text, message, tmp_path, capsys):
    path = tmp_path / "split.yaml"
    path.write_text(text)
    assert main(["bench", "parity", "--list", str(path)]) == 2
    assert message in capsys.readouterr().err
    assert main(["bench", "parity", "--list", str(tmp_path / "absent.yaml")]) == 2
    assert "cannot read" in capsys.readouterr().err
