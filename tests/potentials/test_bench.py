"""The benchmark measures what it says."""

from __future__ import annotations

import json

import pytest
import torch
from conftest_potentials import molecule

from longstride.potentials.amber import AmberPotential
from longstride.stages import bench
from longstride.state import State


def test_thermal_configurations_have_thermal_energies():
    made = molecule("ACE-ALA-NME")
    exact = AmberPotential.from_openmm(made.openmm_system, made.system, name="amber")
    generator = torch.Generator().manual_seed(1)
    x = bench.thermal_configurations(exact, made.positions, count=200, temperature_K=10.0, generator=generator)
    rise = exact.energy(State(positions=x)) - exact.energy(State(positions=torch.from_numpy(made.positions)[None]))
    # at 10 K all is harmonic: kT/2 for every mode, less for those held narrower than thermal
    ceiling = 0.5 * (3 * made.system.n_atoms - 6) * 8.314e-3 * 10.0
    assert 0.6 * ceiling < rise.mean() < 1.05 * ceiling


def test_result_is_complete_json(monkeypatch):
    monkeypatch.setattr(bench, "compiler_available", lambda: False)
    monkeypatch.setattr(bench, "WINDOW_SECONDS", 0.01)
    monkeypatch.setattr(bench, "WINDOWS", 1)
    monkeypatch.setattr(bench, "PARITY_CONFIGURATIONS", 8)
    # a fresh process imports torch anew; the slow test below starts them
    monkeypatch.setattr(
        bench, "_openmm_arrangement", lambda xml, system, x, plan: bench._openmm_worker(xml, system, x, plan[1])
    )
    result = json.loads(json.dumps(bench.energies(sequence="ACE-ALA-NME", batch=64, threads=1), allow_nan=False))
    assert result["torch"]["compiled"] is None
    assert result["torch"]["eager"]["best"]["energies_per_s"] > 0
    assert result["openmm"]["best"]["energies_and_forces_per_s"] > 0
    assert result["ratio"]["eager"]["energies_per_s"] == pytest.approx(
        result["torch"]["eager"]["best"]["energies_per_s"] / result["openmm"]["best"]["energies_per_s"]
    )
    assert result["parity"]["max_relative_energy_error"] < 1e-6
    assert result["parity"]["max_relative_force_error"] < 1e-5
    assert result["precision"]["max_kT"] < 0.01
    assert result["provenance"]["versions"]["openmm"] != "absent"
    assert "OpenMM CPU" in bench.table(result)
