"""The workflow as Snakemake sees it: dry runs of every shipped configuration, profiles, bad input, locks."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from longstride.cli import build_parser
from longstride.config import Config, load_config
from longstride.runs import lock_folder

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = [ROOT / "config.yaml", *sorted((ROOT / "workflow" / "configs").glob("*.yaml"))]
PROFILES = sorted((ROOT / "workflow" / "profiles").glob("*/profile.yaml"))
SMOKE = ROOT / "workflow" / "configs" / "smoke.yaml"

# imports Snakemake once, runs each case in a fork of its own, and tells which packages the case imported
DRIVER = """
import json, os, sys
from snakemake.cli import main
HEAVY = {"torch", "openmm", "mdtraj", "deeptime", "longstride.stages"}
for name, folder, arguments in json.load(sys.stdin):
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        continue
    os.chdir(folder)
    output = os.open(os.path.join(folder, "..", name + ".txt"), os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    status = 0
    try:
        main(arguments)
    except SystemExit as error:
        status = error.code
        if isinstance(status, str):
            print(status)
    print("status", 1 if status else 0)
    print("heavy", sorted(HEAVY & set(sys.modules)), flush=True)
    os._exit(0)
"""
OWN_CONFIGS = {
    "boxes": "run: {name: boxes}\nsystems: [{name: ala, sequence: ACE-ALA-NME}, {name: box, water: 216}]\n"
    "sample: {methods: [md, mts, sts], seeds: 2}\nfree_energy: {enabled: false}\n",
    "no-pair": "run: {name: no-pair}\nsystems: [{name: box, water: 216}]\nsample: {methods: [sts], seeds: 2}\n",
    "md-only": "run: {name: md-only}\nsample: {methods: [md, tuned-md], seeds: 1}\n",
    "bad": "flow: {hiden: 3}\n",
    "lags": "run: {name: lags}\nsystems: [{name: AV, sequence: AV}]\nsample: {methods: [md, timewarp]}\n"
    "reference: {engine: batched}\ntransfer: {train: [AA, GA], validation: [AG], rounds: 2, lags_ps: [10, 100]}\n",
    "two-processes": (
        "run: {name: two}\nsystems: [{name: AV, sequence: AV}]\nsample: {methods: [md, timewarp]}\n"
        "transfer: {train: [GA], validation: [AG], processes: 2, lags_ps: [10]}\n"
    ),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """Folder and output of Snakemake for every case of this file."""
    top = tmp_path_factory.mktemp("workflow")
    jobs = [_case(top, f"dry-{path.stem}", "--dry-run", "--printshellcmds", config=path) for path in CONFIGS]
    for path in CONFIGS:  # where users put weights of others; planning looks at no more than their bytes
        for weights in load_config(path).distill.teacher_weights:
            (top / f"dry-{path.stem}" / weights).parent.mkdir(exist_ok=True)
            (top / f"dry-{path.stem}" / weights).write_bytes(b"weights")
    jobs.append(_case(top, "no-weights", "--dry-run", config=ROOT / "workflow" / "configs" / "water-ani1x.yaml"))
    jobs.append(_case(top, "slurm", "--dry-run", "--executor", "slurm", profile="slurm"))
    for name, text in OWN_CONFIGS.items():
        (top / f"{name}.yaml").write_text(text)
        jobs.append(_case(top, name, "--dry-run", "--printshellcmds", "--cores", "4", config=top / f"{name}.yaml"))
    jobs.append(_case(top, "in-use"))
    held = top / "in-use" / "results" / "smoke"
    held.mkdir(parents=True)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("LONGSTRIDE", "SNAKEMAKE"))}
    with lock_folder(held):
        command = [sys.executable, "-c", DRIVER]
        subprocess.run(command, input=json.dumps(jobs), text=True, check=True, env=environment, timeout=600)
    return {name: (Path(folder), (top / f"{name}.txt").read_text()) for name, folder, _ in jobs}


def _case(top: Path, name: str, *arguments: str, config: Path = SMOKE, profile: str = "local") -> tuple[str, str, list[str]]:
    flags = ["-s", str(ROOT / "Snakefile"), "--configfile", str(config)]
    flags += ["--workflow-profile", str(ROOT / "workflow" / "profiles" / profile)]
    (top / name).mkdir()
    return name, str(top / name), [*flags, *arguments]


def _files(folder: Path) -> list[str]:
    found = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if not name.startswith(".snakemake"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_dry_run_plans_every_stage_without_importing_the_science_or_writing(config, cases):
    folder, text = cases[f"dry-{config.stem}"]
    assert "status 0" in text, text
    assert "heavy []" in text
    loaded = load_config(config)
    assert _files(folder) == sorted(loaded.distill.teacher_weights)
    sample, transfer = loaded.sample, loaded.transfer
    needed = ("distill",) if "mts" in sample.methods else ()
    flow = ("chains", "train-transfer") if transfer.train else ("shard", "train-flow")
    if not {"timewarp", "explore"} & {*sample.methods}:  # systems in a box have no flow
        assert all(f"{stage}: " not in text for stage in flow)
        flow = ()
    for stage in ("prepare", "reference", *flow, *needed, "report"):
        assert f"{stage}: " in text
    for system in loaded.systems:  # torsions and the AMBER-type reference are not for boxes
        assert text.count(f"compare: free energies, kinetics and speed of {system.name}\n") == (not system.periodic)
        paired = {"mts", "sts"} <= set(sample.methods)
        assert text.count(f"dynamics: multi-time-step against single-step dynamics of {system.name}\n") == paired
    for system in loaded.systems:
        for method in sample.methods:
            assert text.count(f"sample: {method} of {system.name},") == sample.seeds
    assert text.count("train-transfer: one flow") == transfer.rounds * bool(transfer.train)
    assert text.count("chains: exact chains of") == transfer.rounds * len(loaded.peptides)


def test_every_command_of_the_rules_is_one_the_command_line_accepts(cases):
    found = re.findall(r"exec (longstride .*?) > ", cases["dry-smoke"][1])
    assert len(found) == 14
    for text in found:
        options = build_parser().parse_args(shlex.split(text)[1:])
        assert options.config == Path("results/smoke/config.yaml")


def test_a_lone_molecule_and_a_box_in_one_run_get_what_fits_each(cases):
    text = cases["boxes"][1]
    assert "status 0" in text, text
    for name, methods in (("ala", ("md", "mts", "sts")), ("box", ("mts", "sts"))):
        assert text.count(f" of {name}, seed ") == 2 * len(methods)
        assert all(text.count(f"sample: {method} of {name}, seed ") == 2 for method in methods)
    commands = {text.split()[1]: shlex.split(text)[1:] for text in re.findall(r"exec (longstride .*?) > ", text)}
    summary = build_parser().parse_args(commands["summary"])
    assert summary.compare == [Path("results/boxes/compare/ala")]
    assert summary.dynamics == [Path("results/boxes/dynamics/ala"), Path("results/boxes/dynamics/box")]
    dynamics = build_parser().parse_args(commands["dynamics"])
    assert [len(dynamics.mts), len(dynamics.sts)] == [2, 2]


def test_samples_that_nothing_compares_are_made_all_the_same(cases):
    text = cases["no-pair"][1]
    assert "status 0" in text, text
    assert text.count("sample: sts of box, seed ") == 2
    assert not re.search(r"dynamics: |compare: |distill: ", text)


def test_lags_of_the_transferable_flow_need_the_dynamics_of_its_peptides(cases):
    text = cases["lags"][1]
    assert "status 0" in text, text
    for name in ("AA", "GA", "AG", "AV"):
        assert text.count(f"reference: molecular dynamics of {name}\n") == 1
    commands = re.findall(r"exec (longstride train-transfer .*?) > ", text)
    assert len(commands) == 2
    parsed = [build_parser().parse_args(shlex.split(command)[1:]) for command in sorted(commands)]
    for index, options in enumerate(parsed):
        folders = {
            name: ":".join(f"results/lags/{stage}/{name}" for stage in ("prepare", f"chains/round{index}", "reference"))
            for name in ("AA", "GA", "AG")
        }
        assert options.training == [folders["AA"], folders["GA"]]
        assert options.held_out == [folders["AG"]]
    without = cases["dry-2aa"][1]  # negative control: no lags, no dynamics of the peptides
    assert not re.search(r"reference: molecular dynamics of AA\n", without)
    assert re.search(r"--training \S*prepare/AA:\S*chains/round0/AA ", without)


def test_training_in_several_processes_is_started_by_torchrun(cases):
    text = cases["two-processes"][1]
    found = re.findall(r"exec torchrun --standalone --nproc-per-node 2 -m longstride.cli (train-transfer .*?) > ", text)
    assert len(found) == 1
    options = build_parser().parse_args(shlex.split(found[0]))
    assert options.threads == 2
    stages = ("prepare", "chains/round0", "reference")
    for name, folders in (("GA", options.training), ("AG", options.held_out)):
        assert folders == [":".join(f"results/two/{stage}/{name}" for stage in stages)]


def test_slurm_profile_plans_without_slurm(cases):
    assert "status 0" in cases["slurm"][1], cases["slurm"][1]


def test_a_method_that_needs_no_network_trains_none(cases):
    text = cases["md-only"][1]
    assert "sample: md of" in text
    assert "sample: tuned-md of" in text
    assert not re.search("train-flow: |distill: ", text)


def test_an_unknown_key_is_one_line_and_a_failure(cases):
    folder, text = cases["bad"]
    assert "status 0" not in text
    assert text.count("unknown configuration key 'flow.hiden'; did you mean 'flow.hidden'?") == 1
    assert "Traceback" not in text
    assert _files(folder) == []


def test_a_run_of_a_folder_in_use_is_refused_in_one_line(cases):
    folder, text = cases["in-use"]
    assert "status 0" not in text
    assert text.count("longstride: error: results/smoke is in use by another run (process ") == 1
    assert "Traceback" not in text
    assert _files(folder) == ["results/smoke/.lock"]  # not even the configuration was frozen


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


def test_missing_weights_are_one_line_before_the_first_job(cases):
    _, text = cases["no-weights"]
    (line,) = [line for line in text.splitlines() if line.startswith("longstride: error")]
    assert "cannot read weights/ani1x_model0.fnx" in line
    assert "fetch it" in line
    assert "status 1" in text


def test_slurm_profile_does_not_depend_on_an_accounting_database():
    keys = yaml.safe_load((ROOT / "workflow" / "profiles" / "slurm" / "profile.yaml").read_text())
    assert keys["slurm-status-command"] == "squeue"
    assert keys["retries"] > 0


def test_rules_are_uniform():
    rules = "\n".join(path.read_text() for path in sorted((ROOT / "workflow" / "rules").glob("*.smk")))
    blocks = re.split(r"^rule ", rules, flags=re.MULTILINE)[1:]
    assert len(blocks) == 16
    for block in blocks:
        for part in ("output:", "log:", "benchmark:", "conda:", "threads:", "mem_mb=", "runtime=", "params:", "message:"):
            assert part in block, (block.splitlines()[0], part)
        assert "key=job_key(" in block
        assert '"exec longstride ' in block or '"exec {params.launch} train-transfer ' in block
        assert "retries" not in block  # a rule's retries nest inside a cluster job
    assert len((ROOT / "Snakefile").read_text().splitlines()) <= 40
