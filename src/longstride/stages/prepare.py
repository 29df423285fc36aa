"""Stage `prepare`: sequence, structure file or count of water → molecule with a force field, isolated or in a box."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longstride.config import PhysicsConfig, SystemConfig
from longstride.solvation import Solvent
from longstride.systems import Prepared, prepare_file, prepare_sequence, prepare_water, save_prepared


def run(section: SystemConfig, *, physics: PhysicsConfig, out: Path) -> None:
    """Write the prepared molecule to `out` (see docs/formats.md)."""
    prepared = build(section, physics)
    content: dict[str, Any] = {
        "force_field": list(physics.force_field),
        "cutoff_nm": physics.cutoff_nm,
        "temperature_K": physics.temperature_K,
    }
    save_prepared(out, prepared, content)
    box = "" if prepared.box is None else f", box {prepared.box[0, 0]:.4f} nm"
    print(
        f"prepared {section.name}: {prepared.system.n_atoms} atoms{box}, charge {prepared.charge}, target {prepared.target},"
        f" hash {prepared.system_hash[:12]}"
    )


def build(section: SystemConfig, physics: PhysicsConfig) -> Prepared:
    """Return the prepared molecule of a configuration section.

    Raises:
        LongstrideError: a mistake in the input, in one line (`longstride.systems`, `longstride.ligands`).
    """
    options: dict[str, Any] = {"name": section.name, "force_field": physics.force_field, "cutoff_nm": physics.cutoff_nm}
    if section.water is not None:
        return prepare_water(section.water, **options)
    if section.solvate is not None:
        asked = section.solvate
        options["solvent"] = Solvent(molecules=asked.molecules, padding_nm=asked.padding_nm, density=asked.density_g_per_cm3)
    if section.sequence is not None:
        return prepare_sequence(section.sequence, **options)
    if section.ligand is not None:
        from longstride.ligands import read_ligand

        options["ligand"] = read_ligand(Path(section.ligand), charges=section.ligand_charges or "am1-bcc")
    return prepare_file(Path(section.file or ""), **options)
