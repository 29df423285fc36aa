"""What a dynamics run is to the analysis: saved frames and the conditions that two runs must share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from longstride.errors import DataError, LongstrideError

if TYPE_CHECKING:
    import mdtraj

    from longstride.state import System


@dataclass(frozen=True, kw_only=True, eq=False)
class DynamicsRun:
    """Replicas of one system under one seed, as saved.

    Attributes:
        label: method and step, such as "mts 4 fs".
        target: label of the reference potential.
        seed: of the run.
        system: atomic numbers, bonds and names.
        masses: [atom] Da, those that moved (repartitioned or not).
        temperature_K: of the thermostat.
        friction_per_ps: Langevin friction, one number or [atom]; 0 is NVE.
        save_interval_ps: time between frames.
        positions: [frame, replica, atom, 3] nm; unwrapped in a box.
        velocities: [frame, replica, atom, 3] nm/ps or None. For temperatures those between O and the last kicks.
        potential_energy: [frame, replica] kJ/mol of the reference potential, or None.
        total_energy: [frame, replica] kJ/mol at full steps (for drift), or None.
        box: [3, 3] nm, rows are box vectors, or None.
        charges: [atom] e for the dipole, or None.
        dipoles: [frame, replica, 3] e nm of the reference, or None; preferred over charges.
        squared_gradient: [frame, replica] |grad U|^2 in (kJ/mol/nm)^2, or None.
        laplacian: [frame, replica] trace of the Hessian of U in kJ/mol/nm^2, or None.
    """

    label: str
    target: str
    seed: int
    system: System
    masses: np.ndarray
    temperature_K: float
    friction_per_ps: float | np.ndarray
    save_interval_ps: float
    positions: np.ndarray
    velocities: np.ndarray | None = None
    potential_energy: np.ndarray | None = None
    total_energy: np.ndarray | None = None
    box: np.ndarray | None = None
    charges: np.ndarray | None = None
    dipoles: np.ndarray | None = None
    squared_gradient: np.ndarray | None = None
    laplacian: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Check shapes and numbers once.

        Raises:
            DataError: a shape that does not fit, or numbers that are not finite.
        """
        shape = self.positions.shape
        if len(shape) != 4 or shape[2:] != (self.system.n_atoms, 3):
            raise DataError(f"{self.label}: positions have shape {shape}, expected [frame, replica, {self.system.n_atoms}, 3]")
        expected = {
            "velocities": shape, "potential_energy": shape[:2], "total_energy": shape[:2], "dipoles": (*shape[:2], 3),
            "squared_gradient": shape[:2], "laplacian": shape[:2], "masses": shape[2:3], "charges": shape[2:3], "box": (3, 3),
        }  # fmt: skip
        for name, wanted in expected.items():
            array = getattr(self, name)
            if array is not None and array.shape != wanted:
                raise DataError(f"{self.label}: {name} has shape {array.shape}, expected {wanted}")
        for name in ("positions", *expected):
            array = getattr(self, name)
            if array is not None and not np.isfinite(array).all():
                raise DataError(f"{self.label}, seed {self.seed}: {name} has NaN or infinite values; leave out what blew up")

    @property
    def n_frames(self) -> int:
        """Saved frames per replica."""
        return self.positions.shape[0]

    @property
    def n_replicas(self) -> int:
        """Replicas."""
        return self.positions.shape[1]

    @cached_property
    def elements(self) -> tuple[str, ...]:
        """Element symbol of each atom."""
        from ase.data import chemical_symbols

        return tuple(chemical_symbols[number] for number in self.system.atomic_numbers)

    @cached_property
    def topology(self) -> mdtraj.Topology:
        """The system as an MDTraj topology."""
        import mdtraj

        result = mdtraj.Topology()
        chain, residues = result.add_chain(), {}
        for i in range(self.system.n_atoms):
            index = int(self.system.residue_indices[i])
            if index not in residues:
                residues[index] = result.add_residue(self.system.residue_names[i], chain)
            element = mdtraj.element.Element.getBySymbol(self.elements[i])
            result.add_atom(self.system.atom_names[i], element, residues[index])
        atoms = list(result.atoms)
        for first, second in self.system.bonds:
            result.add_bond(atoms[first], atoms[second])
        return result

    def trajectory(self, positions: np.ndarray) -> mdtraj.Trajectory:
        """Return positions [frame, atom, 3] nm as an MDTraj trajectory with this run's box."""
        import mdtraj

        frames = mdtraj.Trajectory(np.ascontiguousarray(positions, dtype=np.float32), self.topology)
        if self.box is not None:
            frames.unitcell_vectors = np.broadcast_to(self.box.astype(np.float32), (len(positions), 3, 3)).copy()
        return frames

    @cached_property
    def molecules(self) -> np.ndarray:
        """[atom] int, which connected part of the bond graph an atom belongs to."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        bonds, n = self.system.bonds, self.system.n_atoms
        graph = coo_array((np.ones(len(bonds)), (bonds[:, 0], bonds[:, 1])), shape=(n, n))
        return connected_components(graph, directed=False)[1]

    def require_unwrapped(self) -> None:
        """Refuse positions that were folded back into the box.

        Raises:
            DataError: an atom moves by more than half a box vector between two frames.
        """
        if self.box is None or self.n_frames < 2:
            return
        inverse = np.linalg.inv(self.box)
        for replica in range(self.n_replicas):  # one replica at a time keeps the copy small
            jumps = np.abs(np.diff(self.positions[:, replica], axis=0) @ inverse)
            if jumps.max(initial=0.0) > 0.5:
                frame, atom, _ = np.unravel_index(int(jumps.argmax()), jumps.shape)
                raise DataError(
                    f"{self.label}: atom {atom} of replica {replica} jumps by {jumps.max():.2f} box vectors after frame"
                    f" {frame}; diffusion needs unwrapped positions, or frames saved more often"
                )


def thinned(run: DynamicsRun, step: int) -> DynamicsRun:
    """Return the run with every `step`-th frame, so that runs saved at other intervals share lags."""
    if step < 1:
        raise LongstrideError(f"the thinning step must be at least 1, not {step}")
    series = ("positions", "velocities", "potential_energy", "total_energy", "dipoles", "squared_gradient", "laplacian")
    parts = {name: getattr(run, name)[::step] for name in series if getattr(run, name) is not None}
    return replace(run, save_interval_ps=run.save_interval_ps * step, **parts)
