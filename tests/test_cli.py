"""What a user sees: help with units and defaults, and bad input ending in one clear line with nothing half-written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from longstride.cli import build_parser, main
from longstride.data.frames import read_trajectories
from longstride.data.manifest import read_manifest

STAGES = ("prepare", "reference", "shard", "train-flow", "distill", "sample", "compare", "summary", "report", "bench")


@pytest.fixture(scope="module")
def reference(alanine_folder, tmp_path_factory) -> Path:
    """A short real reference of alanine dipeptide, made through the command line."""
    out = tmp_path_factory.mktemp("run") / "reference"
    flags = [
        "--trajectories",
        "2",
        "--length-ps",
        "2",
        "--equilibration-ps",
        "0.2",
        "--checkpoint-every-ps",
        "1",
        "--threads",
        "2",
    ]
    assert main(["reference", "--prepared", str(alanine_folder), "--out", str(out), *flags]) == 0
    return out


def _one_error(capsys, *arguments) -> str:
    """Run a command that must fail; return its one line."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("longstride: error:")]
    assert status == 2
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    return lines[0]


def _nothing_left(folder: Path) -> bool:
    """No finished-looking or temporary file is in the folder (checkpoints and locks in .state* may be)."""
    parts = [path.relative_to(folder).parts for path in folder.rglob("*") if path.is_file()]
    return all(any(part.startswith(".state") for part in names) for names in parts)


@pytest.mark.parametrize("stage", STAGES)
def test_help_names_units_and_defaults(stage, capsys):
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args([stage, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    if stage in ("reference", "train-flow", "distill", "sample"):
        assert "default" in text
    if stage == "reference":
        assert "--timestep-fs" in text
        assert "--length-ps" in text


def test_the_command_starts_without_heavy_imports():
    code = (
        "import sys; from longstride.cli import build_parser; build_parser();"
        "print([m for m in ('torch', 'openmm', 'mdtraj', 'matplotlib', 'deeptime') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


def test_reference_is_complete_and_opens_in_mdtraj(reference, alanine_folder):
    import mdtraj

    manifest = read_manifest(reference, kind="reference")
    assert manifest["frame_spacing_ps"] == 0.2
    frames = read_trajectories(reference)
    assert [len(item["positions"]) for item in frames] == [10, 10]
    opened = mdtraj.load(str(reference / "trajectory_00.dcd"), top=str(alanine_folder / "structure.pdb"))
    assert abs(opened.xyz - frames[0]["positions"]).max() < 1e-5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sequence", "AXA"], "unknown residue 'X'"),
        (["--sequence", "AA", "--temperature-K", "0"], "greater than 0"),
        (["--sequence", "AA", "--temperature-K", "-5"], "greater than 0"),
        (["--file", "absent.pdb"], "does not exist"),
        (["--sequence", "AA", "--force-field", "[nosuch.xml]"], "cannot load the force field"),
    ],
)
def test_prepare_refuses_bad_input(flags, message, tmp_path, capsys):
    assert message in _one_error(capsys, "prepare", "--out", tmp_path / "out", *flags)
    assert _nothing_left(tmp_path)


def test_prepare_refuses_missing_atoms_and_unknown_ligands(alanine_folder, tmp_path, capsys):
    lines = (alanine_folder / "structure.pdb").read_text().splitlines(keepends=True)
    missing, ligand = tmp_path / "missing.pdb", tmp_path / "ligand.pdb"
    missing.write_text("".join(line for line in lines if " CB " not in line))
    ligand.write_text("".join(lines).replace(" ALA ", " LIG "))
    out = tmp_path / "out"
    assert "No template found for residue" in _one_error(capsys, "prepare", "--file", missing, "--out", out)
    assert "(LIG)" in _one_error(capsys, "prepare", "--file", ligand, "--out", out)
    assert _nothing_left(out)


@pytest.mark.parametrize("text", ["prepare/AV", "prepare/AV:", ":chains/AV", "prepare/AV:chains/AV:reference/AV:more"])
def test_train_transfer_refuses_other_numbers_of_folders(text, tmp_path, capsys):
    line = _one_error(capsys, "train-transfer", "--training", text, "--out", tmp_path / "out")
    assert f"give PREPARED:CHAINS or PREPARED:CHAINS:REFERENCE, not {text!r}" in line


def test_unknown_key_names_the_nearest(tmp_path, capsys):
    bad = tmp_path / "config.yaml"
    bad.write_text("reference:\n  lenght_ps: 4\n")
    line = _one_error(capsys, "prepare", "--config", bad, "--out", tmp_path / "out")
    assert "reference.lenght_ps" in line
    assert "did you mean 'reference.length_ps'" in line


def test_lag_longer_than_the_trajectory(reference, tmp_path, capsys):
    line = _one_error(capsys, "shard", "--reference", reference, "--out", tmp_path / "out", "--lags-ps", "[100.0]")
    assert "not shorter than the shortest trajectory (2 ps)" in line
    assert _nothing_left(tmp_path)


@pytest.mark.parametrize("size", [0, 1000])
def test_empty_or_truncated_shards(alanine_folder, reference, tmp_path, capsys, size):
    shards = tmp_path / "shards"
    assert main(["shard", "--reference", str(reference), "--out", str(shards), "--lags-ps", "[1.0]"]) == 0
    victim = next(shards.glob("shard_*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:size])
    out = tmp_path / "flow"
    line = _one_error(capsys, "train-flow", "--prepared", alanine_folder, "--shards", shards, "--out", out, "--max-steps", "2")
    assert victim.name in line
    assert f"has {size} bytes" in line
    assert _nothing_left(out)


def test_shards_of_another_peptide(reference, tmp_path, capsys):
    shards, other, out = tmp_path / "shards", tmp_path / "other", tmp_path / "flow"
    assert main(["shard", "--reference", str(reference), "--out", str(shards), "--lags-ps", "[1.0]"]) == 0
    assert main(["prepare", "--sequence", "ACE-GLY-NME", "--out", str(other)]) == 0
    line = _one_error(capsys, "train-flow", "--prepared", other, "--shards", shards, "--out", out, "--max-steps", "2")
    assert "another molecule or force field" in line
    assert _nothing_left(out)


def test_blow_up_in_md(alanine_folder, tmp_path, capsys):
    flags = [
        "--timestep-fs",
        "8",
        "--save-every-ps",
        "0.8",
        "--length-ps",
        "80",
        "--trajectories",
        "2",
        "--hydrogen-mass-Da",
        "null",
    ]
    out = tmp_path / "out"
    line = _one_error(capsys, "reference", "--prepared", alanine_folder, "--out", out, *flags)
    assert "the energy is not finite" in line
    assert "timestep_fs" in line
    assert _nothing_left(out)


def test_full_disk_keeps_what_was_finished(reference, tmp_path, capsys):
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12k", "tmpfs", str(small)], check=False, capture_output=True
    ).returncode:
        pytest.skip("this machine does not allow mounting a tmpfs")
    try:
        line = _one_error(capsys, "shard", "--reference", reference, "--out", small / "out", "--lags-ps", "[1.0]")
        assert "no space left" in line
        assert not (small / "out" / "manifest.json").exists()
        assert not list((small / "out").glob(".*tmp*"))
    finally:
        subprocess.run(["umount", str(small)], check=True)
