"""A transferable flow on disk: weights as safetensors, sizes, origin and the physics it was trained on as JSON metadata."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import openmm
import torch
from openmm import unit

from longstride.data.atomic import read_arrays, write_arrays
from longstride.errors import DataError
from longstride.flows.torsion_network import TorsionArchitecture, TorsionNetwork

if TYPE_CHECKING:
    from pathlib import Path

    from longstride.systems import Prepared

FORMAT = "longstride-transferable-flow-1"


@dataclass(frozen=True, kw_only=True)
class Physics:
    """What a transferable flow is bound to, since it serves any molecule: the potential and the temperature.

    Attributes:
        target: label of the force field, such as "amber14-all-obc1".
        cutoff_nm: of the nonbonded interactions, or None.
        temperature_K: of the data.
    """

    target: str
    cutoff_nm: float | None
    temperature_K: float

    @classmethod
    def of(cls, prepared: Prepared, temperature_K: float) -> Physics:
        """Return the physics of a prepared molecule at a temperature."""
        cutoff = None
        for force in prepared.openmm_system.getForces():
            if isinstance(force, openmm.NonbondedForce) and force.getNonbondedMethod() != openmm.NonbondedForce.NoCutoff:
                cutoff = force.getCutoffDistance().value_in_unit(unit.nanometer)
        return cls(target=prepared.target, cutoff_nm=cutoff, temperature_K=temperature_K)

    def check(self, other: Physics, *, path: Path) -> None:
        """Compare with the physics of a molecule to be sampled.

        Raises:
            DataError: they differ, saying in what.
        """
        for name, was in vars(self).items():
            now = getattr(other, name)
            if was != now:
                what = {"target": "the potential", "cutoff_nm": "a cutoff (nm) of", "temperature_K": "a temperature (K) of"}[
                    name
                ]
                raise DataError(f"{path} was trained for {what} {was}, not {now}; train a flow for it, or change the physics")


def save_transferable(path: Path, network: TorsionNetwork, physics: Physics, extra: dict[str, Any] | None = None) -> None:
    """Write weights, architecture and physics atomically to `path` (.safetensors)."""
    metadata = {"format": FORMAT, "architecture": network.architecture.to_meta(), "physics": vars(physics), **(extra or {})}
    arrays = {name: value.detach().cpu().numpy() for name, value in network.state_dict().items()}
    write_arrays(path, arrays, {"longstride": json.dumps(metadata)})


def load_transferable(path: Path) -> tuple[TorsionNetwork, Physics]:
    """Return the network in `path`, in evaluation mode, and the physics it was trained for.

    Raises:
        DataError: unreadable or another format.
    """
    arrays, stored = read_arrays(path)
    metadata = json.loads(stored.get("longstride", "{}"))
    if metadata.get("format") != FORMAT:
        raise DataError(f"{path} is not a transferable flow of this version ({FORMAT}); train it again")
    sizes = metadata["architecture"]
    network = TorsionNetwork(TorsionArchitecture(**{**sizes, "lags_ps": tuple(sizes["lags_ps"])}))
    network.load_state_dict({name: torch.from_numpy(value) for name, value in arrays.items()})
    return network.eval().requires_grad_(requires_grad=False), Physics(**metadata["physics"])
