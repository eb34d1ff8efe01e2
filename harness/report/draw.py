"""Figures as SVG, PDF and PNG by matplotlib, sized for a column of a paper: `files` writes them."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from harness.report.figure import MANY_COLUMNS, Figure, labels
from harness.results import numbers

mpl.use("Agg")
import matplotlib.pyplot as plt

STYLE: dict[Any, Any] = {
    "font.size": 8, "axes.grid": True, "grid.alpha": 0.3, "svg.hashsalt": "harness",
    "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none",
}  # fmt: skip
WIDTH = 3.4  # inches, a column
LEAST_SPAN = 0.1  # of an axis of costs, beside the largest
MARKERS = "osD^vPX*<>hd"
DASHES = ("-", (0, (4, 1)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (6, 2)), (0, (1, 3)))


def draw(figure: Figure, folder: Path, command: str) -> list[Path]:
    """Write `<key>.svg`, `.pdf` and `.png` into `folder`; returns their paths.

    `command`, by which they are made again, stands in their metadata.
    """
    plt.rcParams |= STYLE
    kinds = {"points": _points, "bars": _bars, "heat": _heat, "parallel": _parallel}
    columns, rows = _legend(figure)
    width, height = _size(figure)
    canvas, axes = plt.subplots(figsize=(width, height + 0.13 * rows), layout="constrained")
    kinds[figure.axes.kind](figure, axes)
    axes.set_title(figure.axes.title, fontsize=8, loc="left")
    if rows:
        canvas.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=6)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{figure.axes.key}.{suffix}" for suffix in ("svg", "pdf", "png")]
    for path in paths:
        canvas.savefig(path, metadata=_metadata(path.suffix, command), dpi=200)
    plt.close(canvas)
    return paths


def _metadata(suffix: str, command: str) -> dict[str, Any]:
    """The command, in a format's own words; without the time, so that equal figures are equal."""
    by_suffix: dict[str, dict[str, Any]] = {
        ".svg": {"Date": None, "Description": command},
        ".pdf": {"CreationDate": None, "Subject": command},
        ".png": {"Description": command},
    }
    return by_suffix[suffix]


def _size(figure: Figure) -> tuple[float, float]:
    if figure.axes.kind == "bars":  # a bar a row, lying; long names have more than a column
        longest = max(map(len, figure.series[0].x))
        return WIDTH + 0.06 * max(0, longest - 28), 0.8 + 0.15 * len(figure.series[0].x)
    return WIDTH, 2.6


def _legend(figure: Figure) -> tuple[int, int]:
    """Columns and rows of the legend, under the axes; 0 where one series needs none."""
    if figure.axes.kind == "heat" or len(figure.series) == 1:
        return 0, 0
    inches = 0.35 + 0.05 * max(len(s.name) for s in figure.series)
    columns = max(1, int(WIDTH / inches))
    return columns, math.ceil(len(figure.series) / columns)


def _points(figure: Figure, axes: plt.Axes) -> None:
    alike: Counter[str] = Counter()  # lines of one colour differ in their dashes
    for index, s in enumerate(figure.series):
        if s.halo:
            axes.plot(s.x, s.y, "o", ms=11, mew=0, color=s.color, alpha=0.3, zorder=1, label=s.name)
            continue
        style = "--" if s.dash else DASHES[alike[s.color] % len(DASHES)] if s.line else "none"
        alike[s.color] += s.line and not s.dash
        marker = "none" if s.dash else MARKERS[index % len(MARKERS)]
        looks: dict[str, Any] = {"linestyle": style, "marker": marker, "color": s.color, "ms": 4}
        if s.band:
            looks |= {"markevery": max(1, len(s.x) // 8), "ms": 2.5}
        axes.plot(s.x, s.y, lw=1, label=s.name, **looks)
        if s.low is None or s.high is None:
            continue
        if s.band:
            axes.fill_between(s.x, s.low, s.high, color=s.color, alpha=0.2, lw=0)
        else:
            ends = np.abs(np.array([s.low, s.high]) - np.array(s.y))
            axes.errorbar(
                s.x, s.y, yerr=ends, fmt="none", ecolor=s.color, elinewidth=0.8, capsize=2
            )
    for _, color, value in figure.references:
        axes.axhline(value, color=color, linestyle=":", lw=1)
    for label in labels(figure):
        axes.annotate(
            label.text, (0 if label.left else 1, label.y), (3 if label.left else -3, 0),
            xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=6,
            ha="left" if label.left else "right", va="bottom" if label.above else "top",
        )  # fmt: skip
    axes.set(xlabel=figure.axes.x, ylabel=figure.axes.y)
    axes.tick_params(axis="x", pad=10)  # clear of the lowest label of the other axis
    if not figure.axes.log_x:
        _widen(axes, [x for s in figure.series for x in s.x])
    else:
        axes.set_xscale("log")
        places = sorted({x for s in figure.series for x in s.x})
        if len(places) <= 8 and places[-1] < 10_000:  # ranks and scales, as they are
            axes.set_xticks(places, labels=[numbers.place(x) for x in places])
            axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    if figure.axes.log_y:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        steps = (
            mpl.ticker.MaxNLocator(5) if high < 4 * low else mpl.ticker.LogLocator(subs=(1, 2, 5))
        )
        axes.yaxis.set_major_locator(steps)
        axes.yaxis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(mpl.ticker.NullLocator())


def _widen(axes: plt.Axes, places: list[Any]) -> None:
    """Make room for tick labels where all costs are the same to a few digits."""
    finite = [x for x in places if not isinstance(x, str) and math.isfinite(x)]
    if not finite or len(finite) < len(places):
        return
    axes.ticklabel_format(axis="x", useOffset=False)
    low, high = min(finite), max(finite)
    if high - low < (least := LEAST_SPAN * max(abs(low), abs(high))):
        axes.set_xlim((low + high - least) / 2, (low + high + least) / 2)


def _parallel(figure: Figure, axes: plt.Axes) -> None:
    scales = list(dict.fromkeys(str(label) for s in figure.series for label in s.y))
    for s in figure.series:
        best = s is figure.series[-1]
        y = [scales.index(str(label)) for label in s.y]
        axes.plot(s.x, y, lw=1.6 if best else 0.7, alpha=1 if best else 0.6, color=s.color,
                  marker="o", ms=3, label=s.name)  # fmt: skip
    axes.set_yticks(range(len(scales)), labels=scales, fontsize=6)
    axes.set_xticks([])
    axes.invert_yaxis()
    axes.set(xlabel=figure.axes.x)


def _bars(figure: Figure, axes: plt.Axes) -> None:
    names = figure.series[0].x
    place, start = np.arange(len(names)), np.zeros(len(names))
    for s in figure.series:
        if s.hollow:
            axes.plot(s.y, place, "|", color=s.color, ms=8, label=s.name)
            continue
        values = np.nan_to_num(np.array(s.y, dtype=float))
        axes.barh(place, values, left=start, color=s.color, height=0.7, label=s.name)
        start = start + values
    axes.set_yticks(place, labels=names, fontsize=6)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set(xlabel=figure.axes.y)


def _heat(figure: Figure, axes: plt.Axes) -> None:
    values = np.array([s.y for s in figure.series], dtype=float)
    whole = mpl.colors.LinearSegmentedColormap.from_list("heat", ["#6baed6", "#f3f8fd"])
    shades = whole.with_extremes(bad="#e6e6e6")  # what was not run is no value
    # The lowest rank at the bottom, as on the page.
    axes.imshow(np.ma.masked_invalid(np.log(values)), cmap=shades, aspect="auto", origin="lower")
    upright = 90 if values.shape[1] > MANY_COLUMNS else 0
    axes.set_xticks(range(values.shape[1]), labels=figure.series[0].x, rotation=upright)
    axes.set_yticks(range(len(values)), labels=[s.name for s in figure.series])
    axes.grid(visible=False)
    for (r, c), value in np.ndenumerate(values):
        text = "–" if np.isnan(value) else numbers.short(value)
        axes.text(c, r, text, ha="center", va="center", fontsize=5 if upright else 7)
    axes.set(xlabel=figure.axes.x, ylabel=figure.axes.y)
