"""Perplexities of parts of an update with their intervals, over one run or a seed each of several.

`stats` has the statistics: over documents alone with one seed, over seeds and documents with more.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from harness.config.errors import ConfigError
from harness.report import stats
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


def curve(
    documents: Sequence[pd.DataFrame], seeds: Sequence[int], by: Sequence[str]
) -> pd.DataFrame:
    """Perplexity, low and high (95 %) for every value of the columns `by`, in their order.

    `documents` holds a table for every seed with `by`, id, nll_nats and num_tokens. Ends are NaN
    where no interval can be given: one document, or one that has nearly all tokens.
    """
    kept = [*by, "id"]
    wanted = ["nll_nats", "num_tokens"]
    tables = [table.groupby(kept, sort=False)[wanted].sum().reset_index() for table in documents]
    rows = []
    for values, first in tables[0].groupby(list(by), sort=False):
        of_seed = [first]
        for table in tables[1:]:
            same = (table[list(by)] == list(values)).all(axis=1)
            of_seed.append(table[same])
        nll = np.stack([part["nll_nats"].to_numpy(np.float64) for part in of_seed])
        tokens = first["num_tokens"].to_numpy(np.int64)
        ids = tuple(first["id"].astype(str))
        evaluation = stats.Evaluation("it", nll, tokens, tuple(seeds), ids, {})
        value = float(np.exp((nll.sum(1) / tokens.sum()).mean()))
        low = high = float("nan")
        if (tokens > 0).sum() > 1 and np.isfinite(nll).all():
            _, low, high = stats.intervals([evaluation])[0].perplexity
        found = dict(zip(by, values, strict=True))
        rows.append(found | {"perplexity": value, "low": low, "high": high})
    return pd.DataFrame(rows)


def told(row: pd.Series) -> str:
    """A perplexity and its interval, as tables print them."""
    value, low, high = (float(row[name]) for name in ("perplexity", "low", "high"))
    return numbers.perplexity(value) + (
        "" if low != low else f" ({numbers.short(low)}-{numbers.short(high)})"
    )
