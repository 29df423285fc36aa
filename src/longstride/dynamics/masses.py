"""Hydrogen mass repartitioning: heavier hydrogens, lighter parents, the same equilibrium of positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from longstride.errors import LongstrideError

if TYPE_CHECKING:
    from longstride.state import System


def repartitioned_masses(system: System, hydrogen_mass: float | None) -> np.ndarray:
    """Return masses [atom] Da in which each hydrogen weighs `hydrogen_mass`, taken from the atom it is bonded to.

    The total mass is conserved and every average of positions alone is unchanged, since masses do not enter
    exp(-U/kT); velocities, spectra and diffusion do change. Source:
    doi:10.1002/(SICI)1096-987X(199906)20:8<786::AID-JCC5>3.0.CO;2-B.

    Args:
        system: molecule with its bond graph.
        hydrogen_mass: Da, or None for the masses as they are.

    Raises:
        LongstrideError: a hydrogen without exactly one bonded parent, or a parent that would end up no heavier than
            its hydrogens.
    """
    masses = np.array(system.masses, dtype=np.float64)
    if hydrogen_mass is None:
        return masses
    parents = hydrogen_parents(system)
    for hydrogen, parent in parents:
        moved = hydrogen_mass - system.masses[hydrogen]
        masses[hydrogen] += moved
        masses[parent] -= moved
    for hydrogen, parent in parents:
        if masses[parent] <= masses[hydrogen]:
            raise LongstrideError(
                f"hydrogen mass {hydrogen_mass:g} Da leaves {masses[parent]:.3g} Da for {system.atom_names[parent]} of residue"
                f" {system.residue_names[parent]}; parents must stay heavier than their hydrogens, use 3.024 Da or less"
            )
    return masses


def hydrogen_parents(system: System) -> list[tuple[int, int]]:
    """Return (hydrogen, parent) of every hydrogen that is bonded to a heavier atom.

    Raises:
        LongstrideError: a hydrogen with no bond or with several.
    """
    partners: dict[int, list[int]] = {atom: [] for atom in range(system.n_atoms) if system.atomic_numbers[atom] == 1}
    for first, second in system.bonds:
        for atom, other in ((int(first), int(second)), (int(second), int(first))):
            if atom in partners:
                partners[atom].append(other)
    for atom, others in partners.items():
        if len(others) != 1:
            raise LongstrideError(f"hydrogen {atom} ({system.atom_names[atom]}) has {len(others)} bonds; one parent is needed")
    # H2: two hydrogens bonded to each other have no heavy parent
    return [(atom, others[0]) for atom, others in partners.items() if others[0] not in partners]


def hydrogen_friction(system: System, friction_per_ps: float, hydrogen_friction_per_ps: float | None) -> np.ndarray:
    """Return the Langevin friction of every atom, [atom] 1/ps; hydrogens may have one of their own.

    Args:
        system: the molecule.
        friction_per_ps: of all other atoms.
        hydrogen_friction_per_ps: of hydrogens; None: as of the others.
    """
    if hydrogen_friction_per_ps is None:
        return np.full(system.n_atoms, float(friction_per_ps))
    return np.where(system.atomic_numbers == 1, float(hydrogen_friction_per_ps), float(friction_per_ps))
