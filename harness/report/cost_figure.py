"""The figure of perplexity against a cost, with its Pareto front."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from harness.report import choices
from harness.report import costs as spent
from harness.report import evidence as ev
from harness.report.axes import COST_AXES, PARAMETERS, TEST, Axes
from harness.report.evidence import Evidence
from harness.report.figure import Figure, Series
from harness.report.row_series import (
    WORDS,
    drawn,
    family,
    lines_of,
    references,
    settings_of,
    trained_rows,
)
from harness.report.table import Row
from harness.results import numbers

GREY = "#808080"
CROWDED = 3  # points of one cost that a line may go through


def cost_figure(rows: Sequence[Row], test: Evidence, title: str) -> Figure | None:
    """Perplexity against a cost, with the Pareto front among what trains."""
    costs = ev.costs(trained_rows(rows, test), title)
    trained = [row for row in rows if row.name in costs]
    if not trained:
        return None
    unit = spent.of(title).scale
    axes = COST_AXES.get(title) or cost_axes(title)

    def cost(row: Row) -> float:
        return costs[row.name] / unit

    describe = settings_of(trained)  # a line joins what was trained alike
    series = lines_of(trained, lambda r: family(r) + describe(r), cost, test, axes is PARAMETERS)
    series = [replace(s, line=s.line and not _is_crowded(s)) for s in series]
    alt = f"{len(trained)} configurations. " if len(trained) > 1 else ""
    # A front claims that costs can be compared: not those of a shared machine, nor the seconds of
    # single runs.
    if len(trained) > 1 and {row.name for row in trained} <= set(ev.sure_costs(trained, title)):
        own, front_text = _front(trained, cost, ev.fronts(rows, test, [title]).get(title, {}), test)
        series += own
        alt += front_text
    best = min(trained, key=lambda row: test.intervals[row.name].log_perplexity)
    alt += (
        f"{'Lowest: ' * (len(trained) > 1)}{best.name}, "
        f"{numbers.perplexity(test.intervals[best.name].perplexity[0])} at "
        f"{choices.amount(title, costs[best.name]).split(' ')[0]} {axes.x}."
    )
    return Figure(axes, series, references(rows, test), alt)


def cost_axes(title: str) -> Axes:
    """Perplexity against a cost that was asked for."""
    cost = spent.of(title)
    key = f"perplexity-{title.replace(' ', '-').replace('_', '-')}"
    label = f"{cost.short}, {cost.unit}"
    return Axes(key, f"Perplexity and {cost.short}", label, TEST, log_y=True, x_form=",.3~r")


def _is_crowded(series: Series) -> bool:
    """Tell whether a line would go up and down between points of one cost, as of many alphas."""
    return max(Counter(series.x).values()) > CROWDED


def _front(
    trained: Sequence[Row],
    cost: Callable[[Row], float],
    dominated: Mapping[str, tuple[str, ...]],
    test: Evidence,
) -> tuple[list[Series], str]:
    """The Pareto front: a line through the estimates that none dominates, and discs.

    A disc says that nothing which costs no more is significantly better.
    """

    def value(row: Row) -> float:
        return drawn(test.intervals[row.name].log_perplexity)

    def front_series(name: str, rows: Sequence[Row], **more: Any) -> Series:
        x, y = [cost(row) for row in rows], [value(row) for row in rows]
        return Series(name, GREY, x, y, rows=[row.name for row in rows], **more)

    series = []
    ordered = sorted(trained, key=lambda row: (cost(row), value(row)))
    if able := [row for row in ordered if dominated.get(row.name) == ()]:
        series.append(front_series("may be the best for its cost", able, halo=True))
    front: list[Row] = []
    for row in ordered:
        if not front or value(row) < value(front[-1]):
            front.append(row)
    if len(front) > 1:
        series.append(front_series("lowest measured for its cost", front, line=True, dash=True))
    named = ", ".join(row.name for row in front[:WORDS])
    more = f" and {len(front) - WORDS} more" if len(front) > WORDS else ""
    return series, (
        f"Dashed: the lowest perplexity for its cost ({named}{more}). Grey discs: nothing that "
        "costs no more is significantly better. "
    )
