"""Published Timewarp files: read as data, reproduced to rounding, refused in one line where they are something else."""

import io
import pickle
import shutil
import sys
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from longstride.cli import main
from longstride.data.frames import read_trajectories
from longstride.data.manifest import read_manifest
from longstride.data.timewarp_npz import read_published_trajectory, uniform_grid
from longstride.data.torch_archive import Made, Name, attribute, read_archive, read_tensors
from longstride.errors import DataError
from longstride.flows.cartesian import PRESETS, CartesianArchitecture, CartesianFlow
from longstride.flows.cartesian_checkpoint import is_cartesian, load_cartesian, our_name, read_published
from longstride.stages import import_timewarp

SMALL, GOLDEN = "published_format_small.pt", "published_format_small_golden.npz"
TRAJECTORY, STRUCTURE = "implicit-2olx-traj-arrays.npz", "implicit-2olx-traj-state0.pdb"
OLDER = "[amber99sbildn.xml, amber99_obc.xml]"


@pytest.fixture
def published(shared_data):
    return shared_data / "data" / "timewarp"


@pytest.fixture
def no_unpickling(monkeypatch):
    """Any use of an unpickler fails the test."""

    def forbidden(*_, **__):
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    monkeypatch.setattr(torch, "load", forbidden)


def golden(published):
    with np.load(published / GOLDEN) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


def log_likelihood(flow, inputs, networks=None):
    condition = flow.condition(inputs["x_coords"], inputs["atom_types"])
    return flow.log_prob(inputs["y_coords"], inputs["y_velocs"], condition, networks)


@pytest.mark.parametrize("layout", ["plain", "packed"])
def test_the_published_log_likelihoods_are_reproduced(published, no_unpickling, layout):
    flow = read_published(published / SMALL)
    assert flow.architecture == CartesianArchitecture(
        couplings=4, layers=2, embedding=16, width=24, feed_forward=48, hidden=48, lags_ps=(500.0,)
    )
    inputs = golden(published)
    found = log_likelihood(flow, inputs, flow.pack() if layout == "packed" else None)
    assert (found - inputs["log_likelihood"]).abs().max() < 1e-3
    assert not any(name.split(".")[0] == "timewarp" for name in sys.modules)


@pytest.mark.parametrize("change", ["lengthscales", "order", "element"])
def test_a_wrong_convention_misses_the_published_values(published, change):
    flow = read_published(published / SMALL)
    inputs = golden(published)
    if change == "lengthscales":
        flow.lengthscales.mul_(2**0.5)  # a factor 1/2 in the exponent
    if change == "order":
        inputs["y_coords"], inputs["y_velocs"] = (
            inputs["y_velocs"] + inputs["x_coords"],
            inputs["y_coords"] - inputs["x_coords"],
        )
    if change == "element":
        inputs["atom_types"] = torch.tensor([1, 0, 2, 3, 4])[inputs["atom_types"]]
    assert (log_likelihood(flow, inputs) - inputs["log_likelihood"]).abs().max() > 1e-2


def test_imported_checkpoints_serve_any_peptide_of_the_same_force_field(published, alanine, tmp_path):
    out = tmp_path / "flow"
    assert main(["import-timewarp", "checkpoint", str(published / SMALL), "--out", str(out)]) == 0
    manifest = read_manifest(out, kind="flow")
    assert manifest["tau_ps"] == [500.0]
    assert manifest["parameters"] == 180_394
    path = out / "model.safetensors"
    assert is_cartesian(path)
    inputs = golden(published)
    found = log_likelihood(load_cartesian(path, alanine), inputs)
    assert (found - inputs["log_likelihood"]).abs().max() < 1e-3


def test_help_says_where_the_published_files_are(capsys):
    with pytest.raises(SystemExit):
        main(["import-timewarp", "--help"])
    text = "".join(capsys.readouterr().out.split())
    assert "https://huggingface.co/datasets/microsoft/timewarp" in text
    assert "2aa_best_model.pt" in text


def named_like_published(architecture):
    """Return a state dict with the names and shapes of the published layout."""
    flow = CartesianFlow(architecture)
    parts = {
        "enter": "in_mlp._layers", "leave": "out_mlp._layers", "layers": "encoder_layers",
        "attention.values": "self_attn.values_proj", "attention.out": "self_attn.attention._out_projection",
        "widen": "linear1", "narrow": "linear2", "norm_attention": "norm1", "norm_feed_forward": "norm2",
        "couplings": "flow.chain", "scale": "scale_transformer", "shift": "shift_transformer",
        "log_scale_positions": "coords_prior_log_scale", "log_scale_auxiliaries": "velocs_prior_log_scale",
        "embedding": "flow.atom_embedder",
    }  # fmt: skip
    state = OrderedDict()
    for name, value in flow.state_dict().items():
        published = name
        for ours, theirs in parts.items():
            published = _replace(published, ours, theirs)
        state[published] = value
    for coupling in range(architecture.couplings):
        for net in ("scale", "shift"):
            for layer in range(architecture.layers):
                key = f"flow.chain.{coupling}.{net}_transformer.encoder_layers.{layer}.self_attn.attention.lengthscales"
                state[key] = torch.tensor(architecture.lengthscales_nm)
    return state


def _replace(name, ours, theirs):
    parts, wanted = name.split("."), ours.split(".")
    for start in range(len(parts) - len(wanted) + 1):
        if parts[start : start + len(wanted)] == wanted:
            return ".".join([*parts[:start], theirs, *parts[start + len(wanted) :]])
    return name


def test_the_names_are_those_of_the_published_file(published):
    root = read_archive(published / SMALL)
    entries = attribute(root, "model_state_dict")
    sizes = CartesianArchitecture(couplings=4, layers=2, embedding=16, width=24, feed_forward=48, hidden=48)
    expected = named_like_published(sizes)
    assert entries.keys() == expected.keys()
    shapes = {name: tuple(value.shape) for name, value in expected.items()}
    assert {name: entry.shape for name, entry in entries.items()} == shapes


@pytest.mark.slow
def test_a_file_of_the_released_2aa_layout_loads(tmp_path):
    torch.manual_seed(0)
    state = named_like_published(PRESETS["2aa"])
    path = tmp_path / "2aa.pt"
    torch.save({"model_state_dict": state}, path)
    flow = read_published(path)
    assert sum(value.numel() for value in flow.parameters()) == 106_251_658
    assert flow.architecture == PRESETS["2aa"]
    name = "flow.chain.11.shift_transformer.encoder_layers.5.linear2.weight"
    assert torch.equal(flow.state_dict()[our_name(name)], state[name])


class Trap:
    """Pickles to a call of `touch(path)`, made in one of the ways that a pickle can call something."""

    def __init__(self, path, way):
        self.path, self.way = path, way

    def __reduce__(self):
        import pathlib

        if self.way == "function":
            return (shutil.copy, (__file__, str(self.path)))
        if self.way == "method":
            return (getattr, (pathlib.Path(self.path), "touch"))
        return (eval, (f"open({str(self.path)!r}, 'w').close()",))


def program(way, path):
    """Return a hostile pickle."""
    if way in ("function", "eval"):
        return pickle.dumps({"model_state_dict": Trap(path, way)}, protocol=2)
    text = str(path).encode()
    if way == "build":
        # opened by the call, then "built" with a state
        return b"\x80\x02cbuiltins\nopen\nX" + len(text).to_bytes(4, "little") + text + b"X\x01\x00\x00\x00w\x86R}b."
    if way == "newobj":
        # io.FileIO.__new__ alone opens nothing, so the file is made by the reduce that follows
        return (
            b"\x80\x02cio\nFileIO\nX"
            + len(text).to_bytes(4, "little")
            + text
            + b"X\x01\x00\x00\x00w\x86\x81"
            + (b"0cio\nFileIO\nX" + len(text).to_bytes(4, "little") + text + b"X\x01\x00\x00\x00w\x86R.")
        )
    if way == "stack":
        return (
            b"\x80\x04\x8c\x08builtins\x94\x8c\x04open\x94\x93\x94X"
            + len(text).to_bytes(4, "little") + text + b"X\x01\x00\x00\x00w\x86R."
        )  # fmt: skip
    return b"(X" + len(text).to_bytes(4, "little") + text + b"X\x01\x00\x00\x00wiio\nopen\n."  # INST


def archive(path, data, members=()):
    with zipfile.ZipFile(path, "w") as handle:
        handle.writestr("model/data.pkl", data)
        handle.writestr("model/byteorder", "little")
        for name, content in members:
            handle.writestr(f"model/data/{name}", content)
    return path


@pytest.mark.parametrize("way", ["function", "eval", "build", "newobj", "stack", "inst"])
def test_nothing_in_a_hostile_file_runs(way, tmp_path):
    marker = tmp_path / "ran"
    path = archive(tmp_path / "model.pt", program(way, marker))
    with pytest.raises(DataError):
        read_published(path)
    assert not marker.exists()
    # the control: Python's own unpickler falls for it
    try:
        pickle.Unpickler(io.BytesIO(program(way, marker))).load()
    except (AttributeError, TypeError, pickle.UnpicklingError):
        pass
    assert marker.exists()


def test_what_was_to_be_called_is_only_remembered(tmp_path):
    marker = tmp_path / "ran"
    root = read_archive(archive(tmp_path / "model.pt", program("function", marker)))
    made = attribute(root, "model_state_dict")
    assert isinstance(made, Made)
    assert made.of == Name("shutil", "copy")
    assert made.arguments == (__file__, str(marker))


def tensor_program(*, shape, strides, offset=0, count=4):
    """Return a pickle of {"t": tensor} as PyTorch writes it, with the given layout."""

    class Reference:
        pass

    class Writer(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", count) if isinstance(value, Reference) else None

    class Tensor:
        def __reduce__(self):
            return (torch._utils._rebuild_tensor_v2, (Reference(), offset, shape, strides, False, OrderedDict()))

    buffer = io.BytesIO()
    Writer(buffer, protocol=2).dump({"t": Tensor()})
    return buffer.getvalue()


def test_tensors_keep_shape_strides_and_offset(tmp_path):
    values = np.arange(8, dtype=np.float32)
    path = archive(
        tmp_path / "a.pt", tensor_program(shape=(2, 3), strides=(1, 2), offset=1, count=8), [("0", values.tobytes())]
    )
    found = read_tensors(path, read_archive(path))["t"]
    assert np.array_equal(found, [[1, 3, 5], [2, 4, 6]])


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"shape": (5,), "strides": (1,)}, "beyond its storage"),
        ({"shape": (2,), "strides": (1,), "offset": 3}, "beyond its storage"),
        ({"shape": (2,), "strides": (-1,), "offset": 2}, "beyond its storage"),
        ({"shape": (10**12,), "strides": (0,)}, "beyond its storage"),
        ({"shape": (2,), "strides": (1,), "count": 10**6}, "does not have the 4000000 bytes"),
    ],
)
def test_tensors_never_reach_beyond_their_bytes(layout, message, tmp_path):
    path = archive(tmp_path / "a.pt", tensor_program(**layout), [("0", b"\0" * 16)])
    with pytest.raises(DataError, match=message):
        read_tensors(path, read_archive(path))


def test_random_damage_never_ends_in_anything_but_the_error(tmp_path):
    generator = np.random.default_rng(0)
    whole = tensor_program(shape=(2, 3), strides=(3, 1), count=6)
    refused = 0
    for trial in range(300):
        path = archive(tmp_path / "a.pt", scarred(whole, trial, generator), [("0", b"\0" * 24)])
        try:
            read_tensors(path, {"t": attribute(read_archive(path), "t")})
        except (DataError, AttributeError):
            refused += 1  # an attribute error is this test's own, where the entry is no tensor
    assert 30 < refused < 300


def scarred(data, trial, generator):
    """Return the bytes with one to three of them changed."""
    changed = bytearray(data)
    for position in generator.integers(len(changed), size=1 + trial % 3):
        changed[position] = generator.integers(256)
    return bytes(changed)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_archive_never_ends_in_anything_but_the_error(compression, tmp_path):
    whole, path = io.BytesIO(), tmp_path / "a.pt"
    with zipfile.ZipFile(whole, "w") as handle:
        handle.writestr("model/data.pkl", tensor_program(shape=(2, 3), strides=(3, 1), count=6), compression)
        handle.writestr("model/byteorder", "little", compression)
        handle.writestr("model/data/0", b"\0" * 24)
    generator, refused = np.random.default_rng(0), []
    for trial in range(300):
        path.write_bytes(scarred(whole.getvalue(), trial, generator))
        try:
            read_tensors(path, read_archive(path))
        except DataError as error:
            refused.append(str(error))
    assert 30 < len(refused) < 300
    assert not any("\n" in line for line in refused)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_trajectory_never_ends_in_anything_but_the_error(save, tmp_path):
    whole, path = io.BytesIO(), tmp_path / TRAJECTORY
    moving = np.random.default_rng(0).normal(size=(5, 3, 3)).astype(np.float32)
    steps = np.arange(5)
    arrays = dict.fromkeys(("positions", "velocities", "forces"), moving) | {"energies": np.ones((5, 2))}
    save(whole, step=steps, time=0.5 * steps, **arrays)
    generator, refused = np.random.default_rng(0), []
    for trial in range(300):
        path.write_bytes(scarred(whole.getvalue(), trial, generator))
        try:
            read_published_trajectory(path)
        except DataError as error:
            refused.append(str(error))
    assert 30 < len(refused) < 300
    assert not any("\n" in line for line in refused)


@pytest.mark.parametrize("damage", ["absent", "truncated", "flipped", "empty", "other"])
def test_damaged_checkpoints_are_one_clear_line(damage, published, tmp_path):
    path = tmp_path / "model.pt"
    data = bytearray((published / SMALL).read_bytes())
    if damage == "truncated":
        data = data[: len(data) // 2]
    if damage == "flipped":
        data[len(data) // 2] ^= 255
    if damage == "empty":
        data = data[:0]
    if damage != "absent":
        path.write_bytes(data)
    if damage == "other":
        torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(DataError) as caught:
        read_published(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_other_models_are_refused_by_name(tmp_path):
    state = named_like_published(CartesianArchitecture(couplings=2, layers=1, embedding=4, width=8, feed_forward=8, hidden=8))
    path = tmp_path / "model.pt"
    extra = {**state, "flow.chain.0.rff.frequencies": torch.zeros(3)}
    missing = {
        name: value for name, value in state.items() if not name.endswith("chain.1.scale_transformer.out_mlp._layers.2.bias")
    }
    torch.save({"model_state_dict": extra}, path)
    with pytest.raises(DataError, match="rff"):
        read_published(path)
    torch.save({"model_state_dict": missing}, path)
    with pytest.raises(DataError, match=r"lacks tensor couplings\.1\.scale\.leave\.2\.bias"):
        read_published(path)


def test_a_flow_of_another_molecule_potential_or_element_is_refused(published, alanine, tmp_path):
    from dataclasses import replace

    from longstride.flows.cartesian_checkpoint import save_cartesian

    flow = read_published(published / SMALL)
    path = tmp_path / "model.safetensors"
    save_cartesian(path, flow, prepared=alanine)
    assert load_cartesian(path, alanine).architecture == flow.architecture
    with pytest.raises(DataError, match="other force-field parameters"):
        load_cartesian(path, replace(alanine, system_hash="0" * 64))
    with pytest.raises(DataError, match="trained on the potential"):
        load_cartesian(path, replace(alanine, target="gfn2-xtb"))
    numbers = alanine.system.atomic_numbers
    with pytest.raises(DataError, match="another order"):
        load_cartesian(path, replace(alanine, system=replace(alanine.system, atomic_numbers=numbers[::-1].copy())))
    chlorine = np.where(np.arange(len(numbers)) == 0, 17, numbers)
    with pytest.raises(DataError, match="atomic number 17"):
        load_cartesian(path, replace(alanine, system=replace(alanine.system, atomic_numbers=chlorine)))


def test_uniform_and_log_spaced_steps():
    uniform = np.arange(5, 1005, 100)
    chosen, spacing = uniform_grid(uniform)
    assert (list(chosen), spacing) == (list(range(10)), 100)
    log = np.sort(np.concatenate([k * 10_000 + np.array([0, 1, 10, 100, 1000]) for k in range(2, 8)]))
    chosen, spacing = uniform_grid(log)
    assert spacing == 10_000
    assert np.array_equal(log[chosen], np.arange(2, 8) * 10_000)
    # the index would say otherwise: frames 0, 1, 2 are 1 and 9 steps apart
    assert not np.array_equal(log[:6], log[chosen])
    with pytest.raises(DataError, match="no uniform grid"):
        uniform_grid(np.array([0, 1, 3, 7, 15, 31]))


def example(published, tmp_path, **changes):
    """Return a copy of the published example with some arrays replaced."""
    with np.load(published / TRAJECTORY) as arrays:
        values = {name: arrays[name] for name in arrays} | changes
    path = tmp_path / TRAJECTORY
    np.savez(path, **{name: value for name, value in values.items() if value is not None})
    shutil.copy(published / STRUCTURE, tmp_path / STRUCTURE)
    return path


def prepare(published, folder, *flags):
    assert main(["prepare", "--file", str(published / STRUCTURE), "--out", str(folder), *flags]) == 0
    return folder


@pytest.fixture(scope="module")
def older(shared_data, tmp_path_factory):
    """The example's molecule with the force field it was made with."""
    return prepare(shared_data / "data" / "timewarp", tmp_path_factory.mktemp("older"), "--force-field", OLDER)


def test_the_published_trajectory_becomes_a_reference_with_the_same_energies(published, older, tmp_path, capsys):
    out = tmp_path / "reference"
    arguments = ["import-timewarp", "trajectory", str(published / TRAJECTORY), "--prepared", str(older), "--out", str(out)]
    assert main(arguments) == 0
    assert "forces by" in capsys.readouterr().out
    manifest = read_manifest(out, kind="reference")
    agreement = manifest["imported"][0]
    assert agreement["relative_force_error"] < 1e-5
    assert agreement["max_energy_difference_kJ_per_mol"] < 5e-3
    assert manifest["frame_spacing_ps"] == 0.5  # 1000 steps of 0.5 fs, from `step`; the frames' indices are 4 apart
    found = read_trajectories(out)
    assert [len(item["positions"]) for item in found] == [12] * 4
    raw = read_published_trajectory(published / TRAJECTORY)
    assert np.array_equal(found[1]["time"], raw.frames["time"][48:96:4])
    assert main(["shard", "--reference", str(out), "--out", str(tmp_path / "shards"), "--lags-ps", "[1.0]"]) == 0
    shards = read_manifest(tmp_path / "shards", kind="shards")
    assert shards["counts"] == {"train": [30], "validation": [10]}


def one_error(capsys, *arguments):
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("longstride: error:")]
    assert len(lines) == 1
    return lines[0]


def test_another_force_field_is_refused_and_the_right_one_named(published, older, tmp_path, capsys):
    prepared = prepare(published, tmp_path / "prepared")
    out = tmp_path / "reference"
    command = ["import-timewarp", "trajectory", published / TRAJECTORY, "--prepared", prepared, "--out", out]
    line = one_error(capsys, *command)
    assert "they fit amber99sbildn.xml + amber99_obc.xml" in line
    assert not out.exists()
    assert main([*map(str, command), "--recompute"]) == 0
    manifest = read_manifest(out, kind="reference")
    assert manifest["energies"] == "recomputed"
    assert manifest["target"] == "amber14-all-obc1"


def test_forces_that_are_not_finite_are_refused(published, older, tmp_path, capsys, monkeypatch):
    def overlapping(_, positions):
        return np.full(len(positions), np.nan), np.full(positions.shape, np.nan)

    monkeypatch.setattr(import_timewarp, "_evaluate", overlapping)
    command = ["import-timewarp", "trajectory", published / TRAJECTORY, "--prepared", older, "--out", tmp_path / "out"]
    assert "differ from amber99sbildn-amber99_obc by nan" in one_error(capsys, *command)
    assert "50 frames have no finite energy or forces" in one_error(capsys, *command, "--recompute")
    assert not (tmp_path / "out").exists()


BAD = {
    "object": "as plain arrays",
    "missing": "holds no array forces",
    "atoms": "forces has the shape",
    "nan": "not finite",
    "steps": "do not increase",
    "times": "do not follow its steps",
    "grid": "no uniform grid",
    "overlap": "lie on each other",
    "order": "nm long",
}


@pytest.mark.parametrize("change", BAD)
def test_bad_trajectories_are_one_clear_line(change, published, older, tmp_path, capsys):
    with np.load(published / TRAJECTORY) as arrays:
        step, time, positions, forces = (arrays[name] for name in ("step", "time", "positions", "forces"))
    broken = positions.copy()
    broken[3, 0, 0] = np.nan
    uneven = np.cumsum(np.arange(len(step)))
    merged = positions.copy()
    merged[:, :2] = merged[:, 1:2]
    changes = {
        "object": {"step": np.array([{}] * len(step), dtype=object)},
        "missing": {"forces": None},
        "atoms": {"forces": forces[:, :-1]},
        "nan": {"positions": broken},
        "steps": {"step": step[::-1].copy()},
        "times": {"time": time + 0.01 * np.arange(len(time))},
        "grid": {"step": uneven, "time": 5e-4 * uneven},
        "overlap": {"positions": merged},
        "order": {"positions": positions[:, ::-1].copy()},
    }
    path = example(published, tmp_path, **changes[change])
    out = tmp_path / "reference"
    line = one_error(capsys, "import-timewarp", "trajectory", path, "--prepared", older, "--out", out, "--recompute")
    assert BAD[change] in line
    assert str(path) in line
    assert not out.exists()


def test_structures_with_other_atoms_are_refused(published, older, tmp_path, capsys):
    path = example(published, tmp_path)
    lines = (published / STRUCTURE).read_text().splitlines(keepends=True)
    atoms = [index for index, line in enumerate(lines) if line.startswith("ATOM")]
    first, second = atoms[4], atoms[5]
    lines[first], lines[second] = lines[second], lines[first]
    (tmp_path / STRUCTURE).write_text("".join(lines))
    command = ["import-timewarp", "trajectory", path, "--prepared", older, "--out", tmp_path / "out"]
    assert "atom 5 is" in one_error(capsys, *command)
    (tmp_path / STRUCTURE).unlink()
    assert "does not exist" in one_error(capsys, *command)
