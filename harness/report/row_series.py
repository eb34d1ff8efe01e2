"""The series of a figure that rows of the table make, and what names and joins them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from harness.report.axes import color_of
from harness.report.evidence import Evidence
from harness.report.figure import REFERENCES, Series
from harness.report.table import Row, headings, setting_text

WORDS = 4  # lines that a caption tells of


def trained_rows(rows: Sequence[Row], test: Evidence) -> list[Row]:
    """The rows that train and have an interval of test perplexity."""
    return [r for r in rows if r.trained and r.name in test.intervals]


def points(
    name: str, color: str, rows: list[Row], x: list[Any], test: Evidence, **more: Any
) -> Series:
    """A series of `rows` at the places `x`, with their test perplexities and intervals."""
    ends = [test.intervals[row.name] for row in rows]
    y, low, high = (
        [drawn(nll) for nll in values]
        for values in zip(*((i.log_perplexity, i.low, i.high) for i in ends), strict=True)
    )
    return Series(name, color, x, y, low, high, [row.name for row in rows], **more)


def drawn(nll: float) -> float:
    """A perplexity, or NaN where it has no place in a figure."""
    return math.exp(nll) if nll < 100 else math.nan


def lines_of(
    rows: list[Row],
    key: Callable[[Row], Any],
    x: Callable[[Row], Any],
    test: Evidence,
    joined: bool = True,
) -> list[Series]:
    """The rows of every key by ascending x, joined by a line or not."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    series = []
    for name, members in groups.items():
        ordered = sorted(members, key=x)
        color = color_of(ordered[0].values["method.label"])
        line = joined and len({x(row) for row in ordered}) > 1
        series.append(points(name, color, ordered, [x(r) for r in ordered], test, line=line))
    return series


def family(row: Row) -> str:
    """The method and the targets of a row, as a line's name begins."""
    return " ".join(filter(None, [row.values["method.label"], row.values["method.targets"]]))


def settings_of(rows: Sequence[Row]) -> Callable[[Row], str]:
    """What of a row's settings tells it from these rows, as a line's name has it."""
    names = headings(rows)

    def text(row: Row) -> str:
        parts = (
            f" {name}={setting_text(value)}"
            for key, name in names.items()
            if (value := row.settings.get(key)) is not None or not key.startswith("method.fields.")
        )
        return "".join(parts)

    return text


def references(rows: Sequence[Row], test: Evidence) -> list[tuple[str, str, float]]:
    """Lines for what has no place on the axis: the base, truncation and full fine-tuning."""
    return [
        (
            f"{REFERENCES[row.values['method.name']]}"
            + (f", k={row.values['method.rank']}" if row.values["method.rank"] else ""),
            color_of(row.values["method.name"]),
            test.intervals[row.name].perplexity[0],
        )
        for row in rows
        if row.values["method.name"] in REFERENCES
        and row.name in test.intervals
        and not row.records[0]["config"]["method"].get("train_only")  # a part of full fine-tuning
    ]
