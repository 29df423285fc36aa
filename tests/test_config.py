"""The configuration: every mistake is one line that names the key; dumping and loading give the same values."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from longstride.config import Config, dump_config, load_config, stage_view, validate
from longstride.errors import ConfigError
from longstride.seeds import job_seed

SYSTEM = {"name": "a", "sequence": "AA"}


def test_defaults_are_a_valid_run():
    config = validate({})
    assert config == Config()
    assert config.run_folder.as_posix() == "results/alanine"


def test_config_yaml_shows_the_defaults():
    assert load_config(Path(__file__).parents[1] / "config.yaml") == Config()


def test_dump_and_load_give_the_same_values(tmp_path):
    config = validate({"reference": {"length_ps": 250.0}, "systems": [SYSTEM], "physics": {"cutoff_nm": None}})
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "c.yaml") == config


def test_dumped_configuration_writes_every_default_out():
    assert set(yaml.safe_load(dump_config(Config()))) == set(Config.model_fields)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"refrence": {}}, "unknown configuration key 'refrence'; did you mean 'reference'?"),
        ({"reference": {"lenght_ps": 1}}, "'reference.lenght_ps'; did you mean 'reference.length_ps'?"),
        ({"sample": {"mts": {"inner_step": 2}}}, "'sample.mts.inner_step'; did you mean 'sample.mts.inner_steps'?"),
        ({"systems": [{**SYSTEM, "sequnce": "AA"}]}, "'systems.0.sequnce'; did you mean 'systems.0.sequence'?"),
        ({"physics": {"temperature_K": 0}}, "physics.temperature_K: Input should be greater than 0 (given: 0)"),
        ({"physics": {"temperature_K": -5.0}}, "physics.temperature_K"),
        ({"physics": {"temperature_K": float("nan")}}, "physics.temperature_K"),
        ({"physics": {"temperature_K": "warm"}}, "physics.temperature_K"),
        ({"reference": {"timestep_fs": 3.0, "save_every_ps": 0.2}}, "save_every_ps must be a whole multiple of timestep_fs"),
        ({"shard": {"lags_ps": []}}, "shard.lags_ps"),
        ({"shard": {"validation_fraction": 1.0}}, "shard.validation_fraction"),
        ({"sample": {"methods": ["magic"]}}, "sample.methods.0"),
        ({"sample": {"seeds": 0}}, "sample.seeds"),
        ({"distill": {"teacher": "dft"}}, "distill.teacher"),
        ({"run": {"name": "../escape"}}, "run.name"),
        ({"systems": []}, "systems"),
        ({"systems": [{"name": "a"}]}, "exactly one of 'sequence' and 'file'"),
        ({"systems": [{**SYSTEM, "file": "a.pdb"}]}, "exactly one of 'sequence' and 'file'"),
        ({"systems": [{**SYSTEM, "water": 216}]}, "exactly one of 'sequence' and 'file', or 'water'"),
        ({"systems": [{"name": "a", "water": 216, "solvate": {"molecules": 9}}]}, "is a box of water already; drop 'solvate'"),
        ({"systems": [{**SYSTEM, "ligand": "l.sdf"}]}, "has a ligand but no 'file'"),
        ({"systems": [{**SYSTEM, "ligand_charges": "gasteiger"}]}, "has no 'ligand' for 'ligand_charges'"),
        ({"systems": [{**SYSTEM, "solvate": {}}]}, "exactly one of 'molecules' and 'padding_nm'"),
        (
            {"systems": [{**SYSTEM, "solvate": {"molecules": 9, "padding_nm": 1.0}}]},
            "exactly one of 'molecules' and 'padding_nm'",
        ),
        ({"systems": [{"name": "a", "water": 0}]}, "systems.0.water"),
        ({"systems": [SYSTEM, SYSTEM]}, "the name 'a' is used twice"),
        ({"transfer": {"lags_ps": [10.0, 5.0, 10.0]}}, "transfer: lags_ps names 10 ps twice"),
        ({"transfer": {"lags_ps": [-1.0]}}, "transfer.lags_ps.0"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(values, message):
    with pytest.raises(ConfigError) as caught:
        validate(values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_lag_longer_than_the_trajectories_is_refused():
    with pytest.raises(ConfigError, match=r"shard\.lags_ps.*is not shorter than reference\.length_ps"):
        validate({"reference": {"length_ps": 50.0}, "shard": {"lags_ps": [100.0]}})


def test_lags_of_the_transferable_flow_fit_the_reference_of_its_peptides():
    values = {"transfer": {"train": ["AA"], "lags_ps": [10.0, 400.0]}}
    with pytest.raises(ConfigError, match=r"transfer\.lags_ps: 400 ps is not shorter than reference\.length_ps \(300 ps\)"):
        validate(values)
    values["transfer"]["lags_ps"] = [10.1]
    with pytest.raises(ConfigError, match=r"transfer\.lags_ps must be a whole multiple of reference\.save_every_ps"):
        validate(values)
    values["transfer"]["train"] = []  # nothing is trained
    assert validate(values).transfer.lags_ps == (10.1,)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [1", "not valid YAML"), ("- 1", "must hold keys and values"), ("3", "must hold")]
)
def test_files_that_hold_no_configuration_are_refused(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(tmp_path / "c.yaml")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_yaml_cannot_run_code(tmp_path):
    (tmp_path / "c.yaml").write_text(f"run: !!python/object/apply:os.mkdir ['{tmp_path}/made']")
    with pytest.raises(ConfigError):
        load_config(tmp_path / "c.yaml")
    assert not (tmp_path / "made").exists()


def test_an_empty_file_means_the_defaults(tmp_path):
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "c.yaml") == Config()


def test_an_unknown_system_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"no system 'x'.*alanine-dipeptide"):
        Config().system("x")


def test_sections_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Config().reference.length_ps = 3.0


def _models(model: type[BaseModel]) -> list[type[BaseModel]]:
    inner = [field.annotation for field in model.model_fields.values() if isinstance(field.annotation, type)]
    children = [child for child in inner if issubclass(child, BaseModel)]
    return [model, *(deep for child in children for deep in _models(child))]


def test_every_plain_key_says_what_it_is():
    for model in _models(Config):
        for name, field in model.model_fields.items():
            if not isinstance(field.default, BaseModel):
                assert field.description, f"{model.__name__}.{name}"


def _descriptions(model: type[BaseModel], prefix: str = "") -> dict[str, str | None]:
    found = {}
    for name, field in model.model_fields.items():
        if isinstance(field.default, BaseModel):
            found |= _descriptions(type(field.default), f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = field.description
    return found


def test_the_comments_of_config_yaml_are_the_descriptions_of_the_keys():
    comments, path = {}, []
    for line in (Path(__file__).parents[1] / "config.yaml").read_text().splitlines():
        found = re.fullmatch(r"( *)(\w+):.*?(?: # ?(.*))?", line)
        if found:
            path[len(found[1]) // 2 :] = [found[2]]
            comments[".".join(path)] = found[3]
    expected = _descriptions(Config)
    del expected["systems"]  # shown by an example
    assert {key: comments.get(key) for key in expected} == expected


def test_a_view_holds_its_own_section_and_no_other():
    view = stage_view(Config(), "reference", system="alanine-dipeptide")
    assert view["reference"]["length_ps"] == Config().reference.length_ps
    assert not {"flow", "shard", "distill", "sample", "compare", "run"} & set(view)
    assert set(stage_view(Config(), "sample", system="alanine-dipeptide", method="md")) == {
        "seed",
        "system",
        "physics",
        "sample",
    }


def test_job_seeds_differ_by_identity_and_are_reproducible():
    identities = [("sample", "a", "md", 0), ("sample", "a", "md", 1), ("sample", "b", "md", 0), ("reference", "a")]
    seeds = [job_seed(2026, *identity) for identity in identities]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [job_seed(2026, *identity) for identity in identities]
    assert job_seed(2027, *identities[0]) != seeds[0]
    assert all(0 <= seed < 2**63 for seed in seeds)
