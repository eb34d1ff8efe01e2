"""Classification by label words: which of the labels the model finds most likely after a prompt.

A task of pairs (`harness.data.pairs`) is a classification where its completions are few and come
again and again: positive / negative, or World / Sports / Business / Sci/Tech. The score of a label
is the log-likelihood of the whole completion, its end-of-text token included, which is what
training predicts and perplexity is of:

    score(y | x) = log p(" y <|endoftext|>" | x <|endoftext|>)

The prediction is the label of the highest score; the length of a label is not corrected for.
Accuracy stands beside that of the majority label: the completion that training has most often,
given to every prompt. Each completion of a prompt is one example, as it is for perplexity.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from accelerate import Accelerator
from datasets import Dataset
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from harness.config.errors import ConfigError
from harness.config.run_config import RunConfig
from harness.data import pairs, sequences
from harness.data.pairs import Pair
from harness.evaluation import sliding_window
from harness.evaluation.probes import PADDED
from harness.system import atomic

MOST_LABELS = 20  # with evaluate.classify=auto: every label costs an evaluation of each split
TIMES_EACH = 5  # likewise: how often a label comes in training, on average, at least
Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True)
class Task:
    """The labels, and the held-out prompts to be labelled."""

    labels: list[str]  # L of them, in alphabetical order
    majority: str  # the label that training has most often
    prompts: dict[str, list[Pair]]  # by split: validation, and test where the run reads it
    sequences: dict[str, Dataset]  # by split: every prompt with every label, L rows a prompt
    warnings: list[str]  # what the user is to know of the labels

    def measure(
        self,
        prepared: nn.Module,
        run_dir: Path,
        *,
        context: int,
        stride: int,
        batch_tokens: int,
        batching: str = PADDED,
        accelerator: Accelerator | None = None,
    ) -> dict[str, Any]:
        """Accuracy and its like by split, for result.json; writes classified-SPLIT.parquet.

        `prepared` is a `NextToken`; the rest is as in `sliding_window.document_nll`.
        """
        results: dict[str, Any] = {"labels": self.labels, "majority": self.majority}
        tables = {}
        for split, rows in self.sequences.items():
            nats, _ = sliding_window.document_nll(
                prepared,
                rows,
                context=context,
                stride=stride,
                bos=None,
                batch_tokens=batch_tokens,
                batching=batching,
                accelerator=accelerator,
            )
            tables[split] = nats.reshape(-1, len(self.labels))
        if accelerator is None or accelerator.is_main_process:  # no rank needs another from here on
            for split, nats in tables.items():
                examples = scored(self.prompts[split], self.labels, nats)
                results[split] = quality(examples, self.labels, self.majority)
                path = run_dir / f"classified-{split}.parquet"
                atomic.write_atomically(path, partial(examples.to_parquet, index=False))
        return results


def read(
    run: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    begins: tuple[int, ...] = (),
    evaluated: Mapping[str, Container[str]] | None = None,
) -> Task | None:
    """The run's task, or None where `evaluate.classify` or its data make it none.

    Labels are the completions of training and validation, whatever `data.train_share` leaves of
    them. `begins` is what a prompt follows (`harness.evaluation.prefix`). `evaluated` has the ids
    of the prompts of each split that perplexity is of, where that is a part
    (`harness.data.subset`).

    Raises:
        ConfigError: a prompt with a label is longer than `data.context_length`; with
            evaluate.classify=always, fewer than two labels.
    """
    cfg, classify = run.data, run.evaluate.classify
    if classify == "never" or cfg.source != "pairs":
        return None
    held_out = ("validation", "test") if run.evaluate.test else ("validation",)
    by_split = pairs.read(replace(cfg, train_share=1.0), ("train", *held_out))
    count = _count(by_split["train"])
    labels = sorted(count.keys() | _count(by_split["validation"]).keys())
    few = 2 <= len(labels) <= MOST_LABELS and count.total() >= TIMES_EACH * len(labels)
    if classify == "auto" and not few:
        return None
    if len(labels) < 2:
        raise ConfigError(
            f"evaluate.classify=always: every completion of data={cfg.name} is {labels[0]!r}, and "
            "there is nothing to choose from: set it to auto"
        )
    prompts = {
        split: [
            example
            for example in by_split[split]
            if evaluated is None or example.id in evaluated[split]
        ]
        for split in held_out
    }
    every_label = {
        split: Dataset(
            sequences.evaluated(
                [replace(pair, completions=labels) for pair in todo],
                tokenizer,
                replace(cfg, loss_on="completion"),
                begins,
            )
        )
        for split, todo in prompts.items()
    }
    warnings = _warnings(labels, prompts)
    return Task(labels, count.most_common(1)[0][0], prompts, every_label, warnings)


def _count(todo: Sequence[Pair]) -> Counter[str]:
    return Counter(text for pair in todo for text in pair.completions)


def _warnings(labels: list[str], prompts: dict[str, list[Pair]]) -> list[str]:
    warnings = []
    alike: dict[str, list[str]] = {}
    for label in labels:
        alike.setdefault(" ".join(label.casefold().split()), []).append(label)
    for same in alike.values():
        if len(same) > 1:
            warnings.append(
                f"the labels {', '.join(map(repr, same))} differ in case or blanks alone, and count"
                " as different answers"
            )
    for split, todo in prompts.items():
        unseen = sorted(_count(todo).keys() - set(labels))
        if unseen:
            warnings.append(
                f"the {split} split has {len(unseen)} completion(s) that training and validation "
                f"have not, as {unseen[0]!r}: no answer to such a prompt counts as right"
            )
    return warnings


def scored(todo: Sequence[Pair], labels: Sequence[str], nats: NDArray[np.float64]) -> pd.DataFrame:
    """A row an example: id, label, predicted, right, and `nats LABEL` of every label.

    `nats` is (prompts, labels): the negative log-likelihood of every label after every prompt.
    """
    owners = [i for i, pair in enumerate(todo) for _ in pair.completions]
    table = pd.DataFrame({"id": [todo[i].id for i in owners]})
    table["label"] = [text for pair in todo for text in pair.completions]
    table["predicted"] = np.array(labels, object)[nats.argmin(axis=1)][owners]
    table["right"] = table["label"] == table["predicted"]
    columns = {f"nats {label}": nats[owners, j] for j, label in enumerate(labels)}
    return pd.concat([table, pd.DataFrame(columns)], axis=1)


def quality(examples: pd.DataFrame, labels: Sequence[str], majority: str) -> dict[str, Any]:
    """accuracy with its 95 % interval over examples, macro_f1, log_loss, majority_accuracy, counts.

    log_loss is in nats an example, of the labels' likelihoods normalised to sum to one; infinite
    where an example's label is not among them. macro_f1 is the mean over the labels that an example
    has or is given. Where a likelihood is no finite number all but the baseline is NaN.
    """
    n = len(examples)
    nats = examples[[f"nats {label}" for label in labels]].to_numpy()
    facts = {
        "majority_accuracy": float((examples["label"] == majority).mean()),
        "num_examples": n,
        "num_unseen": int((~examples["label"].isin(labels)).sum()),
    }
    names = ("accuracy", "accuracy_low", "accuracy_high", "macro_f1", "log_loss")
    if not np.isfinite(nats).all():
        return dict.fromkeys(names, math.nan) | facts
    accuracy = float(examples["right"].mean())
    scores = []
    for label in sorted(set(examples["label"]) | set(examples["predicted"])):
        given, own = examples["predicted"] == label, examples["label"] == label
        scores.append(2 * (given & own).sum() / (given.sum() + own.sum()))
    lowest = nats.min(axis=1, keepdims=True)
    total = lowest[:, 0] - np.log(np.exp(lowest - nats).sum(axis=1))
    place = {label: j for j, label in enumerate(labels)}
    own_nats = [
        row[place[label]] if label in place else math.inf
        for row, label in zip(nats, examples["label"], strict=True)
    ]
    values = (accuracy, *wilson(accuracy, n), float(np.mean(scores)))
    return dict(zip(names, (*values, float(np.mean(own_nats - total))), strict=True)) | facts


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `n` independent examples (Wilson 1927)."""
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)
