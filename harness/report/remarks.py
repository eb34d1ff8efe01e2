"""What runs have noted of themselves, in sentences under a table."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from harness.config import ending
from harness.report.table import CLASSIFIED, Row
from harness.results import numbers, run_record
from harness.results.record_types import Record


def remarks(shown: Sequence[Row]) -> list[str]:
    """A sentence for what a row's runs have noted of themselves, by seed where they differ.

    Training that ended before its steps, a saved model that is not the one that was evaluated, what
    failed after the test set was read, weights drawn at random, a model that may see what follows.
    """
    sentences = []
    for row in shown:
        of_run: dict[str, list[int]] = {}
        for record in row.records:
            for remark in _remarks_of(record):
                of_run.setdefault(remark, []).append(record["config"]["seed"])
        for remark, seeds in of_run.items():
            some_seeds = len(seeds) < len(row.records)
            whose = f" (seed {', '.join(map(str, sorted(seeds)))})" if some_seeds else ""
            sentences.append(f"{row.name}{whose}: {remark}.")
    return sentences


def _remarks_of(record: Record) -> Iterator[str]:
    if (why := ending.told(record)) is not None:
        yield why
    if failure := run_record.get(record, "saved_check.failure"):
        yield str(failure).rstrip(".")
    for problem in record.get("problems") or []:
        yield str(problem).splitlines()[0].rstrip(".")
    if drawn := run_record.get(record, "model.weights.random"):
        names = ", ".join(drawn[:3]) + ", …" * (len(drawn) > 3)
        yield f"model.strict=false: weights that its files lack were drawn at random ({names})"
    if budget := run_record.get(record, "method.budget"):
        yield _of_budget(budget, record["method"]["ranks"])
    if run_record.get(record, "model.causal") is False:
        yield "whether the model sees what it is to predict could not be told"


def _of_budget(budget: dict[str, int], ranks: dict[str, int]) -> str:
    """What AdaLoRA has left: of all matrices, and of those with the most and the fewest."""
    kinds: dict[str, list[int]] = {}
    for name, rank in ranks.items():
        kinds.setdefault(re.sub(r"^.*\.\d+\.", "", name), []).append(rank)
    means = sorted(((sum(r) / len(r), kind) for kind, r in kinds.items()), reverse=True)
    by_kind = ", ".join(f"{kind} {mean:.3g}" for mean, kind in means)
    return (
        f"{budget['reached']} of {budget['initial']} triplets are left (target "
        f"{budget['target']}), {budget['parameters']:,} parameters; {min(ranks.values())} to "
        f"{max(ranks.values())} a matrix, on average: {by_kind}"
    )


def of_labels(shown: Sequence[Row]) -> str:
    """What accuracy is, and how far its interval reaches; "" where no row has one."""
    scores = [
        quality
        for row in shown
        for record in row.records
        if (quality := run_record.get(record, CLASSIFIED)) and quality["accuracy"] is not None
    ]
    if not scores:
        return ""
    half = max(score["accuracy_high"] - score["accuracy_low"] for score in scores) / 2
    min_examples, max_examples = (f(score["num_examples"] for score in scores) for f in (min, max))
    count = (
        f"{min_examples:,}"
        if min_examples == max_examples
        else f"{min_examples:,} to {max_examples:,}"
    )
    return (
        f"accuracy: of {count} test examples, by the likelihood of the labels; "
        f"± {numbers.share(half)} at most (95 % over examples, seeds not counted). "
        "majority: always training's commonest label."
    )
