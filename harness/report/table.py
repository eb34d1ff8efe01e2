"""One row per configuration: its values, and results.csv; `columns` has what tables show of it.

Perplexity is per model token; word perplexity and bits per byte, which compare across tokenizers,
are in results.csv and in each run's result.json. Over seeds, perplexities are exp of the mean
log-perplexity; everything else is the mean.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import rich.box
from rich.console import Console, JustifyMethod
from rich.table import Table

from harness.config.method_schema import METHODS
from harness.evaluation import text_metrics
from harness.report import groups
from harness.results import numbers, run_record
from harness.results.record_types import Record

SHOWN = {"train.lr"} | {  # of the configuration, what has a column
    f"method.{key}"
    for key in (
        "name",
        "label",
        "r",
        "target_r",
        "alpha",
        "rank",
        "energy",
        "train",
        "residual",
        "train_only",
    )
}
TRAINABLE = "parameters.trainable"
SHARED = "environment.runs_beside"
LR_FROM = "method.lr_from"
CLASSIFIED = "quality.classification.test"
OF_LABELS = {  # where the task has labels (`harness.evaluation.classification`)
    f"{CLASSIFIED}.accuracy": "accuracy", f"{CLASSIFIED}.majority_accuracy": "majority",
}  # fmt: skip
OF_COMPLETIONS = {
    f"quality.generation.{name}": label for name, label in text_metrics.METRICS.items()
}
SCORES = OF_LABELS | OF_COMPLETIONS
CLASSIFIED_CSV = tuple(  # in the CSV alone
    f"{CLASSIFIED}.{name}"
    for name in ("accuracy_low", "accuracy_high", "macro_f1", "log_loss", "num_examples")
)
OF_STARTS = {  # of starts that read training text before step 0 (`harness.methods.starts`)
    "speed.start_tokens": "start tokens", "speed.start_seconds": "start s",
}  # fmt: skip
WRITTEN = "quality.generation.tokens_per_second"  # of generating, in the CSV alone
RANK, ALPHA, LR = "method.rank", "method.alpha", "method.lr"
TEST = "quality.test.perplexity"
MEASURED = ("memory.peak_bytes", "speed.tokens_per_second")  # which sharing a machine can move


@dataclass(frozen=True)
class Number:
    """How a value of a row is written, and how long a narrow table keeps its column."""

    heading: str
    form: Callable[[Any], str]
    keep: int
    why: str = ""


COLUMNS = {
    "method.label": Number("method", str, 0),
    "method.targets": Number("targets", str, 0),
    RANK: Number("r, k", str, 0, "r of LoRA, k of U D V^T"),
    ALPHA: Number("alpha", "{:g}".format, 80),
    LR: Number("lr", numbers.rate, 60, "the learning rate"),
    TRAINABLE: Number("trainable", numbers.count, 70, "parameters that train"),
    "parameters.trainable_percent": Number(
        "%", numbers.percent, 20, "their share of all parameters"
    ),
    "memory.peak_bytes": Number(
        "peak MiB", numbers.mib, 40,
        "live tensors of a training step, or of evaluation where nothing trains",
    ),
    "speed.tokens_per_second": Number("tok/s", numbers.count, 100, "of optimizer steps"),
    "quality.step0.validation.perplexity": Number(
        "step 0", numbers.perplexity, 110, "validation perplexity per token before training"
    ),
    "quality.validation.perplexity": Number(
        "val", numbers.perplexity, 90,
        "validation perplexity per token, from the checkpoint that it chose"
    ),
    TEST: Number(
        "test", numbers.perplexity, 0, "test perplexity per token, from the same checkpoint"
    ),
}  # fmt: skip
CSV_ONLY = (
    "method.name",
    LR_FROM,
    "quality.test.word_perplexity",
    "quality.test.bits_per_byte",
    "quality.test.num_tokens",
    "memory.process_peak_bytes",
    "speed.train_seconds",
    SHARED,
)
# Headings that are no key's last part.
SETTINGS = {"data.name": "text", "model.name": "model", "optimizer.name": "optimizer"}
UNTRAINED = "untrained"  # what is said of a row whose method trains, after 0 steps


@dataclass(frozen=True)
class Row:
    """One configuration on one text: its finished runs, which differ in their seed only."""

    name: str  # short, and no other row's
    values: dict[str, Any]  # by path in result.json; also `seeds` and `also`
    run_dirs: list[Path]
    records: list[Record]  # their result.json
    repeated: dict[Path, str] = field(default_factory=dict)  # runs of a seed that is there -> why
    # What tells it from other rows and has no column of its own: a setting, or a content -> value.
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def trained(self) -> bool:
        """Whether anything was trained: parameters to train, and a step to do it."""
        return bool(self.values[TRAINABLE]) and not self.took_no_step

    @property
    def took_no_step(self) -> bool:
        """Whether its method trains and has not: `train.steps=0`."""
        return bool(self.values[TRAINABLE]) and _took_no_step(self.records[0])


def rows(folder: Path, run_dirs: Collection[Path] | None = None) -> list[Row]:
    """Every configuration with a finished run, by method, targets, parameters, alpha and rate.

    Of `run_dirs` alone, if they are given: names, settings and seeds are then of nothing else.
    """
    grouped = groups.find(folder, run_dirs)
    flat = _filled([_settings(group.records[0]) for group in grouped])
    others = _without_a_column(flat)
    table = []
    for group, config in zip(grouped, flat, strict=True):
        own = {key: config[key] for key in others if key in config} | group.content
        values = _values(group.records) | {"also": " ".join(f"{k}={v}" for k, v in own.items())}
        table.append(Row("", values, group.run_dirs, group.records, group.repeated, own))
    return _named(sorted(table, key=_place))


def _settings(record: Record) -> dict[str, Any]:
    """`groups.settings` by dotted keys, with the labels of the model and the text.

    What does not train has no settings of training.
    """
    flat = {"optimizer.name": "adamw"} | _flat(groups.settings(record))  # of older records, too
    if not run_record.get(record, TRAINABLE):
        of_training = ("train.", "optimizer.")
        flat = {key: value for key, value in flat.items() if not key.startswith(of_training)}
    for key in ("model.name", "data.name"):
        flat[key] = run_record.get(record, key) or flat.get(key)
    return flat


def _filled(flat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with None for what a mapping that is empty in some rows has in others.

    `method.fields` is one: LoRA that trains the embeddings too is not told by its keys else.
    """
    parents = {key for own in flat for key, value in own.items() if value == {}}
    for parent in parents:
        within = {key for own in flat for key in own if key.startswith(f"{parent}.")}
        for own in flat:
            if parent in own or within & own.keys():
                own.update(dict.fromkeys(within - own.keys()))
    return flat


def _took_no_step(record: Record) -> bool:
    return run_record.get(record, "config.train.steps") == 0


def _values(records: list[Record]) -> dict[str, Any]:
    values: dict[str, Any] = {"seeds": len({r["config"]["seed"] for r in records})}
    for path in [*COLUMNS, *OF_STARTS, *SCORES, WRITTEN, *CLASSIFIED_CSV, *CSV_ONLY]:
        values[path] = over_seeds(records, path)
    return values


def over_seeds(records: Sequence[Record], path: str) -> Any:
    """A value of result.json as the row of these runs has it: a mean; of text, the first run's."""
    values = [run_record.get(result, path) for result in records]
    known = [v for v in values if isinstance(v, int | float)]
    if path == SHARED:  # the worst of the runs
        known = [max(known)] if known else []
    if path.endswith("perplexity"):  # null where one has overflowed
        logs = [math.log(v) for v in known]
        return math.exp(sum(logs) / len(logs)) if len(logs) == len(values) else None
    return sum(known) / len(known) if known else values[0]


def _place(row: Row) -> tuple[Any, ...]:
    order, values = list(METHODS), row.values
    name = values["method.name"]
    return (
        order.index(name) if name in order else len(order),
        values["method.label"] or "",
        values["method.targets"] or "",
        values["parameters.trainable"] or 0,
        values["method.alpha"] or 0,
        values["method.lr"] or 0,
    )


def _named(table: list[Row]) -> list[Row]:
    """The rows with names: method, targets and rank, and of the rest what tells them apart."""

    def base(row: Row) -> str:
        letter = "r=" if row.values["method.name"] in ("lora", "adalora") else "k="
        rank = row.values[RANK]
        parts = [row.values["method.label"], row.values["method.targets"], rank and letter + rank]
        return " ".join([*filter(None, parts), *([UNTRAINED] if row.took_no_step else [])])

    names = [base(row) for row in table]
    parts = [
        [
            ""
            if (v := row.values[key]) is None
            else f"{COLUMNS[key].heading}={COLUMNS[key].form(v)}"
            for row in table
        ]
        for key, column in ((key, COLUMNS[key]) for key in (ALPHA, LR))
    ]
    fields: list[list[str]] = []  # which tell more than the rate that goes with them
    for key, heading in headings(table).items():
        texts = [setting_text(row.settings.get(key)) for row in table]
        own = ["" if text == "-" else f"{heading}={text}" for text in texts]
        (fields if key.startswith("method.fields.") else parts).append(own)
    parts = fields + parts
    for part_texts in parts:
        alike: dict[str, set[str]] = {}
        for name, part in zip(names, part_texts, strict=True):
            alike.setdefault(name, set()).add(part)
        names = [
            f"{name} {part}".rstrip() if len(alike[name]) > 1 else name
            for name, part in zip(names, part_texts, strict=True)
        ]
    count = Counter(names)
    return [
        replace(row, name=old if count[old] == 1 else f"{old} {row.run_dirs[0].name}")
        for row, old in zip(table, names, strict=True)
    ]


def headings(table: Sequence[Row]) -> dict[str, str]:
    """The settings in which rows differ -> headings, as short as tells them apart."""
    keys = list(dict.fromkeys(key for row in table for key in row.settings))
    short = {key: SETTINGS.get(key, key.rpartition(".")[2]) for key in keys}
    taken = Counter([*short.values(), *(number.heading for number in COLUMNS.values()), "seeds"])
    return {key: name if taken[name] == 1 else key for key, name in short.items()}


def setting_text(value: Any) -> str:
    """A setting as tables and names show it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{value:.10g}"
    return value if isinstance(value, str) else json.dumps(value)


def _without_a_column(configs: list[dict[str, Any]]) -> list[str]:
    """Keys that tell rows apart and do not show in a column: a sweep over them must be readable."""
    values: dict[str, set[str]] = {}
    for flat in configs:
        for key, value in flat.items():
            values.setdefault(key, set()).add(json.dumps(value))
    varying = {key for key, distinct in values.items() if len(distinct) > 1}
    for group in ("model.", "data."):
        if f"{group}name" in varying:  # stands for everything else in its file
            varying -= {key for key in varying if key.startswith(group) and key != f"{group}name"}
    return sorted(key for key in varying if key not in SHOWN and not key.startswith("targets."))


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if f"{prefix}{key}" == "evaluate.also":
            flat["evaluate.also"] = ",".join(value) or None  # names say enough
        elif f"{prefix}{key}" == "evaluate.latency":  # which moves no other number
            flat["evaluate.latency"] = json.dumps(value) if value else None
        elif isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def plain(left: Sequence[str], right: Sequence[str] = (), last: Sequence[str] = ()) -> Table:
    """An empty table: headings of columns to the left, to the right, and to the left again."""
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    sides: list[tuple[Sequence[str], JustifyMethod]]
    sides = [(left, "left"), (right, "right"), (last, "left")]
    for headings, justify in sides:
        for heading in headings:
            table.add_column(heading, justify=justify, no_wrap=True)
    return table


def show(table: Table) -> None:
    """Print a table in its own width: one cut at 80 columns is no use in a log."""
    console = Console(markup=False)  # what stands in brackets is a name's own
    own = console.measure(table, options=console.options.update(width=10_000)).maximum
    Console(width=max(console.width, own), markup=False).print(table)


def csv_lines(
    table: Sequence[Row], beside: Mapping[str, Mapping[str, Any]]
) -> tuple[list[str], list[list[Any]]]:
    """Columns by their path in result.json, and one line per configuration, with its runs."""
    written = [
        path
        for path in [*OF_STARTS, *SCORES, WRITTEN, *CLASSIFIED_CSV]
        if any(r.values[path] is not None for r in table)
    ]
    names = [*COLUMNS, *written, *CSV_ONLY, "seeds", "also"]
    beside = {key: values for key, values in beside.items() if key not in names}
    settings = list(dict.fromkeys(key for row in table for key in row.settings))
    lines = []
    for row in table:
        runs = " ".join(run_dir.name for run_dir in row.run_dirs)
        own = [row.values[name] for name in names]
        own += [row.settings.get(key) for key in settings]
        lines.append([row.name, *own, *(b.get(row.name) for b in beside.values()), runs])
    return ["name", *names, *map(csv_name, settings), *beside, "runs"], lines


def csv_name(key: str) -> str:
    """What the CSV calls a setting: its path in result.json; `contents.…` of what was read."""
    return f"config.{key}" if "." in key else f"contents.{key}"


def csv_text(table: Sequence[Row], beside: Mapping[str, Mapping[str, Any]]) -> str:
    """`csv_lines` as the text of a CSV file."""
    names, lines = csv_lines(table, beside)
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow(names)
    writer.writerows(lines)
    return stream.getvalue()
