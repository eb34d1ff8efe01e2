"""A folder's results on the terminal, and results.csv, comparisons.csv and curves.csv in it."""

from __future__ import annotations

import csv
import io
import shlex
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from harness.report import (
    answer,
    choices,
    columns,
    costs,
    missing,
    requested,
    setting,
    sheet,
    sheets,
    table,
    views,
)
from harness.report import evidence as ev
from harness.report.evidence import Evidence, Findings
from harness.report.requested import Found
from harness.report.table import Row
from harness.system import atomic
from harness.system.console import reason

NOT_APART = 6  # pairs named on the terminal; all are in comparisons.csv
CSVS = ("results.csv", "comparisons.csv", "curves.csv")


def show(folder: Path, run_dirs: Sequence[Path] | None = None) -> None:
    """Print the table of `folder`, or of `run_dirs` in it alone, and write the CSVs."""
    tell(ev.find(folder, run_dirs))


def tell(
    findings: Findings,
    *,
    full: bool = False,
    wide: bool = False,
) -> None:
    """Print what was found and write the CSVs, which hold every finished configuration.

    First comes what was run, the answer in words and which configuration to take, then the table.
    `full` adds the comparisons, equal budgets, learning curves and forgetting; `wide` prints every
    column whatever the terminal's width.
    """
    folder, rows, by_text = findings.folder, findings.rows, findings.found
    further = requested.find(findings)
    titles = list(dict.fromkeys([*ev.BUDGETS, *further.titles]))
    everything = findings
    if rows != findings.everything:
        everything = ev.find(folder, requested=findings.requested)
    saved = _save(everything) if everything.rows else []
    if rows:
        _print_first(findings, further, wide=wide)
        left = _print_table(findings, further, wide=wide)
        if full:
            for extra_table in sheets.further(rows, by_text, titles):
                print(f"\n{extra_table.title}")
                left |= bool(sheet.show(extra_table, wide=wide))
                _print_notes(extra_table.notes)
        if left:
            print(f"every column: {command(findings, '--wide')}")
    else:
        print(f"\n{folder}: no finished run")
    for run in missing.find(findings):
        log = f" (log: {folder / run.name / 'log.txt'})" if run.log else ""
        print(f"{run.status}: {run.name} ({run}){log}")
    if saved:
        print(f"saved in {folder}: {', '.join(saved)}; one directory per run beside them")
    more = "again" if full else "as a page, with comparisons, equal budgets and learning curves"
    print(f"{more}: {command(findings)}")


def command(findings: Findings, *options: str) -> str:
    """Return the command that makes the report of these runs again."""
    last = findings.run_dirs is not None and findings.rows != findings.everything
    if last and set(setting.last_sweep(findings.folder)) == findings.run_dirs:
        options = ("--last", *options)
    if findings.requested:
        options = (*options, "--columns", ",".join(findings.requested))
    return shlex.join(["harness", "report", *options, str(findings.folder)])


def _print_first(findings: Findings, further: Found, *, wide: bool) -> None:
    """The title, what was run, the answer in words, and which configuration to take."""
    rows, test = findings.rows, findings.found.get("test")
    title = findings.folder.name
    question = answer.question(title, rows)
    print(f"\n{title}: {question}" if question else f"\n{title}")
    found_setting = setting.find(findings.folder, rows)
    print(found_setting.line)
    if found_setting.scope:
        _print_notes([found_setting.scope])
    if conclusion := answer.answer(rows, test):
        print()
        _print_notes([conclusion])
    if test is None:
        return
    choice_table = choices.sheet(rows, test, choices.FEW_BUDGETS, further.titles)
    if choice_table is not None:
        print(f"\n{choice_table.title}")
        sheet.show(choice_table, wide=wide)


def _print_table(findings: Findings, further: Found, *, wide: bool) -> bool:
    """The table of results, what its signs say and what it can claim; whether columns are left."""
    rows, test = findings.rows, findings.found.get("test")
    print()
    results = columns.sheet(rows, test, further)
    left = sheet.show(results, wide=wide)
    shown = [heading for heading in results.headings if heading not in left]
    _print_notes([*columns.notes(rows, shown), *further.notes(), *ev.not_compared(findings)])
    if left:
        print(f"not shown: {', '.join(left)}")
    if test is not None:
        _print_claims(rows, test, further.titles)
    return bool(left)


def _print_notes(notes: Iterable[str]) -> None:
    width = min(100, Console().width)
    for note in notes:
        print(textwrap.fill(note, width, break_long_words=False, break_on_hyphens=False))


def _print_claims(rows: Sequence[Row], test: Evidence, further: Sequence[str]) -> None:
    """What the intervals cover, which pairs are not told apart, and the Pareto fronts."""
    _print_notes(ev.scope(test))
    if len(test.intervals) == 1:
        return
    apart = [c for c in test.comparisons if c.better is None]
    named = "; ".join(
        f"{c.a} and {c.b}" + (" (the same to rounding)" if c.same else "")
        for c in apart[:NOT_APART]
    )
    more = f"; and {len(apart) - NOT_APART} more pairs" if len(apart) > NOT_APART else ""
    print(f"not told apart: {named + more if apart else 'none, every pair differs significantly'}")
    if not test.ranks:
        return
    lines = []
    titles = list(dict.fromkeys([*costs.FRONTS, *further]))
    for title, dominated in ev.fronts(rows, test, titles).items():
        on = [name for name in test.ordered if not dominated.get(name, ("",))]
        if any(ev.costs(rows, title).values()):  # or nothing costs anything
            lines.append(f"  {_named(title)}: {', '.join(on)}")
    if lines:
        print("Best for their cost (no row that costs as much or less is significantly better):")
        print("\n".join(lines))
        measured = [title for title in titles if costs.of(title).measured]
        _print_notes(text for title in measured if (text := ev.time_scope(rows, title)))


def _named(title: str) -> str:
    """A cost's title; of latency, which is asked for by its name, what that says."""
    return costs.of(title).short if costs.latency_path(title) else title


# ------------------------------------------------------------------------------------- the files


def _save(findings: Findings) -> list[str]:
    """Write the CSVs of all rows; returns their names. What cannot be said now is deleted."""
    by_text = findings.found
    files = {"results.csv": results_csv(findings)}
    if by_text:
        files["comparisons.csv"] = _csv(_comparisons(by_text))
    if curves := sheets.curves(findings.rows):
        files["curves.csv"] = _csv(_points(curves))
    try:
        for name in CSVS:
            if name in files:  # another controller may write it, too
                atomic.write_atomically(findings.folder / name, files[name])
            else:
                (findings.folder / name).unlink(missing_ok=True)
    except OSError as error:
        print(f"not saved: {findings.folder / 'results.csv'}: {reason(error)}", file=sys.stderr)
        return []
    return list(files)


def results_csv(findings: Findings) -> str:
    """Return the text of results.csv: a line for every row, in full precision."""
    return table.csv_text(findings.rows, _columns(findings))


def results_lines(findings: Findings) -> tuple[list[str], list[list[Any]]]:
    """The columns of results.csv and its lines, as values."""
    return table.csv_lines(findings.rows, _columns(findings))


def _columns(findings: Findings) -> dict[str, Mapping[str, Any]]:
    """Columns of results.csv: interval, rank and, on further texts, perplexity after adaptation.

    And those that were asked for.
    """
    columns: dict[str, Mapping[str, Any]] = {}
    for text, evidence in findings.found.items():
        prefix = "quality.test" if text == "test" else f"quality.also.{text}.after"
        values = {name: i.perplexity for name, i in evidence.intervals.items()}
        if text != "test":
            columns[f"{prefix}.perplexity"] = {name: value[0] for name, value in values.items()}
        for end, place in (("low", 1), ("high", 2)):
            columns[f"{prefix}.perplexity_{end}"] = {
                name: value[place] for name, value in values.items() if value[place] == value[place]
            }
        if why := {i.name: i.missing for i in evidence.intervals.values() if i.missing}:
            columns[f"{prefix}.no_interval"] = why
        columns[f"{prefix}.varies_over"] = {n: i.varies_over for n, i in evidence.intervals.items()}
        columns[f"{prefix}.rank"] = dict(evidence.ranks)
    return columns | requested.find(findings).csv()


def _comparisons(by_text: dict[str, Evidence]) -> Iterable[dict[str, Any]]:
    for text, evidence in by_text.items():
        for c in evidence.comparisons:
            yield {
                "text": text,
                "a": c.a,
                "b": c.b,
                "difference_nats_per_token": c.difference,
                "low": c.low,
                "high": c.high,
                "p": c.p,
                "p_holm": c.adjusted_p,
                "better": c.better or "",
                "paired_seeds": c.paired_seeds,
                "varies_over": c.varies_over,
                "variance_seeds": c.components.seeds,
                "variance_documents": c.components.documents,
                "warning": c.warning or "",
            }


def _points(curves: Iterable[views.Curve]) -> Iterable[dict[str, Any]]:
    for c in curves:
        for p, step in enumerate(c.steps):
            yield {
                "name": c.name,
                "step": int(step),
                "tokens": int(c.tokens[p]),
                "seconds": float(c.seconds[:, p].mean()),
                "train_flops": "" if c.flops is None else float(c.flops[p]),
                "validation_nll": float(c.nll[:, p].mean()),
                "validation_nll_low": float(c.nll[:, p].min()),
                "validation_nll_high": float(c.nll[:, p].max()),
                "seeds": len(c.nll),
            }


def _csv(lines: Iterable[dict[str, Any]]) -> str:
    stream = io.StringIO(newline="")
    writer: csv.DictWriter[str] | None = None
    for line in lines:
        if writer is None:
            writer = csv.DictWriter(stream, list(line))
            writer.writeheader()
        writer.writerow(line)
    return stream.getvalue()
