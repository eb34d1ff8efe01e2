"""The columns of the page's table: measured ones, how they are sorted, and choices among rows."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness.report import columns
from harness.report.sheet import Sheet
from harness.report.table import OF_COMPLETIONS, TEST, Row, headings

MOST_CHOICES = 40  # of a filter: what has more is better sorted
MORE_IS_BETTER = (
    "speed.tokens_per_second",
    "quality.classification.test.accuracy",
    *OF_COMPLETIONS,
)
AXIS_NAMES = {
    "parameters.trainable": "trainable parameters",
    "parameters.trainable_percent": "trainable parameters, %",
    "memory.peak_bytes": "peak of live tensors, MiB",
    "speed.tokens_per_second": "tokens/s of optimizer steps",
    "quality.step0.validation.perplexity": "validation perplexity before training",
    "quality.validation.perplexity": "validation perplexity",
    TEST: "test perplexity",
}
MEASURES = (
    "parameters.",
    "memory.",
    "speed.",
    "quality.",
    "costs.",
    "anatomy.",
    "forgotten.",
)  # columns that are measured


def measures_of(table: Sheet) -> dict[str, str]:
    """Columns of numbers that were measured, which a figure can have as axes: key -> its name."""
    names = {}
    for place, column in enumerate(table.columns):
        values = {line[place].value for line in table.lines} - {None}
        numeric = values and all(isinstance(value, int | float) for value in values)
        if (
            numeric
            and column.key.startswith(MEASURES)
            and column.key not in (columns.PLACES, columns.INTERVAL)
        ):
            names[column.key] = AXIS_NAMES.get(column.key, column.heading)
    return names


def kinds_of(table: Sheet) -> dict[str, str]:
    """How each column is sorted: as numbers where all its values are."""
    kinds = {}
    for place, column in enumerate(table.columns):
        values = [line[place].value for line in table.lines]
        numeric = all(isinstance(v, int | float) for v in values if v is not None)
        kinds[column.key] = "number" if numeric else "text"
    return kinds


def alike(table: Sheet) -> list[str]:
    """Columns before the measures in which all of several rows are alike."""
    if len(table.lines) < 2:
        return []
    return [
        column.key
        for place, column in enumerate(table.columns)
        if column.key.startswith("method.")
        and column.key != "method.label"
        and len({line[place].shown for line in table.lines}) == 1
    ]


@dataclass(frozen=True)
class Filter:
    """A choice above the table: what a column has, and what every row has in it."""

    name: str  # of the attribute data-of-…
    heading: str
    values: list[str]
    of: dict[str, str]  # row's name -> value


def filters_of(rows: Sequence[Row]) -> list[Filter]:
    """The columns that rows can be chosen by: method, targets, rank, and what else was varied."""
    filters = []
    shown = columns.sheet(rows, None)
    keys = ["method.label", "method.targets", "method.rank", *headings(rows)]
    for place, column in enumerate(shown.columns):
        by_row = {row.name: line[place].shown for row, line in zip(rows, shown.lines, strict=True)}
        by = {line[place].shown: line[place].value for line in shown.lines}
        if column.key not in keys or not 1 < len(by) <= MOST_CHOICES:
            continue
        heading = "rank" if column.key == "method.rank" else column.heading
        ordered = sorted(by, key=lambda text: _order(by[text], text))
        filters.append(
            Filter(re.sub(r"[^a-z0-9]+", "-", heading.lower()), heading, ordered, by_row)
        )
    return filters


def _order(value: Any, text: str) -> tuple[float, str]:
    """By number where it is one, with what is missing first."""
    number = float(value) if isinstance(value, int | float) else math.inf
    return (-math.inf if value is None else number), text
