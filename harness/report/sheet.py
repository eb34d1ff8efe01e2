"""A table of a report: its columns and lines, for the terminal, Markdown, LaTeX and the page.

Whatever shows a table takes it from here, so that no place shows other columns than another.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table

CUT = "…"
LEAST_TEXT = 8  # characters to which text is cut, at most, where nothing else makes room


@dataclass(frozen=True)
class Column:
    """A column: where its values come from, what stands above it, and how long it is kept."""

    key: str  # a path in result.json, or the name of what statistics and settings add
    heading: str
    text: bool = False  # to the left, and sorted as text
    keep: int = 0  # of columns that do not fit, those with the highest number are left out
    why: str = ""  # what it says, in a sentence


@dataclass(frozen=True)
class Cell:
    """What a table shows in one place, and the value that the column is sorted by."""

    shown: str
    value: Any = None  # None: nothing is there
    why: str = ""  # a word about this value


@dataclass(frozen=True)
class Sheet:
    """A table for page, terminal and Markdown alike, with its title and its notes."""

    title: str
    columns: list[Column]
    lines: list[list[Cell]]
    notes: list[str] = field(default_factory=list)

    @property
    def headings(self) -> list[str]:
        """What stands above the columns."""
        return [column.heading for column in self.columns]

    @property
    def texts(self) -> list[list[str]]:
        """Return the texts of every line's cells, without what they are sorted by."""
        return [[cell.shown for cell in line] for line in self.lines]

    def only(self, keys: Sequence[str]) -> Sheet:
        """The sheet with these of its columns."""
        kept = [i for i, column in enumerate(self.columns) if column.key in keys]
        lines = [[line[i] for i in kept] for line in self.lines]
        return replace(self, columns=[self.columns[i] for i in kept], lines=lines)


def fitted(sheet: Sheet, width: int) -> tuple[Sheet, list[str]]:
    """The sheet with the columns that fit `width` characters, and the headings of the others.

    Columns leave by their `keep`; those with 0 stay, and their text is cut in the middle where they
    are still too wide.
    """
    kept = list(sheet.columns)
    for column in sorted((c for c in kept if c.keep), key=lambda c: -c.keep):
        if _width(sheet.only([c.key for c in kept])) <= width:
            break
        kept.remove(column)
    narrow = sheet.only([c.key for c in kept])
    sizes = {
        i: max([len(column.heading), *(len(line[i].shown) for line in narrow.lines)])
        for i, column in enumerate(narrow.columns)
    }
    rooms, too_wide = dict(sizes), _width(narrow) - width
    while too_wide > 0:  # a character of whatever text is the widest
        texts = [
            i
            for i, column in enumerate(narrow.columns)
            if column.text and rooms[i] > max(LEAST_TEXT, len(column.heading))
        ]
        if not texts:
            break
        rooms[max(texts, key=rooms.__getitem__)] -= 1
        too_wide -= 1
    for i in (i for i in rooms if rooms[i] < sizes[i]):
        narrow = replace(narrow, lines=[_cut(line, i, rooms[i]) for line in narrow.lines])
    left = [column.heading for column in sheet.columns if column not in kept]
    return narrow, left


def _cut(line: list[Cell], place: int, room: int) -> list[Cell]:
    text = line[place].shown
    if len(text) > room:
        end = (room - 1) // 2
        text = text[: room - 1 - end] + CUT + text[len(text) - end :]
    return [*line[:place], replace(line[place], shown=text), *line[place + 1 :]]


def _width(sheet: Sheet) -> int:
    """How many characters a line of the sheet takes on a terminal."""
    return Console(width=10_000, markup=False).measure(drawn(sheet)).maximum


def drawn(sheet: Sheet) -> Table:
    """Return the table as rich prints it, with numbers at the right of their columns."""
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in sheet.columns:
        justify = "left" if column.text else "right"
        table.add_column(column.heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]  # a Literal
    for line in sheet.texts:
        table.add_row(*line)
    return table


def show(sheet: Sheet, *, wide: bool = False) -> list[str]:
    """Print the sheet, a line a row; returns the headings that had no room.

    `wide` prints every column whatever the terminal's width.
    """
    console = Console(markup=False)  # what stands in brackets is a name's own
    narrow, left = (sheet, []) if wide else fitted(sheet, console.width)
    width = max(console.width, _width(narrow))
    Console(width=width, markup=False).print(drawn(narrow))
    return left


def markdown(sheet: Sheet) -> str:
    """Return the table in Markdown, as GitHub and other pages read it."""
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in sheet.texts]
    rows = [sheet.headings, ["---"] * len(sheet.columns), *escaped]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def latex(sheet: Sheet, caption: str = "", label: str = "", bold: Sequence[int] = ()) -> str:
    """The table for a paper: booktabs, and with a caption a `table` that floats.

    `bold` are the places of the lines that are printed bold.
    """
    rows = []
    for place, line in enumerate(sheet.texts):
        cells = [rf"\textbf{{{_tex(text)}}}" if place in bold else _tex(text) for text in line]
        rows.append(" & ".join(cells) + r" \\")
    columns = "".join("l" if column.text else "r" for column in sheet.columns)
    lines = [
        rf"\begin{{tabular}}{{@{{}}{columns}@{{}}}}",
        r"\toprule",
        " & ".join(map(_tex, sheet.headings)) + r" \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    if caption:
        lines = [
            r"\begin{table}[t]",
            r"\centering\small\setlength{\tabcolsep}{3pt}",
            rf"\caption{{{_tex(caption)}}}",
            rf"\label{{tab:{label}}}",
            *lines,
            r"\end{table}",
        ]
    return "\n".join(["% needs \\usepackage{booktabs}", *lines, ""])


def _tex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {character: f"\\{character}" for character in "&%$#_{}"}
    if text == "-":
        return "--"
    plain = "".join(special.get(character, character) for character in text)
    return re.sub(r"(?<![\d-])([\d.]+)-([\d.]+)(?![\d-])", r"\1--\2", plain)  # from … to
