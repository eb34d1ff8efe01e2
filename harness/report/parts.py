"""Parts of a page beside its table: what a search tried, and what training added to weights.

Each is there where its command has left its files in the experiment's folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.report import anatomy, search
from harness.report.figure import Figure
from harness.report.sheet import Sheet

KEYS = ("search", "anatomy")  # with which the names of their figures begin


@dataclass(frozen=True)
class Part:
    """A section of the page: a table and its figures."""

    key: str
    sheet: Sheet
    figures: Sequence[Figure]


def find(folder: Path) -> list[Part]:
    """The parts that an experiment's folder has the files of."""
    found = []
    if (searched := search.find(folder)) is not None:
        found.append(Part("search", search.sheet(searched), search.figures(searched)))
    if (summary := anatomy.find(folder)) is not None and (sheet := anatomy.sheet(summary)):
        figure = anatomy.figure(summary)
        found.append(Part("anatomy", sheet, [] if figure is None else [figure]))
    return found


def figures(folder: Path) -> list[Figure]:
    """The figures of all parts."""
    return [figure for part in find(folder) for figure in part.figures]


def stopped(folder: Path) -> set[str]:
    """Runs that a search has paused and left behind, by the names of their directories."""
    searched = search.find(folder)
    return set() if searched is None else set(searched.trials["run"])
