"""Kill -9 at many moments of the smoke run: the same command continues, repeats nothing finished, same numbers."""

from __future__ import annotations

import base64
import contextlib
import csv
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
RUN = Path("results", "smoke")
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith(("LONGSTRIDE", "SNAKEMAKE"))}
# every job is killed this often, this long after it began; what is killed goes round the list
DELAYS_S = (0.3, 5.0)
VICTIMS = ("job", "snakemake", "everything", "snakemake", "job")


def _start(folder: Path) -> subprocess.Popen[str]:
    flags = ["-s", str(ROOT / "Snakefile"), "--configfile", str(ROOT / "workflow" / "configs" / "smoke.yaml")]
    flags += ["--workflow-profile", str(ROOT / "workflow" / "profiles" / "local"), "--cores", "2"]
    with (folder / "output.txt").open("a") as output:
        command = [sys.executable, "-m", "snakemake", *flags]
        return subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=output, stderr=output, text=True)


def _finish(folder: Path) -> None:
    assert _start(folder).wait(timeout=1500) == 0, (folder / "output.txt").read_text()[-4000:]


def _numbers(folder: Path) -> list[dict[str, str]]:
    """Return summary.csv without the columns that depend on the speed of the machine (their names end in _s)."""
    with (folder / RUN / "summary.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    return [{key: value for key, value in row.items() if not key.endswith("_s")} for row in rows]


def _finished(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return inode and change time of the output of every job that Snakemake saw end well."""
    marks = folder / ".snakemake" / "incomplete"
    incomplete = (
        {base64.b64decode(mark.name).decode() for mark in marks.rglob("*") if mark.is_file()} if marks.is_dir() else set()
    )
    found = {}
    for path in (folder / RUN).rglob("manifest.json"):
        output = path.parent if {"compare", "dynamics"} & set(path.parts) else path
        if str(output.relative_to(folder)) not in incomplete:
            status = path.stat()
            found[path] = (status.st_ino, status.st_mtime_ns)
    return found


def _jobs(snakemake: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in snakemake.children():
        with contextlib.suppress(psutil.Error):
            if any(Path(part).name == "longstride" for part in child.cmdline()[:3]):
                found.append(child)
    return found


def _kill(snakemake: subprocess.Popen[str], what: str) -> None:
    """Kill -9 one job (its workers stay), Snakemake alone (its jobs stay), or all of them."""
    process = psutil.Process(snakemake.pid)
    if what == "job":
        while not (jobs := _jobs(process)) and snakemake.poll() is None:
            time.sleep(0.02)
        victims = jobs[:1]
    else:
        children = process.children(recursive=True) if what == "everything" else []
        victims = [process, *children]
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    snakemake.wait(timeout=300)


def _kill_at_a_new_job(folder: Path, kills: dict[str, int], what: str) -> bool:
    """Start the run, wait for a job that was not killed often enough, kill; return False if the run ended instead."""
    logs = folder / RUN / "logs"
    begin = time.time()
    snakemake = _start(folder)
    while snakemake.poll() is None:
        for log in sorted(logs.rglob("*.log")):
            name = str(log.relative_to(logs))
            if log.stat().st_mtime > begin and kills.get(name, 0) < len(DELAYS_S):
                time.sleep(DELAYS_S[kills.get(name, 0)])
                kills[name] = kills.get(name, 0) + 1
                if snakemake.poll() is None:
                    _kill(snakemake, what)
                return True
        time.sleep(0.05)
    assert snakemake.returncode == 0, (folder / "output.txt").read_text()[-4000:]
    return False


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """The folder of a smoke run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    _finish(folder)
    return folder


def test_the_smoke_run_makes_a_report_and_a_summary_of_every_method(uninterrupted):
    assert (uninterrupted / RUN / "report.html").stat().st_size > 10_000
    rows = _numbers(uninterrupted)
    assert {"md", "timewarp", "explore", "mts", "sts"} <= {row["method"] for row in rows}
    text = (uninterrupted / "output.txt").read_text()
    assert "Done in " in text
    assert "Traceback" not in text


def test_the_same_seed_gives_the_same_numbers(uninterrupted, tmp_path):
    _finish(tmp_path)
    assert _numbers(tmp_path) == _numbers(uninterrupted)


def test_a_run_killed_at_many_moments_ends_with_the_same_numbers(uninterrupted, tmp_path):
    kills: dict[str, int] = {}
    before: dict[Path, tuple[int, int]] = {}
    victims = itertools.cycle(VICTIMS)
    going = True
    while going:
        going = _kill_at_a_new_job(tmp_path, kills, next(victims))
        after = _finished(tmp_path)
        repeated = [str(path) for path, status in before.items() if after.get(path) != status]
        assert not repeated, f"finished jobs ran again; killed so far: {kills}"
        before = after
    assert len(kills) >= 6, kills  # jobs that ended while another one was being watched are not in it
    assert sum(kills.values()) >= 10, kills
    assert _numbers(tmp_path) == _numbers(uninterrupted)
    leftovers = [path for path in (tmp_path / RUN).rglob("*.tmp*") if ".state" not in path.parts]
    assert not leftovers
