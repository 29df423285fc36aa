"""Opening the flow in a folder, of whatever kind, for one molecule."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from longstride.data.manifest import MANIFEST, read_manifest
from longstride.errors import DataError
from longstride.flows.cartesian_checkpoint import is_cartesian, load_cartesian
from longstride.flows.checkpoint import load_flow
from longstride.flows.transferable import BoundMolecule, bind_all
from longstride.flows.transferable_checkpoint import Physics, load_transferable
from longstride.units import thermal_energy

if TYPE_CHECKING:
    from pathlib import Path

    from longstride.flows.bound import BoundFlow
    from longstride.potentials.base import Potential
    from longstride.systems import Prepared

WEIGHTS = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class OpenFlow:
    """A flow bound to a molecule, and where it comes from.

    Attributes:
        bound: its proposals.
        temperature_K: it was trained at.
        files: checksums of its folder.
    """

    bound: BoundFlow
    temperature_K: float
    files: dict[str, Any]


def open_flow(folder: Path, molecule: Prepared, guide: Potential, *, fitted_states: int = 300) -> OpenFlow:
    """Return the flow that `train-flow`, `train-transfer` or `import-timewarp` wrote, bound to a molecule.

    Args:
        folder: of the flow.
        molecule: to sample.
        guide: the target, for the stiff coordinates of a transferable flow. It shapes proposals and decides nothing, so single
            precision does.
        fitted_states: of a transferable flow, see `BoundMolecule.of`.

    Raises:
        DataError: no flow there, damaged, or trained for another molecule, potential or temperature (saying what differs).
    """
    kind = _kind(folder)
    manifest = read_manifest(folder, kind=kind)
    path = folder / WEIGHTS
    if kind == "transferable":
        network, physics = load_transferable(path)
        physics.check(Physics.of(molecule, physics.temperature_K), path=path)
        kT = thermal_energy(physics.temperature_K)
        ready = BoundMolecule.of(molecule, guide, kT=kT, fitted_states=fitted_states)
        return OpenFlow(bound=bind_all(network, ready), temperature_K=physics.temperature_K, files=manifest["files"])
    if is_cartesian(path):
        # its large matrix products are fastest on a GPU
        flow = load_cartesian(path, molecule).to("cuda" if torch.cuda.is_available() else "cpu")
        bound = flow.bound(molecule.system)
    else:
        bound = load_flow(path, molecule).bound(molecule.system)
    return OpenFlow(bound=bound, temperature_K=manifest["temperature_K"], files=manifest["files"])


def _kind(folder: Path) -> str:
    path = folder / MANIFEST
    try:
        kind = json.loads(path.read_text()).get("kind")
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: run train-flow or train-transfer first, or import a checkpoint") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not valid JSON ({error}); delete it and run the stage again") from error
    return "transferable" if kind == "transferable" else "flow"
