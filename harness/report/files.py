"""The folder report/ of an experiment: the page, every figure, and the table for papers.

report/index.html, report/figures/*.{svg,png}, report/table.{md,tex}; results.csv lies above it
"""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from harness.report import columns, draw, page, setting, sheet
from harness.report.evidence import Findings
from harness.report.figure import Figure
from harness.report.figures import figures
from harness.system import atomic

FOLDER = "report"


def command(folder: Path) -> str:
    """What makes all of this again."""
    return f"harness report {shlex.quote(str(folder))}"


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
    found, made_by = (
        columns.sheet(findings.rows, findings.found.get("test")),
        command(findings.folder),
    )
    line = setting.find(findings.folder, findings.rows).line
    said = "\n".join(f"{note}  " for note in columns.notes(findings.rows))
    for name, text in (
        (
            "table.md",
            f"# {findings.folder.name}\n\n{line}\n\n{sheet.markdown(found)}\n{said}\n\n"
            f"    {made_by}\n",
        ),
        ("table.tex", f"% {made_by}\n% {line}\n{sheet.latex(found)}"),
    ):
        atomic.write_atomically(folder / name, text)
    return _write_page(findings, drawn)


def write_page(findings: Findings, refresh: int | None = None) -> Path:
    """Write the page alone."""
    return _write_page(findings, figures(findings.rows, findings.found), refresh)


def _write_page(findings: Findings, drawn: list[Figure], refresh: int | None = None) -> Path:
    path = findings.folder / FOLDER / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_atomically(path, page.text(findings, drawn, command(findings.folder), refresh))
    return path
