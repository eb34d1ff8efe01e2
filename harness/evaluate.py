"""Nats per document by a sliding window, and what they come to: perplexity and bits per byte.

A document's tokens t_1 … t_n follow the end-of-text token t_0, so that every token is predicted.
With context C and stride S the first window predicts t_1 … t_C; each further window moves S on and
scores only what is new, so that every token is predicted exactly once, given at least C - S tokens
(and at most C) of its document. Documents never see one another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from numpy.typing import NDArray
from torch import nn

from harness.loss import token_nll

METRIC_DIR = Path(__file__).resolve().parent / "metrics" / "language_model_nll"


@dataclass(frozen=True)
class Window:
    """Ids [start, end) of a document's inputs, of whose targets the last `scored` count."""

    document: int
    start: int
    end: int
    scored: int


def windows(num_tokens: list[int], context: int, stride: int) -> Iterator[Window]:
    """The windows of every document; `num_tokens` are to be predicted in each (may be 0)."""
    for document, n in enumerate(num_tokens):
        done = 0
        while done < n:
            end = min(n, context if done == 0 else done + stride)
            yield Window(document, max(0, end - context), end, end - done)
            done = end


@torch.no_grad()
def document_nll(
    model: nn.Module,
    documents: Dataset,
    *,
    context: int,
    stride: int,
    bos: int,
    batch_tokens: int,
    accelerator: Accelerator | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Summed nats and number of predicted tokens of every document: (N,) float64 and (N,) int64."""
    device = next(model.parameters()).device
    tokens = [np.concatenate([[bos], ids]).astype(np.int64) for ids in documents["tokens"]]
    # Windows of like length share a batch: no forward pass is spent on padding.
    todo = list(windows([len(ids) - 1 for ids in tokens], context, stride))
    todo.sort(key=lambda w: w.end - w.start, reverse=True)
    nll = torch.zeros(len(tokens), dtype=torch.float64)
    count = torch.zeros(len(tokens), dtype=torch.int64)
    was_training = model.training
    model.eval()
    batches = list(_batches(todo, batch_tokens))
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    for batch in batches[rank::world]:
        width = batch[0].end - batch[0].start
        inputs = torch.full((len(batch), width), bos)
        targets = torch.full((len(batch), width), -100)
        for row, w in enumerate(batch):
            ids, length = tokens[w.document], w.end - w.start
            inputs[row, :length] = torch.from_numpy(ids[w.start : w.end])
            first = length - w.scored
            targets[row, first:length] = torch.from_numpy(ids[w.start + first + 1 : w.end + 1])
        sums = token_nll(model, inputs.to(device), targets.to(device)).double().sum(1).cpu()
        rows = torch.tensor([w.document for w in batch])
        nll.index_add_(0, rows, sums)
        count.index_add_(0, rows, torch.tensor([w.scored for w in batch]))
    if accelerator and world > 1:
        nll = accelerator.reduce(nll.to(device), "sum").cpu()
        count = accelerator.reduce(count.to(device), "sum").cpu()
    model.train(was_training)
    return nll.numpy(), count.numpy()


def _batches(todo: list[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Consecutive windows whose padded size stays within `batch_tokens` (one window at least)."""
    start = 0
    while start < len(todo):
        width = todo[start].end - todo[start].start
        size = max(1, batch_tokens // width)
        yield todo[start : start + size]
        start += size


def quality(
    nll: NDArray[np.float64], num_tokens: NDArray[np.int64], documents: Dataset
) -> dict[str, Any]:
    """nll_nats, num_tokens, perplexity, word_perplexity, bits_per_byte over all documents."""
    metric = evaluate.load(str(METRIC_DIR), keep_in_memory=True)
    result = metric.compute(
        nll_nats=nll,
        num_tokens=num_tokens,
        num_words=documents["num_words"],
        num_bytes=documents["num_bytes"],
    )
    assert result is not None
    return result
