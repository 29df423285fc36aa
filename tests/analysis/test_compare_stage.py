import csv
import json
import shutil

import numpy as np
import pytest
from fake_run import POPULATIONS, SECTION, TRUE_DELTA_F, sample_folders

from longstride.analysis.features import torsion_angles
from longstride.analysis.samples import load_molecule
from longstride.analysis.verdict import speedup_sentence
from longstride.data.atomic import read_arrays, write_arrays
from longstride.data.manifest import read_manifest, write_manifest
from longstride.errors import DataError
from longstride.stages import compare


@pytest.fixture(scope="module")
def content(compared):
    return json.loads((compared / "comparison.json").read_text())


def entry_of(content, method, seed=0):
    return next(one for one in content["methods"] if (one["method"], one["seed"]) == (method, seed))


def summary(compared, tmp_path):
    compare.summarise([compared / "comparison.json"], tmp_path / "summary.csv")
    with (tmp_path / "summary.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))


def test_every_output_is_named_in_the_manifest(compared):
    manifest = read_manifest(compared, kind="compare")
    assert set(manifest["files"]) == {path.name for path in compared.iterdir()} - {"manifest.json"}
    for name in ("ramachandran.svg", "rates.svg", "timescales.svg", "free_energy_map.csv", "comparison.json"):
        assert name in manifest["files"]


def test_one_row_per_cell_and_absent_ones_too(compared, tmp_path):
    rows = summary(compared, tmp_path)
    cells = [(row["method"], row["seed"]) for row in rows]
    assert len(cells) == len(set(cells)) == 14
    assert cells[0] == ("reference", "")
    (absent,) = (row for row in rows if (row["method"], row["seed"]) == ("timewarp", "7"))
    assert absent["status"] == "absent: not sampled"
    assert absent["ess"] == ""


def test_the_exact_method_agrees_and_the_biased_one_does_not(content):
    exact, biased = entry_of(content, "timewarp"), entry_of(content, "explore")
    name = content["primary_pair"][0]
    assert exact["delta_f"][name]["low"] < TRUE_DELTA_F < exact["delta_f"][name]["high"]
    assert biased["delta_f"][name]["high"] < TRUE_DELTA_F - 1
    assert exact["energy"]["statement"].startswith("same distribution")
    assert biased["energy"]["statement"] == "differs beyond the 95 % noise level", "negative control: 20 K hotter"
    assert exact["ess"]["value"] == pytest.approx(1440 / 3, rel=0.4)  # keeps its state half of the time: tau = 3


def test_methods_are_compared_only_within_their_target(content):
    assert entry_of(content, "md")["baseline"].startswith("reference")
    assert entry_of(content, "mts")["baseline"] == "sts, all seeds"
    assert entry_of(content, "sts")["baseline"] == "is the baseline"
    assert entry_of(content, "sts")["energy"]["ks"] is None
    pairs = {(one["method"], one["versus"]): one for one in content["speedups"]}
    assert set(pairs) == {("timewarp", "md"), ("timewarp", "tuned-md"), ("tuned-md", "md"), ("mts", "sts")}, "none is biased"
    assert [one["method"] for one in content["speedups"] if one["is_baseline"]] == ["tuned-md"]
    assert pairs["mts", "sts"]["throughput_ratio"] == pytest.approx(2.5)
    assert pairs["mts", "sts"]["against_msm"]["value"] is None
    assert pairs["tuned-md", "md"]["throughput_ratio"] == pytest.approx(9.0)  # three times the chains in a third of the time
    assert pairs["timewarp", "tuned-md"]["throughput_ratio"] is None


def test_kinetics_only_for_physical_time(content):
    assert entry_of(content, "timewarp")["timescales"]["lags"] == []
    assert "not physical time" in entry_of(content, "timewarp")["timescales"]["note"]
    assert entry_of(content, "md")["timescales"]["lags"]


def test_unvisited_basins_are_undefined_not_zero(content):
    one = entry_of(content, "mts")["delta_f"][content["primary_pair"][0]]
    assert one["value"] is None
    assert "never visited" in one["note"]
    assert entry_of(content, "mts")["basins_visited"] == 1


def test_temperatures_come_from_velocities(content):
    elements = entry_of(content, "md")["temperature"]["elements"]
    assert set(elements) == {"all", "C", "H", "N", "O"}
    for one in elements.values():
        assert abs(one["value"] - 310) < 5 * (one["high"] - one["low"]) / 3.92
    assert entry_of(content, "timewarp")["temperature"]["elements"] == {}


def test_same_seed_gives_the_same_summary_whatever_the_speed(run_folder, compared, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    for folder in sample_folders(copy):
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["timing"]["sampling_s"] *= 3.7
        path.write_text(json.dumps(manifest))
    folders = [copy / "sample/fake/timewarp/seed7", *reversed(sample_folders(copy))]
    compare.run(
        SECTION,
        prepared=copy / "prepare/fake",
        reference=copy / "reference/fake",
        samples=folders,
        out=tmp_path / "again",
        seed=3,
        threads=1,
    )
    first, second = summary(compared, tmp_path), summary(tmp_path / "again", tmp_path)
    slow = [key for key in first[0] if key.endswith("_s")]
    assert set(slow) == {
        "ess_per_s", "ess_ci_low_per_s", "ess_ci_high_per_s", "simulated_ps_per_s", "sampling_wall_s", "burn_in_wall_s",
    }  # fmt: skip
    assert first != second
    for a, b in zip(first, second, strict=True):
        assert {key: a[key] for key in a if key not in slow} == {key: b[key] for key in b if key not in slow}
    for name in ("ramachandran.svg", "energies.svg", "free_energy_map.csv"):
        assert (compared / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def copy_one(run_folder, tmp_path, method="timewarp"):
    folder = tmp_path / "sample" / "fake" / method / "seed0"
    shutil.copytree(run_folder / "sample/fake" / method / "seed0", folder)
    return folder


def rewrite(folder, arrays, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())
    write_arrays(folder / "samples.safetensors", arrays)
    content = {key: value for key, value in manifest.items() if key not in ("kind", "files")} | changes
    write_manifest(folder, kind="samples", files=["samples.safetensors"], content=content)


def compare_one(run_folder, folder, out):
    compare.run(
        SECTION,
        prepared=run_folder / "prepare/fake",
        reference=run_folder / "reference/fake",
        samples=[folder],
        out=out,
        seed=3,
        threads=1,
    )
    return json.loads((out / "comparison.json").read_text())["methods"][0]


def test_energies_that_are_not_finite_are_shown_with_a_status(run_folder, tmp_path):
    folder = copy_one(run_folder, tmp_path)
    arrays, _ = read_arrays(folder / "samples.safetensors")
    arrays["potential_energy"][2, 1] = np.nan
    rewrite(folder, arrays)
    entry = compare_one(run_folder, folder, tmp_path / "out")
    assert entry["status"].startswith("not finite")
    assert entry["energy"]["mean"]["value"] is None


def test_a_handful_of_saves_is_undefined(run_folder, tmp_path):
    folder = copy_one(run_folder, tmp_path)
    arrays, _ = read_arrays(folder / "samples.safetensors")
    rewrite(folder, {key: value[:3] for key, value in arrays.items()})
    entry = compare_one(run_folder, folder, tmp_path / "out")
    assert entry["status"].startswith("ESS undefined")
    assert "too short" in entry["status"]
    assert entry["ess_per_s"]["value"] is None


def test_samples_of_another_potential_are_refused(run_folder, tmp_path):
    folder = copy_one(run_folder, tmp_path)
    arrays, _ = read_arrays(folder / "samples.safetensors")
    rewrite(folder, arrays, system_hash="0" * 64)
    with pytest.raises(DataError, match="another potential"):
        compare_one(run_folder, folder, tmp_path / "out")


def test_altered_or_incomplete_files_are_refused(run_folder, tmp_path):
    folder = copy_one(run_folder, tmp_path)
    data = (folder / "samples.safetensors").read_bytes()
    (folder / "samples.safetensors").write_bytes(data[:-100])
    with pytest.raises(DataError, match="truncated"):
        compare_one(run_folder, folder, tmp_path / "out")
    (folder / "samples.safetensors").write_bytes(data)
    arrays, _ = read_arrays(folder / "samples.safetensors")
    rewrite(folder, {"positions": arrays["positions"]})
    with pytest.raises(DataError, match="has no potential_energy"):
        compare_one(run_folder, folder, tmp_path / "out")


def test_masses_that_do_not_fit_the_kinetic_energy_are_not_used(run_folder, tmp_path):
    folder = copy_one(run_folder, tmp_path, "md")
    arrays, _ = read_arrays(folder / "samples.safetensors")
    arrays["kinetic_energy"] = 1.4 * arrays["kinetic_energy"]
    rewrite(folder, arrays)
    temperature = compare_one(run_folder, folder, tmp_path / "out")["temperature"]
    assert set(temperature["elements"]) == {"all"}
    assert "masses_Da" in temperature["note"]


def test_summary_of_a_missing_comparison_is_one_line(tmp_path):
    with pytest.raises(DataError, match="run the compare stage"):
        compare.summarise([tmp_path / "comparison.json"], tmp_path / "summary.csv")


def test_a_molecule_without_a_backbone_is_compared_by_energy_alone(tmp_path):
    from fake_run import TEMPERATURE, energies, maxwell

    generator = np.random.default_rng(0)
    prepared, reference, sample = tmp_path / "prepare", tmp_path / "reference", tmp_path / "sample/md/seed0"
    prepared.mkdir()
    (prepared / "structure.pdb").write_text(
        "HETATM    1  O   HOH A   1       0.000   0.000   0.000  1.00  0.00           O\n"
        "HETATM    2  H1  HOH A   1       0.957   0.000   0.000  1.00  0.00           H\n"
        "HETATM    3  H2  HOH A   1      -0.240   0.927   0.000  1.00  0.00           H\nEND\n"
    )
    common = {"system": "water", "target": "toy", "system_hash": "a" * 64, "temperature_K": TEMPERATURE}
    write_manifest(prepared, kind="prepare", files=["structure.pdb"], content=common | {"n_atoms": 3})
    masses = np.array([15.99943, 1.007947, 1.007947])

    def arrays(*shape):
        x = generator.normal(scale=0.1, size=(*shape, 3, 3)).astype(np.float32)
        return {"positions": x, "velocities": maxwell(generator, shape, masses), "potential_energy": energies(generator, shape)}

    write_arrays(reference / "trajectory_00.safetensors", arrays(300))
    content = common | {"frame_spacing_ps": 0.1, "wall_s": 1.0}
    write_manifest(reference, kind="reference", files=["trajectory_00.safetensors"], content=content)
    write_arrays(sample / "samples.safetensors", arrays(300, 2))
    content = common | {"method": "md", "invariance": "unadjusted", "physical_time": True, "save_every": 0.1}
    write_manifest(sample, kind="samples", files=["samples.safetensors"], content=content)
    compare.run(SECTION, prepared=prepared, reference=reference, samples=[sample], out=tmp_path / "out", seed=1, threads=1)
    found = json.loads((tmp_path / "out/comparison.json").read_text())
    assert found["reference"]["status"] == "no torsions"
    assert found["methods"][0]["status"] == "ESS undefined: no torsions to judge by"
    assert found["methods"][0]["energy"]["ks"] < 0.2
    assert abs(found["methods"][0]["temperature"]["elements"]["H"]["value"] - TEMPERATURE) < 50
    assert {figure["file"] for figure in found["figures"]} == {"energies.svg", "rates.svg"}


def test_the_msm_gives_no_rate_where_it_does_not_connect_the_basins(content):
    # six seeded trajectories of 80 ps: one in three starts in the rare basin, and few or none return
    reference = content["reference"]["delta_f"][content["primary_pair"][0]]
    entries = [one for one in content["speedups"] if one["method"] == "timewarp"]
    assert [one["versus"] for one in entries] == ["md", "tuned-md"]
    for entry in entries:
        assert (entry["against_msm"]["value"] is None) == (reference["value"] is None)


def test_no_ratio_to_plain_dynamics_that_has_not_mixed():
    from longstride.analysis.comparison import _plain_rate

    rate = {"value": 2.0, "low": 1.0, "high": 3.0, "note": ""}
    mixed = _plain_rate({"method": "md", "ess_per_s": rate, "rhat_max": 1.02})
    stuck = _plain_rate({"method": "md", "ess_per_s": rate, "rhat_max": 3.8})
    assert mixed.value == 2.0
    assert stuck.value is None
    assert "has not mixed" in stuck.note


def pooled_entry(method, rate, throughput, *, invariance="unadjusted", rhat=1.01, target="amber"):
    ess = {"value": rate, "low": 0.8 * rate, "high": 1.25 * rate, "note": ""}
    return {
        "target": target, "method": method, "invariance": invariance, "ess_per_s": ess, "rhat_max": rhat,
        "throughput_ps_per_s": throughput, "cores": 1,
    }  # fmt: skip


@pytest.fixture
def slowest(monkeypatch):
    """An MSM whose slowest timescale is 500 (400 to 700) ps."""
    from longstride.analysis import comparison
    from longstride.analysis.estimate import Estimate

    monkeypatch.setattr(comparison, "_crossing_time", lambda *_: Estimate(value=500.0, low=400.0, high=700.0))
    return comparison.speedups


def test_every_method_is_measured_against_both_baselines(slowest):
    md = pooled_entry("md", 0.05, 20.0, rhat=2.5)
    tuned, flow = pooled_entry("tuned-md", 0.5, 400.0), pooled_entry("timewarp", 100.0, None, invariance="exact")
    biased = pooled_entry("explore", 900.0, None, invariance="biased")
    reference = {"target": "amber", "throughput_ps_per_s": 10.0}
    found = {(one["method"], one["versus"]): one for one in slowest([biased, md, flow, tuned], reference, None, None)}
    assert set(found) == {("timewarp", "md"), ("timewarp", "tuned-md"), ("tuned-md", "md")}
    # one effective sample of the slowest process per 2 x 500 ps, at the throughput of each baseline
    against_md, against_tuned = found["timewarp", "md"], found["timewarp", "tuned-md"]
    assert against_md["dynamics_ess_per_s_from_msm"]["value"] == pytest.approx(20.0 / 1000.0)
    assert against_tuned["dynamics_ess_per_s_from_msm"]["value"] == pytest.approx(400.0 / 1000.0)
    assert against_md["against_msm"]["value"] == pytest.approx(5000.0)
    assert against_tuned["against_msm"]["value"] == pytest.approx(250.0)
    width = np.hypot(np.log(1.25 / 0.8) / 2, np.log(700.0 / 400.0) / 2)
    assert against_tuned["against_msm"]["high"] == pytest.approx(250.0 * np.exp(width))
    assert against_tuned["against_msm"]["low"] == pytest.approx(250.0 * np.exp(-width))
    assert "has not mixed" in against_md["measured"]["note"]
    assert against_tuned["measured"]["value"] == pytest.approx(200.0)
    assert found["tuned-md", "md"]["throughput_ratio"] == pytest.approx(20.0)
    assert found["tuned-md", "md"]["against_msm"]["value"] == pytest.approx(25.0)
    text = speedup_sentence(against_tuned)
    for part in ("timewarp (exact) on amber, against tuned-md", "200 (", "250 (", "allows tuned-md at its 400 ps/s"):
        assert part in text
    assert "no measured ratio to md (md has not mixed" in speedup_sentence(against_md)


def test_without_plain_dynamics_the_reference_gives_the_rate(slowest):
    reference = {"target": "amber", "throughput_ps_per_s": 10.0}
    (one,) = slowest([pooled_entry("timewarp", 100.0, None, invariance="exact")], reference, None, None)
    assert (one["versus"], one["against_msm"]["value"]) == ("reference", pytest.approx(10_000.0))
    assert one["measured"]["value"] is None
    assert slowest([pooled_entry("tuned-md", 0.5, 400.0)], reference, None, None) == []
    elsewhere = slowest([pooled_entry("mts", 1.0, 1.0, target="gfn2-xtb")], reference, None, None)
    assert elsewhere[0]["against_msm"]["note"] == "no MSM of this target"


def test_every_cell_has_a_verdict_and_the_reference_a_certificate(content, compared):
    for entry in content["methods"]:
        assert entry["verdict"]["reason"]
    words = {(one["method"], one["seed"]): one["verdict"]["word"] for one in content["methods"]}
    assert words["timewarp", 7] == "failed"
    assert words["timewarp", 0] == "better"
    assert words["explore", 0] == "worse", "negative control: wrong populations, 20 K hotter"
    assert words["mts", 0] == "not converged", "one basin only"
    certificate = content["reference"]["certification"]
    assert certificate["word"] == "not certified", "seeded trajectories of 80 ps"
    assert certificate["checks"]
    with (compared / "verdicts.csv").open(newline="") as handle:
        assert len(list(csv.DictReader(handle))) == len(content["methods"])


def test_the_panel_has_three_tics_and_every_kind_of_size(content):
    panel = entry_of(content, "timewarp")["panel"]
    assert {"TIC0", "TIC1", "TIC2", "cos phi ALA2", "sin psi ALA2", "basin phi ALA2"} <= set(panel)
    one = panel["TIC0"]
    assert all(one[key] > 0 for key in ("timewarp_ess", "bulk_ess", "tail_ess", "batch_means_ess", "rhat"))
    assert entry_of(content, "timewarp")["ess_per_core_hour"]["value"] > 0


def weighted_copy(run_folder, tmp_path, log_weights):
    """The samples of the biased method with weights; its populations are 0.3, 0.3, 0.4 instead of 0.55, 0.33, 0.12."""
    folder = copy_one(run_folder, tmp_path, "explore")
    arrays, _ = read_arrays(folder / "samples.safetensors")
    arrays["log_weights"] = log_weights(arrays)
    rewrite(folder, arrays, invariance="unadjusted")
    return folder


def right_weights(run_folder):
    def of(arrays):
        molecule = load_molecule(run_folder / "prepare/fake")
        phi, psi = np.moveaxis(torsion_angles(arrays["positions"], molecule.topology, molecule.torsions), -1, 0)
        basin = np.where(phi >= 0, 2, np.where((psi > np.radians(62)) | (psi < np.radians(-120)), 0, 1))
        return np.log(POPULATIONS / np.array([0.3, 0.3, 0.4]))[basin] + 12.3

    return of


def test_weighted_samples_are_compared_with_their_weights(run_folder, tmp_path):
    name = "phi ALA2"
    folder = weighted_copy(run_folder, tmp_path / "right", right_weights(run_folder))
    right = compare_one(run_folder, folder, tmp_path / "out")
    assert right["delta_f"][name]["low"] < TRUE_DELTA_F < right["delta_f"][name]["high"]
    assert right["basins"]["alpha-L"] == pytest.approx(0.12, abs=0.03)
    kish = 1.0 / (POPULATIONS**2 / np.array([0.3, 0.3, 0.4])).sum()
    assert right["weights"]["fraction"] == pytest.approx(kish, rel=0.05)
    assert right["timescales"]["lags"] == []
    assert right["panel"]["TIC0"]["bulk_ess"] is None
    assert right["ess"]["value"] < 1440, "weights cost samples"
    flat = compare_one(
        run_folder, weighted_copy(run_folder, tmp_path / "flat", lambda one: 0 * one["potential_energy"]), tmp_path / "f"
    )
    assert flat["delta_f"][name]["high"] < TRUE_DELTA_F - 1, "negative control: equal weights"


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN or infinite"), (60.0, "carries 100 %")])
def test_useless_weights_are_labelled(run_folder, tmp_path, value, word):
    def spoilt(arrays):
        weights = 0 * arrays["potential_energy"]
        weights[3, 2] = value
        return weights

    entry = compare_one(run_folder, weighted_copy(run_folder, tmp_path, spoilt), tmp_path / "out")
    assert word in entry["weights"]["note"]
    assert word in entry["ess"]["note"]
    assert entry["ess"]["value"] is None
    assert entry["delta_f"]["phi ALA2"]["low"] is None
    assert entry["verdict"]["word"] == "not converged"
