"""State folders: where a long job keeps what it needs to continue after being killed.

A state folder is never a workflow output (workflow engines delete outputs before a retry). It is bound to a
fingerprint of configuration, inputs and code; another fingerprint starts afresh instead of continuing a
stale state. Only one process uses a folder at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longstride.data.atomic import read_arrays, write_arrays, write_json
from longstride.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy as np


def fingerprint(*parts: Any) -> str:  # noqa: ANN401 - anything JSON can hold
    """Return a short hash of JSON-able values: configuration, input checksums, code version."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One saved state: step counter, arrays, and JSON metadata."""

    step: int
    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]


class StateFolder:
    """Checkpoints and finished blocks of one long job. Use through `open_state`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, step: int, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any] | None = None) -> None:
        """Save a checkpoint atomically and keep the two newest."""
        target = self.path / f"checkpoint_{step:012d}.safetensors"
        write_arrays(target, arrays, {"meta": json.dumps(dict(meta or {}))})
        for old in sorted(self.path.glob("checkpoint_*.safetensors"))[:-2]:
            old.unlink(missing_ok=True)

    def latest(self) -> Checkpoint | None:
        """Return the newest readable checkpoint, or None. A damaged one falls back to the one before."""
        for path in sorted(self.path.glob("checkpoint_*.safetensors"), reverse=True):
            try:
                arrays, metadata = read_arrays(path)
            except DataError as error:
                print(f"skipping a damaged checkpoint: {error}", file=sys.stderr)
                continue
            return Checkpoint(step=int(path.stem.split("_")[1]), arrays=arrays, meta=json.loads(metadata.get("meta", "{}")))
        return None

    def save_block(self, index: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Save block `index` of the results (before the checkpoint that counts it)."""
        write_arrays(self.path / f"block_{index:08d}.safetensors", arrays)

    def read_block(self, index: int) -> dict[str, np.ndarray]:
        """Read block `index` back."""
        return read_arrays(self.path / f"block_{index:08d}.safetensors")[0]

    def clear(self) -> None:
        """Remove everything but the lock, once the job's outputs are complete."""
        _empty(self.path)


@contextlib.contextmanager
def open_state(path: Path, key: str) -> Iterator[StateFolder]:
    """Open a state folder under an exclusive lock; wait if another process holds it.

    Args:
        path: the folder; made if absent.
        key: `fingerprint(...)` of configuration, inputs and code. A folder with another key is emptied first.
    """
    path.mkdir(parents=True, exist_ok=True)
    with (path / "lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f"another process works in {path}; waiting for it to end", file=sys.stderr, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        _match_key(path, key)
        yield StateFolder(path)


def _match_key(path: Path, key: str) -> None:
    key_file = path / "fingerprint.json"
    stored = None
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        stored = json.loads(key_file.read_text())["fingerprint"]
    if stored == key:
        return
    if stored is not None:
        print(f"{path}: configuration, inputs or code changed since the last attempt; starting afresh", file=sys.stderr)
    _empty(path)
    write_json(key_file, {"fingerprint": key})


def _empty(path: Path) -> None:
    for item in path.iterdir():
        if item.name == "lock":
            continue
        if item.is_dir():
            shutil.rmtree(item)
        else:
            item.unlink()
