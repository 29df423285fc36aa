"""Any OpenMM System as a `Potential`: the reference for other implementations, and the way to unsupported forces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import openmm
import torch
from openmm import unit
from torch import Tensor

from longstride.errors import LongstrideError

if TYPE_CHECKING:
    from longstride.state import State, System


class OpenMMPotential:
    """An OpenMM Context evaluated configuration by configuration (`longstride.potentials.base.Potential`).

    Exact to the platform's precision (Reference: double; CPU: single) and serial: thousands of times slower per
    configuration than `AmberPotential`. No gradient flows through it. A configuration that OpenMM cannot evaluate has
    energy NaN and forces NaN.

    Attributes:
        system: the molecule.
        name: label of the target distribution.
        platform: "CPU" or "Reference".
    """

    def __init__(
        self,
        openmm_system: openmm.System,
        system: System,
        *,
        name: str,
        platform: Literal["CPU", "Reference"] = "CPU",
        threads: int = 1,
    ) -> None:
        """Make the context.

        Args:
            openmm_system: copied, so that later changes to it have no effect.
            system: the molecule it describes.
            name: label of the target distribution.
            platform: OpenMM platform.
            threads: threads of the CPU platform; more than one rarely helps a peptide (see `longstride.compute`).

        Raises:
            LongstrideError: atom counts differ or OpenMM does not offer the platform.
        """
        count = openmm_system.getNumParticles()
        if count != system.n_atoms:
            raise LongstrideError(f"the OpenMM System has {count} particles but {system.name!r} has {system.n_atoms} atoms")
        self.system, self.name, self.platform = system, name, platform
        properties = {"Threads": str(threads)} if platform == "CPU" else {}
        copy = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(openmm_system))
        try:
            found = openmm.Platform.getPlatformByName(platform)
            self._context = openmm.Context(copy, openmm.VerletIntegrator(0.001), found, properties)
        except openmm.OpenMMException as error:
            raise LongstrideError(f"OpenMM cannot use its {platform} platform for {system.name!r}: {error}") from error

    def energy(self, x: State) -> Tensor:
        """Return U(x), [batch] kJ/mol float64."""
        return self._evaluate(x, forces=False)[0]

    def energy_forces(self, x: State) -> tuple[Tensor, Tensor]:
        """Return U(x), [batch] kJ/mol, and F, [batch, atom, 3] kJ/mol/nm, float64."""
        return self._evaluate(x, forces=True)

    def _evaluate(self, x: State, *, forces: bool) -> tuple[Tensor, Tensor]:
        if x.positions.dim() != 3 or x.positions.shape[1:] != (self.system.n_atoms, 3):
            raise LongstrideError(
                f"positions have shape {tuple(x.positions.shape)}, expected [batch, {self.system.n_atoms}, 3] for"
                f" {self.system.name!r}"
            )
        positions = x.positions.detach().to(device="cpu", dtype=torch.float64).numpy()
        boxes = None if x.box is None else x.box.detach().to(device="cpu", dtype=torch.float64).numpy()
        energies = np.full(len(positions), np.nan)
        slopes = np.full(positions.shape if forces else (0,), np.nan)
        for i, configuration in enumerate(positions):
            if not np.isfinite(configuration).all():
                continue
            if boxes is not None:
                self._context.setPeriodicBoxVectors(*boxes[i])
            self._context.setPositions(configuration)
            try:
                state = self._context.getState(energy=True, forces=forces)
            except openmm.OpenMMException:  # "Particle coordinate is NaN" and its kin: no energy, not a crash
                continue
            energies[i] = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
            if forces:
                slopes[i] = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
        device = x.positions.device
        return torch.from_numpy(energies).to(device), torch.from_numpy(slopes).to(device)
