"""Code versions: they change when, and only when, code that the stage can run changes."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

import longstride
from longstride.fingerprints import code_version, import_closure

PACKAGE = Path(longstride.__file__).parent
STAGES = sorted(path.stem for path in (PACKAGE / "stages").glob("[!_]*.py"))


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of the package that may be edited."""
    return Path(shutil.copytree(PACKAGE, tmp_path / "longstride", ignore=shutil.ignore_patterns("__pycache__")))


@pytest.fixture
def toy(tmp_path) -> Path:
    """A package of two stages; only `deep` reaches the modules below, partly inside functions and relatively."""
    root = tmp_path / "longstride"
    files = {
        "__init__.py": '__version__ = "1"\n',
        "progress.py": "A = 1\n",
        "stages/__init__.py": "",
        "stages/flat.py": "import json\n\ndef run():\n    return 1\n",
        "stages/deep.py": "from typing import TYPE_CHECKING\n\nfrom longstride import low, progress\n\n"
        "if TYPE_CHECKING:\n    from longstride.types_only import T\n\n"
        "def run():\n    try:\n        from ..science import model\n    finally:\n        pass\n    return model, low\n",
        "low.py": '"""Low."""\n\nX = 1\n',
        "types_only.py": "T = int\n",
        "science/__init__.py": "",
        "science/model.py": "from .deeper import Y\n\nPAGE = 'page.html'\n",
        "science/deeper.py": "Y = 2\n",
        "science/page.html": "<p>",
        "science/other.html": "<p>",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def _both(root: Path) -> tuple[str, str]:
    return code_version("flat", source=root), code_version("deep", source=root)


def test_closure_follows_lazy_and_relative_imports_but_not_types(toy):
    closure = import_closure("longstride.stages.deep", source=toy)
    assert {"longstride.low", "longstride.science", "longstride.science.model", "longstride.science.deeper"} <= closure
    assert "longstride.types_only" not in closure
    assert "longstride.stages.flat" not in closure


@pytest.mark.parametrize(
    ("name", "text", "changed"),
    [
        ("low.py", "X = 2\n", "deep"),
        ("science/deeper.py", "Y = 3\n", "deep"),
        ("science/page.html", "<b>", "deep"),
        ("stages/flat.py", "def run():\n    return 2\n", "flat"),
        ("low.py", '"""Other words."""\n\n# a comment\nX = (\n    1\n)\n', None),
        ("science/other.html", "<b>", None),
        ("types_only.py", "T = str\n", None),
        ("progress.py", "A = 2\n", None),
        ("__init__.py", '__version__ = "2"\n', None),
    ],
)
def test_only_what_a_stage_can_run_changes_its_version(toy, name, text, changed):
    before = _both(toy)
    (toy / name).write_text(text)
    after = _both(toy)
    assert (before[0] != after[0], before[1] != after[1]) == (changed == "flat", changed == "deep")


def test_removed_docstring_changes_nothing_but_a_new_statement_does(toy):
    before = code_version("flat", source=toy)
    (toy / "stages" / "flat.py").write_text('"""Doc."""\nimport json\n\ndef run():\n    """Doc."""\n    return 1\n')
    assert code_version("flat", source=toy) == before
    (toy / "stages" / "flat.py").write_text("import json\n\ndef run():\n    print()\n    return 1\n")
    assert code_version("flat", source=toy) != before


def test_an_unknown_stage_is_an_error():
    with pytest.raises(ValueError, match=r"no module longstride\.stages\.nonsense"):
        code_version("nonsense")


@pytest.mark.parametrize(
    ("module", "affected", "spared"),
    [
        ("dynamics/openmm_md.py", {"reference", "sample_md"}, {"prepare", "shard"}),
        ("data/shards.py", {"shard"}, {"prepare", "reference", "sample_md"}),
        ("systems.py", {"prepare", "reference", "sample_md"}, {"shard"}),
        ("config.py", set(), {"prepare", "reference", "shard", "sample_md"}),
    ],
)
def test_the_real_stages_depend_on_what_they_use(tree, module, affected, spared):
    before = {stage: code_version(stage, source=tree) for stage in affected | spared}
    with (tree / module).open("a") as handle:
        handle.write("\n_EDITED = True\n")
    after = {stage: code_version(stage, source=tree) for stage in affected | spared}
    assert {stage for stage in before if before[stage] != after[stage]} == affected


def test_versions_of_all_stages_are_cheap():
    begin = time.process_time()
    versions = {stage: code_version(stage) for stage in STAGES}
    assert len(versions) == len(STAGES)
    assert time.process_time() - begin < 5  # far above the cost (a fraction of a second); catches a runaway closure
