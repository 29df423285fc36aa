"""TorchANI, MACE and AIMNet2 as teachers, with random weights, against the calculators of their own packages.

None of these packages is needed for anything else, so the tests run where they are installed
(pip install 'longstride[all-teachers]').
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest_potentials import distorted, molecule

from contracts import Tolerance, check_potential
from longstride.errors import DataError, LongstrideError
from longstride.state import State
from longstride.units import ANGSTROM_NM, EV_KJ_PER_MOL

SEQUENCE = "ACE-ALA-NME"
FLOAT32 = Tolerance(energy=1e-6, force=2e-2, step=2e-4)
HYDROGEN_SULFIDE_NUMBERS = (16, 1, 1)


def agrees(potential, calculator, *, box_nm, rel=1e-8, force=1e-6):
    """Compare isolated and in a box with an ASE calculator; return both energies."""
    from ase import Atoms

    x = distorted(SEQUENCE)[:1]
    atoms = Atoms(potential.system.atomic_numbers, positions=x[0].numpy() / ANGSTROM_NM)
    atoms.calc = calculator
    found = []
    for edge in (None, box_nm):
        box = None if edge is None else edge * torch.eye(3, dtype=torch.float64)[None]
        if edge is not None:
            atoms.set_cell(edge / ANGSTROM_NM * np.eye(3))
            atoms.set_pbc((True, True, True))
        energy, forces = potential.energy_forces(State(positions=x, box=box))
        assert float(energy[0]) == pytest.approx(atoms.get_potential_energy() * EV_KJ_PER_MOL, rel=rel)
        slope = atoms.get_forces() * EV_KJ_PER_MOL / ANGSTROM_NM
        np.testing.assert_allclose(forces[0].numpy(), slope, rtol=0, atol=force * np.abs(slope).max())
        found.append(float(energy[0]))
    return found


def other_system(numbers):
    from fennol_models import system

    return system(numbers, "H2S")


@pytest.mark.slow
def test_torchani(tmp_path):
    pytest.importorskip("torchani")
    from longstride.potentials.torchani import TorchANIPotential, ani_architecture

    torch.manual_seed(0)
    network = ani_architecture("ani1x")
    path = tmp_path / "ani1x_state_dict.pt"
    torch.save(network.state_dict(), path)
    made = molecule(SEQUENCE).system
    double = TorchANIPotential(made, weights=[path], model="ani1x", dtype="float64", device="cpu")
    check_potential(double, distorted(SEQUENCE)[:3])
    check_potential(
        TorchANIPotential(made, weights=[path], model="ani1x", device="cpu"), distorted(SEQUENCE)[:3], tolerance=FLOAT32
    )
    isolated, boxed = agrees(double, network.double().ase(), box_nm=1.05)
    assert abs(isolated - boxed) > 1e-3
    x = State(positions=distorted(SEQUENCE)[:1])
    members = [
        TorchANIPotential(made, weights=[path], model="ani1x", dtype="float64", device="cpu", member=k).energy(x)
        for k in range(8)
    ]
    torch.testing.assert_close(torch.stack(members).mean(0), double.energy(x), rtol=1e-12, atol=0)
    with pytest.raises(LongstrideError, match="does not know S of 'H2S'; it knows H, C, N, O"):
        TorchANIPotential(other_system(HYDROGEN_SULFIDE_NUMBERS), weights=[path], model="ani1x")
    with pytest.raises(LongstrideError, match=r"net charge of \+1"):
        TorchANIPotential(made, weights=[path], model="ani1x", charge=1)
    with pytest.raises(DataError, match="cannot be loaded"):  # the tensors of another model
        TorchANIPotential(made, weights=[path], model="ani2x")


@pytest.mark.slow
def test_mace(tmp_path):
    pytest.importorskip("mace")
    from longstride.potentials.mace import MACEPotential

    file, script = random_mace(tmp_path)
    made = molecule(SEQUENCE).system
    double = MACEPotential(made, weights=[script], dtype="float64", device="cpu")
    check_potential(double, distorted(SEQUENCE)[:3])
    check_potential(
        MACEPotential(made, weights=[file], unsafe_pickle=True, device="cpu"), distorted(SEQUENCE)[:3], tolerance=FLOAT32
    )
    from mace.calculators import MACECalculator

    isolated, boxed = agrees(double, MACECalculator(str(file), device="cpu", default_dtype="float64"), box_nm=0.9)
    assert abs(isolated - boxed) > 1e-3
    with pytest.raises(DataError, match=r"restricted loader refuses.*unsafe_pickle: true"):
        MACEPotential(made, weights=[file])
    with pytest.raises(LongstrideError, match="does not know S of 'H2S'; it knows H, C, N, O"):
        MACEPotential(other_system(HYDROGEN_SULFIDE_NUMBERS), weights=[script])
    with pytest.raises(LongstrideError, match=r"net charge of \+1"):
        MACEPotential(made, weights=[script], charge=1)


def random_mace(folder):
    """Save one small MACE with random weights as a pickled module and as TorchScript."""
    with torch.serialization.safe_globals([slice]):  # e3nn reads its constants
        from e3nn import o3
        from e3nn.util import jit
        from mace import modules
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        network = modules.ScaleShiftMACE(
            r_max=4.0,
            num_bessel=6,
            num_polynomial_cutoff=5,
            max_ell=2,
            interaction_cls=modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
            interaction_cls_first=modules.interaction_classes["RealAgnosticInteractionBlock"],
            num_interactions=2,
            num_elements=4,
            hidden_irreps=o3.Irreps("8x0e + 8x1o"),
            MLP_irreps=o3.Irreps("8x0e"),
            gate=torch.nn.functional.silu,
            atomic_energies=np.array([-13.6, -1000.0, -1480.0, -2040.0]),
            avg_num_neighbors=8.0,
            atomic_numbers=[1, 6, 7, 8],
            correlation=2,
            radial_type="bessel",
            atomic_inter_scale=1.0,
            atomic_inter_shift=0.0,
        )
        torch.save(network, folder / "random.model")
        torch.jit.save(jit.compile(network), folder / "random_compiled.model")
    finally:
        torch.set_default_dtype(torch.float32)
    return folder / "random.model", folder / "random_compiled.model"


@pytest.mark.slow
def test_aimnet2(tmp_path):
    pytest.importorskip("aimnet")
    from aimnet.calculators import AIMNet2ASE, AIMNet2Calculator

    from longstride.potentials.aimnet import AIMNet2Potential

    path = random_aimnet(tmp_path)
    made = molecule(SEQUENCE).system
    potential = AIMNet2Potential(made, weights=[path], device="cpu")
    check_potential(potential, distorted(SEQUENCE)[:3], tolerance=FLOAT32)
    calculator = AIMNet2ASE(AIMNet2Calculator(str(path), device="cpu"))
    isolated, boxed = agrees(potential, calculator, box_nm=1.3, rel=1e-9, force=1e-5)
    assert abs(isolated - boxed) > 1e-3
    x = State(positions=distorted(SEQUENCE)[:1])
    charged = AIMNet2Potential(made, weights=[path], device="cpu", charge=2).energy(x)
    assert abs(float(charged) - isolated) > 1.0
    with pytest.raises(LongstrideError, match="needs an even number"):
        AIMNet2Potential(made, weights=[path], charge=1)
    with pytest.raises(LongstrideError, match="does not know S of 'H2S'; it knows H, C, N, O"):
        AIMNet2Potential(other_system(HYDROGEN_SULFIDE_NUMBERS), weights=[path])


def random_aimnet(folder):
    """Export one small AIMNet2 with random weights, as the package exports trained ones."""
    from pathlib import Path

    import yaml
    from aimnet import models
    from aimnet.config import build_module
    from aimnet.train.export_model import export_model

    content = yaml.safe_load((Path(models.__file__).parent / "aimnet2.yaml").read_text())
    content["kwargs"].update(hidden=[[32, 16], [32, 16], [32, 16, 16]], aim_size=16)
    head = content["kwargs"]["outputs"]["energy_mlp"]["kwargs"]
    head["n_in"], head["mlp"]["hidden"] = 16, [16]
    files = {name: folder / f"small.{name}" for name in ("yaml", "sae", "weights", "pt")}
    files["yaml"].write_text(yaml.safe_dump(content, sort_keys=False))  # the order of outputs matters
    files["sae"].write_text(yaml.safe_dump({1: -13.6, 6: -1036.0, 7: -1488.0, 8: -2043.0}))
    torch.manual_seed(0)
    torch.save(build_module(content).state_dict(), files["weights"])
    export_model.callback(
        weights=str(files["weights"]),
        output=str(files["pt"]),
        model=str(files["yaml"]),
        sae=str(files["sae"]),
        needs_coulomb=None,
        needs_dispersion=None,
    )
    return files["pt"]
