"""Teacher and student inside OpenMM: the step of respa_baoab, the teacher's ensemble, reporters, a barostat, clear failures."""

import math
from dataclasses import replace

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit

import four_atom_chain
from longstride.dynamics.integrators import baoab, half_step_velocities, respa_baoab, start, thermal_velocities
from longstride.dynamics.openmm_mts import INNER_GROUP, OUTER_GROUP, OpenMMPlan, mts_simulation
from longstride.errors import LongstrideError, NumericsError
from longstride.potentials.amber import AmberPotential
from longstride.potentials.student import StudentMetadata, StudentNetwork
from longstride.state import State, System
from longstride.units import BOLTZMANN_KJ_PER_MOL_K, FS_PS, thermal_energy

TEMPERATURE = 310.0
KT = thermal_energy(TEMPERATURE)
BAR_KJ_PER_MOL_NM3 = 0.06022140857  # 1 bar


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are tiny here
    yield
    torch.set_num_threads(before)


def hydroxyls(count: int) -> tuple[System, app.Topology]:
    """`count` separate O-H molecules, as one System."""
    atoms = 2 * count
    system = System(
        name="hydroxyls",
        atomic_numbers=np.tile([8, 1], count),
        masses=np.tile([15.999, 1.008], count),
        bonds=np.arange(atoms).reshape(count, 2),
        atom_names=("O", "H") * count,
        residue_names=("OHX",) * atoms,
        residue_indices=np.repeat(np.arange(count), 2),
    )
    topology = app.Topology()
    chain = topology.addChain()
    for _ in range(count):
        residue = topology.addResidue("OHX", chain)
        ends = [topology.addAtom(symbol, app.Element.getBySymbol(symbol), residue) for symbol in ("O", "H")]
        topology.addBond(*ends)
    return system, topology


class Stretch:
    """Bonds between atoms 2i and 2i+1, U = sum k/2 (r - 0.1)^2 + c (r - 0.1)^3 + a r; reads the box where it is told to."""

    def __init__(self, system: System, *, k: float = 60_000.0, a: float = 0.0, periodic: bool = True, name="stretch") -> None:
        self.system, self.name, self.k, self.a, self.periodic, self.calls = system, name, k, a, periodic, 0

    def energy(self, x: State) -> torch.Tensor:
        return self.energy_forces(x)[0]

    def energy_forces(self, x: State) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        apart = x.positions[:, 1::2] - x.positions[:, ::2]
        if x.box is not None and self.periodic:
            length = torch.diagonal(x.box, dim1=1, dim2=2)[:, None]
            apart = apart - length * torch.round(apart / length)
        r = apart.norm(dim=2, keepdim=True)
        stretch = r - 0.1
        c = -100_000.0 * self.k / 60_000.0  # softer when stretched
        energy = 0.5 * self.k * stretch**2 + c * stretch**3 + self.a * r
        pull = (self.k * stretch + 3 * c * stretch**2 + self.a) * apart / r
        return energy.sum(dim=(1, 2)), torch.stack([pull, -pull], dim=2).flatten(1, 2)


class Failing(Stretch):
    """Gives NaN, or raises, once it has been called `after` times."""

    def __init__(self, system: System, *, after: int, error: BaseException | None = None) -> None:
        super().__init__(system, name="failing")
        self.after, self.error = after, error

    def energy_forces(self, x: State) -> tuple[torch.Tensor, torch.Tensor]:
        energy, forces = super().energy_forces(x)
        if self.calls <= self.after:
            return energy, forces
        if self.error is not None:
            raise self.error
        return energy, forces * math.nan


def plan(**changes) -> OpenMMPlan:
    return OpenMMPlan(
        **{"dt_outer_fs": 2.0, "n_inner": 4, "temperature_K": TEMPERATURE, "friction_per_ps": 10.0, "seed": 3, **changes}
    )


def spread(count: int, *, box_nm: float | None = None, seed: int = 5) -> torch.Tensor:
    """Positions [1, 2 count, 3] of O-H molecules at 0.1 nm bond length, anywhere within 3 nm or the box."""
    generator = torch.Generator().manual_seed(seed)
    oxygen = (box_nm or 3.0) * torch.rand(count, 3, generator=generator, dtype=torch.float64)
    direction = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    hydrogen = oxygen + 0.1 * direction / direction.norm(dim=1, keepdim=True)
    return torch.stack([oxygen, hydrogen], dim=1).flatten(0, 1)[None]


def simulate(count: int = 4, *, fast=None, slow=None, box_nm: float | None = None, settings=None, **options):
    system, topology = hydroxyls(count)
    fast, slow = fast or Stretch(system, k=55_000.0, name="student"), slow or Stretch(system, a=40.0)
    box = None if box_nm is None else box_nm * torch.eye(3, dtype=torch.float64)[None]
    options.setdefault("velocities", None)
    begin = State(positions=spread(count, box_nm=box_nm), velocities=options.pop("velocities"), box=box)
    return mts_simulation(begin, topology, teacher=slow, student=fast, plan=settings or plan(), **options)


def phase(simulation) -> tuple[np.ndarray, np.ndarray]:
    state = simulation.context.getState(positions=True, velocities=True)
    return np.array(state.getPositions(asNumpy=True)._value), np.array(state.getVelocities(asNumpy=True)._value)


def energy(simulation, groups=-1) -> float:
    state = simulation.context.getState(energy=True, groups=groups)
    return state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)


def bonded_part(prepared) -> AmberPotential:
    """Bonds, angles and torsions of a molecule: what a student would learn first."""
    return AmberPotential.from_openmm(only(prepared.openmm_system, BONDED), prepared.system, name="bonded")


def test_without_friction_the_trajectory_is_that_of_respa_baoab(alanine):
    teacher = AmberPotential.from_openmm(alanine.openmm_system, alanine.system, name="amber")
    student, masses = bonded_part(alanine), torch.from_numpy(alanine.system.masses)
    generator = torch.Generator().manual_seed(1)
    x = torch.from_numpy(alanine.positions)[None]
    v = thermal_velocities(x.shape, masses, KT, generator)
    settings = plan(friction_per_ps=0.0)
    simulation = mts_simulation(
        State(positions=x, velocities=v), alanine.topology, teacher=teacher, student=student, plan=settings
    )
    simulation.step(20)
    positions, velocities = phase(simulation)

    def ours(n_inner: int):
        md = start(x, v, masses=masses, potential=teacher, fast=student)
        for _ in range(20):
            md = respa_baoab(
                md, fast=student, slow=teacher, n_inner=n_inner, dt=2 * FS_PS, kT=KT, friction=0.0, generator=generator
            )
        return md

    md = ours(4)
    assert np.abs(positions - md.positions[0].numpy()).max() < 1e-12
    assert np.abs(velocities - md.velocities[0].numpy()).max() < 1e-10
    assert abs(energy(simulation) - float(md.potential_energy[0])) < 1e-9
    # negative control: another number of inner steps is another trajectory
    assert np.abs(positions - ours(2).positions[0].numpy()).max() > 1e-6


def test_energy_of_all_groups_is_that_of_the_teacher(alanine):
    teacher = AmberPotential.from_openmm(alanine.openmm_system, alanine.system, name="amber")
    network = StudentNetwork(StudentMetadata(elements=(1, 6, 7, 8), teacher="amber"), torch.Generator().manual_seed(3)).double()
    student = network(alanine.system)
    x = State(positions=torch.from_numpy(alanine.positions)[None])
    simulation = mts_simulation(x, alanine.topology, teacher=teacher, student=student, plan=plan(dt_outer_fs=0.5, n_inner=2))
    simulation.step(5)
    now = State(positions=torch.from_numpy(phase(simulation)[0])[None])
    slow, fast = float(teacher.energy(now)[0]), float(student.energy(now)[0])
    assert abs(slow - fast) > 1.0  # random weights: the two potentials differ
    assert energy(simulation) == pytest.approx(slow, abs=1e-9)
    assert energy(simulation, {INNER_GROUP}) == pytest.approx(fast, abs=1e-9)
    assert energy(simulation, {OUTER_GROUP}) == pytest.approx(slow - fast, abs=1e-9)
    forces = simulation.context.getState(forces=True).getForces(asNumpy=True)._value
    assert np.allclose(forces, teacher.energy_forces(now)[1][0].numpy(), rtol=0, atol=1e-8)


def test_costs_n_student_calls_and_one_teacher_call():
    system, _ = hydroxyls(4)
    fast, slow = Stretch(system, k=55_000.0), Stretch(system)
    simulation = simulate(fast=fast, slow=slow)
    simulation.step(1)
    fast.calls = slow.calls = 0
    simulation.step(30)
    assert (fast.calls, slow.calls) == (120, 30)


def observables(x: torch.Tensor, v: torch.Tensor, slow: Stretch, masses: torch.Tensor) -> torch.Tensor:
    """One row per molecule: bond length in nm, potential energy and kinetic energy in kJ/mol."""
    pairs = State(positions=x.reshape(-1, 2, 3))  # every molecule alone
    apart = pairs.positions[:, 1] - pairs.positions[:, 0]
    kinetic = 0.5 * (masses[:, None] * v.square()).reshape(-1, 6).sum(dim=1)
    return torch.stack([apart.norm(dim=1), slow.energy_forces(pairs)[0], kinetic], dim=1)


def by_openmm(count: int, steps: int, settings: OpenMMPlan, slow: Stretch, masses: torch.Tensor) -> torch.Tensor:
    simulation = simulate(count, slow=slow, settings=settings)
    simulation.step(150)
    total = torch.zeros(count, 3, dtype=torch.float64)
    for _ in range(steps // 2):
        simulation.integrator.step(2)
        x, v = phase(simulation)
        total += observables(torch.from_numpy(x), torch.from_numpy(v), slow, masses)
    return total / (steps // 2)


def by_respa(count: int, steps: int, settings: OpenMMPlan, slow: Stretch, masses: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    fast = Stretch(slow.system, k=55_000.0)
    v = thermal_velocities(torch.Size((1, 2 * count, 3)), masses, KT, generator)
    md = start(spread(count), v, masses=masses, potential=slow, fast=fast)
    total = torch.zeros(count, 3, dtype=torch.float64)
    for step in range(150 + steps):
        md = respa_baoab(
            md, fast=fast, slow=slow, n_inner=settings.n_inner, dt=settings.dt_outer_fs * FS_PS, kT=KT,
            friction=settings.friction_per_ps, generator=generator,
        )  # fmt: skip
        if step >= 150:
            total += observables(md.positions[0], md.velocities[0], slow, masses) / steps
    return total


def test_ensemble_averages_are_those_of_respa_baoab():
    count, steps = 200, 600
    settings = plan(n_inner=2, friction_per_ps=50.0)  # forgets in 20 fs
    slow = Stretch(hydroxyls(count)[0], a=40.0)
    masses = torch.from_numpy(slow.system.masses)
    ours = by_respa(count, steps, settings, slow, masses)
    theirs = by_openmm(count, steps, settings, slow, masses)
    error = (ours.var(dim=0) / count + theirs.var(dim=0) / count).sqrt()
    assert ((ours.mean(dim=0) - theirs.mean(dim=0)).abs() < 5 * error).all()
    # negative control: a heat bath 60 K too hot is seen in both energies
    hot = by_openmm(count, steps, replace(settings, temperature_K=TEMPERATURE + 60), slow, masses)
    assert ((hot.mean(dim=0) - ours.mean(dim=0)) > 5 * error)[1:].all()


def test_reporters_write_the_teachers_ensemble(tmp_path):
    import mdtraj

    count = 3
    slow = Stretch(hydroxyls(count)[0], a=40.0)
    simulation = simulate(count, slow=slow)
    simulation.reporters.append(app.DCDReporter(str(tmp_path / "frames.dcd"), 5))
    simulation.reporters.append(
        app.StateDataReporter(str(tmp_path / "log.csv"), 5, time=True, potentialEnergy=True, temperature=True)
    )
    simulation.step(50)
    simulation.reporters.clear()
    log = np.genfromtxt(tmp_path / "log.csv", delimiter=",", skip_header=1)
    assert np.allclose(log[:, 0], 0.01 * np.arange(1, 11))
    frames = mdtraj.load_dcd(str(tmp_path / "frames.dcd"), top=mdtraj.Topology.from_openmm(hydroxyls(count)[1]))
    assert frames.n_frames == 10
    # single precision of the file: bond lengths to 1e-7 nm, forces to 3000 kJ/mol/nm
    expected = slow.energy(State(positions=torch.from_numpy(frames.xyz.astype(np.float64)))).numpy()
    assert np.allclose(log[:, 1], expected, atol=5e-3)
    v = torch.from_numpy(phase(simulation)[1])
    kinetic = 0.5 * float((torch.from_numpy(slow.system.masses)[:, None] * v.square()).sum())
    degrees = 3 * slow.system.n_atoms  # the centre of mass is one of them
    assert log[-1, 2] == pytest.approx(2 * kinetic / (degrees * BOLTZMANN_KJ_PER_MOL_K), rel=1e-6)


def test_barostat_gives_the_volume_of_an_ideal_gas_of_molecules():
    # molecules that do not interact: p(V) ~ V^N exp(-pV/kT), so <V> = (N + 1) kT/p with N molecules, not atoms
    count, volume = 20, 64.0
    pressure = (count + 1) * KT / volume
    barostat = openmm.MonteCarloBarostat(pressure / BAR_KJ_PER_MOL_NM3 * unit.bar, TEMPERATURE * unit.kelvin, 1)
    simulation = simulate(count, box_nm=4.0, extra_forces=[barostat], settings=plan(n_inner=2))
    simulation.step(200)
    blocks = []
    for _ in range(16):
        block = []
        for _ in range(60):
            simulation.integrator.step(2)
            block.append(simulation.context.getState().getPeriodicBoxVolume()._value)
        blocks.append(np.mean(block))
    error = np.std(blocks, ddof=1) / math.sqrt(len(blocks))
    assert abs(np.mean(blocks) - volume) < 5 * error
    # negative control: atoms scaled one by one would give 41/21 of it
    assert abs(np.mean(blocks) - volume * (2 * count + 1) / (count + 1)) > 5 * error
    x, _ = phase(simulation)
    bonds = np.linalg.norm(x[1::2] - x[::2], axis=1)
    assert bonds.max() < 0.13  # molecules move as a whole
    assert energy(simulation) == pytest.approx(
        float(Stretch(hydroxyls(count)[0], a=40.0).energy(State(positions=torch.from_numpy(x)[None]))[0]), abs=1e-8
    )


def test_seed_decides_the_trajectory():
    def positions(seed: int) -> np.ndarray:
        simulation = simulate(settings=plan(seed=seed))
        simulation.step(10)
        return phase(simulation)[0]

    assert np.array_equal(positions(3), positions(3))
    assert not np.allclose(positions(3), positions(4), atol=1e-4)
    assert np.isfinite(positions(0)).all()


def test_masses_are_those_asked_for():
    masses = np.tile([13.983, 3.024], 4)
    simulation = simulate(masses=masses)
    found = [simulation.system.getParticleMass(i).value_in_unit(unit.dalton) for i in range(8)]
    assert found == pytest.approx(masses)


@pytest.mark.parametrize("error", [None, ValueError("first line\nsecond line")])
def test_failure_ends_with_one_line_and_the_last_good_state(error):
    system, _ = hydroxyls(4)
    slow = Failing(system, after=15, error=error)
    simulation = simulate(slow=slow)
    simulation.integrator.step(10)
    good = phase(simulation)
    expected = (NumericsError, "not finite") if error is None else (LongstrideError, "ValueError: first line second line")
    with pytest.raises(expected[0], match=expected[1]) as caught:
        simulation.step(10)
    assert str(caught.value).startswith("failing")
    assert "stands at 0.02 ps" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(np.array_equal(now, then) for now, then in zip(phase(simulation), good, strict=True))
    assert simulation.currentStep == 10
    slow.after = 10**6  # mended: the run goes on
    simulation.step(10)
    assert simulation.currentStep == 20
    assert np.isfinite(phase(simulation)[0]).all()


def test_interrupt_stays_an_interrupt():
    system, _ = hydroxyls(4)
    simulation = simulate(slow=Failing(system, after=5, error=KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        simulation.step(10)


def test_no_force_is_dropped():
    restraint = openmm.CustomExternalForce("50*x^2")
    restraint.addParticle(0, [])
    restraint.setForceGroup(OUTER_GROUP)
    simulation = simulate(extra_forces=[restraint])
    x = phase(simulation)[0]
    without = simulate()
    assert energy(simulation) - energy(without) == pytest.approx(50 * x[0, 0] ** 2, rel=1e-9)
    simulation.step(1)
    late = openmm.CustomExternalForce("x")
    late.setForceGroup(7)
    late.setName("umbrella")
    with pytest.raises(LongstrideError, match=r"'umbrella' is in force group 7.*never evaluates"):
        simulate(extra_forces=[late])
    late = openmm.CustomExternalForce("x")
    late.setForceGroup(7)
    simulation.system.addForce(late)
    with pytest.raises(LongstrideError, match="force group 7"):
        simulation.step(1)


def test_bad_input_is_refused_by_name():
    system, topology = hydroxyls(4)
    for n_inner in (2.5, 0, math.nan):
        with pytest.raises(LongstrideError, match=f"whole number, not {n_inner}"):
            plan(n_inner=n_inner)
    for name in ("dt_outer_fs", "temperature_K", "friction_per_ps"):
        with pytest.raises(LongstrideError, match=name):
            plan(**{name: -1.0})
    barostat = openmm.MonteCarloBarostat(1.0, TEMPERATURE)
    with pytest.raises(LongstrideError, match="needs a periodic system"):
        simulate(extra_forces=[barostat])
    with pytest.raises(LongstrideError, match="300 K but the thermostat to 310 K"):
        simulate(box_nm=3.0, extra_forces=[openmm.MonteCarloBarostat(1.0, 300.0)])
    with pytest.raises(LongstrideError, match="deaf is not periodic"):
        simulate(box_nm=3.0, fast=Stretch(system, periodic=False, name="deaf"))
    with pytest.raises(LongstrideError, match="masses must be 8 positive numbers"):
        simulate(masses=np.ones(7))
    with pytest.raises(LongstrideError, match="bind both to one system"):
        simulate(fast=Stretch(hydroxyls(3)[0]))
    pair = {"teacher": Stretch(system), "student": Stretch(system), "plan": plan()}
    one, two = State(positions=spread(4)), State(positions=spread(4).repeat(2, 1, 1))
    with pytest.raises(LongstrideError, match="topology has 6 atoms"):
        mts_simulation(one, hydroxyls(3)[1], **pair)
    with pytest.raises(LongstrideError, match="one replica per simulation"):
        mts_simulation(two, topology, **pair)
    with pytest.raises(NumericsError, match="failing: the energy or a force is not finite"):
        simulate(slow=Failing(system, after=0))
    with pytest.raises(LongstrideError, match="cannot simulate 'hydroxyls' on Abacus"):
        simulate(platform="Abacus")
    slanted = 3.0 * torch.tensor([[[1.0, 0, 0], [0.9, 1, 0], [0, 0, 1]]], dtype=torch.float64)
    with pytest.raises(LongstrideError, match="refuses the box"):
        mts_simulation(replace(one, box=slanted), topology, **pair)


def test_potential_that_takes_no_box_says_so(alanine):
    teacher = AmberPotential.from_openmm(alanine.openmm_system, alanine.system, name="amber")
    box = 4.0 * torch.eye(3, dtype=torch.float64)[None]
    begin = State(positions=torch.from_numpy(alanine.positions)[None], box=box)
    with pytest.raises(LongstrideError, match="amber handles isolated molecules"):
        mts_simulation(begin, alanine.topology, teacher=teacher, student=teacher, plan=plan())


# The integrators against OpenMM's own, on OpenMM's own forces.


def only(openmm_system: openmm.System, kinds: tuple[type, ...]) -> openmm.System:
    """Return a copy with the forces of some kinds."""
    system = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(openmm_system))
    for index in reversed(range(system.getNumForces())):
        if not isinstance(system.getForce(index), kinds):
            system.removeForce(index)
    return system


def grouped(openmm_system: openmm.System, fast: tuple[type, ...]) -> openmm.System:
    """Return a copy with the forces of the kinds `fast` in the inner group, all others in the outer group."""
    system = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(openmm_system))
    for force in system.getForces():
        force.setForceGroup(INNER_GROUP if isinstance(force, fast) else OUTER_GROUP)
    return system


def context_of(system: openmm.System, integrator: openmm.Integrator, x: torch.Tensor, v: torch.Tensor) -> openmm.Context:
    integrator.setRandomNumberSeed(11)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(x.reshape(-1, 3).numpy())
    context.setVelocities(v.reshape(-1, 3).numpy())
    return context


def arrays(context: openmm.Context) -> tuple[torch.Tensor, torch.Tensor]:
    state = context.getState(positions=True, velocities=True)
    return tuple(torch.from_numpy(np.array(a._value)) for a in (state.getPositions(True), state.getVelocities(True)))


BONDED = (openmm.HarmonicBondForce, openmm.HarmonicAngleForce, openmm.PeriodicTorsionForce)


def test_newtonian_trajectories_of_a_force_field_are_those_of_openmm(alanine):
    slow = AmberPotential.from_openmm(alanine.openmm_system, alanine.system, name="amber")
    fast, masses = bonded_part(alanine), torch.from_numpy(alanine.system.masses)
    generator = torch.Generator().manual_seed(1)
    x = torch.from_numpy(alanine.positions)[None]
    v = thermal_velocities(x.shape, masses, KT, generator)
    md = start(x, v, masses=masses, potential=slow, fast=fast)
    for _ in range(25):
        md = respa_baoab(md, fast=fast, slow=slow, n_inner=4, dt=2e-3, kT=KT, friction=0.0, generator=generator)
    integrator = openmm.MTSLangevinIntegrator(TEMPERATURE * unit.kelvin, 0.0, 2e-3, [(OUTER_GROUP, 1), (INNER_GROUP, 4)])
    context = context_of(grouped(alanine.openmm_system, BONDED), integrator, x, v)
    integrator.step(25)
    theirs = arrays(context)
    # the two force fields agree to 1e-6 relative, not to round-off
    assert float((theirs[0] - md.positions[0]).abs().max()) < 1e-6
    assert float((theirs[1] - md.velocities[0]).abs().max()) < 1e-4

    single = start(x, v, masses=masses, potential=slow)
    # LangevinMiddle kicks fully at the start of a step: its velocities are half a kick behind
    integrator = openmm.LangevinMiddleIntegrator(TEMPERATURE, 0.0, 0.5e-3)
    context = context_of(alanine.openmm_system, integrator, x, v - 0.25e-3 * single.forces / masses[:, None])
    for _ in range(100):
        single = baoab(single, potential=slow, dt=0.5e-3, kT=KT, friction=0.0, generator=generator)
    integrator.step(100)
    theirs = arrays(context)
    assert float((theirs[0] - single.positions[0]).abs().max()) < 1e-6
    assert float((theirs[1] - half_step_velocities(single, dt=0.5e-3)[0]).abs().max()) < 1e-4
    # negative controls: without the half kick, and between the two integrators
    assert float((theirs[1] - single.velocities[0]).abs().max()) > 1e-2
    assert float((md.positions - single.positions).abs().max()) > 1e-5


def copies_of(openmm_system: openmm.System, count: int) -> openmm.System:
    """Return `count` molecules of four atoms that do not interact."""
    result = openmm.System()
    for _ in range(count):
        for atom in range(4):
            result.addParticle(openmm_system.getParticleMass(atom))
    for force in openmm_system.getForces():
        copied = type(force)()
        for offset in range(0, 4 * count, 4):
            if isinstance(force, openmm.HarmonicBondForce):
                for i in range(force.getNumBonds()):
                    a, b, *rest = force.getBondParameters(i)
                    copied.addBond(a + offset, b + offset, *rest)
            elif isinstance(force, openmm.HarmonicAngleForce):
                for i in range(force.getNumAngles()):
                    *atoms, value, k = force.getAngleParameters(i)
                    copied.addAngle(*(atom + offset for atom in atoms), value, k)
            else:
                for i in range(force.getNumTorsions()):
                    *atoms, n, value, k = force.getTorsionParameters(i)
                    copied.addTorsion(*(atom + offset for atom in atoms), n, value, k)
        result.addForce(copied)
    return result


CHAIN_T = four_atom_chain.KT / BOLTZMANN_KJ_PER_MOL_K
COPIES, ROUNDS, EVERY = 200, 150, 4
DT, N_INNER, CHAIN_FRICTION = 6e-3, 3, 15.0


class ChainStatistics:
    """Averages per copy: energies of bonds, angles, torsion, bond length, kinetic energy, and <v(0) v(lag)> m / kT."""

    def __init__(self) -> None:
        self.terms = [
            AmberPotential.from_openmm(only(CHAIN.openmm_system, (kind,)), CHAIN.system, name=kind.__name__) for kind in BONDED
        ]
        self.rows: list[torch.Tensor] = []
        self.before: torch.Tensor | None = None

    def add(self, x: torch.Tensor, v: torch.Tensor) -> None:
        x, v = x.reshape(-1, 4, 3), v.reshape(-1, 4, 3)
        if self.before is not None:
            values = [term.energy(State(positions=x)) for term in self.terms]
            values.append((x[:, 1:] - x[:, :-1]).norm(dim=2).mean(dim=1))
            values.append(0.5 * v.square().sum(dim=(1, 2)))  # of atoms of 1 Da
            values.append((v * self.before).mean(dim=(1, 2)) / four_atom_chain.KT)
            self.rows.append(torch.stack(values, dim=1))
        self.before = v

    def mean_and_square_error(self) -> tuple[torch.Tensor, torch.Tensor]:
        mean = torch.stack(self.rows).mean(dim=0)
        return mean.mean(dim=0), mean.var(dim=0) / len(mean)


CHAIN = four_atom_chain.prepared()


def chain_start() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.from_numpy(CHAIN.positions).repeat(COPIES, 1, 1)
    masses = torch.ones(4, dtype=torch.float64)
    return x, thermal_velocities(x.shape, masses, four_atom_chain.KT, generator)


def chain_by_openmm(integrator: openmm.Integrator, every: int) -> ChainStatistics:
    system = grouped(copies_of(CHAIN.openmm_system, COPIES), BONDED[:2])
    context = context_of(system, integrator, *chain_start())
    integrator.step(25 * every)
    statistics = ChainStatistics()
    for _ in range(ROUNDS):
        integrator.step(every)
        statistics.add(*arrays(context))
    return statistics


def multiple_time_steps(friction: float = CHAIN_FRICTION, temperature_K: float = CHAIN_T) -> ChainStatistics:
    groups = [(OUTER_GROUP, 1), (INNER_GROUP, N_INNER)]
    return chain_by_openmm(openmm.MTSLangevinIntegrator(temperature_K * unit.kelvin, friction, DT, groups), EVERY)


def middle(friction: float = CHAIN_FRICTION, temperature_K: float = CHAIN_T) -> ChainStatistics:
    return chain_by_openmm(openmm.LangevinMiddleIntegrator(temperature_K, friction, DT / N_INNER), EVERY * N_INNER)


def chain_by_us(*, n_inner: int) -> ChainStatistics:
    """Multi-time-step dynamics with bonds and angles inside, or `baoab` at the inner step where `n_inner` is 0."""
    slow = AmberPotential.from_openmm(CHAIN.openmm_system, CHAIN.system, name="chain")
    fast = AmberPotential.from_openmm(only(CHAIN.openmm_system, BONDED[:2]), CHAIN.system, name="stiff")
    generator = torch.Generator().manual_seed(12)
    bath = {"kT": four_atom_chain.KT, "friction": CHAIN_FRICTION, "generator": generator}
    x, v = chain_start()
    md = start(x, v, masses=torch.ones(4, dtype=torch.float64), potential=slow, fast=fast if n_inner else None)
    statistics = ChainStatistics()
    for step in range(1, (25 + ROUNDS) * EVERY * (1 if n_inner else N_INNER) + 1):
        if n_inner:
            md = respa_baoab(md, fast=fast, slow=slow, n_inner=n_inner, dt=DT, **bath)
        else:
            md = baoab(md, potential=slow, dt=DT / N_INNER, **bath)
        every = EVERY * (1 if n_inner else N_INNER)
        if step > 25 * every and step % every == 0:
            # the velocities of LangevinMiddle are those of the half step
            statistics.add(md.positions, md.velocities if n_inner else half_step_velocities(md, dt=DT / N_INNER))
    return statistics


@pytest.mark.slow
@pytest.mark.parametrize(("theirs", "n_inner"), [(multiple_time_steps, N_INNER), (middle, 0)])
def test_averages_and_correlations_are_those_of_openmm(theirs, n_inner):
    mean, square = chain_by_us(n_inner=n_inner).mean_and_square_error()

    def deviations(statistics: ChainStatistics) -> torch.Tensor:
        other, other_square = statistics.mean_and_square_error()
        return (mean - other).abs() / (square + other_square).sqrt()

    assert (deviations(theirs()) < 5).all()
    assert abs(float(mean[3]) - four_atom_chain.truth()["bond"]) < 5 * float(square[3].sqrt())
    # negative controls: a tenth more heat is seen in every energy, less friction in the correlation of velocities
    hot = deviations(theirs(temperature_K=1.1 * CHAIN_T))
    assert (hot[[0, 1, 4]] > 5).all()
    assert deviations(theirs(friction=0.7 * CHAIN_FRICTION))[5] > 5
