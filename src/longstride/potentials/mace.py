"""MACE models (MACE-OFF or any file) as a `Potential`."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlparse

import numpy as np
import torch

from longstride.errors import DataError, LongstrideError
from longstride.potentials.external import ExternalPotential, check_elements, check_neutral, missing_package
from longstride.potentials.periodic import neighbour_pairs
from longstride.potentials.weights import weight_files
from longstride.units import ANGSTROM_NM, EV_KJ_PER_MOL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longstride.state import System

# what a MACE file may hold without being able to run code of its own while it is read
SAFE_PACKAGES = ("mace.modules.", "e3nn.o3.", "e3nn.nn.", "e3nn.math.", "torch.nn.modules.", "torch.nn.functional.")


class MACEPotential(ExternalPotential):
    """MACE (doi:10.48550/arXiv.2206.07697), such as MACE-OFF (doi:10.1021/jacs.4c07099). All replicas are one call.

    Files of MACE are pickled modules, and unpickling can run code: most hold torch.fx graphs, whose source text is run.
    TorchScript files ("..._compiled.model", as mace_run_train writes them) are loaded as such, others with torch's
    restricted loader, which may make only classes of mace, e3nn and torch.nn. A file that needs more is refused unless
    `unsafe_pickle` is set.

    Args:
        system: the molecule, or all molecules of a box.
        weights: one model file, instead of `model`.
        model: "off23-small", "off23-medium" or "off23-large", fetched by mace-torch to its cache (academic licence).
        charge: must be zero.
        dtype: "float32" or "float64".
        device: such as "cpu" or "cuda"; by default a GPU where there is one.
        unsafe_pickle: load a file that the restricted loader refuses. It can then run any code: only for files of a
            source you trust as much as a program that you would run.
        threads: threads of torch on the CPU are set by the stage that calls.
        name: label of the target distribution.

    Raises:
        DataError: the file is missing, damaged, or needs the unrestricted loader.
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
        unsafe_pickle: bool = False,
        threads: int = 1,
        name: str | None = None,
    ) -> None:
        super().__init__(system, name=name or f"mace-{model or 'file'}")
        check_neutral(system, charge, teacher=self.name)
        try:
            with torch.serialization.safe_globals([slice]):  # the constants that e3nn 0.4 reads from its own package
                import mace.modules  # noqa: F401 - its classes must exist before a file is read
        except ImportError as error:
            raise missing_package("mace") from error
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._dtype = getattr(torch, dtype)
        file = _file(weights, model)
        self._model = _load(file, unsafe_pickle=unsafe_pickle).to(device=self._device, dtype=self._dtype)
        for parameter in self._model.parameters():  # TorchScript modules have no requires_grad_ for all at once
            parameter.requires_grad_(requires_grad=False)
        known = [int(number) for number in self._model.atomic_numbers]
        check_elements(system, known, teacher=self.name)
        heads = [head.lower() for head in getattr(self._model, "heads", None) or ["default"]]
        self._head = heads.index("default") if "default" in heads else 0
        column = torch.as_tensor([known.index(int(number)) for number in system.atomic_numbers])
        self._attributes = torch.nn.functional.one_hot(column, len(known)).to(device=self._device, dtype=self._dtype)

    @property
    def cutoff_nm(self) -> float:
        """The range of one message, nm; the receptive field of several layers is a multiple."""
        return float(self._model.r_max) * ANGSTROM_NM

    def _call(self, positions: np.ndarray, boxes: np.ndarray | None, *, forces: bool) -> tuple[np.ndarray, np.ndarray | None]:
        count, n_atoms = positions.shape[:2]
        i, j, shift, _ = neighbour_pairs(positions, boxes, float(self._model.r_max))
        cells = np.zeros((count, 3, 3)) if boxes is None else boxes
        shifts = np.einsum("ps,psx->px", shift, cells[i // n_atoms])
        data = {
            "positions": self._real(positions.reshape(-1, 3)),
            "node_attrs": self._attributes.repeat(count, 1),
            "edge_index": self._whole(np.stack([i, j])),
            "shifts": self._real(shifts),
            "unit_shifts": self._real(shift),
            "cell": self._real(cells.reshape(-1, 3)),
            "batch": self._whole(np.repeat(np.arange(count), n_atoms)),
            "ptr": self._whole(np.arange(count + 1) * n_atoms),
            "head": self._whole(np.full(count, self._head)),
        }
        found = self._model(data, compute_force=forces)
        # the atoms' energies add up in float64: the total has more digits than float32
        energy = found["node_energy"].detach().double().view(count, n_atoms).sum(1).cpu().numpy() * EV_KJ_PER_MOL
        if not forces:
            return energy, None
        slope = found["forces"].detach().double().view(count, n_atoms, 3).cpu().numpy()
        return energy, slope * (EV_KJ_PER_MOL / ANGSTROM_NM)

    def _real(self, values: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(values, dtype=self._dtype, device=self._device)

    def _whole(self, values: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.long, device=self._device)


def _file(weights: Sequence[Path | str], model: str | None) -> Path:
    if weights:
        if model is not None or len(weights) > 1:
            raise LongstrideError("teacher mace takes one file in distill.teacher_weights, or distill.teacher_model")
        fetch = "fetch it (MACE-OFF: github.com/ACEsuit/mace-off) and name its path in distill.teacher_weights"
        return weight_files(weights, kind="mace", suffixes=(".model", ".pt"), fetch=fetch)[0]
    size = (model or "").removeprefix("off23-")
    if size not in ("small", "medium", "large"):
        raise LongstrideError(
            "teacher mace needs a file in distill.teacher_weights, or a distill.teacher_model of off23-small, off23-medium,"
            " off23-large"
        )
    return _fetched(size)


def _fetched(size: str) -> Path:
    """Return the file of MACE-OFF23 in the cache of mace-torch, downloaded where it is not there."""
    forced = os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    from mace.calculators import foundations_models as known

    if forced is None:
        os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)  # that import unlocks every later torch.load
    address = known.mace_off_urls[size]
    path = Path(known.get_cache_dir()) / Path(urlparse(address).path).name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        try:
            torch.hub.download_url_to_file(address, str(part), progress=False)
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            line = " ".join(str(error).split())[:120]
            raise DataError(f"cannot download MACE-OFF23 {size} ({line}); fetch {address} and put it at {path}") from error
    return path


def _load(path: Path, *, unsafe_pickle: bool) -> Any:  # noqa: ANN401
    if _is_torchscript(path):
        return torch.jit.load(str(path), map_location="cpu")
    if unsafe_pickle:
        return torch.load(path, map_location="cpu", weights_only=False)
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        refused = [name for name in names if not (name.startswith(SAFE_PACKAGES))]
        if not refused:
            with torch.serialization.safe_globals([_named(name) for name in names]):
                return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each raise their own
        raise DataError(f"{path} is not a MACE model that can be loaded ({' '.join(str(error).split())[:200]})") from error
    raise DataError(
        f"{path} would have to run {refused[0]} to load, which the restricted loader refuses; if you trust its source as you"
        " trust a program, set distill.teacher_options: {unsafe_pickle: true}"
    )


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(Path(name).name == "constants.pkl" for name in archive.namelist())


def _named(name: str) -> Any:  # noqa: ANN401
    import importlib

    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)
