"""The students that come with the package, found by teacher and elements."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from longstride.errors import LongstrideError
from longstride.potentials.student import load_student

if TYPE_CHECKING:
    from longstride.state import System


def shipped_students() -> list[Path]:
    """Return the files of all students in the package, sorted by name."""
    folder = Path(str(resources.files("longstride"))) / "weights" / "students"
    return sorted(folder.glob("*/student.safetensors"))


def shipped_student(system: System, *, teacher: str) -> Path:
    """Return the file of the student of a teacher that knows all elements of a molecule.

    Args:
        system: the molecule.
        teacher: label of the teacher.

    Raises:
        LongstrideError: the package has none.
    """
    elements = {int(number) for number in system.atomic_numbers}
    known = []
    for path in shipped_students():
        metadata = load_student(path).metadata
        if metadata.teacher == teacher and elements <= set(metadata.elements):
            return path
        known.append(f"{metadata.teacher} (elements {', '.join(map(str, metadata.elements))})")
    raise LongstrideError(
        f"no student of {teacher} for the elements {sorted(elements)} of {system.name!r} comes with the package, which has"
        f" those of {'; '.join(known) or 'none'}; distil one (distill.shipped: false)"
    )
