"""Where a network is trained: the device that the configuration asks for."""

from __future__ import annotations

import torch

from longstride.errors import LongstrideError


def training_device(wanted: str, *, key: str, index: int = 0) -> torch.device:
    """Return the device that the configuration asks for.

    Args:
        wanted: auto (a GPU where there is one), cpu or cuda.
        key: of the configuration, for messages.
        index: number of the GPU, where there are several.

    Raises:
        LongstrideError: a GPU is asked for and there is none, or none of that number.
    """
    found = torch.cuda.is_available()
    if wanted == "cuda" and not found:
        raise LongstrideError(f"{key} is cuda, but PyTorch sees no GPU; set it to cpu or auto, or use another node")
    if wanted == "cpu" or not found:
        return torch.device("cpu")
    if index >= torch.cuda.device_count():
        raise LongstrideError(
            f"process {index} of this node has no GPU of its own (PyTorch sees {torch.cuda.device_count()});"
            f" start fewer processes, or set {key} to cpu"
        )
    return torch.device("cuda", index)
