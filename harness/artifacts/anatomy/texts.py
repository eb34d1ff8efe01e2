"""The held-out texts of a finished run, read as the run read them, for models made from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from torch import nn

from harness.config import run_config
from harness.config.errors import ConfigError, nearest
from harness.data import token_data
from harness.evaluation import prefix, probes, sliding_window
from harness.evaluation.sliding_window import Nats
from harness.models import pretrained
from harness.models.next_token import NextToken
from harness.results import environment
from harness.runs.finished_run import Saved
from harness.system import contents

NEW = "validation"  # the text that was learnt; test is read once, by the run itself


@dataclass(frozen=True)
class Texts:
    """Documents by name: NEW (and test, if asked for) and the run's further texts."""

    by_name: dict[str, Dataset]
    bos: int | None
    context: int
    stride: int


def key(run: Saved) -> str:
    """What two runs have in common that read the same texts in the same way."""
    config = run.run
    shared = [run_config.to_dict(config)[name] for name in ("data", "evaluate", "model")]
    return json.dumps([shared, config.contents], sort_keys=True, default=str)


def read(run: Saved, *, test: bool = False, only: Sequence[str] = ()) -> Texts:
    """Read and tokenise, or find in the cache, what `run` was evaluated on.

    `only` names those that are wanted, by default all: validation, test if asked for, further ones.

    Raises:
        ConfigError: a text is not there, or not as it was, or the run has none of that name.
    """
    available = [NEW, *(["test"] if test else []), *run.run.evaluate.also]
    for name in only:
        if name not in available:
            raise ConfigError(f"--texts: {run.name} has no text {name}; {nearest(name, available)}")
    disable_progress_bars()
    config = run.run
    contents.check(config)
    first = prefix.find(run.tokenizer, config.evaluate.prefix)
    limits, begins = token_data.most_tokens(config), first.begins  # the part that the run evaluated
    text = token_data.prepare(config.data, run.tokenizer, test=test, begins=begins, most=limits)
    also: dict[str, Dataset] = {}
    for name, cfg in config.evaluate.also.items():
        also[name], _ = token_data.prepare_test(
            cfg, run.tokenizer, begins=begins, most=limits["test"]
        )
    context = config.evaluation_context
    stride = config.evaluate.stride or context
    by_name = {name: table for name, table in (text.held_out | also).items() if name in available}
    kept = {name: by_name[name] for name in only or by_name}
    return Texts(kept, first.id, context, stride)


class Evaluator:
    """Measures one model, whose weights may change between two texts."""

    def __init__(self, run: Saved, model: nn.Module, texts: Texts) -> None:
        self.texts, self.bf16 = texts, environment.precision_of(run.run) == "bf16"
        self.device = torch.accelerator.current_accelerator() or torch.device("cpu")
        settings = pretrained.load_config(run.run.model)
        self.batch_tokens = run.run.evaluate.batch_tokens or sliding_window.batch_tokens(settings)
        with self._autocast():
            self.predicts = NextToken(model.to(self.device))
            widest = min(texts.context, self.batch_tokens // 2)
            name = run.run.model.name
            self.batching = probes.batching(self.predicts, name, settings, widest)

    def nats(self, text: str) -> Nats:
        """Nats and predicted tokens of every document of a text (`sliding_window.document_nll`)."""
        with self._autocast():
            return sliding_window.document_nll(
                self.predicts,
                self.texts.by_name[text],
                context=self.texts.context,
                stride=self.texts.stride,
                bos=self.texts.bos,
                batch_tokens=self.batch_tokens,
                batching=self.batching,
            )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def perplexity(nats: Nats) -> float:
    """Return exp of the mean nats per predicted token; infinite where it overflows."""
    nll, num_tokens = nats
    with np.errstate(over="ignore"):
        return float(np.exp(nll.sum() / num_tokens.sum()))


def batches(texts: Texts, name: str, num_tokens: int, size: int = 8) -> Iterator[torch.Tensor]:
    """Beginnings of documents, (B, T) ids with B <= size, `num_tokens` in all, one width a batch.

    Each is at most a context long and starts as evaluation has it start.
    """
    table = texts.by_name[name].with_format("arrow")[:]
    first = table["first"].to_pylist() if "first" in table.column_names else None
    by_width: dict[int, list[list[int]]] = {}
    left = num_tokens
    for row, column in enumerate(table["tokens"]):
        start = first[row] if first else texts.bos
        ids = [*([] if start is None else [start]), *column.as_py()]
        ids = ids[: min(texts.context, left)]
        if ids:
            by_width.setdefault(len(ids), []).append(ids)
            left -= len(ids)
        if left <= 0:
            break
    for rows in by_width.values():
        for begin in range(0, len(rows), size):
            yield torch.tensor(rows[begin : begin + size])
