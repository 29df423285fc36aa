"""Files are complete or absent: after an error, a kill, a full disk; damage is refused on reading."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from longstride.data import atomic
from longstride.data.atomic import atomic_path, read_arrays, sha256_of, write_arrays, write_json, write_text
from longstride.errors import DataError

ARRAYS = {"x": np.arange(12, dtype=np.float32).reshape(3, 4), "n": np.array([1, 2, 3], dtype=np.int64)}


def test_arrays_come_back_unchanged_with_metadata(tmp_path):
    write_arrays(tmp_path / "a" / "b.safetensors", ARRAYS, {"note": "µ"})
    arrays, metadata = read_arrays(tmp_path / "a" / "b.safetensors")
    assert metadata == {"note": "µ"}
    for key, value in ARRAYS.items():
        assert arrays[key].dtype == value.dtype
        assert np.array_equal(arrays[key], value)


def test_views_and_transposes_are_stored_as_they_look(tmp_path):
    value = np.arange(24, dtype=np.float64).reshape(4, 6)
    write_arrays(tmp_path / "a.safetensors", {"t": value.T, "v": value[::2, 1::2]})
    arrays, _ = read_arrays(tmp_path / "a.safetensors")
    assert np.array_equal(arrays["t"], value.T)
    assert np.array_equal(arrays["v"], value[::2, 1::2])


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_temporary_file_keeps_the_suffix(tmp_path):
    with atomic_path(tmp_path / "a.npz") as temporary:
        assert temporary.suffix == ".npz"
        assert temporary.parent == tmp_path
        temporary.write_text("x")


def test_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from longstride.data.atomic import atomic_path
with atomic_path(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    done = subprocess.run([sys.executable, "-c", KILLED, path], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    write_text(path, "new")  # the leftover is in nobody's way
    assert path.read_text() == "new"


@pytest.mark.parametrize(
    "write", [lambda path: write_text(path, "x" * 4_000_000), lambda path: write_arrays(path, {"x": np.zeros(10**6)})]
)
def test_a_full_disk_is_one_clear_line_and_leaves_nothing(small_disk, write):
    with pytest.raises(DataError, match=r"no space left for .*free some disk space") as caught:
        write(small_disk / "big.safetensors")
    assert "\n" not in str(caught.value)
    assert list(small_disk.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=False, stderr=subprocess.DEVNULL
        ).returncode
    ):
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_when_the_data_are_flushed_is_noticed(tmp_path, monkeypatch, code):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def full(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(DataError, match="no space left for"):
        write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_other_errors_of_the_system_are_not_called_a_full_disk(tmp_path, monkeypatch):
    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(atomic.os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        write_text(tmp_path / "a.txt", "new")


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_truncated_arrays_are_refused(tmp_path, keep):
    path = tmp_path / "a.safetensors"
    write_arrays(path, ARRAYS)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"cannot read .*a\.safetensors"):
        read_arrays(path)


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(DataError):
        read_arrays(tmp_path / "absent.safetensors")
    (tmp_path / "text.safetensors").write_text("this is not a tensor file, but it is long enough to look at")
    with pytest.raises(DataError):
        read_arrays(tmp_path / "text.safetensors")


def test_checksum_is_sha256_of_the_content(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
