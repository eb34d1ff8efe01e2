"""The line under the title of every table and page: what was trained, on what, how and when."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from harness.report.table import Row
from harness.results import run_record
from harness.results.record_types import Record

FEW = 3  # values or commands that are named
SWEEP_RECORD = "multirun.yaml"  # Hydra's of the last sweep: all there is of older ones


@dataclass(frozen=True)
class Setting:
    """What the rows have in common, and where they differ in it, in a few words."""

    facts: list[str]  # model and text, steps, context, seeds, date
    commands: list[str]  # as typed, the last one first
    more_commands: int = 0  # further ones
    scope: str = ""  # of rows of several commands: that they are, and how to have the last alone

    @property
    def line(self) -> str:
        """Return the whole setting as one line, for terminals and under the page's title."""
        commands = " ; ".join(self.commands)
        if self.more_commands:
            commands += f" ; and {self.more_commands} more"
        return " · ".join([*self.facts, *([commands] if commands else [])])


def find(folder: Path, rows: Sequence[Row]) -> Setting:
    """The setting of rows of a folder; without rows it is what was typed."""
    if not rows:
        typed = [str(entry["command"]) for entry in reversed(run_record.sweep_commands(folder))]
        return Setting([], typed[:FEW], max(0, len(typed) - FEW))
    records = [record for row in rows for record in row.records]
    trained = [record for row in rows if row.trained or row.took_no_step for record in row.records]
    commands = _commands(folder, rows)
    facts = [
        f"{_named(records, 'model.name', 'models')} on {_named(records, 'data.name', 'texts')}",
        _length(trained),
        f"context {_contexts(records)}, documents after {_prefixes(records)}",
        _seeds(records),
        _dates(rows),
    ]
    scope = ""
    if len(commands) > 1 and last_sweep(folder):
        alone = shlex.join(["harness", "report", "--last", str(folder)])
        scope = f"Rows of {len(commands)} commands; of the last sweep alone: {alone}"
    return Setting([f for f in facts if f], commands[:FEW], max(0, len(commands) - FEW), scope)


def last_sweep(folder: Path) -> list[Path]:
    """The run directories of the last sweep into the folder; empty where none was recorded."""
    return [folder / name for name in run_record.read_sweep(folder)]


def _values(records: Iterable[Record], *paths: str) -> list[Any]:
    """The distinct values of the first of the paths that a record has, sorted."""
    values: dict[Any, None] = {}
    for record in records:
        known = (run_record.get(record, path) for path in paths)
        value = next((value for value in known if value is not None), None)
        if value is not None:
            values[value] = None
    return sorted(values)


def _named(records: Sequence[Record], path: str, kind: str) -> str:
    names = _values(records, path, f"config.{path}")
    if len(names) > FEW:
        return f"{len(names)} {kind}"
    return " and ".join(map(str, names)) or f"{kind[:-1]} not recorded"


def _length(trained: Sequence[Record]) -> str:
    if not trained:
        return "nothing trained"
    steps, tokens = (
        _values(trained, f"config.train.{key}", f"speed.{key}") for key in ("steps", "batch_tokens")
    )
    if not steps:
        return ""
    text = f"{_numbers(steps)} {'step' if steps == [1] else 'steps'}"
    return text + (f" x {_numbers(tokens)} tokens" if tokens else "")


def _contexts(records: Sequence[Record]) -> str:
    paths = ("evaluation.context_length", "config.data.context_length")
    return _numbers(_values(records, *paths))


def _prefixes(records: Sequence[Record]) -> str:
    """What documents follow (`evaluate.prefix`); EOS in runs from before it could be asked for."""
    names = {run_record.get(record, "evaluation.prefix.name") or "eos" for record in records}
    return " or ".join("nothing" if name == "none" else name.upper() for name in sorted(names))


def _numbers(values: Sequence[float]) -> str:
    """Values in words: "80", "4 or 80", "4 to 80 (6 values)"."""
    if not values:
        return "not recorded"
    if len(values) > FEW:
        return f"{values[0]:,} to {values[-1]:,} ({len(values)} values)"
    return " or ".join(f"{value:,}" for value in values)


def _seeds(records: Sequence[Record]) -> str:
    seeds = _values(records, "config.seed")
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    if len(seeds) > FEW and seeds == list(range(seeds[0], seeds[-1] + 1)):
        return f"seeds {seeds[0]} to {seeds[-1]}"
    return f"seeds {', '.join(map(str, seeds))}" if len(seeds) <= 9 else f"{len(seeds)} seeds"


def _dates(rows: Sequence[Row]) -> str:
    """The days on which the runs ended; of older runs, on which their file was written."""
    days = set()
    for row in rows:
        for run_dir, record in zip(row.run_dirs, row.records, strict=True):
            if date := record.get("date"):
                days.add(str(date)[:10])
            elif (path := run_dir / run_record.FILE_NAME).exists():
                days.add(time.strftime("%Y-%m-%d", time.gmtime(path.stat().st_mtime)))
    if not days:
        return ""
    return min(days) + (f" to {max(days)}" if len(days) > 1 else "")


def _commands(folder: Path, rows: Sequence[Row]) -> list[str]:
    """What was typed for these runs: the sweeps, the last one first, and then single runs."""
    run_dirs = [run_dir for row in rows for run_dir in row.run_dirs]
    left = {run_dir.name for run_dir in run_dirs}
    commands = []
    for sweep in reversed(run_record.sweep_commands(folder)):
        if left & set(sweep["runs"]):
            commands.append(str(sweep["command"]))
            left -= set(sweep["runs"])
    of_runs = {
        run_dir.name: str(command)
        for row in rows
        for run_dir, record in zip(row.run_dirs, row.records, strict=True)
        if (command := run_record.get(record, "run.command"))
    }
    if not run_record.sweep_commands(folder) and (recorded := _of_hydra(folder)):
        named = set(run_record.read_sweep(folder)) or left
        if left & named:
            commands.append(recorded)
            left -= named
    alone = [of_runs[d.name] for d in run_dirs if d.name in left and d.name in of_runs]
    return [*commands, *dict.fromkeys(alone)]


def _of_hydra(folder: Path) -> str | None:
    """The command of the last sweep into the folder, from the record that Hydra's sweeper left."""
    try:
        config = yaml.safe_load((folder / SWEEP_RECORD).read_text("utf-8"))["hydra"]
        given = config["overrides"]
        own, task = list(given["hydra"]), list(given["task"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
    typed = [text for text in own if text != "hydra.mode=MULTIRUN"]
    flag = ["-m"] if len(typed) < len(own) else []
    return shlex.join(["python", "-m", "harness", *flag, *task, *typed])  # as it was called then
