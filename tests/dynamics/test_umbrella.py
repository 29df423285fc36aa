"""Umbrella sampling: a chain whose torsions have a known density, the exchange move by counting, and OpenMM."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from contracts import check_potential
from longstride.analysis.umbrella import analyse_umbrella
from longstride.data.checkpoint import open_state
from longstride.dynamics.integrators import MDState
from longstride.dynamics.umbrella import (
    UmbrellaPlan,
    can_turn,
    exchange,
    relax,
    restraints_of,
    run_umbrella,
    umbrella_starts,
)
from longstride.errors import LongstrideError
from longstride.potentials.restraint import TorsionRestraint
from longstride.state import State, System
from longstride.systems import Prepared

KT = 2.5
CHAIN = System(
    name="chain",
    atomic_numbers=np.array([6] * 5),
    masses=np.full(5, 12.0),
    bonds=np.array([(0, 1), (1, 2), (2, 3), (3, 4)]),
    atom_names=("A", "B", "C", "D", "E"),
    residue_names=("RES",) * 5,
    residue_indices=np.zeros(5, dtype=np.int64),
)
POSITIONS = np.array([[0, 0.14, 0], [0, 0, 0], [0.14, 0, 0], [0.14, 0.0, 0.14], [0.28, 0.0, 0.14]])
MOLECULE = Prepared(system=CHAIN, openmm_system=None, topology=None, positions=POSITIONS, system_hash="", target="chain")
PLAN = UmbrellaPlan(
    torsions=((0, 1, 2, 3), (1, 2, 3, 4)),
    windows=(12, 6),
    stiffness=(20.0, 6.0),
    kT=KT,
    dt=0.004,
    friction=5.0,
    steps_per_cycle=10,
    n_discard=10,
    n_cycles=60,
    checkpoint_every=20,
)


class Chain:
    """Springs of bonds and angles, and V = 5 cos(2 phi) + 3 sin(phi) + 2 cos(psi) + 2 sin(phi) cos(psi), kJ/mol.

    Bonds and angles do not enter V, so the torsions' density is exp(-V/kT) exactly.
    """

    system, name = CHAIN, "chain"

    def energy(self, x):
        p = x.positions
        bonds = p[:, 1:] - p[:, :-1]
        length = bonds.norm(dim=-1)
        cosine = -(bonds[:, 1:] * bonds[:, :-1]).sum(-1) / (length[:, 1:] * length[:, :-1])
        angle = cosine.clamp(-0.999, 0.999).arccos()
        phi, psi = self.torsion(bonds[:, :3]), self.torsion(bonds[:, 1:])
        torsional = 5 * (2 * phi).cos() + 3 * phi.sin() + 2 * psi.cos() + 2 * phi.sin() * psi.cos()
        return torsional + 10000 * (length - 0.14).square().sum(-1) + 100 * (angle - 1.9).square().sum(-1)

    @staticmethod
    def torsion(b):
        first, second = torch.linalg.cross(b[:, 0], b[:, 1]), torch.linalg.cross(b[:, 1], b[:, 2])
        return torch.atan2((b[:, 0] * second).sum(-1) * b[:, 1].norm(dim=-1), (first * second).sum(-1))

    def energy_forces(self, x):
        positions = x.positions.detach().requires_grad_()
        energy = self.energy(State(positions=positions))
        (gradient,) = torch.autograd.grad(energy.sum(), positions)
        return energy.detach(), -gradient


def true_delta_f():
    phi, psi = np.meshgrid(*[np.linspace(-np.pi, np.pi, 721)[:-1] + np.pi / 720] * 2, indexing="ij")
    p = np.exp(-(5 * np.cos(2 * phi) + 3 * np.sin(phi) + 2 * np.cos(psi) + 2 * np.sin(phi) * np.cos(psi)) / KT).sum(1)
    return math.log(p[:360].sum() / p[360:].sum())


def sample(path, plan=PLAN, seed=1, potential=None):
    with open_state(path, "key") as folder:
        return run_umbrella(
            plan,
            MOLECULE,
            potential or Chain(),
            masses=torch.from_numpy(CHAIN.masses),
            generator=torch.Generator().manual_seed(seed),
            folder=folder,
        )


def test_the_restraint_is_a_potential():
    x = torch.from_numpy(POSITIONS + 0.02 * np.random.default_rng(0).normal(size=(4, 5, 3)))
    restraint = TorsionRestraint(CHAIN, atoms=(0, 1, 2, 3), centers=torch.zeros(()).expand(4), stiffness=20.0)

    class AnyBatch(TorsionRestraint):
        def _centers(self, x):
            return torch.full((len(x.positions),), 0.4, dtype=x.positions.dtype)

    check_potential(AnyBatch(CHAIN, atoms=(0, 1, 2, 3), centers=restraint.centers, stiffness=20.0), x)
    with pytest.raises(LongstrideError, match="holds 4 replicas, not 3"):
        restraint.energy(State(positions=x[:3]))
    with pytest.raises(LongstrideError, match="four different atoms"):
        TorsionRestraint(CHAIN, atoms=(0, 1, 1, 3), centers=restraint.centers, stiffness=20.0)


def test_windows_start_at_their_centres():
    angles = [
        one.angle(State(positions=torch.from_numpy(umbrella_starts(PLAN, MOLECULE)))) for one in restraints_of(PLAN, MOLECULE)
    ]
    for one, restraint in zip(angles, restraints_of(PLAN, MOLECULE), strict=True):
        assert torch.allclose(one, restraint.centers, atol=1e-6)


def test_relaxing_removes_overlaps_and_survives_infinite_forces():
    class Steep(Chain):
        def energy_forces(self, x):
            energy, forces = super().energy_forces(x)
            forces[0, 0] = torch.inf
            return energy, forces

    start = torch.from_numpy(umbrella_starts(PLAN, MOLECULE))
    relaxed = relax(start, Chain())
    assert (Chain().energy(State(positions=relaxed)) <= Chain().energy(State(positions=start)) + 1e-6).all()
    assert relax(start, Steep(), steps=3).isfinite().all()


def test_exchange_keeps_the_product_density():
    """Angles drawn from the restraints alone stay so under exchange; a move that always swaps does not."""
    generator = torch.Generator().manual_seed(0)
    restraints = restraints_of(PLAN, MOLECULE)
    wells = {"always": 0.0, "right": 0.0}
    for name in wells:
        deviation = []
        for _ in range(200):
            angle = torch.distributions.VonMises(torch.zeros(72), PLAN.stiffness[0] / KT)
            torch.manual_seed(int(torch.randint(1 << 30, (), generator=generator)))
            phi = restraints[0].centers + angle.sample()
            x = placed(phi)
            md = MDState(positions=x, velocities=x, forces=x, potential_energy=phi, masses=torch.ones(5))
            plan = PLAN if name == "right" else unconditional(PLAN)
            moved, axis, accepted = exchange(md, restraints, plan, generator)
            assert torch.equal(moved.positions, moved.velocities)
            assert name == "right" or bool(accepted.all())
            if axis == 0:
                deviation.append((restraints[0].angle(State(positions=moved.positions)) - restraints[0].centers).cos().mean())
        wells[name] = float(torch.stack(deviation).mean())
    exact = torch.special.i1(torch.tensor(8.0)) / torch.special.i0(torch.tensor(8.0))
    assert abs(wells["right"] - exact) < 0.01
    assert abs(wells["always"] - exact) > 0.05


def unconditional(plan):
    return replace(plan, kT=1e12)


def placed(phi):
    """Return chains [batch, 5, 3] with the given first torsion."""
    x = torch.from_numpy(POSITIONS).repeat(len(phi), 1, 1)
    # atoms 1 and 2 lie on the x axis, atom 0 at +y: atom 3 turns about that axis
    x[:, 3, 1], x[:, 3, 2] = 0.14 * phi.cos(), 0.14 * phi.sin()
    x[:, 4] = x[:, 3] + torch.tensor([0.14, 0.0, 0.0])
    return x


def analyse(samples, stiffness=PLAN.stiffness):
    centers = (PLAN.centers(0), PLAN.centers(1))
    scaled = [value / KT for value in stiffness]
    return analyse_umbrella(samples.torsions, centers=centers, stiffness_kT=scaled, bins=48, replicates=30, seed=0)


def test_a_known_difference_is_found_and_a_mistold_restraint_is_noticed(tmp_path):
    samples = sample(tmp_path)
    result = analyse(samples)
    assert 0.1 < samples.exchange.min()
    assert abs(result.delta_f.value - true_delta_f()) < 5 * result.delta_f.standard_error
    assert result.delta_f.standard_error < 0.2
    wrong = analyse(samples, stiffness=(5.0, 6.0))
    assert abs(wrong.delta_f.value - true_delta_f()) > 5 * wrong.delta_f.standard_error


def test_a_killed_run_continues_to_the_same_bits(tmp_path):
    class Dying(Chain):
        left = 370

        def energy_forces(self, x):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().energy_forces(x)

    plan = replace(PLAN, windows=(4, 4), steps_per_cycle=3, n_discard=4, n_cycles=20, checkpoint_every=6)
    whole = sample(tmp_path / "whole", plan)
    with pytest.raises(KeyboardInterrupt):
        sample(tmp_path / "killed", plan, potential=Dying())
    assert list((tmp_path / "killed").glob("checkpoint_*"))
    resumed = sample(tmp_path / "killed", plan)
    assert np.array_equal(whole.torsions, resumed.torsions)
    assert np.array_equal(whole.exchange, resumed.exchange)


def test_a_ring_cannot_be_turned():
    ring = System(**{**vars(CHAIN), "bonds": np.array([(0, 1), (1, 2), (2, 3), (3, 4), (0, 4)])})
    assert can_turn(CHAIN, (0, 1, 2, 3))
    assert not can_turn(ring, (0, 1, 2, 3))
    with pytest.raises(LongstrideError, match="in a ring"):
        umbrella_starts(PLAN, Prepared(**{**vars(MOLECULE), "system": ring}))


def test_a_window_of_a_real_molecule_has_the_energies_and_forces_of_openmm(alanine):
    import openmm

    from longstride.potentials.amber import AmberPotential
    from longstride.potentials.analytic import SumPotential
    from longstride.potentials.openmm import OpenMMPotential
    from longstride.systems import backbone_torsions

    atoms = backbone_torsions(alanine.system)[0][1]
    positions = torch.from_numpy(alanine.positions)[None] + 0.005 * torch.randn(
        3, 22, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    restraint = TorsionRestraint(alanine.system, atoms=atoms, centers=torch.full((3,), 0.7), stiffness=100.0)
    batched = AmberPotential.from_openmm(alanine.openmm_system, alanine.system, name="x")
    ours = SumPotential(batched, restraint).energy_forces(State(positions=positions))
    theirs_system = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(alanine.openmm_system))
    force = openmm.CustomTorsionForce("100.0*(1-cos(theta-0.7))")
    force.addTorsion(*atoms, [])
    theirs_system.addForce(force)
    openmm_side = OpenMMPotential(theirs_system, alanine.system, name="x", platform="Reference")
    theirs = openmm_side.energy_forces(State(positions=positions))
    assert torch.allclose(ours[0], theirs[0], rtol=1e-6)
    assert (ours[1] - theirs[1]).abs().max() < 1e-5 * theirs[1].abs().max()
