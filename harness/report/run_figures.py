"""The figures of what runs took and how they went: memory, speed and learning curves."""

from __future__ import annotations

import math
from collections.abc import Sequence

from harness.report import views
from harness.report.axes import CATEGORIES, MEMORY, SECONDS, SPEED, SPENT, TOKENS, color_of
from harness.report.figure import Figure, Series
from harness.report.row_series import drawn
from harness.report.table import SHARED, Row
from harness.results import numbers, run_record


def memory_figure(rows: Sequence[Row]) -> Figure | None:
    """The peak of memory by category, and the peak that was predicted."""
    shown = [row for row in rows if run_record.get(row.records[0], "memory.by_category")]
    if not shown:
        return None
    names = [row.name for row in shown]
    series = [
        Series(
            category.replace("_", " "), color, names,
            [_mean(row, f"memory.by_category.{category}") / 2**20 for row in shown],
        )
        for category, color in CATEGORIES.items()
    ]  # fmt: skip
    predicted = [_mean(row, "predicted.peak_bytes") for row in shown]
    if any(predicted):
        mib = [value / 2**20 if value else math.nan for value in predicted]
        series.append(Series("predicted peak", "#000000", names, mib, hollow=True))
    totals = {row.name: float(row.values["memory.peak_bytes"]) for row in shown}
    lowest, highest = min(totals, key=totals.__getitem__), max(totals, key=totals.__getitem__)
    extremes = [f"{numbers.mib(totals[name])} MiB ({name})" for name in (lowest, highest)]
    alt = f"From {extremes[0]} to {extremes[1]}."
    return Figure(MEMORY, series, alt=alt)


def _mean(row: Row, path: str) -> float:
    values = [
        value for record in row.records if (value := run_record.get(record, path)) is not None
    ]
    return sum(values) / len(values) if values else 0.0


def speed_figure(rows: Sequence[Row]) -> Figure | None:
    """The tokens per second of every row, in the color of its method."""
    path = "speed.tokens_per_second"
    shown = [row for row in rows if row.values[path]]
    if not shown:
        return None
    names, values = [row.name for row in shown], [float(row.values[path]) for row in shown]
    fastest = values.index(max(values))
    alt = f"Fastest: {names[fastest]}, {numbers.count(values[fastest])} tokens/s."
    if any(row.values[SHARED] for row in shown):
        alt = "Measured while other runs used the machine too: do not compare them."
    labels = [row.values["method.label"] for row in shown]
    series = [
        Series(
            label, color_of(label), names,
            [v if own == label else math.nan for v, own in zip(values, labels, strict=True)],
        )
        for label in dict.fromkeys(labels)
    ]  # fmt: skip
    return Figure(SPEED, series, alt=alt)


def learning_curves(rows: Sequence[Row]) -> list[Figure]:
    """Validation over tokens and over seconds; seeds as a band."""
    pairs = [(row, c) for row in rows if row.trained and (c := views.curve(row))]
    if not pairs:
        return []
    figures = []
    by = {"tokens": TOKENS, "seconds": SECONDS}
    if views.equal([c for _, c in pairs], "flops"):
        by["flops"] = SPENT
    for axis, axes in by.items():
        series = []
        for row, c in pairs:
            x = (c.along(axis).mean(0) / (1e12 if axis == "flops" else 1)).tolist()
            ends = [[drawn(v) for v in f(0)] for f in (c.nll.mean, c.nll.min, c.nll.max)]
            color = color_of(row.values["method.label"])
            several = len(c.nll) > 1
            low, high = (ends[1], ends[2]) if several else (None, None)
            names = [row.name] * len(x)
            series.append(Series(row.name, color, x, ends[0], low, high, names, True, True))
        last = sorted((s.y[-1], s.name) for s in series if s.y[-1] == s.y[-1])
        extremes = [f"{numbers.perplexity(value)} ({name})" for value, name in last[:1] + last[-1:]]
        alt = f"At the end from {' to '.join(extremes)}." if extremes else "All have diverged."
        figures.append(Figure(axes, series, alt=alt))
    return figures
