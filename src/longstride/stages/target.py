"""The target potential of a prepared molecule, evaluated by the engine that the configuration names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from longstride.errors import LongstrideError
from longstride.potentials.amber import AmberPotential, compiler_available
from longstride.potentials.openmm import OpenMMPotential

if TYPE_CHECKING:
    from longstride.config import Energies
    from longstride.potentials.base import Potential
    from longstride.systems import Prepared


def target_potential(
    molecule: Prepared, engine: Energies, *, compile: bool | None, dtype: torch.dtype = torch.float64, key: str
) -> Potential:
    """Return the molecule's own force field as a `Potential`.

    Args:
        molecule: the prepared molecule.
        engine: "batched" (`AmberPotential`) or "openmm" (`OpenMMPotential`, any System, one configuration at a time).
        compile: compile the batched energy; None: where a C++ compiler is found. Ignored by "openmm".
        dtype: precision of the batched evaluation.
        key: configuration key of `engine`, named in the error.

    Raises:
        LongstrideError: the batched engine does not know a force of the System; nothing else is chosen in its place.
    """
    if engine == "openmm":
        return OpenMMPotential(molecule.openmm_system, molecule.system, name=molecule.target)
    compiled = compiler_available() if compile is None else compile
    try:
        return AmberPotential.from_openmm(
            molecule.openmm_system, molecule.system, name=molecule.target, dtype=dtype, compile=compiled
        )
    except LongstrideError as error:
        if compile and not compiler_available():
            raise
        raise LongstrideError(
            f"the batched engine cannot evaluate {molecule.system.name!r} ({error}); set {key}: openmm to use OpenMM itself"
        ) from error
