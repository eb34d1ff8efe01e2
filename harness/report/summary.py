"""A folder's results on the terminal, and results.csv, comparisons.csv and curves.csv in it."""

from __future__ import annotations

import csv
import io
import math
import shlex
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from harness import results, stats
from harness.console import reason
from harness.report import evidence as ev
from harness.report import missing, table, views
from harness.report.evidence import Evidence, Findings
from harness.report.table import Row

NOT_APART = 6  # pairs named on the terminal; all are in comparisons.csv
UNITS = {"peak memory": 2**20}  # MiB
CSVS = ("results.csv", "comparisons.csv", "curves.csv")


def show(folder: Path, run_dirs: Sequence[Path] | None = None) -> None:
    """Print the table of `folder`, or of the configurations of `run_dirs`, and write the CSVs."""
    tell(ev.find(folder, run_dirs), run_dirs)


def tell(findings: Findings, run_dirs: Sequence[Path] | None = None, *, full: bool = False) -> None:
    """Print what was found and write the CSVs, which hold every finished configuration.

    `full` adds the comparisons, equal budgets, learning curves and forgetting.
    """
    folder, rows, found = findings.folder, findings.rows, findings.found
    everything = findings if rows == findings.everything else ev.find(folder)
    saved = _save(everything) if everything.rows else []
    test = found.get("test")
    if rows:
        table.print_rows(rows, beside(test))
        if test is not None:
            _print_claims(rows, test)
        for reason in findings.refused:
            print(f"no intervals, ranks or comparisons {reason}")
        if full:
            _print_more(rows, found)
    else:
        print(f"\n{folder}: no finished run")
    for run in missing.find(findings):
        if run_dirs is None or folder / run.name in run_dirs:
            log = f" (log: {folder / run.name / 'log.txt'})" if run.log else ""
            print(f"{run.status}: {run.name} ({run}){log}")
    if saved:
        print(f"saved in {folder}: {', '.join(saved)}; one directory per run beside them")
    more = "again" if full else "as a page, with comparisons, equal budgets and learning curves"
    print(f"{more}: python -m harness.report {shlex.quote(str(folder))}")


# ------------------------------------------------------------------------------- beside the table


def beside(test: Evidence | None) -> dict[str, dict[str, str]]:
    """The columns that statistics add to the table."""
    if test is None:
        return {}
    columns = {"95 %": {name: ends(i) for name, i in test.intervals.items()}}
    return columns | ({"rank": test.ranks} if len(test.ranks) > 1 else {})  # one has no rank


def ends(i: stats.Interval) -> str:
    """An interval of perplexity in three digits; - where there is none."""
    if i.missing:
        return "-"
    return "-".join(f"{v:.0f}" if v >= 100 else f"{v:.1f}" for v in i.perplexity[1:])


def _print_claims(rows: Sequence[Row], test: Evidence) -> None:
    """What the intervals cover, which pairs are not told apart, and who is on which front."""
    for sentence in ev.scope(test):
        print(textwrap.fill(sentence, 100))
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
    for title, dominated in ev.fronts(rows, test).items():
        on = [name for name in test.ordered if not dominated.get(name, ("",))]
        if any(ev.costs(rows, title).values()):  # or nothing costs anything
            lines.append(f"  {title}{_mark(rows, title)}: {', '.join(on)}")
    if lines:
        print("Pareto fronts (off them: something that costs no more is significantly better):")
        print("\n".join(lines))
        if said := ev.time_scope(rows):
            print(textwrap.fill(said, 100))


def _mark(rows: Sequence[Row], title: str) -> str:
    """A star where sharing the machine can have moved the numbers."""
    shared = any(row.values[table.SHARED] for row in rows)
    return "*" if shared and title != "trainable parameters" else ""


# ------------------------------------------------------------------------------- the full report


def _print_more(rows: Sequence[Row], found: dict[str, Evidence]) -> None:
    test = found.get("test")
    if test is not None and test.comparisons:
        _print_neighbours(test)
        if test.ranks:
            _print_budgets(rows, test)
    _print_curves(rows)
    for text, on in found.items():
        if text != "test":
            _print_forgetting(rows, on)


def _print_neighbours(test: Evidence) -> None:
    print("\nEach configuration and the next best: difference of log-perplexity, nats per token")
    shown = table.plain(
        ["configuration", "less the next best"],
        ["difference", "95 %", "p", "p (Holm)", "detectable"],
    )
    for c in test.neighbours():
        numbers = [f"{c.difference:.4f}", f"{c.low:.4f} to {c.high:.4f}"]
        numbers += [f"{c.p:.2g}", f"{c.adjusted_p:.2g}", f"{ev.detectable(test, c):.4f}"]
        shown.add_row(c.a, c.b, *numbers)
    table.show(shown)
    print(
        f"Holm over all {len(test.comparisons)} pairs. detectable: the smallest difference that\n"
        "this design finds with 80 % power if it is the clearest of them."
    )


def _print_budgets(rows: Sequence[Row], test: Evidence) -> None:
    shown = table.plain([], ["at most"], ["of", "best", "test", "95 %", "not significantly worse"])
    matched: list[str] = []
    for title in ev.COST_PATHS:
        shown_rows = [row for row in rows if row.name in test.intervals]
        costs = ev.sure_costs(shown_rows, title)
        mark, last = _mark(rows, title), None
        for budget in views.budgets(list(costs.values()), UNITS.get(title, 1)):
            found = views.within(budget, costs, test)
            if found is None or found == last:
                continue  # a larger budget that buys nothing
            last = (best, ties) = found
            i = test.intervals[best]
            cells = [_cost(title, budget), title + mark, best, f"{i.perplexity[0]:.2f}", ends(i)]
            shown.add_row(*cells, ev.some(ties) or "-")
        exact = {n: c for n, c in ev.costs(shown_rows, title).items() if n in costs}
        pairs = views.matched(exact, test.comparisons)
        for c in pairs[:NOT_APART]:
            better = f"{c.better} is better" if c.better else "not told apart"
            matched.append(
                f"  {title}{mark}: {c.a} and {c.b}, {abs(c.difference):.4f} nats, {better}"
            )
        if len(pairs) > NOT_APART:
            matched.append(f"  {title}{mark}: and {len(pairs) - NOT_APART} more pairs")
    if shown.row_count:
        print("\nThe best within a budget")
        table.show(shown)
    if matched:
        print("Pairs of equal cost (within 5 %):", *matched, sep="\n")


def _cost(title: str, value: float) -> str:
    if title == "peak memory":
        return f"{value / 2**20:,.0f} MiB"
    return f"{value:,.3g} s" if title == "training time" else f"{value:,.0f}"


def _print_curves(rows: Sequence[Row]) -> None:
    curves = _curves(rows)
    if not curves:
        return
    levels = views.levels(curves)
    tokens, seconds = (views.equal(curves, axis) for axis in ("tokens", "seconds"))
    mark = _mark(rows, "training time")
    headings = [f"{t:,.0f} tokens" for t in tokens] + [f"{s:,.3g} s{mark}" for s in seconds]
    shown = table.plain(
        ["configuration"], [*headings, *(f"steps to {level:g}" for level in levels)]
    )
    for c in curves:
        cells = []
        for axis, values in (("tokens", tokens), ("seconds", seconds)):
            for value in values:
                found = c.at(axis, value)
                cells.append("-" if found is None else _perplexity(*found))
        for level in levels:
            cells.append(_steps(c.brackets(math.log(level))))
        shown.add_row(c.name, *cells)
    print(
        "\nValidation perplexity at equal tokens and equal training time, and steps to a perplexity"
    )
    table.show(shown)
    print(
        "Perplexity is interpolated between validations; ± is half of a 95 % t-interval over "
        "seeds.\nSteps are from the last validation above the level to the first one at or under "
        "it, and\nwiden by the spread over seeds; - where a seed does not get there. A run cut "
        "short is no\nshort run: schedules are for all steps."
    )


def _curves(rows: Iterable[Row]) -> list[views.Curve]:
    trained = (row for row in rows if row.values["parameters.trainable"])
    return [c for row in trained if (c := views.curve(row)) is not None]


def _perplexity(nll: float, half: float | None) -> str:
    value = views.perplexity(nll)
    return f"{value:.2f}" + ("" if half is None else f" ± {value * half:.2g}")


def _steps(found: Sequence[views.Bracket | None]) -> str:
    reached = [bracket for bracket in found if bracket is not None]
    if not reached or len(reached) < len(found):
        return "-"
    low, high = views.steps_interval(reached)
    return f"{low:.0f}-{high:.0f}"


def _print_forgetting(rows: Sequence[Row], on: Evidence) -> None:
    moved, since = ev.forgetting(rows, on)
    before = ev.before(rows, on)
    count = next(iter(on.intervals.values())).num_documents
    print(f"\nForgetting: perplexity on {on.text} ({count} documents) before and after adaptation")
    shown = table.plain(
        ["configuration"],
        ["before", "after", "95 %", "rank", "nats forgotten", "of these 95 %", "p (Holm)"],
    )
    for name in on.ordered:
        i, c = on.intervals[name], moved.get(name)
        cells = [f"{before[name].perplexity[0]:.2f}", f"{i.perplexity[0]:.2f}", ends(i)]
        cells.append(on.ranks.get(name, "-"))
        if c is not None and not c.same:
            cells += [f"{c.difference:.4f}", f"{c.low:.4f} to {c.high:.4f}", f"{c.adjusted_p:.2g}"]
        else:
            cells += ["0", "-", "-"]
        shown.add_row(name, *cells)
    table.show(shown)
    print(f"nats forgotten: per token, since {since}. rank: as above, on this text.")


# ------------------------------------------------------------------------------------- the files


def _save(findings: Findings) -> list[str]:
    """Write the CSVs of all rows; returns their names. What cannot be said now is deleted."""
    found = findings.found
    files = {"results.csv": results_csv(findings)}
    if found:
        files["comparisons.csv"] = _csv(_comparisons(found))
    if curves := _curves(findings.rows):
        files["curves.csv"] = _csv(_points(curves))
    try:
        for name in CSVS:
            if name in files:  # another controller may write it, too
                results.write_atomically(findings.folder / name, files[name])
            else:
                (findings.folder / name).unlink(missing_ok=True)
    except OSError as error:
        print(f"not saved: {findings.folder / 'results.csv'}: {reason(error)}", file=sys.stderr)
        return []
    return list(files)


def results_csv(findings: Findings) -> str:
    """The text of results.csv."""
    return table.csv_text(findings.rows, _columns(findings.found))


def results_lines(findings: Findings) -> tuple[list[str], list[list[Any]]]:
    """The columns of results.csv and its lines, as values."""
    return table.csv_lines(findings.rows, _columns(findings.found))


def _columns(found: dict[str, Evidence]) -> dict[str, dict[str, Any]]:
    """Columns of results.csv: interval, rank and, on further texts, perplexity after adaptation."""
    columns: dict[str, dict[str, Any]] = {}
    for text, evidence in found.items():
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
    return columns


def _comparisons(found: dict[str, Evidence]) -> Iterable[dict[str, Any]]:
    for text, evidence in found.items():
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
