"""What the scripts that evaluate an experiment's runs share: their command line and their files."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from harness.config.errors import ConfigError
from harness.report import stats
from harness.report.table import Row

NUMBERS = ("low", "high", "p")  # of a difference, behind it


def evaluate(arguments: Sequence[str], told: str | None, judge: Callable[[Path], None]) -> int:
    """Call `judge` with the folder of runs that is the only argument; returns the exit status.

    Prints `told`, the script's own text, where anything else is given (status 2) or help is asked
    for (0). A ConfigError is printed as one line (2).
    """
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(told)
        return 0 if list(arguments) in (["-h"], ["--help"]) else 2
    try:
        judge(Path(arguments[0]))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write_csv(path: Path, columns: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
    """Write a file of the record, numbers in full precision."""
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(lines)


def tables(row: Row, name: str) -> tuple[list[pd.DataFrame], tuple[int, ...]]:
    """Read the file `name` of every run of the row that has one; returns them with their seeds.

    Raises:
        ConfigError: no run has it.
    """
    there = [
        (run_dir / name, record["config"]["seed"])
        for run_dir, record in zip(row.run_dirs, row.records, strict=True)
        if (run_dir / name).is_file()
    ]
    if not there:
        raise ConfigError(f"{row.name}: no run has {name}")
    return [pd.read_parquet(path) for path, _ in there], tuple(seed for _, seed in there)


def evaluation(
    found: Sequence[pd.DataFrame], seeds: tuple[int, ...], **which: object
) -> stats.Evaluation:
    """Return nats by document of the lines whose columns have these values, a table a seed."""
    own = [table.loc[(table[list(which)] == list(which.values())).all(axis=1)] for table in found]
    nll = np.stack([table["nll_nats"].to_numpy(np.float64) for table in own])
    ids = tuple(own[0]["id"].astype(str))
    tokens = own[0]["num_tokens"].to_numpy(np.int64)
    return stats.Evaluation(" ".join(map(str, which.values())), nll, tokens, seeds, ids, {})


def numbers(found: stats.Comparison) -> tuple[float, float, float, float]:
    """Return a difference in nats per token, the ends of its 95 % interval, and its p-value."""
    return found.difference, found.low, found.high, found.p


def told(found: stats.Comparison, digits: int = 3) -> str:
    """Write a difference and its interval as in `+0.251 (+0.240 to +0.263)`."""
    of = (f"{value:+.{digits}f}" for value in (found.difference, found.low, found.high))
    return "{} ({} to {})".format(*of)
