"""The program `harness`: its sub-commands, the older names of them, and how all of them end."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from harness.commands import cli, doctor, listing
from harness.config.errors import ConfigError
from harness.config.paths import CONF_DIR, PACKAGE, options
from harness.system.console import command

FORMER = sorted(
    path.stem for path in (PACKAGE / "commands" / "former").glob("*.py") if path.stem != "__init__"
)


def test_help_shows_every_command_on_one_screen_and_imports_nothing_slow(harness):
    shown = harness("--help")
    assert shown.returncode == 0 and not shown.stderr
    lines = shown.stdout.splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines if line[:2] == "  " and line[2] != "h"] == list(
        cli.COMMANDS
    )
    code = "import sys; from harness.__main__ import program; sys.argv[1:] = ['--help']; program()"
    probe = f"{code}; print(json.dumps(sorted(sys.modules)))".replace(
        "import sys", "import json, sys", 1
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert not {"hydra", "torch", "pandas"} & set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("name", sorted(set(cli.COMMANDS) - {"run", "sweep", "search"}))
def test_every_command_has_a_main_function_that_ends_as_all_do(name):
    main = importlib.import_module(cli.COMMANDS[name][0]).main
    assert main.__wrapped__  # by harness.system.console.command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["reprot", "outputs"], "no command reprot; did you mean 'report'?"),
        (["list", "method"], ""),
        (["list", "metods"], "harness list metods: did you mean 'methods'?"),
        (["doctor", "now"], "harness doctor now: it takes no arguments"),
        (["report", "nowhere"], "no folder nowhere"),
        (["export", "nowhere", "out"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == (2 if said else 0)
    errors = capsys.readouterr().err
    assert said in errors and len(errors.splitlines()) == bool(said)


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (ConfigError("a=1: expected 2"), 2, "error: a=1: expected 2\n"),
        (FileNotFoundError(2, "No such file", "x.txt"), 2, "error: x.txt: No such file\n"),
        (OSError("of a library"), 2, "error: of a library\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=["mistake", "file", "library", "Ctrl-C"],
)
def test_every_command_ends_the_same_way(raised, status, said, capsys):
    @command
    def main(arguments: list[str]) -> int:
        raise raised

    assert main([]) == status and capsys.readouterr().err == said


def test_a_closed_pipe_is_no_traceback(tmp_path):
    script = f"{shlex.quote(sys.executable)} -m harness list | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", f"export PYTHONUNBUFFERED=1; {script}"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True,
    )  # fmt: skip
    first, status = done.stdout.splitlines()
    assert first == "methods (method=NAME):" and status in ("0", "1") and not done.stderr


QUICKLY = ("plan", "nlg")  # of which the others differ in a name


@pytest.mark.parametrize(
    "module",
    [m if m in QUICKLY else pytest.param(m, marks=pytest.mark.slow) for m in FORMER],
)
def test_a_recorded_command_still_works_and_says_what_to_write_now(module, harness):
    done = harness("--help", module=f"harness.{module}")
    (said,) = done.stderr.splitlines()
    name = said.removeprefix(f"python -m harness.{module} is now: harness ")
    assert done.returncode == 0 and name in cli.COMMANDS and f"harness {name}" in done.stdout


def test_sweep_is_run_with_several_values(harness, tmp_path):
    few = ["train.steps=1", "train.lr=-1"]  # refused: nothing is run
    one = harness("sweep", "seed=0,1", *few)
    other = harness("-m", "seed=0,1", *few)
    assert (one.returncode, one.stderr) == (other.returncode, other.stderr)
    assert one.returncode == 2 and "train.lr=-1" in one.stderr
    assert not list(tmp_path.iterdir())


def test_list_names_every_option_with_its_sentence():
    for kind, group in listing.KINDS.items():
        lines = listing.listing(kind).splitlines()[1:]
        named = [line.split()[0] for line in lines]
        assert named == sorted(set(options(group)) - {"source"}), kind
        assert all(len(line.split()) > 2 for line in lines), kind
        assert not any(line.endswith(" al") for line in lines)  # as in "et al."


def test_doctor_says_what_is_there(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("harness.system.network.is_reachable", lambda: False)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x").write_bytes(b"0" * 1000)
    assert doctor.size_of(Path(".cache")) == 1000
    assert doctor.main([]) == 0
    said = capsys.readouterr().out
    for part in ("Machine", "Packages", "Data and models", "What to know", "transformers",
                 "no hub:"):  # fmt: skip
        assert part in said
    assert set(doctor.EXTRAS) <= set(_extras())


def _extras() -> list[str]:
    text = (CONF_DIR.parent / "pyproject.toml").read_text("utf-8")
    section = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    return [line.partition(" = ")[0] for line in section.splitlines()]


def test_a_bare_command_shows_the_help_and_runs_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([]) == 0 and capsys.readouterr().out == cli.help_text() + "\n"
    assert not list(tmp_path.iterdir())
