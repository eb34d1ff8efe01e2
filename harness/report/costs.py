"""What configurations cost, as axes of Pareto fronts and budgets, and which costs can be compared.

A cost is exact (parameters, bytes, counted FLOPs), or it is measured (seconds, latency, joules) and
varies from run to run: then a row costs less than another only by more than their spread.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from harness.report import stats
from harness.report.table import SHARED, Row
from harness.results import numbers, run_record
from harness.results.record_types import Record

MANY = 4  # names in a sentence or a cell


@dataclass(frozen=True)
class Cost:
    """A cost of a run: where it stands in result.json, its unit, and whether it is exact."""

    title: str  # of its front and its budgets
    short: str  # in a list
    path: str
    unit: str = ""
    scale: float = 1  # of one unit
    form: Callable[[float], str] = numbers.seconds  # of the value in units
    measured: bool = False  # varies from run to run
    shared: bool = False  # exact, but not where other runs use the machine


def _whole(value: float) -> str:
    return numbers.count(value)


# Memory and time are of training steps: what does not train has a place among parameters only.
PARAMETERS, MEMORY, TIME = "trainable parameters", "peak memory", "training time"
FLOPS = "training FLOPs"  # of budgets; of fronts by request
MIB, TERA = 2**20, 1e12
COSTS = {
    cost.title: cost
    for cost in (
        Cost(PARAMETERS, "parameters", "parameters.trainable", "parameters", form=_whole),
        Cost(MEMORY, "memory", "memory.peak_bytes", "MiB", MIB, form=_whole, shared=True),
        Cost(TIME, "seconds", "speed.train_seconds", "s", measured=True),
        Cost(FLOPS, "FLOPs", "costs.train_flops", "TFLOPs", TERA),
        Cost("evaluation FLOPs", "FLOPs of evaluation", "costs.evaluate_flops", "TFLOPs", TERA),
        Cost("adapter size", "adapter", "costs.adapter_bytes", "KiB", 2**10),
        Cost("loading time", "loading", "costs.load_seconds", "s", measured=True),
        Cost("training energy", "energy", "costs.energy.train_joules", "J", measured=True),
        Cost("evaluation energy", "energy of evaluation", "costs.energy.evaluate_joules", "J",
             measured=True),
    )
}  # fmt: skip
FRONTS = (PARAMETERS, MEMORY, TIME)
BUDGETS = (*FRONTS, FLOPS)
LATENCY = re.compile(r"(generate|score)_(base|attached|fused|merged)_(\d+)")  # by request
DOING = {"generate": "generation", "score": "scoring"}


def latency_path(name: str, what: str = "times_base") -> str | None:
    """Where result.json has what a name such as generate_attached_8 says; None for other names."""
    if (match := LATENCY.fullmatch(name)) is None:
        return None
    kind, model, size = match.groups()
    return f"costs.latency.{kind}.batch_{size}.{model}.{what}"


def of(title: str) -> Cost:
    """The cost of a title: one of COSTS, or latency by its name, as seconds times the base's."""
    if (path := latency_path(title)) is not None:
        kind, model, size = title.split("_")
        short_name = f"{DOING[kind]}, {model}, batch {size}"
        return Cost(title, short_name, path, "× base", form=numbers.perplexity, measured=True)
    return COSTS[title]


def costs(rows: Iterable[Row], title: str) -> dict[str, float]:
    """The cost of every row that has a place on this axis, by name."""
    by_name = {row.name: _cost(row, title) for row in rows if row.trained or title == PARAMETERS}
    return {name: cost for name, cost in by_name.items() if cost is not None}


def _cost(row: Row, title: str) -> float | None:
    if row.took_no_step:
        return 0.0
    values = [_of_run(record, title) for record in row.records]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _of_run(record: Record, title: str) -> float | None:
    value = run_record.get(record, of(title).path)
    if value is None and title == FLOPS:  # of records from before it was written down
        value = train_flops(record, None)
    before = _before(record, title)
    return None if value is None or before is None else float(value) + before


def _before(record: Record, title: str) -> float | None:
    """What reading training text before step 0 has cost, which is training's; None: not known."""
    key = {TIME: "start_seconds", FLOPS: "start_flops"}.get(title)
    if key is None or run_record.get(record, "speed.start_seconds") is None:
        return 0.0
    spent = run_record.get(record, f"speed.{key}")
    return None if spent is None else float(spent)


def train_flops(record: Record, steps: int | None) -> float | None:
    """FLOPs of a run's first `steps` optimizer steps, or of all; None where they are not counted.

    A step computes train.batch_tokens positions, whatever of them is predicted.
    """
    per_token = run_record.get(record, "predicted.train_flops_per_token")
    taken, tokens = (run_record.get(record, f"speed.{key}") for key in ("steps", "tokens"))
    positions = run_record.get(record, "config.train.batch_tokens")
    if not positions and tokens and taken:
        positions = tokens / taken
    if not per_token:
        return None
    if positions and (steps is not None or taken):
        return float(per_token) * positions * (taken if steps is None else steps)
    return float(per_token) * float(tokens) if tokens and steps is None else None


def sure_costs(rows: Iterable[Row], title: str) -> dict[str, float]:
    """The same, for what is claimed of them: only costs that can be compared.

    Of measured costs it is the upper end of the 95 % interval over runs; peak memory that was
    measured beside other runs is left out.
    """
    shown, cost = list(rows), of(title)
    if not cost.measured:
        return costs([r for r in shown if not (cost.shared and r.values[SHARED])], title)
    bounds = {}
    for name, values in run_values(shown, title).items():
        logs = np.log(values)
        t = -special.stdtrit(len(logs) - 1, stats.ALPHA / 2)
        error = logs.std(ddof=1) / math.sqrt(len(logs))
        bounds[name] = float(np.exp(logs.mean() + t * error))
    return bounds


def run_values(rows: Iterable[Row], title: str) -> dict[str, list[float]]:
    """A measured cost of every run, by row's name, where its spread is known.

    It takes two runs or more, none of which shared the machine.
    """
    by_name = {}
    for row in rows:
        values = [_of_run(record, title) for record in row.records]
        known = [value for value in values if value]
        alone = not row.values[SHARED] and row.trained
        if alone and len(values) > 1 and len(known) == len(values):
            by_name[row.name] = known
    return by_name


def run_seconds(rows: Iterable[Row]) -> dict[str, list[float]]:
    """Seconds of training of every run, by row's name, where their spread is known."""
    return run_values(rows, TIME)


def time_scope(rows: Iterable[Row], title: str = TIME) -> str | None:
    """What is said of training time or another measured cost; None where nothing trains."""
    trained = [row for row in rows if row.trained]
    if not trained:
        return None
    known = run_values(trained, title)
    left = [row.name for row in trained if row.name not in known]
    seconds = title == TIME
    named = "Training time" if seconds else of(title).short.capitalize()
    vary = "seconds vary" if seconds else "it varies"
    why = f"one run, or a shared machine, does not tell how {vary}"
    if not known:
        return f"{named} is not compared: {why}."
    text = f"{named}: a row counts as " + (
        "faster than another only where its seconds are fewer by more than runs vary"
        if seconds
        else "better than another only where it is lower by more than runs vary"
    )
    text += " (Welch's t-test of their logarithms, 5 %)"
    return f"{text}; without {shorten(left)}: {why}." if left else f"{text}."


def amount(title: str, value: float) -> str:
    """A cost with its unit."""
    cost = of(title)
    return f"{cost.form(value / cost.scale)} {cost.unit}".strip()


def told(title: str, value: float, sign: str = "") -> str:
    """A cost with its unit, and with its name where the unit alone could be another cost's."""
    named = "" if title in BUDGETS else of(title).short
    return " ".join(filter(None, (named, sign, amount(title, value))))


def shorten(names: Sequence[str]) -> str:
    """A few names, and how many more there are."""
    more = f" and {len(names) - MANY} more" if len(names) > MANY else ""
    return ", ".join(names[:MANY]) + more
