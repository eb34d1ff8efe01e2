"""The figure of what was learned against what was forgotten of another text."""

from __future__ import annotations

from collections.abc import Sequence

from harness.report import evidence as ev
from harness.report import stats
from harness.report.axes import Axes, color_of
from harness.report.evidence import Evidence
from harness.report.figure import Figure, Series
from harness.report.row_series import family, trained_rows
from harness.report.table import Row
from harness.results import numbers


def forgetting_figure(rows: Sequence[Row], test: Evidence, on: Evidence) -> Figure | None:
    """What is learned against what is forgotten, nats per token since the base model."""
    base = [row.name for row in ev.base_rows(rows, on)]
    if len(base) != 1 or base[0] not in test.intervals:
        return None
    moved, _ = ev.forgetting(rows, on)
    learned = {
        name: c
        for pair in test.comparisons
        if base[0] in (pair.a, pair.b)
        for name in (pair.a, pair.b)
        if name != base[0]
        for c in [ev.reversed_(pair, base[0])]
    }
    trained = [row for row in trained_rows(rows, test) if row.name in moved and row.name in learned]
    if not trained:
        return None
    groups: dict[str, list[Row]] = {}
    for row in trained:
        groups.setdefault(family(row), []).append(row)
    series = []
    for name, members in groups.items():
        ordered = sorted(members, key=lambda row: learned[row.name].difference)
        changes: list[stats.Comparison] = [moved[row.name] for row in ordered]
        series.append(
            Series(
                name, color_of(ordered[0].values["method.label"]),
                [learned[row.name].difference for row in ordered],
                [c.difference for c in changes], [c.low for c in changes],
                [c.high for c in changes], [row.name for row in ordered],
            )
        )  # fmt: skip
    worst = max(trained, key=lambda row: moved[row.name].difference)
    nats = numbers.nats(moved[worst.name].difference)
    alt = f"Most is forgotten by {worst.name}: {nats} nats per token."
    axes = Axes(
        f"forgetting-{on.text}", f"Learned and forgotten ({on.text})",
        "learned: nats per token of the test set", "forgotten: nats per token",
        x_form=".4f", y_form=".4f",
    )  # fmt: skip
    return Figure(axes, series, alt=alt)
