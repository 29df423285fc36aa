import pytest
from fake_run import SECTION, make_run, sample_folders

from longstride.stages import compare


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """A made-up run folder with inputs of the compare stage; read only."""
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def compared(run_folder, tmp_path_factory):
    """The output folder of the compare stage; one sample folder of the plan is absent."""
    out = tmp_path_factory.mktemp("compare") / "fake"
    folders = [*sample_folders(run_folder), run_folder / "sample/fake/timewarp/seed7"]
    compare.run(
        SECTION,
        prepared=run_folder / "prepare/fake",
        reference=run_folder / "reference/fake",
        samples=folders,
        out=out,
        seed=3,
        threads=2,
    )
    return out
