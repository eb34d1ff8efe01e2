"""The figures of perplexity by rank, by alpha / r, and by both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from harness.report.axes import ALPHA, RANK, Axes, color_of
from harness.report.evidence import Evidence
from harness.report.figure import Figure, Series
from harness.report.row_series import WORDS, family, lines_of, references, settings_of, trained_rows
from harness.report.table import Row
from harness.results import numbers


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def rank_figure(rows: Sequence[Row], test: Evidence) -> Figure | None:
    """Against r or k: lines of rows that differ in nothing else that has a column."""
    ranked = [r for r in trained_rows(rows, test) if _number(r.values["method.rank"]) is not None]

    def scale(row: Row) -> str:
        alpha = row.values["method.alpha"]
        return "" if alpha is None else f" alpha={alpha / float(row.values['method.rank']):g}r"

    def rank(row: Row) -> float:
        return float(row.values["method.rank"])

    describe = settings_of(ranked)
    lines = lines_of(ranked, lambda r: family(r) + scale(r) + describe(r), rank, test)
    series = [s for s in lines if s.line]
    if not series:
        return None
    return Figure(RANK, series, references(rows, test), _falls(series, "rank"))


def alpha_figure(rows: Sequence[Row], test: Evidence) -> Figure | None:
    """Against alpha / r: lines of rows that differ in nothing else that has a column."""
    scaled = [r for r in trained_rows(rows, test) if r.values["method.alpha"] is not None]

    def scale(row: Row) -> float:
        return float(row.values["method.alpha"]) / float(row.values["method.rank"])

    def key(row: Row) -> str:
        return f"{family(row)} r={row.values['method.rank']}" + describe(row)

    describe = settings_of(scaled)
    series = [s for s in lines_of(scaled, key, scale, test) if s.line]
    if not series:
        return None
    return Figure(ALPHA, series, alt=_falls(series, "alpha / r"))


def _falls(series: Sequence[Series], what: str) -> str:
    ends = [
        f"{s.name}: {numbers.perplexity(s.y[0])} at {what} {s.x[0]:g}, "
        f"{numbers.perplexity(s.y[-1])} at {s.x[-1]:g}"
        for s in sorted(series, key=lambda s: s.y[-1])[:WORDS]
    ]
    more = f"; and {len(series) - WORDS} lines above" if len(series) > WORDS else ""
    return f"{'; '.join(ends)}{more}."


def heat_maps(rows: Sequence[Row], test: Evidence) -> list[Figure]:
    """LoRA's perplexity by rank and alpha / r, and by rank and targets, where both vary."""
    lora = [r for r in trained_rows(rows, test) if r.values["method.label"] == "lora"]
    maps = []
    by = {
        "alpha": (
            "alpha / r",
            lambda r: f"{r.values['method.alpha'] / float(r.values['method.rank']):g}",
        ),
        "targets": ("targets", lambda r: str(r.values["method.targets"])),
    }
    for key, (title, column) in by.items():
        cells: dict[tuple[str, float], list[Row]] = {}
        for row in lora:
            if row.values["method.alpha"] is None:
                continue
            cells.setdefault((column(row), float(row.values["method.rank"])), []).append(row)
        columns = sorted({c for c, _ in cells}, key=lambda c: (_number(c) or 0.0, c))
        ranks = sorted({r for _, r in cells})
        if len(columns) < 2 or len(ranks) < 2 or len(cells) < 4:
            continue

        def value(c: str, rank: float, cells: dict[Any, list[Row]] = cells) -> float:
            members = cells.get((c, rank), [])
            return min((test.intervals[r.name].perplexity[0] for r in members), default=math.nan)

        series = [
            Series(f"{rank:g}", color_of("lora"), columns, [value(c, rank) for c in columns])
            for rank in ranks
        ]
        least = min(
            (v, s.name, c) for s in series for c, v in zip(columns, s.y, strict=True) if v == v
        )
        lowest = numbers.perplexity(least[0])
        maps.append(
            Figure(
                Axes(f"heat-{key}", f"LoRA's perplexity by rank and {title}", title, "r", "heat"),
                series,
                alt=f"Lowest: {lowest} at rank {least[1]}, {title} {least[2]}.",
            )
        )
    return maps
