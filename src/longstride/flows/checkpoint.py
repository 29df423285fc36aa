"""A trained flow on disk: weights as safetensors, everything needed to rebuild it as JSON metadata. No pickle."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from longstride.data.atomic import read_arrays, write_arrays
from longstride.errors import DataError
from longstride.flows.internal import FlowArchitecture, InternalFlow
from longstride.flows.zmatrix import build_zmatrix

if TYPE_CHECKING:
    from pathlib import Path

    from longstride.systems import Prepared

FORMAT = "longstride-internal-flow-1"


def save_flow(path: Path, flow: InternalFlow, prepared: Prepared, extra: dict[str, Any] | None = None) -> None:
    """Write weights, architecture, Z-matrix and the identity of the molecule atomically to `path` (.safetensors)."""
    metadata = {
        "format": FORMAT,
        "architecture": flow.architecture.to_meta(),
        "zmatrix": flow.zmatrix.to_meta(),
        "system": prepared.system.name,
        "atomic_numbers": prepared.system.atomic_numbers.tolist(),
        "target": prepared.target,
        "system_hash": prepared.system_hash,
        **(extra or {}),
    }
    arrays = {name: value.detach().cpu().numpy() for name, value in flow.state_dict().items()}
    write_arrays(path, arrays, {"longstride": json.dumps(metadata)})


def load_flow(path: Path, prepared: Prepared) -> InternalFlow:
    """Return the flow in `path`, in evaluation mode.

    Raises:
        DataError: unreadable, another format, or trained for another peptide or force field (saying what differs).
    """
    arrays, stored = read_arrays(path)
    metadata = json.loads(stored.get("longstride", "{}"))
    if metadata.get("format") != FORMAT:
        raise DataError(f"{path} is not a flow of this version ({FORMAT}); train it again")
    _check_molecule(path, metadata, prepared)
    sizes = metadata["architecture"]
    flow = InternalFlow(build_zmatrix(prepared.system), FlowArchitecture(**{**sizes, "lags_ps": tuple(sizes["lags_ps"])}))
    flow.load_state_dict({name: torch.from_numpy(value) for name, value in arrays.items()})
    return flow.eval().requires_grad_(requires_grad=False)


def _check_molecule(path: Path, metadata: dict[str, Any], prepared: Prepared) -> None:
    system = prepared.system
    mend = f"train a flow for {system.name}"
    if metadata["atomic_numbers"] != system.atomic_numbers.tolist():
        was = f"{metadata['system']} ({len(metadata['atomic_numbers'])} atoms)"
        raise DataError(f"{path} was trained for another molecule: {was}, not {system.name} ({system.n_atoms} atoms); {mend}")
    if metadata["zmatrix"] != build_zmatrix(system).to_meta():
        raise DataError(f"{path} was trained with other bonds or another atom order than {system.name} has; {mend}")
    if metadata["target"] != prepared.target:
        raise DataError(f"{path} was trained on the potential {metadata['target']}, not {prepared.target}; {mend}")
    if metadata["system_hash"] != prepared.system_hash:
        was, now = metadata["system_hash"][:12], prepared.system_hash[:12]
        raise DataError(f"{path} was trained with other force-field parameters (system {was}, here {now}); {mend}")
