"""Boxes and lists of neighbours for potentials of finite range."""

from __future__ import annotations

import numpy as np

from longstride.errors import LongstrideError
from longstride.state import half_width


def check_box(boxes: np.ndarray, cutoff_nm: float, name: str, *, whose: str = "the teacher's cutoff") -> None:
    """Refuse boxes whose opposite faces are closer than twice the cutoff.

    Args:
        boxes: [batch, 3, 3] nm, rows are vectors.
        cutoff_nm: range of the potential.
        name: of the system, for the message.
        whose: what range it is, for the message.

    Raises:
        LongstrideError: a box is narrower, or flat.
    """
    width = 2 * half_width(boxes)
    if width < 2 * cutoff_nm * (1 - 1e-6):
        raise LongstrideError(
            f"the box of {name!r} is {width:.3f} nm wide, less than twice {whose} of {cutoff_nm:.3f} nm; use a larger box"
        )


def neighbour_pairs(positions: np.ndarray, boxes: np.ndarray | None, cutoff: float) -> tuple[np.ndarray, ...]:
    """Return all ordered pairs closer than the cutoff, of all replicas, atoms numbered on from replica to replica.

    Args:
        positions: [batch, atom, 3].
        boxes: [batch, 3, 3] in the same unit, rows are vectors, or None for isolated molecules.
        cutoff: in the same unit.

    Returns:
        i [pair] and j [pair], shifts S [pair, 3] in whole box vectors, all int32, and squared distances
        |x_j - x_i + S @ box|^2 [pair].
    """
    import vesin

    parts = []
    for index, x in enumerate(positions):
        box = np.zeros((3, 3)) if boxes is None else boxes[index]
        i, j, shift, d = vesin.NeighborList(cutoff=cutoff, full_list=True, sorted=True).compute(
            points=x, box=box, periodic=boxes is not None, quantities="ijSd"
        )
        offset = index * len(x)
        parts.append((i.astype(np.int32) + offset, j.astype(np.int32) + offset, shift.astype(np.int32), d * d))
    return tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))
