"""Everything an AMBER-type energy needs, read from the forces of an OpenMM System.

The OpenMM System is the single source of parameters, so that data made with OpenMM and energies evaluated in
torch belong to one target distribution. What is not recognised is refused by name, never ignored.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import openmm
from openmm import unit

from longstride.errors import LongstrideError
from longstride.potentials.born_parameters import BornParameters, read_custom_gb, read_gbsa_obc

if TYPE_CHECKING:
    from collections.abc import Callable

COULOMB = 138.93545764438198  # 1/(4 pi epsilon_0) in kJ nm/(mol e^2), the value OpenMM's NonbondedForce uses
HINT = "use a force field without it, or evaluate this system with OpenMMPotential"


@dataclass(frozen=True, kw_only=True)
class BondParameters:
    """E = k/2 (r - length)^2. atoms [bond, 2]; length [bond] nm; k [bond] kJ/mol/nm^2."""

    atoms: np.ndarray
    length: np.ndarray
    k: np.ndarray


@dataclass(frozen=True, kw_only=True)
class AngleParameters:
    """E = k/2 (theta - angle)^2. atoms [angle, 3]; angle [angle] rad; k [angle] kJ/mol/rad^2."""

    atoms: np.ndarray
    angle: np.ndarray
    k: np.ndarray


@dataclass(frozen=True, kw_only=True)
class TorsionParameters:
    """E = sum_n cosine[n] cos(n phi) + sine[n] sin(n phi); all terms on the same four atoms are merged.

    atoms [torsion, 4]; cosine and sine [torsion, n_max + 1] kJ/mol.
    """

    atoms: np.ndarray
    cosine: np.ndarray
    sine: np.ndarray


@dataclass(frozen=True, kw_only=True)
class MapParameters:
    """Correction maps E(phi, psi) as bicubic patches.

    first, second [term, 4]: atoms of the two torsions; index [term]: which map; patches [map, size, size, 4, 4]:
    E = sum_mn patches[map, i, j, m, n] u^m v^n with u, v in radians from the corner of patch (i, j).
    """

    first: np.ndarray
    second: np.ndarray
    index: np.ndarray
    patches: np.ndarray


@dataclass(frozen=True, kw_only=True)
class NonbondedParameters:
    """Pairs: E = qq (1/r + k_rf r^2 - c_rf) + a/r^12 - b/r^6 within the cutoff; exceptions without cutoff or field.

    pairs [pair, 2] is the whole upper triangle (parameters zero where an exception replaces the pair); qq, a, b
    [pair]; exceptions [exception, 2] with exception_qq, exception_a, exception_b [exception]. cutoff None: no cutoff.
    switch: Lennard-Jones switching distance or None.
    """

    pairs: np.ndarray
    qq: np.ndarray
    a: np.ndarray
    b: np.ndarray
    exceptions: np.ndarray
    exception_qq: np.ndarray
    exception_a: np.ndarray
    exception_b: np.ndarray
    cutoff: float | None
    switch: float | None
    k_rf: float
    c_rf: float


@dataclass(frozen=True, kw_only=True)
class AmberParameters:
    """All terms of one OpenMM System; a term the System does not have is None."""

    n_atoms: int
    bonds: BondParameters | None
    angles: AngleParameters | None
    torsions: TorsionParameters | None
    maps: MapParameters | None
    nonbonded: NonbondedParameters | None
    born: BornParameters | None


def read_parameters(openmm_system: openmm.System) -> AmberParameters:
    """Read every force of an OpenMM System.

    Raises:
        LongstrideError: a force, method or expression that is not supported (named), constraints, virtual sites,
            or two forces of one kind.
    """
    _check_system(openmm_system)
    found: dict[str, object] = {}
    for force in openmm_system.getForces():
        if isinstance(force, openmm.CMMotionRemover):
            continue
        kind, reader = _reader(force)
        if kind in found:
            raise LongstrideError(f"the OpenMM System has two forces of the kind {force.getName()!r}: {HINT}")
        found[kind] = reader(force)
    kinds = ("bonds", "angles", "torsions", "maps", "nonbonded", "born")
    return AmberParameters(n_atoms=openmm_system.getNumParticles(), **{kind: found.get(kind) for kind in kinds})  # type: ignore[arg-type]


def _reader(force: openmm.Force) -> tuple[str, Callable[..., object]]:
    readers: dict[type, tuple[str, Callable[..., object]]] = {
        openmm.HarmonicBondForce: ("bonds", read_bonds),
        openmm.HarmonicAngleForce: ("angles", read_angles),
        openmm.PeriodicTorsionForce: ("torsions", read_torsions),
        openmm.CMAPTorsionForce: ("maps", read_maps),
        openmm.NonbondedForce: ("nonbonded", read_nonbonded),
        openmm.CustomGBForce: ("born", read_custom_gb),
        openmm.GBSAOBCForce: ("born", read_gbsa_obc),
    }
    if type(force) not in readers:
        kind = type(force).__name__
        label = kind if force.getName() == kind else f"{kind} {force.getName()!r}"
        raise LongstrideError(f"force {label} is not supported by AmberPotential: {HINT}")
    return readers[type(force)]


def _check_system(openmm_system: openmm.System) -> None:
    if openmm_system.usesPeriodicBoundaryConditions():
        raise LongstrideError("AmberPotential handles isolated molecules, but this OpenMM System is periodic: " + HINT)
    if openmm_system.getNumConstraints():
        raise LongstrideError("the OpenMM System has constraints; make it with constraints=None and rigidWater=False")
    virtual = [i for i in range(openmm_system.getNumParticles()) if openmm_system.isVirtualSite(i)]
    if virtual:
        raise LongstrideError(f"particle {virtual[0]} is a virtual site, which AmberPotential does not support: {HINT}")


def _plain(values: list) -> list:
    """Strip OpenMM's units (nm, ps, Da, kJ/mol, rad, e)."""
    return [v.value_in_unit_system(unit.md_unit_system) if unit.is_quantity(v) else v for v in values]


def _columns(rows: list[list], atoms: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Split rows into the atom indices [row, atoms] and the remaining columns as float64."""
    index = np.array([row[:atoms] for row in rows], dtype=np.int64).reshape(-1, atoms)
    width = len(rows[0]) - atoms
    return index, [np.array([row[atoms + k] for row in rows], dtype=np.float64) for k in range(width)]


def read_bonds(force: openmm.HarmonicBondForce) -> BondParameters | None:
    """Read a HarmonicBondForce; None if it is empty."""
    rows = [_plain(force.getBondParameters(i)) for i in range(force.getNumBonds())]
    if not rows:
        return None
    atoms, (length, k) = _columns(rows, 2)
    return BondParameters(atoms=atoms, length=length, k=k)


def read_angles(force: openmm.HarmonicAngleForce) -> AngleParameters | None:
    """Read a HarmonicAngleForce; None if it is empty."""
    rows = [_plain(force.getAngleParameters(i)) for i in range(force.getNumAngles())]
    if not rows:
        return None
    atoms, (angle, k) = _columns(rows, 3)
    return AngleParameters(atoms=atoms, angle=angle, k=k)


def read_torsions(force: openmm.PeriodicTorsionForce) -> TorsionParameters | None:
    """Read a PeriodicTorsionForce as Fourier series; None if it is empty.

    k (1 + cos(n phi - phase)) = k + k cos(phase) cos(n phi) + k sin(phase) sin(n phi). A torsion read backwards is
    the same angle, so both directions are merged.
    """
    rows = [_plain(force.getTorsionParameters(i)) for i in range(force.getNumTorsions())]
    if not rows:
        return None
    n_max = max(int(row[4]) for row in rows)
    cosine: dict[tuple[int, ...], np.ndarray] = {}
    sine: dict[tuple[int, ...], np.ndarray] = {}
    for *indices, n, phase, k in rows:
        atoms = tuple(indices) if indices[0] < indices[3] else tuple(reversed(indices))
        for series in (cosine, sine):
            series.setdefault(atoms, np.zeros(n_max + 1))
        cosine[atoms][0] += k
        cosine[atoms][n] += k * np.cos(phase)
        # a phase of pi leaves 1e-16, which would cost a whole sine series
        sine[atoms][n] += k * np.sin(phase) if abs(np.sin(phase)) > 1e-12 else 0.0
    return TorsionParameters(
        atoms=np.array(list(cosine), dtype=np.int64),
        cosine=np.array(list(cosine.values())),
        sine=np.array(list(sine.values())),
    )


def read_maps(force: openmm.CMAPTorsionForce) -> MapParameters | None:
    """Read a CMAPTorsionForce; None if it is empty. All maps must have one size.

    Each map is a periodic cubic spline along both angles, which is the bicubic interpolation OpenMM uses.
    """
    from scipy.interpolate import CubicSpline

    rows = [force.getTorsionParameters(i) for i in range(force.getNumTorsions())]
    if not rows:
        return None
    grids = [_plain(force.getMapParameters(i)) for i in range(force.getNumMaps())]
    sizes = {int(size) for size, _ in grids}
    if len(sizes) > 1:
        raise LongstrideError(
            f"CMAPTorsionForce mixes map sizes {sorted(sizes)}, which AmberPotential does not support: {HINT}"
        )
    (size,) = sizes
    knots = np.arange(size + 1) * (2 * np.pi / size)
    patches = []
    for _, values in grids:
        grid = np.array(_plain(list(values))).reshape(size, size).T  # [phi, psi]; OpenMM lets phi vary fastest
        closed = np.pad(grid, ((0, 1), (0, 1)), mode="wrap")
        along_phi = CubicSpline(knots, closed, bc_type="periodic", axis=0).c  # [power, patch, psi], highest power first
        both = CubicSpline(knots, along_phi, bc_type="periodic", axis=2).c  # [power psi, patch psi, power phi, patch phi]
        patches.append(both[::-1, :, ::-1].transpose(3, 1, 2, 0))
    table = np.array(rows, dtype=np.int64)
    return MapParameters(first=table[:, 1:5], second=table[:, 5:9], index=table[:, 0], patches=np.array(patches))


def read_nonbonded(force: openmm.NonbondedForce) -> NonbondedParameters:
    """Read a NonbondedForce with NoCutoff or CutoffNonPeriodic.

    Reaction field (doi:10.1063/1.469273 in OpenMM's form): k_rf = (eps - 1)/(2 eps + 1)/cutoff^3,
    c_rf = 3 eps/(2 eps + 1)/cutoff. OpenMM's implicit-solvent files set eps = 1: a plain shift.
    """
    methods = {openmm.NonbondedForce.NoCutoff: False, openmm.NonbondedForce.CutoffNonPeriodic: True}
    if force.getNonbondedMethod() not in methods:
        raise LongstrideError("NonbondedForce is periodic; AmberPotential knows NoCutoff and CutoffNonPeriodic: " + HINT)
    if force.getNumParticleParameterOffsets() or force.getNumExceptionParameterOffsets():
        raise LongstrideError(f"NonbondedForce has parameter offsets, which AmberPotential does not support: {HINT}")
    cut = methods[force.getNonbondedMethod()]
    cutoff = force.getCutoffDistance().value_in_unit(unit.nanometer) if cut else None
    eps = force.getReactionFieldDielectric()
    exceptions = [_plain(force.getExceptionParameters(i)) for i in range(force.getNumExceptions())]
    return NonbondedParameters(
        **_pair_parameters(force, {(min(i, j), max(i, j)) for i, j, *_ in exceptions}),
        **_exception_parameters(exceptions),
        cutoff=cutoff,
        switch=force.getSwitchingDistance().value_in_unit(unit.nanometer) if cut and force.getUseSwitchingFunction() else None,
        k_rf=(eps - 1) / (2 * eps + 1) / cutoff**3 if cutoff else 0.0,
        c_rf=3 * eps / (2 * eps + 1) / cutoff if cutoff else 0.0,
    )


def _pair_parameters(force: openmm.NonbondedForce, excepted: set[tuple[int, int]]) -> dict[str, np.ndarray]:
    """Lorentz-Berthelot pairs: sigma = (sigma_i + sigma_j)/2, epsilon = sqrt(epsilon_i epsilon_j)."""
    particles = np.array([_plain(force.getParticleParameters(i)) for i in range(force.getNumParticles())])
    pairs = np.array(list(itertools.combinations(range(len(particles)), 2)), dtype=np.int64).reshape(-1, 2)
    first, second = particles[pairs[:, 0]], particles[pairs[:, 1]]
    sigma, epsilon = (first[:, 1] + second[:, 1]) / 2, np.sqrt(first[:, 2] * second[:, 2])
    kept = np.array([tuple(pair) not in excepted for pair in pairs.tolist()], dtype=np.float64)
    a, b = 4 * epsilon * sigma**12, 4 * epsilon * sigma**6
    return {"pairs": pairs, "qq": COULOMB * first[:, 0] * second[:, 0] * kept, "a": a * kept, "b": b * kept}


def _exception_parameters(rows: list[list]) -> dict[str, np.ndarray]:
    """Keep the exceptions that have an interaction; those with zero charge product and epsilon are exclusions."""
    active = np.array([row for row in rows if row[2] != 0 or row[4] != 0], dtype=np.float64).reshape(-1, 5)
    qq, sigma, epsilon = active[:, 2], active[:, 3], active[:, 4]
    return {
        "exceptions": active[:, :2].astype(np.int64),
        "exception_qq": COULOMB * qq,
        "exception_a": 4 * epsilon * sigma**12,
        "exception_b": 4 * epsilon * sigma**6,
    }
