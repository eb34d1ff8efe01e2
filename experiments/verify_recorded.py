"""Recorded experiments run again, and every number of their rows beside the record.

    python experiments/verify_recorded.py                     # all of RECORDS, about 20 minutes
    python experiments/verify_recorded.py --only lstm_lora    # one; may be given several times

Every run starts from the beginning, in outputs/verify_recorded. Of each row the table has the test
perplexity, and whatever is outside its tolerance. Exit status 0 where nothing is, 1 where something
is or a run fails.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import compose, run
from harness.api import RunFailedError
from harness.config.errors import ConfigError, nearest
from harness.config.run_config import RunConfig
from harness.report import evidence, summary, table
from harness.results import run_record

HERE = Path(__file__).resolve().parent
OUTPUTS = "outputs/verify_recorded"
KEY = ("method.label", "method.targets", "method.rank", "method.alpha", "method.lr")

# Counts are exact. The rest is the same bit for bit with the same code, kind of CPU, threads and
# versions; where one of these differs, sums are rounded otherwise, which training amplifies.
EXACT = ("seeds", "parameters.trainable", "quality.test.num_tokens")
STEP0, TEST = "quality.step0.validation.perplexity", "quality.test.perplexity"
QUALITY = (
    STEP0, "quality.validation.perplexity", TEST, "quality.test.bits_per_byte",
    "quality.also.docstrings_held_out.after.perplexity",
)  # fmt: skip
UNTRAINED, TRAINED = 1e-4, 2e-3  # relative; another seed moves a trained perplexity more
PEAK, PEAK_TOLERANCE = "memory.peak_bytes", 0.05


@dataclass(frozen=True)
class Record:
    """An experiment with a file of results, and the rows of it that are run again."""

    name: str
    file: str = "results.csv"
    rows: tuple[str, ...] = ()  # as `key` has them; none: all
    # Commit 7a0f985 made steps leaner: what was recorded before is the most that they may need.
    peak_is_limit: bool = True


RECORDS = (
    Record(
        "truncation_curve",
        rows=("none", *(f"truncate all {share}" for share in (0.125, 0.25, 0.5, 0.75, 0.875))),
    ),
    Record("lstm_lora", "results-leaner.csv", peak_is_limit=False),  # why: its README
    Record("targets_sweep"),
    Record("main_seeds", rows=("none", "full 0.002", "lora all 8 16 0.02"), peak_is_limit=False),
)


@dataclass(frozen=True)
class Compared:
    """A number of the record beside the same number now; None: there is no such row or number."""

    experiment: str
    row: str
    column: str
    recorded: float
    now: float | None
    tolerance: float  # relative
    is_limit: bool = False  # less is as good

    @property
    def difference(self) -> float | None:
        """Now less recorded, relative to recorded."""
        return None if self.now is None else (self.now - self.recorded) / (self.recorded or 1.0)

    @property
    def verdict(self) -> str:
        """identical, within its tolerance, less than a limit, or OUTSIDE."""
        if self.now == self.recorded:
            return "identical"
        if self.difference is None or not self.difference <= self.tolerance:
            return "OUTSIDE"
        if self.difference >= -self.tolerance:
            return f"within {self.tolerance:.2%}"
        return "less" if self.is_limit else "OUTSIDE"


def key(row: dict[str, str]) -> str:
    """What tells a row of results.csv from the others."""
    parts = (row[name] for name in KEY)
    return " ".join(f"{float(p):g}" if _is_number(p) else p for p in parts if p)


def key_of(one: RunConfig) -> str:
    """The key of the row that a run belongs to."""
    found = run_record.describe_method(one)
    values = (found[name.removeprefix("method.")] for name in KEY)
    return key({name: "" if v is None else str(v) for name, v in zip(KEY, values, strict=True)})


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def recorded(record: Record) -> list[dict[str, str]]:
    """The rows of the record that are run again."""
    text = (HERE / record.name / record.file).read_text("utf-8")
    rows = list(csv.DictReader(io.StringIO(text)))
    return [row for row in rows if not record.rows or key(row) in record.rows]


def runs_of(record: Record) -> list[RunConfig]:
    """What makes these rows, as the experiment is now."""
    settings = (f"experiment={record.name}", f"outputs_dir={OUTPUTS}", "rerun=true")
    wanted = {key(row) for row in recorded(record)}
    return [one for one in compose(*settings) if key_of(one) in wanted]


def again(record: Record) -> list[dict[str, str]]:
    """The same rows from runs that are made now; a run that fails has none."""
    runs = runs_of(record)
    for number, one in enumerate(runs, 1):
        print(f"{record.name} {number}/{len(runs)}: {one.run_dir.name}", flush=True)
        try:
            run(one)
        except RunFailedError as error:
            print(f"error: {error}", file=sys.stderr)
    if not runs:
        return []
    found = evidence.find(runs[0].run_dir.parent, [one.run_dir for one in runs])
    return list(csv.DictReader(io.StringIO(summary.results_csv(found))))


def compare(
    record: Record, old: Iterable[dict[str, str]], new: Iterable[dict[str, str]]
) -> list[Compared]:
    """Every number of the rows of `old` beside the same of `new`."""
    by_key = {key(row): row for row in new}
    found = []
    for row in old:
        now = by_key.get(key(row), {})
        for column in (*EXACT, *QUALITY, PEAK):
            if not row.get(column):  # of another experiment
                continue
            trained = row["method.lr"] and column != STEP0
            tolerance = TRAINED if trained else UNTRAINED
            if column in EXACT:
                tolerance = 0.0
            elif column == PEAK:
                tolerance = PEAK_TOLERANCE
            value = float(now[column]) if now.get(column) else None
            is_limit = column == PEAK and record.peak_is_limit
            own = (record.name, key(row), column, float(row[column]), value)
            found.append(Compared(*own, tolerance, is_limit))
    return found


def show(found: Sequence[Compared]) -> None:
    """The table: every row's test perplexity, and all that is outside; then how many are what."""
    shown = table.plain(
        ["experiment", "row", "number"], ["recorded", "now", "difference"], ["verdict"]
    )
    for one in found:
        if one.column == TEST or one.verdict == "OUTSIDE":
            now = "-" if one.now is None else f"{one.now:.10g}"
            difference = "-" if one.difference is None else f"{one.difference:+.1e}"
            cells = (f"{one.recorded:.10g}", now, difference, one.verdict)
            shown.add_row(one.experiment, one.row, one.column, *cells)
    table.show(shown)
    verdicts = [one.verdict for one in found]
    counts = (f"{verdicts.count(v)} {v}" for v in dict.fromkeys(sorted(verdicts)))
    print(f"{len(found)} numbers: {', '.join(counts)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run again what is asked for; returns the exit status."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", metavar="NAME", help="an experiment of RECORDS")
    asked = parser.parse_args(arguments).only
    records = {record.name: record for record in RECORDS}
    for name in asked or ():
        if name not in records:
            print(f"error: --only {name}: {nearest(name, records)}", file=sys.stderr)
            return 2
    found = []
    try:
        for record in [records[name] for name in asked or records]:
            found += compare(record, recorded(record), again(record))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(found)
    return int(any(one.verdict == "OUTSIDE" for one in found))


if __name__ == "__main__":
    sys.exit(main())
