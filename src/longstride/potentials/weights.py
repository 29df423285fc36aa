"""Weight files of neural-network teachers: found or refused with one line, and told apart by their content."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from longstride.errors import DataError
from longstride.fingerprints import files_digest

if TYPE_CHECKING:
    from collections.abc import Sequence

DIGEST_DIGITS = 8
FETCH = "fetch the file and name its path in distill.teacher_weights"


def weight_files(
    weights: Sequence[Path | str], *, kind: str, suffixes: tuple[str, ...], fetch: str = FETCH
) -> tuple[Path, ...]:
    """Return the paths, each an existing file with one of the suffixes.

    Args:
        weights: paths, relative ones from the working folder.
        kind: the teacher, for the messages.
        suffixes: what its files may end in; pickled formats must not be among them.
        fetch: what to fetch and where to put it, for the messages.

    Raises:
        DataError: no path is given, a file is missing or empty, or of another kind.
    """
    if not weights:
        raise DataError(f"teacher {kind} needs weight files ({', '.join(suffixes)}); {fetch}")
    found = tuple(Path(item).expanduser() for item in weights)
    for path in found:
        if path.suffix not in suffixes:
            raise DataError(
                f"{path} is not a file that teacher {kind} loads ({', '.join(suffixes)}); pickled files are refused, because"
                " loading one runs whatever code it holds"
            )
        if not path.is_file():
            raise DataError(f"no weight file {path} for teacher {kind}; {fetch}")
        if path.stat().st_size == 0:
            raise DataError(f"the weight file {path} is empty; {fetch}")
    return found


def weights_digest(weights: Sequence[Path | str]) -> str:
    """Return the first 8 hexadecimal digits of a SHA-256 over the contents of the files, in order.

    Raises:
        DataError: a file cannot be read.
    """
    try:
        return files_digest(weights)[:DIGEST_DIGITS]
    except OSError as error:
        raise DataError(f"cannot read the weight file {error.filename} ({error.strerror}); {FETCH}") from error
