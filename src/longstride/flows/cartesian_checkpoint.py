"""A Cartesian flow on disk, ours (safetensors, JSON metadata) and published ones (read without executing anything in them)."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from longstride.data.atomic import read_arrays, write_arrays
from longstride.data.torch_archive import TensorEntry, attribute, read_archive, read_tensors
from longstride.errors import DataError
from longstride.flows.cartesian import CartesianArchitecture, CartesianFlow, element_indices

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from longstride.systems import Prepared

FORMAT = "longstride-cartesian-flow-1"
PUBLISHED_TARGET = "amber14-all-obc1"  # the potential of the published data
PUBLISHED_TIMESTEP_PS = 0.5e-3


def save_cartesian(path: Path, flow: CartesianFlow, *, prepared: Prepared | None, extra: dict[str, Any] | None = None) -> None:
    """Write weights, architecture and origin atomically to `path` (.safetensors).

    Args:
        path: where to write.
        flow: the flow.
        prepared: the molecule it was trained for, or None for weights that serve any peptide.
        extra: further metadata; JSON values.
    """
    metadata: dict[str, Any] = {"format": FORMAT, "architecture": flow.architecture.to_meta()}
    if prepared is None:
        metadata |= {"system": None, "system_hash": None, "target": PUBLISHED_TARGET}
    else:
        system = prepared.system
        metadata |= {"system": system.name, "system_hash": prepared.system_hash, "target": prepared.target}
        metadata |= {"atomic_numbers": system.atomic_numbers.tolist()}
    arrays = {name: value.detach().cpu().numpy() for name, value in flow.state_dict().items()}
    write_arrays(path, arrays, {"longstride": json.dumps({**metadata, **(extra or {})})})


def is_cartesian(path: Path) -> bool:
    """Return whether the checkpoint at `path` holds a Cartesian flow.

    Raises:
        DataError: missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as handle:
            stored = handle.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise DataError(f"cannot read {path}: {error}; delete it and run the stage that writes it again") from error
    return json.loads(stored.get("longstride", "{}")).get("format") == FORMAT


def load_cartesian(path: Path, prepared: Prepared) -> CartesianFlow:
    """Return the flow in `path` in evaluation mode, checked against a molecule.

    Raises:
        DataError: unreadable, another format, an unknown element, or trained for another molecule, potential or parameters.
    """
    arrays, stored = read_arrays(path)
    metadata = json.loads(stored.get("longstride", "{}"))
    if metadata.get("format") != FORMAT:
        raise DataError(f"{path} is not a Cartesian flow of this version ({FORMAT}); train or import it again")
    _check_molecule(path, metadata, prepared)
    flow = CartesianFlow(CartesianArchitecture.from_meta(metadata["architecture"]))
    flow.load_state_dict({name: torch.from_numpy(value) for name, value in arrays.items()})
    return flow.eval().requires_grad_(requires_grad=False)


def _check_molecule(path: Path, metadata: dict[str, Any], prepared: Prepared) -> None:
    system = prepared.system
    element_indices(system.atomic_numbers, name=system.name)
    if metadata["target"] != prepared.target:
        raise DataError(
            f"{path} was trained on the potential {metadata['target']}, not {prepared.target}; train a flow for {system.name}"
        )
    if metadata["system_hash"] is None:
        return
    if metadata["atomic_numbers"] != system.atomic_numbers.tolist():
        was = f"{metadata['system']} ({len(metadata['atomic_numbers'])} atoms)"
        raise DataError(
            f"{path} was trained for another molecule: {was}, not {system.name} ({system.n_atoms} atoms), or its atoms are in"
            f" another order; train a flow for {system.name}"
        )
    if metadata["system_hash"] != prepared.system_hash:
        was, now = metadata["system_hash"][:12], prepared.system_hash[:12]
        raise DataError(
            f"{path} was trained with other force-field parameters (system {was}, here {now}); train a flow for {system.name}"
        )


# how the published layout names the tensors, and how this package does
_COUPLING = re.compile(r"flow\.chain\.(\d+)\.(scale|shift)_transformer\.(.+)")
_PARTS = (
    (re.compile(r"in_mlp\._layers\.(\d+)\.(weight|bias)"), r"enter.\1.\2"),
    (re.compile(r"out_mlp\._layers\.(\d+)\.(weight|bias)"), r"leave.\1.\2"),
    (re.compile(r"encoder_layers\.(\d+)\.self_attn\.values_proj\.weight"), r"layers.\1.attention.values.weight"),
    (re.compile(r"encoder_layers\.(\d+)\.self_attn\.attention\._out_projection\.weight"), r"layers.\1.attention.out.weight"),
    (re.compile(r"encoder_layers\.(\d+)\.linear1\.(weight|bias)"), r"layers.\1.widen.\2"),
    (re.compile(r"encoder_layers\.(\d+)\.linear2\.(weight|bias)"), r"layers.\1.narrow.\2"),
    (re.compile(r"encoder_layers\.(\d+)\.norm1\.(weight|bias)"), r"layers.\1.norm_attention.\2"),
    (re.compile(r"encoder_layers\.(\d+)\.norm2\.(weight|bias)"), r"layers.\1.norm_feed_forward.\2"),
)
_OTHERS = {
    "coords_prior_log_scale": "log_scale_positions",
    "velocs_prior_log_scale": "log_scale_auxiliaries",
    "flow.atom_embedder.weight": "embedding.weight",
}
_LENGTHSCALES = ".self_attn.attention.lengthscales"
# what the released models' configuration says, and what alone is implemented here
_SUPPORTED = {
    ("model_type",): ("custom_attention_transformer_nvp",),
    ("custom_transformer_nvp_config", "encoder_layer_config", "attention_type"): ("kernel",),
    ("custom_transformer_nvp_config", "encoder_layer_config", "cheb_order"): (None,),
    ("custom_transformer_nvp_config", "position_layer_index_mod_2"): (None, 0),
    ("custom_transformer_nvp_config", "conditional_flow_density", "ignore_conditional_velocity"): (True,),
    ("custom_transformer_nvp_config", "conditional_flow_density", "use_displacement_as_target"): (True,),
}


def our_name(published: str) -> str | None:
    """Return the name here of a tensor of the published layout, or None for one that is not a weight of it."""
    name = published.removeprefix("module.")
    if name in _OTHERS:
        return _OTHERS[name]
    found = _COUPLING.fullmatch(name)
    if found is None:
        return None
    for pattern, replacement in _PARTS:
        part = pattern.fullmatch(found[3])
        if part is not None:
            return f"couplings.{found[1]}.{found[2]}.{part.expand(replacement)}"
    return None


def read_published(path: Path) -> CartesianFlow:
    """Return the flow of a published Timewarp checkpoint, in evaluation mode.

    The file is a pickle with `model_state_dict` and, usually, a `training_config` object. Neither is unpickled
    (`longstride.data.torch_archive`). Sizes follow from the tensors, the lag from the configuration's `step_width`, in steps of
    0.5 fs.

    Raises:
        DataError: not such a checkpoint, or of another kind of model, naming what differs.
    """
    root = read_archive(path)
    entries, config = attribute(root, "model_state_dict"), attribute(root, "training_config")
    if not isinstance(entries, dict) or not all(isinstance(value, TensorEntry) for value in entries.values()):
        raise DataError(f"{path} holds no model_state_dict of tensors; it is not a published Timewarp checkpoint")
    _check_config(path, config)
    arrays = read_tensors(path, entries)
    lengthscales = _lengthscales(path, arrays, config)
    named: dict[str, torch.Tensor] = {}
    for name, value in arrays.items():
        ours = our_name(name)
        if ours is not None:
            named[ours] = torch.from_numpy(value.astype(np.float32, copy=False))
        elif not name.endswith(_LENGTHSCALES):
            raise DataError(
                f"{path}: the tensor {name} belongs to no kernel-attention Timewarp model; only those are supported"
            )
    step_width = attribute(config, "step_width")
    lags = (step_width * PUBLISHED_TIMESTEP_PS,) if isinstance(step_width, int) and step_width > 0 else ()
    flow = CartesianFlow(_sizes(path, named, lengthscales=lengthscales, lags_ps=lags))
    _load(path, flow, named)
    return flow.eval().requires_grad_(requires_grad=False)


def _check_config(path: Path, config: object) -> None:
    model = attribute(config, "model_config")
    if model is None:
        return
    for where, allowed in _SUPPORTED.items():
        value = attribute(model, *where)
        if value not in allowed:
            raise DataError(f"{path} holds another kind of model: its {'.'.join(where)} is {value!r}, not {allowed[-1]!r}")


def _lengthscales(path: Path, arrays: Mapping[str, np.ndarray], config: object) -> tuple[float, ...]:
    stored = [value.reshape(-1) for name, value in arrays.items() if name.endswith(_LENGTHSCALES)]
    if stored:
        if any(not np.array_equal(value, stored[0]) for value in stored):
            raise DataError(f"{path}: its attention layers have different lengthscales, which is not supported")
        return tuple(round(float(value), 6) for value in stored[0])
    layer = ("model_config", "custom_transformer_nvp_config", "encoder_layer_config", "lengthscales")
    found = attribute(config, *layer)
    if not isinstance(found, list) or not all(isinstance(value, (int, float)) for value in found):
        raise DataError(f"{path} says nothing about the lengthscales of its attention; it cannot be used")
    return tuple(float(value) for value in found)


def _sizes(
    path: Path, named: Mapping[str, torch.Tensor], *, lengthscales: tuple[float, ...], lags_ps: tuple[float, ...]
) -> CartesianArchitecture:
    """Return the sizes that the tensors' names and shapes imply."""
    try:
        widen = named["couplings.0.scale.layers.0.widen.weight"]
        return CartesianArchitecture(
            couplings=len({name.split(".")[1] for name in named if name.startswith("couplings.")}),
            layers=len({name.split(".")[4] for name in named if name.startswith("couplings.0.scale.layers.")}),
            embedding=named["embedding.weight"].shape[1],
            width=widen.shape[1],
            feed_forward=widen.shape[0],
            hidden=named["couplings.0.scale.enter.0.weight"].shape[0],
            lengthscales_nm=lengthscales,
            lags_ps=lags_ps,
        )
    except (KeyError, IndexError) as error:
        raise DataError(f"{path} lacks tensors of a Timewarp model ({error}); it is not a published checkpoint") from error


def _load(path: Path, flow: CartesianFlow, named: dict[str, torch.Tensor]) -> None:
    expected = flow.state_dict()
    for name in sorted(expected.keys() ^ named.keys()):
        kind = "lacks" if name in expected else "has a surplus"
        raise DataError(f"{path} {kind} tensor {name}; it is incomplete or of another model")
    for name, value in expected.items():
        if named[name].numel() != value.numel() or named[name].shape not in (value.shape, (1, *value.shape)):
            was, needed = tuple(named[name].shape), tuple(value.shape)
            raise DataError(f"{path}: tensor {name} has the shape {was} instead of {needed}; it is of another model")
    flow.load_state_dict({name: value.view(expected[name].shape) for name, value in named.items()})
