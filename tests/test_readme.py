"""What README.md and its like say is done here: commands, diffs, links, the map, the table."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml
from conftest import SHORT
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from safetensors.torch import load_file

from harness.commands import cli
from harness.config import search_space, unused_keys
from harness.config.paths import ASSETS_DIR, CONF_DIR, LAUNCHERS, REPOSITORY, options
from harness.results import run_record
from harness.runs import search
from harness.runs.composition import from_hydra

README = (REPOSITORY / "README.md").read_text("utf-8")
CONTRIBUTING = (REPOSITORY / "CONTRIBUTING.md").read_text("utf-8")
PAGES = [
    REPOSITORY / name
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "conf/README.md")
] + sorted((REPOSITORY / "experiments").rglob("README.md"))  # fmt: skip


def section(heading: str, page: str = README) -> str:
    """A page's text from a heading to the next one of its kind."""
    return re.split(r"^## ", page[page.index(f"\n## {heading}\n") + 4 :], flags=re.M)[0]


def commands(text: str) -> list[tuple[list[str], str]]:
    """(words, comment) of every command in the indented code of a page.

    Of the harness the words are `harness COMMAND ARGUMENT ...`, also where a record has the older
    `python -m harness.COMMAND ...` or starts it by `accelerate launch`.
    """
    found = []
    blocks = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    for line in blocks.replace("\\\n", " ").splitlines():
        if line.startswith(("harness ", "python -m ", "accelerate launch ", "make ")):
            code, _, comment = line.partition(" #")
            found.append((_current(shlex.split(code)), comment))
    return found


def _current(words: list[str]) -> list[str]:
    for index in (i for i, word in enumerate(words) if word == "-m"):
        if words[index + 1] == "harness":
            rest = words[index + 2 :]
            name, rest = ("sweep", rest[1:]) if rest[:1] == ["-m"] else ("run", rest)
            return ["harness", name, *rest]
        if words[index + 1].startswith("harness."):
            return ["harness", words[index + 1].partition(".")[2], *words[index + 2 :]]
    return words


def shown(*names: str) -> list[list[str]]:
    """What CONTRIBUTING's "How to add" passes to these commands, after its diffs."""
    lines = [words for words, _ in commands(section("How to add", CONTRIBUTING))]
    return [words[2:] for words in lines if words[0] == "harness" and words[1] in names]


def asked(*names: str) -> list[tuple[str, list[str], str]]:
    """(command, arguments, comment) of these commands on the pages, for the project as it is."""
    found: dict[str, tuple[str, list[str], str]] = {}
    for words, comment in (c for page in PAGES for c in commands(page.read_text("utf-8"))):
        if words[0] == "harness" and words[1] in names:
            found.setdefault(shlex.join(words[1:]), (words[1], words[2:], comment))
    return [line for line in found.values() if line[1] not in shown(*names)]


# --------------------------------------------------------------------------------- commands


@pytest.fixture
def at_hand(tmp_path, monkeypatch):
    """The files that the pages' commands want from their reader."""
    monkeypatch.chdir(tmp_path)
    for folder in ("notes", "e2e", "my_model"):
        Path(folder).mkdir()
    for name in ("train", "valid", "test"):
        lines = "".join(f"name[{n}]||{n} is a place.\n" for n in "ABCD")
        Path("e2e", f"{name}.txt").write_text(lines)
    for name in ("one", "two", "three"):
        Path("notes", f"{name}.txt").write_text(f"some text {name}")
    Path("my_model", "config.json").write_text('{"model_type": "gpt2"}')
    Path("more").mkdir()
    records = "".join(f'{{"text": "a record {i}"}}\n' for i in range(9))
    for name in ("more/b.jsonl", "a.jsonl"):
        Path(name).write_text(records)
    for name in ("book.txt", "old.txt", "corpus.txt"):
        Path(name).write_text(
            "\n\n".join(f"Paragraph {i}. " + "Some words. " * 40 for i in range(9))
        )
    for name in ("train", "test"):
        Path(f"{name}.jsonl").write_text(records.replace("record", name))
    rows = "".join(f'{{"prompt": "a{i}", "completion": "b"}}\n' for i in range(9))
    Path("pairs.jsonl").write_text(rows)
    ask, say = ({"role": role, "content": role} for role in ("user", "assistant"))
    talks = [{"messages": [ask | {"content": f"a{i}"}, say]} for i in range(9)]
    Path("chat.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))


def runs(overrides: list[str]) -> tuple[list[list[str]], int]:
    """The first and the last run of a sweep, and how many runs it has."""
    for launcher in [o.partition("=")[2] for o in overrides if o.startswith("hydra/launcher=")]:
        extra = LAUNCHERS[launcher]
        if importlib.util.find_spec(f"hydra_plugins.hydra_{extra}_launcher") is None:
            # Not installed, and its keys are Hydra's: `make test-launchers` tries them.
            overrides = [
                o for o in overrides if "hydra/launcher" not in o and "hydra.launch" not in o
            ]
    if importlib.util.find_spec("mlflow") is None:  # which the page says how to install
        overrides = [o for o in overrides if o != "tracker=mlflow"]
    first, last, number = [], [], 1
    for override in OverridesParser.create().parse_overrides(overrides):
        ends = [override.input_line] * 2
        if override.is_sweep_override():
            swept = list(override.sweep_string_iterator())
            number *= len(swept)
            ends = [f"{override.get_key_element()}={value}" for value in (swept[0], swept[-1])]
        first.append(str(ends[0]))
        last.append(str(ends[1]))
    return [first, last] if number > 1 else [first], number


def without_folders(lines):
    """Without runs of what a search leaves in a folder, which tests/test_search.py tries."""
    return [line for line in lines if "--config-dir" not in line[1]]


@pytest.mark.parametrize(
    "arguments", [line[1] for line in asked("search")], ids=lambda value: " ".join(value)
)
def test_every_search_that_the_pages_show_is_valid(arguments):
    own = [f"hydra.sweeper.{text[7:]}" for text in arguments if text.startswith("search.")]
    given = [text for text in arguments if not text.startswith("search.")]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("config", ["hydra/sweeper=search", *own], return_hydra_config=True)
        sweeper = instantiate(cfg.hydra.sweeper)
        space = search_space.read({"evaluate.test": "false"}, sweeper.space, given)
        ends = search.check_space(space, lambda texts: compose("config", texts), sweeper.settings)
    assert space.dimensions and not any(run.evaluate.test for run in ends)


@pytest.mark.parametrize(
    ("name", "arguments", "comment"),
    without_folders(asked("run", "sweep")),
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_run_that_the_pages_show_is_valid(name, arguments, comment, at_hand):
    if any(word.startswith("model.quantize=") for word in arguments):
        pytest.importorskip("bitsandbytes")  # or it is refused with the line that installs it
    found, number = runs([word for word in arguments if word not in ("--cfg", "job")])
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        for overrides in unused_keys.left_out(found, partial(compose, "config"))[0]:
            assert from_hydra(compose("config", overrides))
    assert number == 1 or name == "sweep"
    if stated := re.search(r"(\d+) runs", comment):
        assert number == int(stated[1])


FURTHER = sorted(
    {words[1] for page in PAGES for words, _ in commands(page.read_text("utf-8"))
     if words[0] == "harness"} - {"run", "sweep"}
)  # fmt: skip


@pytest.mark.parametrize("name", FURTHER)
def test_every_further_command_explains_itself_and_knows_the_flags_shown(name, at_hand, capsys):
    try:
        status = cli.main([name, "--help"])
    except SystemExit as end:  # argparse's way
        status = end.code
    finally:
        logging.disable(logging.NOTSET)
    said = capsys.readouterr().out
    assert status == 0 and f"harness {name}" in said
    for _, arguments, _ in asked(name):
        for flag in (word for word in arguments if word.startswith("--")):
            assert flag in said, flag
        if name in ("count", "plan"):  # which take a run's overrides
            own = [o for o in arguments if o != "-m" and not o.startswith(("--", "plan."))]
            with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
                found = unused_keys.left_out(runs(own)[0], partial(compose, "config"))[0]
                assert all(from_hydra(compose("config", o)) for o in found)


def test_every_make_target_that_the_pages_name_is_there():
    targets = set(re.findall(r"^([a-z0-9_-]+):", (REPOSITORY / "Makefile").read_text(), re.M))
    text = "".join(page.read_text("utf-8") for page in PAGES)
    named = set(re.findall(r"(?:^    |`)make ([a-z0-9_-]+)", text, re.M))
    assert {"experiment", "test"} <= named <= targets


# ---------------------------------------------------------------------------------- how to add


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A copy of the project after all of the page's diffs."""
    copy = tmp_path_factory.mktemp("project")
    left_out = (".*", "__pycache__", "outputs", "dist", "build", "*.egg-info")
    shutil.copytree(REPOSITORY, copy, ignore=shutil.ignore_patterns(*left_out), dirs_exist_ok=True)
    diffs = re.findall(r"^```diff\n(.*?)^```$", CONTRIBUTING, re.M | re.S)
    assert len(diffs) == 4  # a method, a model, a data set, an experiment
    for diff in diffs:  # outside of a repository git applies to the folder that it is in
        applied = subprocess.run(
            ["git", "apply", "--verbose", "-"],
            input=diff,
            cwd=copy,
            env=os.environ | {"GIT_CEILING_DIRECTORIES": str(copy.parent)},
            capture_output=True,
            text=True,
        )
        assert applied.returncode == 0, applied.stderr
    return copy


def python(copy: Path, folder: Path, *arguments: str) -> str:
    """The output of a Python command in `folder` with the copy's sources."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# GPT-2's biases per block of width d are 3d + d + 4d + d and the norms' d + d, then a norm's d:
# 4 x 11 x 256 + 256. LoRA of r=8 on a block's c_attn and c_proj: 8 x (256 + 768) + 8 x (256 + 256).
BIASES, ATTENTION = 11_520, 4 * 8 * (1024 + 512)

CHECK = """
import json, sys
from hydra import compose, initialize_config_dir
from harness import methods
from harness.config.paths import CONF_DIR
from harness.data import documents
from harness.models import model_size, pretrained
from harness.runs.composition import from_hydra
found = {}
with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
    for line in json.loads(sys.argv[1]):
        run = from_hydra(compose("config", line))
        base = pretrained.on_meta(run, pretrained.load_config(run.model))
        trainable = model_size.count_parameters(methods.check(base, run)).trainable
        texts = documents.read(run.data) if "data" in line[0] else {}
        found[line[0]] = [trainable, sum(map(len, texts.values()))]
print(json.dumps(found))
"""


def test_what_readme_adds_is_there_and_lints(changed, tmp_path):
    found = json.loads(python(changed, tmp_path, "-c", CHECK, json.dumps(shown("run"))))
    assert found["method=bias"][0] == BIASES
    assert found["model=gpt1_mini"][0] == ATTENTION
    with (CONF_DIR / "data" / "docstrings.yaml").open() as stream:
        assert found["data=descriptions"][1] == len(yaml.safe_load(stream)["packages"])
    assert "experiment=biases" in found
    python(changed, changed, "-m", "ruff", "check", ".")
    python(changed, changed, "-m", "ruff", "format", "--check", ".")


@pytest.mark.slow
def test_how_to_add_followed_to_the_letter(changed, tmp_path):
    said = {}
    for words, _ in commands(section("How to add", CONTRIBUTING)):
        short = SHORT if words[1] == "run" else []
        said[" ".join(words)] = python(changed, tmp_path, "-m", *words, *short)
    assert re.search(rf"trainable +{BIASES:,} ", said["harness count method=bias"])
    records = {}
    for run_dir, record in run_record.collect(tmp_path / "outputs" / "scratch"):
        assert record["status"] == "finished"
        records[record["method"]["name"], record["model"]["name"], record["data"]["name"]] = (
            run_dir, record,
        )  # fmt: skip
    run_dir, bias = records["bias", "gpt2_mini", "kjv"]
    assert bias["parameters"]["trainable"] == BIASES and bias["saved"] == ["model"]
    before = load_file(ASSETS_DIR / "gpt2_mini" / "model.safetensors")
    after = load_file(run_dir / "model" / "model.safetensors")
    before = {key.removeprefix("transformer."): value for key, value in before.items()}
    moved = {
        key for key, value in after.items()
        if not value.equal(before[key.removeprefix("transformer.")])
    }  # fmt: skip
    assert moved and all(key.endswith(".bias") for key in moved)
    python(changed, tmp_path, "-m", "harness", "export", str(run_dir), "exported")
    _, gpt1 = records["lora", "gpt1_mini", "kjv"]
    assert gpt1["model"]["type"] == "openai-gpt" and gpt1["parameters"]["trainable"] == ATTENTION
    assert ("lora", "gpt2_mini", "descriptions") in records
    rows = [record for _, record in run_record.collect(tmp_path / "outputs" / "biases")]
    assert len(rows) == 7 and {row["status"] for row in rows} == {"finished"}
    assert (tmp_path / "outputs" / "biases" / "report" / "index.html").is_file()


# ------------------------------------------------------------------------- links, map, records


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_link_leads_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text("utf-8")):
        if "://" in target:
            continue
        path = (page.parent / target) if target else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.M)
            slugs = [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings]
            assert anchor in slugs


def test_the_map_names_every_package_and_the_packages_their_place():
    listed = re.findall(r"^\| `(\w+)/(?:(\w+)/)?` \|", section("Files"), re.M)
    assert all((REPOSITORY / top / below).is_dir() for top, below in listed)
    packages = [p.parent.name for p in (REPOSITORY / "harness").glob("*/__init__.py")]
    assert {below for top, below in listed if top == "harness"} == {*packages, "assets"}
    assert len(packages) <= 12
    layers = re.search(r"^layers = \[(.*)\]", (REPOSITORY / "pyproject.toml").read_text(), re.M)
    order = [name for name in reversed(re.findall(r"\w+", layers[1])) if name in packages]
    assert [below for top, below in listed if below in packages] == order


def test_conf_readme_names_every_method_and_model():
    text = (CONF_DIR / "README.md").read_text("utf-8")
    for group in ("method", "model", "targets"):
        for option in (path.stem for path in (CONF_DIR / group).glob("*.yaml")):
            if not option.startswith("lstm_") and option != "ends":  # of the recorded LSTM
                assert re.search(rf"`(?:\w+=)?{option}\b", text), f"{group}={option}"


def test_the_table_is_the_recorded_one():
    def rows(text: str) -> list[list[str]]:
        lines = re.findall(r"^\| (?:none|full|lora|udv-\w+|truncate) \|.*$", text, re.M)
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    folder = REPOSITORY / "experiments" / "main_seeds"
    table = rows(section("What comes out"))
    assert len(table) == 10
    everything = [row[:11] for row in rows((folder / "README.md").read_text("utf-8"))]
    assert len(everything) == 15 and all(row in everything for row in table)
    with (folder / "results.csv").open() as stream:
        recorded = {
            (
                int(float(row["parameters.trainable"])),
                f"{float(row['quality.test.perplexity']):.2f}",
            )
            for row in csv.DictReader(stream)
        }
    found = {(int(row[5].replace(",", "")), row[8]) for row in everything}
    assert found == recorded


def test_the_notebook_lists_every_record():
    index = (REPOSITORY / "experiments" / "README.md").read_text("utf-8")
    for page in (REPOSITORY / "experiments").rglob("README.md"):
        name = page.parent.relative_to(REPOSITORY / "experiments").as_posix()
        assert name == "." or f"({name}/README.md)" in index, name
    for page in PAGES:
        named = set(re.findall(r"`[^`\n]*\bexperiment=(\w+)", page.read_text("utf-8")))
        assert named <= set(options("experiment"))


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text("utf-8"))
    version = re.search(r'^version = "(.*)"', (REPOSITORY / "pyproject.toml").read_text(), re.M)[1]
    assert cited["version"] == version and cited["cff-version"] == "1.2.0"
    assert {"title", "message", "authors", "license", "abstract", "type"} <= cited.keys()
