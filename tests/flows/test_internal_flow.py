import math

import numpy as np
import pytest
import torch

from longstride.errors import DataError
from longstride.flows import circular
from longstride.flows.internal import FlowArchitecture, InternalFlow, torsion_features
from longstride.flows.transforms import AffineCoupling
from longstride.flows.zmatrix import Internals, build_zmatrix
from longstride.state import State, System

BONDS = [(0, 1), (1, 2), (2, 3), (0, 4), (0, 5), (0, 6), (1, 7), (1, 8), (2, 9), (2, 10), (3, 11), (3, 12), (3, 13)]


def butane():
    n = 14
    return System(
        name="butane",
        atomic_numbers=np.array([6] * 4 + [1] * 10),
        masses=np.ones(n),
        bonds=np.array(BONDS),
        atom_names=tuple(f"A{i}" for i in range(n)),
        residue_names=("RES",) * n,
        residue_indices=np.zeros(n, dtype=np.int64),
    )


def frames(zmatrix, count, seed=0):
    """Draw tetrahedral molecules with thermal noise: [count, atom, 3] float64."""
    generator = torch.Generator().manual_seed(seed)
    n = zmatrix.n_atoms

    def noisy(size, centre, width):
        return centre + width * torch.randn(count, size, generator=generator, dtype=torch.float64)

    dihedrals = noisy(n - 3, 0.0, 0.1)
    sign = torch.tensor([1.0 if position % 2 else -1.0 for position in range(len(zmatrix.offsets))], dtype=torch.float64)
    dihedrals[:, zmatrix.offsets] += sign * math.radians(120)
    dihedrals[:, zmatrix.free] = 2 * math.pi * (torch.rand(count, len(zmatrix.free), generator=generator).double() - 0.5)
    internals = Internals(bonds=noisy(n - 1, 0.12, 0.004), angles=noisy(n - 2, 1.9, 0.08), dihedrals=dihedrals)
    return zmatrix.to_cartesian(internals)


def random_flow(dtype=torch.float32, scale=0.3):
    """Return a flow whose weights are random everywhere, so that no transform is the identity."""
    system = butane()
    torch.manual_seed(3)
    flow = InternalFlow(build_zmatrix(system), FlowArchitecture(lags_ps=(10.0, 100.0), hidden=16, couplings=3))
    flow.set_statistics(flow.zmatrix.from_cartesian(frames(flow.zmatrix, 500)))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, value in flow.named_parameters():
            if name.startswith("transforms"):
                value.add_(scale * torch.randn(value.shape, generator=generator) / math.sqrt(value.shape[-1]))
    for module in (flow.torsion_network, flow.transforms):
        module.to(dtype)
    return flow, system


@pytest.mark.parametrize("label", [0, 1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-9)])
def test_density_of_a_sample_is_the_one_it_was_drawn_with(label, dtype, tolerance):
    flow, system = random_flow(dtype)
    x = State(positions=frames(flow.zmatrix, 64, seed=5))
    proposal = flow.bind(system, label=label)
    y, log_q = proposal.sample(x, torch.Generator().manual_seed(0))
    inside = log_q.isfinite()
    assert inside.sum() > 32
    assert (proposal.log_prob(y, x) - log_q)[inside].abs().max() < tolerance
    same, forward, backward = proposal.propose(x, torch.Generator().manual_seed(0))
    assert torch.equal(same.positions, y.positions)
    assert torch.equal(forward[inside], log_q[inside])
    assert (proposal.log_prob(x, y) - backward)[inside].abs().max() < tolerance


def test_proposals_keep_the_frame_and_the_handedness_of_x():
    flow, system = random_flow()
    x = State(positions=frames(flow.zmatrix, 16, seed=5) + 1.0)
    y, log_q = flow.bind(system).sample(x, torch.Generator().manual_seed(0))
    for mine, theirs in zip(flow.zmatrix.frame(x.positions), flow.zmatrix.frame(y.positions), strict=True):
        assert torch.allclose(mine[log_q.isfinite()], theirs[log_q.isfinite()], atol=1e-9)
    mirror = State(positions=x.positions * torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    proposal = flow.bind(system)
    assert proposal.contains(x).all()
    assert not proposal.contains(mirror).any()
    assert (proposal.log_prob(mirror, x) == -torch.inf).all()
    assert log_q.isfinite().sum() > 8
    assert proposal.contains(State(positions=y.positions[log_q.isfinite()])).all()


def test_a_draw_outside_the_domain_is_marked_invalid():
    flow, system = random_flow()
    with torch.no_grad():
        flow.whiten.mul_(0.02)  # stiff coordinates fifty times too wide: negative bonds, inverted centres
    x = State(positions=frames(flow.zmatrix, 64, seed=5))
    _, log_q = flow.bind(system).sample(x, torch.Generator().manual_seed(0))
    assert log_q.isnan().all()


def test_the_independent_label_does_not_see_x():
    flow, system = random_flow()
    one, other, y = (State(positions=frames(flow.zmatrix, 8, seed=seed)) for seed in (1, 2, 3))
    independent, lagged = flow.bind(system, label=2), flow.bind(system, label=0)
    assert torch.equal(independent.log_prob(y, one), independent.log_prob(y, other))
    assert not torch.equal(lagged.log_prob(y, one), lagged.log_prob(y, other))


def test_circular_mixture_integrates_to_one_and_draws_from_itself():
    generator = torch.Generator().manual_seed(0)
    parameters = 3 * torch.randn(5, circular.n_parameters(4), generator=generator, dtype=torch.float64)
    grid = torch.linspace(-math.pi, math.pi, 20001, dtype=torch.float64)[:-1]
    density = circular.log_prob(grid.expand(5, -1), parameters[:, None].expand(-1, len(grid), -1)).exp()
    assert torch.allclose(density.sum(1) * (2 * math.pi / len(grid)), torch.ones(5).double(), atol=1e-10)
    drawn = circular.sample(parameters[:, None].expand(-1, 40000, -1), generator)
    expected = (density * grid.cos()).sum(1) * (2 * math.pi / len(grid))
    spread = (density * grid.cos().square()).sum(1) * (2 * math.pi / len(grid)) - expected.square()
    assert ((drawn.cos().mean(1) - expected).abs() < 5 * (spread / 40000).sqrt()).all()


def test_each_torsion_density_is_normalised_and_sees_only_the_ones_before():
    flow, _ = random_flow(torch.float64)
    network = flow.torsion_network
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(1, network.mask.shape[-1] - 6 * network.n_torsions, generator=generator, dtype=torch.float64)
    n = 4096
    grid = torch.arange(n, dtype=torch.float64) * (2 * math.pi / n) - math.pi
    fixed = torch.tensor([0.3, -2.0, 1.1], dtype=torch.float64)
    for k in range(network.n_torsions):
        torsions = fixed.repeat(n, 1)
        torsions[:, k] = grid
        parameters = network.parameters_of(torch.cat([context.expand(n, -1), torsion_features(torsions)], -1))
        assert torch.allclose(parameters[: k + 1], parameters[: k + 1, :1].expand(-1, n, -1), atol=1e-12)
        assert (parameters[k + 1 :] - parameters[k + 1 :, :1]).abs().amax() > 1e-3 if k + 1 < network.n_torsions else True
        total = circular.log_prob(grid, parameters[k]).exp().sum() * (2 * math.pi / n)
        assert abs(total.item() - 1) < 1e-10


def test_couplings_invert_and_report_their_jacobian():
    torch.manual_seed(0)
    mask = torch.tensor([True, False, True, False, True])
    transform = AffineCoupling(mask, 3, 8).double()
    for value in transform.parameters():
        torch.nn.init.normal_(value, std=0.5)
    u, context = torch.randn(4, 5).double(), torch.randn(4, 3).double()
    z, logdet = transform(u, context)
    back, same = transform.inverse(z, context)
    assert torch.allclose(back, u, atol=1e-10)
    assert torch.allclose(logdet, same)
    for b in range(4):
        jacobian = torch.autograd.functional.jacobian(lambda v, b=b: transform(v[None], context[b : b + 1])[0][0], u[b])
        assert abs(torch.linalg.slogdet(jacobian)[1] - logdet[b]) < 1e-9
        assert abs(torch.linalg.slogdet(jacobian)[1] + logdet[b]) > 1e-2  # negative control: the sign matters


def test_unsuitable_molecules_labels_and_data_are_refused():
    flow, system = random_flow()
    with pytest.raises(DataError, match="none has index 7"):
        flow.bind(system, label=7)
    with pytest.raises(DataError, match="too few"):
        flow.set_statistics(flow.zmatrix.from_cartesian(frames(flow.zmatrix, 20)))
