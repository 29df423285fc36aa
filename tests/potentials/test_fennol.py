"""FeNNol models as teachers: against FeNNol's own calculator, in boxes, as ensembles, and where lists do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from contracts import Tolerance, check_potential
from longstride.errors import DataError, LongstrideError
from longstride.potentials.fennol import FennolPotential, fennol_label
from longstride.state import State
from longstride.units import ANGSTROM_NM, EV_KJ_PER_MOL

pytest.importorskip("fennol")

from fennol_models import save_model, system

NUMBERS = (6, 8, 1, 1, 1, 1)
METHANOL_NM = 0.1 * np.array(
    [[0.0, 0.0, 0.0], [1.42, 0.0, 0.0], [1.74, 0.9, 0.0], [-0.36, -1.03, 0.0], [-0.36, 0.51, 0.89], [-0.36, 0.51, -0.89]]
)
ANI1X = Path(__file__).parents[3] / "shared" / "models" / "ani1x"


def geometries(count, *, seed=1, width=0.004):
    noise = torch.randn(count, len(NUMBERS), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.from_numpy(METHANOL_NM) + width * noise


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fennol")
    return [
        save_model(folder / "a.fnx", seed=1),
        save_model(folder / "b.fnx", seed=2),
        save_model(folder / "wide.fnx", seed=3, hidden=(10, 6)),
    ]


@pytest.fixture(scope="module")
def methanol(weights):
    return FennolPotential(system(NUMBERS), weights=weights[:1], dtype="float64")


@pytest.fixture(scope="module")
def liquid():
    """Twenty-seven atoms in a box of 0.9 nm, on a disturbed lattice of 0.3 nm, and the box."""
    sites = np.stack(np.meshgrid(*[np.arange(3)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    x = 0.3 * sites + np.random.default_rng(4).normal(scale=0.06, size=(27, 3))
    return system((8, 1, 6) * 9, "liquid"), torch.from_numpy(x)[None], 0.9 * torch.eye(3, dtype=torch.float64)[None]


def reference(path, molecule, x, box=None):
    """Energy in kJ/mol and forces in kJ/mol/nm of FeNNol's ASE calculator, float32."""
    from ase import Atoms
    from fennol.ase import FENNIXCalculator

    cell = None if box is None else box[0].numpy() / ANGSTROM_NM
    atoms = Atoms(molecule.atomic_numbers, positions=x.numpy() / ANGSTROM_NM, cell=cell, pbc=box is not None)
    atoms.calc = FENNIXCalculator(str(path), gpu_preprocessing=False)
    return atoms.get_potential_energy() * EV_KJ_PER_MOL, atoms.get_forces() * EV_KJ_PER_MOL / ANGSTROM_NM


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_fulfils_the_contract_of_potentials(weights, dtype):
    tolerance = Tolerance() if dtype == "float64" else Tolerance(energy=1e-6, force=2e-2, step=2e-4)
    check_potential(FennolPotential(system(NUMBERS), weights=weights[:1], dtype=dtype), geometries(3), tolerance=tolerance)


def test_agrees_with_the_calculator_of_the_library(weights, methanol):
    x = geometries(1)
    energy, forces = methanol.energy_forces(State(positions=x))
    expected, slope = reference(weights[0], methanol.system, x[0])
    assert float(energy[0]) == pytest.approx(expected, rel=1e-7)
    np.testing.assert_allclose(forces[0].numpy(), slope, rtol=0, atol=2e-6 * np.abs(slope).max())


@pytest.mark.slow
def test_agrees_with_the_calculator_of_the_library_in_a_box(weights, liquid):
    molecule, x, box = liquid
    energy, forces = FennolPotential(molecule, weights=weights[:1], dtype="float64").energy_forces(State(positions=x, box=box))
    expected, slope = reference(weights[0], molecule, x[0], box)
    assert float(energy[0]) == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(forces[0].numpy(), slope, rtol=0, atol=1e-5 * np.abs(slope).max())
    isolated, _ = reference(weights[0], molecule, x[0])
    assert abs(isolated - expected) > 1.0  # images matter here


@pytest.mark.slow
def test_a_box_has_no_edges_and_two_boxes_have_twice_the_energy(weights, liquid):
    molecule, x, box = liquid
    potential = FennolPotential(molecule, weights=weights[:1], dtype="float64")
    energy, forces = potential.energy_forces(State(positions=x, box=box))
    # an atom moved by box vectors, and everything by any vector
    moved = x.clone()
    moved[0, 5] += box[0, 0] - 2 * box[0, 2]
    for other in (moved, x + torch.tensor([0.31, -0.17, 5.0], dtype=torch.float64)):
        found, same = potential.energy_forces(State(positions=other, box=box))
        torch.testing.assert_close(found, energy, rtol=1e-10, atol=0)
        torch.testing.assert_close(same, forces, rtol=0, atol=1e-6)
    double = system(tuple(molecule.atomic_numbers) * 2, "two boxes")
    long_box = box * torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64)[:, None]
    both = State(positions=torch.cat([x, x + box[:, :1]], dim=1), box=long_box)
    twice, same = FennolPotential(double, weights=weights[:1], dtype="float64").energy_forces(both)
    torch.testing.assert_close(twice, 2 * energy, rtol=1e-10, atol=0)
    torch.testing.assert_close(same[:, :27], forces, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_an_ensemble_is_the_mean_of_its_members(weights):
    x = State(positions=geometries(2))
    single = [FennolPotential(system(NUMBERS), weights=[path], dtype="float64").energy_forces(x) for path in weights]
    ensemble = FennolPotential(system(NUMBERS), weights=weights, dtype="float64")
    assert [len(group.members) for group in ensemble._groups] == [2, 1]  # two of one architecture go together
    energy, forces = ensemble.energy_forces(x)
    torch.testing.assert_close(energy, torch.stack([item[0] for item in single]).mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(forces, torch.stack([item[1] for item in single]).mean(0), rtol=0, atol=1e-8)
    assert float((single[0][1] - single[1][1]).abs().max()) > 1.0


@pytest.mark.slow
def test_answers_depend_on_the_positions_alone_and_lists_grow(weights):
    thin, dense = geometries(1) * 2.2, geometries(1, seed=2) * 0.7  # few and many neighbours
    potential = FennolPotential(system(NUMBERS), weights=weights[:1], dtype="float64")
    first = potential.energy_forces(State(positions=thin))
    before = next(iter(potential._groups[0]._sizes.values()))
    crowded = potential.energy_forces(State(positions=dense))
    after = next(iter(potential._groups[0]._sizes.values()))
    assert after != before  # the lists of the first configuration were too short for the second
    fresh = FennolPotential(system(NUMBERS), weights=weights[:1], dtype="float64")
    torch.testing.assert_close(crowded[0], fresh.energy_forces(State(positions=dense))[0], rtol=1e-13, atol=0)
    again = potential.energy_forces(State(positions=thin))
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one, two)


@pytest.mark.slow
def test_lists_that_do_not_fit_are_never_used(weights, monkeypatch):
    potential = FennolPotential(system(NUMBERS), weights=weights[:1], dtype="float64")
    potential.energy(State(positions=geometries(1) * 2.2))
    dense = State(positions=geometries(1, seed=2) * 0.7)
    expected = FennolPotential(system(NUMBERS), weights=weights[:1], dtype="float64").energy(dense)
    monkeypatch.setattr("longstride.potentials.fennol._overflow", lambda _: False)
    potential._groups[0]._compiled.clear()
    blind = potential.energy(dense)  # what would come out if the overflow went unnoticed
    assert abs(float(blind - expected)) > 1e-3


@pytest.mark.slow
def test_total_energies_keep_their_digits_in_float32(weights):
    x = State(positions=geometries(2))
    double = FennolPotential(system(NUMBERS), weights=weights[:1], dtype="float64").energy(x)
    single = FennolPotential(system(NUMBERS), weights=weights[:1]).energy(x)
    assert float(double.abs().min()) > 2e5
    torch.testing.assert_close(single, double, rtol=0, atol=2e-3)  # a float32 near 3e5 has steps of 0.03


@pytest.mark.parametrize(
    ("numbers", "options", "message"),
    [
        ((6, 7, 1, 17, 1, 1), {}, "a.fnx does not know N, Cl of 'methanol'; it knows H, C, O"),
        (NUMBERS, {"charge": 1}, r"net charge of \+1 and teacher .* has no input for it"),
    ],
)
def test_what_the_model_cannot_treat_is_refused_by_name(weights, numbers, options, message):
    with pytest.raises(LongstrideError, match=message) as error:
        FennolPotential(system(numbers), weights=weights[:1], **options)
    assert "\n" not in str(error.value)


def test_a_narrow_box_is_refused(weights, liquid):
    molecule, x, box = liquid
    potential = FennolPotential(molecule, weights=weights[:1])
    with pytest.raises(LongstrideError, match=r"'liquid' is 0.594 nm wide, less than twice the teacher's cutoff of 0.300 nm"):
        potential.energy(State(positions=x, box=0.66 * box))


def test_files_that_are_no_models_are_refused(tmp_path, weights):
    pickled, damaged, empty = tmp_path / "m.pkl", tmp_path / "m.fnx", tmp_path / "empty.fnx"
    pickled.write_bytes(b"cos\nsystem\n")
    damaged.write_bytes(weights[0].read_bytes()[:500])
    empty.touch()
    cases = {
        pickled: "pickled files are refused",
        damaged: "is not a FeNNol model that can be loaded",
        empty: "is empty",
        tmp_path / "absent.fnx": "no weight file .*FeNNol-PMC.*teacher_weights",
    }
    for path, message in cases.items():
        with pytest.raises(DataError, match=message) as error:
            FennolPotential(system(NUMBERS), weights=[path])
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="needs weight files"):
        FennolPotential(system(NUMBERS), weights=[])


def test_the_label_tells_weights_apart_by_content(tmp_path, weights):
    copy, changed = tmp_path / "x" / "a.fnx", tmp_path / "y" / "a.fnx"
    for path, data in ((copy, weights[0].read_bytes()), (changed, weights[1].read_bytes())):
        path.parent.mkdir()
        path.write_bytes(data)
    assert fennol_label([copy]) == fennol_label(weights[:1])
    assert fennol_label([changed]) != fennol_label(weights[:1])
    assert fennol_label(weights[:2]).startswith("fennol-a-x2-")


@pytest.mark.slow
@pytest.mark.skipif(not ANI1X.is_dir(), reason="the ANI-1x weights (shared/models) are not here")
def test_ani1x_agrees_with_the_calculator_of_the_library():
    files = sorted(ANI1X.glob("*.fnx"))
    x = geometries(1)
    singles = [reference(path, system(NUMBERS), x[0]) for path in files[:2]]
    potential = FennolPotential(system(NUMBERS), weights=files[:2])
    energy, forces = potential.energy_forces(State(positions=x))
    slope = np.mean([single[1] for single in singles], axis=0)
    assert float(energy[0]) == pytest.approx(np.mean([single[0] for single in singles]), rel=1e-7)
    np.testing.assert_allclose(forces[0].numpy(), slope, rtol=0, atol=5e-6 * np.abs(slope).max())
    assert potential.cutoff_nm == pytest.approx(0.52)
    with pytest.raises(LongstrideError, match="does not know S"):
        FennolPotential(system((16, 1, 1)), weights=files[:1])
