"""A figure: points, bars or a heat map on axes, with labels, references and a sentence in words."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from harness.report.axes import Axes

MANY_COLUMNS = 8  # of a heat map, from which their labels stand upright
REFERENCES = {"none": "base model", "truncate": "truncated", "full": "full fine-tuning"}


@dataclass(frozen=True)
class Series:
    """Points that belong together: a line, a band, bars or rows of a heat map."""

    name: str
    color: str
    x: list[Any]
    y: list[float]
    low: list[float] | None = None  # ends of intervals, or of a band
    high: list[float] | None = None
    rows: list[str] = field(default_factory=list)  # the table's row of each point
    line: bool = False
    band: bool = False  # no marks; the ends, if any, as an area
    dash: bool = False
    hollow: bool = False
    halo: bool = False  # a pale disc behind each point, and no more


@dataclass(frozen=True)
class Figure:
    """Axes with their scales and labels, and the series that are drawn on them."""

    axes: Axes
    series: list[Series]
    references: list[tuple[str, str, float]] = field(default_factory=list)  # (name, colour, y)
    alt: str = ""  # for those who cannot see it


@dataclass(frozen=True)
class Label:
    """The name of a reference line, its height, and the end of the line at which it stands."""

    text: str
    y: float
    left: bool = False  # at the left end of the line, or else at the right one
    above: bool = True  # the line, or else below it


def labels(figure: Figure) -> list[Label]:
    """The names of the reference lines, lowest first, so that close lines do not share room.

    Full fine-tuning's is at the left: at the right, where it is dear, there are points.
    """
    if not figure.references:
        return []
    scale = math.log if figure.axes.log_y else float
    drawn = [v for s in figure.series for v in s.y if v == v] + [r[2] for r in figure.references]
    places = [scale(v) for v in drawn if v > 0]
    room = 0.07 * (max(places) - min(places)) if places else 0.0
    placed: list[Label] = []
    for text, _, y in sorted(figure.references, key=lambda r: r[2]):
        left = text.startswith(REFERENCES["full"])
        close = [
            i
            for i, other in enumerate(placed)
            if other.left == left and scale(y) - scale(other.y) < room
        ]
        if len(close) == 1:
            placed[close[0]] = replace(placed[close[0]], above=False)
        placed.append(Label(text, y, left != (len(close) > 1)))
    return placed
