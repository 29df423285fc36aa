"""One workflow run around its jobs: frozen configuration, lock, job keys, what the user sees."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from longstride import runs
from longstride.config import Config, load_config, validate
from longstride.errors import ConfigError, LongstrideError

STAGES = ("prepare", "reference", "shard", "flow", "distill", "compare", "dynamics", "report")
METHODS = ("md", "tuned-md", "metadynamics", "tempering", "timewarp", "explore", "mts", "sts")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """Keep what a run tells its jobs out of the other tests."""
    monkeypatch.setenv(runs.CONFIG_VARIABLE, "")
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.setattr(runs, "code_version", lambda stage: f"code of {stage}")


def _keys(values: dict) -> dict[str, str]:
    run = runs.Run(config=validate(values))
    keys = {stage: run.job_key(stage, system="alanine-dipeptide") for stage in STAGES}
    return keys | {method: run.job_key("sample", system="alanine-dipeptide", method=method) for method in METHODS}


@pytest.mark.parametrize(
    ("edit", "changed"),
    [
        ({"reference": {"length_ps": 350.0}}, {"reference"}),
        ({"shard": {"lags_ps": [50.0]}}, {"shard"}),
        ({"flow": {"hidden": 32}}, {"flow"}),
        ({"distill": {"hidden": 32}}, {"distill"}),
        ({"distill": {"teacher": "gfn1-xtb"}}, {"distill", "mts", "sts"}),
        ({"sample": {"md": {"chains": 8}}}, {"md"}),
        ({"sample": {"tuned_md": {"chains": 8}}}, {"tuned-md"}),
        ({"sample": {"metadynamics": {"walkers": 8}}}, {"metadynamics"}),
        ({"sample": {"tempering": {"ladders": 8}}}, {"tempering"}),
        ({"sample": {"timewarp": {"chains": 8}}}, {"timewarp"}),
        ({"sample": {"seeds": 4}}, set()),
        ({"compare": {"bins": 12}}, {"compare"}),
        ({"dynamics": {"pair_bins": 50}}, {"dynamics"}),
        ({"physics": {"temperature_K": 300.0}}, {"prepare", "reference", "distill", "compare", *METHODS}),
        ({"run": {"seed": 1}}, {*STAGES, *METHODS} - {"prepare", "shard"}),
    ],
)
def test_an_edit_changes_the_keys_of_its_own_jobs_and_the_report(edit, changed):
    before, after = _keys({}), _keys(edit)
    assert {name for name in before if before[name] != after[name]} == changed | {"report"}


def test_lags_train_the_transferable_flow_again_and_nothing_else():
    def keys(**transfer):
        run = runs.Run(config=validate({"transfer": {"train": ["AA"], **transfer}}))
        made = {stage: run.job_key(stage, system="AA", round="0") for stage in ("prepare", "reference", "chains")}
        return {**made, "transfer": run.job_key("transfer", round="0")}

    plain, lags, less = keys(), keys(lags_ps=[10.0]), keys(lags_ps=[10.0], independent_fraction=0.3)
    assert {name for name in plain if plain[name] != lags[name]} == {"transfer"}
    assert {name for name in plain if less[name] != lags[name]} == {"transfer"}


def test_job_keys_hold_the_code_of_their_stage():
    run = runs.Run(config=Config())
    assert run.job_key("shard", system="alanine-dipeptide").endswith("code of shard")
    assert run.job_key("sample", system="alanine-dipeptide", method="mts", seed="0").endswith("code of sample_mts")
    assert run.job_key("summary").endswith("code of compare")


def test_jobs_read_the_frozen_configuration_not_an_edited_one(tmp_path):
    values = {"run": {"folder": str(tmp_path), "name": "r"}, "reference": {"length_ps": 200.0}}
    session = runs.Session(runs.open_run(values, in_job=False), stream=io.StringIO())
    session.start(jobs=1)
    values["reference"]["length_ps"] = 300.0
    job = runs.open_run(values, in_job=True)
    assert job.config.reference.length_ps == 200.0
    assert load_config(tmp_path / "r" / "config.yaml") == job.config
    session.finish()


def test_opening_a_run_writes_nothing(tmp_path):
    runs.Session(runs.open_run({"run": {"folder": str(tmp_path / "results")}}, in_job=False), stream=io.StringIO())
    assert list(tmp_path.iterdir()) == []


def test_a_job_without_the_frozen_configuration_says_so(monkeypatch):
    monkeypatch.delenv(runs.CONFIG_VARIABLE)
    with pytest.raises(LongstrideError, match="export the environment"):
        runs.open_run({}, in_job=True)


def test_a_bad_configuration_is_refused_before_anything_happens():
    with pytest.raises(ConfigError, match=r"unknown configuration key 'flow\.hiden'; did you mean 'flow\.hidden'"):
        runs.open_run({"flow": {"hiden": 3}}, in_job=False)


def test_jobs_find_the_command_of_this_interpreter():
    runs.open_run({}, in_job=False)
    assert os.environ["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


HOLDER = """
import sys, time
from pathlib import Path
from longstride.runs import lock_folder
handle = lock_folder(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


def test_a_second_run_of_a_folder_is_refused_until_the_first_is_gone(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(LongstrideError, match=f"in use by another run .process {holder.pid} on ") as caught:
            runs.lock_folder(tmp_path)
        assert "\n" not in str(caught.value)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    runs.lock_folder(tmp_path).close()  # the system dropped the lock of the killed process


def test_children_of_a_run_do_not_keep_its_lock(tmp_path):
    handle = runs.lock_folder(tmp_path)
    with subprocess.Popen(["sleep", "60"]) as orphan:
        handle.close()
        runs.lock_folder(tmp_path).close()
        orphan.kill()


def test_a_new_run_ends_what_a_killed_one_left_behind_and_nothing_else(tmp_path):
    values = {"run": {"folder": str(tmp_path), "name": "r"}}
    run = runs.open_run(values, in_job=False)
    other = {**os.environ, runs.CONFIG_VARIABLE: str(tmp_path / "other" / "config.yaml")}
    with subprocess.Popen(["sleep", "60"]) as orphan, subprocess.Popen(["sleep", "60"], env=other) as stranger:
        stream = io.StringIO()
        session = runs.Session(run, stream=stream)
        session.start(jobs=1)
        survivors = (psutil.pid_exists(orphan.pid), stranger.poll() is None)
        orphan.kill()
        stranger.kill()
        session.finish()
    assert survivors == (False, True)
    assert "ended 1 processes" in stream.getvalue()


def test_banner_and_closing_line_name_what_runs_and_where_it_goes(tmp_path):
    stream = io.StringIO()
    values = {"run": {"folder": str(tmp_path), "name": "r"}, "sample": {"methods": ["md", "timewarp"], "seeds": 3}}
    session = runs.Session(runs.open_run(values, in_job=False), stream=stream)
    session.start(jobs=7)
    (tmp_path / "r" / "report.html").write_text("x")
    session.finish()
    text = stream.getvalue()
    for part in ("run 'r': 7 jobs", "alanine-dipeptide", "md, timewarp (3 seeds each)", f"{tmp_path}/r/", "report.html"):
        assert part in text
    assert "summary.csv" not in text  # it was not made


def test_banner_says_which_methods_a_box_leaves_out(tmp_path):
    stream = io.StringIO()
    systems = [{"name": "ala", "sequence": "ACE-ALA-NME"}, {"name": "box", "water": 216}]
    session = runs.Session(runs.open_run({"run": {"folder": str(tmp_path)}, "systems": systems}, in_job=False), stream=stream)
    session.start(jobs=1)
    session.finish()
    assert "in a box box: only mts, sts" in stream.getvalue()
    assert "ala: only" not in stream.getvalue()


def test_follower_repeats_progress_thinned_out_and_keeps_errors_for_the_end(tmp_path):
    log = tmp_path / "reference" / "ala.log"
    log.parent.mkdir()
    log.write_text("old line: of an earlier attempt\n")
    stream = io.StringIO()
    follower = runs.LogFollower(tmp_path, stream=stream, every_s=1000)
    log.write_text("")  # a new attempt begins the file again
    follower.poll()
    with log.open("a") as handle:
        handle.write(
            "reference MD:  10% 1/10 ps, 1 ps/s, 9s left\nreference MD:  20% 2/10 ps, 1 ps/s, 8s left\nWarning about x\n"
        )
        handle.write("an unfinished li")
    follower.poll()
    with log.open("a") as handle:
        handle.write("ne\nreference MD:  30% 3/10 ps, 1 ps/s, 7s left\nreference MD: 100% 10/10 ps, 1 ps/s, 0s left\n")
        handle.write("reference: 8 trajectories\nlongstride: error: something; mend it\n")
    follower.stop()
    assert stream.getvalue().splitlines() == [
        "[reference ala] reference MD:  20% 2/10 ps, 1 ps/s, 8s left",
        "[reference ala] reference MD: 100% 10/10 ps, 1 ps/s, 0s left",
        "[reference ala] reference: 8 trajectories",
    ]
    assert follower.errors == ["[reference ala] longstride: error: something; mend it"]
