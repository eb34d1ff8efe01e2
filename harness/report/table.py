"""One row per configuration: what is printed, and results.csv.

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import rich.box
from rich.console import Console, JustifyMethod
from rich.table import Table

from harness import ends, nlg, results
from harness.config import METHODS
from harness.report import groups

# heading -> (path in result.json, format of the number)
COLUMNS = {
    "method": ("method.label", "s"),
    "targets": ("method.targets", "s"),
    "r, k": ("method.rank", "s"),
    "alpha": ("method.alpha", "g"),
    "lr": ("method.lr", ".3g"),
    "trainable": ("parameters.trainable", ",.0f"),
    "%": ("parameters.trainable_percent", ".2f"),
    "peak MiB": ("memory.peak_bytes", "MiB"),
    "tok/s": ("speed.tokens_per_second", ",.0f"),
    "step 0": ("quality.step0.validation.perplexity", ".2f"),
    "val": ("quality.validation.perplexity", ".2f"),
    "test": ("quality.test.perplexity", ".2f"),
}
CLASSIFIED = "quality.classification.test"
SCORED = {  # where the task has labels (`harness.classify`), or completions were generated
    "accuracy": (f"{CLASSIFIED}.accuracy", ".1%"),
    "majority": (f"{CLASSIFIED}.majority_accuracy", ".1%"),
} | {label: (f"quality.generation.{name}", ".2f") for name, label in nlg.METRICS.items()}
WRITTEN = "quality.generation.tokens_per_second"  # likewise, in the CSV alone
NUM_TEXT = 3  # the first columns, which are text
SHOWN = {"train.lr"} | {
    f"method.{key}"
    for key in ("name", "label", "r", "alpha", "rank", "energy", "train", "residual", "train_only")
}
SHARED = "environment.runs_beside"
MEASURED = ("memory.peak_bytes", "speed.tokens_per_second")  # which sharing a machine can move
LR_FROM = "method.lr_from"
CLASSIFIED_CSV = tuple(  # likewise, in the CSV alone
    f"{CLASSIFIED}.{name}"
    for name in ("accuracy_low", "accuracy_high", "macro_f1", "log_loss", "num_examples")
)
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
LEGEND = (
    "%: trainable share of all parameters. peak: live tensors of a training step (of evaluation,\n"
    "where nothing trains). step 0: validation perplexity per token before training; val, test:\n"
    "from the checkpoint that validation chose."
)
SHARED_LEGEND = "*: measured while other runs shared the machine; not for comparison."


@dataclass(frozen=True)
class Row:
    """One configuration on one text: its finished runs, which differ in their seed only."""

    name: str  # short, and no other row's
    values: dict[str, Any]  # by path in result.json; also `seeds` and `also`
    run_dirs: list[Path]
    records: list[dict[str, Any]]  # their result.json
    repeated: dict[Path, str] = field(default_factory=dict)  # runs of a seed that is there -> why


def rows(folder: Path) -> list[Row]:
    """Every configuration with a finished run, by method, targets, parameters, alpha and rate."""
    found = groups.find(folder)
    flat = [_settings(group.records[0]) for group in found]
    others = _without_a_column(flat)
    table = []
    for group, config in zip(found, flat, strict=True):
        own = {key: config[key] for key in others if key in config} | group.content
        values = _values(group.records) | {"also": " ".join(f"{k}={v}" for k, v in own.items())}
        table.append(Row("", values, group.run_dirs, group.records, group.repeated))
    return _named(sorted(table, key=_place))


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    """`groups.settings` by dotted keys, with the labels of the model and the text."""
    flat = _flat(groups.settings(record))
    for key in ("model.name", "data.name"):
        flat[key] = results.get(record, key) or flat.get(key)
    return flat


def _values(records: list[dict[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {"seeds": len({r["config"]["seed"] for r in records})}
    shown = [path for path, _ in (COLUMNS | SCORED).values()]
    for path in [*shown, WRITTEN, *CLASSIFIED_CSV, *CSV_ONLY]:
        found = [results.get(result, path) for result in records]
        numbers = [v for v in found if isinstance(v, int | float)]
        if path == SHARED:  # the worst of the runs
            numbers = [max(numbers)] if numbers else []
        if path.endswith("perplexity"):  # null where one has overflowed
            logs = [math.log(v) for v in numbers]
            values[path] = math.exp(sum(logs) / len(logs)) if len(logs) == len(found) else None
        else:
            values[path] = sum(numbers) / len(numbers) if numbers else found[0]
    return values


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
    """The rows with names: as few of the columns as tell them apart."""
    forms = [
        ("method.label", "{}"), ("method.targets", "{}"), ("method.rank", "{}"),
        ("method.alpha", "alpha={:g}"), ("method.lr", "lr={:.3g}"), ("also", "{}"),
    ]  # fmt: skip

    def name(row: Row, columns: int) -> str:
        parts = []
        for path, form in forms[:columns]:
            if value := row.values[path]:
                letter = "r=" if row.values["method.name"] == "lora" else "k="
                key = letter if path == "method.rank" else ""
                parts.append(key + form.format(value))
        return " ".join(parts)

    names = [name(row, 3) for row in table]
    for columns in range(4, len(forms) + 1):
        count = Counter(names)
        names = [
            name(row, columns) if count[old] > 1 else old
            for row, old in zip(table, names, strict=True)
        ]
    count = Counter(names)
    return [
        replace(row, name=old if count[old] == 1 else f"{old} {row.run_dirs[0].name}")
        for row, old in zip(table, names, strict=True)
    ]


def _without_a_column(configs: list[dict[str, Any]]) -> list[str]:
    """Keys that tell rows apart and do not show in a column: a sweep over them must be readable."""
    values: dict[str, set[str]] = {}
    for flat in configs:
        for key, value in flat.items():
            values.setdefault(key, set()).add(json.dumps(value))
    varying = {key for key, found in values.items() if len(found) > 1}
    for group in ("model.", "data."):
        if f"{group}name" in varying:  # stands for everything else in its file
            varying -= {key for key in varying if key.startswith(group) and key != f"{group}name"}
    return sorted(key for key in varying if key not in SHOWN and not key.startswith("targets."))


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if f"{prefix}{key}" == "evaluate.also":
            flat["evaluate.also"] = ",".join(value) or None  # names say enough
        elif isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def text_of(value: Any, form: str) -> str:
    """A value as the table shows it."""
    if value is None:
        return "-"
    if form == "MiB":
        return f"{value / 2**20:,.0f}"
    return str(value) if form == "s" else format(value, form)


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


def columns(shown: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """COLUMNS, and of SCORED those that a row has."""
    scored = {
        heading: (path, form)
        for heading, (path, form) in SCORED.items()
        if any(row.values[path] is not None for row in shown)
    }
    return COLUMNS | scored


def is_own_rate(lr_from: str | None) -> bool:
    """Whether a rate was set, or tuned for just this configuration, if for other steps."""
    return (lr_from or "set").split(", for ")[0] in ("set", "tuned", "not used")


def cells(row: Row, columns: Mapping[str, tuple[str, str]]) -> list[str]:
    """The row's text under each of the columns, marked where it needs a word."""
    found = []
    for path, form in columns.values():
        cell = text_of(row.values[path], form)
        if path in MEASURED and row.values[SHARED] and row.values[path] is not None:
            cell += "*"
        if path == "method.lr" and not is_own_rate(row.values[LR_FROM]):
            cell = f"~{cell}"
        found.append(cell)
    return found


def lines(
    shown: Sequence[Row], beside: Mapping[str, Mapping[str, str]]
) -> tuple[list[str], list[list[str]]]:
    """Headings and rows as text; `beside` are further columns: heading -> row's name -> text."""
    also = any(row.values["also"] for row in shown)
    own_columns = columns(shown)
    headings = [*own_columns, *beside, "seeds", *(["also"] if also else [])]
    found = []
    for row in shown:
        more = [column.get(row.name, "-") for column in beside.values()]
        own = [row.values["also"]] if also else []
        found.append([*cells(row, own_columns), *more, str(row.values["seeds"]), *own])
    return headings, found


def print_rows(shown: Sequence[Row], beside: Mapping[str, Mapping[str, str]]) -> None:
    """Print rows and the legend."""
    headings, found = lines(shown, beside)
    right = [heading for heading in headings[NUM_TEXT:] if heading != "also"]
    table = plain(headings[:NUM_TEXT], right, headings[NUM_TEXT + len(right) :])
    for line in found:
        table.add_row(*line)
    print()
    show(table)
    print(LEGEND)
    if said := _of_labels(shown):
        print(said)
    if "BLEU" in headings:
        print("BLEU to CIDEr: of the test set's prompts, completed by that model (harness/nlg.py).")
    records = [record for row in shown for record in row.records]
    missing = [results.get(record, "quality.generation.skipped") or {} for record in records]
    for name, why in {name: why for found in missing for name, why in found.items()}.items():
        print(f"without {name}: {why}")
    if any(not is_own_rate(row.values[LR_FROM]) for row in shown):
        print(
            "~: a default rate, or one tuned for something similar; method.lr_from in results.csv\n"
            "says how it was found."
        )
    if any(row.values[SHARED] for row in shown):
        print(SHARED_LEGEND)
    for sentence in remarks(shown):
        print(sentence)


def remarks(shown: Sequence[Row]) -> list[str]:
    """A sentence for what a row's runs have noted of themselves, by seed where they differ.

    Training that ended before its steps, a saved model that is not the one that was evaluated, what
    failed after the test set was read, weights drawn at random, a model that may see what follows.
    """
    said = []
    for row in shown:
        of_run: dict[str, list[int]] = {}
        for record in row.records:
            for remark in _remarks_of(record):
                of_run.setdefault(remark, []).append(record["config"]["seed"])
        for remark, seeds in of_run.items():
            some = len(seeds) < len(row.records)
            whose = f" (seed {', '.join(map(str, sorted(seeds)))})" if some else ""
            said.append(f"{row.name}{whose}: {remark}.")
    return said


def _remarks_of(record: dict[str, Any]) -> Iterator[str]:
    if (why := ends.told(record)) is not None:
        yield why
    if failure := results.get(record, "saved_check.failure"):
        yield str(failure).rstrip(".")
    for problem in record.get("problems") or []:
        yield str(problem).splitlines()[0].rstrip(".")
    if drawn := results.get(record, "model.weights.random"):
        names = ", ".join(drawn[:3]) + ", …" * (len(drawn) > 3)
        yield f"model.strict=false: weights that its files lack were drawn at random ({names})"
    if results.get(record, "model.causal") is False:
        yield "whether the model sees what it is to predict could not be told"


def _of_labels(shown: Sequence[Row]) -> str:
    """What accuracy is, and how far its interval reaches; "" where no row has one."""
    found = [
        quality
        for row in shown
        for record in row.records
        if (quality := results.get(record, CLASSIFIED)) and quality["accuracy"] is not None
    ]
    if not found:
        return ""
    half = max(one["accuracy_high"] - one["accuracy_low"] for one in found) / 2
    fewest, most = (f(one["num_examples"] for one in found) for f in (min, max))
    count = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
    return (
        f"accuracy: of {count} test examples, by the likelihood of the labels; ± {half:.1%} at\n"
        "most (95 % over examples, seeds not counted). majority: always training's commonest label."
    )


def csv_lines(
    table: Sequence[Row], beside: Mapping[str, Mapping[str, Any]]
) -> tuple[list[str], list[list[Any]]]:
    """Columns by their path in result.json, and one line per configuration, with its runs."""
    names = [path for path, _ in columns(table).values()]
    for name in (WRITTEN, *CLASSIFIED_CSV):
        names += [name] if any(row.values[name] is not None for row in table) else []
    names += [*CSV_ONLY, "seeds", "also"]
    found = []
    for row in table:
        runs = " ".join(run_dir.name for run_dir in row.run_dirs)
        own = [*(row.values[name] for name in names), *(b.get(row.name) for b in beside.values())]
        found.append([row.name, *own, runs])
    return ["name", *names, *beside, "runs"], found


def csv_text(table: Sequence[Row], beside: Mapping[str, Mapping[str, Any]]) -> str:
    """`csv_lines` as the text of a CSV file."""
    names, found = csv_lines(table, beside)
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow(names)
    writer.writerows(found)
    return stream.getvalue()
