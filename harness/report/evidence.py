"""What a table's rows can claim: intervals, paired tests, ranks and fronts, from nats per document.

Every number here comes from the runs' `documents-*.parquet`; `harness.stats` has the statistics.
Runs whose evaluation differs (documents, context, stride, tokenizer) are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from harness import results, stats
from harness.config import ConfigError
from harness.report.table import Row

COSTS = {  # of Pareto fronts and budgets -> path in result.json
    "trainable parameters": "parameters.trainable",
    "peak memory": "memory.peak_bytes",
    "training time": "speed.train_seconds",
}


@dataclass(frozen=True)
class Evidence:
    """Statistics of rows on one text."""

    text: str  # "test", or one of evaluate.also
    evaluations: list[stats.Evaluation]
    intervals: dict[str, stats.Interval]  # by row's name
    comparisons: list[stats.Comparison]  # every pair, Holm-adjusted over all of them
    ranks: dict[str, str]

    @property
    def num_seeds(self) -> int:
        """The fewest seeds of a configuration that its seed moves; 0 where none is."""
        return min((len(e.seeds) for e in self.evaluations if not e.deterministic), default=0)

    @property
    def ordered(self) -> list[str]:
        """Names by log-perplexity, the best first."""
        return sorted(self.intervals, key=lambda name: self.intervals[name].log_perplexity)

    def neighbours(self) -> list[stats.Comparison]:
        """Every configuration less the next best."""
        made = {frozenset((c.a, c.b)): c for c in self.comparisons}
        ordered = self.ordered
        pairs = zip(ordered[1:], ordered, strict=False)
        return [turned(made[frozenset((worse, better))], worse) for worse, better in pairs]


def turned(c: stats.Comparison, first: str) -> stats.Comparison:
    """The comparison as that of `first` less the other."""
    if c.a == first:
        return c
    return replace(c, a=c.b, b=c.a, difference=-c.difference, low=-c.high, high=-c.low)


def gather(rows: Sequence[Row], text: str = "test") -> Evidence | None:
    """The statistics of the rows that were evaluated on `text`; None where none was.

    Raises:
        ConfigError: runs that were not evaluated alike, naming the difference; a file is missing.
    """
    evaluations = [evaluation(row, text) for row in rows if _quality(row.records[0], text)]
    if not evaluations:
        return None
    found = stats.intervals(evaluations)
    comparisons = stats.compare_all(evaluations)
    by_name = {interval.name: interval for interval in found}
    return Evidence(text, evaluations, by_name, comparisons, stats.ranks(found, comparisons))


def also(rows: Iterable[Row]) -> list[str]:
    """The further texts that any row was evaluated on."""
    named = (results.get(row.records[0], "quality.also") or {} for row in rows)
    return list(dict.fromkeys(name for names in named for name in names))


def forgetting(rows: Sequence[Row], on: Evidence) -> tuple[dict[str, stats.Comparison], str]:
    """Log-perplexity on a further text less that of the base model, by row's name, and of which.

    The base is the row of method `none`, Holm-adjusted with all pairs. Without such a row it is the
    row's own model before its first step (after truncation, if it is truncated), adjusted over
    the rows that moved. Raises as `gather` does.
    """
    base = [row.name for row in rows if row.values["method.name"] == "none"]
    if len(base) == 1 and base[0] in on.intervals:
        pairs = [c for c in on.comparisons if base[0] in (c.a, c.b)]
        named = [c.b if c.a == base[0] else c.a for c in pairs]
        found = {name: turned(c, name) for name, c in zip(named, pairs, strict=True)}
        return found, f"the base model ({base[0]})"
    found = {}
    for row in rows:
        if row.name in on.intervals:
            after, before = evaluation(row, on.text), evaluation(row, on.text, "before")
            before = replace(before, name=f"{row.name}, before")
            found[row.name] = stats.compare(after, before)
    moved = {name: c for name, c in found.items() if c.difference}
    adjusted = stats.holm([c.p for c in moved.values()]).tolist() if moved else []
    changed = {
        name: replace(c, adjusted_p=p) for (name, c), p in zip(moved.items(), adjusted, strict=True)
    }
    return found | changed, "before the first step"


def evaluation(row: Row, text: str, when: str = "after") -> stats.Evaluation:
    """Nats per seed and document of a row; raises ConfigError where its runs differ in the rest."""
    runs = [
        _of_run(run_dir, record, text, when)
        for run_dir, record in zip(row.run_dirs, row.records, strict=True)
    ]
    stats.check(runs)
    nll = np.concatenate([run.nll for run in runs])
    seeds = tuple(record["config"]["seed"] for record in row.records)
    fixed = bool(row.records[0]["method"].get("deterministic"))
    if when == "before" and not row.records[0]["config"]["model"]["architecture"]:
        fixed = np.allclose(nll, nll[0], rtol=stats.SAME, atol=0)  # no start that the seed moves
    return replace(runs[0], name=row.name, nll=nll, seeds=seeds, deterministic=fixed)


def _of_run(run_dir: Path, record: dict[str, Any], text: str, when: str) -> stats.Evaluation:
    path = run_dir / results.documents_name(text, when)
    try:
        table = pd.read_parquet(path, columns=["id", "nll_nats", "num_tokens"])
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ConfigError(f"{path} cannot be read ({str(error).splitlines()[0]})") from error
    nll = table["nll_nats"].to_numpy(np.float64)
    told, summed = (_quality(record, text, when) or {}).get("nll_nats"), nll.sum()
    if told is not None and not np.isclose(summed, told, rtol=1e-9):
        raise ConfigError(f"{path} sums to {summed} nats, and result.json says {told}")
    settings = dict(record.get("evaluation") or {})
    if text == "test":
        settings["data"] = record["data"]["name"]
    tokens = table["num_tokens"].to_numpy(np.int64)
    ids = tuple(table["id"].astype(str))
    return stats.Evaluation(str(run_dir), nll[None], tokens, (0,), ids, settings)


def _quality(record: dict[str, Any], text: str, when: str = "after") -> dict[str, Any] | None:
    path = "quality.test" if text == "test" else f"quality.also.{text}.{when}"
    found: dict[str, Any] | None = results.get(record, path)
    return found


def fronts(rows: Sequence[Row], evidence: Evidence) -> dict[str, dict[str, tuple[str, ...]]]:
    """For each of COSTS, who dominates each configuration in (cost, log-perplexity)."""
    shown = [row for row in rows if row.name in evidence.intervals]
    found = {}
    for title, path in COSTS.items():
        costs = {row.name: row.values[path] for row in shown}
        if None not in costs.values():
            found[title] = stats.pareto(costs, evidence.comparisons)
    return found


def detectable(evidence: Evidence, comparison: stats.Comparison) -> float:
    """The smallest difference, nats per token, that Holm's first step finds with 80 % power."""
    return stats.detectable(comparison.components, stats.ALPHA / len(evidence.comparisons))
