"""The report's figures as Plotly's JSON, for the page."""

from __future__ import annotations

import html
import math
from collections import Counter
from typing import Any

from harness.report.axes import TEST
from harness.report.figure import MANY_COLUMNS, Figure, Series, labels
from harness.results import numbers

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star")
DASHES = ("solid", "dash", "dot", "dashdot")
MOST_TICKS = 7  # of the axis upwards
MANY = 20  # entries of a legend that want room
HEAT = [[0, "#6baed6"], [1, "#f3f8fd"]]  # black is legible on all of it


def plotly(figure: Figure) -> dict[str, Any]:
    """A figure as Plotly's JSON; colours of text and grid are the page's."""
    makers = {"points": _points, "bars": _bars, "heat": _heat, "parallel": _parallel}
    traces = makers[figure.axes.kind](figure)
    lying, many = figure.axes.kind == "bars", len(figure.series) > MANY
    x: dict[str, Any] = {
        "title": {"text": html.escape(figure.axes.y if lying else figure.axes.x), "standoff": 12},
        "automargin": True,
    }
    y: dict[str, Any] = {
        "title": {"text": html.escape("" if lying else figure.axes.y)},
        "automargin": True,
    }
    if figure.axes.log_x:
        x["type"] = "log"
        places = sorted({v for s in figure.series for v in s.x})
        if len(places) <= 8 and places[-1] < 10_000:
            x |= {"tickvals": places, "ticktext": [numbers.place(v) for v in places]}
        else:
            x |= {"dtick": 1, "exponentformat": "power"}
    else:
        x["separatethousands"] = True
    if figure.axes.log_y:
        y |= {"type": "log", "tickvals": _ticks(figure), "tickformat": ","}
    if lying:
        x |= {"nticks": 3, "tickangle": 0}
        y["range"] = [len(figure.series[0].x) - 0.4, -0.6]
    if figure.axes.kind == "heat":
        upright = len(figure.series[0].x) > MANY_COLUMNS
        x |= {"type": "category", "showgrid": False, "tickangle": -90 if upright else 0}
        y |= {"type": "category", "showgrid": False}
    if figure.axes.kind == "parallel":
        x |= {"showticklabels": False, "zeroline": False, "range": [-0.04, 1.04]}
        y |= {"type": "category", "autorange": "reversed"}
    layout: dict[str, Any] = {
        "xaxis": x, "yaxis": y, "barmode": "stack", "hovermode": "closest",
        "height": 150 + 24 * len(figure.series[0].x) if lying else 440 + 120 * many,
        "shapes": [
            {
                "type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": value, "y1": value,
                "line": {"color": color, "dash": "dot", "width": 1.5},
            }
            for _, color, value in figure.references
        ],
        "annotations": [
            {
                "text": html.escape(label.text), "xref": "paper", "x": 0 if label.left else 1,
                "xanchor": "left" if label.left else "right",
                "y": math.log10(label.y) if figure.axes.log_y else label.y,
                "yanchor": "bottom" if label.above else "top", "showarrow": False,
                "font": {"size": 11},
            }
            for label in labels(figure)
        ],
        "showlegend": len(figure.series) > 1 and figure.axes.kind != "heat",
    }  # fmt: skip
    return {"data": traces, "layout": layout}


def _ticks(figure: Figure) -> list[float]:
    """Multiples of powers of ten about the values: 1, 2 and 5, or finer where they are close."""
    shown = [v for s in figure.series for v in s.y] + [y for _, _, y in figure.references]
    values = [v for v in shown if 0 < v < math.inf] or [1.0]
    powers = range(math.floor(math.log10(min(values))) - 1, math.ceil(math.log10(max(values))) + 2)
    choices = (
        [d / 10 for d in range(10, 100)], [d / 5 for d in range(5, 50)],
        [d / 2 for d in range(2, 20)], [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0], [1.0, 2.0, 5.0], [1.0],
    )  # fmt: skip
    low, high = min(values), max(values)
    for digits in choices:  # the finest whose labels have room
        ticks = [digit * 10.0**power for power in powers for digit in digits]
        if sum(low / 1.1 <= tick <= high * 1.1 for tick in ticks) <= MOST_TICKS:
            return ticks
    return ticks


def _points(figure: Figure) -> list[dict[str, Any]]:
    traces: list[dict[str, Any]] = []
    axes = figure.axes
    hover = (
        "<br>".join(
            ["<b>%{text}</b>"]
            + [
                f"{html.escape(name)}: %{{{letter}{form and ':' + form}}}"
                for letter, name, form in (("x", axes.x, axes.x_form), ("y", axes.y, axes.y_form))
                if name != TEST  # which the page adds, with its interval
            ]
        )
        + "<extra></extra>"
    )
    alike: Counter[str] = Counter()
    for index, s in enumerate(figure.series):
        if s.halo:
            traces.append(_halo(s, index))
            continue
        dash = "dash" if s.dash else DASHES[alike[s.color] % len(DASHES)]
        alike[s.color] += s.line and not s.dash
        trace: dict[str, Any] = {
            "type": "scatter", "name": html.escape(s.name), "x": s.x, "y": s.y,
            "mode": "lines" if s.dash else "lines+markers" if s.line else "markers",
            "line": {"color": s.color, "dash": dash, "width": 1.5},
            "marker": {
                "color": s.color, "symbol": SYMBOLS[index % len(SYMBOLS)],
                **({"size": 5, "maxdisplayed": 8} if s.band else {"size": 9}),
            },
            "text": _one([html.escape(name) for name in s.rows]),
            "hovertemplate": hover,
            "legendgroup": str(index),
        }  # fmt: skip
        if s.dash:
            trace["meta"] = "front"  # which the page draws anew when rows are hidden
        elif not s.band:
            trace["meta"] = "rows"  # a row of the table each
        if s.low is not None and s.high is not None and not s.band:
            trace["error_y"] = {
                "type": "data", "symmetric": False, "thickness": 1, "width": 3,
                "array": [h - v for h, v in zip(s.high, s.y, strict=True)],
                "arrayminus": [v - low for low, v in zip(s.low, s.y, strict=True)],
            }  # fmt: skip
        elif s.low is not None and s.high is not None:
            traces.append(_band(s, index))
        traces.append(trace)
    return traces


def _parallel(figure: Figure) -> list[dict[str, Any]]:
    return [
        {
            "type": "scatter", "mode": "lines+markers", "name": html.escape(s.name),
            "y": [html.escape(label).replace(", ", "<br>", 1) for label in map(str, s.y)],
            "x": [None if value != value else value for value in s.x], "connectgaps": False,
            "line": {"color": s.color, "width": 3 if index == len(figure.series) - 1 else 1},
            "marker": {"color": s.color, "size": 6}, "legendgroup": str(index),
            "text": [html.escape(name) for name in s.rows],
            "hovertemplate": "%{text}<extra></extra>",
        }
        for index, s in enumerate(figure.series)
    ]  # fmt: skip


def _halo(s: Series, index: int) -> dict[str, Any]:
    return {
        "type": "scatter", "name": html.escape(s.name), "x": s.x, "y": s.y, "mode": "markers",
        "marker": {"color": s.color, "opacity": 0.3, "size": 22}, "hoverinfo": "skip",
        "legendgroup": str(index), "legendrank": 2000, "zorder": -1,
        "text": [html.escape(name) for name in s.rows],
    }  # fmt: skip


def _one(texts: list[str]) -> str | list[str]:
    """The texts of points, once if all are the same."""
    return texts[0] if len(set(texts)) == 1 else texts


def _band(s: Series, index: int) -> dict[str, Any]:
    assert s.low is not None and s.high is not None
    return {
        "type": "scatter", "x": [*s.x, *reversed(s.x)], "y": [*s.high, *reversed(s.low)],
        "fill": "toself", "fillcolor": f"{s.color}33", "line": {"width": 0}, "mode": "lines",
        "hoverinfo": "skip", "showlegend": False, "legendgroup": str(index),
    }  # fmt: skip


def _bars(figure: Figure) -> list[dict[str, Any]]:
    traces: list[dict[str, Any]] = []
    for s in figure.series:
        names = [html.escape(name) for name in s.x]
        if s.hollow:
            traces.append(
                {
                    "type": "scatter", "mode": "markers", "x": s.y, "y": names,
                    "name": html.escape(s.name),
                    "hovertemplate": f"%{{y}}<br>%{{x:{figure.axes.y_form}}}<extra></extra>",
                    "marker": {"symbol": "line-ns-open", "size": 14, "line": {"width": 2}},
                    "meta": "ink",
                }
            )  # fmt: skip
            continue
        traces.append(
            {
                "type": "bar", "orientation": "h", "x": s.y, "y": names,
                "name": html.escape(s.name),
                "marker": {"color": s.color},
                "hovertemplate": f"%{{y}}<br>%{{x:{figure.axes.y_form}}} {html.escape(s.name)}"
                "<extra></extra>",
            }
        )  # fmt: skip
    return traces


def _heat(figure: Figure) -> list[dict[str, Any]]:
    values = [s.y for s in figure.series]
    return [
        {
            "type": "heatmap", "x": figure.series[0].x, "y": [s.name for s in figure.series],
            "z": [[math.log(v) if v == v else None for v in row] for row in values],
            "text": [[numbers.short(v) if v == v else "–" for v in row] for row in values],
            "texttemplate": "%{text}", "hovertemplate": "%{x}, r=%{y}: %{text}<extra></extra>",
            "colorscale": HEAT, "showscale": False, "textfont": {"color": "#111111"},
            "xgap": 2, "ygap": 2,
        }
    ]  # fmt: skip
