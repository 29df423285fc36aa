"""Generalised-Born parameters, read from OpenMM's CustomGBForce or GBSAOBCForce.

A CustomGBForce is a program in expressions. Those written by OpenMM's `implicit/{hct,obc1,obc2,gbn,gbn2}.xml` are
recognised term by term, with their constants taken from the text; any other expression is refused and quoted.
Models: HCT doi:10.1021/jp961710n, OBC doi:10.1002/prot.20033, GBn doi:10.1021/ct600085e, GBn2 doi:10.1021/ct3010485.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
import openmm
from openmm import unit

from longstride.errors import LongstrideError

COULOMB_CUSTOM = 138.935485  # the constant in the custom force's expressions
COULOMB_OBC = 138.93545764438198  # the one of GBSAOBCForce
NUMBER = r"[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?"


@dataclass(frozen=True, kw_only=True)
class NeckParameters:
    """I_neck = scale m0/(1 + 100 (r-d0)^2 + 3e5 (r-d0)^6) where r <= rho_i + rho_j + reach. d0, m0 [atom, atom]."""

    d0: np.ndarray
    m0: np.ndarray
    scale: float
    reach: float


@dataclass(frozen=True, kw_only=True)
class BornParameters:
    """One generalised-Born model bound to its atoms.

    Attributes:
        charge: [atom] e.
        radius: [atom] nm, intrinsic radius rho minus the offset.
        scaled: [atom] nm, offset radius times the screening factor.
        rho: [atom] nm.
        series: [atom, 3], alpha, beta, gamma of 1/B = 1/radius - tanh(alpha psi - beta psi^2 + gamma psi^3)/rho,
            psi = I radius; None for HCT, 1/B = 1/radius - I.
        tension: [atom] kJ/mol, the surface energy is tension (rho/B)^6; None without a surface term.
        neck: GBn neck correction or None.
        coulomb: prefactor in kJ nm/(mol e^2).
        solute, solvent: dielectric constants.
        kappa: Debye screening in 1/nm; 0 for none.
        cutoff: nm, or None. Pairs beyond it neither screen nor interact.
        shift: the pair energy is proportional to 1/f - shift, 1/nm.
        engulf: add the term for an atom that lies wholly inside another (GBSAOBCForce has it, the custom forces not).
    """

    charge: np.ndarray
    radius: np.ndarray
    scaled: np.ndarray
    rho: np.ndarray
    series: np.ndarray | None
    tension: np.ndarray | None
    coulomb: float
    solute: float
    solvent: float
    neck: NeckParameters | None = None
    kappa: float = 0.0
    cutoff: float | None = None
    shift: float = 0.0
    engulf: bool = False


@dataclass(frozen=True)
class _Expression:
    """An expression split into its value and its definitions, white space removed."""

    text: str
    value: str = field(init=False)
    definitions: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        value, *rest = [part for part in re.sub(r"\s", "", self.text).split(";") if part]
        object.__setattr__(self, "value", value)
        object.__setattr__(self, "definitions", dict(part.split("=", 1) for part in rest))

    def number(self, name: str) -> float:
        if not re.fullmatch(NUMBER, self.definitions.get(name, "")):
            raise _unknown(self.text, f"{name} is not a number")
        return float(self.definitions[name])

    def require(self, **expected: str) -> None:
        """Check that names are defined exactly so."""
        for name, text in expected.items():
            if self.definitions.get(name) != text:
                raise _unknown(self.text, f"{name} is not {text}")


def _unknown(text: str, reason: str) -> LongstrideError:
    return LongstrideError(
        f"CustomGBForce expression not recognised ({reason}): {' '.join(text.split())!r};"
        " use one of OpenMM's implicit/*.xml, or evaluate this system with OpenMMPotential"
    )


DESCREENING = "select(step(r+sr2-or1),0.5*(1/L-1/U+0.25*(r-sr2^2/r)*(1/(U^2)-1/(L^2))+0.5*log(L/U)/r),0)"
DESCREENING_PARTS = {"U": "r+sr2", "L": "max(or1,D)", "D": "abs(r-sr2)"}
NECK = "step(radius1+radius2+neckCut-r)*getm0(radindex1,radindex2)/(1+100*(r-getd0(radindex1,radindex2))^2"
NECK += "+0.3*1000000*(r-getd0(radindex1,radindex2))^6)"
SERIES = re.compile(
    rf"1/\(1/or-tanh\((?:(?P<alpha>{NUMBER}|alpha)\*)?psi(?:-(?P<beta>{NUMBER}|beta)\*psi\^2)?"
    rf"\+(?P<gamma>{NUMBER}|gamma)\*psi\^3\)/radius\)"
)
SELF = "-0.5*138.935485*(1/soluteDielectric-{salt}/solventDielectric)*charge^2/B"
SURFACE = "28.3919551*(radius+0.14)^2*(radius/B)^6"
PAIR = "-138.935485*(1/soluteDielectric-{salt}/solventDielectric)*charge1*charge2"
PAIR_DISTANCE = "sqrt(r^2+B1*B2*exp(-r^2/(4*B1*B2)))"


def read_custom_gb(force: openmm.CustomGBForce) -> BornParameters:
    """Read the CustomGBForce of OpenMM's implicit solvent files.

    Raises:
        LongstrideError: an expression, function or method other than those; the message quotes it.
    """
    methods = {openmm.CustomGBForce.NoCutoff: False, openmm.CustomGBForce.CutoffNonPeriodic: True}
    if force.getNonbondedMethod() not in methods:
        raise LongstrideError("CustomGBForce is periodic; AmberPotential handles isolated molecules only")
    if force.getNumExclusions() or force.getNumGlobalParameters():
        raise LongstrideError("CustomGBForce has exclusions or global parameters, which no OpenMM implicit solvent file makes")
    cutoff = force.getCutoffDistance().value_in_unit(unit.nanometer) if methods[force.getNonbondedMethod()] else None
    names = [force.getPerParticleParameterName(i) for i in range(force.getNumPerParticleParameters())]
    rows = np.array([force.getParticleParameters(i) for i in range(force.getNumParticles())], dtype=np.float64)
    atoms = dict(zip(names, rows.T, strict=True))
    if not {"charge", "or", "sr"} <= atoms.keys():
        raise LongstrideError(f"CustomGBForce has per-particle parameters {names}, expected charge, or, sr")
    neck, offset, series = _read_radii(force, atoms)
    return BornParameters(
        charge=atoms["charge"],
        radius=atoms["or"],
        scaled=atoms["sr"],
        rho=atoms["or"] + offset,
        series=series,
        neck=neck,
        coulomb=COULOMB_CUSTOM,
        cutoff=cutoff,
        **_read_energy_terms(force, atoms["or"]),
    )


def _read_radii(
    force: openmm.CustomGBForce, atoms: dict[str, np.ndarray]
) -> tuple[NeckParameters | None, float, np.ndarray | None]:
    """Recognise the two computed values: the integral I and the Born radius B."""
    values = [force.getComputedValueParameters(i) for i in range(force.getNumComputedValues())]
    kinds = [("I", openmm.CustomGBForce.ParticlePairNoExclusions), ("B", openmm.CustomGBForce.SingleParticle)]
    if [(name, kind) for name, _, kind in values] != kinds:
        raise _unknown("; ".join(text for _, text, _ in values) or "(none)", "expected the computed values I and B")
    integral, born = _Expression(values[0][1]), _Expression(values[1][1])
    neck = None
    if integral.value == "Ivdw+neckScale*Ineck":
        integral.require(Ivdw=DESCREENING, Ineck=NECK, radius1="or1+offset", radius2="or2+offset", **DESCREENING_PARTS)
        neck = NeckParameters(
            d0=_table(force, "getd0", atoms),
            m0=_table(force, "getm0", atoms),
            scale=integral.number("neckScale"),
            reach=integral.number("neckCut"),
        )
    elif integral.value == DESCREENING:
        integral.require(**DESCREENING_PARTS)
    else:
        raise _unknown(integral.text, "not a known descreening integral")
    if born.value == "1/(1/or-I)":
        return neck, 0.009, None
    match = SERIES.fullmatch(born.value)
    if match is None:
        raise _unknown(born.text, "not a known Born radius")
    born.require(psi="I*or", radius="or+offset")
    if neck is not None and integral.number("offset") != born.number("offset"):
        raise _unknown(integral.text, "two different offsets")
    return neck, born.number("offset"), _series(match, atoms)


def _series(match: re.Match[str], atoms: dict[str, np.ndarray]) -> np.ndarray:
    columns = []
    for name, default in (("alpha", "1"), ("beta", "0"), ("gamma", "0")):
        text = match.group(name) or default
        columns.append(atoms[name] if text == name else np.full(len(atoms["or"]), float(text)))
    return np.stack(columns, axis=1)


def _table(force: openmm.CustomGBForce, name: str, atoms: dict[str, np.ndarray]) -> np.ndarray:
    """Expand a tabulated function of two radius indices into [atom, atom]."""
    for k in range(force.getNumTabulatedFunctions()):
        if force.getTabulatedFunctionName(k) == name:
            width, height, values = force.getTabulatedFunction(k).getFunctionParameters()
            index = atoms["radindex"].astype(np.int64)
            return np.array(values, dtype=np.float64).reshape(height, width).T[index[:, None], index[None, :]]
    raise LongstrideError(f"CustomGBForce has no tabulated function {name!r}, which its expression uses")


def _read_energy_terms(force: openmm.CustomGBForce, radius: np.ndarray) -> dict:
    """Recognise the energy terms: polarisation of each atom and pair, and optionally the surface."""
    single, paired = openmm.CustomGBForce.SingleParticle, openmm.CustomGBForce.ParticlePairNoExclusions
    found: dict[str, object] = {"tension": None}
    seen = []
    for i in range(force.getNumEnergyTerms()):
        text, kind = force.getEnergyTermParameters(i)
        term = _Expression(text)
        if kind == single and term.value == SURFACE:
            term.require(radius="or+offset")
            found["tension"] = 28.3919551 * (radius + term.number("offset") + 0.14) ** 2
            seen.append("surface")
        elif kind == single and term.value in (SELF.format(salt="1"), SELF.format(salt="exp(-kappa*B)")):
            _merge(found, _dielectric(term, salt="exp(" in term.value), text)
            seen.append("self")
        elif kind == paired and (shift := _pair_shift(term)) is not None:
            term.require(f=PAIR_DISTANCE)
            _merge(found, {**_dielectric(term, salt="exp(-kappa*f)" in term.value), "shift": shift}, text)
            seen.append("pair")
        else:
            raise _unknown(text, "not a known energy term")
    if sorted(seen) not in (["pair", "self"], ["pair", "self", "surface"]):
        raise _unknown(" | ".join(seen), "expected one self term, one pair term and at most one surface term")
    return found


def _merge(found: dict[str, object], values: dict[str, float], text: str) -> None:
    for name, value in values.items():
        if found.setdefault(name, value) != value:
            raise _unknown(text, f"{name} differs between two energy terms")


def _dielectric(term: _Expression, *, salt: bool) -> dict[str, float]:
    return {
        "solute": term.number("soluteDielectric"),
        "solvent": term.number("solventDielectric"),
        "kappa": term.number("kappa") if salt else 0.0,
    }


def _pair_shift(term: _Expression) -> float | None:
    """Return the constant subtracted from 1/f in a pair term, or None if this is not one."""
    for salt in ("1", "exp(-kappa*f)"):
        head = PAIR.format(salt=salt)
        if term.value == head + "/f":
            return 0.0
        match = re.fullmatch(re.escape(head) + rf"\*\(1/f-({NUMBER})\)", term.value)
        if match:
            return float(match.group(1))
    return None


def read_gbsa_obc(force: openmm.GBSAOBCForce) -> BornParameters:
    """Read a GBSAOBCForce (OBC II with probe radius 0.14 nm, as in OpenMM's older `*_obc.xml` files)."""
    methods = {openmm.GBSAOBCForce.NoCutoff: False, openmm.GBSAOBCForce.CutoffNonPeriodic: True}
    if force.getNonbondedMethod() not in methods:
        raise LongstrideError("GBSAOBCForce is periodic; AmberPotential handles isolated molecules only")
    cutoff = force.getCutoffDistance().value_in_unit(unit.nanometer) if methods[force.getNonbondedMethod()] else None
    rows = [force.getParticleParameters(i) for i in range(force.getNumParticles())]
    charge, rho, screen = np.array(
        [[v.value_in_unit_system(unit.md_unit_system) for v in row[:2]] + [row[2]] for row in rows]
    ).T
    surface = force.getSurfaceAreaEnergy().value_in_unit(unit.kilojoule_per_mole / unit.nanometer**2)
    return BornParameters(
        charge=charge,
        radius=rho - 0.009,
        scaled=screen * (rho - 0.009),
        rho=rho,
        series=np.tile([1.0, 0.8, 4.85], (len(rho), 1)),
        tension=4 * np.pi * surface * (rho + 0.14) ** 2,
        coulomb=COULOMB_OBC,
        solute=force.getSoluteDielectric(),
        solvent=force.getSolventDielectric(),
        cutoff=cutoff,
        shift=1 / cutoff if cutoff else 0.0,
        engulf=True,
    )
