"""Results of PEFT's method_comparison, read with the uncertainty that they do not state.

    harness report --peft-results peft/method_comparison/MetaMathQA/results

A file of theirs (run_info, train_info, meta_info) is one run with one seed. Its test accuracy is a
share of so many items: Wilson's interval says what another draw of such items could have given, and
two-proportion tests of all pairs (Holm) which rows can be told apart at all. The rows answer the
same items, but which ones they get right is not published: the tests take the answers as
independent, which is cautious where rows get the same items right. Of seeds nothing is known.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import special

from harness.config.errors import ConfigError, nearest
from harness.evaluation.classification import wilson
from harness.report.ranking import holm
from harness.report.stats import ALPHA

ITEMS = {"gsm8k": 1319}  # of the test split, by data set
ACCURACY = "test accuracy"
NEEDED = ("run_info", "train_info", "meta_info")
MEMORY = ("accelerator_memory_max", "cuda_memory_max")  # before June 2025 the second


@dataclass(frozen=True)
class Result:
    """One file: a method with its settings, trained once."""

    path: Path
    name: str  # experiment_name
    peft_type: str  # or full-finetuning
    model: str
    task: str  # the data sets, by name
    metric: str  # of the test set, as in "test accuracy"
    value: float
    seed: int | None
    forgetting: float | None  # nats per token of other text, after less before
    trainable: int | None  # since June 2025
    total: int | None
    memory_bytes: int
    file_bytes: int
    train_seconds: float
    created: str


@dataclass(frozen=True)
class Ranked:
    """A result with what its test set's size says of it; None where its metric is no share."""

    result: Result
    interval: tuple[float, float] | None
    places: str  # the places that the tests leave open, "2" or "2-9"; "" where there are no tests
    ties_best: bool


@dataclass(frozen=True)
class Comparison:
    """All results of a folder, the best first."""

    ranked: list[Ranked]
    items: int | None  # of the test set; None where the metric is no share of items
    skipped: list[str]  # what was left out, and why


def read(folder: Path, items: int | None = None) -> Comparison:
    """Read every result in `folder` and compare them.

    `items` is the size of the test set, which the files do not have; of data sets in ITEMS it is
    known.

    Raises:
        ConfigError: no such folder, a file that is none of theirs, results of several base models
            or tasks, or accuracies that are no shares of `items`.
    """
    if not folder.is_dir():
        siblings = [p.name for p in folder.parent.glob("[!.]*") if p.is_dir()]
        raise ConfigError(f"no folder {folder}; {nearest(folder.name, siblings)}")
    results: list[Result] = []
    skipped: list[str] = []
    for path in sorted(folder.glob("*.json")):
        result = _read(path)
        if isinstance(result, str):
            skipped.append(f"{path.name}: {result}")
        else:
            results.append(result)
    if not results:
        why = f" ({'; '.join(skipped)})" if skipped else ": it has no *.json"
        raise ConfigError(f"no result of PEFT's method_comparison in {folder}{why}")
    for what in ("model", "task", "metric"):
        if len(values := sorted({getattr(run, what) for run in results})) > 1:
            raise ConfigError(f"results of several {what}s do not compare: {', '.join(values)}")
    newest: dict[str, Result] = {}
    for run in sorted(results, key=lambda run: run.created):
        if (old := newest.get(run.name)) is not None:
            skipped.append(f"{old.path.name}: {run.path.name} is a newer run of {run.name}")
        newest[run.name] = run
    return _compared(list(newest.values()), items, skipped)


def _read(path: Path) -> Result | str:
    """The result in a file, or why it has none."""
    try:
        record = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(record, dict) or (gone := [key for key in NEEDED if key not in record]):
        reason = f"it has no {gone[0]}" if isinstance(record, dict) else "it is no object"
        raise ConfigError(f"{path} is no result of PEFT's method_comparison: {reason}")
    run, train, meta = (record[key] for key in NEEDED)
    if train.get("status") != "success":
        return f"its status is {train.get('status')!r}, not 'success'"
    try:
        last = train["metrics"][-1]
        metric = next(key for key in last if key.startswith("test ") and key != "test samples")
        if last[metric] is None:
            return f"it has no {metric}"
        peft_type = (run["peft_config"] or {}).get("peft_type", "full-finetuning")
        return Result(
            path=path,
            name=str(run["experiment_name"]),
            peft_type=str(peft_type),
            model=str(run["train_config"]["model_id"]),
            task=_task(meta.get("dataset_info") or {}, run["train_config"]),
            metric=metric,
            value=float(last[metric]),
            seed=run["train_config"].get("seed"),
            forgetting=_number(last.get("forgetting")),
            trainable=train.get("num_trainable_params"),
            total=train.get("num_total_params"),
            memory_bytes=int(next(train[key] for key in MEMORY if key in train)),
            file_bytes=int(train["file_size"]),
            train_seconds=float(train["train_time"]),
            created=str(run["created_at"]),
        )
    except (KeyError, IndexError, StopIteration, TypeError, ValueError) as error:
        what = f"{type(error).__name__} {error}".strip()
        raise ConfigError(
            f"{path}: a field of PEFT's method_comparison is missing or of another type ({what})"
        ) from error


def _number(value: Any) -> float | None:
    return None if value is None or math.isnan(float(value)) else float(value)


def _task(datasets: dict[str, Any], config: dict[str, Any]) -> str:
    """The data sets by name: one entry for each, or the fields of a single one."""
    named = [key for key, value in datasets.items() if isinstance(value, dict)]
    return " and ".join(sorted(named)) or str(config.get("dataset_id", "unknown"))


def _compared(results: list[Result], items: int | None, skipped: list[str]) -> Comparison:
    ordered = sorted(results, key=lambda result: -result.value)
    if ordered[0].metric != ACCURACY:
        if items is not None:
            raise ConfigError(f"--items: {ordered[0].metric} is no share of items")
        return Comparison([Ranked(result, None, "", False) for result in ordered], None, skipped)
    known = [size for name, size in ITEMS.items() if name in ordered[0].task.split(" and ")]
    count = items or (known[0] if known else None)
    if count is None:
        raise ConfigError(
            f"the size of the test set of {ordered[0].task} is not in the files: give --items N"
        )
    right = [result.value * count for result in ordered]
    for result, number in zip(ordered, right, strict=True):
        if not 0 <= result.value <= 1 or abs(number - round(number)) > 1e-6 * count:
            raise ConfigError(
                f"{result.path.name}: accuracy {result.value!r} is no share of {count:,} items; "
                "give the size of the test set by --items"
            )
    pairs = list(itertools.combinations(range(len(ordered)), 2))  # the first is never worse
    values = [result.value for result in ordered]
    adjusted = holm([two_proportions(values[a], values[b], count) for a, b in pairs])
    wins = {pair for pair, p in zip(pairs, adjusted, strict=True) if p < ALPHA}
    ranked = []
    for place, result in enumerate(ordered):
        best = 1 + sum(loser == place for _, loser in wins)
        worst = len(ordered) - sum(winner == place for winner, _ in wins)
        places = f"{best}-{worst}" if best < worst else f"{best}"
        ranked.append(Ranked(result, wilson(result.value, count), places, (0, place) not in wins))
    return Comparison(ranked, count, skipped)


def two_proportions(a: float, b: float, items: int) -> float:
    """The p-value of no difference between two shares of `items` independent items each.

    The pooled two-proportion z-test, two-sided; 1 where both are all or nothing.
    """
    pooled = (a + b) / 2
    variance = 2 * pooled * (1 - pooled) / items
    return 1.0 if variance == 0 else float(2 * special.ndtr(-abs(a - b) / math.sqrt(variance)))


def answer(comparison: Comparison) -> str:
    """The best row, and how many of the others cannot be told from it, in plain words."""
    best = comparison.ranked[0]
    result = best.result
    if best.interval is None:
        return (
            f"{result.name} has the highest {result.metric}, {result.value:.4g}. It is no share of "
            "items, so that its files tell nothing of its uncertainty: no row can be told apart."
        )
    low, high = best.interval
    ties = sum(row.ties_best for row in comparison.ranked) - 1
    others = len(comparison.ranked) - 1
    return (
        f"{result.name} has the highest accuracy, {100 * result.value:.1f} % (95 % {100 * low:.1f} "
        f"to {100 * high:.1f}); {ties} of the {others} other rows cannot be told from it."
    )


def notes(comparison: Comparison) -> list[str]:
    """What these numbers can say and what they cannot, a sentence or two each."""
    seeds = sorted({row.result.seed for row in comparison.ranked}, key=str)
    sentences = []
    if comparison.items is not None:
        sentences.append(
            f"Intervals are Wilson's over {comparison.items:,} test items. Rank: the places that "
            "two-proportion tests of all pairs leave open at 5 %, adjusted by Holm."
        )
        sentences.append(
            "All rows answer the same items, but the files do not say which ones each gets right. "
            "The tests take the answers as independent, which tells too few rows apart where rows "
            "get the same items right; a paired test needs the answers."
        )
    seed_text = f"seed {seeds[0]}" if len(seeds) == 1 else "one seed each"
    sentences.append(
        f"Every row is one run ({seed_text}) at the learning rate of its author: no number here "
        "says what another seed would have given, so that none says that a method is better than "
        "another."
    )
    return sentences + [f"Left out: {reason}." for reason in comparison.skipped]
