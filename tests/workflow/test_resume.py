"""Kill -9 at many moments of the smoke run: the same command continues, repeats nothing finished, same numbers."""

from __future__ import annotations

import base64
import csv
import os
import signal
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
# which log must begin, how long after that the kill comes, and what is killed
MOMENTS = [
    ("prepare/alanine-dipeptide", 0.3, "job"),
    ("reference/alanine-dipeptide", 4.0, "job"),
    ("reference/alanine-dipeptide", 3.0, "snakemake"),
    ("shards/alanine-dipeptide", 0.2, "everything"),
    ("flow/alanine-dipeptide", 6.0, "job"),
    ("flow/alanine-dipeptide", 6.0, "everything"),
    ("distill/alanine-dipeptide", 4.0, "snakemake"),
    ("sample/alanine-dipeptide/md/seed0", 2.5, "job"),
    ("sample/alanine-dipeptide/timewarp/seed0", 5.0, "everything"),
    ("sample/alanine-dipeptide/timewarp/seed0", 8.0, "snakemake"),
    ("sample/alanine-dipeptide/mts/seed0", 3.0, "job"),
    ("compare/alanine-dipeptide", 2.0, "snakemake"),
    ("report", 0.5, "everything"),
]


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
        output = path.parent if "compare" in path.parts else path
        if str(output.relative_to(folder)) not in incomplete:
            status = path.stat()
            found[path] = (status.st_ino, status.st_mtime_ns)
    return found


def _kill(snakemake: subprocess.Popen[str], what: str) -> None:
    children = psutil.Process(snakemake.pid).children(recursive=True)
    jobs = [child for child in children if any(Path(part).name == "longstride" for part in child.cmdline()[:3])]
    victims = {"job": jobs[:1], "snakemake": [], "everything": children}[what]
    if what != "job":
        snakemake.send_signal(signal.SIGKILL)
    for victim in victims:
        victim.kill()
    snakemake.wait(timeout=300)


def _kill_at(folder: Path, log: str, after_s: float, what: str) -> None:
    """Start the run and kill it `after_s` seconds after the job of that log began."""
    path = folder / RUN / "logs" / f"{log}.log"
    begin = time.time()
    snakemake = _start(folder)
    while not (path.exists() and path.stat().st_mtime > begin):
        if snakemake.poll() is not None:
            pytest.fail(f"the run ended before {log} began:\n{(folder / 'output.txt').read_text()[-4000:]}")
        time.sleep(0.05)
    time.sleep(after_s)
    _kill(snakemake, what)


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
    for log, after_s, what in MOMENTS:
        before = _finished(tmp_path) if (tmp_path / RUN).is_dir() else {}
        _kill_at(tmp_path, log, after_s, what)
        after = _finished(tmp_path)
        repeated = [str(path) for path, status in before.items() if after.get(path) != status]
        assert not repeated, f"finished jobs ran again before {log} was killed"
    _finish(tmp_path)
    assert _numbers(tmp_path) == _numbers(uninterrupted)
    leftovers = [path for path in (tmp_path / RUN).rglob("*.tmp*") if ".state" not in path.parts]
    assert not leftovers
