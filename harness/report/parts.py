"""Parts of a page beside its table: what a search tried, and what training added to weights.

Each is there where its command has left its files in the experiment's folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.report import anatomy, compression, search
from harness.report.figure import Figure
from harness.report.sheet import Sheet
from harness.report.table import Row

KEYS = ("search", "anatomy")  # with which the names of their figures begin


@dataclass(frozen=True)
class Part:
    """A section of the page beside the table of runs: a table and the figures of one question."""

    key: str
    sheet: Sheet | None
    figures: Sequence[Figure]


def find(folder: Path, rows: Sequence[Row]) -> list[Part]:
    """The parts that the folders of an experiment and of its rows have the files of."""
    parts = []
    if (searched := search.find(folder)) is not None:
        parts.append(Part("search", search.sheet(searched), search.figures(searched)))
    summary = anatomy.find(folder, [row.name for row in rows])
    sheet = None if summary is None else anatomy.sheet(summary)
    shares = None if summary is None else anatomy.figure(summary)
    drawn = [*([] if shares is None else [shares]), *compression.figures(rows)]
    if sheet is not None or drawn:
        parts.append(Part("anatomy", sheet, drawn))
    return parts


def figures(folder: Path, rows: Sequence[Row]) -> list[Figure]:
    """Return the figures of all sections of the page, in their order."""
    return [figure for part in find(folder, rows) for figure in part.figures]


def stopped(folder: Path) -> set[str]:
    """Runs that a search has paused and left behind, by the names of their directories."""
    searched = search.find(folder)
    return set() if searched is None else set(searched.trials["run"])
