"""One self-contained HTML page of an experiment: `report/index.html` in its folder.

Nothing in it needs a network. Figures are those of `figures`, drawn by Plotly, whose code is in the
page; the template is page.html.j2. The element `data` holds, for the page's own code, the figures,
the rows (name, values by column, costs) and the comparisons of pairs.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
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
)
from harness.report import evidence as ev
from harness.report.evidence import Evidence
from harness.report.figure import Figure
from harness.report.interactive import plotly
from harness.report.page_columns import MORE_IS_BETTER, alike, filters_of, kinds_of, measures_of
from harness.report.page_rows import costs_of, pairs_of, row_of, values_of
from harness.report.provenance import provenance
from harness.report.table import TEST, Row

HERO = "parameters"  # the figure that stands above the table, where rows differ in that
TALL = 700  # pixels from which a figure has a frame to scroll in


def text(
    findings: ev.Findings, drawn: Sequence[Figure], command: str, refresh: int | None = None
) -> str:
    """The page, which `command` makes; with `refresh` it loads itself again every so many seconds.

    While it does, there are no files of figures and tables beside it.
    """
    folder, by_text = findings.folder, findings.found
    test = by_text.get("test")
    rows = _by_result(findings.rows, test)
    shown = {figure.axes.key: plotly(figure) for figure in drawn}
    further = requested.find(findings)
    titles = list(dict.fromkeys([*ev.BUDGETS, *further.titles]))
    table, filters = columns.sheet(rows, test, further), filters_of(rows)
    hero = _hero(drawn)
    stopped = parts.stopped(folder)  # candidates, of which the search's own section tells
    left_out = [
        run for run in missing.find(findings) if run.status != "running" and run.name not in stopped
    ]
    fates = Counter(run.status for run in left_out)
    return render(
        drawn,
        command,
        title=folder.name,
        question=answer.question(folder.name, rows),
        setting=setting.find(folder, rows),
        answer=answer.answer(rows, test),
        choices=choices.sheet(rows, test, further=further.titles) if test is not None else None,
        notes=_notes(findings, test, further.titles),
        tolerances=choices.TOLERANCES,
        costs=costs_of(rows, titles),
        table=table,
        kinds=kinds_of(table),
        sorted_by=TEST if test is not None else "",
        rows=[row_of(row, test, filters) for row in rows],
        filters=[{"name": f.name, "heading": f.heading, "values_": f.values} for f in filters],
        legend=" ".join([*columns.notes(rows, table.headings), *further.notes()]) if rows else "",
        table_notes=test is not None and len(test.intervals) > 1,
        ties=test is not None and test.num_seeds[0] != 2,  # two seeds show hardly any difference
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
        alike=alike(table),
        sheets=sheets.further(rows, by_text, titles),
        data=embedded(
            {
                "figures": shown,
                "rows": values_of(rows, table, test, titles),
                "pairs": pairs_of(rows, test),
                "lower": {key: key not in MORE_IS_BETTER for key in measures_of(table)},
            }
        ),
        comparisons=test is not None and bool(test.comparisons),
        whole=findings.rows == findings.everything,  # the files beside the page have every row
        missing=left_out,
        fates=", ".join(f"{n} {status}" for status, n in fates.items()),
        provenance=provenance(rows),
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


def _notes(findings: ev.Findings, test: Evidence | None, further: Sequence[str]) -> list[str]:
    notes = ev.not_compared(findings)
    if test is not None:
        notes += ev.scope(test)
        measured = [title for title in (ev.TIME, *further) if costs.of(title).measured]
        if test.ranks:
            notes += [note for title in measured if (note := ev.time_scope(findings.rows, title))]
    return notes
