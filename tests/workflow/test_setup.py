"""What set-up installs: a lock that any machine's pip understands and that agrees with the package."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCK = [line for line in (ROOT / "envs" / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_lock_holds_plain_pins_only():
    for line in LOCK:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][A-Za-z0-9.]*", line), line
    assert "torch==2.13.0" in LOCK


def asked_for(texts):
    """Requirements, those of the package's own extras spelt out."""
    for text in texts:
        requirement = Requirement(text)
        if requirement.name != PROJECT["name"]:
            yield text
        for extra in requirement.extras if requirement.name == PROJECT["name"] else ():
            yield from asked_for(PROJECT["optional-dependencies"][extra])


@pytest.mark.parametrize("text", [*PROJECT["dependencies"], *asked_for(PROJECT["optional-dependencies"]["dev"])])
def test_lock_satisfies_what_the_package_asks_for(text):
    requirement = Requirement(text)
    pins = dict(line.split("==") for line in LOCK)
    assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)])


def test_conda_environment_has_every_dependency():
    listed = yaml.safe_load((ROOT / "envs" / "longstride.yaml").read_text())["dependencies"]
    flat = [item for entry in listed for item in (entry["pip"] if isinstance(entry, dict) else [entry])]
    names = {canonicalize_name(re.split("[=<>]", item)[0]) for item in flat}
    other = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
    wanted = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    assert {other.get(name, name) for name in wanted} <= names
