"""One self-contained HTML page of an experiment: `report/index.html` in its folder.

Nothing in it needs a network. Figures are those of `figures`, drawn by Plotly, whose code is in the
page; the template is page.html.j2.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from harness import results
from harness.config import CONF_DIR
from harness.report import evidence as ev
from harness.report import missing, table
from harness.report.evidence import Evidence
from harness.report.figures import Figure, Series, labels
from harness.report.summary import ends
from harness.report.table import Row

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star")
DASHES = ("solid", "dash", "dot", "dashdot")
MANY = 20  # entries of a legend that want room
HEAT = [[0, "#6baed6"], [1, "#f3f8fd"]]  # black is legible on all of it


def text(
    findings: ev.Findings, drawn: Sequence[Figure], command: str, refresh: int | None = None
) -> str:
    """The page, which `command` makes; with `refresh` it loads itself again every so many seconds.

    While it does, there are no files of figures and tables beside it.
    """
    folder, rows, found = findings.folder, findings.rows, findings.found
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    test = found.get("test")
    shown = {figure.axes.key: plotly(figure) for figure in drawn}
    return environment.get_template("page.html.j2").render(
        title=folder.name,
        question=question(folder.name),
        answer=answer(rows, test),
        notes=_notes(rows, test, findings.refused),
        headings=_headings(rows, test),
        rows=[_row(row, table.columns(rows), test) for row in rows],
        filters=_filters(rows),
        figures=[
            {
                "key": f.axes.key,
                "title": f.axes.title,
                "alt": f.alt,
                "height": shown[f.axes.key]["layout"]["height"],
            }
            for f in drawn
        ],
        data=_embedded(shown),
        comparisons=bool(found),
        missing=missing.find(findings),
        provenance=_provenance(rows),
        command=command,
        plotly=get_plotlyjs() if drawn else "",
        refresh=refresh,
    )


def _embedded(values: Any) -> str:
    """JSON that can stand in a script element whatever text is in it."""
    plain = json.dumps(_short(values), separators=(",", ":"))
    return plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _short(value: Any) -> Any:
    """Numbers in nine digits, which is more than a screen has; what is not finite as None."""
    if isinstance(value, dict):
        return {key: _short(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_short(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    return value


# ----------------------------------------------------------------------------------- in words


def question(experiment: str) -> str | None:
    """What the header of conf/experiment/<experiment>.yaml asks."""
    path = CONF_DIR / "experiment" / f"{experiment}.yaml"
    try:
        header = path.read_text("utf-8")
    except OSError:
        return None
    match = re.search(r"# Question:(.*?)# Command:", header, re.DOTALL)
    if match is None:
        return None
    asked = " ".join(match[1].replace("#", " ").split())
    return asked[:1].upper() + asked[1:]


def answer(rows: Sequence[Row], test: Evidence | None) -> str | None:
    """One sentence from the statistics: the best, what is as good, and what little does most."""
    if test is None:
        return None
    best = test.ordered[0]
    value, low, high = test.intervals[best].perplexity
    why = test.intervals[best].missing
    between = f"no interval: {why}" if why else f"{low:.1f} to {high:.1f}"
    said = f"{best} reaches the lowest test perplexity, {value:.1f} ({between})"
    if not test.comparisons:
        return said + "."
    compared = [ev.turned(c, best) for c in test.comparisons if best in (c.a, c.b)]
    ties = [c.b for c in compared if c.better is None]
    said += (
        f", and cannot be told from {', '.join(ties[:3])}" + (" and more" if len(ties) > 3 else "")
        if ties
        else ", significantly lower than every other's"
    )
    share = {row.name: row.values["parameters.trainable_percent"] or 0 for row in rows}
    small = [name for name in test.ordered if 0 < share[name] <= 5]
    if small and small[0] != best:
        ratio = test.intervals[small[0]].perplexity[0] / value
        said += (
            f"; of those that train at most 5 % of the parameters, {small[0]} "
            f"({share[small[0]]:.2g} %) is best, at {ratio:.2f} times that perplexity"
        )
    return said + "."


def _notes(rows: Sequence[Row], test: Evidence | None, refused: Sequence[str]) -> list[str]:
    notes = [f"No intervals, ranks or comparisons {reason}." for reason in refused]
    if test is not None:
        notes += ev.scope(test)
        if test.ranks and (said := ev.time_scope(rows)):
            notes.append(said)
    notes += table.remarks(rows)
    if any(row.values[table.SHARED] for row in rows):
        notes.append("Memory and speed marked * were measured beside other runs: do not compare.")
    return notes


# ------------------------------------------------------------------------------------ the table


def _headings(rows: Sequence[Row], test: Evidence | None) -> list[dict[str, str]]:
    kinds = {
        heading: "text" if form == "s" else "number"
        for heading, (_, form) in table.columns(rows).items()
    }
    kinds["r, k"] = "number"
    if test is not None:
        kinds |= {"95 %": "number", "rank": "number"}
    kinds["seeds"] = "number"
    return [{"name": name, "kind": kind} for name, kind in kinds.items()]


def _row(row: Row, columns: Mapping[str, tuple[str, str]], test: Evidence | None) -> dict[str, Any]:
    cells = []
    for (heading, (path, form)), shown in zip(
        columns.items(), table.cells(row, columns), strict=True
    ):
        value = row.values[path]
        key = _order(value) if heading == "r, k" else value
        cells.append({"shown": shown, "key": "" if key is None else key, "form": form})
    if test is not None:
        interval = test.intervals.get(row.name)
        shown, low = (ends(interval), interval.perplexity[1]) if interval else ("-", math.nan)
        key = "" if math.isnan(low) else low
        cells.append({"shown": shown.replace("-", "–"), "key": key, "form": ""})
        rank = test.ranks.get(row.name, "-")
        cells.append({"shown": rank, "key": rank.split("-")[0], "form": ""})
    cells.append({"shown": str(row.values["seeds"]), "key": row.values["seeds"], "form": ""})
    return {
        "name": row.name,
        "method": row.values["method.label"] or "-",
        "targets": row.values["method.targets"] or "-",
        "rank": row.values["method.rank"] or "-",
        "also": row.values["also"],
        "lr_from": row.values[table.LR_FROM] or "",
        "cells": cells,
        "tie": test is not None and _ties_best(row.name, test),
        "runs": [{"name": d.name, "href": f"../{d.name}/"} for d in row.run_dirs],
    }


def _ties_best(name: str, test: Evidence) -> bool:
    """Whether it is the best, or not significantly worse."""
    best = test.ordered[0]
    pair = [c for c in test.comparisons if {c.a, c.b} == {name, best}]
    return name == best or any(c.better is None for c in pair)


def _order(rank: str | None) -> float | str:
    try:
        return float(rank) if rank else ""
    except ValueError:
        return 1e9  # full


def _filters(rows: Sequence[Row]) -> dict[str, list[str]]:
    found = {}
    for name, path in (("method", "label"), ("targets", "targets"), ("rank", "rank")):
        values = {str(row.values[f"method.{path}"] or "-") for row in rows}
        if len(values) > 1:
            found[name] = sorted(values, key=lambda v: (_order(v) if v != "-" else -1, v))
    return found


def _provenance(rows: Sequence[Row]) -> dict[str, list[str]]:
    """What the runs were made with; each value with its number of runs where they differ."""
    paths = {
        "commit": "environment.commit",
        "CPU": "environment.hardware.cpu",
        "GPUs": "environment.hardware.gpus",
        "threads": "environment.hardware.threads",
        "versions": "environment.versions",
        "command": "run.command",
    }
    found = {}
    records = [record for row in rows for record in row.records]
    for title, path in paths.items():
        counted: Counter[str] = Counter()
        for record in records:
            value = results.get(record, path)
            if isinstance(value, dict):
                value = ", ".join(f"{k} {v}" for k, v in value.items())
            elif isinstance(value, list):
                value = ", ".join(map(str, value))
            if value not in (None, ""):
                counted[str(value)] += 1
        several = len(counted) > 1
        shown = [f"{v} ({n} runs)" if several else v for v, n in counted.most_common(4)]
        if title == "command":
            shown = (
                shown[:1]
                if not several
                else [f"{next(iter(counted))} (and {len(counted) - 1} more)"]
            )
        if shown:
            found[title] = shown
    return found


# ---------------------------------------------------------------------------------- the figures


def plotly(figure: Figure) -> dict[str, Any]:
    """A figure as Plotly's JSON; colours of text and grid are the page's."""
    makers = {"points": _points, "bars": _bars, "heat": _heat}
    traces = makers[figure.axes.kind](figure)
    lying, many = figure.axes.kind == "bars", len(figure.series) > MANY
    x: dict[str, Any] = {"title": {"text": html.escape(figure.axes.y if lying else figure.axes.x)}}
    y: dict[str, Any] = {
        "title": {"text": html.escape("" if lying else figure.axes.y)},
        "automargin": True,
    }
    if figure.axes.log_x:
        x["type"] = "log"
        places = sorted({v for s in figure.series for v in s.x})
        if len(places) <= 8 and places[-1] < 10_000:
            x |= {"tickvals": places, "ticktext": [f"{v:g}" for v in places]}
        else:
            x |= {"dtick": 1, "exponentformat": "power"}
    else:
        x["separatethousands"] = True
    if figure.axes.log_y:
        y |= {"type": "log", "tickvals": _ticks(figure), "tickformat": ","}
    if lying:
        y["range"] = [len(figure.series[0].x) - 0.4, -0.6]
    if figure.axes.kind == "heat":
        x |= {"type": "category", "showgrid": False}
        y |= {"type": "category", "showgrid": False}
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
    ratio = max(values) / min(values)
    digits = [1.0, 2.0, 5.0]
    if ratio < 4:
        digits = [d / 5 for d in range(5, 50)] if ratio < 1.5 else [d / 2 for d in range(2, 20)]
    return [digit * 10.0**power for power in powers for digit in digits]


def _points(figure: Figure) -> list[dict[str, Any]]:
    traces: list[dict[str, Any]] = []
    alike: Counter[str] = Counter()
    for index, s in enumerate(figure.series):
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
            "hovertemplate": "%{text}<br>%{x:,} → %{y:.2f}<extra></extra>",
            "legendgroup": str(index),
        }  # fmt: skip
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
                    "hovertemplate": "%{y}<br>%{x:,.1f}<extra></extra>",
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
                "hovertemplate": "%{y}<br>%{x:,.1f} " + html.escape(s.name) + "<extra></extra>",
            }
        )  # fmt: skip
    return traces


def _heat(figure: Figure) -> list[dict[str, Any]]:
    values = [s.y for s in figure.series]
    return [
        {
            "type": "heatmap", "x": figure.series[0].x, "y": [s.name for s in figure.series],
            "z": [[math.log(v) if v == v else None for v in row] for row in values],
            "text": [[f"{v:.1f}" if v == v else "" for v in row] for row in values],
            "texttemplate": "%{text}", "hovertemplate": "%{x}, r=%{y}: %{text}<extra></extra>",
            "colorscale": HEAT, "showscale": False, "textfont": {"color": "#111111"},
            "xgap": 2, "ygap": 2,
        }
    ]  # fmt: skip
