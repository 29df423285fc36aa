"""Frames of a molecule that stand for molecular dynamics."""

import numpy as np
import torch

from longstride.flows.zmatrix import Internals, build_zmatrix
from longstride.training.cartesian import random_rotations


def wiggled(prepared, count, seed):
    """Draw frames around the minimised structure: stiff coordinates with thermal widths, torsions turned by up to 0.4 rad."""
    zmatrix = build_zmatrix(prepared.system)
    generator = torch.Generator().manual_seed(seed)

    def noise(size, width):
        return width * torch.randn(count, size, generator=generator, dtype=torch.float64)

    here = zmatrix.from_cartesian(torch.from_numpy(prepared.positions)[None])
    n = zmatrix.n_atoms
    dihedrals = here.dihedrals + noise(n - 3, 0.08)
    dihedrals[:, zmatrix.free] += noise(len(zmatrix.free), 0.2)
    internals = Internals(bonds=here.bonds + noise(n - 1, 0.002), angles=here.angles + noise(n - 2, 0.05), dihedrals=dihedrals)
    return zmatrix.to_cartesian(internals).numpy().astype(np.float32)


def tumbling(prepared, count, seed):
    """Draw wiggled frames that also turn and wander, as in dynamics that remove neither motion."""
    generator = torch.Generator().manual_seed(seed)
    turn, shift = random_rotations(count, generator), torch.randn(count, 1, 3, generator=generator)
    return (torch.from_numpy(wiggled(prepared, count, seed)) @ turn + shift).numpy()
