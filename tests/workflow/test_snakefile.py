"""The workflow as Snakemake sees it: dry runs of every shipped configuration, profiles, bad input, locks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from longstride.config import Config, load_config
from longstride.runs import lock_folder

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = [ROOT / "config.yaml", *sorted((ROOT / "workflow" / "configs").glob("*.yaml"))]
PROFILES = sorted((ROOT / "workflow" / "profiles").glob("*/profile.yaml"))
SMOKE = ROOT / "workflow" / "configs" / "smoke.yaml"

# runs Snakemake in this process and then tells which packages the parse imported
WATCHED = """
import sys
from snakemake.cli import main
try:
    main(sys.argv[1:])
except SystemExit as error:
    print("status", error.code)
print("heavy", sorted({"torch", "openmm", "mdtraj", "deeptime", "matplotlib", "longstride.stages"} & set(sys.modules)))
"""


def snakemake(folder: Path, *arguments: str, config: Path = SMOKE, profile: str = "local") -> subprocess.CompletedProcess[str]:
    """Run Snakemake in `folder` on this checkout's workflow."""
    flags = ["-s", str(ROOT / "Snakefile"), "--configfile", str(config)]
    flags += ["--workflow-profile", str(ROOT / "workflow" / "profiles" / profile)]
    command = [sys.executable, "-c", WATCHED, *flags, *arguments]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("LONGSTRIDE", "SNAKEMAKE"))}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment, timeout=300)


def _files(folder: Path) -> list[str]:
    found = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if not name.startswith(".snakemake"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_dry_run_plans_every_stage_without_importing_the_science_or_writing(config, tmp_path):
    done = snakemake(tmp_path, "--dry-run", config=config)
    assert "status 0" in done.stdout, done.stderr
    assert "heavy []" in done.stdout
    assert _files(tmp_path) == []
    values = load_config(config)
    text = done.stdout + done.stderr
    for stage in ("prepare", "reference", "shard", "train-flow", "distill", "compare", "report"):
        assert f"{stage}: " in text
    for method in values.sample.methods:
        assert text.count(f"sample: {method} of alanine-dipeptide") == values.sample.seeds


def test_slurm_profile_plans_without_slurm(tmp_path):
    done = snakemake(tmp_path, "--dry-run", "--executor", "slurm", profile="slurm")
    assert "status 0" in done.stdout, done.stderr


def test_a_method_that_needs_no_network_trains_none(tmp_path):
    config = tmp_path / "md.yaml"
    config.write_text("run: {name: md-only}\nsample: {methods: [md], seeds: 1}\n")
    done = snakemake(tmp_path, "--dry-run", config=config)
    assert "sample: md of" in done.stdout + done.stderr
    assert not re.search("train-flow: |distill: ", done.stdout + done.stderr)


def test_an_unknown_key_is_one_line_and_a_failure(tmp_path):
    config = tmp_path / "bad.yaml"
    config.write_text("flow: {hiden: 3}\n")
    done = snakemake(tmp_path, "--dry-run", config=config)
    assert "status 0" not in done.stdout
    text = done.stdout + done.stderr
    assert text.count("unknown configuration key 'flow.hiden'; did you mean 'flow.hidden'?") == 1
    assert "Traceback" not in text
    assert not (tmp_path / "results").exists()


def test_a_run_of_a_folder_in_use_is_refused_in_one_line(tmp_path):
    folder = tmp_path / "results" / "smoke"
    folder.mkdir(parents=True)
    with lock_folder(folder):
        done = snakemake(tmp_path)
    text = done.stdout + done.stderr
    assert "status 0" not in done.stdout
    assert text.count("longstride: error: results/smoke is in use by another run (process ") == 1
    assert "Traceback" not in text
    assert _files(folder) == [".lock"]  # not even the configuration was frozen


def test_the_default_configuration_shows_every_key_with_its_default():
    shown = yaml.safe_load((ROOT / "config.yaml").read_text())
    assert _paths(shown) == _paths(Config().model_dump(mode="json"))


def _paths(value: object, prefix: str = "") -> set[str]:
    if isinstance(value, dict):
        return set().union(*(_paths(inner, f"{prefix}.{key}") for key, inner in value.items()))
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return _paths({key: inner for key, inner in value[0].items() if inner is not None}, f"{prefix}[]")
    return {prefix}


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.parent.name)
def test_profiles_can_be_killed_and_repeated(profile):
    keys = yaml.safe_load(profile.read_text())
    assert keys["nolock"] is True
    assert keys["rerun-incomplete"] is True
    assert keys["scheduler"] == "greedy"


def test_plain_snakemake_finds_a_profile_harmless_on_clusters():
    assert (ROOT / "profiles").resolve() == ROOT / "workflow" / "profiles"
    keys = yaml.safe_load((ROOT / "profiles" / "default" / "profile.yaml").read_text())
    assert not {"cores", "executor", "default-resources", "jobs"} & set(keys)


def test_slurm_profile_does_not_depend_on_an_accounting_database():
    keys = yaml.safe_load((ROOT / "workflow" / "profiles" / "slurm" / "profile.yaml").read_text())
    assert keys["slurm-status-command"] == "squeue"
    assert keys["retries"] > 0


def test_rules_are_uniform():
    rules = "\n".join(path.read_text() for path in sorted((ROOT / "workflow" / "rules").glob("*.smk")))
    blocks = re.split(r"^rule ", rules, flags=re.MULTILINE)[1:]
    assert len(blocks) == 11
    for block in blocks:
        for part in ("output:", "log:", "benchmark:", "conda:", "threads:", "mem_mb=", "runtime=", "params:", "message:"):
            assert part in block, (block.splitlines()[0], part)
        assert "key=job_key(" in block
        assert '"exec longstride ' in block
        assert "retries" not in block  # a rule's retries nest inside a cluster job
    assert len((ROOT / "Snakefile").read_text().splitlines()) <= 40
