"""What a notebook shows: runs as they go, and results as a line, a small table and figures.

Nothing here needs IPython: without a kernel there is no cell to write in, and progress is printed
as on the command line.
"""

from __future__ import annotations

import base64
import html
import io
import math
import os
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from rich.console import Console

from harness.config.errors import ConfigError
from harness.config.run_config import RunConfig
from harness.results import numbers, run_record
from harness.runs import progress

ENDS = 12  # runs that ended last, a line each
FIGURES = 4  # shown in the cell; the page has all of them
STYLE = (
    "<style>.harness td, .harness th {text-align: right; white-space: nowrap; padding: 2px 8px}"
    " .harness .s {text-align: left} .harness img {width: 340px; background: white; margin: 4px}"
    " .harness p {margin: 4px 0}</style>"
)


def has_cell() -> bool:
    """Whether this process is a notebook's kernel, so that there is a cell to show things in."""
    ipython: Any = sys.modules.get("IPython")  # where it is not imported there is no kernel
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def shown(runs: list[RunConfig], *, alone: bool) -> AbstractContextManager[Any]:
    """Show `runs` as they go while its body does them: in the cell, or else as a sweep's lines.

    Outside of a notebook a run that is `alone` has its worker's own bar.
    """
    if has_cell():
        return CellView(runs)
    return nullcontext() if alone else progress.View(runs)


class CellView(progress.View):
    """A sweep's live view, shown in a notebook's cell, with a line for every run that ended.

    What a thread prints need not arrive in the cell; what it updates there does.
    """

    def __init__(self, runs: list[RunConfig]) -> None:
        super().__init__(runs)
        self._console = Console(file=io.StringIO(), width=100, force_jupyter=False)  # nowhere
        self._handle: Any = None
        self._ends: list[str] = []

    def _say(self, seen: Any) -> None:
        seen.said = True
        self._ends.append(f"[{len(self._ends) + 1}/{len(self._seen)}] {seen.name} {seen.line()}")

    def __enter__(self) -> CellView:
        from IPython.display import display

        self._handle = display(self.picture(), display_id=True)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._handle.update(self.picture())

    def _watch(self) -> None:
        while not self._over.wait(progress.PERIOD_SECONDS):
            self._look()
            with suppress(Exception):  # a front end that is gone stops no run
                self._handle.update(self.picture())

    def picture(self) -> Picture:
        """The runs as they are now."""
        rows = []
        for seen in self._seen:
            if seen.status == "running":
                steps = seen.run.train.steps
                rows.append((seen.name, seen.step(), steps, _validation(seen.run.run_dir)))
        with self._console.capture() as text:
            self._console.print(self._picture())
        lines = text.get().rstrip().splitlines()
        heads = [*self._ends[-ENDS:], *lines[: len(lines) - len(rows)]]
        return Picture(heads, rows, "\n".join([*self._ends[-ENDS:], *lines]))


@dataclass(frozen=True)
class Picture:
    """Runs at one moment: counts, and a bar for each that is running."""

    heads: list[str]
    running: list[tuple[str, int, int, str]]  # name, step, steps, the last validation
    text: str

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        parts = [f"<div>{html.escape(line)}</div>" for line in self.heads]
        for name, step, steps, validation in self.running:
            parts.append(
                f'<div><progress value="{step}" max="{max(1, steps)}"></progress> '
                f"{html.escape(name)}: step {step} of {steps}{html.escape(validation)}</div>"
            )
        return "".join(parts)


def _validation(run_dir: Path) -> str:
    """The last validation of a run, in words; "" before the first."""
    rows = [row for row in run_record.read_metrics(run_dir) if row.get("eval/validation/nll")]
    if not rows:
        return ""
    value = math.exp(min(700, rows[-1]["eval/validation/nll"]))
    return f", validation perplexity {numbers.perplexity(value)}"


class Result(dict[str, Any]):
    """A run's result.json; a line where it is shown."""

    def __repr__(self) -> str:
        parts = [f"{run_record.get(self, 'run.name')}: {self.get('status')}"]
        for path, words, form in (
            ("quality.test.perplexity", "test perplexity {}", numbers.perplexity),
            ("quality.classification.test.accuracy", "test accuracy {}", numbers.share),
            ("parameters.trainable", "{} trainable parameters", numbers.count),
            ("memory.peak_bytes", "{} MiB at peak", numbers.mib),
            ("speed.tokens_per_second", "{} tokens/s", numbers.count),
        ):
            if (value := run_record.get(self, path)) is not None:
                parts.append(words.format(form(value)))
        return ", ".join(parts)


@dataclass(frozen=True, repr=False)
class Report:
    """An experiment's table and figures, shown in the cell; as text, the table alone."""

    folder: Path
    headings: list[str]
    lines: list[list[str]]  # cells as text, a line a configuration
    num_text: int  # of the first columns, which are text
    notes: list[str]  # what the table cannot say: runs without a row, refused comparisons
    figures: list[Path] = field(default_factory=list)  # SVG
    page: Path | None = None  # report/index.html

    def __repr__(self) -> str:
        parts = [f"{self.folder}: {len(self.lines)} configuration(s)"]
        if self.lines:
            rows = [self.headings, *self.lines]
            widths = [max(len(row[i]) for row in rows) for i in range(len(self.headings))]
            for row in rows:
                cells = [
                    cell.ljust(width) if i < self.num_text else cell.rjust(width)
                    for i, (cell, width) in enumerate(zip(row, widths, strict=True))
                ]
                parts.append("  ".join(cells).rstrip())
        parts += self.notes
        if self.page:
            parts.append(f"page: {self.page}")
        return "\n".join(parts)

    def _repr_html_(self) -> str:
        def cell(i: int, text: str, tag: str) -> str:
            kind = ' class="s"' if i < self.num_text else ""
            return f"<{tag}{kind}>{html.escape(text)}</{tag}>"

        def line(row: list[str], tag: str) -> str:
            return f"<tr>{''.join(cell(i, text, tag) for i, text in enumerate(row))}</tr>"

        parts = [STYLE, '<div class="harness">']
        if self.lines:
            body = "".join(line(row, "td") for row in self.lines)
            parts.append(
                f"<table><thead>{line(self.headings, 'th')}</thead><tbody>{body}</tbody></table>"
            )
        parts += [f"<p>{html.escape(note)}</p>" for note in self.notes]
        for path in self.figures[:FIGURES]:
            data = base64.b64encode(path.read_bytes()).decode()
            name = html.escape(path.stem)
            parts.append(f'<img alt="{name}" src="data:image/svg+xml;base64,{data}">')
        if self.page:
            link = html.escape(os.path.relpath(self.page))
            more = len(self.figures) - FIGURES
            also = f" ({more} more figures)" if more > 0 else ""
            parts.append(f'<p><a href="{link}" target="_blank">the page</a>{also}: {link}</p>')
        return "".join([*parts, "</div>"])


def report(folder: Path, run_dirs: list[Path] | None = None) -> Report:
    """The report of an experiment, or of the last sweep into it, whose runs are `run_dirs`.

    The page and the figures are made by `harness report` in a process of its own: matplotlib's
    settings in this one are the user's.

    Raises:
        ConfigError: there is no run in the folder.
    """
    from harness.report import columns, evidence, missing

    results = evidence.find(folder, run_dirs)
    left = [f"{run.status}: {run.name} ({run})" for run in missing.find(results)]
    if not results.rows and not left:
        raise ConfigError(f"{folder}: no run; outputs/<experiment_name> has an experiment")
    notes = [*evidence.not_compared(results), *left]
    test = results.found.get("test")
    if test is not None:
        notes = [*evidence.scope(test), *notes]
    sheet = columns.sheet(results.rows, test)
    num_text = len([*takewhile(lambda column: column.text, sheet.columns)])
    page, figures = folder / "report" / "index.html", []
    if results.rows:
        last = [] if run_dirs is None else ["--last"]
        process = subprocess.run(
            [sys.executable, "-m", "harness.report", *last, str(folder)],
            capture_output=True, text=True,
        )  # fmt: skip
        if process.returncode not in (0, 2) or not page.is_file():
            message = (process.stderr.strip().splitlines() or ["unknown"])[-1]
            notes.append(f"the page was not made: {message}")
        else:
            figures = sorted((page.parent / "figures").glob("*.svg"))
    existing_page = page if figures or page.is_file() else None
    return Report(folder, sheet.headings, sheet.texts, num_text, notes, figures, existing_page)
