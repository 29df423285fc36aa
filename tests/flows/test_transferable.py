"""The transferable flow: force-field features, the torsion network, the stiff density, and the bound proposal."""

import math
from dataclasses import replace

import numpy as np
import openmm
import pytest
import torch

from longstride.errors import DataError
from longstride.flows import circular
from longstride.flows.stiff import TorsionBasis, _thermal_torsions, calibrate, narrow_torsions
from longstride.flows.torsion_features import PROFILE_HARMONICS, torsion_features
from longstride.flows.torsion_network import TorsionArchitecture, TorsionNetwork
from longstride.flows.transferable import BoundMolecule, TorsionMoves, bind
from longstride.flows.zmatrix import build_zmatrix, wrap
from longstride.potentials.amber import AmberPotential
from longstride.state import State
from longstride.systems import prepare_sequence
from longstride.units import thermal_energy
from molecules import PHYSICS

KT = thermal_energy(310.0)
SEQUENCES = ("AS", "ACE-PRO-NME")
FITTED = 100


@pytest.fixture(scope="module", params=SEQUENCES)
def molecule(request):
    return bound(request.param)


@pytest.fixture(scope="module")
def serine():
    return bound("AS")


_BOUND = {}


def bound(sequence):
    if sequence not in _BOUND:
        prepared = prepare_sequence(sequence, name=sequence, **PHYSICS)
        potential = AmberPotential.from_openmm(prepared.openmm_system, prepared.system, name="amber", dtype=torch.float64)
        _BOUND[sequence] = BoundMolecule.of(prepared, potential, kT=KT, fitted_states=FITTED)
    return _BOUND[sequence]


def features(prepared):
    zmatrix = build_zmatrix(prepared.system)
    return torsion_features(prepared.system, prepared.openmm_system, zmatrix, prepared.positions, KT), zmatrix


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = TorsionNetwork(
        TorsionArchitecture(lags_ps=(10.0,), width=16, heads=2, layers=2, message_rounds=2, components=4)
    ).double()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.2 * torch.randn(value.shape))
    return model.eval().requires_grad_(requires_grad=False)


def uniform(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 1) * math.pi


@pytest.mark.parametrize(
    ("sequence", "twofold", "narrow", "turning"),
    [
        ("ACE-ARG-NME", {"CZ-NE", "CZ-NH1", "CZ-NH2"}, {"CZ-NE", "CZ-NH1", "CZ-NH2", "C-N"}, {"CD-NE", "CA-N", "CB-CG"}),
        ("ACE-TYR-NME", {"CB-CG", "CZ-OH"}, {"CZ-OH", "C-N"}, {"CA-CB", "CB-CG", "C-CA"}),
        ("GD", {"C-CA", "CB-CG"}, {"C-N"}, {"CA-CB", "CB-CG"}),
    ],
)
def test_symmetry_numbers_and_narrow_torsions(sequence, twofold, narrow, turning):
    prepared = prepare_sequence(sequence, name=sequence, **PHYSICS)
    found, zmatrix = features(prepared)
    names = prepared.system.atom_names
    axes = ["-".join(sorted((names[a], names[b]))) for a, b in found.ends[:, 1:3].tolist()]
    assert {axis for axis, n in zip(axes, found.symmetry.tolist(), strict=True) if n == 2} == twofold
    kinds = list(zip(axes, narrow_torsions(zmatrix, prepared.system).tolist(), strict=True))
    assert {axis for axis, is_narrow in kinds if is_narrow} == narrow
    assert {axis for axis, is_narrow in kinds if not is_narrow} >= turning


def test_torsion_profile_is_that_of_openmm():
    """Turn one free torsion and compare the energy of the PeriodicTorsionForce with the series of the features."""
    prepared = prepare_sequence("AS", name="AS", **PHYSICS)
    found, zmatrix = features(prepared)
    for force in prepared.openmm_system.getForces():
        force.setForceGroup(1 if isinstance(force, openmm.PeriodicTorsionForce) else 0)
    context = openmm.Context(
        prepared.openmm_system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    x = torch.from_numpy(prepared.positions)[None]
    internals = zmatrix.from_cartesian(x)
    grid = np.linspace(-np.pi, np.pi, 24, endpoint=False)
    order = np.arange(1, PROFILE_HARMONICS + 1)[:, None]
    checked = 0
    for k, index in enumerate(zmatrix.free.tolist()):
        energies = []
        for angle in grid:
            dihedrals = internals.dihedrals.clone()
            dihedrals[0, index] = angle
            turned = zmatrix.to_cartesian(type(internals)(bonds=internals.bonds, angles=internals.angles, dihedrals=dihedrals))
            context.setPositions(turned[0].numpy())
            state = context.getState(getEnergy=True, groups={1})
            energies.append(state.getPotentialEnergy().value_in_unit(openmm.unit.kilojoule_per_mole))
        measured = np.array(energies) / KT
        if np.ptp(measured) > 11:
            continue  # capped in the features
        cosine, sine = found.profiles[k, : 2 * PROFILE_HARMONICS].numpy().reshape(2, -1, 1)
        series = (cosine * np.cos(order * grid) + sine * np.sin(order * grid)).sum(0)
        assert np.abs((series - series.mean()) - (measured - measured.mean())).max() < 1e-6
        shifted = (cosine * np.cos(order * grid) - sine * np.sin(order * grid)).sum(0)  # negative control: mirrored
        checked += 1
        if np.abs(sine).max() > 0.1:
            assert np.abs(shifted - series).max() > 0.05
    assert checked >= 4


def test_features_do_not_depend_on_names_or_frame():
    prepared = prepare_sequence("AS", name="AS", **PHYSICS)
    found, zmatrix = features(prepared)
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    rotation = (rotation * torch.linalg.det(rotation)).numpy()
    moved = torsion_features(prepared.system, prepared.openmm_system, zmatrix, prepared.positions @ rotation + 1.0, KT)
    for name, value in vars(found).items():
        assert torch.allclose(value, getattr(moved, name), atol=1e-9), name
    mirrored = torsion_features(
        prepared.system, prepared.openmm_system, zmatrix, prepared.positions * np.array([1, 1, -1.0]), KT
    )
    assert not torch.allclose(found.placements, mirrored.placements, atol=1e-3)  # handedness is seen


def test_drawn_density_is_the_scored_one_and_padding_counts_nothing(network):
    molecules = [features(prepare_sequence(s, name=s, **PHYSICS))[0] for s in ("AS", "ACE-PRO-NME")]
    tokens = network.encode(molecules).repeat(3)
    longest = tokens.tokens.shape[1]
    t_x, label = uniform(6, longest), torch.tensor([0, 1, 0, 1, 1, 0])
    context = network.context(tokens, t_x, label)
    t, log_q = network.sample(tokens, context, torch.Generator().manual_seed(3))
    assert torch.allclose(log_q, network.log_prob(tokens, t, context), atol=1e-10)
    count = molecules[1].n_torsions
    assert count < longest
    alone = network.encode(molecules[1:]).repeat(3)
    context = network.context(alone, t_x[3:, :count], label[3:])
    assert torch.allclose(network.log_prob(alone, t[3:, :count], context), log_q[3:], atol=1e-10)
    assert not torch.allclose(network.log_prob(alone, wrap(t[3:, :count] + 0.3), context), log_q[3:], atol=1e-3)


def conditional_integrals(network, found, count=400):
    """Return the integral of p(t_k | t_<k) over the circle for every torsion k and both labels."""
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) * (2 * math.pi / count) - math.pi
    tokens = network.encode([found]).repeat(count)

    def up_to(last):
        """The factors of the torsions after `last` count nothing, and those before do not see them."""
        return replace(tokens, present=tokens.present & (torch.arange(found.n_torsions) <= last))

    totals = []
    for label in (0, 1):
        t_x = uniform(1, found.n_torsions, seed=1).expand(count, -1)
        context = network.context(tokens, t_x, torch.full((count,), label))
        for k in range(found.n_torsions):
            t = uniform(1, found.n_torsions).repeat(count, 1)
            t[:, k] = grid
            log_p = network.log_prob(up_to(k), t, context) - network.log_prob(up_to(k - 1), t, context)
            totals.append(log_p.exp().sum() * (2 * math.pi / count))
    return torch.stack(totals)


def test_the_density_is_normalised(network, monkeypatch):
    found = features(prepare_sequence("AS", name="AS", **PHYSICS))[0]
    assert found.symmetry.max() > 1
    assert (conditional_integrals(network, found) - 1).abs().max() < 1e-9
    true = circular.log_prob
    monkeypatch.setattr(circular, "log_prob", lambda *values: true(*values) + 1e-3)  # negative control: scaled
    assert ((conditional_integrals(network, found) - 1.001).abs() < 1e-5).all()
    monkeypatch.setattr(circular, "log_prob", lambda angle, parameters: true(0.9 * angle, parameters))  # and not periodic
    assert ((conditional_integrals(network, found) - 1).abs() > 1e-4).any()


def test_equivalent_torsions_are_equally_likely(network):
    found = features(prepare_sequence("AS", name="AS", **PHYSICS))[0]
    tokens = network.encode([found]).repeat(20)
    t = uniform(20, found.n_torsions)
    context = network.context(tokens, t, torch.ones(20, dtype=torch.int64))
    log_p = network.log_prob(tokens, t, context)
    assert (found.symmetry > 1).sum() >= 2
    for k, n in enumerate(found.symmetry.tolist()):
        turned = t.clone()
        turned[:, k] = wrap(turned[:, k] + 2 * math.pi / n)
        assert torch.allclose(network.log_prob(tokens, turned, context), log_p, atol=1e-9)
        turned[:, k] = wrap(t[:, k] + math.pi / n)  # negative control: half way
        assert not torch.allclose(network.log_prob(tokens, turned, context), log_p, atol=1e-3)


def test_the_independent_label_does_not_see_x(network):
    found = features(prepare_sequence("AS", name="AS", **PHYSICS))[0]
    tokens = network.encode([found]).repeat(4)
    t, one, two = uniform(4, found.n_torsions), uniform(4, found.n_torsions, seed=1), uniform(4, found.n_torsions, seed=2)
    for label, sees in ((0, True), (1, False)):
        labels = torch.full((4,), label)
        scores = [network.log_prob(tokens, t, network.context(tokens, x, labels)) for x in (one, two)]
        assert torch.allclose(*scores, atol=1e-12) is not sees


def test_stiff_density(molecule):
    gaussian = molecule.gaussian
    target = gaussian.target
    t, s = target.split(molecule.states)
    conditional, mean = gaussian.at(t), gaussian.mean(t)
    z, log_q = gaussian.to_latent(s, conditional)
    back, again = gaussian.from_latent(z, conditional)
    assert target.difference(back, s).abs().max() < 1e-10
    assert torch.allclose(log_q, again)
    covariance = gaussian.lower @ torch.linalg.inv(conditional.factor[0] @ conditional.factor[0].T) @ gaussian.lower.T
    normal = torch.distributions.MultivariateNormal(mean[0], covariance_matrix=covariance)
    assert torch.allclose(normal.log_prob(mean[0] + target.difference(s[0], mean[0])), log_q[0])


def test_the_fitted_density_follows_the_torsions(serine):
    """The spread of log p(s | t) - log q(s | t) at given torsions falls when minimum and covariance follow them."""
    target = serine.gaussian.target
    t = _thermal_torsions(serine.gaussian, target.split(serine.states)[0], 60, seed=9)
    first, _ = calibrate(target.zmatrix, target.potential, reference=serine.prepared.positions, kT=KT)
    # negative control: the fit of one torsion state applied at another
    mislaid = replace(serine.gaussian, basis=Mislaid(pairs=serine.gaussian.basis.pairs))

    z = torch.randn(12, len(t), target.n_stiff, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def spread(gaussian):
        conditional = gaussian.at(t)
        log_weight = []
        for draw in z:
            s, log_q = gaussian.from_latent(draw, conditional)
            log_weight.append(target.log_density(t, s) - log_q)
        weights = torch.stack(log_weight)
        return (weights.quantile(0.75, dim=0) - weights.quantile(0.25, dim=0)).median().item()

    fitted, constant, wrong = spread(serine.gaussian), spread(first), spread(mislaid)
    assert fitted < 0.85 * constant
    assert wrong > 1.2 * fitted


class Mislaid(TorsionBasis):
    """The basis at torsions of another state."""

    def __call__(self, t):
        return super().__call__(t.roll(1, 0))


def test_gradient_of_the_internal_density(molecule):
    target = molecule.gaussian.target
    t, s = (value[:2] for value in target.split(molecule.states))
    direction = torch.randn(s.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-5
    numeric = (target.log_density(t, s - direction) - target.log_density(t, s + direction)) / 2
    assert torch.allclose(numeric, (target.gradient(t, s) * direction).sum(-1), rtol=1e-4, atol=1e-8)


def test_newton_steps_follow_the_strain(molecule):
    """Torsions of low energy are relaxed already; random ones are strained, and the steps take most of it away."""
    gaussian = molecule.gaussian
    target = gaussian.target
    t = target.split(molecule.states)[0]
    t = wrap(t + 0.5 * torch.randn(t.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    centre = gaussian.centre.expand(len(t), -1)
    stepped = gaussian.mean(t)
    at_centre, at_mean = target.log_density(t, centre), target.log_density(t, stepped)
    possible = at_centre.isfinite()  # proline's ring stays open for some
    gain = (at_mean - at_centre)[possible]
    assert possible.sum() >= 4
    assert gain.median() > 1
    backwards = target.log_density(t, 2 * centre - stepped)  # negative control: the other way
    assert (backwards - at_centre)[possible].median() < 0


def test_proposal_scores_what_it_draws(molecule, network):
    x = State(positions=molecule.states.repeat(8, 1, 1))
    root = int(molecule.gaussian.target.zmatrix.rows[0, 0])
    for label in (0, 1):
        proposal = bind(network, molecule, label=label)
        y, forward, backward = proposal.propose(x, torch.Generator().manual_seed(1))
        valid = forward.isfinite()  # the torsions of an untrained network often leave proline's ring open
        assert valid.sum() >= 3
        assert torch.allclose(proposal.log_prob(y, x)[valid], forward[valid], atol=1e-7)
        assert torch.allclose(proposal.log_prob(x, y)[valid], backward[valid], atol=1e-7)
        assert torch.allclose(y.positions[:, root], x.positions[:, root])
        assert y.positions[valid].isfinite().all()


def test_an_open_ring_is_rejected():
    proline = bound("ACE-PRO-NME")
    target = proline.gaussian.target
    t, _ = target.split(proline.states[:1])
    names, rows = proline.system.atom_names, target.zmatrix.rows[target.zmatrix.free + 3]
    phi = next(k for k, row in enumerate(rows.tolist()) if {names[row[1]], names[row[2]]} == {"N", "CA"})
    turned = t.clone()
    turned[0, phi] = wrap(turned[0, phi] + math.pi)
    z = torch.zeros(1, target.n_stiff, dtype=torch.float64)
    assert proline.decode(t, z, proline.states[:1]).log_stiff.isfinite().all()
    assert proline.decode(turned, z, proline.states[:1]).log_stiff.isnan().all()


def test_torsion_moves_give_the_reference_density(serine):
    moves = TorsionMoves(molecule=serine, refresh=0.0, pair=0.0)
    x = State(positions=serine.states[:8])
    y, forward, backward = moves.propose(x, torch.Generator().manual_seed(1))
    assert torch.allclose(serine.encode(y.positions).log_stiff, forward, atol=1e-7)
    assert torch.allclose(serine.encode(x.positions).log_stiff, backward, atol=1e-7)
    target = serine.gaussian.target
    changed = wrap(target.split(y.positions)[0] - target.split(x.positions)[0]).abs() > 1e-9
    assert (changed.sum(-1) == 1).all()


def test_mirror_images_are_outside_the_domain(serine, network):
    proposal = bind(network, serine, label=1)
    x = State(positions=serine.states)
    assert proposal.contains(x).all()
    mirrored = State(positions=x.positions * torch.tensor([1.0, 1.0, -1.0]).double())
    assert not proposal.contains(mirrored).any()
    assert (proposal.log_prob(mirrored, x) == -torch.inf).all()


def test_an_unknown_label_is_refused(serine, network):
    with pytest.raises(DataError, match="none has index 2"):
        bind(network, serine, label=2)
