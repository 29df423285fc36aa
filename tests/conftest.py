"""Fixtures shared by all tests: small real molecules, made from what the package ships."""

from __future__ import annotations

import os
from pathlib import Path

# tensors in tests are small: a second thread only waits, and waits badly on a busy machine (read before torch is imported)
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from molecules import PHYSICS


@pytest.fixture(scope="session")
def alanine():
    """Alanine dipeptide, prepared in memory."""
    from longstride.systems import prepare_sequence

    return prepare_sequence("ACE-ALA-NME", name="alanine-dipeptide", **PHYSICS)


@pytest.fixture(scope="session")
def alanine_folder(alanine, tmp_path_factory) -> Path:
    """The prepare stage's folder of alanine dipeptide."""
    from longstride.systems import save_prepared

    folder = tmp_path_factory.mktemp("prepared")
    save_prepared(folder, alanine, {"temperature_K": 310.0})
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Published example files that lie beside a development checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("the published example files (../shared) are not beside this checkout")
    return folder
