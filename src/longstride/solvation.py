"""Periodic boxes: water around a molecule or alone, at the density of the liquid, and what a box must satisfy.

OpenMM's Modeller places the molecules. Its boxes are too wide (216 molecules: 1.9477 nm, 0.87 g/cm3), because it cuts them out
of a larger box; they are scaled to the density here and relaxed by `longstride.systems`.
"""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import openmm
from openmm import app, unit

from longstride.errors import LongstrideError
from longstride.state import half_width

if TYPE_CHECKING:
    from collections.abc import Iterator

WATER = "HOH"
EXPLICIT = ("amber14-all.xml", "amber14/tip3p.xml")
MIN_DISTANCE_NM = 0.05  # closer than any two bonded atoms (H2: 0.074 nm)
# average density of folded proteins, 1.35 g/cm3: doi:10.1110/ps.04688204
SOLUTE_VOLUME_CM3_PER_G = 1 / 1.35
WATER_DA = 18.015
_NM3_PER_CM3_MOL = 1e21 / 6.02214076e23


@dataclass(frozen=True, kw_only=True)
class Solvent:
    """Water to add; exactly one of `molecules` and `padding_nm` is given.

    Attributes:
        molecules: water molecules, the ions that replace some of them included.
        padding_nm: box edge less the diameter of the molecule (twice the largest distance from its middle), and at least
            half the edge.
        density: of the water, g/cm3.
    """

    molecules: int | None = None
    padding_nm: float | None = None
    density: float = 0.997


def require_explicit(files: tuple[str, ...], *, name: str) -> None:
    """Check that force field files are for explicit water.

    Raises:
        LongstrideError: one of them is an implicit solvent.
    """
    implicit = [file for file in files if "implicit" in file]
    if implicit:
        raise LongstrideError(
            f"{name!r} lies in explicit water, but physics.force_field names the implicit solvent {implicit[0]};"
            f" set physics.force_field: [{', '.join(EXPLICIT)}]"
        )


def add_water(modeller: app.Modeller, field: app.ForceField, solvent: Solvent, *, name: str) -> app.Modeller:
    """Return molecules in a cubic box of water, TIP3P geometry, scaled to the density, and neutral.

    Edge: L^3 = (m_water / rho + m_rest * 0.741 cm3/g) / N_A. Every water molecule moves as a whole, its centre by the
    factor of the edge; the other molecules keep their places relative to each other. What is too close after that is for a
    minimiser to mend. Sodium or chloride ions replace water only as far as the molecule is charged.

    Args:
        modeller: the molecules with all hydrogens; empty for a box of water.
        field: force field of the molecules and of water.
        solvent: how much water.
        name: label of the system for error messages.

    Raises:
        LongstrideError: the force field knows no water, or a molecule without a template.
    """
    result = app.Modeller(modeller.topology, modeller.positions)
    solute = modeller.topology.getNumAtoms()
    count = solvent.molecules or _molecules(modeller, solvent)
    try:
        with seeded_random():
            result.addSolvent(field, model="tip3p", neutralize=solute > 0, numAdded=count)
        field.createSystem(result.topology)  # the ions and the water have templates
    except (ValueError, KeyError, openmm.OpenMMException) as error:
        raise LongstrideError(
            f"cannot put {name!r} in water: {' '.join(str(error).split()).rstrip('.')}; the force field must know each residue,"
            f" water ({WATER}) and ions, as physics.force_field: [{', '.join(EXPLICIT)}] does"
        ) from error
    return _at_density(result, n_solute=solute, density=solvent.density)


def _molecules(modeller: app.Modeller, solvent: Solvent) -> int:
    """Return how many water molecules fill a box with the padding that is asked for, at the density; see `add_water`."""
    x = np.array(modeller.positions.value_in_unit(unit.nanometer), dtype=np.float64)
    padding, radius = solvent.padding_nm or 0.0, np.linalg.norm(x - _middle(x), axis=1).max()
    edge = max(2 * radius + padding, 2 * padding)
    solute = _masses(modeller.topology).sum()
    return max(1, round(solvent.density * (edge**3 / _NM3_PER_CM3_MOL - solute * SOLUTE_VOLUME_CM3_PER_G) / WATER_DA))


def _middle(x: np.ndarray) -> np.ndarray:
    return 0.5 * (x.min(axis=0) + x.max(axis=0))


def _masses(topology: app.Topology) -> np.ndarray:
    return np.array([atom.element.mass.value_in_unit(unit.dalton) for atom in topology.atoms()])


def _at_density(modeller: app.Modeller, *, n_solute: int, density: float) -> app.Modeller:
    """Return the system with its cubic box and the centres of its solvent molecules scaled; see `add_water`."""
    atoms = list(modeller.topology.atoms())
    masses = _masses(modeller.topology)
    volume = (masses[n_solute:].sum() / density + masses[:n_solute].sum() * SOLUTE_VOLUME_CM3_PER_G) * _NM3_PER_CM3_MOL
    edge = volume ** (1 / 3)
    x = np.array(modeller.positions.value_in_unit(unit.nanometer), dtype=np.float64)
    middle = _middle(x[:n_solute]) if n_solute else x.mean(axis=0)
    scale = edge / modeller.topology.getUnitCellDimensions().value_in_unit(unit.nanometer)[0]
    residues = np.array([atom.residue.index for atom in atoms])[n_solute:]
    _, group = np.unique(residues, return_inverse=True)
    counts = np.bincount(group)[:, None]
    centres = np.stack([np.bincount(group, weights=column) for column in x[n_solute:].T], axis=1) / counts
    x[n_solute:] += ((scale - 1) * (centres - middle))[group]
    x += edge / 2 - middle
    modeller.topology.setPeriodicBoxVectors(np.eye(3) * edge * unit.nanometer)
    return app.Modeller(modeller.topology, x * unit.nanometer)


def box_of(topology: app.Topology) -> np.ndarray | None:
    """Return the box vectors of a topology, [3, 3] nm (rows), or None."""
    vectors = topology.getPeriodicBoxVectors()
    return None if vectors is None else np.array(vectors.value_in_unit(unit.nanometer), dtype=np.float64)


def check_cutoff(box: np.ndarray, cutoff_nm: float | None, *, name: str) -> None:
    """Check that the cutoff of a periodic system fits its box.

    Args:
        box: [3, 3] nm.
        cutoff_nm: of the direct sum.
        name: label of the system for error messages.

    Raises:
        LongstrideError: no cutoff, or the box is smaller than twice the cutoff.
    """
    largest = half_width(box)
    # rounded down, so that the advice passes this check
    advice = f"set physics.cutoff_nm to {np.floor(100 * largest) / 100:.2f} or less, or take more water"
    if cutoff_nm is None:
        raise LongstrideError(f"{name!r} lies in a periodic box and needs a cutoff; {advice}")
    if cutoff_nm > largest:
        raise LongstrideError(
            f"the box of {name!r} ({2 * largest:.3f} nm) is smaller than twice the cutoff of {cutoff_nm:g} nm; {advice}"
        )


def check_overlap(
    topology: app.Topology, x: np.ndarray, *, box: np.ndarray | None, source: str, shortest_nm: float = MIN_DISTANCE_NM
) -> None:
    """Check that no two atoms lie on top of each other, periodic images included.

    Args:
        topology: of the atoms.
        x: [atom, 3] nm.
        box: [3, 3] nm, rectangular, or None.
        source: file or label for error messages.
        shortest_nm: the smallest distance that passes.

    Raises:
        LongstrideError: a coordinate is not finite, or atoms overlap; the closest pair is named.
    """
    from scipy.spatial import cKDTree

    if not np.isfinite(x).all():
        raise LongstrideError(f"{source}: {_atom(topology, int(np.argmin(np.isfinite(x).all(axis=1))))} has no finite position")
    edges = None if box is None else np.diag(box)
    # a coordinate just below zero wraps to the edge itself, which the tree refuses
    inside = x if edges is None else np.where(x % edges < edges, x % edges, 0.0)
    tree = cKDTree(inside, boxsize=edges)
    pairs = tree.query_pairs(shortest_nm, output_type="ndarray")
    if len(pairs) == 0:
        return
    gap = inside[pairs[:, 0]] - inside[pairs[:, 1]]
    if edges is not None:
        gap -= edges * np.round(gap / edges)
    distances = np.linalg.norm(gap, axis=1)
    first, second = pairs[distances.argmin()]
    raise LongstrideError(
        f"{source}: {_atom(topology, int(first))} and {_atom(topology, int(second))} overlap ({distances.min():.4f} nm apart,"
        f" {shortest_nm:g} nm is the least); move one of them or remove the copy"
    )


def check_apart(topology: app.Topology, x: np.ndarray, other: np.ndarray, *, source: str, shortest_nm: float) -> None:
    """Check that the atoms `other` are nowhere inside the rest of a molecule.

    Args:
        topology: of all atoms.
        x: [atom, 3] nm.
        other: [atom] bool, the second molecule.
        source: file of the second molecule, for error messages.
        shortest_nm: the smallest distance that passes.

    Raises:
        LongstrideError: atoms of the two molecules are closer; the closest pair is named.
    """
    from scipy.spatial import cKDTree

    rest, mine = np.flatnonzero(~other), np.flatnonzero(other)
    distances, nearest = cKDTree(x[rest]).query(x[mine])
    at = int(distances.argmin())
    if distances[at] < shortest_nm:
        raise LongstrideError(
            f"{source}: {_atom(topology, int(mine[at]))} and {_atom(topology, int(rest[nearest[at]]))} overlap"
            f" ({distances[at]:.4f} nm apart, {shortest_nm:g} nm is the least between two molecules); dock the ligand anew, in"
            " the frame of the other file"
        )


def _atom(topology: app.Topology, index: int) -> str:
    atom = next(atom for atom in topology.atoms() if atom.index == index)
    return f"atom {index + 1} ({atom.residue.name} {atom.residue.id} {atom.name})"


@contextlib.contextmanager
def seeded_random() -> Iterator[None]:
    """Give Modeller's random choices (initial hydrogens, places of ions) a fixed stream, and leave the global one untouched."""
    saved = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(saved)
