import math

import numpy as np
import pytest

from longstride.analysis import divergences as d


def test_known_values_of_the_two_forms():
    p, q = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert d.jsd_dist_nat(p, q) == pytest.approx(math.sqrt(math.log(2)))
    assert d.jsd_div_bits(p, q) == pytest.approx(1.0)
    assert d.jsd_dist_nat(p, 5 * p) == pytest.approx(0.0, abs=1e-9)
    half = np.array([0.5, 0.5])
    # m = (3/4, 1/4): KL(p|m) = ln 4/3, KL(half|m) = (ln 2/3 + ln 2) / 2
    nats = (math.log(4 / 3) + (math.log(2 / 3) + math.log(2)) / 2) / 2
    assert d.jsd_dist_nat(p, half) == pytest.approx(math.sqrt(nats))
    assert d.jsd_div_bits(p, half) == pytest.approx(nats / math.log(2))
    assert d.jsd_div_bits(p, half) != pytest.approx(float(d.jsd_dist_nat(p, half)), rel=0.1), "the names are no synonyms"


def test_forms_work_row_by_row():
    generator = np.random.default_rng(0)
    p, q = generator.random((4, 7)), generator.random((4, 7))
    for form in (d.jsd_dist_nat, d.jsd_div_bits, d.prose_jsd, lambda a, b: d.unisim_jsd(a, b, 0.1)):
        assert form(p, q) == pytest.approx([float(form(a, b)) for a, b in zip(p, q, strict=True)])


def test_prose_adds_its_pseudo_count_and_unisim_its_own():
    p, q = np.array([10.0, 0.0]), np.array([0.0, 4.0])
    assert d.prose_jsd(p, q) == pytest.approx(1.0, abs=1e-6)
    assert d.unisim_jsd(p, q, 0.5) < d.LARGEST_NAT
    assert d.unisim_jsd(p, q, 0.5) == pytest.approx(d.LARGEST_NAT, abs=1e-4)


def test_unisim_counts_equal_numpy_densities():
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=500), generator.normal(0.5, size=400)
    edges = np.linspace(x.min(), x.max(), d.UNISIM_EDGES)
    p, q = (np.histogram(one, edges, density=True)[0] + 1e-6 for one in (x, y))
    binned = [d.bins_between(one, x.min(), x.max(), d.UNISIM_EDGES - 1) for one in (x, y)]
    counts = [np.bincount(one[one >= 0], minlength=d.UNISIM_EDGES - 1).astype(float) for one in binned]
    assert d.unisim_jsd(*counts, edges[1] - edges[0]) == pytest.approx(float(d.jsd_dist_nat(p, q)), rel=1e-9)


def test_bins():
    assert d.circular_bins(np.array([-np.pi, -1e-9, 0.0, np.pi]), 100).tolist() == [0, 49, 50, 99]
    assert d.bins_between(np.array([-1.0, 0.0, 0.5, 1.0, 1.1, np.nan]), 0.0, 1.0, 4).tolist() == [-1, 0, 2, 3, -1, -1]
    assert d.pair_bins(np.array([1, -1]), np.array([2, 3]), 10).tolist() == [12, -1]
    assert np.isnan(d.jsd_dist_nat(np.zeros(3), np.ones(3))), "an empty histogram has no distance"


def chain(*steps):
    return np.cumsum(np.array([[0.0, 0.0, 0.0], *steps]), axis=0)[None]


def test_ca_metrics_of_a_line_and_a_broken_one():
    line = chain(*[[0.38, 0.0, 0.0]] * 4)
    assert d.ca_valid(line).tolist() == [True]
    assert d.ca_valid(line * 1.2).tolist() == [False], "neighbours further than 0.419 nm"
    assert d.ca_valid(line * 0.7).tolist() == [False], "nearer than 0.3 nm"
    assert d.ca_distances(line, offset=3).tolist() == [[pytest.approx(4 * 0.38)]]
    assert d.radius_of_gyration(line) == pytest.approx(0.38 * math.sqrt(2))
    contacts = d.ca_contacts(line)[0]
    assert contacts.sum() == 7, "neighbours and next neighbours are within 1 nm, 4 + 3 pairs"
    assert d.contact_rmse(np.zeros(10), contacts.astype(float)) == pytest.approx(math.sqrt(0.7))
