from dataclasses import replace

import numpy as np
import pytest
import torch

from longstride.errors import DataError
from longstride.flows.zmatrix import Internals, build_zmatrix, place_in_frame, wrap
from longstride.state import System
from longstride.systems import prepare_sequence, torsion


def molecule(numbers, bonds):
    n = len(numbers)
    return System(
        name="test",
        atomic_numbers=np.array(numbers),
        masses=np.ones(n),
        bonds=np.array(bonds),
        atom_names=tuple(f"A{i}" for i in range(n)),
        residue_names=("RES",) * n,
        residue_indices=np.zeros(n, dtype=np.int64),
    )


BUTANE = molecule(
    [6, 6, 6, 6] + [1] * 10,
    [(0, 1), (1, 2), (2, 3), (0, 4), (0, 5), (0, 6), (1, 7), (1, 8), (2, 9), (2, 10), (3, 11), (3, 12), (3, 13)],
)
RING = molecule([6, 6, 6, 6, 7, 8, 1], [(0, 1), (1, 2), (2, 3), (3, 4), (0, 4), (2, 5), (5, 6)])
# a five- and a six-membered ring that share the bond 3-4, as in tryptophan, with a tail
FUSED = molecule(
    [6, 6, 7, 6, 6, 6, 6, 6, 6, 6, 1, 1],
    [(0, 1), (1, 2), (2, 3), (3, 4), (0, 4), (4, 5), (5, 6), (6, 7), (7, 8), (3, 8), (0, 9), (7, 10), (9, 11)],
)
WATER = molecule([8, 1, 1], [(0, 1), (0, 2)])
MOLECULES = {"butane": BUTANE, "ring": RING, "fused": FUSED, "water": WATER}


def random_positions(system, batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 0.15 * torch.randn(batch, system.n_atoms, 3, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("system", MOLECULES.values(), ids=MOLECULES)
def test_positions_survive_the_round_trip(system):
    zmatrix = build_zmatrix(system)
    x = random_positions(system)
    back = place_in_frame(zmatrix.to_cartesian(zmatrix.from_cartesian(x)), *zmatrix.frame(x))
    assert (x - back).abs().max() < 1e-12


@pytest.mark.parametrize("system", MOLECULES.values(), ids=MOLECULES)
def test_internals_do_not_see_rigid_motion(system):
    zmatrix = build_zmatrix(system)
    x = random_positions(system)
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    rotation = rotation * torch.linalg.det(rotation)
    before, after = zmatrix.from_cartesian(x), zmatrix.from_cartesian(x @ rotation.T + 3.0)
    for name in ("bonds", "angles", "dihedrals"):
        assert torch.allclose(getattr(before, name), getattr(after, name), atol=1e-10)


def test_every_rotatable_bond_has_one_free_dihedral():
    zmatrix = build_zmatrix(BUTANE)
    axes = [frozenset(zmatrix.rows[row + 3, 1:3]) for row in zmatrix.free]
    assert sorted(map(sorted, axes)) == [[0, 1], [1, 2], [2, 3]]
    for row in zmatrix.offsets:
        atom, parent, _, sibling = zmatrix.rows[row + 3]
        assert sibling in zmatrix.rows[zmatrix.rows[:, 1] == parent, 0]
        assert atom != sibling


def test_bonds_that_close_a_ring_are_coordinates():
    for system, count in ((RING, 1), (FUSED, 2)):
        zmatrix = build_zmatrix(system)
        assert len(zmatrix.closures) == count
        x = random_positions(system)
        internals = zmatrix.from_cartesian(x)
        for row in zmatrix.closures:
            atom, first, second, _ = zmatrix.rows[row]
            assert sorted((atom, second)) in system.bonds.tolist()
            assert torch.equal(internals.bonds[:, row - 1], (x[:, atom] - x[:, first]).norm(dim=-1))
            assert torch.equal(internals.angles[:, row - 2], (x[:, atom] - x[:, second]).norm(dim=-1))


def test_a_ring_that_cannot_close_is_not_a_number():
    zmatrix = build_zmatrix(RING)
    internals = zmatrix.from_cartesian(random_positions(RING))
    row = int(zmatrix.closures[0])
    too_short = internals.bonds.clone()
    too_short[1, row - 1] = 1e-4
    angles = internals.angles.clone()
    angles[1, row - 2] = 1e-4
    x = zmatrix.to_cartesian(replace(internals, bonds=too_short, angles=angles))
    assert x[1].isnan().any()
    assert x[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("sequence", "turning", "puckers"),
    [
        ("ACE-PRO-NME", {"CH3-C", "C-N", "CA-C", "CA-N"}, 1),
        ("ACE-PHE-NME", {"CH3-C", "C-N", "CA-C", "CA-N", "CA-CB", "CB-CG"}, 0),
        ("ACE-TRP-NME", {"CH3-C", "C-N", "CA-C", "CA-N", "CA-CB", "CB-CG"}, 0),
    ],
)
def test_rings_of_amino_acids(sequence, turning, puckers):
    system = prepare_sequence(sequence, name=sequence, force_field=("amber14-all.xml",), cutoff_nm=None).system
    zmatrix = build_zmatrix(system)
    rows = [zmatrix.rows[index + 3] for index in zmatrix.free]
    closing = [row for row in rows if zmatrix.rows.tolist().index(row.tolist()) in zmatrix.closures]
    assert len(closing) == puckers
    names = system.atom_names
    axes = {
        "-".join(sorted((names[row[1]], names[row[2]]), key=("CH3 CA CB CG C N".split()).index))
        for row in rows
        if not any(row is ring for ring in closing)
    }
    assert axes == turning


def test_rings_of_three_atoms_are_refused():
    with pytest.raises(DataError, match="rings at atom"):
        build_zmatrix(molecule([6, 6, 6, 6], [(0, 1), (1, 2), (0, 2), (2, 3)]))


def test_a_mirror_image_flips_dihedrals_only():
    zmatrix = build_zmatrix(BUTANE)
    x = random_positions(BUTANE)
    here, mirrored = zmatrix.from_cartesian(x), zmatrix.from_cartesian(x * torch.tensor([1.0, 1.0, -1.0]))
    assert torch.allclose(here.bonds, mirrored.bonds)
    assert torch.allclose(wrap(here.dihedrals + mirrored.dihedrals), torch.zeros(()).double(), atol=1e-10)


def rigid_and_internal_to_cartesian(zmatrix, values):
    """Map (translation, Euler angles, internals), 3N values, to 3N Cartesian coordinates."""
    n = zmatrix.n_atoms
    shift, (alpha, beta, gamma), rest = values[:3], values[3:6], values[6:]
    internals = Internals(bonds=rest[None, : n - 1], angles=rest[None, n - 1 : 2 * n - 3], dihedrals=rest[None, 2 * n - 3 :])
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)

    def about_z(a):
        return torch.stack([a.cos(), -a.sin(), zero, a.sin(), a.cos(), zero, zero, zero, one]).view(3, 3)

    about_x = torch.stack([one, zero, zero, zero, beta.cos(), -beta.sin(), zero, beta.sin(), beta.cos()]).view(3, 3)
    rotation = about_z(alpha) @ about_x @ about_z(gamma)
    return (zmatrix.to_cartesian(internals)[0] @ rotation.T + shift).flatten()


def log_volume(zmatrix, x, seed):
    generator = torch.Generator().manual_seed(seed)
    internals = zmatrix.from_cartesian(x)
    euler = torch.rand(3, generator=generator, dtype=torch.float64) * 2 + 0.5
    values = torch.cat(
        [torch.randn(3, generator=generator, dtype=torch.float64), euler, internals.bonds[0], internals.angles[0]]
    )
    values = torch.cat([values, internals.dihedrals[0]])
    jacobian = torch.autograd.functional.jacobian(lambda v: rigid_and_internal_to_cartesian(zmatrix, v), values)
    # the invariant measure of rotations in Euler angles is sin(beta)
    return torch.linalg.slogdet(jacobian)[1] - euler[1].sin().log(), internals


@pytest.mark.parametrize("system", MOLECULES.values(), ids=MOLECULES)
def test_measure_equals_the_jacobian_of_the_placement(system):
    zmatrix = build_zmatrix(system)
    for seed in range(3):
        x = random_positions(system, batch=1, seed=seed)
        measured, internals = log_volume(zmatrix, x, seed)
        assert abs((measured - zmatrix.log_measure(internals, x)[0]).item()) < 1e-8
        without_sine = 2 * internals.bonds.log().sum()
        assert abs((measured - without_sine).item()) > 1e-3  # negative control


def test_dihedrals_have_the_iupac_sign():
    zmatrix = build_zmatrix(BUTANE)
    x = random_positions(BUTANE)
    for row, value in zip(zmatrix.rows[3:], zmatrix.from_cartesian(x).dihedrals[0], strict=True):
        if row[3] in zmatrix.rows[zmatrix.rows[:, 1] == row[1], 0]:
            continue  # an offset is measured from a sibling, which is no chain of four atoms
        assert abs(torsion(x[0].numpy(), tuple(map(int, row))) - value.item()) < 1e-12


def test_two_molecules_and_two_atoms_are_refused():
    with pytest.raises(DataError, match="more than one piece"):
        build_zmatrix(molecule([8, 1, 1, 8, 1, 1], [(0, 1), (0, 2), (3, 4), (3, 5)]))
    with pytest.raises(DataError, match="at least three"):
        build_zmatrix(molecule([1, 1], [(0, 1)]))
