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

from harness import results
from harness.config import ConfigError
from harness.report import evidence as ev
from harness.report import table, views
from harness.report.evidence import Evidence
from harness.report.table import Row

NOT_APART = 6  # pairs named on the terminal; all are in comparisons.csv


def show(folder: Path, run_dirs: Sequence[Path] | None = None, *, full: bool = False) -> bool:
    """Print the table of `folder`, or of the configurations of `run_dirs`, and write the CSVs.

    `full` adds the comparisons, equal budgets, learning curves and forgetting. The CSVs always hold
    every finished configuration of the folder. Returns whether the runs could be compared.
    """
    everything = table.rows(folder)
    asked = [row for row in everything if run_dirs is None or set(row.run_dirs) & set(run_dirs)]
    refused = None
    found: dict[str, Evidence] = {}
    try:
        for text in ["test", *ev.also(asked)]:
            if (evidence := ev.gather(asked, text)) is not None:
                found[text] = evidence
    except ConfigError as error:
        refused, found = str(error), {}
    test = found.get("test")
    if asked:
        table.print_rows(asked, _beside(test))
        if test is not None:
            _print_claims(asked, test)
        if refused:
            print(f"no intervals, ranks or comparisons: {refused}")
        if full and test is not None:
            _print_more(asked, found)
    else:
        print(f"\n{folder}: no finished run")
    for run_dir, result in results.collect(folder):
        if result["status"] != "finished" and (run_dirs is None or run_dir in run_dirs):
            failure = result.get("failure") or {}
            said = (failure.get("message") or "").splitlines()
            print(
                f"{result['status']}: {run_dir.name} ({failure.get('class')}): "
                f"{said[0] if said else ''} (log: {run_dir / 'log.txt'})"
            )
    if everything:
        _save(folder, everything, found if len(asked) == len(everything) else None)
    more = "again" if full else "again, with comparisons, equal budgets and learning curves"
    print(f"{more}: python -m harness.report {shlex.quote(str(folder))}")
    return refused is None


# ------------------------------------------------------------------------------- beside the table


def _beside(test: Evidence | None) -> dict[str, dict[str, str]]:
    """The columns that statistics add to the table."""
    if test is None:
        return {}
    columns = {"95 %": {name: _interval(i) for name, i in test.intervals.items()}}
    return columns | ({"rank": test.ranks} if len(test.ranks) > 1 else {})


def _interval(i: Any) -> str:
    _, low, high = i.perplexity
    return f"{_short(low)}-{_short(high)}"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _print_claims(rows: Sequence[Row], test: Evidence) -> None:
    """What the intervals cover, which pairs are not told apart, and who is on which front."""
    documents = next(iter(test.intervals.values())).num_documents
    seeds = test.num_seeds
    over = f"{documents} documents" + (f" and {seeds} seeds" if seeds > 1 else "")
    print(f"95 %: interval of test perplexity over {over}; untrained models: over documents only.")
    if seeds == 1:
        print(
            "ONE SEED: intervals and ranks are over documents alone; another seed may move every\n"
            "row that trains, and close pairs are not told apart by one."
        )
    if len(test.intervals) == 1:
        return
    m = len(test.comparisons)
    print(f"rank: places a configuration may have, by {m} paired tests at 5 % (Holm).")
    if seeds > 1 and (said := ev.stats.few_seeds(seeds, m)):
        print(textwrap.fill(f"{said}.", 100))
    apart = [c for c in test.comparisons if c.better is None]
    named = "; ".join(f"{c.a} and {c.b}" for c in apart[:NOT_APART])
    more = f"; and {len(apart) - NOT_APART} more pairs" if len(apart) > NOT_APART else ""
    print(f"not told apart: {named + more if apart else 'none, every pair differs significantly'}")
    print("Pareto fronts (off them: something that costs no more is significantly better):")
    shared = any(row.values[table.SHARED] for row in rows)
    for title, dominated in ev.fronts(rows, test).items():
        on = [name for name in test.ordered if not dominated[name]]
        mark = "*" if shared and title != "trainable parameters" else ""
        print(f"  {title}{mark}: {', '.join(on)}")


# ------------------------------------------------------------------------------- the full report


def _print_more(rows: Sequence[Row], found: dict[str, Evidence]) -> None:
    test = found["test"]
    if test.comparisons:
        _print_neighbours(test)
        _print_budgets(rows, test)
    _print_curves(rows)
    for text in found:
        if text != "test":
            _print_forgetting(rows, found[text])


def _print_neighbours(test: Evidence) -> None:
    print("\nEach configuration and the next best: difference of log-perplexity, nats per token")
    shown = table.plain(
        {"configuration": "left", "less the next best": "left"}
        | dict.fromkeys(["difference", "95 %", "p", "p (Holm)", "detectable"], "right")
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
    shown = table.plain(
        {"at most": "right", "": "left", "best": "left", "test": "right", "95 %": "right"}
        | {"not significantly worse": "left"}
    )
    matched: list[str] = []
    for title, path in ev.COSTS.items():
        costs = {r.name: r.values[path] for r in rows if r.values[path] is not None}
        last = None
        for budget in views.budgets(list(costs.values())):
            found = views.within(budget, costs, test)
            if found is None or found == last:
                continue  # a larger budget that buys nothing
            last = (best, ties) = found
            _, low, high = test.intervals[best].perplexity
            perplexity = f"{test.intervals[best].perplexity[0]:.2f}"
            cells = [_cost(title, budget), title, best, perplexity]
            shown.add_row(*cells, f"{_short(low)}-{_short(high)}", ", ".join(ties) or "-")
        if title == "trainable parameters":
            for c in views.matched(costs, test.comparisons):
                better = f"{c.better} is better" if c.better else "not told apart"
                matched.append(f"  {c.a} and {c.b}: {abs(c.difference):.4f} nats, {better}")
    print("\nThe best within a budget")
    table.show(shown)
    if matched:
        print("Equal trainable parameters (within 5 %):", *matched, sep="\n")


def _cost(title: str, value: float) -> str:
    if title == "peak memory":
        return f"{value / 2**20:,.0f} MiB"
    return f"{value:,.0f} s" if title == "training time" else f"{value:,.0f}"


def _print_curves(rows: Sequence[Row]) -> None:
    curves = [c for row in rows if _trains(row) and (c := views.curve(row)) is not None]
    if not curves:
        return
    levels = views.levels(curves)
    tokens, seconds = (views.equal(curves, axis) for axis in ("tokens", "seconds"))
    headings = [f"{t / 1000:,.0f}k tokens" for t in tokens] + [f"{s:,.1f} s" for s in seconds]
    headings += [f"steps to {level:g}" for level in levels]
    shown = table.plain({"configuration": "left"} | dict.fromkeys(headings, "right"))
    for c in curves:
        cells = []
        for axis, values in (("tokens", tokens), ("seconds", seconds)):
            for value in values:
                nll = c.at(axis, value)
                cells.append("-" if nll is None else f"{math.exp(nll):.2f}")
        for level in levels:
            cells.append(_steps(c.steps_to(math.log(level))))
        shown.add_row(c.name, *cells)
    print(
        "\nValidation perplexity at equal tokens and equal training time, and steps to a perplexity"
    )
    table.show(shown)
    print(
        "Interpolated between validations; steps are the range over seeds, - where not all get\n"
        "there. A run cut short is no short run: schedules of the rate are for the full length."
    )


def _steps(found: Sequence[float | None]) -> str:
    reached = [step for step in found if step is not None]
    if len(reached) < len(found):
        return "-"
    low, high = round(min(reached)), round(max(reached))
    return f"{low}" if low == high else f"{low}-{high}"


def _trains(row: Row) -> bool:
    return bool(row.values["parameters.trainable"])


def _print_forgetting(rows: Sequence[Row], on: Evidence) -> None:
    moved, since = ev.forgetting(rows, on)
    count = next(iter(on.intervals.values())).num_documents
    print(f"\nForgetting: perplexity on {on.text} ({count} documents) before and after adaptation")
    shown = table.plain(
        {"configuration": "left"}
        | dict.fromkeys(
            ["before", "after", "95 %", "rank", "nats forgotten", "95 % ", "p"], "right"
        )
    )
    before = {
        row.name: row.records[0]["quality"]["also"][on.text]["before"]["perplexity"]
        for row in rows
        if row.name in on.intervals
    }
    for name in on.ordered:
        i, c = on.intervals[name], moved.get(name)
        cells = [f"{before[name]:.2f}", f"{i.perplexity[0]:.2f}", _interval(i), on.ranks[name]]
        if c is not None and c.difference:
            cells += [f"{c.difference:.4f}", f"{c.low:.4f} to {c.high:.4f}", f"{c.adjusted_p:.2g}"]
        else:
            cells += ["0", "-", "-"]
        shown.add_row(name, *cells)
    table.show(shown)
    print(f"nats forgotten: per token, since {since}; p by Holm. rank: as above, on this text.")


# ------------------------------------------------------------------------------------- the files


def _save(folder: Path, everything: Sequence[Row], found: dict[str, Evidence] | None) -> None:
    """results.csv of all; comparisons.csv and curves.csv where all could be compared."""
    files = {"results.csv": table.csv_text(everything, _columns(found or {}))}
    if found:
        files["comparisons.csv"] = _csv(_comparisons(found))
    curves = [c for row in everything if _trains(row) and (c := views.curve(row)) is not None]
    if curves:
        files["curves.csv"] = _csv(_points(curves))
    try:
        for name, text in files.items():
            results.write_atomically(folder / name, text)  # another controller may write it, too
        names = ", ".join(files)
        print(f"saved in {folder}: {names}; one directory per run beside them")
    except OSError as error:
        print(f"not saved: {folder / 'results.csv'}: {error.strerror}", file=sys.stderr)


def _columns(found: dict[str, Evidence]) -> dict[str, dict[str, Any]]:
    """Columns of results.csv: interval, rank and, on further texts, perplexity after adaptation."""
    columns: dict[str, dict[str, Any]] = {}
    for text, evidence in found.items():
        prefix = "quality.test" if text == "test" else f"quality.also.{text}.after"
        ends = {name: i.perplexity for name, i in evidence.intervals.items()}
        if text != "test":
            columns[f"{prefix}.perplexity"] = {name: end[0] for name, end in ends.items()}
        columns[f"{prefix}.perplexity_low"] = {name: end[1] for name, end in ends.items()}
        columns[f"{prefix}.perplexity_high"] = {name: end[2] for name, end in ends.items()}
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
