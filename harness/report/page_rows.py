"""The rows of the page's table, and the same for the page's own code: values, costs and pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.report import choices, costs, stats
from harness.report import evidence as ev
from harness.report.axes import color_of
from harness.report.evidence import Evidence
from harness.report.page_columns import Filter
from harness.report.sheet import Cell, Sheet
from harness.report.table import LR, LR_FROM, Row
from harness.results import numbers


def costs_of(rows: Sequence[Row], titles: Sequence[str]) -> list[dict[str, Any]]:
    """The costs that a row can be chosen by, with their units."""
    return [
        {
            "title": title, "name": costs.of(title).short,
            "of": _unit(title), "unit": f"{costs.of(title).scale:.0f}",
        }
        for title in titles
        if any(ev.sure_costs(rows, title).values())
    ]  # fmt: skip


def _unit(title: str) -> str:
    """A cost's unit; with its name where several costs could have it."""
    if title in ev.BUDGETS:
        return "seconds" if title == ev.TIME else costs.of(title).unit
    return f"{costs.of(title).short}, {costs.of(title).unit}"


def row_of(row: Row, test: Evidence | None, filters: Sequence[Filter]) -> dict[str, Any]:
    """What the page needs of a row beside its cells."""
    return {
        "name": row.name,
        "also": row.values["also"],
        "filters": {column_filter.name: column_filter.of[row.name] for column_filter in filters},
        "tie": _ties_best(row, test),
        "runs": [{"name": d.name, "href": f"../{d.name}/"} for d in row.run_dirs],
    }


def _ties_best(row: Row, test: Evidence | None) -> bool:
    return test is not None and row.name in test.intervals and choices.ties_best(row.name, test)


def values_of(
    rows: Sequence[Row],
    table: Sheet,
    test: Evidence | None,
    titles: Sequence[str] = ev.BUDGETS,
) -> list[dict[str, Any]]:
    """Every row for the page's code: its values by column, interval, and costs to be compared."""
    sure = {title: ev.sure_costs(rows, title) for title in titles}
    spent = {title: ev.costs(rows, title) for title in titles}
    entries = []
    for row, line in zip(rows, table.lines, strict=True):
        interval = None if test is None else test.intervals.get(row.name)
        entries.append(
            {
                "name": row.name,
                "trained": row.trained,
                "apart": test is not None and row.name in test.apart,
                "tie": _ties_best(row, test),
                "values": {c.key: v.value for c, v in zip(table.columns, line, strict=True)},
                "perplexity": None if interval is None else interval.perplexity,
                "costs": {t: known[row.name] for t, known in sure.items() if row.name in known},
                "color": color_of(row.values["method.label"]),
                "shown": {c.key: v.shown for c, v in zip(table.columns, line, strict=True)},
                "spent": [
                    costs.told(title, known[row.name])
                    for title, known in spent.items()
                    if row.name in known
                ],
                "told": _told(row, interval, table, line),
            }
        )
    return entries


def _told(
    row: Row, interval: stats.Interval | None, table: Sheet, line: Sequence[Cell]
) -> list[str]:
    """What hovering over a row's point says beside the point: the table's own numbers."""
    shown = {column.key: cell.shown for column, cell in zip(table.columns, line, strict=True)}
    lines = []
    if interval is not None:
        low, high = map(numbers.short, interval.perplexity[1:])
        between = "" if interval.missing else f" (95 % {low} to {high})"
        lines.append(f"test {numbers.perplexity(interval.perplexity[0])}{between}")
    if row.trained and row.values[LR]:
        lines.append(f"lr {numbers.rate(row.values[LR])} ({row.values[LR_FROM] or 'set'})")
    for key, words in (
        ("memory.peak_bytes", "peak {} MiB"),
        ("speed.tokens_per_second", "{} tokens/s"),
        ("parameters.trainable", "{} parameters train"),
    ):
        if shown[key] not in ("-", "0"):
            lines.append(words.format(shown[key]))
    return lines


def pairs_of(rows: Sequence[Row], test: Evidence | None) -> list[list[Any]]:
    """Comparisons on the test set: two places in the rows, difference, low, high, p, Holm's p.

    The difference is the first's log-perplexity less the second's, in nats per token.
    """
    place = {row.name: i for i, row in enumerate(rows)}
    return [
        [
            place[c.a],
            place[c.b],
            *(_digits(v) for v in (c.difference, c.low, c.high, c.p, c.adjusted_p)),
        ]
        for c in (test.comparisons if test is not None else ())
    ]


def _digits(value: float) -> float:
    return float(f"{value:.5g}")
