"""A manifest is a stage's last word: what it made, from what, with which checksums.

It is written after every file it names, so a stage whose manifest exists is complete.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longstride.data.atomic import sha256_of, write_json
from longstride.errors import DataError

MANIFEST = "manifest.json"


def write_manifest(folder: Path, *, kind: str, files: list[str], content: dict[str, Any]) -> Path:
    """Write `folder/manifest.json` naming `files` (relative to folder) with size and SHA-256.

    Args:
        folder: the stage's output folder; the files are already in it.
        kind: what the folder holds, such as "reference" or "samples".
        files: file names the manifest vouches for.
        content: everything else that readers need (JSON values).
    """
    entries = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in files}
    path = folder / MANIFEST
    write_json(path, {"kind": kind, **content, "files": entries})
    return path


def read_manifest(folder: Path, *, kind: str, verify: bool = True) -> dict[str, Any]:
    """Read `folder/manifest.json` and check kind, presence, sizes and, with verify, checksums.

    Raises:
        DataError: no manifest, another kind, or a file that is missing, truncated or altered.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: run the stage that writes {kind} first") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not valid JSON ({error}); delete it and run the stage again") from error
    if manifest.get("kind") != kind:
        raise DataError(f"{path} describes {manifest.get('kind')!r}, expected {kind!r}")
    for name, entry in manifest["files"].items():
        _check_file(folder / name, entry, verify=verify)
    return manifest


def identity(folder: Path) -> dict[str, str]:
    """Return the checksums a folder's manifest records, as the identity of a job's input; {} without a manifest.

    A stage reads its inputs with `read_manifest`, which refuses what is missing or altered; this only tells
    inputs apart.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        return {name: entry["sha256"] for name, entry in json.loads(path.read_text())["files"].items()}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a manifest ({error}); delete it and run the stage again") from error


def _check_file(path: Path, entry: dict[str, Any], *, verify: bool) -> None:
    mend = f"delete {path.parent / MANIFEST} and run the stage that writes it again"
    if not path.is_file():
        raise DataError(f"{path} is missing although its manifest names it; {mend}")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise DataError(f"{path} has {size} bytes, its manifest says {entry['bytes']} (truncated or replaced); {mend}")
    if verify and sha256_of(path) != entry["sha256"]:
        raise DataError(f"{path} does not match the checksum in its manifest (corrupted or edited); {mend}")
