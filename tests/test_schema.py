"""Every key of result.json: what runs write is what the page and the JSON schema say."""

from __future__ import annotations

import ast
import copy
import json
import re
import subprocess
import sys

import pytest

from harness.config.paths import REPOSITORY
from harness.results import run_record, schema, schema_files

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
    schema_file.write_text(json.dumps(schema_files.json_schema()))
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
    done = harness(
        "method=full", "train.lr=1e9", "train.steps=3", "train.max_grad_norm=null", "run_name=x"
    )
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
        (
            "status",
            "whatever",
            "status is 'whatever', expected one of finished, failed, interrupted, paused, running",
        ),
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
    schema_file.write_text(json.dumps(schema_files.json_schema()))
    file.write_text(json.dumps(record))
    valid(schema_file, file, right=False)


def test_the_page_the_schema_and_the_types_are_those_of_the_keys():
    again = f"{sys.executable} -m harness.results.schema_files"
    assert schema_files.PAGE.read_text("utf-8") == schema_files.reference(), again
    assert json.loads(schema_files.SCHEMA.read_text("utf-8")) == schema_files.json_schema(), again
    assert schema_files.TYPES.read_text("utf-8") == schema_files.types(), again
    paths = [key.path for key in schema.every_key()]
    assert len(set(paths)) == len(paths) > 150


def test_the_schema_is_one(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--check-metaschema", str(schema_files.SCHEMA)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


OURS = "run|parameters|memory|predicted|speed|costs|quality|evaluation|environment|saved_check"
OF_TABLES = {  # a row's own values, which are made of several records
    r"quality\.test\.interval", r"quality\.test\.rank", r"quality\.test\.value",
    r"memory\.file_bytes", r"quality\.forgetting",
    r"evaluation\.context",  # of schema version 1
}  # fmt: skip


def paths_that_are_read():
    """Where the program names a key of a record by its dotted path, as a pattern of it.

    A part of an f-string stands for any names. Sections that the configuration has too, as
    `method`, are looked at where `get` is called with a record alone.
    """
    for file in sorted((REPOSITORY / "harness").rglob("*.py")):
        tree = ast.parse(file.read_text("utf-8"))
        parts = {id(v) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for v in n.values}
        for node in ast.walk(tree):
            path = "" if id(node) in parts else pattern(node)
            if path and re.fullmatch(rf"({OURS})\\\.[\\\[\]\w.*+]+", path):
                yield f"{file.name}:{node.lineno}", path
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("get"):
                arguments = node.args if len(node.args) == 2 else [ast.Constant(0)] * 2
                of_record = ast.unparse(arguments[0]).endswith(("record", "result"))
                path = pattern(arguments[1])
                if of_record and path and not path.startswith("config"):
                    yield f"{file.name}:{node.lineno}", path


def pattern(node):
    """A regular expression of what a text of the source may be; "" where it is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.escape(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(pattern(part) or r"[\w.*]+" for part in node.values)
    return ""


def test_every_path_that_is_read_is_a_key():
    """`run_record.get` takes any path; what is read by names alone has types, which mypy checks."""
    known = {key.path for key in schema.every_key()}
    for path in set(known):
        while path := path.rpartition(".")[0]:
            known.add(path)
    read = {(place, path.replace("batch_", "")) for place, path in paths_that_are_read()}
    assert len(read) > 150
    unknown = [one for one in read if not any(re.fullmatch(one[1], key) for key in known)]
    assert {path for _, path in unknown} == OF_TABLES, unknown
