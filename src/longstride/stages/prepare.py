"""Stage `prepare`: sequence or structure file → molecule with a force field."""

from __future__ import annotations

from pathlib import Path

from longstride.config import PhysicsConfig, SystemConfig
from longstride.systems import prepare_file, prepare_sequence, save_prepared


def run(section: SystemConfig, *, physics: PhysicsConfig, out: Path) -> None:
    """Write the prepared molecule to `out` (see docs/formats.md)."""
    options = {"name": section.name, "force_field": physics.force_field, "cutoff_nm": physics.cutoff_nm}
    if section.sequence is not None:
        prepared = prepare_sequence(section.sequence, **options)
    else:
        prepared = prepare_file(Path(section.file or ""), **options)
    content = {"force_field": list(physics.force_field), "cutoff_nm": physics.cutoff_nm, "temperature_K": physics.temperature_K}
    save_prepared(out, prepared, content)
    print(
        f"prepared {section.name}: {prepared.system.n_atoms} atoms, target {prepared.target}, hash {prepared.system_hash[:12]}"
    )
