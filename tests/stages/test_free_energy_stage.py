"""Stage `free-energy` on real molecules, a fraction of a picosecond long, and its place in a comparison."""

import csv
import hashlib
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from longstride.analysis.features import Torsions
from longstride.analysis.samples import load_molecule
from longstride.analysis.tables import SUMMARY_COLUMNS
from longstride.analysis.umbrella import attach_umbrella, load_umbrella
from longstride.cli import main
from longstride.config import FreeEnergyConfig, PhysicsConfig, validate
from longstride.data.atomic import read_arrays
from longstride.data.manifest import read_manifest
from longstride.errors import ConfigError, DataError
from longstride.stages import compare, free_energy
from longstride.systems import prepare_sequence, save_prepared
from molecules import PHYSICS

SHORT = {
    "windows": (8, 4), "stiffness_kJ_per_mol": (10.0, 2.0),
    "timestep_fs": 2.0, "length_ps": 0.2, "equilibration_ps": 0.04, "save_every_ps": 0.01,
    "bins": 24, "bootstrap": 20, "compile_energy": False, "checkpoint_every_ps": 0.04,
}  # fmt: skip


def command(prepared, out, **changes):
    settings = {**SHORT, **changes}
    flags = [f"--{key.replace('_', '-')}={json.dumps(value)}" for key, value in settings.items()]
    return ["free-energy", "--prepared", str(prepared), "--out", str(out), "--threads", "1", *flags]


@pytest.fixture(scope="module")
def made(alanine_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("free-energy") / "out"
    assert main(command(alanine_folder, out)) == 0
    return out


def test_it_writes_a_profile_samples_and_a_manifest(made):
    manifest = read_manifest(made, kind="free-energy")
    assert manifest["torsions"] == ["phi ALA2", "psi ALA2"]
    assert manifest["delta_f"]["low"] < manifest["delta_f"]["value"] < manifest["delta_f"]["high"]
    assert manifest["counts"]["force_calls"] == 32 * 24 * 6
    assert manifest["simulated_ps"] == pytest.approx(32 * 0.24)
    torsions = read_arrays(made / "umbrella.safetensors")[0]["torsions"]
    assert torsions.shape == (20, 8, 4, 2)
    assert (np.abs(torsions) <= np.pi + 1e-6).all()
    with (made / "free_energy_phi.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 24
    assert min(float(row["F_kT"]) for row in rows if row["F_kT"]) == 0


@pytest.mark.slow
def test_a_kill_does_not_change_the_result(made, alanine_folder, tmp_path):
    call = [sys.executable, "-c", "import sys; from longstride.cli import main; sys.exit(main(sys.argv[1:]))"]
    out = tmp_path / "out"
    for _ in range(3):
        process = subprocess.Popen([*call, *command(alanine_folder, out)], stderr=subprocess.DEVNULL)
        begin = time.monotonic()
        while time.monotonic() - begin < 60 and not list((out / ".state").glob("checkpoint_*")) and process.poll() is None:
            time.sleep(0.05)
        time.sleep(0.4)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run([*call, *command(alanine_folder, out)], check=False).returncode == 0
    ours, theirs = (read_manifest(folder, kind="free-energy") for folder in (out, made))
    assert ours["delta_f"] == theirs["delta_f"]
    assert ours["files"] == theirs["files"]


def test_a_molecule_that_cannot_be_turned_gets_a_reason_instead_of_a_number(tmp_path, capsys):
    reason = "phi PRO2 lies in a ring"
    molecule = prepare_sequence("ACE-PRO-NME", name="other", **PHYSICS)
    save_prepared(tmp_path / "prepared", molecule, {"temperature_K": 310.0})
    assert main(command(tmp_path / "prepared", tmp_path / "out")) == 0
    assert reason in capsys.readouterr().out
    manifest = read_manifest(tmp_path / "out", kind="free-energy")
    assert manifest["delta_f"] == {"value": None, "low": None, "high": None, "note": reason}
    content = {"system": "other", "primary_pair": None, "reference": {"status": "ok", "method": "reference"}, "methods": []}
    attach_umbrella(content, load_umbrella(tmp_path / "out", load_molecule(tmp_path / "prepared")))
    assert compare.summary_rows(content)[1]["status"] == reason
    none = Torsions(names=("psi ALA1",), indices=np.zeros((1, 4), dtype=int), pair=None)
    assert free_energy.unsuitable(molecule, none) == "no (phi, psi) pair"


def entry(value, target):
    delta_f = {"value": value, "low": value - 0.2, "high": value + 0.2, "note": "", "z": None}
    return {"method": "m", "seed": 0, "target": target, "invariance": "exact", "status": "s", "delta_f": {"phi ALA2": delta_f}}


def test_a_comparison_shows_it_beside_every_method_of_its_target(made, alanine_folder):
    umbrella = load_umbrella(made, load_molecule(alanine_folder))
    value, target = umbrella["delta_f"]["value"], umbrella["target"]
    methods = [entry(value, target), entry(value + 50, target), entry(value, "gfn2-xtb")]
    content = {"system": "a", "primary_pair": ["phi ALA2", "psi ALA2"], "reference": entry(value, target), "methods": methods}
    attach_umbrella(content, umbrella)
    same, other, elsewhere = (one["delta_f"]["phi ALA2"].get("umbrella") for one in methods)
    assert abs(same["z"]) < 1e-6
    assert other["z"] > 5
    assert elsewhere is None
    assert "umbrella sampling" in other["statement"]
    row = compare.summary_rows(content)[1]
    assert (row["method"], row["delta_f_phi_kT"], row["invariance"]) == ("umbrella", value, "unadjusted")
    assert set(row) <= set(SUMMARY_COLUMNS)


def test_another_molecule_s_reference_is_refused(made, tmp_path):
    save_prepared(tmp_path / "p", prepare_sequence("ACE-GLY-NME", name="g", **PHYSICS), {"temperature_K": 310.0})
    with pytest.raises(DataError, match="another potential"):
        load_umbrella(made, load_molecule(tmp_path / "p"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"windows": [5, 4]}, "two even numbers"),
        ({"bins": 25}, "bins must be even"),
        ({"stiffness_kJ_per_mol": [0.0, 1.0]}, "must be positive"),
        ({"save_every_ps": 0.003}, "whole multiple of timestep_fs"),
    ],
)
def test_bad_settings_are_one_line(values, message):
    with pytest.raises(ConfigError, match=message):
        validate({"free_energy": values})


def test_a_batched_engine_that_refuses_the_system_names_the_way_out(tmp_path):
    import openmm

    molecule = prepare_sequence("ACE-ALA-NME", name="a", **PHYSICS)
    force = openmm.CustomExternalForce("x^2")
    force.addParticle(0, [])
    molecule.openmm_system.addForce(force)
    text = openmm.XmlSerializer.serialize(molecule.openmm_system)
    molecule = replace(molecule, system_hash=hashlib.sha256(text.encode()).hexdigest())
    save_prepared(tmp_path / "p", molecule, {"temperature_K": 310.0})
    job = {"physics": PhysicsConfig(), "prepared": tmp_path / "p", "out": tmp_path / "o", "state": tmp_path / "s", "seed": 0}
    with pytest.raises(Exception, match=r"free_energy\.energies: openmm"):
        free_energy.run(FreeEnergyConfig(**SHORT), **job, threads=1)
    tiny = FreeEnergyConfig(**{**SHORT, "energies": "openmm", "windows": (4, 4), "length_ps": 0.04, "equilibration_ps": 0.01})
    free_energy.run(tiny, **job, threads=1)
    assert read_manifest(tmp_path / "o", kind="free-energy")["delta_f"]["value"] is not None
