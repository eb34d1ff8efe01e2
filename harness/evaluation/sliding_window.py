"""Nats per document by a sliding window, and what they come to: perplexity and bits per byte.

A document's tokens t_1 … t_n follow one token t_0, the end-of-text token or BOS
(`harness.evaluation.prefix`), so that every token is predicted. With context C and stride S the
first window predicts t_1 … t_C; each further window moves S on and scores only what is new, so that
every token is predicted exactly once, given at most C tokens of its document (t_0 included): all
that came before it, or at least C - S + 1. The last window ends with the document and reaches back
for its whole context: at S = C it overlaps the one before, and what it scores is given more than a
grid of windows would (207.6 instead of 213.7 for gpt2_mini on the King James text). Documents never
see one another.
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

from harness.data.token_tables import IGNORE
from harness.evaluation import ranks
from harness.evaluation.probes import ONE_ROW, ONE_WIDTH, PADDED

ACTIVATION_BYTES = 64 * 2**20  # that a batch of evaluation may take, where its size is not given
UNKNOWN_WIDTH = 1024  # of a model whose configuration does not say
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


def batch_shapes(
    num_tokens: list[int],
    context: int,
    stride: int,
    batch_tokens: int,
    batching: str = PADDED,
) -> list[tuple[int, int]]:
    """(windows, tokens of the longest) of every batch that `document_nll` makes of a text.

    In its order: the first one, whose memory a run follows, has the longest windows.
    """
    todo = list(windows(num_tokens, context, stride))
    return [
        (len(batch), _width(todo[batch[0]])) for batch in _batches(todo, batch_tokens, batching)
    ]


def batch_tokens(config: PretrainedConfig) -> int:
    """Tokens of an evaluation batch whose activations fit ACTIVATION_BYTES.

    Without gradients one layer is alive at a time: the residual stream and the block's inputs and
    outputs, about 6 widths a token, and the MLP's inner activations before and after its GELU. The
    chunk of logits comes on top (`harness.models.loss`), as in training.
    """
    text = config.get_text_config()
    width = getattr(text, "hidden_size", None) or getattr(text, "d_model", None) or UNKNOWN_WIDTH
    # Null or left out where an architecture has a default; a list where layers differ.
    inner = getattr(text, "n_inner", None) or getattr(text, "intermediate_size", None) or 4 * width
    if isinstance(inner, list | tuple):
        inner = max(inner)
    return max(1, ACTIVATION_BYTES // (4 * (6 * width + 2 * inner)))


def document_nll(
    prepared: nn.Module,
    documents: Dataset,
    *,
    context: int,
    stride: int,
    bos: int | None,
    batch_tokens: int,
    batching: str = PADDED,
    accelerator: Accelerator | None = None,
    following: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Nats:
    """Summed nats and number of predicted tokens of every document: (N,) float64 and (N,) int64.

    Tokens are read from the data set batch by batch, not held. Of rows that `sequences.evaluated`
    made, what follows the prompt counts, or what is marked as `scored`, and `first` stands for
    `bos`; without a `bos` a document is predicted from its second token on. The rest is as in
    `window_nll`.
    """
    table = documents.with_format("arrow")[:]  # mapped from disk, not read
    column = table["tokens"]
    paired = "skipped" in table.column_names
    skipped = table["skipped"].to_numpy() if paired else np.zeros(len(column), np.int64)
    before = table["first"].to_numpy() if paired else np.full(len(column), bos or 0)
    given = int(bos is None and not paired)  # tokens of a document that nothing comes before
    marked = table["scored"] if "scored" in table.column_names else None

    def counts(w: Window) -> NDArray[np.bool_]:
        """Which of the targets that a window scores count: of conversations, the assistant's."""
        if marked is None:
            return np.ones(w.scored, np.bool_)
        row = marked[w.document].values.slice(w.end - w.scored, w.scored)
        return np.asarray(row.to_numpy(zero_copy_only=False), np.bool_)

    def ids(w: Window) -> NDArray[np.int64]:
        if given:
            return column[w.document].values.to_numpy()[w.start : w.end + 1].astype(np.int64)
        # Input i is token i - 1 of the document; the one before its first is `bos`.
        own = column[w.document].values.to_numpy()[max(0, w.start - 1) : w.end].astype(np.int64)
        return own if w.start else np.concatenate([before[w.document : w.document + 1], own])

    lengths = pc.list_value_length(column).to_pylist()
    todo = [
        replace(w, scored=min(w.scored, max(0, w.end - int(skipped[w.document]))))
        for w in windows([max(0, n - given) for n in lengths], context, stride)
    ]
    nats = window_nll(
        prepared,
        todo,
        ids,
        counts=counts if marked is not None else None,
        batch_tokens=batch_tokens,
        batching=batching,
        accelerator=accelerator,
        following=following,
    )
    owners = np.array([w.document for w in todo], np.int64)
    nll, count = np.zeros(len(column)), np.zeros(len(column), np.int64)
    np.add.at(nll, owners, nats)
    np.add.at(count, owners, [int(counts(w).sum()) for w in todo])
    return nll, count


@torch.no_grad()
def window_nll(
    prepared: nn.Module,
    todo: list[Window],
    ids: Callable[[Window], NDArray[np.int64]],
    *,
    counts: Callable[[Window], NDArray[np.bool_]] | None = None,
    batch_tokens: int,
    batching: str = PADDED,
    accelerator: Accelerator | None = None,
    following: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> NDArray[np.float64]:
    """Summed nats of what every window scores, (W,) float64; ranks share the work.

    `prepared` is a `NextToken`. `ids` gives a window's inputs and one id more, the last target;
    `counts`, which of the targets that it scores are to be predicted at all.
    `batching` is how windows may share a batch (`probes.batching`). `following` is
    entered around the first batch, which has the longest windows.
    """
    device = next(prepared.parameters()).device
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    batches = list(_batches(todo, batch_tokens, batching))
    nll = torch.zeros(len(todo), dtype=torch.float64)
    was_training = prepared.training
    prepared.eval()
    model, divided = ranks.to_evaluate(prepared)
    with ranks.together(accelerator, divided=divided):
        for first in range(0, len(batches), world):  # ranks that share a model run it together
            mine = first + rank < len(batches)  # or else another rank's, for company
            batch = batches[min(first + rank, len(batches) - 1)]
            inputs = torch.zeros(len(batch), _width(todo[batch[0]]), dtype=torch.int64)
            targets = torch.full_like(inputs, IGNORE)
            for row, w in enumerate(todo[index] for index in batch):
                read, length = torch.from_numpy(ids(w)), _width(w)
                inputs[row, :length] = read[:-1]
                scored = read[length - w.scored + 1 :]
                if counts is not None:
                    scored = scored.masked_fill(~torch.from_numpy(counts(w)), IGNORE)
                targets[row, length - w.scored : length] = scored
            # Widths differ from batch to batch: compiled blocks would be compiled again for each.
            with torch.compiler.set_stance("force_eager"), nullcontext() if first else following():
                nats = model(inputs.to(device), targets.to(device)).nats
            if mine:
                nll[batch] = nats.double().sum(1).cpu()
    if accelerator and world > 1:
        nll = accelerator.reduce(nll.to(device), "sum").cpu()
    prepared.train(was_training)
    return nll.numpy()


def _width(window: Window) -> int:
    return window.end - window.start


def _batches(todo: list[Window], batch_tokens: int, batching: str = PADDED) -> Iterator[list[int]]:
    """Indices of windows whose padded size stays within `batch_tokens` (one window at least).

    Windows of like length share a batch: little of a forward pass is spent on padding. With
    ONE_WIDTH they share it only where they are of one length, with ONE_ROW never.
    """
    order = sorted(range(len(todo)), key=lambda index: -_width(todo[index]))
    start = 0
    while start < len(order):
        width = _width(todo[order[start]])
        batch = order[start : start + max(1, batch_tokens // width)]
        if batching == ONE_ROW:
            batch = batch[:1]
        elif batching == ONE_WIDTH:
            batch = [index for index in batch if _width(todo[index]) == width]
        yield batch
        start += len(batch)


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
