"""Files that are either complete or absent: write beside, flush to disk, rename."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longstride.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy as np

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is fsynced and renamed over `path`.

    On any failure the temporary file is removed and `path` is untouched. The suffix is kept, so writers that
    choose a format by suffix work.

    Raises:
        DataError: the disk is full or the quota is used up.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if _is_full(error):
            message = f"no space left for {path}: free some disk space and run the same command again; finished work is kept"
            raise DataError(message) from error
        raise


def _is_full(error: BaseException) -> bool:
    # safetensors and HDF5 wrap the system's error and keep only its text
    code = getattr(error, "errno", None)
    return code in _FULL or "No space left" in str(error) or "os error 28" in str(error)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401 - anything JSON can hold
    """Write JSON atomically, keys in the order given, NaN refused."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write named numpy arrays atomically as safetensors (no pickle, memory-mappable)."""
    import numpy as np
    from safetensors.numpy import save_file

    contiguous = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
    with atomic_path(path) as temporary:
        save_file(contiguous, temporary, metadata=dict(metadata or {}))


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read a safetensors file as numpy arrays and its metadata.

    Raises:
        DataError: the file is missing, truncated or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as handle:
            metadata = handle.metadata() or {}
            return {key: handle.get_tensor(key) for key in handle.keys()}, metadata
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}; delete it and run the stage that writes it again") from error


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
