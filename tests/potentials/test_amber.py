"""AmberPotential against OpenMM: energies to 1e-6 and forces to 1e-5 relative, in float64 on distorted geometries."""

from __future__ import annotations

import numpy as np
import openmm
import pytest
import torch
from conftest_potentials import distorted, many, molecule, parametrise
from openmm import app

from longstride.errors import LongstrideError
from longstride.potentials import amber
from longstride.potentials.amber import AmberPotential, compiler_available
from longstride.potentials.openmm import OpenMMPotential
from longstride.state import State

ALANINE = "ACE-ALA-NME"
FF14 = "amber14-all.xml"
OBC1 = (FF14, "implicit/obc1.xml")
ENERGY_TOLERANCE, FORCE_TOLERANCE = 1e-6, 1e-5


def errors(potential: AmberPotential, openmm_system: openmm.System, x: torch.Tensor) -> tuple[float, float]:
    """Largest |dE|/max(|E|, 1 kJ/mol) and |dF|/|F| of any configuration against the Reference platform."""
    energy, forces = potential.energy_forces(State(positions=x))
    reference = OpenMMPotential(openmm_system, potential.system, name="openmm", platform="Reference")
    truth, true_forces = reference.energy_forces(State(positions=x))
    assert torch.isfinite(truth).all()
    return (
        float(((energy - truth).abs() / truth.abs().clamp(min=1.0)).max()),
        float(((forces - true_forces).norm(dim=(1, 2)) / true_forces.norm(dim=(1, 2))).max()),
    )


def assert_parity(openmm_system: openmm.System, sequence: str) -> None:
    potential = AmberPotential.from_openmm(openmm_system, molecule(sequence).system, name="amber")
    energy, force = errors(potential, openmm_system, distorted(sequence))
    assert energy < ENERGY_TOLERANCE
    assert force < FORCE_TOLERANCE


# 0.5 nm is shorter than these molecules, so that pairs fall on both sides of the cutoff
@pytest.mark.parametrize("cutoff", [None, 2.0, 0.5])
@pytest.mark.parametrize("sequence", [ALANINE, "AS", "KD", "WPH", pytest.param("RCMQY", marks=pytest.mark.slow)])
def test_parity_of_sequences(sequence, cutoff):
    assert_parity(parametrise(sequence, OBC1, cutoff), sequence)


def test_the_short_cutoff_separates_pairs():
    x = distorted(ALANINE)
    first, second = np.triu_indices(x.shape[1], 1)
    distances = torch.cdist(x, x)[:, first, second]
    beyond = (distances > 0.5).double().mean(1)
    assert (beyond > 0.2).all()
    assert (beyond < 0.9).all()


@pytest.mark.parametrize("cutoff", [None, 0.5])
@pytest.mark.parametrize("model", ["hct", "obc2", "gbn", "gbn2"])
def test_parity_of_born_models(model, cutoff):
    assert_parity(parametrise(ALANINE, (FF14, f"implicit/{model}.xml"), cutoff), ALANINE)


@pytest.mark.parametrize("cutoff", [None, 0.5])
def test_parity_with_salt_and_without_surface(cutoff):
    assert_parity(parametrise(ALANINE, OBC1, cutoff, implicitSolventKappa=0.9), ALANINE)
    assert_parity(parametrise(ALANINE, OBC1, cutoff, sasaMethod=None, soluteDielectric=2.0), ALANINE)


@pytest.mark.parametrize("cutoff", [None, 0.5])
def test_parity_of_gbsa_obc_force(cutoff):
    assert_parity(parametrise(ALANINE, ("amber99sbildn.xml", "amber99_obc.xml"), cutoff), ALANINE)


def test_parity_of_correction_maps():
    system = parametrise(ALANINE, ("amber19/protein.ff19SB.xml", "implicit/obc2.xml"), None)
    assert any(isinstance(force, openmm.CMAPTorsionForce) and force.getNumTorsions() for force in system.getForces())
    assert_parity(system, ALANINE)


def test_parity_in_vacuum_with_reaction_field_switch_and_odd_phases():
    system = parametrise(ALANINE, (FF14,), 0.5)
    nonbonded = force_of(system, openmm.NonbondedForce)
    assert nonbonded.getReactionFieldDielectric() == pytest.approx(78.3)
    nonbonded.setUseSwitchingFunction(True)
    nonbonded.setSwitchingDistance(0.4)
    torsions = force_of(system, openmm.PeriodicTorsionForce)
    torsions.addTorsion(4, 6, 8, 14, 3, 0.7, 5.0)
    torsions.addTorsion(14, 8, 6, 4, 6, -0.4, 7.0)
    assert_parity(system, ALANINE)


def force_of(system: openmm.System, kind: type) -> openmm.Force:
    return next(force for force in system.getForces() if isinstance(force, kind))


def scale_one_radius(system):
    force = force_of(system, openmm.CustomGBForce)
    charge, radius, scaled = force.getParticleParameters(5)
    force.setParticleParameters(5, [charge, radius * 1.001, scaled])


def drop_reaction_field(system):
    force_of(system, openmm.NonbondedForce).setReactionFieldDielectric(1.0)


def lengthen_cutoff(system):
    force_of(system, openmm.NonbondedForce).setCutoffDistance(0.55)


def change_one_exception(system):
    force = force_of(system, openmm.NonbondedForce)
    index = next(i for i in range(force.getNumExceptions()) if abs(force.getExceptionParameters(i)[2]._value) > 0.01)
    first, second, charge, sigma, epsilon = force.getExceptionParameters(index)
    force.setExceptionParameters(index, first, second, charge * 1.01, sigma, epsilon)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (scale_one_radius, OBC1),
        (lengthen_cutoff, OBC1),
        (change_one_exception, OBC1),
        (drop_reaction_field, (FF14,)),
    ],
)
def test_negative_control_a_small_change_of_physics_is_detected(change, field):
    system = parametrise(ALANINE, field, 0.5)
    potential = AmberPotential.from_openmm(system, molecule(ALANINE).system, name="amber")
    change(system)
    energy, force = errors(potential, system, distorted(ALANINE))
    assert energy > ENERGY_TOLERANCE
    assert force > FORCE_TOLERANCE


def build(system):
    return AmberPotential.from_openmm(system, molecule(ALANINE).system, name="amber")


def test_an_unknown_force_is_refused_by_name():
    system = parametrise(ALANINE, OBC1, None)
    system.addForce(openmm.CustomExternalForce("x^2"))
    with pytest.raises(LongstrideError, match="CustomExternalForce"):
        build(system)


@pytest.mark.parametrize("replace", ["value", "energy"])
def test_an_unknown_born_expression_is_quoted(replace):
    system = parametrise(ALANINE, OBC1, None)
    force = force_of(system, openmm.CustomGBForce)
    if replace == "value":
        name, text, kind = force.getComputedValueParameters(1)
        force.setComputedValueParameters(1, name, text.replace("tanh", "sin"), kind)
    else:
        text, kind = force.getEnergyTermParameters(1)
        force.setEnergyTermParameters(1, text.replace("^6", "^5"), kind)
    with pytest.raises(LongstrideError, match=r"sin\(|\^5"):
        build(system)


def test_periodic_constrained_and_duplicated_systems_are_refused():
    system = parametrise(ALANINE, (FF14,), 0.5)
    force_of(system, openmm.NonbondedForce).setNonbondedMethod(openmm.NonbondedForce.PME)
    with pytest.raises(LongstrideError, match="periodic"):
        build(system)
    constrained = app.ForceField(*OBC1).createSystem(molecule(ALANINE).topology, constraints=app.HBonds)
    with pytest.raises(LongstrideError, match="constraints"):
        build(constrained)
    twice = parametrise(ALANINE, OBC1, None)
    twice.addForce(openmm.HarmonicBondForce())
    with pytest.raises(LongstrideError, match="HarmonicBondForce"):
        build(twice)


def test_another_molecule_and_wrong_shapes_are_refused():
    with pytest.raises(LongstrideError, match="atoms"):
        AmberPotential.from_openmm(molecule("AS").openmm_system, molecule(ALANINE).system, name="amber")
    potential = build(molecule(ALANINE).openmm_system)
    with pytest.raises(LongstrideError, match="expected"):
        potential.energy(State(positions=torch.zeros(2, 21, 3)))
    with pytest.raises(LongstrideError, match="box"):
        potential.energy(State(positions=torch.zeros(2, 22, 3), box=torch.eye(3).expand(2, 3, 3)))


def test_overlapping_atoms_give_no_finite_energy_and_no_exception():
    potential = build(molecule(ALANINE).openmm_system)
    x = distorted(ALANINE)[:3].clone()
    x[1, 5] = x[1, 20]
    x[2] = 1e30
    energy, forces = potential.energy_forces(State(positions=x))
    assert torch.isfinite(energy[0])
    assert not torch.isfinite(energy[1:]).any()
    assert torch.isfinite(forces[0]).all()


def test_blocks_change_nothing():
    potential = build(molecule(ALANINE).openmm_system)
    x = many(ALANINE, 37)
    whole = potential.energy_forces(State(positions=x))
    potential.block = 16
    parts = potential.energy_forces(State(positions=x))
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-10, atol=1e-9)


def test_energy_is_differentiable_and_matches_the_forces():
    potential = build(molecule(ALANINE).openmm_system)
    x = distorted(ALANINE).clone().requires_grad_()
    weights = torch.arange(1.0, len(x) + 1, dtype=torch.float64)
    (weights * potential.energy(State(positions=x))).sum().backward()
    _, forces = potential.energy_forces(State(positions=x))
    torch.testing.assert_close(x.grad, -weights[:, None, None] * forces)


def test_float32_energies_are_exact_enough_for_metropolis():
    made = molecule("WPH")
    rough = AmberPotential.from_openmm(made.openmm_system, made.system, name="amber", dtype=torch.float32)
    exact = AmberPotential.from_openmm(made.openmm_system, made.system, name="amber")
    x = distorted("WPH").float()
    # far from the origin float32 coordinates are coarse, and both precisions see the same coarse coordinates
    error = rough.energy(State(positions=x)).double() - exact.energy(State(positions=x.double()))
    scale = exact.energy(State(positions=x.double())).abs().clamp(min=1000.0)
    assert (error.abs() / scale).max() < 5e-6


@pytest.mark.slow
@pytest.mark.skipif(not compiler_available(), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_compiled_equals_eager(dtype):
    made = molecule(ALANINE)
    eager = AmberPotential.from_openmm(made.openmm_system, made.system, name="amber", dtype=dtype)
    fast = AmberPotential.from_openmm(made.openmm_system, made.system, name="amber", dtype=dtype, compile=True)
    x = many(ALANINE, 37).to(dtype)
    tolerance = {"rtol": 1e-11, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 2e-3}
    for count in (37, 1, 5):
        state = State(positions=x[:count])
        torch.testing.assert_close(fast.energy(state), eager.energy(state), **tolerance)
        energy, forces = fast.energy_forces(state)
        torch.testing.assert_close(energy, eager.energy(state), **tolerance)
        torch.testing.assert_close(
            forces, eager.energy_forces(state)[1], rtol=1e-4, atol=0.5 if dtype == torch.float32 else 1e-6
        )
    # a lane does not depend on what else is in the batch: the same bits alone and in company
    assert torch.equal(fast.energy(State(positions=x))[:1], fast.energy(State(positions=x[:1])))
    with torch.inference_mode():
        torch.testing.assert_close(fast.energy(State(positions=x)), eager.energy(State(positions=x)), **tolerance)


def test_compile_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    made = molecule(ALANINE)
    with pytest.raises(LongstrideError, match="compiler"):
        AmberPotential.from_openmm(made.openmm_system, made.system, name="amber", compile=True)


def test_a_failing_toolchain_is_one_line(monkeypatch):
    made = molecule(ALANINE)

    def fail(function, **options):
        def call(arrays, x):
            raise torch._dynamo.exc.BackendCompilerFailed(fail, RuntimeError("cc1plus: out of memory"), None)

        return call

    monkeypatch.setattr(torch, "compile", fail)
    monkeypatch.setattr("longstride.potentials.amber.compiler_available", lambda: True)
    monkeypatch.setattr("longstride.potentials.amber._COMPILED", {})  # what other tests have compiled
    potential = AmberPotential.from_openmm(made.openmm_system, made.system, name="amber", compile=True)
    with pytest.raises(LongstrideError, match="compile=False"):
        potential.energy(State(positions=distorted(ALANINE)))


@pytest.mark.slow
def test_molecules_share_compiled_code(monkeypatch):
    """The second molecule compiles nothing, and all agree with the eager evaluation."""
    monkeypatch.setattr("longstride.potentials.amber._COMPILED", {})
    torch._dynamo.reset()
    compile_once = torch._dynamo.config.patch(error_on_recompile=True)
    for sequence in (ALANINE, "AS", "KD"):
        made, x = molecule(sequence), State(positions=distorted(sequence))
        one, other = (
            AmberPotential.from_openmm(made.openmm_system, made.system, name="amber", compile=flag) for flag in (False, True)
        )
        with compile_once:
            energy, forces = other.energy_forces(x)
            alone = other.energy(x)
        expected, expected_forces = one.energy_forces(x)
        assert torch.allclose(energy, expected, rtol=1e-9, atol=1e-7)
        assert torch.allclose(forces, expected_forces, rtol=1e-9, atol=1e-6)
        assert torch.allclose(alone, expected, rtol=1e-9, atol=1e-7)
    assert len(amber._COMPILED) == 2  # energies, and energies with forces
