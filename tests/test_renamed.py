"""Keys that have another name now: the old ones work, and runs keep their identities."""

import dataclasses
import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from harness.api import compose
from harness.config import keys, naming, rates, renamed, run_config, schema
from harness.config.errors import ConfigError
from harness.config.paths import REPOSITORY
from harness.report import requested
from harness.results import run_record
from harness.results import schema as schema_of_records
from harness.runs import composition
from harness.runs.grids import GridSweeper

OLD = [
    "train.clip=0.5", "evaluate.every=7", "data.context=64", "train.final_lr=0.2",
    "train.checkpoint_every=5", "evaluate.context=32",
    "evaluate.also={mine: {source: docstrings, context: 48}}",
]  # fmt: skip
NEW = [
    "train.max_grad_norm=0.5", "evaluate.interval=7", "data.context_length=64",
    "train.min_lr_ratio=0.2", "train.checkpoint_interval=5", "evaluate.context_length=32",
    "evaluate.also={mine: {source: docstrings, context_length: 48}}",
]  # fmt: skip
# As the last version with the old names computed them.
IDENTITY = "ce925e8c42967351ab61d08531b22e339adcad2364e0974d6303dd7b6d05c8c4"
OF_A_MIXTURE = "b714348741a0413c9326c475e53c166f5d3a3d9e5b74588f63284b18c011e23a"


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    monkeypatch.setattr(renamed, "_told", set())


def test_old_and_new_names_are_one_run_with_the_identity_that_it_had(capsys):
    (old,) = compose("method=lora", "train.lr=1e-3", *OLD)
    told = capsys.readouterr().err.splitlines()
    (new,) = compose("method=lora", "train.lr=1e-3", *NEW)
    assert old == new and naming.identity(new) == IDENTITY
    assert (new.train.max_grad_norm, new.evaluate.interval, new.data.context_length) == (0.5, 7, 64)
    assert new.evaluate.also["mine"].context_length == 48
    assert "train.clip is train.max_grad_norm now; the old name still works" in told
    assert len(told) == len(OLD) == len(set(told))
    assert not capsys.readouterr().err


def test_a_part_of_a_mixture_has_them_too():
    for name in ("context", "context_length"):
        parts = f"data.parts={{docstrings: {{weight: 0.5, {name}: 256}}, kjv: 0.5}}"
        (run,) = compose("method=lora", "data=mix", parts, "train.lr=1e-3")
        assert naming.identity(run) == OF_A_MIXTURE


def test_every_new_name_is_a_field_and_no_old_one_is():
    for section, names in renamed.RENAMED.items():
        fields = {field.name for field in dataclasses.fields(schema.SECTIONS[section])}
        assert set(names.values()) <= fields and not set(names) & fields
        for old, new in names.items():
            assert keys.elsewhere(f"wrong.{new}") and not keys.leaves().get(old)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("train.clip=null", "train.max_grad_norm=null"),
        ("++train.clip=1", "++train.max_grad_norm=1"),
        ("~train.clip", "~train.max_grad_norm"),
        ("evaluate.every=1,2=3", "evaluate.interval=1,2=3"),
        ("+data.parts.kjv.context=8", "+data.parts.kjv.context_length=8"),
        ("method.fields.context=8", "method.fields.context=8"),
        ("experiment=train.clip", "experiment=train.clip"),
        ("data.text_field='a\nb'", "data.text_field='a\nb'"),
    ],
)
def test_an_override_keeps_its_marks_and_its_value(typed, meant):
    assert renamed.in_overrides([typed]) == [meant]


def test_grids_and_seeds_of_a_sweep_are_renamed():
    sweeper = GridSweeper(params={"train.clip": "1,2"}, grids=[{"evaluate.every": "3,4"}])
    assert sweeper.params == ["train.max_grad_norm=1,2"]
    assert sweeper.grids == [{"evaluate.interval": "3,4"}]


def test_a_file_with_old_names_is_read_and_tells_once(capsys):
    config = OmegaConf.create(run_config.to_dict(compose("method=lora", "train.lr=1e-3")[0]))
    config.train.clip, config.evaluate.every = 0.25, 9
    for _ in range(2):
        run = composition.from_hydra(config)
    assert (run.train.max_grad_norm, run.evaluate.interval) == (0.25, 9)
    assert capsys.readouterr().err.splitlines() == [
        "train.clip is train.max_grad_norm now; the old name still works",
        "evaluate.every is evaluate.interval now; the old name still works",
    ]


def test_two_values_under_two_names_are_refused():
    config = OmegaConf.create(
        run_config.to_dict(compose("train.lr=1e-3", "train.max_grad_norm=2")[0])
    )
    config.train.clip = 2
    assert composition.from_hydra(config).train.max_grad_norm == 2
    config.train.clip = 3
    with pytest.raises(ConfigError, match=r"train\.clip=3 and train\.max_grad_norm=2\.0 are two"):
        composition.from_hydra(config)


OWN_FILE = """# @package _global_
train: {clip: 0.5, lr: 1e-3}
evaluate: {every: 20, stride: "${data.context}"}
data: {context: 64}
"""


@pytest.mark.parametrize(
    ("typed", "clip", "interval"),
    [
        ([], 0.5, 20),
        (["train.clip=1.0"], 1.0, 20),  # the default, and typed
        (["train.max_grad_norm=1.0", "evaluate.interval=50"], 1.0, 50),
        (["train.clip=null", "evaluate.every=10"], None, 10),
    ],
)
def test_the_command_line_comes_before_an_old_name_in_a_file(tmp_path, typed, clip, interval):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(OWN_FILE)
    where = f"hydra.searchpath=[file://{tmp_path}]"
    (run,) = compose(where, "experiment=mine", "method=lora", *typed)
    assert (run.train.max_grad_norm, run.evaluate.interval) == (clip, interval)
    assert run.evaluate.stride == run.data.context_length == 64  # an interpolation


def test_rates_that_a_search_found_on_a_mixture_are_still_its_own(tmp_path):
    parts = ["data=mix", "data.parts={docstrings: 0.5, kjv: 0.5}"]
    (run,) = compose("method=lora", "method.r=8", *parts, "train.lr=1e-3")
    setting = rates.setting_of(run.model, run.data, vars(run.train)) | {"seed": 0}
    grid = {0.01: 3.1, 0.02: 3.0, 0.04: 3.2}
    found = rates.tuned_of(run.method, run.targets.name, grid, "today")
    text = rates.text(setting, [found])
    assert text.count("context_length") == 3
    (tmp_path / "old.yaml").write_text(text.replace("context_length", "context"))
    (tuned,) = compose("method=lora", "method.r=8", *parts, f"train.rates={tmp_path}/old.yaml")
    assert (tuned.train.lr, tuned.train.lr_from) == (0.02, "tuned")


def test_two_names_in_one_grid_are_refused():
    with pytest.raises(ConfigError, match=r"two names of one key: write train\.max_grad_norm"):
        renamed.in_grid({"train.clip": "1,2", "train.max_grad_norm": 3})


def test_a_search_from_before_is_the_same_search():
    before = "data.path='a b.txt' evaluate.every=20 experiment_name=mine method=lora"
    now = "data.path='a b.txt' evaluate.interval=20 experiment_name=mine method=lora"
    assert renamed.is_same(before, now) and renamed.is_same(now, now)
    assert not renamed.is_same(before, now.replace("20", "30"))


def test_a_column_is_found_by_its_old_path():
    requested.check(["evaluation.context", "evaluation.context_length"])
    with pytest.raises(ConfigError, match="contxt"):
        requested.check(["evaluation.contxt"])


def test_the_recorded_result_of_version_1_is_one_of_today():
    record = run_record.read(REPOSITORY / "experiments" / "pretrain_gpt2_mini")
    assert record["schema_version"] == 2 and schema_of_records.problems(record) == []


def old_names(run):
    """The configuration of a run as versions before the renaming wrote it."""
    values = json.loads(json.dumps(run_record.settings(run)))
    renamed.as_before(values)
    assert "clip" in values["train"] and "context" in values["data"]
    assert "max_grad_norm" not in values["train"]
    return values


def test_a_directory_of_an_older_run_is_that_run_without_a_word(tmp_path, capsys):
    (run,) = compose("method=lora", "train.lr=1e-3", *NEW)
    path = Path(tmp_path / "config.yaml")
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(old_names(run))))
    assert naming.identity(composition.load(path)) == IDENTITY
    assert not capsys.readouterr().err


def test_a_record_of_schema_version_1_is_read_as_one_of_today(tmp_path):
    (run,) = compose("method=lora", "train.lr=1e-3", *NEW)
    old = {"schema_version": 1, "status": "finished", "config": old_names(run),
           "evaluation": {"context": 32, "stride": 16}}  # fmt: skip
    (tmp_path / "result.json").write_text(json.dumps(old))
    found = run_record.read(tmp_path)
    assert found["schema_version"] == run_record.SCHEMA_VERSION == 2
    assert found["config"] == json.loads(json.dumps(run_record.settings(run)))
    assert found["evaluation"] == {"context_length": 32, "stride": 16}
    failed = {"schema_version": 1, "status": "failed"}  # before it had a configuration
    assert run_record.upgraded(failed) == failed | {"schema_version": 2}
