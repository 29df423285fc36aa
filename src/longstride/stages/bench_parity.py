"""Parity of the batched force field with OpenMM over many peptides and several solvents.

Each molecule is prepared as `longstride prepare` does, its batched potential is made from its OpenMM System, and both
evaluate the minimised structure and distortions of it, x + 0.01 nm times normal noise, in double precision (OpenMM: the
Reference platform). Relative errors of a molecule are the largest over its configurations:

    energies   |E - E'| / max(1 kJ/mol, |E'|)
    forces     max_a |F_a - F'_a| / sqrt(mean_a |F'_a|^2), over the atoms a of a configuration

with E', F' those of OpenMM. The second is stricter than a ratio of norms: an error on one atom is not averaged away. At the
minimum large forces cancel, so that a small error of any term shows.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import yaml

from longstride.config import PhysicsConfig, validate
from longstride.errors import ConfigError, LongstrideError, NumericsError
from longstride.potentials.amber import AmberPotential
from longstride.progress import Progress
from longstride.provenance import provenance
from longstride.stages.bench import parity, prepared
from longstride.systems import ONE_LETTER, parse_sequence

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from longstride.systems import Prepared

BARS = {"energies": 1e-6, "forces": 1e-5}
DEFINITIONS = {
    "energies": "|dE| / max(1 kJ/mol, |E|), largest of all configurations",
    "forces": "largest |dF| of an atom / rms |F| of all atoms, largest of all configurations",
}
CONFIGURATIONS, NOISE_NM = 4, 0.01  # the first configuration is the minimised structure itself
CAPPED = tuple(f"ACE-{name}-NME" for name in ONE_LETTER.values())
DIPEPTIDES = tuple(first + second for first in ONE_LETTER for second in ONE_LETTER)
# the first five hold each amino acid once, the others repeats, both signs of charge, and the extremes of size
TETRAPEPTIDES = ("ACDE", "FGHI", "KLMN", "PQRS", "TVWY", "WRKY", "RDEK", "PPPP", "GGGG", "WWWW")
FORCE_FIELD = "amber14-all.xml"
BORN_MODELS = ("hct", "obc1", "obc2", "gbn", "gbn2")
SHORT_CUTOFF_NM = 0.6  # shorter than the capped residues, so that pairs fall on both sides
QUICK = {"capped residues": 2, "dipeptides": 2, "tetrapeptides": 1}  # molecules of each group, one of every other


@dataclass(frozen=True, kw_only=True)
class Group:
    """Molecules in one physics.

    Attributes:
        name: in the results.
        sequences: the molecules.
        physics: force field files and cutoff.
    """

    name: str
    sequences: tuple[str, ...]
    physics: PhysicsConfig


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Errors of one molecule, as the module defines them.

    Attributes:
        sequence: the molecule.
        atoms: how many.
        errors: relative errors of "energies" and "forces".
    """

    sequence: str
    atoms: int
    errors: dict[str, float]


def all_groups(dipeptides: Sequence[str] = DIPEPTIDES) -> tuple[Group, ...]:
    """Return everything that is compared: peptides in the default physics, and capped residues in each solvent."""
    default = validate({}).physics
    solvents = {name: PhysicsConfig(force_field=(FORCE_FIELD, f"implicit/{name}.xml"), cutoff_nm=None) for name in BORN_MODELS}
    solvents["vacuum"] = PhysicsConfig(force_field=(FORCE_FIELD,), cutoff_nm=None)
    # without a solvent model OpenMM's reaction field has the dielectric constant of water
    solvents["reaction field"] = PhysicsConfig(force_field=(FORCE_FIELD,), cutoff_nm=SHORT_CUTOFF_NM)
    solvents["obc1 with cutoff"] = PhysicsConfig(force_field=(FORCE_FIELD, "implicit/obc1.xml"), cutoff_nm=SHORT_CUTOFF_NM)
    return (
        Group(name="capped residues", sequences=CAPPED, physics=default),
        Group(name="dipeptides", sequences=tuple(dipeptides), physics=default),
        Group(name="tetrapeptides", sequences=TETRAPEPTIDES, physics=default),
        *(Group(name=name, sequences=CAPPED, physics=physics) for name, physics in solvents.items()),
    )


def a_few(groups: Sequence[Group]) -> tuple[Group, ...]:
    """Return the first molecules of each group, which takes seconds instead of many minutes."""
    return tuple(replace(group, sequences=group.sequences[: QUICK.get(group.name, 1)]) for group in groups)


def read_list(path: Path) -> tuple[str, ...]:
    """Return all sequences of a YAML file of lists, such as a split into train, val and test; each once.

    Raises:
        ConfigError: unreadable, not lists of sequences, or an unknown residue.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the list of peptides {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    lists = list(values.values()) if isinstance(values, dict) else []
    sequences = [item for found in lists if isinstance(found, list) for item in found]
    if not sequences or not all(isinstance(found, list) for found in lists) or not all(isinstance(s, str) for s in sequences):
        raise ConfigError(f"{path} must hold lists of sequences under names, such as train: [AA, AV]")
    for sequence in sequences:
        try:
            parse_sequence(sequence)
        except LongstrideError as error:
            raise ConfigError(f"{path}: {error}") from error
    return tuple(dict.fromkeys(sequences))


def compare(groups: Sequence[Group]) -> dict[str, Any]:
    """Compare all molecules of all groups.

    Returns:
        JSON values: for each group the number of molecules and atoms, the largest error of `energies` and of `forces` with its
        molecule, and whether all are below the bars; the bars, their definitions, provenance.

    Raises:
        LongstrideError: a molecule cannot be prepared or evaluated.
        NumericsError: an energy or force is not finite.
    """
    began, origin = time.perf_counter(), provenance()
    progress = Progress("bench parity", sum(len(group.sequences) for group in groups), "molecules")
    done, found = 0, {}
    for group in groups:
        measured = []
        for sequence in group.sequences:
            measured.append(errors_of(sequence, group))
            done += 1
            progress.update(done, f"{group.name} {sequence}")
        found[group.name] = summary(group, measured)
    return {
        "bars": BARS,
        "definitions": DEFINITIONS,
        "reference": "OpenMM Reference platform, double precision",
        "configurations_per_molecule": CONFIGURATIONS,
        "noise_nm": NOISE_NM,
        "groups": found,
        "molecules": done,
        "passed": all(group["passed"] for group in found.values()),
        "wall_s": time.perf_counter() - began,
        "provenance": origin,
    }


def errors_of(sequence: str, group: Group) -> Measured:
    """Return the errors of one molecule in a group's physics.

    Raises:
        NumericsError: an energy or force is not finite.
    """
    molecule = prepared(sequence, group.physics)
    found = parity(batched(molecule), molecule.openmm_system, configurations(molecule))
    errors = {"energies": found["max_relative_energy_error"], "forces": found["max_relative_force_error_of_an_atom"]}
    if not all(math.isfinite(error) for error in errors.values()):
        raise NumericsError(f"{sequence} ({group.name}): an energy or a force is not finite")
    return Measured(sequence=sequence, atoms=molecule.system.n_atoms, errors=errors)


def batched(molecule: Prepared) -> AmberPotential:
    """Return the potential that is under test."""
    return AmberPotential.from_openmm(molecule.openmm_system, molecule.system, name=molecule.target)


def configurations(molecule: Prepared) -> torch.Tensor:
    """Return the minimised structure and distortions of it, [configuration, atom, 3] nm."""
    x = torch.from_numpy(molecule.positions).repeat(CONFIGURATIONS, 1, 1)
    x[1:] += NOISE_NM * torch.randn(x[1:].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x


def summary(group: Group, measured: Sequence[Measured]) -> dict[str, Any]:
    """Return the JSON values of a group."""
    worst = {kind: max(measured, key=lambda item: item.errors[kind]) for kind in BARS}
    return {
        "force_field": list(group.physics.force_field),
        "cutoff_nm": group.physics.cutoff_nm,
        "molecules": len(measured),
        "atoms": [min(item.atoms for item in measured), max(item.atoms for item in measured)],
        **{kind: {"largest_error": item.errors[kind], "molecule": item.sequence} for kind, item in worst.items()},
        "missed": [item.sequence for item in measured if any(item.errors[kind] > bar for kind, bar in BARS.items())],
        "passed": all(item.errors[kind] <= BARS[kind] for kind, item in worst.items()),
    }


def require(result: dict[str, Any]) -> None:
    """Refuse a result of `compare` that misses a bar.

    Raises:
        NumericsError: naming the molecule that is worst in terms of its bar, and how many miss theirs.
    """
    if result["passed"]:
        return
    worst = [(group[kind], kind, name) for name, group in result["groups"].items() for kind in BARS]
    item, kind, name = max(worst, key=lambda entry: entry[0]["largest_error"] / BARS[entry[1]])
    missed = sum(len(group["missed"]) for group in result["groups"].values())
    raise NumericsError(
        f"no parity with OpenMM: {kind} of {item['molecule']} ({name}) are wrong by {item['largest_error']:.1e}, more than"
        f" {BARS[kind]:.0e}; {missed} of {result['molecules']} comparisons miss a bar"
    )


def table(result: dict[str, Any]) -> str:
    """Return the result of `compare` as text."""
    lines = [f"  {'':<18}{'molecules':>10}{'atoms':>9}   {'energies':<22}{'forces':<22}"]
    for name, group in result["groups"].items():
        atoms = "-".join(str(count) for count in dict.fromkeys(group["atoms"]))
        worst = "".join(f"{group[kind]['largest_error']:.1e} {group[kind]['molecule']:<14}" for kind in BARS)
        lines.append(f"  {name:<18}{group['molecules']:>10}{atoms:>9}   {worst}{'' if group['passed'] else 'MISSED'}")
    bars = ", ".join(f"{kind} {bar:.0e}" for kind, bar in result["bars"].items())
    return "\n".join(
        [
            f"largest relative errors against OpenMM, {result['configurations_per_molecule']} configurations of each molecule:",
            *lines,
            *(f"  {kind}: {text}" for kind, text in result["definitions"].items()),
            f"  bars ({bars}): {'passed' if result['passed'] else 'missed'}; {result['wall_s']:.0f} s",
        ]
    )
