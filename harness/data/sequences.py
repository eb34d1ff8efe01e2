"""Pairs and conversations as tokens: training blocks and held-out rows, predicted in part.

The sequence of a pair is

    prompt <|endoftext|> " " completion <|endoftext|>

of which the completion and its end-of-text token are predicted (Hu et al. 2021, examples/NLG of
microsoft/LoRA); before the prompt stands BOS where `harness.evaluation.prefix` says so. That of a
conversation is what its chat template writes (`harness.data.chat`), of which the assistant's turns
are predicted, or with data.loss_on=completion its last one. With data.loss_on=all every token is,
the first one after BOS or the end-of-text token.

A training block holds one sequence, or with `data.packing=packed` as many as fit in
`data.context_length`: each has its own positions and sees itself alone, so that packing changes no
loss. `data.too_long` says what becomes of a sequence that is longer than a block; held-out
sequences are evaluated as a whole, by the sliding window.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from harness.config.errors import ConfigError
from harness.config.schema import DataConfig
from harness.data import chat
from harness.data.forms import Turn
from harness.data.pairs import Pair
from harness.data.token_tables import IGNORE

TOO_LONG = ("refuse", "cut", "drop", "window")
BATCH = 1000  # pairs that are encoded, and blocks that are written, at a time
LOSS_ON = ("assistant", "completion", "all")


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """Holds the token ids of a prompt with one of its completions, five bytes a token."""

    pair: str  # its id
    tokens: NDArray[np.int32]
    counts: NDArray[np.bool_]  # of every id but the first: whether it is predicted
    completion: str
    scored: tuple[str, ...]  # the texts whose words and bytes are counted: what is predicted

    @classmethod
    def of(
        cls,
        pair: str,
        ids: list[int],
        predicted: list[bool],
        completion: str,
        scored: tuple[str, ...],
    ) -> Example:
        """Make a sequence of lists of ids and of what is predicted."""
        return cls(pair, np.array(ids, np.int32), np.array(predicted, bool), completion, scored)

    @property
    def ids(self) -> list[int]:
        """Return the token ids of the sequence, inputs and targets, as a list."""
        return list(self.tokens.tolist())

    @property
    def predicted(self) -> list[bool]:
        """Return, for every id but the first, whether the loss counts it."""
        return list(self.counts.tolist())

    @property
    def length(self) -> int:
        """Return the number of inputs, which is the number of targets, too."""
        return len(self.tokens) - 1

    @property
    def num_prompt(self) -> int:
        """Return the number of ids before the first one that is predicted."""
        return int(self.counts.argmax()) + 1

    @property
    def num_predicted(self) -> int:
        """Return the number of targets that count in the loss of the sequence."""
        return int(self.counts.sum())

    @property
    def targets(self) -> NDArray[np.int32]:
        """What is predicted at every input; IGNORE where that does not count."""
        return np.where(self.counts, self.tokens[1:], np.int32(IGNORE))


# --------------------------------------------------------------------------- sequences


def sequences(
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    cfg: DataConfig,
    begins: tuple[int, ...] = (),
) -> list[Example]:
    """Every prompt, after the ids `begins`, with each of its completions, however long.

    Raises:
        ConfigError: one is longer than `data.context_length`, and `data.too_long` is `refuse`.
    """
    end = tokenizer.eos_token_id
    assert isinstance(end, int)
    if cfg.loss_on == "all":  # or else nothing would come before the first token
        begins = begins or (end,)
    examples: list[Example] = []
    for first in range(0, len(pairs), BATCH):  # lists of ids take many times their bytes
        batch = pairs[first : first + BATCH]
        plain = iter(
            _of_pairs([pair for pair in batch if not pair.turns], tokenizer, cfg, begins, end)
        )
        chats = iter(_of_chats([pair for pair in batch if pair.turns], tokenizer, cfg, begins))
        examples += [
            next(chats if pair.turns else plain) for pair in batch for _ in pair.completions
        ]
    longest = max(examples, key=lambda example: example.length)
    if longest.length > cfg.context_length and cfg.too_long == "refuse":
        more = sum(example.length > cfg.context_length for example in examples)
        raise ConfigError(
            f"{longest.pair} with its completion is {longest.length} tokens, longer than "
            f"data.context_length={cfg.context_length}, as {more} of {len(examples)} are: set "
            f"data.context_length={longest.length} or more, or data.too_long=cut, drop or window"
        )
    return examples


def _of_pairs(
    pairs: list[Pair],
    tokenizer: PreTrainedTokenizerBase,
    cfg: DataConfig,
    begins: tuple[int, ...],
    end: int,
) -> list[Example]:
    completions = [text for pair in pairs for text in pair.completions]
    prompts = _encode([pair.prompt for pair in pairs], tokenizer)
    answers = iter(_encode([f" {text}" for text in completions], tokenizer))
    examples = []
    for pair, prompt in zip(pairs, prompts, strict=True):
        given = [*begins, *prompt, end]
        for text in pair.completions:
            ids = [*given, *next(answers), end]
            predicted = [i >= len(given) for i in range(1, len(ids))]
            scored: tuple[str, ...] = (text,)
            if cfg.loss_on == "all":
                predicted, scored = [True] * (len(ids) - 1), (pair.prompt, text)
            examples.append(Example.of(pair.id, ids, predicted, text, scored))
    return examples


def _of_chats(
    pairs: list[Pair],
    tokenizer: PreTrainedTokenizerBase,
    cfg: DataConfig,
    begins: tuple[int, ...],
) -> list[Example]:
    if not pairs:
        return []
    template = chat.template_of(tokenizer, cfg.chat_template)
    own_begins = () if template.own else begins  # a template of the tokenizer's own writes it
    todo = [(pair, text) for pair in pairs for text in pair.completions]
    conversations = [[*pair.turns, ("assistant", text)] for pair, text in todo]
    pieces = [
        chat.written(turns, template, tokenizer, f"{pair.id} ({pair.prompt[:40]!r})")
        for turns, (pair, _) in zip(conversations, todo, strict=True)
    ]
    if cfg.loss_on != "all":  # nothing is predicted after the assistant's last turn
        pieces = [parts[:-1] for parts in pieces]
    if cfg.loss_on == "completion":
        pieces = [
            [*(replace(p, assistant=False) for p in parts[:-1]), parts[-1]] for parts in pieces
        ]
    encoded = chat.to_ids(pieces, lambda texts: _encode(texts, tokenizer))
    examples = []
    for (pair, text), turns, (ids, marks) in zip(todo, conversations, encoded, strict=True):
        scored = [content for role, content in turns if role == "assistant"]
        if cfg.loss_on == "completion":
            scored = [text]
        elif cfg.loss_on == "all":
            marks = [True] * len(ids)
            scored = [content for _, content in turns]
        ids, marks = [*own_begins, *ids], [False] * len(own_begins) + marks
        examples.append(Example.of(pair.id, ids, marks[1:], text, tuple(scored)))
    return examples


def prompt_ids(
    pair: Pair,
    tokenizer: PreTrainedTokenizerBase,
    begins: tuple[int, ...] = (),
    chat_template: str = "auto",
) -> list[int]:
    """Return the token ids that a model is given, to complete them."""
    if not pair.turns:
        return [*begins, *_encode([pair.prompt], tokenizer)[0], tokenizer.eos_token_id]
    template = chat.template_of(tokenizer, chat_template)
    answer: Turn = ("assistant", pair.completions[0] if pair.completions else "-")
    pieces = chat.written([*pair.turns, answer], template, tokenizer, pair.id)
    given = pieces[: max(i for i, piece in enumerate(pieces) if piece.assistant)]
    ((ids, _),) = chat.to_ids([given], lambda texts: _encode(texts, tokenizer))
    return ids if template.own else [*begins, *ids]


def stops(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, chat_template: str = "auto"
) -> tuple[int, ...]:
    """Return the ids of the tokens each of which ends a completion."""
    end = tokenizer.eos_token_id
    assert isinstance(end, int)
    if not any(pair.turns for pair in pairs):
        return (end,)
    template = chat.template_of(tokenizer, chat_template)
    return chat.ends(template, tokenizer, lambda texts: _encode(texts, tokenizer))


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return list(encoded["input_ids"])


# --------------------------------------------------------------------------- what is too long


def fitted(examples: list[Example], cfg: DataConfig) -> tuple[list[Example], dict[str, Any]]:
    """The sequences as training blocks hold them, by `data.too_long`, and counts for result.json.

    `cut` keeps the first `data.context_length` inputs, `drop` nothing, and `window` everything, in
    pieces of as many inputs that do not see one another. What then has nothing to predict is left
    out.

    Raises:
        ConfigError: nothing is left.
    """
    size = cfg.context_length
    longer = [example for example in examples if example.length > size]
    if not longer:
        return examples, {}
    kept: list[Example] = []
    left_out = 0
    for example in examples:
        starts = [0]
        if example.length > size:
            starts = {"cut": [0], "drop": [], "window": [*range(0, example.length, size)]}[
                cfg.too_long
            ]
        parts = [
            replace(
                example,
                tokens=example.tokens[i : i + size + 1],
                counts=example.counts[i : i + size],
            )
            for i in starts
        ]
        parts = [part for part in parts if part.counts.any()]
        left_out += not parts
        kept += parts
    tokens = sum(example.num_predicted for example in examples)
    counts = {
        "choice": cfg.too_long,
        "sequences": len(examples),
        "longer": len(longer),
        "left_out": left_out,
        "tokens": tokens,
        "tokens_left_out": tokens - sum(example.num_predicted for example in kept),
    }
    if not kept:
        raise ConfigError(
            f"data.too_long={cfg.too_long}: all {len(examples)} training sequences are longer than "
            f"data.context_length={size}, and none has a token left to predict; raise "
            "data.context_length"
        )
    return kept, counts


# --------------------------------------------------------------------------- tables


def blocks(
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    cfg: DataConfig,
    begins: tuple[int, ...] = (),
) -> tuple[Iterator[pa.Table], dict[str, Any]]:
    """Training blocks: inputs, targets (IGNORE over prompts and padding), positions, num_predicted.

    They come in tables of BATCH blocks.
    With `packed` every block is `context` long and no sequence is cut: a sequence goes into the
    fullest block that has room (best fit), in an order that mixes prompts and depends on nothing
    but their ids. With `padded` a block is a sequence, as long as it is. Beside them what `fitted`
    counts.
    """
    end = tokenizer.eos_token_id
    context, packing = cfg.context_length, cfg.packing
    kept, counts = fitted(sequences(pairs, tokenizer, cfg, begins), cfg)
    order = sorted(
        range(len(kept)),
        key=lambda i: hashlib.sha256(f"{kept[i].pair}#{kept[i].completion}".encode()).digest(),
    )
    bins: list[list[Example]] = []
    room: list[tuple[int, int]] = []  # (positions left, bin), ascending
    for example in (kept[i] for i in order):
        slot = bisect_left(room, (example.length, -1)) if packing == "packed" else len(room)
        if slot == len(room):
            bins.append([example])
            left, index = context - example.length, len(bins) - 1
        else:
            left, index = room.pop(slot)
            bins[index].append(example)
            left -= example.length
        if left >= 2 and packing == "packed":
            insort(room, (left, index))
    width = context if packing == "packed" else None
    return (_table(bins[i : i + BATCH], width, end) for i in range(0, len(bins), BATCH)), counts


def _table(bins: Sequence[Sequence[Example]], width: int | None, end: int) -> pa.Table:
    """A row a bin, padded to `width`; without one a bin is as wide as what is in it."""
    columns: dict[str, list[NDArray[np.int32]]] = {"inputs": [], "targets": [], "positions": []}
    predicted = []
    for members in bins:
        pad = 0 if width is None else width - sum(example.length for example in members)
        rows = {
            "inputs": [*(example.tokens[:-1] for example in members), np.full(pad, end)],
            "targets": [*(example.targets for example in members), np.full(pad, IGNORE)],
            "positions": [*(np.arange(example.length) for example in members), np.arange(pad)],
        }
        for name, parts in rows.items():
            columns[name].append(np.concatenate(parts).astype(np.int32))
        predicted.append(sum(example.num_predicted for example in members))
    kind = pa.list_(pa.int32())
    table = {name: pa.array(values, type=kind) for name, values in columns.items()}
    return pa.table(table | {"num_predicted": predicted})


def evaluated(
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    cfg: DataConfig,
    begins: tuple[int, ...] = (),
) -> pa.Table:
    """One row a sequence, as `data` has documents; words and bytes are of what is predicted.

    `first` is the id before `tokens`, of which the first `skipped` are the prompt's. Where not all
    of the rest is predicted, as of several turns, `scored` says it of every token.
    """
    examples = sequences(pairs, tokenizer, cfg, begins)
    columns = {
        "id": [example.pair for example in examples],
        "first": [int(example.tokens[0]) for example in examples],
        "tokens": pa.array([example.tokens[1:] for example in examples], type=pa.list_(pa.int32())),
        "skipped": [example.num_prompt - 1 for example in examples],
        "num_words": [sum(len(text.split()) for text in example.scored) for example in examples],
        "num_bytes": [sum(len(text.encode()) for text in example.scored) for example in examples],
    }
    if any(example.num_predicted < example.length - example.num_prompt + 1 for example in examples):
        marks = pa.array([example.counts for example in examples], type=pa.list_(pa.bool_()))
        columns["scored"] = marks
    return pa.table(columns)


def longer_than_a_window(table: pa.Table, context: int) -> dict[str, Any]:
    """How many held-out sequences are longer than `context`, for result.json; {} for none."""
    lengths = pc.list_value_length(table["tokens"]).to_pylist()
    longer = sum(length > context for length in lengths)
    return {"choice": "window", "sequences": len(lengths), "longer": longer} if longer else {}
