"""One self-contained HTML page of an experiment: `report/index.html` in its folder.

Nothing in it needs a network. Figures are those of `figures`, drawn by Plotly, whose code is in the
page; the template is page.html.j2. The element `data` holds, for the page's own code, the figures,
the rows (name, values by column, costs) and the comparisons of pairs.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from harness.report import (
    answer,
    choices,
    columns,
    costs,
    missing,
    parts,
    progress,
    requested,
    setting,
    sheets,
    stats,
)
from harness.report import evidence as ev
from harness.report.axes import color_of
from harness.report.evidence import Evidence
from harness.report.figure import Figure
from harness.report.interactive import plotly
from harness.report.sheet import Cell, Sheet
from harness.report.table import LR, LR_FROM, OF_COMPLETIONS, TEST, Row, headings
from harness.results import numbers, run_record

HERO = "parameters"  # the figure that stands above the table, where rows differ in that
MOST_CHOICES = 40  # of a filter: what has more is better sorted
TALL = 700  # pixels from which a figure has a frame to scroll in
MORE_IS_BETTER = (
    "speed.tokens_per_second",
    "quality.classification.test.accuracy",
    *OF_COMPLETIONS,
)
AXIS_NAMES = {
    "parameters.trainable": "trainable parameters",
    "parameters.trainable_percent": "trainable parameters, %",
    "memory.peak_bytes": "peak of live tensors, MiB",
    "speed.tokens_per_second": "tokens/s of optimizer steps",
    "quality.step0.validation.perplexity": "validation perplexity before training",
    "quality.validation.perplexity": "validation perplexity",
    TEST: "test perplexity",
}
MEASURES = (
    "parameters.",
    "memory.",
    "speed.",
    "quality.",
    "costs.",
    "anatomy.",
    "forgotten.",
)  # columns that are measured


def text(
    findings: ev.Findings, drawn: Sequence[Figure], command: str, refresh: int | None = None
) -> str:
    """The page, which `command` makes; with `refresh` it loads itself again every so many seconds.

    While it does, there are no files of figures and tables beside it.
    """
    folder, found = findings.folder, findings.found
    test = found.get("test")
    rows = _by_result(findings.rows, test)
    shown = {figure.axes.key: plotly(figure) for figure in drawn}
    further = requested.find(findings)
    titles = list(dict.fromkeys([*ev.BUDGETS, *further.titles]))
    table, filters = columns.sheet(rows, test, further), _filters(rows)
    hero = _hero(drawn)
    stopped = parts.stopped(folder)  # candidates, of which the search's own section tells
    left_out = [
        one for one in missing.find(findings) if one.status != "running" and one.name not in stopped
    ]
    fates = Counter(one.status for one in left_out)
    return render(
        drawn,
        command,
        title=folder.name,
        question=answer.question(folder.name, rows),
        setting=setting.find(folder, rows),
        answer=answer.answer(rows, test),
        choices=choices.sheet(rows, test, further=further.titles) if test is not None else None,
        notes=_notes(findings.rows, test, findings.refused, further.titles),
        tolerances=choices.TOLERANCES,
        costs=_costs(rows, titles),
        table=table,
        kinds=kinds_of(table),
        sorted_by=TEST if test is not None else "",
        rows=[_row(row, test, filters) for row in rows],
        filters=[{"name": f.name, "heading": f.heading, "values_": f.values} for f in filters],
        legend=" ".join([*columns.notes(rows), *further.notes()]) if rows else "",
        table_notes=test is not None and len(test.intervals) > 1,
        heroes=[figure_of(f, shown) for f in drawn if f.axes.key == hero],
        figures=[
            figure_of(f, shown)
            for f in drawn
            if f.axes.key != hero and not f.axes.key.startswith(parts.KEYS)
        ],
        parts=[
            {
                "key": part.key,
                "sheet": part.sheet,
                "figures": [figure_of(f, shown) for f in part.figures],
            }
            for part in parts.find(folder, rows)
        ],
        alike=_alike(table),
        sheets=sheets.further(rows, found, titles),
        data=embedded(
            {
                "figures": shown,
                "rows": _values(rows, table, test, titles),
                "pairs": _pairs(rows, test),
                "lower": {key: key not in MORE_IS_BETTER for key in measures_of(table)},
            }
        ),
        comparisons=test is not None and bool(test.comparisons),
        missing=left_out,
        fates=", ".join(f"{n} {status}" for status, n in fates.items()),
        provenance=_provenance(rows),
        measures=measures_of(table),
        running=progress.running(folder, findings.run_dirs),
        refresh=refresh,
    )


def render(drawn: Sequence[Figure], command: str, **values: Any) -> str:
    """Fill the template with what a page shows; its style, code and library are added here."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    return environment.get_template("page.html.j2").render(
        command=command,
        plotly=get_plotlyjs() if drawn else "",
        style=_beside("page.css"),
        script=_beside("page.js"),
        **values,
    )


def _hero(drawn: Sequence[Figure]) -> str:
    """The key of the first figure: parameters, or what was swept where they are all the same."""
    keys = [figure.axes.key for figure in drawn]
    lines = [f.axes.key for f in drawn if f.axes.key.startswith("swept-") and f.series[0].line]
    return lines[0] if lines and HERO not in keys else HERO


def _beside(name: str) -> str:
    """The page's own style or code, which lies beside this module."""
    return Path(__file__).with_name(name).read_text("utf-8")


def measures_of(table: Sheet) -> dict[str, str]:
    """Columns of numbers that were measured, which a figure can have as axes: key -> its name."""
    found = {}
    for place, column in enumerate(table.columns):
        values = {line[place].value for line in table.lines} - {None}
        numeric = values and all(isinstance(value, int | float) for value in values)
        if (
            numeric
            and column.key.startswith(MEASURES)
            and column.key not in (columns.PLACES, columns.INTERVAL)
        ):
            found[column.key] = AXIS_NAMES.get(column.key, column.heading)
    return found


def figure_of(figure: Figure, shown: dict[str, Any]) -> dict[str, Any]:
    """Return what the template needs of a figure, beside Plotly's description of it in `shown`."""
    height = shown[figure.axes.key]["layout"]["height"]
    return {
        "key": figure.axes.key, "title": figure.axes.title, "alt": figure.alt, "height": height,
        "tall": height > TALL,
    }  # fmt: skip


def _by_result(rows: Sequence[Row], test: Evidence | None) -> list[Row]:
    """The rows by test perplexity, the lowest first; then those without one."""
    place = {} if test is None else {name: i for i, name in enumerate(test.ordered)}
    return sorted(rows, key=lambda row: place.get(row.name, len(place)))


def embedded(values: Any) -> str:
    """Return values as JSON that can stand in a script element, whatever text is in them."""
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


def _notes(
    rows: Sequence[Row], test: Evidence | None, refused: Sequence[str], further: Sequence[str]
) -> list[str]:
    notes = [f"No intervals, ranks or comparisons {reason}." for reason in refused]
    if test is not None:
        notes += ev.scope(test)
        measured = [title for title in (ev.TIME, *further) if costs.of(title).measured]
        if test.ranks:
            notes += [said for title in measured if (said := ev.time_scope(rows, title))]
    return notes


# ------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Filter:
    """A choice above the table: what a column has, and what every row has in it."""

    name: str  # of the attribute data-of-…
    heading: str
    values: list[str]
    of: dict[str, str]  # row's name -> value


def _filters(rows: Sequence[Row]) -> list[Filter]:
    """The columns that rows can be chosen by: method, targets, rank, and what else was varied."""
    found = []
    shown = columns.sheet(rows, None)
    keys = ["method.label", "method.targets", "method.rank", *headings(rows)]
    for place, column in enumerate(shown.columns):
        of = {row.name: line[place].shown for row, line in zip(rows, shown.lines, strict=True)}
        by = {line[place].shown: line[place].value for line in shown.lines}
        if column.key not in keys or not 1 < len(by) <= MOST_CHOICES:
            continue
        heading = "rank" if column.key == "method.rank" else column.heading
        ordered = sorted(by, key=lambda text: _order(by[text], text))
        found.append(Filter(re.sub(r"[^a-z0-9]+", "-", heading.lower()), heading, ordered, of))
    return found


def _order(value: Any, text: str) -> tuple[float, str]:
    """By number where it is one, with what is missing first."""
    number = float(value) if isinstance(value, int | float) else math.inf
    return (-math.inf if value is None else number), text


def _alike(table: Sheet) -> list[str]:
    """Columns before the measures in which all of several rows are alike."""
    if len(table.lines) < 2:
        return []
    return [
        column.key
        for place, column in enumerate(table.columns)
        if column.key.startswith("method.")
        and column.key != "method.label"
        and len({line[place].shown for line in table.lines}) == 1
    ]


def kinds_of(table: Sheet) -> dict[str, str]:
    """How each column is sorted: as numbers where all its values are."""
    found = {}
    for place, column in enumerate(table.columns):
        values = [line[place].value for line in table.lines]
        numeric = all(isinstance(v, int | float) for v in values if v is not None)
        found[column.key] = "number" if numeric else "text"
    return found


def _costs(rows: Sequence[Row], titles: Sequence[str]) -> list[dict[str, Any]]:
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


def _row(row: Row, test: Evidence | None, filters: Sequence[Filter]) -> dict[str, Any]:
    """What the page needs of a row beside its cells."""
    return {
        "name": row.name,
        "also": row.values["also"],
        "filters": {one.name: one.of[row.name] for one in filters},
        "tie": _ties_best(row, test),
        "runs": [{"name": d.name, "href": f"../{d.name}/"} for d in row.run_dirs],
    }


def _ties_best(row: Row, test: Evidence | None) -> bool:
    return test is not None and row.name in test.intervals and choices.ties_best(row.name, test)


def _values(
    rows: Sequence[Row],
    table: Sheet,
    test: Evidence | None,
    titles: Sequence[str] = ev.BUDGETS,
) -> list[dict[str, Any]]:
    """Every row for the page's code: its values by column, interval, and costs to be compared."""
    sure = {title: ev.sure_costs(rows, title) for title in titles}
    spent = {title: ev.costs(rows, title) for title in titles}
    found = []
    for row, line in zip(rows, table.lines, strict=True):
        interval = None if test is None else test.intervals.get(row.name)
        found.append(
            {
                "name": row.name,
                "trained": row.trained,
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
    return found


def _told(
    row: Row, interval: stats.Interval | None, table: Sheet, line: Sequence[Cell]
) -> list[str]:
    """What hovering over a row's point says beside the point: the table's own numbers."""
    shown = {column.key: cell.shown for column, cell in zip(table.columns, line, strict=True)}
    said = []
    if interval is not None:
        low, high = map(numbers.short, interval.perplexity[1:])
        between = "" if interval.missing else f" (95 % {low} to {high})"
        said.append(f"test {numbers.perplexity(interval.perplexity[0])}{between}")
    if row.trained and row.values[LR]:
        said.append(f"lr {numbers.rate(row.values[LR])} ({row.values[LR_FROM] or 'set'})")
    for key, words in (
        ("memory.peak_bytes", "peak {} MiB"),
        ("speed.tokens_per_second", "{} tokens/s"),
        ("parameters.trainable", "{} parameters train"),
    ):
        if shown[key] not in ("-", "0"):
            said.append(words.format(shown[key]))
    return said


def _pairs(rows: Sequence[Row], test: Evidence | None) -> list[list[Any]]:
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
            value = run_record.get(record, path)
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
