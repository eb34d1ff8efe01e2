"""What a table's rows can claim: intervals, paired tests, ranks and fronts, from nats per document.

Every number here comes from the runs' `documents-*.parquet`; `harness.report.stats` and
`harness.report.ranking` have the statistics. Rows whose evaluation differs (text, documents,
context, stride, prefix, tokenizer) have no part in them (`harness.report.comparable`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from harness.config.errors import ConfigError
from harness.report import comparable, ranking, stats
from harness.report.costs import BUDGETS as BUDGETS
from harness.report.costs import FLOPS as FLOPS
from harness.report.costs import FRONTS, costs, run_values, shorten, sure_costs
from harness.report.costs import MEMORY as MEMORY
from harness.report.costs import PARAMETERS as PARAMETERS
from harness.report.costs import TIME as TIME
from harness.report.costs import of as cost_of
from harness.report.costs import run_seconds as run_seconds
from harness.report.costs import time_scope as time_scope
from harness.report.table import Row
from harness.report.table import rows as table_rows
from harness.results import numbers, run_record
from harness.results.record_types import Record

FEW_DOCUMENTS = 10  # of a test set: fewer hardly show any difference
EVERY_PAIR = 100  # configurations up to which all pairs are compared; else best, next and base


@dataclass(frozen=True)
class Evidence:
    """Intervals and paired differences of the rows that were evaluated on one text."""

    text: str  # "test", or one of evaluate.also
    evaluations: list[stats.Evaluation]
    intervals: dict[str, stats.Interval]  # by row's name
    comparisons: list[stats.Comparison]  # Holm-adjusted over just these
    ranks: dict[str, str]  # none where not every pair was compared
    apart: dict[str, str] = field(default_factory=dict)  # rows evaluated otherwise -> in what
    faults: dict[str, str] = field(
        default_factory=dict
    )  # rows whose evaluation is not whole -> why

    @property
    def num_seeds(self) -> tuple[int, int]:
        """The fewest and most seeds of configurations that a seed moves; 0 where none is."""
        counts = [len(e.seeds) for e in self.evaluations if not e.deterministic]
        return min(counts, default=0), max(counts, default=0)

    @property
    def sample(self) -> str:
        """Return what intervals are over, in words: "48 documents and 3 seeds"."""
        min_seeds, max_seeds = self.num_seeds
        seeds = (
            f" and {min_seeds} to {max_seeds} seeds"
            if min_seeds < max_seeds
            else f" and {max_seeds} seeds"
        )
        documents = next(iter(self.intervals.values())).num_documents
        return f"{documents} documents" + (seeds if max_seeds > 1 else "")

    @property
    def alone(self) -> list[str]:
        """Return the configurations with one seed, of those whose numbers a seed moves."""
        return [e.name for e in self.evaluations if not e.deterministic and len(e.seeds) == 1]

    @property
    def ordered(self) -> list[str]:
        """Return the names of rows by log-perplexity, the best one first."""
        return sorted(self.intervals, key=lambda name: self.intervals[name].log_perplexity)

    def neighbours(self) -> list[stats.Comparison]:
        """Return the difference of every configuration to the next best one."""
        by_pair = {frozenset((c.a, c.b)): c for c in self.comparisons}
        ordered = self.ordered
        pairs = zip(ordered[1:], ordered, strict=False)
        return [reversed_(by_pair[frozenset((worse, better))], worse) for worse, better in pairs]


def scope(test: Evidence) -> list[str]:
    """What the intervals and tests cover, and what they do not, in sentences."""
    min_seeds, max_seeds = test.num_seeds
    sentences = [
        f"95 %: interval of test perplexity over {test.sample}; untrained models: over documents "
        "only."
    ]
    parts = test.evaluations[0].settings.get("part") or {}
    sentences += [
        f"{name} is read in part (evaluate.*_tokens): {part['documents']:,} of "
        f"{part['of_documents']:,} documents, {part['tokens']:,} of {part['of_tokens']:,} tokens, "
        "the same for every run."
        for name, part in parts.items()
    ]
    if without := [f"{i.name} ({i.missing})" for i in test.intervals.values() if i.missing]:
        sentences.append(f"No interval: {shorten(without)}.")
    first = next(iter(test.intervals.values()))
    if first.num_effective < first.num_documents / 2:
        sentences.append(
            f"The {first.num_documents} documents differ in length, and count as "
            f"{first.num_effective:.3g} of equal length (Kish's effective number): intervals are "
            "for text with such documents."
        )
    if first.num_documents < FEW_DOCUMENTS:
        sentences.append(few_documents(first.num_documents))
    if max_seeds > 1:
        share = numbers.share(ranking.may_diverge(max_seeds))
        sentences.append(
            "Intervals are about training that does not diverge. If none of "
            f"{max_seeds} seeds diverged, as many as {share} of all seeds may still do so. Where a "
            "few seeds end far above the others, an interval is too narrow: it then holds the "
            "true value in 87 to 93 % of cases, not in 95 %."
        )
    if test.alone:
        whose = "" if max_seeds == 1 else f" of {shorten(test.alone)}"
        sentences.append(
            f"ONE SEED{whose}: intervals and places are over documents alone. With another seed "
            "every row that trains may move: one seed does not tell close rows apart."
        )
    if min_seeds < max_seeds:
        sentences.append(
            "Not all rows have the same seeds: two are compared over the seeds that both have."
        )
    if len(test.intervals) == 1:
        return sentences
    if test.ranks:
        sentences.append(
            "place: those that a row may have, by paired tests of all "
            f"{len(test.comparisons)} pairs at 5 % (corrected by Holm)."
        )
    else:
        sentences.append(
            f"more than {EVERY_PAIR} rows: each is compared with the best, the next and the base."
        )
    if min_seeds > 1 and (few := ranking.few_seeds(min_seeds, len(test.comparisons))):
        sentences.append(f"{few}.")
    return sentences


def few_documents(count: int) -> str:
    """What to say of a test set with so few documents."""
    return f"The test set has {count} documents: so few hardly show any difference between rows."


def reversed_(c: stats.Comparison, first: str) -> stats.Comparison:
    """Return the comparison with its sides changed, as that of `first` less the other."""
    if c.a == first:
        return c
    return replace(c, a=c.b, b=c.a, difference=-c.difference, low=-c.high, high=-c.low)


@dataclass(frozen=True)
class Findings:
    """All that a report says of a folder: its rows, their statistics and what is missing."""

    folder: Path
    everything: list[Row]  # every configuration with a finished run
    rows: list[Row]  # of the runs asked for, and of no other
    found: dict[str, Evidence]  # statistics of `rows` by text: "test", and those of evaluate.also
    refused: list[str]  # sentences: why a text, or a row, has no statistics
    run_dirs: frozenset[Path] | None = None  # the runs asked for; None: all of the folder
    requested: tuple[str, ...] = ()  # names of further columns (`harness.report.requested`)


def find(
    folder: Path, run_dirs: Sequence[Path] | None = None, requested: Sequence[str] = ()
) -> Findings:
    """What there is to say of a folder, or of `run_dirs` in it by themselves.

    Runs of other sweeps into the folder then have no part in rows, names, intervals and tests.
    """
    chosen = None if run_dirs is None else frozenset(run_dirs)
    everything = table_rows(folder)
    selected = everything if chosen is None else table_rows(folder, chosen)
    by_text: dict[str, Evidence] = {}
    refused = []
    for text in ["test", *also(selected)]:
        try:
            if (evidence := gather(selected, text)) is not None:
                by_text[text] = evidence
                refused += [
                    f"No interval, place or comparison of {name} on {text}: {fault}."
                    for name, fault in evidence.faults.items()
                ]
        except ConfigError as error:
            refused.append(f"No intervals, places or comparisons on {text}: {error}.")
    return Findings(folder, everything, selected, by_text, refused, chosen, tuple(requested))


def _listed(faults: dict[str, str]) -> str:
    """What is wrong with the evaluations of rows; what all of them have is said once."""
    if len(set(faults.values())) == 1:
        return next(iter(faults.values()))
    return "; ".join(f"{name}: {fault}" for name, fault in faults.items())


def not_compared(findings: Findings) -> list[str]:
    """Sentences on what is not compared: texts, rows with a fault, rows evaluated otherwise."""
    last = run_record.read_sweep(findings.folder)
    is_part = findings.run_dirs is None and any(
        run_dir.name not in last for row in findings.rows for run_dir in row.run_dirs
    )
    alone = f"harness report --last {findings.folder}" if last and is_part else ""
    return findings.refused + [
        comparable.note(evidence.apart, len(evidence.evaluations), text, alone)
        for text, evidence in findings.found.items()
        if evidence.apart
    ]


def gather(rows: Sequence[Row], text: str = "test") -> Evidence | None:
    """The statistics of the rows that were evaluated on `text` alike; None where none was.

    Raises:
        ConfigError: no row's evaluation can be read and is whole.
    """
    evaluated = [row for row in rows if _quality(row.records[0], text)]
    alike = comparable.find(evaluated, lambda row: evaluation(row, text))
    if not alike.evaluations and alike.faults:
        raise ConfigError(_listed(alike.faults))
    return _of(rows, text, alike) if alike.evaluations else None


def _of(rows: Sequence[Row], text: str, alike: comparable.Alike) -> Evidence:
    """Intervals and comparisons of the evaluations that can be compared."""
    evaluations, others = alike.evaluations, (alike.apart, alike.faults)
    intervals = stats.intervals(evaluations)
    by_name = {interval.name: interval for interval in intervals}
    if len(intervals) <= EVERY_PAIR:
        comparisons = ranking.compare_all(evaluations)
        places = ranking.ranks(intervals, comparisons)
        return Evidence(text, evaluations, by_name, comparisons, places, *others)
    ordered = [i.name for i in sorted(intervals, key=lambda i: i.log_perplexity)]
    pairs = [*itertools.pairwise(ordered), *((ordered[0], o) for o in ordered[2:])]
    base = [row.name for row in rows if row.values["method.name"] == "none" and row.name in by_name]
    known_pairs = {frozenset(pair) for pair in pairs}
    pairs += [
        (b, o) for b in base for o in ordered if o != b and frozenset((b, o)) not in known_pairs
    ]
    comparisons = ranking.compare_all(evaluations, pairs)
    return Evidence(text, evaluations, by_name, comparisons, {}, *others)


def also(rows: Iterable[Row]) -> list[str]:
    """Return the names of the further texts that any of the rows was evaluated on."""
    named = (run_record.get(row.records[0], "quality.also") or {} for row in rows)
    return list(dict.fromkeys(name for names in named for name in names))


def evaluated_alike(rows: Sequence[Row], test: Evidence | None) -> list[Row]:
    """Return the rows without those that were evaluated in another way."""
    return [row for row in rows if test is None or row.name not in test.apart]


def base_rows(rows: Iterable[Row], on: Evidence) -> list[Row]:
    """Return the rows of the base model that are compared on a text."""
    return [row for row in rows if row.values["method.name"] == "none" and row.name in on.intervals]


def before(rows: Sequence[Row], on: Evidence) -> dict[str, stats.Interval]:
    """Log-perplexity of the base on a further text, by row's name (`forgetting` of older runs)."""
    shown = [row for row in rows if row.name in on.intervals]
    intervals = stats.intervals([evaluation(row, on.text, "before") for row in shown])
    return {interval.name: interval for interval in intervals}


def forgetting(rows: Sequence[Row], on: Evidence) -> tuple[dict[str, stats.Comparison], str]:
    """Log-perplexity on a further text less that of the base model, by row's name, and of which.

    The base is the row of method `none`, Holm-adjusted with all pairs. Without such a row it is the
    base as the row's own runs measured it, adjusted over the rows that moved. (Older runs measured
    their own model before its first step, which a truncation or a prompt has changed already.)
    Raises ConfigError where a file of the base's evaluation is missing.
    """
    base = [row.name for row in base_rows(rows, on)]
    if len(base) == 1:
        pairs = [c for c in on.comparisons if base[0] in (c.a, c.b)]
        named = [c.b if c.a == base[0] else c.a for c in pairs]
        differences = {name: reversed_(c, name) for name, c in zip(named, pairs, strict=True)}
        return differences, f"the base model ({base[0]})"
    differences = {}
    for row in rows:
        if row.name in on.intervals:
            after, before = evaluation(row, on.text), evaluation(row, on.text, "before")
            before = replace(before, name=f"{row.name}, before")
            differences[row.name] = stats.compare(after, before)
    moved = {name: c for name, c in differences.items() if not c.same}
    adjusted = ranking.holm([c.p for c in moved.values()]).tolist() if moved else []
    changed = {
        name: replace(c, adjusted_p=p) for (name, c), p in zip(moved.items(), adjusted, strict=True)
    }
    measured = all(run_record.get(record, "quality.base") for row in rows for record in row.records)
    return differences | changed, "the base model" if measured else "before the first step"


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
    lost = _never_learned(row) if when == "after" else ()
    return replace(runs[0], name=row.name, nll=nll, seeds=seeds, deterministic=fixed, diverged=lost)


def _never_learned(row: Row) -> tuple[int, ...]:
    """Seeds whose validation never got below that of the model before training, if others' did."""
    if not row.trained:
        return ()
    lost = []
    for record in row.records:
        end, start = (
            run_record.get(record, f"quality.{path}.perplexity") or math.inf  # null: not finite
            for path in ("validation", "step0.validation")
        )
        if end >= start * (1 - stats.ROUNDING):
            lost.append(int(record["config"]["seed"]))
    return tuple(lost) if len(lost) < len(row.records) else ()


def _of_run(run_dir: Path, record: Record, text: str, when: str) -> stats.Evaluation:
    path = run_dir / run_record.documents_name(text, when)
    try:
        table = pd.read_parquet(path, columns=["id", "nll_nats", "num_tokens"])
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ConfigError(f"{path} cannot be read ({str(error).splitlines()[0]})") from error
    nll = table["nll_nats"].to_numpy(np.float64)
    recorded, summed = (_quality(record, text, when) or {}).get("nll_nats"), nll.sum()
    if recorded is not None and not np.isclose(summed, recorded, rtol=1e-9):
        raise ConfigError(f"{path} sums to {summed} nats, and result.json says {recorded}")
    settings = dict(record.get("evaluation") or {})
    # Of runs from before it could be asked for it is the end-of-text token.
    settings["prefix"] = run_record.get(settings, "prefix.name") or "eos"
    if text == "test":
        settings["data"] = _held_out_text(record)
    tokens = table["num_tokens"].to_numpy(np.int64)
    ids = tuple(table["id"].astype(str))
    return stats.Evaluation(str(run_dir), nll[None], tokens, (0,), ids, settings)


def _held_out_text(record: Record) -> str:
    """The text that is evaluated; of a mixture the part whose held-out documents are."""
    data = record.get("config", {}).get("data") or {}
    parts = data.get("parts")
    return data.get("held_out_part") or next(iter(parts)) if parts else record["data"]["name"]


def _quality(record: Record, text: str, when: str = "after") -> dict[str, Any] | None:
    path = "quality.test" if text == "test" else f"quality.also.{text}.{when}"
    quality: dict[str, Any] | None = run_record.get(record, path)
    return quality


def fronts(
    rows: Sequence[Row], evidence: Evidence, titles: Sequence[str] = FRONTS
) -> dict[str, dict[str, tuple[str, ...]]]:
    """For each cost by its title, who dominates each configuration in (cost, log-perplexity)."""
    shown = [row for row in rows if row.name in evidence.intervals]
    by_title: dict[str, dict[str, tuple[str, ...]]] = {}
    if not evidence.ranks:
        return by_title
    for title in titles:
        if not cost_of(title).measured:
            if known := sure_costs(shown, title):
                by_title[title] = ranking.pareto(known, evidence.comparisons)
            continue
        values = run_values(shown, title)
        timed = {name: cost for name, cost in costs(shown, title).items() if name in values}

        def is_less(y: str, x: str, values: dict[str, list[float]] = values) -> bool:
            return ranking.is_less(values[y], values[x])

        if len(timed) > 1:
            by_title[title] = ranking.pareto(timed, evidence.comparisons, is_less)
    return by_title


def detectable(evidence: Evidence, comparison: stats.Comparison) -> float:
    """The smallest difference, nats per token, that Holm's first step finds with 80 % power."""
    return stats.detectable(comparison.components, stats.ALPHA / len(evidence.comparisons))
