"""The folder report/ of an experiment: the page, every figure, and the table for papers.

report/index.html, report/figures/*.{svg,pdf,png}, report/table.{md,tex}; results.csv lies above it
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from harness.report import (
    choices,
    columns,
    comparable,
    draw,
    evidence,
    page,
    parts,
    requested,
    setting,
    sheet,
)
from harness.report.evidence import Findings
from harness.report.figure import Figure
from harness.report.figures import figures
from harness.report.summary import command
from harness.report.table import headings
from harness.system import atomic

FOLDER = "report"


def write(findings: Findings) -> Path:
    """Write page, tables and figures into the folder; returns the path of the page."""
    folder = findings.folder / FOLDER
    scratch = folder / ".figures"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    drawn = _drawn(findings)
    for figure in drawn:
        draw.draw(figure, scratch, command(findings))
    shutil.rmtree(folder / "figures", ignore_errors=True)  # a figure that is no more is not there
    scratch.rename(folder / "figures")
    further, made_by = requested.find(findings), command(findings)
    table = columns.sheet(findings.rows, findings.found.get("test"), further)
    line = setting.find(findings.folder, findings.rows).line
    notes = "\n".join(
        f"{note}  "
        for note in [
            *columns.notes(findings.rows, table.headings),
            *further.notes(),
            *evidence.not_compared(findings),
        ]
    )
    for name, text in (
        (
            "table.md",
            f"# {findings.folder.name}\n\n{line}\n\n{sheet.markdown(table)}\n{notes}\n\n"
            f"    {made_by}\n",
        ),
        ("table.tex", f"% {made_by}\n% {line}\n{_paper(findings, table)}"),
    ):
        atomic.write_atomically(folder / name, text)
    return _write_page(findings, drawn)


# Columns of the table for a paper, which fits a column of a two-column page; also what was varied.
OF_A_PAPER = (
    "method.label", "method.targets", "method.rank", "parameters.trainable_percent",
    "memory.peak_bytes", "quality.test.perplexity", "quality.test.interval",
)  # fmt: skip
UNITS = {
    "parameters.trainable_percent": "% trained", "memory.peak_bytes": "peak, MiB",
    "quality.test.perplexity": "perplexity", "quality.test.interval": "95 % interval",
}  # fmt: skip


def _paper(findings: Findings, table: sheet.Sheet) -> str:
    """The table for a paper: its main columns, and bold what is not told apart from the best."""
    test = findings.found.get("test")
    requested_keys = [column.key for column in requested.find(findings).columns]
    kept = [
        *OF_A_PAPER,
        *columns.telling_of(findings.rows),
        *headings(findings.rows),
        *requested_keys,
    ]
    own = table.only(kept)
    shown = [replace(c, heading=UNITS.get(c.key, c.heading)) for c in own.columns]
    best = [
        place
        for place, row in enumerate(findings.rows)
        if test is not None and row.name in test.intervals and choices.ties_best(row.name, test)
    ]
    facts = setting.find(findings.folder, findings.rows).facts
    caption = f"Test perplexity per token. {'; '.join(facts)}."
    if test is not None and len(test.intervals) > 1:
        ties = ", and rows that are not significantly higher" if test.num_seeds[0] != 2 else ""
        caption += f" Bold: the lowest{ties}."
    if test is not None and test.apart:
        caption += f" {comparable.SIGN}: evaluated in another way, and not compared."
    return sheet.latex(replace(own, columns=shown), caption, findings.folder.name, best)


def write_page(findings: Findings, refresh: int | None = None) -> Path:
    """Write the page alone, without tables and figures as files of their own."""
    return _write_page(findings, _drawn(findings), refresh)


def _drawn(findings: Findings) -> list[Figure]:
    """Every figure: of the rows, and of what else lies in the folder."""
    titles = requested.find(findings).titles
    return figures(findings.rows, findings.found, titles) + parts.figures(
        findings.folder, findings.rows
    )


def _write_page(findings: Findings, drawn: list[Figure], refresh: int | None = None) -> Path:
    path = findings.folder / FOLDER / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_atomically(path, page.text(findings, drawn, command(findings), refresh))
    return path
