"""State folders: a killed job continues with the same numbers; a foreign or damaged state is never continued."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from longstride.data import checkpoint
from longstride.data.checkpoint import fingerprint, open_state


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "state"


def test_latest_checkpoint_comes_back_with_its_meta(folder):
    with open_state(folder, "k") as state:
        for step in (5, 10, 15):
            state.save(step, {"x": np.array([step])}, {"loss": step / 2})
        found = state.latest()
    assert (found.step, found.arrays["x"][0], found.meta) == (15, 15, {"loss": 7.5})
    assert len(list(folder.glob("checkpoint_*"))) == 2  # the older ones are gone


def test_a_new_folder_has_nothing_to_continue(folder):
    with open_state(folder, "k") as state:
        assert state.latest() is None


@pytest.mark.parametrize("damage", [lambda data: data[:-3], lambda data: data[:10], lambda data: b"", lambda data: b"x" * 99])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(folder, damage, capsys):
    with open_state(folder, "k") as state:
        state.save(1, {"x": np.array([1.0])})
        state.save(2, {"x": np.array([2.0])})
        newest = max(folder.glob("checkpoint_*"))
        newest.write_bytes(damage(newest.read_bytes()))
        assert state.latest().step == 1
    assert "damaged checkpoint" in capsys.readouterr().err


def test_another_fingerprint_starts_afresh(folder, capsys):
    with open_state(folder, "k") as state:
        state.save(1, {"x": np.array([1.0])})
        state.save_block(0, {"y": np.array([1.0])})
        (folder / "extra").mkdir()
        (folder / "extra" / "file").write_text("x")
    with open_state(folder, "other") as state:
        assert state.latest() is None
        assert {path.name for path in folder.iterdir()} == {"lock", "fingerprint.json"}
    assert "starting afresh" in capsys.readouterr().err


def test_a_damaged_fingerprint_starts_afresh(folder):
    with open_state(folder, "k") as state:
        state.save(1, {"x": np.array([1.0])})
    (folder / "fingerprint.json").write_text('{"finger')
    with open_state(folder, "k") as state:
        assert state.latest() is None


def test_fingerprints_depend_on_every_part_and_not_on_key_order():
    base = fingerprint({"a": 1, "b": 2}, "code")
    assert base == fingerprint({"b": 2, "a": 1}, "code")
    assert len({base, fingerprint({"a": 1, "b": 3}, "code"), fingerprint({"a": 1, "b": 2}, "other"), fingerprint("code")}) == 4


def test_cleared_state_has_nothing_to_continue(folder):
    with open_state(folder, "k") as state:
        state.save(1, {"x": np.array([1.0])})
        state.save_block(0, {"y": np.array([1.0])})
        state.clear()
        assert state.latest() is None
    with open_state(folder, "k") as state:
        assert state.latest() is None


def _hold(folder, ready, seconds):
    with open_state(folder, "k") as state:
        ready.set()
        time.sleep(seconds)
        state.save(7, {"x": np.array([7.0])})


def test_a_second_process_waits_for_the_first(folder):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(folder, ready, 0.5))
    holder.start()
    assert ready.wait(10)
    with open_state(folder, "k") as state:
        assert state.latest().step == 7  # written by the first just before it let go
    holder.join()


def _walk(folder, out, fatal):
    """A toy job, a random walk in blocks, that kills itself right after its `fatal`-th write (0: never).

    The generator's state is in the checkpoint; a block is written before the checkpoint that counts it.
    """
    saves = itertools.count(1)
    write = checkpoint.write_arrays

    def counted(*arguments):
        write(*arguments)
        if next(saves) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.write_arrays = counted  # in the forked child only
    with open_state(folder, "k") as state:
        generator = np.random.default_rng(3)
        done, x = 0, 0.0
        if found := state.latest():
            generator.bit_generator.state = found.meta["generator"]
            done, x = found.step, float(found.arrays["x"][0])
        for block in range(done, 6):
            path = x + np.cumsum(generator.normal(size=5))
            x = float(path[-1])
            state.save_block(block, {"path": path})
            state.save(block + 1, {"x": np.array([x])}, {"generator": generator.bit_generator.state})
        np.save(out, np.concatenate([state.read_block(index)["path"] for index in range(6)]))


def _exit_code(*arguments) -> int:
    child = multiprocessing.get_context("fork").Process(target=_walk, args=arguments)
    child.start()
    child.join()
    return child.exitcode


@pytest.mark.parametrize("fatal", [1, 2, 3, 4, 9])
def test_a_job_killed_after_a_block_or_a_checkpoint_ends_with_the_same_numbers(tmp_path, fatal):
    assert _exit_code(tmp_path / "whole", tmp_path / "whole.npy", 0) == 0
    for _ in range(3):  # killed again and again; only with fatal = 1 it never gets beyond its first block
        if (status := _exit_code(tmp_path / "state", tmp_path / "killed.npy", fatal)) == 0:
            break
        assert status == -signal.SIGKILL
        assert not (tmp_path / "killed.npy").exists()
    assert _exit_code(tmp_path / "state", tmp_path / "killed.npy", 0) == 0
    assert np.array_equal(np.load(tmp_path / "killed.npy"), np.load(tmp_path / "whole.npy"))
