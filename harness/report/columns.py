"""The columns of the table of results: on the terminal, in Markdown and LaTeX, and on the page.

After method, targets and rank come the settings in which rows differ, whatever they are: a sweep
over them can be read in every table. results.csv has the same by their paths (`table.csv_lines`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from harness.report import comparable, remarks, stats
from harness.report.evidence import Evidence
from harness.report.requested import NOTHING, Found
from harness.report.sheet import Cell, Column, Sheet
from harness.report.table import (
    ALPHA,
    COLUMNS,
    LR,
    LR_FROM,
    MEASURED,
    OF_COMPLETIONS,
    OF_LABELS,
    OF_STARTS,
    RANK,
    SHARED,
    TRAINABLE,
    UNTRAINED,
    Number,
    Row,
    headings,
    setting_text,
)
from harness.results import numbers, run_record

OF_TRAINING = ("method.lr", TRAINABLE, "parameters.trainable_percent")
INTERVAL, PLACES = "quality.test.interval", "quality.test.rank"
EMPTY = 1000  # `keep` of a column in which nothing stands


LEGEND = {  # heading -> what the column has, of those whose heading does not say it
    "%": "the parameters that train, of all",
    "peak MiB": "the most memory that tensors took at one time in a training step (in evaluation, "
    "where nothing trains)",
    "step 0": "validation perplexity per token before training",
    "val": "validation perplexity per token at the checkpoint that it chose",
    "test": "test perplexity per token, from the checkpoint that validation chose",
}
TILDE = (
    "~: this learning rate was not tuned for this row. It is the method's default, or it was tuned "
    "for a similar row."
)
STAR = "*: measured while other runs used the machine too, so do not compare it."
NO_STEP = (
    f"{UNTRAINED}: train.steps=0, so nothing was trained; the row has what its method is before "
    "the first step."
)


def sheet(rows: Sequence[Row], test: Evidence | None, further: Found = NOTHING) -> Sheet:
    """The table of the rows, in their order, with the columns that were asked for beside it."""
    columns: list[Column] = []
    filled: list[list[Cell]] = []  # a list a column

    def add(key: str, number: Number, cells: list[Cell], *, text: bool = False) -> None:
        keep = number.keep if any(cell.shown != "-" for cell in cells) else EMPTY
        columns.append(Column(key, number.heading, text, keep, number.why))
        filled.append(cells)

    telling = telling_of(rows)
    apart = {} if test is None else test.apart
    for key, number in COLUMNS.items():
        kept = Number(number.heading, number.form, 0, number.why) if key in telling else number
        cells = [_cell(row, key, number.form, apart) for row in rows]
        add(key, kept, cells, text=key in ("method.label", "method.targets", RANK))
        if key == RANK:
            for setting, heading in headings(rows).items():
                own = [_setting(row, setting) for row in rows]
                text = any(isinstance(cell.value, str) for cell in own)
                add(setting, Number(heading, str, 0, setting), own, text=text)
    if test is not None:
        add(
            INTERVAL, Number("95 %", str, 10, f"interval of test over {test.sample}"),
            [_interval(test, row) for row in rows],
        )  # fmt: skip
        if len(test.ranks) > 1:
            why = "the places that a row may have, by paired tests"
            add(PLACES, Number("place", str, 30, why), [_places(test, row) for row in rows])
    for key, label in OF_STARTS.items():
        if any(row.values[key] is not None for row in rows):
            why = "of training text that was read before step 0, which training's cost includes"
            number = Number(
                label, numbers.count if key.endswith("tokens") else "{:.3g}".format, 85, why
            )
            add(key, number, [_cell(row, key, number.form, apart) for row in rows])
    for key, label in OF_LABELS.items():
        if any(row.values[key] is not None for row in rows):
            number = Number(
                label, numbers.share, 24, "of the test set's labels, by their likelihood"
            )
            add(key, number, [_cell(row, key, numbers.share, apart) for row in rows])
    for place, (key, label) in enumerate(OF_COMPLETIONS.items()):
        if any(row.values[key] is not None for row in rows):
            why = "of the test set's prompts, completed by that model"
            number = Number(label, "{:.2f}".format, 96 + place if place else 25, why)
            add(key, number, [_cell(row, key, number.form, apart) for row in rows])
    seeds = [row.values["seeds"] for row in rows]
    add("seeds", Number("seeds", str, 50), [Cell(str(n), n) for n in seeds])
    keys = {column.key for column in columns}
    beside = [further.cells(row) for row in rows]
    for place, column in enumerate(further.heads()):
        if column.key in keys:  # a column of every table, which is to stay
            where = next(i for i, c in enumerate(columns) if c.key == column.key)
            columns[where] = replace(columns[where], keep=0)
            continue
        columns.append(column)
        filled.append([cells[place] for cells in beside])
    return Sheet("Results", columns, [list(line) for line in zip(*filled, strict=True)])


def notes(rows: Sequence[Row], shown: Collection[str]) -> list[str]:
    """What the columns that are `shown`, by their headings, and the table's signs say."""
    legend = [f"{heading}: {what}" for heading, what in LEGEND.items() if heading in shown]
    sentences = [f"{'; '.join(legend)}."] if legend else []
    if label_note := remarks.of_labels(rows):
        sentences.append(label_note)
    if any(row.values[key] is not None for row in rows for key in OF_COMPLETIONS):
        sentences.append(
            f"{', '.join(OF_COMPLETIONS.values())}: of the test set's prompts, completed by that "
            "model (harness/evaluation/text_metrics.py)."
        )
    records = [record for row in rows for record in row.records]
    missing = [run_record.get(record, "quality.generation.skipped") or {} for record in records]
    for name, why in {name: why for skipped in missing for name, why in skipped.items()}.items():
        sentences.append(f"without {name}: {why}")
    if any(not is_own_rate(row.values[LR_FROM]) for row in rows):
        sentences.append(TILDE)
    if any(row.values[SHARED] for row in rows):
        sentences.append(STAR)
    if any(row.took_no_step for row in rows):
        sentences.append(NO_STEP)
    return sentences + remarks.remarks(rows)


def is_own_rate(lr_from: str | None) -> bool:
    """Whether a rate was set, or tuned for just this configuration, if for other steps."""
    return (lr_from or "set").split(", for ")[0] in ("set", "tuned", "not used")


def ends(i: stats.Interval) -> str:
    """An interval of perplexity; - where there is none."""
    if i.missing:
        return "-"
    return "-".join(map(numbers.short, i.perplexity[1:]))


def number_of(rank: str | None) -> float | None:
    """A rank as what it is sorted by; whole matrices come last."""
    if rank is None:
        return None
    try:
        return float(rank)
    except ValueError:
        return math.inf


def telling_of(rows: Sequence[Row]) -> set[str]:
    """Of alpha and the rate, what is needed to tell rows apart."""
    keys: set[str] = set()
    same: Callable[[Row], tuple[Any, ...]] = lambda row: (  # noqa: E731 - it is extended below
        *(row.values[key] for key in ("method.label", "method.targets", RANK, *sorted(keys))),
        json.dumps(row.settings, sort_keys=True, default=str),
    )
    for key in (ALPHA, LR):
        groups: dict[tuple[Any, ...], set[Any]] = {}
        for row in rows:
            groups.setdefault(same(row), set()).add(row.values[key])
        if any(len(values) > 1 for values in groups.values()):
            keys.add(key)
    return keys


def text_of(value: Any, form: Callable[[Any], str]) -> str:
    """A value as tables show it; - where there is none."""
    return "-" if value is None else form(value)


def _cell(row: Row, key: str, form: Callable[[Any], str], apart: Mapping[str, str]) -> Cell:
    value = row.values[key]
    if row.took_no_step and key in OF_TRAINING:
        return Cell("-", None, NO_STEP)
    if value is None:
        return Cell("-")
    shown = text_of(value, form)
    if row.name in apart and key.startswith("quality."):
        return Cell(f"{shown}{comparable.SIGN}", value, f"not compared: {apart[row.name]}")
    if key in MEASURED and row.values[SHARED]:
        return Cell(f"{shown}*", value, STAR)
    if key == LR:
        own = is_own_rate(row.values[LR_FROM])
        return Cell(shown if own else f"~{shown}", value, row.values[LR_FROM] or "")
    if key == RANK:
        return Cell(shown, number_of(value))
    if key == "method.label" and row.took_no_step:
        return Cell(f"{shown}, {UNTRAINED}", value, NO_STEP)
    return Cell(shown, value)


def _setting(row: Row, key: str) -> Cell:
    value = row.settings.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    shown = setting_text(value)
    return Cell(shown, None if value is None else value if is_number else shown)


def _interval(test: Evidence, row: Row) -> Cell:
    interval = test.intervals.get(row.name)
    if interval is None:
        return Cell("-")
    low = interval.perplexity[1]
    return Cell(ends(interval), None if math.isnan(low) else low, interval.missing or "")


def _places(test: Evidence, row: Row) -> Cell:
    rank = test.ranks.get(row.name)
    return Cell("-") if rank is None else Cell(rank, int(rank.split("-")[0]))
