import html
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from longstride.analysis.svg_inline import inline
from longstride.analysis.verdict import break_even, number, with_interval
from longstride.config import Config, DynamicsConfig, SystemConfig
from longstride.errors import DataError
from longstride.potentials.teachers import TeacherSpec
from longstride.stages import compare, dynamics, report

CONFIG = Config(systems=(SystemConfig(name="fake", sequence="ACE-ALA-NME"), SystemConfig(name="other", sequence="AA")))


@pytest.fixture(scope="module")
def page(run_folder, compared, tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    for stage in ("reference", "sample"):
        for manifest in (run_folder / stage).rglob("manifest.json"):
            target = root / manifest.relative_to(run_folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(manifest, target)
    shutil.copytree(compared, root / "compare/fake")
    sides = {method: sorted((run_folder / "sample/fake" / method).glob("seed*")) for method in ("mts", "sts")}
    dynamics.run(
        DynamicsConfig(permutations=99), prepared=run_folder / "prepare/fake", **sides, out=root / "dynamics/fake",
        state=root / ".state/dynamics", seed=1, threads=1, teacher=TeacherSpec(kind="gfn2-xtb"),
    )  # fmt: skip
    (root / "flow/fake").mkdir(parents=True)
    rows = "\n".join(f"{k},{k / 10},{2.0 / (k + 1)},{k / 100}" for k in range(0, 50, 10))
    (root / "flow/fake/metrics.csv").write_text("step,wall_s,train_nll,acceptance_<b>\n" + rows + "\n")
    (root / "flow/fake/manifest.json").write_text(json.dumps({"kind": "flow", "train_wall_s": 100.0, "files": {}}))
    compare.summarise([root / "compare/fake/comparison.json"], root / "summary.csv")
    report.run(CONFIG, run_folder=root, out=root / "report.html")
    return (root / "report.html").read_text()


class Checker(HTMLParser):
    """Collects ids, references and open tags."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self):
        super().__init__()
        self.ids, self.references, self.stack, self.unlabelled = [], [], [], 0

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if "id" in values:
            self.ids.append(values["id"])
        for key in ("href", "xlink:href", "src"):
            if key in values:
                self.references.append(values[key])
        self.unlabelled += tag == "svg" and not values.get("aria-label")
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def test_the_page_is_well_formed_and_needs_nothing_else(page):
    checker = Checker()
    checker.feed(page)
    assert checker.stack == []
    assert len(checker.ids) == len(set(checker.ids)), "figures share ids"
    assert checker.unlabelled == 0
    outside = [one for one in checker.references if not one.startswith(("#", "data:"))]
    assert outside == []
    inside = {one[1:] for one in checker.references if one.startswith("#")}
    assert inside <= set(checker.ids)
    assert not re.search(r"@import|url\((?!#)", page)


def test_the_page_says_what_matters(page):
    for text in (
        "no measured ratio to md",
        "against tuned-md (batched dynamics, the tuned baseline)",
        "MSM",
        "raw histogram",
        "absent: not sampled",
        "No comparison for: other",
    ):
        assert text in page
    for word in ("exact", "unadjusted", "biased"):
        assert f'class="tag {word}"' in page
    assert "Training of the flow" in page
    assert "acceptance &lt;b&gt;" in page, "names from files are escaped"
    assert "hydrogen_mass_Da" in page, "the resolved configuration is shown"
    assert "numpy 2." in page


def test_the_page_shows_dynamics_beside_the_comparison(page):
    section = page[page.index("Multi-time-step dynamics") : page.index("Configuration and origin</h2>")]
    assert section.count("<figure>") >= 7
    assert "a gain of 2.5" in section  # 8 s against 20 s for frames of the same length
    table = section[section.index("Table of every observable") : section.index("</details>")]
    rows = re.findall(r"<tr>(.*?)</tr>", table, flags=re.DOTALL)[1:]
    assert len(rows) > 60
    for row in rows:
        keys = re.findall(r'data-key="([^"]*)"', row)
        assert len(keys) == 9
        assert all(key == "" or math.isfinite(float(key)) for key in keys[2:7])  # numbers are sorted as numbers
    assert 'class="tag absent">too few seeds' in table  # two seeds give no verdict


def test_figures_are_numbered_through_and_all_there(page):
    numbers = [int(text) for text in re.findall(r"<strong>Figure (\d+)\. ", page)]
    rest = page.count("<figure>") - len(numbers)
    assert rest == 0
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(re.findall(r"<svg ", page)) == len(numbers)
    for title in ("Speed-up over plain dynamics", "Difference from the baseline", "two slowest TICA", "Time to accuracy"):
        assert f". {title}" in page or title in page


def test_verdicts_are_grouped_by_target(page):
    groups = re.findall(r"<h3>Verdicts on the target (.*?)</h3>(.*?)</table>", page, flags=re.DOTALL)
    names = [name for name, _ in groups]
    assert len(names) == len(set(names)) == 2
    for name, table in groups:
        other = {"gfn2-xtb": "timewarp"}.get(name, "mts")
        assert f'data-key="{other}"' not in table  # never across targets


def test_structures_are_in_the_page(page, compared):
    stored = json.loads((compared / "comparison.json").read_text())["structures"]
    text = re.search(r'<script type="application/json" id="structures-fake">(.*?)</script>', page, flags=re.DOTALL).group(1)
    assert json.loads(text) == stored


def test_many_systems_get_their_own_pages(compared, tmp_path):
    names = [f"S{k}" for k in range(report.MAX_INLINE_SYSTEMS + 1)]
    content = json.loads((compared / "comparison.json").read_text())
    for name in names:
        shutil.copytree(compared, tmp_path / "compare" / name)
        (tmp_path / "compare" / name / "comparison.json").write_text(json.dumps(content | {"system": name}))
    compare.summarise([tmp_path / "compare" / name / "comparison.json" for name in names], tmp_path / "summary.csv")
    config = Config(systems=tuple(SystemConfig(name=name, sequence="AA") for name in names))
    report.run(config, run_folder=tmp_path, out=tmp_path / "report.html")
    main = (tmp_path / "report.html").read_text()
    assert len(main) < 1_500_000
    for name in names:
        assert f'href="report/{name}.html"' in main
        single = (tmp_path / "report" / f"{name}.html").read_text()
        assert 'href="../report.html"' in single
        assert single.count("<figure>") == len(content["figures"])
    assert len((tmp_path / "report/verdicts.csv").read_text().splitlines()) == 1 + 6 * len(names)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_without_errors(page, tmp_path, width):
    """Console messages are errors here; the probe writes what the browser made of the page into its body."""
    probe = """<script>addEventListener("error", (e) => console.error("probe: " + e.message)); addEventListener("load", () => {
      const seen = [...document.querySelectorAll("figure svg")].filter((one) => one.getBoundingClientRect().width > 100).length;
      const canvas = document.querySelector(".viewer canvas");
      const ink = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.some((part) => part > 0);
      const wide = document.documentElement.scrollWidth <= innerWidth;
      document.querySelector("table.sortable th button").click();
      const sorted = document.querySelector("th[aria-sort]") !== null;
      const loaded = performance.getEntriesByType("resource").length;
      document.body.dataset.probe = JSON.stringify({ seen, ink, wide, sorted, loaded });
    });</script>"""
    file = tmp_path / "report.html"
    file.write_text(page.replace("<body>", f"<body>{probe}"))
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--window-size={width},2000",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=4000", "--dump-dom", file.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert ":CONSOLE" not in done.stderr
    found = json.loads(html.unescape(re.search(r'data-probe="(.*?)"', done.stdout).group(1)))
    figures = page.count("<figure>")
    assert found == {"seen": figures, "ink": True, "wide": True, "sorted": True, "loaded": 0}


def test_missing_inputs_are_one_line(tmp_path, compared):
    with pytest.raises(DataError, match="run the summary stage first"):
        report.run(CONFIG, run_folder=tmp_path, out=tmp_path / "report.html")
    compare.summarise([compared / "comparison.json"], tmp_path / "summary.csv")
    with pytest.raises(DataError, match="run the compare stage first"):
        report.run(CONFIG, run_folder=tmp_path, out=tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_inlined_figures_keep_their_own_ids():
    svg = '<?xml version="1.0"?><svg width="72pt" height="36pt" viewBox="0 0 72 36"><metadata>x</metadata>'
    svg += '<g id="a" clip-path="url(#c)"><use xlink:href="#a"/></g></svg>'
    text = inline(svg, prefix="f1-", alt='a "b" <c>')
    assert 'id="f1-a"' in text
    assert "url(#f1-c)" in text
    assert 'href="#f1-a"' in text
    assert "metadata" not in text
    assert "&quot;b&quot; &lt;c&gt;" in text
    assert 'width="72pt"' not in text
    with pytest.raises(ValueError, match="no <svg>"):
        inline("<html>", prefix="f", alt="")


def test_numbers_for_people():
    assert number(None) == "–"
    assert number(12345.6) == "12,346"
    assert number(0.012345) == "0.0123"
    assert with_interval({"value": None, "low": None, "high": None, "note": "why"}) == "undefined: why"
    assert with_interval({"value": 1.0, "low": None, "high": 2.0, "note": ""}) == "1 (-∞ to 2)"
    assert with_interval({"value": 1.0, "low": 0.5, "high": 2.0, "note": ""}, unit="kT") == "1 (0.5 to 2) kT"


def test_break_even_arithmetic():
    entry = {"versus": "md", "measured": {"value": 5.0}, "against_msm": {"value": None}, "plain_ess_per_s": 2.0}
    # 100 s of preparation; 2 ESS/s against 10 ESS/s: E / 2 = 100 + E / 10 at E = 250, 125 s of plain dynamics
    assert "250 effective samples, or 125 s of md." in break_even(entry, preparation_s=100.0)
    assert "never pays back" in break_even(entry | {"measured": {"value": 0.5}}, preparation_s=100.0)
    assert "undefined" in break_even(entry, preparation_s=None)
    assert "undefined" in break_even(entry | {"measured": {"value": None}}, preparation_s=1.0)
