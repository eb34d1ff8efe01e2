"""Nats per document by a sliding window, and what they come to: perplexity and bits per byte.

A document's tokens t_1 … t_n follow the end-of-text token t_0, so that every token is predicted.
With context C and stride S the first window predicts t_1 … t_C; each further window moves S on and
scores only what is new, so that every token is predicted exactly once, given at least C - S + 1
tokens of its document (t_0 included) and at most C. The last window ends with the document and
reaches back for its whole context: at S = C it overlaps the one before, and what it scores is
given more than a grid of windows would (207.6 instead of 213.7 for gpt2_mini on the King James
text). Documents never see one another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pyarrow.compute as pc
import torch
from accelerate import Accelerator
from datasets import Dataset
from numpy.typing import NDArray
from torch import nn
from transformers import PretrainedConfig

from harness.loss import IGNORE

ACTIVATION_BYTES = 64 * 2**20  # that a batch of evaluation may take, where its size is not given
METRIC_DIR = Path(__file__).resolve().parent / "metrics" / "language_model_nll"
Nats = tuple[NDArray[np.float64], NDArray[np.int64]]  # summed, and predicted tokens, by document


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


def batch_tokens(config: PretrainedConfig) -> int:
    """Tokens of an evaluation batch whose activations fit ACTIVATION_BYTES.

    Without gradients one layer is alive at a time: the residual stream and the block's inputs and
    outputs, about 6 widths a token, and the MLP's inner activations before and after its GELU. The
    chunk of logits comes on top (`harness.loss`), as in training.
    """
    width = config.hidden_size
    inner = getattr(config, "n_inner", None) or getattr(config, "intermediate_size", 4 * width)
    return max(1, ACTIVATION_BYTES // (4 * (6 * width + 2 * inner)))


@torch.no_grad()
def document_nll(
    prepared: nn.Module,
    documents: Dataset,
    *,
    context: int,
    stride: int,
    bos: int,
    batch_tokens: int,
    accelerator: Accelerator | None = None,
    following: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Nats:
    """Summed nats and number of predicted tokens of every document: (N,) float64 and (N,) int64.

    `prepared` is a `NextToken`. Tokens are read from the data set batch by batch, not held. Of rows
    that `pairs.evaluated` made, what follows the prompt counts, and `first` stands for `bos`.
    `following` is entered around the first batch, the largest one.
    """
    device = next(prepared.parameters()).device
    table = documents.with_format("arrow")[:]  # mapped from disk, not read
    column = table["tokens"]
    paired = "skipped" in table.column_names
    skipped = table["skipped"].to_numpy() if paired else np.zeros(len(column), np.int64)
    before = table["first"].to_numpy() if paired else np.full(len(column), bos)
    # Windows of like length share a batch: no forward pass is spent on padding.
    todo = list(windows(pc.list_value_length(column).to_pylist(), context, stride))
    todo.sort(key=lambda w: w.end - w.start, reverse=True)
    nll = torch.zeros(len(column), dtype=torch.float64)
    count = torch.zeros(len(column), dtype=torch.int64)
    was_training = prepared.training
    prepared.eval()
    batches = list(_batches(todo, batch_tokens))
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    mine = batches[rank::world]
    if len(mine) < -(-len(batches) // world):  # ranks that share a model run it together
        mine.append([replace(w, scored=0) for w in batches[-1]])
    for index, batch in enumerate(mine):
        width = batch[0].end - batch[0].start
        inputs = torch.full((len(batch), width), bos)
        targets = torch.full((len(batch), width), IGNORE)
        scored = []
        for row, w in enumerate(batch):
            # Input i is token i - 1 of the document; the one before its first is `bos`.
            ids = column[w.document].values.to_numpy()
            length = w.end - w.start
            first = min(length, max(length - w.scored, int(skipped[w.document]) - w.start))
            scored.append(length - first)
            start = max(w.start, 1)
            if not w.start:
                inputs[row, 0] = int(before[w.document])
            inputs[row, start - w.start : length] = torch.from_numpy(
                ids[start - 1 : w.end - 1].astype(np.int64)
            )
            targets[row, first:length] = torch.from_numpy(
                ids[w.start + first : w.end].astype(np.int64)
            )
        # Widths differ from batch to batch: compiled blocks would be compiled again for each.
        with torch.compiler.set_stance("force_eager"), following() if index == 0 else nullcontext():
            nats = prepared(inputs.to(device), targets.to(device)).nats
        rows = torch.tensor([w.document for w in batch])
        nll.index_add_(0, rows, nats.double().sum(1).cpu())
        count.index_add_(0, rows, torch.tensor(scored))
    if accelerator and world > 1:
        nll = accelerator.reduce(nll.to(device), "sum").cpu()
        count = accelerator.reduce(count.to(device), "sum").cpu()
    prepared.train(was_training)
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
