"""Every key of result.json: what runs write is what the page and the JSON schema say."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest

from harness.results import run_record, schema

RUNS = {
    "plain": ("method=none",),
    "full": ("method=full", "method.train_only=[norms]"),
    "udv": ("method=udv", "method.energy=0.9"),
    "peft": ("method=peft", "method.peft_type=IA3"),
    "part": ("method=lora", "evaluate.test_tokens=100", "evaluate.also=[docstrings_held_out]"),
    "epochs": ("method=lora", "train.steps=null", "train.epochs=0.001"),
}


@pytest.fixture(params=RUNS)
def record(request, finished_run):
    return run_record.read(finished_run(*RUNS[request.param]))


def test_what_a_run_writes_is_in_the_schema(record, tmp_path):
    assert schema.problems(record) == []
    schema_file, file = tmp_path / "schema.json", tmp_path / "result.json"
    schema_file.write_text(json.dumps(schema.json_schema()))
    file.write_text(json.dumps(record))
    valid(schema_file, file)


def valid(schema_file, file, *, right=True):
    """By a validator that is not ours."""
    pytest.importorskip("jsonschema")
    import jsonschema

    validator = jsonschema.Draft202012Validator(json.loads(schema_file.read_text()))
    errors = [error.message for error in validator.iter_errors(json.loads(file.read_text()))]
    assert bool(errors) != right, errors


def test_a_task_with_completions(finished_run, task, tmp_path):
    record = run_record.read(finished_run(*task))
    assert schema.problems(record) == [] and record["quality"]["generation"]["num_prompts"] == 2


@pytest.mark.slow
def test_a_failed_run(harness, tmp_path):
    done = harness("method=full", "train.lr=1e9", "train.steps=3", "train.clip=null", "run_name=x")
    record = run_record.read(tmp_path / "outputs" / "scratch" / "x")
    assert done.returncode == 1 and record["failure"]["class"] == "nan"
    assert schema.problems(record) == []


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("quality.test.perplexity", "37", "quality.test.perplexity is str, expected number"),
        ("parameters.total", None, "parameters.total is null, expected integer"),
        ("parameters.total", True, "parameters.total is bool, expected integer"),
        ("parameters.totl", 3, "parameters.totl is no key of result.json"),
        ("newkey", {"a": 1}, "newkey is no key of result.json"),
        ("saved", {}, "saved is dict, expected array"),
    ],
)
def test_what_is_wrong_is_named(path, value, said, finished_run, tmp_path):
    record = copy.deepcopy(run_record.read(finished_run(*RUNS["plain"])))
    *parents, last = path.split(".")
    node = record
    for parent in parents:
        node = node[parent]
    node[last] = value
    assert schema.problems(record) == [said]
    schema_file, file = tmp_path / "schema.json", tmp_path / "result.json"
    schema_file.write_text(json.dumps(schema.json_schema()))
    file.write_text(json.dumps(record))
    valid(schema_file, file, right=False)


def test_the_page_and_the_schema_are_those_of_the_keys():
    again = f"{sys.executable} -m harness.results.schema"
    assert schema.PAGE.read_text("utf-8") == schema.reference(), again
    assert json.loads(schema.SCHEMA.read_text("utf-8")) == schema.json_schema(), again
    paths = [key.path for key in schema.every_key()]
    assert len(set(paths)) == len(paths) > 150


def test_the_schema_is_one(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--check-metaschema", str(schema.SCHEMA)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
