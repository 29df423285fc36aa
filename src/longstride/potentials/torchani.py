"""ANI models of TorchANI as a `Potential`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from longstride.errors import DataError, LongstrideError
from longstride.potentials.external import ExternalPotential, check_elements, check_neutral, missing_package
from longstride.potentials.weights import weight_files
from longstride.units import ANGSTROM_NM, HARTREE_KJ_PER_MOL

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from longstride.state import System

MODELS = {"ani1x": "ANI1x", "ani1ccx": "ANI1ccx", "ani2x": "ANI2x"}
MANY_ATOMS = 200  # from here on lists by cells pay, which take one configuration at a time


class TorchANIPotential(ExternalPotential):
    """ANI-1x (doi:10.1063/1.5023802), ANI-1ccx (doi:10.1038/s41467-019-10827-4) or ANI-2x (doi:10.1021/acs.jctc.0c00121).

    The mean of the eight networks, or one of them. All replicas of isolated molecules are one call.

    Args:
        system: the molecule; ANI-1x and 1ccx know H C N O, ANI-2x also F S Cl.
        weights: the state dictionary (.pt) of the model, where it cannot be downloaded; read as plain tensors.
        model: "ani1x", "ani1ccx" or "ani2x" (default).
        charge: must be zero.
        dtype: "float32" or "float64".
        device: such as "cpu" or "cuda"; by default a GPU where there is one.
        member: one network, 0 to 7, instead of the mean.
        threads: threads of torch on the CPU are set by the stage that calls.
        name: label of the target distribution.

    Raises:
        DataError: weights can neither be found nor be downloaded, or belong to another model.
        LongstrideError: the package is missing, or the molecule has unknown elements or a charge.
    """

    def __init__(
        self,
        system: System,
        *,
        weights: Sequence[Path | str] = (),
        model: str | None = None,
        charge: int = 0,
        dtype: Literal["float32", "float64"] = "float32",
        device: str | None = None,
        member: int | None = None,
        threads: int = 1,
        name: str | None = None,
    ) -> None:
        kind = model or "ani2x"
        if kind not in MODELS:
            raise LongstrideError(f"teacher torchani has no model {kind!r} (distill.teacher_model); it has {', '.join(MODELS)}")
        super().__init__(system, name=name or f"torchani-{kind}")
        check_neutral(system, charge, teacher=self.name)
        self._dtype = getattr(torch, dtype)
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._one_by_one = system.n_atoms >= MANY_ATOMS
        neighbours = "cell_list" if self._one_by_one else "all_pairs"
        self._model = _network(kind, weights, member, neighbours).to(device=self._device, dtype=self._dtype)
        check_elements(system, self._model.atomic_numbers.tolist(), teacher=self.name)
        self._numbers = torch.as_tensor(np.asarray(system.atomic_numbers), dtype=torch.long, device=self._device)

    @property
    def cutoff_nm(self) -> float:
        """The range of the symmetry functions, nm."""
        return float(self._model.cutoff) * ANGSTROM_NM

    def _call(self, positions: np.ndarray, boxes: np.ndarray | None, *, forces: bool) -> tuple[np.ndarray, np.ndarray | None]:
        # a box belongs to one configuration here, so replicas in boxes go one after the other
        single = self._one_by_one or boxes is not None
        groups = [slice(i, i + 1) for i in range(len(positions))] if single else [slice(None)]
        energies, slopes = np.empty(len(positions)), np.empty(positions.shape)
        for group in groups:
            x = torch.as_tensor(positions[group], dtype=self._dtype, device=self._device).requires_grad_(forces)
            periodic: dict[str, Any] = {}
            if boxes is not None:
                periodic["cell"] = torch.as_tensor(boxes[group][0], dtype=self._dtype, device=self._device)
                periodic["pbc"] = torch.ones(3, dtype=torch.bool, device=self._device)
            with torch.set_grad_enabled(forces):
                # atomic energies add up in float64: the total has more digits than float32
                atomic = self._model((self._numbers.expand(len(x), -1), x), atomic=True, **periodic).energies
                energies[group] = atomic.detach().double().sum(1).cpu().numpy()
                if forces:
                    slopes[group] = torch.autograd.grad(atomic.sum(), x)[0].double().cpu().numpy()
        return energies * HARTREE_KJ_PER_MOL, slopes * (-HARTREE_KJ_PER_MOL / ANGSTROM_NM) if forces else None


def _network(kind: str, weights: Sequence[Path | str], member: int | None, neighbours: str) -> Any:  # noqa: ANN401
    try:
        import torchani
        from torchani.paths import data_dir
    except ImportError as error:
        raise missing_package("torchani") from error
    fetch = (
        f"{kind}_state_dict.pt is at huggingface.co/roitberg-group/{kind}; put it into {data_dir() / 'StateDicts'}, or name"
        " its path in distill.teacher_weights"
    )
    file = weight_files(weights, kind="torchani", suffixes=(".pt",), fetch=fetch)[0] if weights else None
    try:
        if file is None:
            return getattr(torchani.models, MODELS[kind])(model_index=member, neighborlist=neighbours)
        model = ani_architecture(kind, neighbours)
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # no network, no such file, other tensors: each layer below raises its own
        line = " ".join(str(error).split())[:160]
        raise DataError(f"the weights of torchani {kind} cannot be loaded ({line}); {fetch}") from error
    return (model if member is None else model[member]).requires_grad_(requires_grad=False)


def ani_architecture(kind: str, neighbours: str = "all_pairs") -> Any:  # noqa: ANN401
    """Return an ANI model of eight networks with random weights.

    Args:
        kind: "ani1x", "ani1ccx" or "ani2x".
        neighbours: TorchANI's name of its way to list neighbours.
    """
    from torchani.arch import Assembler
    from torchani.utils import SYMBOLS_1X, SYMBOLS_2X

    shape = "ani2x" if kind == "ani2x" else "ani1x"  # 1ccx is 1x with other weights
    parts = Assembler(periodic_table_index=True)
    parts.set_symbols(SYMBOLS_2X if kind == "ani2x" else SYMBOLS_1X)
    parts.set_atomic_networks(ctor=shape)
    parts.set_global_cutoff_fn("cosine")
    parts.set_aev_computer(radial=shape, angular=shape, strategy="pyaev")
    parts.set_neighborlist(neighbours)
    parts.set_gsaes_as_self_energies("wb97x-631gd")  # the weights bring their own
    return parts.assemble(8)
