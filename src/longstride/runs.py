"""One workflow run around its jobs: the frozen configuration, the lock on the run folder, what the user sees.

The Snakefile parses in about a second because nothing here imports the science.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longstride import __version__
from longstride.config import Config, dump_config, load_config, stage_view, validate
from longstride.data.atomic import write_text
from longstride.data.checkpoint import fingerprint
from longstride.errors import LongstrideError
from longstride.fingerprints import code_version
from longstride.progress import format_duration

if TYPE_CHECKING:
    from typing import TextIO

CONFIG_VARIABLE = "LONGSTRIDE_CONFIG"

# the module of longstride.stages that does the work, where it is not named like the stage
MODULES = {
    "md": "sample_md",
    "tuned-md": "sample_tuned_md",
    "metadynamics": "sample_metadynamics",
    "tempering": "sample_tempering",
    "timewarp": "sample_flow",
    "explore": "sample_flow",
    "mts": "sample_mts",
    "sts": "sample_mts",
    "summary": "compare",
    "transfer": "train_transfer",
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A resolved configuration and the folder its results go to."""

    config: Config

    @property
    def folder(self) -> Path:
        """Where everything of this run lives."""
        return self.config.run_folder

    @property
    def frozen(self) -> Path:
        """The configuration that every job of this run reads."""
        return self.folder / "config.yaml"

    @property
    def compared(self) -> list[str]:
        """Systems that stage `compare` takes: lone molecules, since it works on torsions and the AMBER-type reference."""
        return [system.name for system in self.config.systems if not system.periodic]

    @property
    def paired(self) -> list[str]:
        """Systems that stage `dynamics` takes: those sampled by both mts and sts."""
        systems = [system.name for system in self.config.systems] if self.config.dynamics.enabled else []
        return [name for name in systems if {"mts", "sts"} <= set(self.config.methods_of(name))]

    @property
    def samples_aside(self) -> list[str]:
        """Manifests of samples that no comparison takes, so that a run makes them all the same."""
        compared, paired = set(self.compared), set(self.paired)
        return [
            str(self.folder / "sample" / system.name / method / f"seed{seed}" / "manifest.json")
            for system in self.config.systems
            if system.name not in compared | paired
            for method in self.config.methods_of(system.name)
            for seed in range(self.config.sample.seeds)
        ]

    def state(self, *parts: str) -> str:
        """Return the state folder of a job: beside the outputs, never one of them (workflow engines delete those)."""
        return str(self.folder.joinpath(".state", *parts))

    def job_key(self, stage: str, *, system: str | None = None, method: str | None = None, **_: str) -> str:
        """Return what a job depends on besides its input files: its part of the configuration and its code.

        The workflow re-runs a job when this text changes.
        """
        view = stage_view(self.config, stage, system=system, method=method)
        return f"config {fingerprint(view)}, code {code_version(MODULES.get(method or stage, stage))}"


def open_run(values: dict[str, Any], *, in_job: bool) -> Run:
    """Return the run of a configuration, in the main process or in one of its jobs.

    The main process validates `values` and tells its jobs, through the environment, where it will freeze them. A
    job that parses the workflow again (on a cluster) ignores `values`, which may have been edited since, and reads
    the frozen file.

    Raises:
        ConfigError: the configuration is invalid.
        LongstrideError: a job does not know the frozen configuration.
    """
    if in_job:
        frozen = os.environ.get(CONFIG_VARIABLE)
        if frozen is None:
            raise LongstrideError(f"{CONFIG_VARIABLE} did not reach this job: let the scheduler export the environment")
        return Run(config=load_config(frozen))
    run = Run(config=validate(values))
    if {"mts", "sts"}.intersection(run.config.sample.methods):
        stage_view(run.config, "distill")  # a missing weight file is an error before the first job
    os.environ[CONFIG_VARIABLE] = str(run.frozen.resolve())
    # jobs must find the `longstride` of this interpreter, also when its environment is not activated
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return run


class Session:
    """The time between start and end of one workflow run: holds the lock, freezes, reports.

    Args:
        run: what runs.
        stream: where to write; standard error by default.
    """

    def __init__(self, run: Run, *, stream: TextIO | None = None) -> None:
        self._run = run
        self._stream = stream or sys.stderr
        self._begin = time.monotonic()
        self._lock: TextIO | None = None
        self._follower = LogFollower(run.folder / "logs", stream=self._stream)

    def start(self, jobs: int) -> None:
        """Take the run folder, freeze the configuration, say what will run.

        Raises:
            LongstrideError: another run holds the folder.
        """
        self._run.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self._run.folder)
        if ended := end_orphans(self._run.frozen):
            self._say(f"ended {ended} processes that a killed run of {self._run.folder} had left behind")
        write_text(self._run.frozen, dump_config(self._run.config))
        config = self._run.config
        repeats = f"{config.sample.seeds} seed{'s' if config.sample.seeds > 1 else ''} each"
        self._say(
            f"Longstride {__version__}, run '{config.run.name}': {jobs} jobs",
            f"  systems  {', '.join(system.name for system in config.systems)}",
            f"  methods  {', '.join(config.sample.methods)} ({repeats})",
            *[
                f"  in a box {system.name}: only {', '.join(config.methods_of(system.name))}"
                for system in config.systems
                if config.methods_of(system.name) != config.sample.methods
            ],
            f"  results  {self._run.folder}/  (config.yaml: the frozen configuration, logs/: one file per job)",
        )
        self._follower.start()

    def finish(self) -> None:
        """Say where the results are."""
        self._follower.stop()
        made = [path for name in ("report.html", "summary.csv") if (path := self._run.folder / name).is_file()]
        took = format_duration(time.monotonic() - self._begin)
        self._say(f"Done in {took}: {', '.join(str(path) for path in made) or f'{self._run.folder}/'}")

    def fail(self) -> None:
        """Say how to go on."""
        self._follower.stop()
        self._say(
            *self._follower.errors,
            f"Failed; details are above and in {self._run.folder}/logs/. Finished work is kept:"
            " the same command continues from there.",
        )

    def _say(self, *lines: str) -> None:
        self._stream.write("\n".join(lines) + "\n")
        self._stream.flush()


def lock_folder(folder: Path) -> TextIO:
    """Lock `folder` for this process and return the open lock file; the system drops the lock when the process ends.

    Raises:
        LongstrideError: another process holds the lock, or the file system cannot lock.
    """
    path = folder / ".lock"
    handle = path.open("a+")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        holder = handle.read().strip() or "unknown process"
        handle.close()
        raise LongstrideError(f"{folder} is in use by another run ({holder}); wait for it or stop it first") from None
    except OSError as error:
        handle.close()
        raise LongstrideError(
            f"cannot lock {path} ({error.strerror}): set run.folder to a file system with locks, or mount this one with them"
        ) from error
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    handle.flush()
    return handle


def end_orphans(frozen: Path) -> int:
    """End this user's processes on this host that belong to the run of that frozen configuration; return how many.

    Call with the run's lock held: then no other workflow is active there, and they are jobs, or workers of jobs, whose
    parent was killed. Their state folders are safe at any moment, and the new jobs would wait for them or share the
    cores with them. Jobs of a cluster run elsewhere and are not touched.
    """
    import psutil

    me = psutil.Process()
    family = {me.pid, *(parent.pid for parent in me.parents())}
    orphans = []
    for process in psutil.process_iter():
        try:
            if process.pid not in family and process.environ().get(CONFIG_VARIABLE) == str(frozen.resolve()):
                orphans.append(process)
                process.terminate()
        except psutil.Error:
            continue  # another user's, or gone
    _, stubborn = psutil.wait_procs(orphans, timeout=3)
    for process in stubborn:
        with contextlib.suppress(psutil.Error):
            process.kill()
    return len(orphans)


class LogFollower(threading.Thread):
    """Repeat what running jobs say in their log files: progress lines, thinned out, and one-line remarks.

    Works alike for local jobs and for jobs on other nodes, and leaves the jobs' own output alone.

    Args:
        folder: where the log files are; new ones are found as they appear.
        every_s: shortest time between two progress lines of one job.
        poll_s: time between two looks.
        stream: where to write.

    Attributes:
        errors: the error lines of jobs that ended so, each with the name of its job.
    """

    PROGRESS = re.compile(r"^[\w][^:]*: +\d+% ")
    ERROR = re.compile(r"^longstride: error: ")
    REMARK = re.compile(r"^[a-z][\w ,/-]*: ")

    def __init__(self, folder: Path, *, stream: TextIO, every_s: float = 10.0, poll_s: float = 1.0) -> None:
        super().__init__(daemon=True)
        self._folder, self._stream = folder, stream
        self._every_s, self._poll_s = every_s, poll_s
        self._offsets = {path: path.stat().st_size for path in folder.rglob("*.log")}
        self._shown: dict[Path, float] = {}
        self.errors: list[str] = []
        self._ended = threading.Event()

    def run(self) -> None:
        """Follow until stopped (the thread's main function)."""
        while not self._ended.wait(self._poll_s):
            self.poll()

    def stop(self) -> None:
        """Show what is left and end the thread."""
        self._ended.set()
        if self.is_alive():
            self.join()
        self.poll()

    def poll(self) -> None:
        """Look once at every log file."""
        for path in sorted(self._folder.rglob("*.log")):
            try:
                lines = self._new_lines(path)
            except OSError:
                continue  # removed or replaced between listing and reading; the next look sees the new one
            self._show(path, lines)

    def _new_lines(self, path: Path) -> list[str]:
        start = self._offsets.get(path, 0)
        size = path.stat().st_size
        if size < start:  # a new attempt began the file again
            start = 0
        with path.open("rb") as handle:
            handle.seek(start)
            text = handle.read()
        end = text.rfind(b"\n") + 1
        self._offsets[path] = start + end
        return text[:end].decode(errors="replace").splitlines()

    def _show(self, path: Path, lines: list[str]) -> None:
        progress = [index for index, line in enumerate(lines) if self.PROGRESS.match(line)]
        now = time.monotonic()
        job = f"[{' '.join(path.relative_to(self._folder).with_suffix('').parts)}]"
        for index, line in enumerate(lines):
            if self.ERROR.match(line):  # repeated at the end, below everything else
                self.errors.append(f"{job} {line}")
                continue
            if index in progress:
                due = now - self._shown.get(path, -self._every_s) >= self._every_s
                if index != progress[-1] or not (due or ": 100% " in line):
                    continue
                self._shown[path] = now
            elif not self.REMARK.match(line):
                continue
            self._stream.write(f"{job} {line}\n")
        self._stream.flush()
