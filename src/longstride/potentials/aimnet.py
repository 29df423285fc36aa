"""AIMNet2 models as a `Potential`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from longstride.errors import DataError, LongstrideError
from longstride.potentials.external import ExternalPotential, check_elements, check_neutral, missing_package
from longstride.potentials.weights import weight_files
from longstride.units import ANGSTROM_NM, EV_KJ_PER_MOL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longstride.state import System


class AIMNet2Potential(ExternalPotential):
    """AIMNet2 (doi:10.1039/D4SC08572H), neutral and charged molecules. All replicas of isolated molecules are one call.

    The package computes in float32 and sums energies per molecule in float64. In a box its electrostatics are the damped
    shifted-force sum with a cutoff of 1.5 nm, which is what it chooses for periodic systems.

    Args:
        system: the molecule.
        weights: one model file (.pt in the package's second format, read as plain tensors), instead of `model`.
        model: a name of the package's registry, such as "aimnet2" (default), which it downloads to its cache.
        charge: total charge in elementary charges.
        device: such as "cpu" or "cuda"; by default a GPU where there is one.
        threads: threads of torch on the CPU are set by the stage that calls.
        name: label of the target distribution.

    Raises:
        DataError: weights can neither be found nor be downloaded, or are damaged.
        LongstrideError: the package is missing, or the molecule has unknown elements or a charge that the model has no
            input for.
    """

    def __init__(
        self,
        system: System,
        *,
        weights: Sequence[Path | str] = (),
        model: str | None = None,
        charge: int = 0,
        device: str | None = None,
        threads: int = 1,
        name: str | None = None,
    ) -> None:
        super().__init__(system, name=name or f"aimnet2-{model or 'aimnet2'}")
        if weights and (model is not None or len(weights) > 1):
            raise LongstrideError("teacher aimnet2 takes one file in distill.teacher_weights, or distill.teacher_model")
        self._calculator = _calculator(weights, model or "aimnet2", device)
        metadata = self._calculator.metadata or {}
        if known := metadata.get("implemented_species"):
            check_elements(system, known, teacher=self.name)
        if metadata.get("supports_charged_systems") is False:
            check_neutral(system, charge, teacher=self.name)
        electrons = int(sum(system.atomic_numbers)) - charge
        if electrons % 2 and not self._calculator.is_nse:
            raise LongstrideError(
                f"{system.name!r} with charge {charge} has {electrons} electrons, and {self.name} needs an even number of them;"
                " check the total charge and missing hydrogens"
            )
        self.charge = charge
        self._numbers = np.asarray(system.atomic_numbers)

    @property
    def cutoff_nm(self) -> float:
        """The range of its messages, nm; electrostatics and dispersion reach farther, with images of their own."""
        return float(self._calculator.cutoff) * ANGSTROM_NM

    def _call(self, positions: np.ndarray, boxes: np.ndarray | None, *, forces: bool) -> tuple[np.ndarray, np.ndarray | None]:
        count, n_atoms = positions.shape[:2]
        groups = [slice(0, count)] if boxes is None else [slice(i, i + 1) for i in range(count)]
        energies, slopes = np.empty(count), np.empty(positions.shape)
        for group in groups:
            part = positions[group]
            data: dict[str, Any] = {
                "coord": torch.as_tensor(part.reshape(-1, 3), dtype=torch.float32),
                "numbers": torch.as_tensor(np.tile(self._numbers, len(part)), dtype=torch.int32),
                "charge": torch.full((len(part),), float(self.charge)),
                "mult": torch.ones(len(part)),
                "mol_idx": torch.arange(len(part), dtype=torch.int32).repeat_interleave(n_atoms),
            }
            if boxes is not None:
                data["cell"] = torch.as_tensor(boxes[group][0], dtype=torch.float32)
            found = self._calculator(data, forces=forces)
            energies[group] = found["energy"].detach().double().reshape(-1).cpu().numpy()
            if forces:
                slopes[group] = found["forces"].detach().double().reshape(part.shape).cpu().numpy()
        return energies * EV_KJ_PER_MOL, slopes * (EV_KJ_PER_MOL / ANGSTROM_NM) if forces else None


def _calculator(weights: Sequence[Path | str], model: str, device: str | None) -> Any:  # noqa: ANN401
    try:
        from aimnet.calculators import AIMNet2Calculator
    except ImportError as error:
        raise missing_package("aimnet") from error
    fetch = (
        f"where there is no network, run `aimnet download {model}` on another machine and copy its cache (~/.cache/aimnet, or"
        " AIMNET_CACHE_DIR), or name a .pt file in distill.teacher_weights"
    )
    source = model
    if weights:
        source = str(weight_files(weights, kind="aimnet2", suffixes=(".pt",), fetch=fetch)[0].resolve())
    try:
        return AIMNet2Calculator(source, device=device)
    except Exception as error:  # no network, an unknown name, a damaged file: each layer below raises its own
        line = " ".join(str(error).split())[:160]
        raise DataError(f"the weights of aimnet2 {Path(source).name} cannot be loaded ({line}); {fetch}") from error
