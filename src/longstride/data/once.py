"""Finished jobs stay finished: the record that lets a repeated command see that its work is done.

A workflow engine that was killed forgets which of its jobs ended well and deletes their declared output, the
manifest, before it starts them again; a job whose engine was killed may also end on its own meanwhile. The record
lies beside the job's state folder, where no engine looks.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import sys
from typing import TYPE_CHECKING, Any

from longstride.data.atomic import sha256_of, write_json
from longstride.data.manifest import MANIFEST

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def run_once(make: Callable[[], None], *, out: Path, state: Path, key: str) -> bool:
    """Run `make`, which writes `out/manifest.json` last, unless the same work is already complete.

    Work is the same if `key` is; it is complete if a record with that key names files that are still in `out` with
    the sizes and checksums of then. In that case only the manifest is put back. Two processes with the same `state`
    run one after the other, so the second finds the first one's result.

    Args:
        make: does the work.
        out: the output folder.
        state: the job's state folder; the record and its lock are put beside it.
        key: `fingerprint(...)` of configuration, inputs and code.

    Returns:
        Whether `make` ran.
    """
    record = state.with_name(f"{state.name}.finished.json")
    state.parent.mkdir(parents=True, exist_ok=True)
    with state.with_name(f"{state.name}.lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process makes {out}; waiting for it to end", file=sys.stderr, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        manifest = _recorded(record, key)
        if manifest is not None and _files_are_there(out, manifest):
            write_json(out / MANIFEST, manifest)
            print(f"already complete: {out}")
            return False
        record.unlink(missing_ok=True)
        make()
        write_json(record, {"key": key, "manifest": json.loads((out / MANIFEST).read_text())})
    return True


def _recorded(record: Path, key: str) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(record.read_text())
        return stored["manifest"] if stored["key"] == key else None
    return None


def _files_are_there(out: Path, manifest: dict[str, Any]) -> bool:
    for name, entry in manifest["files"].items():
        path = out / name
        if not path.is_file() or path.stat().st_size != entry["bytes"] or sha256_of(path) != entry["sha256"]:
            return False
    return True
