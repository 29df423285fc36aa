import csv
import json
from dataclasses import replace

import numpy as np
import pytest

from longstride.analysis.clouds import Cloud, Spaces, join, select, with_torsions, with_weights
from longstride.analysis.distribution_comparison import Yardstick, _ceiling, compare_distributions, controls, noise_floor
from longstride.analysis.distribution_metrics import LINE_POINTS, all_metrics, ramachandran_pairs
from longstride.analysis.features import Torsions

TORSIONS = Torsions(names=("phi ALA2", "psi ALA2"), indices=np.zeros((2, 4), int), pair=(0, 1))
CENTRES = np.array([[-1.3, 2.5], [-1.3, -0.4], [1.0, 0.8]])


def states_of(angles):
    distance = np.abs(np.angle(np.exp(1j * (angles[..., None, :] - CENTRES)))).sum(-1)
    return distance.argmin(-1)


SPACES = Spaces(kT=2.5, layout=None, torsion_tica=None, literature=None, states=states_of, n_states=3)


def make_cloud(seed, *, frames=4_000, populations=(0.5, 0.35, 0.15), energy_scale=1.0):
    """Independent samples of three basins in 20 chains, 60 harmonic modes; no coordinates."""
    generator = np.random.default_rng(seed)
    state = generator.choice(3, p=populations, size=frames)
    angles = CENTRES[state] + 0.25 * generator.normal(size=(frames, 2))
    angles = (angles + np.pi) % (2 * np.pi) - np.pi
    nothing = np.full(0, -1)
    return Cloud(
        angles=angles, chi=np.zeros((frames, 0)), energy=-40 + energy_scale * generator.chisquare(60, frames) / 2,
        tics=np.stack([np.cos(angles[:, 0]), np.sin(angles[:, 1])], axis=1), states=states_of(angles),
        weights=np.full(frames, 1 / frames), unit=np.arange(frames) % 20, whole=np.zeros(0, dtype=int), omega=np.zeros((0, 0)),
        tica=np.zeros((0, 0)), alpha=np.zeros((0, 0, 3)), torsion_state=nothing, tica_state=nothing,
    )  # fmt: skip


@pytest.fixture(scope="module")
def yardstick():
    cloud = make_cloud(0, frames=12_000)
    return Yardstick(cloud=cloud, chain=cloud.unit, metrics=all_metrics(SPACES, TORSIONS), floors={}, seed=1)


FRAME_METRICS = (
    "e_w2", "t_w2", "ks_energy", "jsd_dist_nat_torsions", "jsd_dist_nat_backbone", "jsd_dist_nat_ramachandran",
    "jsd_dist_nat_tic0", "jsd_dist_nat_tic01", "jsd_dist_nat_macrostates",
)  # fmt: skip


def test_equal_distributions_lie_within_the_noise_floor(yardstick):
    found = compare_distributions(make_cloud(7, frames=2_000), yardstick, seed=0)
    above = [name for name in FRAME_METRICS if found[name]["statement"] != "within the noise floor"]
    assert len(above) <= 1, "a floor at 95 % leaves one of nine to chance"
    for name in FRAME_METRICS:
        assert 0 <= found[name]["low"] <= found[name]["value"] <= found[name]["high"]
        assert found[name]["noise_floor"] > 0


def test_wrong_populations_are_above_the_floor(yardstick):
    found = compare_distributions(make_cloud(8, frames=5_000, populations=(0.2, 0.2, 0.6)), yardstick, seed=0)
    for name in FRAME_METRICS:
        if name not in ("e_w2", "ks_energy"):
            assert found[name]["statement"] == "above the noise floor", (name, found[name])
    assert found["e_w2"]["statement"] == "within the noise floor", "energies are those of the reference"


def test_what_makes_no_sense_is_labelled(yardstick):
    found = compare_distributions(make_cloud(9, frames=500), yardstick, seed=0)
    assert "5 CA atoms" in found["unisim_js_pwd"]["statement"]
    assert found["jsd_dist_nat_side_chain"]["statement"] == "undefined: no side-chain torsions"
    for name in ("tica_w2", "t_k_jsd_div_bits", "tica_k_jsd_div_bits", "unisim_js_tic", "unisim_contact_rmse"):
        assert found[name]["value"] is None
        assert found[name]["statement"].startswith("undefined: ")
    short = compare_distributions(make_cloud(9, frames=10), yardstick, seed=0)
    assert {one["value"] for one in short.values()} == {None}


def test_energies_that_are_not_finite_are_labelled(yardstick):
    cloud = make_cloud(10, frames=300)
    cloud.energy[5] = np.nan
    found = compare_distributions(cloud, yardstick, seed=0)
    assert found["e_w2"]["value"] is None
    assert "not finite" in found["ks_energy"]["note"]


def test_every_metric_separates_the_control_it_is_meant_to_see(yardstick):
    rows = {(row["metric"], row["control"]): row for row in controls(yardstick, SPACES, None)}
    assert rows["e_w2", "20 K hotter"]["separated"] is True
    assert rows["ks_energy", "20 K hotter"]["separated"] is True
    for name in ("t_w2", "jsd_dist_nat_ramachandran"):
        assert rows[name, "shuffled torsions"]["separated"] is True, name
    for name in ("jsd_dist_nat_torsions", "jsd_dist_nat_backbone"):
        assert rows[name, "torsions shifted by 15 degrees"]["separated"] is True, name
    assert rows["jsd_dist_nat_macrostates", "minor states 1 kT too stable"]["separated"] is True
    assert rows["unisim_js_rg", "scaled by 5 %"]["statement"] == "undefined for this molecule"


def test_a_blind_metric_is_flagged(yardstick):
    """Independent torsions cannot be told from shuffled ones, and that is said."""
    generator = np.random.default_rng(11)
    plain = make_cloud(12)
    angles = generator.uniform(-np.pi, np.pi, plain.angles.shape)
    cloud = with_torsions(plain, SPACES, angles, plain.chi)
    independent = replace(yardstick, cloud=cloud, chain=cloud.unit, floors={})
    rows = {(row["metric"], row["control"]): row for row in controls(independent, SPACES, None)}
    assert rows["jsd_dist_nat_ramachandran", "shuffled torsions"]["separated"] is False
    assert rows["jsd_dist_nat_ramachandran", "shuffled torsions"]["statement"] == "cannot separate this control from noise"


def test_weights_undo_a_bias(yardstick):
    biased = make_cloud(13, populations=(0.2, 0.2, 0.6))
    factors = np.array([0.5 / 0.2, 0.35 / 0.2, 0.15 / 0.6])[biased.states]
    name = "jsd_dist_nat_macrostates"
    metric = next(one for one in yardstick.metrics if one.name == name)
    plain = metric.evaluate(yardstick.cloud, biased, seed=0, interval=False).value
    undone = metric.evaluate(yardstick.cloud, with_weights(biased, factors), seed=0, interval=False).value
    assert plain > 0.2
    assert undone < 0.03
    assert LINE_POINTS >= biased.size


def test_noise_floor_falls_with_the_number_of_samples(yardstick):
    few, many = (noise_floor(yardstick, size, "spread")["jsd_dist_nat_torsions"] for size in (100, 2_000))
    assert many < 0.5 * few


def test_ceiling_is_a_prediction_interval():
    generator = np.random.default_rng(14)
    draws = generator.normal(size=(4_000, 7))
    inside = [one[6] <= _ceiling(one[:6].tolist()) for one in draws]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)
    assert _ceiling([None, 1.0]) is None


def test_selecting_and_joining_keep_weights():
    cloud = with_weights(make_cloud(15, frames=100), np.arange(100.0))
    half = select(cloud, np.arange(50, 100))
    assert half.weights == pytest.approx(np.arange(50, 100) / np.arange(50, 100).sum())
    both = join([cloud, make_cloud(16, frames=300)])
    assert both.weights[:100].sum() == pytest.approx(0.25)
    assert both.size == 400


def test_pairs_of_phi_and_psi():
    assert ramachandran_pairs(TORSIONS) == [(0, 1)]
    apart = Torsions(names=("phi ILE2", "psi LYS1"), indices=np.zeros((2, 4), int), pair=(0, 1))
    assert ramachandran_pairs(apart) == [(0, 1)]
    assert ramachandran_pairs(Torsions(names=(), indices=np.zeros((0, 4), int), pair=None)) == []


def test_comparison_json_and_tables(compared):
    content = json.loads((compared / "comparison.json").read_text())
    cells = {(one["method"], one["seed"]): one for one in content["methods"]}
    exact, biased = cells["timewarp", 0], cells["explore", 0]
    assert biased["distances"]["e_w2"]["statement"].startswith("above the noise floor"), "20 K hotter"
    assert biased["distances"]["e_w2"]["value"] > exact["distances"]["e_w2"]["value"]
    assert biased["distances"]["jsd_dist_nat_macrostates"]["value"] > exact["distances"]["jsd_dist_nat_macrostates"]["value"]
    assert exact["distances"]["tica_w2"]["value"] is not None
    assert exact["coverage"]["recall"] == 1.0
    assert exact["validity"]["inverted_centres"]["value"] == 0.0
    assert cells["sts", 0]["distances"] == {}, "the baseline is not compared with itself"
    assert cells["mts", 0]["distances"]["jsd_dist_nat_torsions"]["value"] is not None
    assert "distances" not in cells["timewarp", 7]
    seen = {row["metric"]: row for row in content["reference"]["controls"]}
    assert seen["e_w2"]["separated"] is True
    for name, key in (("distances", "distance"), ("validity", "defect"), ("coverage", "recall"), ("controls", "control")):
        with (compared / f"{name}.csv").open(newline="") as handle:
            rows = list(csv.DictReader(handle))
        assert rows, name
        assert key in rows[0]
