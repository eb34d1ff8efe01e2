"""The table of an experiment: one row per configuration, on the terminal and as results.csv.

    python -m harness.report outputs/main

Perplexity is per model token; word perplexity and bits per byte, which compare across tokenizers,
are in results.csv and in each run's result.json.
"""

from __future__ import annotations

import csv
import io
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table

from harness import results
from harness.config import METHODS, nearest

# heading -> (path in result.json, format of the number)
COLUMNS = {
    "method": ("method.label", "s"),
    "targets": ("method.targets", "s"),
    "r, k": ("method.rank", "s"),
    "alpha": ("method.alpha", "g"),
    "lr": ("method.lr", "g"),
    "trainable": ("parameters.trainable", ",.0f"),
    "%": ("parameters.trainable_percent", ".2f"),
    "peak MiB": ("memory.peak_bytes", "MiB"),
    "tokens/s": ("speed.tokens_per_second", ",.0f"),
    "step-0 val": ("quality.step0.validation.perplexity", ".2f"),
    "val": ("quality.validation.perplexity", ".2f"),
    "test": ("quality.test.perplexity", ".2f"),
}
SHOWN = {"train.lr"} | {
    f"method.{key}"
    for key in ("name", "label", "r", "alpha", "rank", "energy", "train", "residual")
}
VARIES = (  # within a configuration
    "seed", "run_name", "outputs_dir", "rerun", "retry", "experiment_name", "launch",
)  # fmt: skip
SHARED = "environment.runs_beside"
MEASURED = ("memory.peak_bytes", "speed.tokens_per_second")  # which sharing a machine can move
CSV_ONLY = (
    "method.name",
    "quality.test.word_perplexity",
    "quality.test.bits_per_byte",
    "quality.test.num_tokens",
    "memory.process_peak_bytes",
    "speed.train_seconds",
    SHARED,
)
LEGEND = (
    "%: trainable share of all parameters. peak: live tensors of a training step (of evaluation,\n"
    "where nothing trains). step-0 val, val, test: perplexity per token before training, and from\n"
    "the checkpoint that validation chose."
)
SHARED_LEGEND = "*: measured while other runs shared the machine; not for comparison."


def rows(folder: Path) -> list[tuple[dict[str, Any], list[Path]]]:
    """(values by path in result.json, run directories) of every configuration with a finished run.

    Runs that differ in their seed only are one configuration: numbers are the mean over its seeds.
    """
    groups: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for run_dir, result in results.collect(folder):
        if result["status"] == "finished":
            same = {k: v for k, v in result["config"].items() if k not in VARIES}
            groups.setdefault(json.dumps(same, sort_keys=True), []).append((run_dir, result))
    table = []
    for members in groups.values():
        seeds = {result["config"]["seed"] for _, result in members}
        values: dict[str, Any] = {"seeds": len(seeds), "config": _flat(members[0][1]["config"])}
        for path in [path for path, _ in COLUMNS.values()] + list(CSV_ONLY):
            found = [results.get(result, path) for _, result in members]
            numbers = [v for v in found if isinstance(v, int | float)]
            if path == SHARED:  # the worst of the runs
                numbers = [max(numbers)] if numbers else []
            values[path] = sum(numbers) / len(numbers) if numbers else found[0]
        table.append((values, [run_dir for run_dir, _ in members]))
    order = list(METHODS)

    def place(row: tuple[dict[str, Any], list[Path]]) -> tuple[Any, ...]:
        values, _ = row
        name = values["method.name"]
        return (
            order.index(name) if name in order else len(order),
            values["method.label"] or "",
            values["method.targets"] or "",
            values["parameters.trainable"] or 0,
            values["method.alpha"] or 0,
            values["method.lr"] or 0,
        )

    others = _without_a_column([values["config"] for values, _ in table])
    for values, _ in table:
        own = {key: values["config"][key] for key in others if key in values["config"]}
        values["also"] = " ".join(f"{key}={value}" for key, value in own.items())
    return sorted(table, key=place)


def _without_a_column(configs: list[dict[str, Any]]) -> list[str]:
    """Keys that tell rows apart and do not show in a column: a sweep over them must be readable."""
    values: dict[str, set[str]] = {}
    for flat in configs:
        for key, value in flat.items():
            values.setdefault(key, set()).add(json.dumps(value))
    varying = {key for key, found in values.items() if len(found) > 1}
    for group in ("model.", "data."):
        if f"{group}name" in varying:  # stands for everything else in its file
            varying -= {key for key in varying if key.startswith(group) and key != f"{group}name"}
    return sorted(key for key in varying if key not in SHOWN and not key.startswith("targets."))


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        elif key not in VARIES:
            flat[f"{prefix}{key}"] = value
    return flat


def _text(value: Any, form: str) -> str:
    if value is None:
        return "-"
    if form == "MiB":
        return f"{value / 2**20:,.0f}"
    return str(value) if form == "s" else format(value, form)


def show(table: Table) -> None:
    """Print a table in its own width: one cut at 80 columns is no use in a log."""
    console = Console()
    own = console.measure(table, options=console.options.update(width=10_000)).maximum
    Console(width=max(console.width, own)).print(table)


def print_table(folder: Path, run_dirs: Sequence[Path] | None = None) -> None:
    """Print the table of `folder`, or of the configurations of `run_dirs`; write results.csv.

    results.csv always holds every finished configuration of the folder, in full precision.
    """
    everything = rows(folder)
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading, (_, form) in COLUMNS.items():
        table.add_column(heading, justify="left" if form == "s" else "right", no_wrap=True)
    table.add_column("seeds", justify="right", no_wrap=True)
    shown = [row for row in everything if run_dirs is None or set(row[1]) & set(run_dirs)]
    if any(values["also"] for values, _ in shown):
        table.add_column("also", no_wrap=True)
    for values, _ in shown:
        cells = [_text(values[path], form) for path, form in COLUMNS.values()]
        if values[SHARED]:
            marked = zip(cells, COLUMNS.values(), strict=True)
            cells = [cell + "*" * (path in MEASURED) for cell, (path, _) in marked]
        cells += [str(values["seeds"]), values["also"]][: len(table.columns) - len(cells)]
        table.add_row(*cells)
    print()
    if table.row_count:
        show(table)
        print(LEGEND)
        if any(values[SHARED] for values, _ in shown):
            print(SHARED_LEGEND)
    else:
        print(f"{folder}: no finished run")
    for run_dir, result in results.collect(folder):
        if result["status"] != "finished" and (run_dirs is None or run_dir in run_dirs):
            failure = result.get("failure") or {}
            said = (failure.get("message") or "").splitlines()
            print(
                f"{result['status']}: {run_dir.name} ({failure.get('class')}): "
                f"{said[0] if said else ''} (log: {run_dir / 'log.txt'})"
            )
    if everything:
        try:
            write_csv(folder / "results.csv", everything)
            print(f"saved: {folder / 'results.csv'} and one directory per run beside it")
        except OSError as error:
            print(f"not saved: {folder / 'results.csv'}: {error.strerror}", file=sys.stderr)
    print(f"again: python -m harness.report {shlex.quote(str(folder))}")


def write_csv(path: Path, table: list[tuple[dict[str, Any], list[Path]]]) -> None:
    """One line per configuration, columns named by their path in result.json."""
    names = [name for name, _ in COLUMNS.values()] + [*CSV_ONLY, "seeds", "also"]
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow([*names, "runs"])
    for values, members in table:
        runs = " ".join(run_dir.name for run_dir in members)
        writer.writerow([*(values[name] for name in names), runs])
    results.write_atomically(path, stream.getvalue())  # another controller may write it, too


def main(arguments: list[str]) -> int:
    """The command line; returns its exit status."""
    folder = Path(arguments[0]) if len(arguments) == 1 else None
    if folder is None:
        print("usage: python -m harness.report OUTPUTS/EXPERIMENT", file=sys.stderr)
        return 2
    if not folder.is_dir():
        there = [p.name for p in folder.parent.glob("*") if p.is_dir()]
        print(f"error: no folder {folder}; {nearest(folder.name, there)}", file=sys.stderr)
        return 2
    print_table(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
