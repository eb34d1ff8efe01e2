"""The table and the page of results of PEFT's method_comparison, beside those of our own runs."""

from __future__ import annotations

import csv
import io
import os
import shlex
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from harness.report import draw, page, page_columns
from harness.report.axes import Axes, color_of
from harness.report.figure import Figure, Series
from harness.report.interactive import plotly
from harness.report.peft_results import Comparison, Ranked, answer, notes
from harness.report.setting import Setting
from harness.report.sheet import Cell, Column, Sheet, latex, markdown
from harness.results import numbers
from harness.results.numbers import MIB
from harness.system import atomic

FOLDER = Path("outputs") / "peft_results"
VALUE, INTERVAL, PLACES = "quality.test.value", "quality.test.interval", "quality.test.rank"
PARAMETERS, PEAK, FILE = "parameters.trainable", "memory.peak_bytes", "memory.file_bytes"
FORGETTING, SECONDS = "quality.forgetting", "speed.train_seconds"
FIGURES = {  # cost -> key of the figure, its title, the axis, and what a value is divided by
    PARAMETERS: ("parameters", "trainable parameters", "trainable parameters", 1),
    PEAK: ("memory", "peak memory", "most memory of the accelerator, MiB", MIB),
    FORGETTING: ("forgetting", "forgetting", "nats per token that other text has lost", 1),
}


def sheet(comparison: Comparison) -> Sheet:
    """The table of the results, the best first; a column that no file has is left out."""
    first = comparison.ranked[0].result
    share = comparison.items is not None
    columns = [
        Column("method.label", "experiment", text=True),
        Column("method.peft_type", "PEFT type", text=True, keep=40),
        Column(PARAMETERS, "trainable", keep=20, why="parameters that train"),
        Column("parameters.trainable_percent", "%", keep=45, why="of all parameters"),
        Column(VALUE, first.metric.removeprefix("test "), why=first.metric),
        Column(INTERVAL, "95 %", why="interval over the test items"),
        Column(PLACES, "place", why="the places that a row may have, by tests of all pairs"),
        Column(
            FORGETTING, "forgot", keep=25, why="nats per token of other text, after less before"
        ),
        Column(PEAK, "peak MiB", keep=30, why="the most memory of the accelerator"),
        Column(FILE, "file MiB", keep=35, why="of what was saved"),
        Column(SECONDS, "seconds", keep=50, why="of training"),
    ]
    lines = [_line(row, share) for row in comparison.ranked]
    kept = [
        column.key
        for place, column in enumerate(columns)
        if any(line[place].value is not None for line in lines)
    ]
    return Sheet("Results", columns, lines, notes(comparison)).only(kept)


def _line(row: Ranked, share: bool) -> list[Cell]:
    result, interval = row.result, row.interval
    none = Cell("-")
    percent = 100 * result.trainable / result.total if result.trainable and result.total else None
    ends = "" if interval is None else "-".join(f"{100 * end:.1f}" for end in interval)
    return [
        Cell(result.name, result.name),
        Cell(result.peft_type, result.peft_type),
        none if result.trainable is None
        else Cell(numbers.count(result.trainable), result.trainable),
        none if percent is None else Cell(numbers.percent(percent, 3), percent),
        Cell(numbers.share(result.value) if share else f"{result.value:.4f}", result.value),
        none if interval is None else Cell(ends, interval[0]),
        none if not row.places else Cell(row.places, int(row.places.partition("-")[0])),
        none if result.forgetting is None
        else Cell(f"{result.forgetting:+.3f}", result.forgetting),
        Cell(numbers.mib(result.memory_bytes), result.memory_bytes / MIB),
        Cell(f"{result.file_bytes / MIB:,.1f}", result.file_bytes / MIB),
        Cell(numbers.seconds(result.train_seconds), result.train_seconds),
    ]  # fmt: skip


def figures(comparison: Comparison) -> list[Figure]:
    """The metric against parameters, memory and forgetting, with its intervals."""
    metric = comparison.ranked[0].result.metric
    drawn = []
    for cost, (key, title, name, unit) in FIGURES.items():
        by_type: dict[str, list[tuple[float, Ranked]]] = {}
        for row in comparison.ranked:
            value = {
                PARAMETERS: row.result.trainable,
                PEAK: row.result.memory_bytes,
                FORGETTING: row.result.forgetting,
            }[cost]
            if value is not None:
                by_type.setdefault(row.result.peft_type, []).append((value / unit, row))
        if len(by_type) < 2:
            continue
        series = [_series(peft_type, points) for peft_type, points in by_type.items()]
        axes = Axes(
            key, f"{metric.capitalize()} and {title}", name, metric, log_x=cost == PARAMETERS,
            x_form=".3f" if cost == FORGETTING else ",.0f", y_form=".3f",
        )  # fmt: skip
        points = [(x, row) for group in by_type.values() for x, row in group]
        least = min(points, key=lambda point: point[0])
        ties = [point for point in points if point[1].ties_best]
        alt = f"{len(points)} rows. Lowest in {title}: {least[1].result.name}"
        if ties:
            cheapest = min(ties, key=lambda point: point[0])[1].result
            alt += f"; of those that cannot be told from the best: {cheapest.name}"
        drawn.append(Figure(axes, series, alt=alt + "."))
    return drawn


def _series(peft_type: str, points: list[tuple[float, Ranked]]) -> Series:
    """Rows of one PEFT type at their costs."""
    intervals = [row.interval for _, row in points if row.interval is not None]
    return Series(
        peft_type,
        color_of(peft_type),
        [x for x, _ in points],
        [row.result.value for _, row in points],
        low=[low for low, _ in intervals] or None,
        high=[high for _, high in intervals] or None,
        rows=[row.result.name for _, row in points],
    )


def write(comparison: Comparison, folder: Path) -> Path:
    """Write results.csv and the page of the results in `folder`; returns the page's path."""
    source = comparison.ranked[0].result.path.parent.resolve()
    own = source.parent if source.name == "results" else source
    out = FOLDER / own.name
    report = out / "report"
    shutil.rmtree(report / "figures", ignore_errors=True)
    (report / "figures").mkdir(parents=True)
    command = shlex.join(["harness", "report", "--peft-results", str(folder)])
    table, drawn = sheet(comparison), figures(comparison)
    for figure in drawn:
        draw.draw(figure, report / "figures", command)
    first = comparison.ranked[0].result
    facts = [
        first.model,
        first.task,
        f"{len(comparison.ranked)} results of PEFT's method_comparison",
    ]
    setting = Setting(facts, [command])
    caption = f"{first.metric.capitalize()} of {first.model}."
    for path, text in (
        (out / "results.csv", _csv(table)),
        (report / "table.md", f"# {own.name}\n\n{setting.line}\n\n{markdown(table)}"),
        (report / "table.tex", latex(table, caption, own.name)),
        (report / "index.html", _page(comparison, table, drawn, setting, report)),
    ):
        atomic.write_atomically(path, text)
    return report / "index.html"


def _csv(table: Sheet) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([column.key for column in table.columns])
    for line in table.lines:
        shown = (INTERVAL, PLACES)  # two numbers in one cell
        writer.writerow(
            [
                cell.shown if column.key in shown else cell.value
                for column, cell in zip(table.columns, line, strict=True)
            ]
        )
    return stream.getvalue()


def _page(
    comparison: Comparison, table: Sheet, drawn: list[Figure], setting: Setting, report: Path
) -> str:
    plots = {figure.axes.key: plotly(figure) for figure in drawn}
    figure_of = partial(page.figure_of, shown=plots)
    rows = [
        {
            "name": row.result.name, "also": row.result.peft_type, "filters": {},
            "tie": row.ties_best,
            "runs": [{"name": row.result.path.name,
                      "href": os.path.relpath(row.result.path.resolve(), report.resolve())}],
        }
        for row in comparison.ranked
    ]  # fmt: skip
    values: list[dict[str, Any]] = [
        {
            "name": row.result.name, "trained": True, "tie": row.ties_best, "perplexity": None,
            "values": {c.key: cell.value for c, cell in zip(table.columns, line, strict=True)},
            "shown": {c.key: cell.shown for c, cell in zip(table.columns, line, strict=True)},
            "costs": {}, "spent": [], "told": [], "color": color_of(row.result.peft_type),
        }
        for row, line in zip(comparison.ranked, table.lines, strict=True)
    ]  # fmt: skip
    measures = page_columns.measures_of(table)
    lower = {key: key not in (VALUE,) for key in measures}
    return page.render(
        drawn, setting.commands[0], title=report.parent.name, setting=setting,
        answer=answer(comparison), choices=None, table=table,
        question="Which of PEFT's methods can these results tell apart?",
        notes=table.notes, tolerances=(), costs=[], sorted_by="", whole=True, ties=True,
        kinds=page_columns.kinds_of(table),
        rows=rows, filters=[], legend="", heroes=[figure_of(f) for f in drawn[:1]],
        table_notes=False, figures=[figure_of(f) for f in drawn[1:]], parts=[], alike=[],
        sheets=[], comparisons=False, missing=[], fates="", provenance={}, running=[],
        refresh=None, measures=measures,
        data=page.embedded({"figures": plots, "rows": values, "pairs": [], "lower": lower}),
    )  # fmt: skip
