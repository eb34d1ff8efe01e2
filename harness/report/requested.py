"""Columns by request: `harness report FOLDER --columns adapter_bytes,latency,effective_rank`.

A column is a name of COLUMNS, a group of GROUPS, a model's latency (generate_attached_8: seconds
times the base's; with _per_second tokens a second) or the path of any number in result.json. What
is a cost also gets a Pareto front, budgets and a figure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.config.errors import ConfigError, nearest
from harness.report import anatomy, costs, table
from harness.report import evidence as ev
from harness.report.evidence import Findings
from harness.report.sheet import Cell, Column
from harness.report.table import SHARED, Row
from harness.results import numbers, run_record, schema

PER_SECOND = "_per_second"  # of a name of latency: tokens a second in place of times the base
ANATOMY = "anatomy."  # key of a column of harness anatomy's summary
FORGOTTEN = "forgotten."  # and of the nats forgotten of a further text


@dataclass(frozen=True)
class Requested:
    """A further column: its key on pages and in results.csv, unit, and what it says."""

    key: str  # a path in result.json, or ANATOMY or FORGOTTEN and a name
    heading: str
    unit: str
    what: str
    form: Callable[[float], str] = numbers.seconds
    scale: float = 1  # of what is shown; results.csv has the value itself
    cost: str = ""  # title of `costs`, where less of it is better
    measured: bool = False  # which other runs on the machine move


def _of_cost(title: str, what: str) -> Requested:
    cost = costs.of(title)
    heading = f"{cost.short}, {cost.unit}" if cost.unit else cost.short
    return Requested(
        cost.path, heading, cost.unit, what, cost.form, cost.scale, title, cost.measured
    )


COLUMNS: dict[str, Requested] = {
    "adapter_bytes": _of_cost(
        "adapter size", "what adapter/ weighs on disk; where there is none, model/'s own files"
    ),
    "load_seconds": _of_cost(
        "loading time", "to put adapter/ onto a base that is in memory, or to load model/"
    ),
    "train_flops": _of_cost(costs.FLOPS, "FLOPs of all optimizer steps, as counted for a token"),
    "evaluate_flops": _of_cost("evaluation FLOPs", "FLOPs of evaluation, as counted for a token"),
    "train_joules": _of_cost(
        "training energy", "of the machine's counters (RAPL, NVML) during optimizer steps"
    ),
    "evaluate_joules": _of_cost("evaluation energy", "of the machine's counters during evaluation"),
}
NAMES = {"rank": "update_rank", "share": "matrices_share"}  # of quantities that others are called
COLUMNS |= {
    NAMES.get(key, key): Requested(
        f"{ANATOMY}{key}", heading, "", f"{why} (matrices; harness anatomy)",
        lambda value, form=form: format(value, form),  # type: ignore[misc]  # bound in the loop
    )
    for key, (heading, form, why) in anatomy.QUANTITIES.items()
}  # fmt: skip
LATENCIES = "generate_MODEL_N, score_MODEL_N"
GROUPS = {  # name -> what it stands for
    "latency": "generate_ and score_ of attached and merged, at every batch size that was measured",
    "energy": "train_joules, evaluate_joules",
    "anatomy": "every column of harness anatomy",
    "forgotten": "nats per token forgotten of each further text (evaluate.also)",
}
MADE_BY = {  # start of a key -> what makes it
    "costs.latency": "evaluate.latency=true measures it",
    "costs.load_seconds": "evaluate.latency=true measures it",
    "costs.energy": "costs.energy.left_out in result.json says why",
    ANATOMY: "harness anatomy {folder} makes it",
}


def listing() -> str:
    """Every name with its unit and what it says, a line each."""
    lines = [(name, column.unit, column.what) for name, column in COLUMNS.items()]
    lines.append(
        (LATENCIES, "× base", "seconds times the base's; MODEL is attached, fused, merged")
    )
    lines.append((f"the same{PER_SECOND}", "tokens/s", "generated or scored; MODEL also base"))
    lines += [(name, "", what) for name, what in GROUPS.items()]
    lines.append(
        ("a path", "", "any number of result.json, as speed.setup_seconds (conf/RESULT.md)")
    )
    width = max(len(name) for name, _, _ in lines)
    units = max(len(unit) for _, unit, _ in lines)
    return "\n".join(f"{name:{width}}  {unit:{units}}  {what}" for name, unit, what in lines)


def check(names: Sequence[str]) -> None:
    """Refuse a name that is none, before anything is read.

    Raises:
        ConfigError: names it, and the nearest ones.
    """
    for name in names:
        if name not in GROUPS and _named(name) is None:
            known = [*COLUMNS, *GROUPS, *(f"{kind}_attached_1" for kind in costs.DOING)]
            known += [key.path for key in _number_keys()]
            raise ConfigError(f"--columns {name}: {nearest(name, known)}; --columns help lists all")


def _number_keys() -> list[schema.Key]:
    return [key for key in schema.every_key() if key.type in ("number", "integer")]


def _named(name: str) -> Requested | None:
    """The column of a name that is no group's."""
    name = run_record.new_path(name)
    if name in COLUMNS:
        return COLUMNS[name]
    if costs.latency_path(name) and "_base_" not in name:
        return _of_cost(name, "seconds times the base's, median over runs' medians")
    plain = name.removesuffix(PER_SECOND)
    if plain != name and (path := costs.latency_path(plain, "tokens_per_second")):
        heading = f"{costs.of(plain).short}, tokens/s"
        return Requested(path, heading, "tokens/s", "at the median", numbers.count, measured=True)
    for key in _number_keys():
        if re.fullmatch(re.escape(key.path).replace(r"\*", r"[^.]+"), name):
            short = ".".join(name.split(".")[-2:])
            heading = f"{short}, {key.unit}" if key.unit else short
            return Requested(name, heading, key.unit, key.what, numbers.seconds)
    return None


@dataclass(frozen=True)
class Found:
    """Requested columns with the value of every row that has one, by row's name."""

    columns: list[Requested]
    values: dict[str, dict[str, float]]  # key of a column -> row's name -> value
    ends: dict[str, dict[str, tuple[float, float]]]  # lowest and highest seed, where known

    @property
    def titles(self) -> list[str]:
        """Titles of the costs among the columns."""
        return [column.cost for column in self.columns if column.cost]

    def cells(self, row: Row) -> list[Cell]:
        """What the table shows of a row in these columns."""
        return [self._cell(column, row) for column in self.columns]

    def _cell(self, column: Requested, row: Row) -> Cell:
        value = self.values[column.key].get(row.name)
        if value is None:
            return Cell("-")
        shown = column.form(value / column.scale)
        low, high = self.ends[column.key].get(row.name, (value, value))
        if low < high:
            shown += f" ({column.form(low / column.scale)}-{column.form(high / column.scale)})"
        star = "*" if column.measured and row.values[SHARED] else ""
        return Cell(f"{shown}{star}", value)

    def heads(self) -> list[Column]:
        """The columns as a sheet has them; they stay where others leave for lack of room."""
        return [Column(c.key, c.heading, why=_sentence(c)) for c in self.columns]

    def notes(self) -> list[str]:
        """What each column says, in one sentence together."""
        text = "; ".join(f"{c.heading}: {_sentence(c)}" for c in self.columns)
        return [f"{text}."] if text else []

    def csv(self) -> dict[str, Mapping[str, Any]]:
        """Columns of results.csv: the values themselves, by key."""
        return {column.key: self.values[column.key] for column in self.columns}


NOTHING = Found([], {}, {})


def _sentence(column: Requested) -> str:
    return column.what or f"{column.key} of result.json"


def find(findings: Findings) -> Found:
    """The columns that `findings.requested` names, with the values of its rows.

    Raises:
        ConfigError: a name is unknown, or no row has a value; says what makes it.
    """
    check(findings.requested)
    rows = findings.rows
    columns: dict[str, Requested] = {}
    for name in findings.requested:
        for column in _expanded(name, findings):
            columns[column.key] = column
    values: dict[str, dict[str, float]] = {}
    ends: dict[str, dict[str, tuple[float, float]]] = {}
    for key in columns:
        values[key], ends[key] = _values(key, findings)
        if not values[key] and rows:
            name = next(n for n in findings.requested if columns[key] in _expanded(n, findings))
            raise ConfigError(_missing(name, key, findings))
    return Found(list(columns.values()), values, ends)


def _missing(name: str, key: str, findings: Findings) -> str:
    why = next((text for start, text in MADE_BY.items() if key.startswith(start)), "")
    why = f"; {why.format(folder=findings.folder)}" if why else ""
    return f"--columns {name}: no run of {findings.folder} has {key.removeprefix(ANATOMY)}{why}"


def _expanded(name: str, findings: Findings) -> list[Requested]:
    """The columns of a name or a group."""
    if name == "latency":
        sizes = sorted(
            {
                int(size.removeprefix("batch_"))
                for row in findings.rows
                for record in row.records
                for size in run_record.get(record, "costs.latency.generate") or {}
            }
        ) or [1]
        names = [f"{kind}_{model}_{size}" for kind in costs.DOING for size in sizes
                 for model in ("attached", "merged")]  # fmt: skip
        columns = [column for name in names if (column := _named(name)) is not None]
        measured = [column for column in columns if _values(column.key, findings)[0]]
        return measured or columns[:1]
    if name == "energy":
        return [COLUMNS["train_joules"], COLUMNS["evaluate_joules"]]
    if name == "anatomy":
        return [column for column in COLUMNS.values() if column.key.startswith(ANATOMY)]
    if name == "forgotten":
        texts = [text for text in findings.found if text != "test"]
        if not texts:
            raise ConfigError(
                f"--columns forgotten: no run of {findings.folder} was evaluated on a further "
                "text; evaluate.also=[NAME] does it"
            )
        what = "rise of log-perplexity per token of that text since the base"
        return [
            Requested(f"{FORGOTTEN}{text}", f"forgotten, {text}", "nats", what, numbers.nats)
            for text in texts
        ]
    single = _named(name)
    assert isinstance(single, Requested)
    return [single]


def _values(
    key: str, findings: Findings
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Of every row its value, and its lowest and highest seed where the source tells them."""
    rows = findings.rows
    if key.startswith(ANATOMY):
        return _of_anatomy(key.removeprefix(ANATOMY), findings)
    if key.startswith(FORGOTTEN):
        moved, _ = ev.forgetting(rows, findings.found[key.removeprefix(FORGOTTEN)])
        return {name: c.difference for name, c in moved.items()}, {}
    title = next((c.cost for c in COLUMNS.values() if c.key == key and c.cost), None)
    if title == costs.FLOPS:  # also of records from before it was written down
        return costs.costs(rows, title), {}
    values = {row.name: table.over_seeds(row.records, key) for row in rows}
    return {name: float(value) for name, value in values.items() if _is_number(value)}, {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _of_anatomy(
    quantity: str, findings: Findings
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    summary = anatomy.find(findings.folder, [row.name for row in findings.rows])
    if summary is None:
        return {}, {}
    own = summary[(summary["of"] == anatomy.ALL) & (summary["quantity"] == quantity)]
    known = own[own["mean"].notna()]
    values = {str(row["name"]): float(row["mean"]) for _, row in known.iterrows()}
    ends = {str(r["name"]): (float(r["low"]), float(r["high"])) for _, r in known.iterrows()}
    return values, ends
