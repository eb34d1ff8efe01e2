"""Figures of what a sweep varied, whatever it was: perplexity against each setting of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from harness.report import stats
from harness.report.axes import TEST, Axes, color_of
from harness.report.figure import Figure, Series
from harness.report.table import LR, Row, headings, setting_text
from harness.results import numbers

FIXED = ("method.label", "method.targets", "method.rank", "method.alpha")  # columns of every table
WIDE = 8  # times its lowest value, from which an axis is logarithmic
MOST_LINES = 12
WORDS = 4  # lines that a caption tells of


def figures(
    rows: Sequence[Row],
    intervals: dict[str, stats.Interval],
    points: Callable[..., Series],
) -> Iterator[Figure]:
    """A figure for every setting that varied with nothing else, the learning rate included.

    `intervals` are those of test perplexity by row. `points(name, color, rows, x, line=…)` makes a
    series of rows. A line joins rows that differ in this setting alone.
    """
    trained = [row for row in rows if row.trained and row.name in intervals]
    others = headings(rows)
    for key, name in {LR: "learning rate", **others}.items():
        lines: dict[tuple[Any, ...], list[Row]] = {}
        for row in trained:
            rest = [*FIXED, *([] if key == LR else [LR])]
            own = [_value(row, k) for k in rest] + [_value(row, k) for k in others if k != key]
            lines.setdefault(tuple(map(setting_text, own)), []).append(row)
        joined = [
            members
            for members in lines.values()
            if len({setting_text(_value(row, key)) for row in members}) > 1
        ]
        if not joined or len(joined) > MOST_LINES:
            continue
        if key == LR and any(len(members) < 3 for members in joined):
            continue  # each configuration at its own rate, and not a search of it
        yield _figure(key, name, joined, intervals, points)


def _figure(
    key: str,
    name: str,
    joined: list[list[Row]],
    intervals: dict[str, stats.Interval],
    points: Callable[..., Series],
) -> Figure:
    everything = [_value(row, key) for members in joined for row in members]
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in everything)
    places = {setting_text(v): i for i, v in enumerate(sorted(everything, key=_order))}
    labels = _labels(joined, key)
    series, sentences = [], []
    for members, label in zip(joined, labels, strict=True):
        ordered = sorted(members, key=lambda row: _order(_value(row, key)))
        x = [_value(row, key) for row in ordered]
        if not numeric:
            x = [setting_text(value) for value in x]
        color = color_of(str(ordered[0].values["method.label"]))
        series.append(points(label, color, ordered, x, line=numeric))
        best = min(ordered, key=lambda row: intervals[row.name].log_perplexity)
        value = intervals[best.name].perplexity[0]
        sentences.append(
            f"{label}: lowest {numbers.perplexity(value)} at {setting_text(_value(best, key))}"
        )
    if not numeric:  # categories in one order, whichever line has them first
        series.sort(key=lambda s: min(places[v] for v in s.x))
    log_x = numeric and min(everything) > 0 and max(everything) >= WIDE * min(everything)
    more = f"; and {len(sentences) - WORDS} more" if len(sentences) > WORDS else ""
    axes = Axes(
        f"swept-{key.replace('.', '-')}", f"Perplexity and {name}", name, TEST,
        log_x=log_x, log_y=True,
    )  # fmt: skip
    return Figure(axes, series, alt=f"{'; '.join(sentences[:WORDS])}{more}.")


def _labels(joined: list[list[Row]], key: str) -> list[str]:
    """Names of the lines: method and targets, and of the rest what tells them apart."""
    labels = []
    for members in joined:
        row = members[0]
        parts = [row.values["method.label"], row.values["method.targets"]]
        if (rank := row.values["method.rank"]) is not None:
            has_r = row.values["method.name"] in ("lora", "adalora")
            parts.append(f"r={rank}" if has_r else f"k={rank}")
        parts += [
            f"{name}={setting_text(row.settings.get(other))}"
            for other, name in headings([m for line in joined for m in line]).items()
            if other != key
        ]
        labels.append(" ".join(filter(None, parts)))
    if len(set(labels)) < len(labels):  # they differ in alpha or the rate
        labels = [
            f"{label} alpha={setting_text(m[0].values['method.alpha'])}"
            + ("" if key == LR else f" lr={setting_text(m[0].values[LR])}")
            for label, m in zip(labels, joined, strict=True)
        ]
    return labels


def _value(row: Row, key: str) -> Any:
    return row.values[key] if key in row.values else row.settings.get(key)


def _order(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, int | float)
    return not number, float(value) if number else 0.0, setting_text(value)
