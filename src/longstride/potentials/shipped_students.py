"""The students that come with the package, found by teacher and by the surroundings of the atoms that they learned from."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from ase.data import chemical_symbols

from longstride.data.manifest import read_manifest
from longstride.errors import LongstrideError

if TYPE_CHECKING:
    from longstride.state import System


def shipped_students() -> list[Path]:
    """Return the files of all students in the package, sorted by name."""
    folder = Path(str(resources.files("longstride"))) / "weights" / "students"
    return sorted(folder.glob("*/student.safetensors"))


def environments(system: System) -> list[str]:
    """Return the kinds of atoms of a molecule, each an element with its bonded elements, such as "C(C,H,H,H)"; sorted."""
    bonded: list[list[str]] = [[] for _ in range(system.n_atoms)]
    symbols = [chemical_symbols[number] for number in system.atomic_numbers]
    for first, second in system.bonds:
        bonded[first].append(symbols[second])
        bonded[second].append(symbols[first])
    return sorted({f"{symbol}({','.join(sorted(near))})" for symbol, near in zip(symbols, bonded, strict=True)})


def shipped_student(system: System, *, teacher: str) -> Path:
    """Return the file of the student of a teacher that learned from all kinds of atoms of a molecule (see `environments`).

    A student of other kinds of atoms would be an extrapolation, and a slow force of any size.

    Args:
        system: the molecule.
        teacher: label of the teacher.

    Raises:
        LongstrideError: the package has none.
    """
    needed = set(environments(system))
    known = []
    for path in shipped_students():
        content = read_manifest(path.parent, kind="distill")
        if content["teacher"] == teacher and needed <= set(content["environments"]):
            return path
        known.append(f"{content['teacher']} for {content['system']}")
    raise LongstrideError(
        f"no student of {teacher} for all kinds of atoms of {system.name!r} comes with the package, which has those of"
        f" {'; '.join(known) or 'none'}; distil one (distill.shipped: false)"
    )
