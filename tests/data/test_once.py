"""Finished work is recognised, whatever happened to its manifest; changed or damaged work is done again."""

from __future__ import annotations

import multiprocessing
import time

import pytest

from longstride.data.manifest import read_manifest, write_manifest
from longstride.data.once import run_once


class Job:
    """Counts its runs in a file and writes one output."""

    def __init__(self, folder, *, takes_s: float = 0.0) -> None:
        self.out, self.state = folder / "out", folder / ".state" / "job"
        self.takes_s = takes_s
        self.count = folder / "count"

    def make(self) -> None:
        with self.count.open("a") as handle:
            handle.write("x")
        time.sleep(self.takes_s)
        self.out.mkdir(exist_ok=True)
        (self.out / "data").write_text("result")
        write_manifest(self.out, kind="toy", files=["data"], content={})

    def run(self, key: str = "k") -> bool:
        return run_once(self.make, out=self.out, state=self.state, key=key)

    @property
    def runs(self) -> int:
        return len(self.count.read_text())


@pytest.fixture
def job(tmp_path):
    finished = Job(tmp_path)
    assert finished.run()
    return finished


def test_finished_work_is_not_repeated_and_its_manifest_comes_back(job):
    before = (job.out / "manifest.json").read_text()
    (job.out / "manifest.json").unlink()  # what a workflow engine does before it starts a job again
    assert not job.run()
    assert job.runs == 1
    assert (job.out / "manifest.json").read_text() == before
    assert read_manifest(job.out, kind="toy")


@pytest.mark.parametrize(
    "damage", [lambda path: path.unlink(), lambda path: path.write_text("resulT"), lambda path: path.write_text("r")]
)
def test_damaged_work_is_repeated(job, damage):
    damage(job.out / "data")
    assert job.run()
    assert (job.out / "data").read_text() == "result"


def test_another_key_is_other_work(job):
    assert job.run("other")
    assert not job.run("other")
    assert job.run("k")  # its files were replaced


def test_work_that_failed_is_not_recorded(job):
    def fail() -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        run_once(fail, out=job.out, state=job.state, key="new")
    assert job.run("new")


def test_a_damaged_record_means_working_again(job):
    job.state.with_name("job.finished.json").write_text("{")
    assert job.run()


def test_two_processes_do_the_work_once(tmp_path):
    job = Job(tmp_path, takes_s=0.5)
    workers = [multiprocessing.get_context("fork").Process(target=job.run) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert job.runs == 1
