"""What every implementation of a protocol must fulfil; one check per clause, run over all implementations.

`check_potential(potential, positions)` runs all clauses. A new potential is one more call (or one list entry in
tests/potentials/test_potential_contract.py).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from longstride.potentials.base import Potential
from longstride.state import State


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Absolute tolerances; `step` is the displacement of central differences in nm."""

    energy: float = 1e-7
    force: float = 1e-2
    step: float = 1e-5


def check_potential(
    potential: Potential, positions: torch.Tensor, *, tolerance: Tolerance | None = None, invariant: bool = True
) -> None:
    """Run every clause on positions [batch >= 3, atom, 3] nm; `invariant` is False for external fields."""
    tolerance = tolerance or Tolerance()
    check_shapes(potential, positions)
    check_energy_agrees_with_energy_forces(potential, positions, tolerance)
    check_forces_are_minus_gradient(potential, positions, tolerance)
    check_batch_of_one(potential, positions, tolerance)
    check_batch_permutation(potential, positions, tolerance)
    check_input_is_untouched(potential, positions)
    check_bad_configuration_is_not_an_exception(potential, positions, tolerance)
    if invariant:
        check_rigid_motion(potential, positions, tolerance)


def check_shapes(potential: Potential, positions: torch.Tensor) -> None:
    """Energies are [batch], forces [batch, atom, 3], both real, detached, on the device of the input."""
    assert isinstance(potential, Potential)
    assert isinstance(potential.name, str)
    assert potential.system.n_atoms == positions.shape[1]
    energy, forces = potential.energy_forces(State(positions=positions))
    assert energy.shape == (len(positions),)
    assert forces.shape == positions.shape
    for value in (energy, forces):
        assert value.dtype in (torch.float32, torch.float64)
        assert not value.requires_grad
        assert value.device == positions.device
    assert torch.isfinite(energy).all()
    assert torch.isfinite(forces).all()


def check_energy_agrees_with_energy_forces(potential: Potential, positions: torch.Tensor, tolerance: Tolerance) -> None:
    """Both methods give the same energy."""
    state = State(positions=positions)
    _close(potential.energy(state), potential.energy_forces(state)[0], tolerance.energy)


def check_forces_are_minus_gradient(potential: Potential, positions: torch.Tensor, tolerance: Tolerance) -> None:
    """F = -dU/dx by central differences along random directions (all atoms at once, so that none can hide)."""
    generator = torch.Generator().manual_seed(7)
    _, forces = potential.energy_forces(State(positions=positions))
    for _ in range(4):
        direction = torch.randn(positions.shape, generator=generator, dtype=positions.dtype)
        ahead = potential.energy(State(positions=positions + tolerance.step * direction))
        behind = potential.energy(State(positions=positions - tolerance.step * direction))
        slope = (ahead - behind).double() / (2 * tolerance.step)
        _close(slope, -(forces.double() * direction.double()).sum((1, 2)), tolerance.force * positions[0].numel() ** 0.5)


def check_batch_of_one(potential: Potential, positions: torch.Tensor, tolerance: Tolerance) -> None:
    """A configuration has the same energy and forces alone and in a batch."""
    energy, forces = potential.energy_forces(State(positions=positions))
    for i in range(len(positions)):
        alone, alone_forces = potential.energy_forces(State(positions=positions[i : i + 1]))
        _close(alone, energy[i : i + 1], tolerance.energy)
        _close(alone_forces, forces[i : i + 1], tolerance.force)


def check_batch_permutation(potential: Potential, positions: torch.Tensor, tolerance: Tolerance) -> None:
    """Reordering the batch reorders the answers."""
    order = torch.arange(len(positions)).roll(1)
    energy, forces = potential.energy_forces(State(positions=positions))
    moved, moved_forces = potential.energy_forces(State(positions=positions[order]))
    _close(moved, energy[order], tolerance.energy)
    _close(moved_forces, forces[order], tolerance.force)


def check_input_is_untouched(potential: Potential, positions: torch.Tensor) -> None:
    """Evaluation neither writes into the positions nor turns gradients on."""
    given = positions.clone()
    potential.energy(State(positions=given))
    potential.energy_forces(State(positions=given))
    assert torch.equal(given, positions)
    assert not given.requires_grad


def check_bad_configuration_is_not_an_exception(potential: Potential, positions: torch.Tensor, tolerance: Tolerance) -> None:
    """NaN in one configuration gives a NaN energy there, and the right energies elsewhere."""
    bad = positions.clone()
    bad[1] = float("nan")
    energy = potential.energy(State(positions=bad))
    assert torch.isnan(energy[1])
    keep = [i for i in range(len(positions)) if i != 1]
    _close(energy[keep], potential.energy(State(positions=positions))[keep], tolerance.energy)


def check_rigid_motion(potential: Potential, positions: torch.Tensor, tolerance: Tolerance) -> None:
    """U(Rx + t) = U(x) and F(Rx + t) = R F(x)."""
    rotation = random_rotation(seed=3).to(positions.dtype)
    moved = positions @ rotation.T + torch.tensor([0.3, -0.2, 0.1], dtype=positions.dtype)
    energy, forces = potential.energy_forces(State(positions=positions))
    moved_energy, moved_forces = potential.energy_forces(State(positions=moved))
    _close(moved_energy, energy, tolerance.energy)
    _close(moved_forces, forces @ rotation.T.to(forces.dtype), tolerance.force)


def random_rotation(*, seed: int) -> torch.Tensor:
    """Return a proper rotation matrix, float64."""
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))
    q = q * np.sign(np.diag(r))
    return torch.from_numpy(q * np.linalg.det(q))


def _close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    scale = max(1.0, float(expected.double().abs().max()))
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=tolerance * scale)
