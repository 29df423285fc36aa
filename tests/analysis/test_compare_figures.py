import json
import re

import numpy as np
import pytest

from longstride.analysis import figures, map_figures
from longstride.analysis.compare_figures import aligned_difference


def test_every_figure_is_svg_and_pdf_and_listed(compared):
    content = json.loads((compared / "comparison.json").read_text())
    listed = json.loads((compared / "manifest.json").read_text())["files"]
    names = [one["file"] for one in content["figures"]]
    wanted = ("ramachandran", "ramachandran_difference", "phi_profile", "tica", "tica_difference", "timescales",
              "autocorrelation", "energies", "accuracy", "moves", "rates")  # fmt: skip
    assert {f"{name}.svg" for name in wanted} <= set(names)
    for one in content["figures"]:
        assert (compared / one["file"]).read_text().count("<svg") == 1
        assert (compared / one["pdf"]).read_bytes().startswith(b"%PDF")
        assert {one["file"], one["pdf"]} <= set(listed)
        assert one["alt"]
        assert one["caption"]
    assert "accuracy.csv" in content["tables"]


def test_pdf_is_written_only_where_asked_and_is_reproducible(tmp_path):
    maps = [("a", np.arange(9.0).reshape(3, 3))]
    grid = map_figures.torsion_grid(("phi", "psi"))
    map_figures.maps(tmp_path / "plain.svg", maps, grid, limit=8.0)
    assert [path.name for path in tmp_path.iterdir()] == ["plain.svg"]
    for name in ("one", "two"):
        with figures.with_pdf():
            map_figures.maps(tmp_path / f"{name}.svg", maps, grid, limit=8.0)
    assert (tmp_path / "one.pdf").read_bytes() == (tmp_path / "two.pdf").read_bytes()
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_differences_have_no_offset_and_only_compared_bins():
    base = np.array([0.0, 1.0, 2.0, 7.0, np.nan])
    values = np.array([3.0, 4.5, 5.0, 1.0, 1.0])
    found = aligned_difference(values, base, limit=5.0)
    assert found[:3] == pytest.approx([-1 / 6, 1 / 3, -1 / 6])
    assert np.isnan(found[3:]).all()
    assert aligned_difference(base + 2.5, base, limit=5.0)[:3] == pytest.approx(0)
    assert np.isnan(aligned_difference(np.full(5, np.nan), base, limit=5.0)).all()


def test_an_undefined_speed_up_is_written_not_dropped(tmp_path):
    bars = [
        map_figures.Ratio(system="A", method="timewarp", label="timewarp", value=3.0, low=2.0, high=4.0, note=""),
        map_figures.Ratio(system="B", method="explore", label="lost", value=None, low=None, high=None, note="never crosses"),
    ]
    map_figures.speedups(tmp_path / "s.svg", bars, xlabel="ratio")
    text = (tmp_path / "s.svg").read_text()
    for word in ("never crosses", "lost", "> A<", "> B<"):
        assert re.search(word, text), word
