"""Manifests vouch for files: anything missing, truncated, altered or of another kind is refused in one line."""

from __future__ import annotations

import pytest

from longstride.data.manifest import MANIFEST, read_manifest, write_manifest
from longstride.errors import DataError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(range(200)))
    (tmp_path / "b.txt").write_text("text")
    write_manifest(tmp_path, kind="toy", files=["a.bin", "b.txt"], content={"system": "s", "value": 1.5})
    return tmp_path


def test_content_comes_back(folder):
    manifest = read_manifest(folder, kind="toy")
    assert (manifest["system"], manifest["value"], set(manifest["files"])) == ("s", 1.5, {"a.bin", "b.txt"})


def _truncate(folder):
    (folder / "a.bin").write_bytes(bytes(range(100)))


def _flip_one_bit(folder):
    data = bytearray((folder / "a.bin").read_bytes())
    data[57] ^= 1
    (folder / "a.bin").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, r"a\.bin has 100 bytes, its manifest says 200"),
        (_flip_one_bit, r"a\.bin does not match the checksum"),
        (lambda folder: (folder / "b.txt").unlink(), r"b\.txt is missing although its manifest names it"),
        (lambda folder: (folder / "a.bin").write_bytes(b""), r"a\.bin has 0 bytes"),
        (lambda folder: (folder / MANIFEST).unlink(), "run the stage that writes toy first"),
        (lambda folder: (folder / MANIFEST).write_text('{"kind": "to'), "is not valid JSON"),
    ],
)
def test_damage_is_refused_in_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(DataError, match=message) as caught:
        read_manifest(folder, kind="toy")
    assert "\n" not in str(caught.value)


def test_another_kind_is_refused(folder):
    with pytest.raises(DataError, match="describes 'toy', expected 'samples'"):
        read_manifest(folder, kind="samples")


def test_sizes_are_checked_even_without_checksums(folder):
    _flip_one_bit(folder)
    assert read_manifest(folder, kind="toy", verify=False)
    _truncate(folder)
    with pytest.raises(DataError, match="has 100 bytes"):
        read_manifest(folder, kind="toy", verify=False)


def test_a_manifest_cannot_name_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_manifest(tmp_path, kind="toy", files=["absent"], content={})
    assert not (tmp_path / MANIFEST).exists()
