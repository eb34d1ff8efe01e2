"""The folder report/ of an experiment: the page, every figure, and the table for papers.

report/index.html, report/figures/*.{svg,png}, report/table.{md,tex}; results.csv lies above it
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from harness import results
from harness.report import draw, page, summary, table
from harness.report.evidence import Findings
from harness.report.figures import Figure, figures

FOLDER = "report"


def command(folder: Path) -> str:
    """What makes all of this again."""
    return f"python -m harness.report {shlex.quote(str(folder))}"


def write(findings: Findings) -> Path:
    """Write everything; returns the page's path."""
    folder = findings.folder / FOLDER
    scratch = folder / ".figures"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    drawn = figures(findings.rows, findings.found)
    for figure in drawn:
        draw.draw(figure, scratch, command(findings.folder))
    shutil.rmtree(folder / "figures", ignore_errors=True)  # a figure that is no more is not there
    scratch.rename(folder / "figures")
    headings, lines = table.lines(findings.rows, summary.beside(findings.found.get("test")))
    for name, text in (
        ("table.md", f"{markdown(headings, lines)}\n    {command(findings.folder)}\n"),
        ("table.tex", f"% {command(findings.folder)}\n{latex(headings, lines)}"),
    ):
        results.write_atomically(folder / name, text)
    return _write_page(findings, drawn)


def write_page(findings: Findings, refresh: int | None = None) -> Path:
    """Write the page alone."""
    return _write_page(findings, figures(findings.rows, findings.found), refresh)


def _write_page(findings: Findings, drawn: list[Figure], refresh: int | None = None) -> Path:
    path = findings.folder / FOLDER / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    results.write_atomically(path, page.text(findings, drawn, command(findings.folder), refresh))
    return path


def markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """The table as GitHub and others read it."""
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    rows = [list(headings), ["---"] * len(headings), *escaped]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def latex(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """The table for a paper, with booktabs."""
    rows = [" & ".join(map(_tex, line)) + r" \\" for line in lines]
    columns = "l" * table.NUM_TEXT + "r" * (len(headings) - table.NUM_TEXT)
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(map(_tex, headings)) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _tex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {character: f"\\{character}" for character in "&%$#_{}"}
    if text == "-":
        return "--"
    plain = "".join(special.get(character, character) for character in text)
    return re.sub(r"(?<=\d)-(?=\d)", "--", plain)  # from … to
