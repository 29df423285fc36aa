"""Small FeNNol models with random weights, saved as .fnx files: what the tests of the teacher need no download for."""

from __future__ import annotations

import os

# every test compiles, and evaluates a few atoms once: cheap compilation is what counts (read when XLA starts)
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import numpy as np

from longstride.state import System

SHIFTS_HARTREE = {"H": -0.5, "C": -38.0, "O": -75.0}


def save_model(path, *, seed=0, hidden=(8, 6), cutoff=3.0):
    """Save an ANI-like model of H, C, O with a cutoff of 3 Å and an angular one of 2.5 Å."""
    from flax import serialization

    modules = {
        "embedding": {
            "module_name": "ANI_AEV",
            "graph_angle_key": "graph_angle",
            "species_order": ["H", "C", "O"],
            "radial_dist_divisions": 6,
            "angular_dist_divisions": 2,
            "angle_sections": 2,
            "zeta": 8.0,
            "radial_eta": 6.0,
            "angular_eta": 4.0,
        },
        "energy": {
            "module_name": "SPECIES_INDEX_NET",
            "input_key": "embedding",
            "output_dim": 1,
            "hidden_neurons": {symbol: list(hidden) for symbol in SHIFTS_HARTREE},
        },
        "self_energy": {"module_name": "CHEMICAL_CONSTANT", "value": SHIFTS_HARTREE},
    }
    preprocessing = {
        "graph_filter": {"cutoff": 2.5, "graph_key": "graph_angle", "parent_graph": "graph"},
        "graph_angular_extension": {"graph_key": "graph_angle"},
        "species_indexer": {"output_key": "species_index"},
    }
    inputs = 3 * 6 + 6 * 2 * 2  # radial terms of each element, angular terms of each pair of elements
    rng = np.random.default_rng(seed)
    weights = {symbol: _layers(rng, (inputs, *hidden, 1)) for symbol in SHIFTS_HARTREE}
    content = {
        "cutoff": cutoff,
        "energy_unit": "Ha",
        "energy_terms": ["energy", "self_energy"],
        "modules": [[key, value] for key, value in modules.items()],
        "preprocessing": [[key, value] for key, value in preprocessing.items()],
        "variables": {"params": {"energy": weights}},
    }
    path.write_bytes(serialization.msgpack_serialize(content))
    return path


def _layers(rng, sizes):
    return {
        f"Layer_{number}": {
            "kernel": rng.normal(scale=sizes[number - 1] ** -0.5, size=(sizes[number - 1], sizes[number])).astype(np.float32),
            "bias": rng.normal(scale=0.1, size=sizes[number]).astype(np.float32),
        }
        for number in range(1, len(sizes))
    }


def system(numbers, name="methanol"):
    n = len(numbers)
    return System(
        name=name,
        atomic_numbers=np.array(numbers),
        masses=np.ones(n),
        bonds=np.zeros((0, 2), dtype=np.int64),
        atom_names=("X",) * n,
        residue_names=("MOL",) * n,
        residue_indices=np.zeros(n, dtype=np.int64),
    )
