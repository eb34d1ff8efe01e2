"""The seeds of one configuration whose updates are looked at together, and how a point is told.

`harness.report.compression` makes the points: over documents alone with one seed, over seeds and
documents with more.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from harness.config.errors import ConfigError
from harness.results import numbers, run_record
from harness.runs import finished_run


def seeds_of(run_dirs: Sequence[Path]) -> list[int]:
    """The seeds of runs that are one configuration.

    Raises:
        ConfigError: a run that is not finished, of another configuration, or of a seed that is
            there twice.
    """
    records = [finished_run.finished(run_dir) for run_dir in run_dirs]
    first = records[0]
    for run_dir, record in zip(run_dirs, records, strict=True):
        if run_record.get(record, "run.configuration") != run_record.get(
            first, "run.configuration"
        ):
            raise ConfigError(
                f"{run_dir.name} is another configuration than {run_dirs[0].name}: give one run, "
                "or a seed each of one configuration"
            )
    seeds = [int(record["run"]["seed"]) for record in records]
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"a seed is there twice: {', '.join(map(str, seeds))}")
    return seeds


def told(row: pd.Series) -> str:
    """A perplexity and its interval, as tables print them."""
    value, low, high = (float(row[name]) for name in ("perplexity", "low", "high"))
    return numbers.perplexity(value) + (
        "" if low != low else f" ({numbers.short(low)}-{numbers.short(high)})"
    )
