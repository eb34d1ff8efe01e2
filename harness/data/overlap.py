"""Held-out text that is in training too: counted, because it makes a perplexity too good.

A document is a duplicate where another has the same text, white space aside. It is a near-duplicate
where it shares SPAN tokens in a row with the training text, or all of its tokens where it has
fewer: Lee et al. 2022 (arXiv 2107.06499) take out substrings of 50 BPE tokens that come twice. Two
spans are the same where each SHINGLE tokens in a row of one are somewhere in the other text; 13 is
the n-gram of Brown et al. 2020 (appendix C), and a document with fewer tokens is not looked at.
Time grows with the training text, memory with the held-out text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray

from harness.config.schema import DataConfig
from harness.data import token_tables
from harness.data.splits import Index
from harness.data.token_tables import IGNORE
from harness.system.atomic import write_atomically

SPAN = 50  # tokens
SHINGLE = 13  # tokens
NEAR_SHARE = 0.05  # of a split's documents, above which near-duplicates are warned of
PACKAGED = ("kjv", "docstrings")  # texts that repeat themselves, as recorded
CHUNK = 2**18  # tokens at a time
AT_ONCE = 2**23  # held-out tokens, with 8 bytes each, for one pass over the training text
FILTER_BITS = 22
FORMAT = "1"  # part of the cache's key; raise it when what is counted changes
UInts = NDArray[np.uint64]


def duplicates(texts: dict[str, Index]) -> dict[str, list[str]]:
    """Ids of documents, by split, whose text another document has too.

    `documents`: those whose text one before them has, in whatever split. `test_in_training` and the
    like: those of test whose text is in training.
    """
    copies: dict[str, list[str]] = {}
    every = np.concatenate([index.alike for index in texts.values()])
    repeated = np.ones(len(every), bool)
    repeated[np.unique(every, return_index=True)[1]] = False
    ids = pa.chunked_array([part for index in texts.values() for part in index.ids.chunks])
    copies["documents"] = ids.filter(pa.array(repeated)).to_pylist()
    for name, other in (("validation", "train"), ("test", "train"), ("test", "validation")):
        if name in texts and other in texts:
            label = f"{name}_in_{'training' if other == 'train' else other}"
            common = np.isin(texts[name].alike, texts[other].alike)
            copies[label] = texts[name].ids.filter(pa.array(common)).to_pylist()
    return copies


# --------------------------------------------------------------------------- near-duplicates


def near(blocks: Dataset, held_out: dict[str, Dataset], cache_dir: str) -> dict[str, list[str]]:
    """Ids of the documents of each split that share a span with the training blocks.

    Found once for the same tokens, and kept in `cache_dir`.
    """
    content = [token_tables.name_of(table) for table in (blocks, *held_out.values())]
    key = hashlib.sha256(" ".join([FORMAT, *held_out, *content]).encode()).hexdigest()[:32]
    kept = Path(cache_dir) / "overlap" / f"{key}.json"
    with suppress(OSError, ValueError):
        return dict(json.loads(kept.read_text("utf-8")))
    common = shared({name: _spans(table) for name, table in held_out.items()}, _Training(blocks))
    with suppress(OSError):  # a cache that is for reading only
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, json.dumps(common))
    return common


def shared(
    held_out: Mapping[str, Iterable[tuple[str, NDArray[Any]]]], training: Iterable[NDArray[Any]]
) -> dict[str, list[str]]:
    """Ids of the documents, (id, tokens) by split, that share a span with `training`.

    `training` is one text in pieces, which are joined; it may be gone through several times.
    """
    overlapping: dict[str, list[str]] = {name: [] for name in held_out}
    batch: list[tuple[str, str, NDArray[Any]]] = []
    size = 0

    def look() -> None:
        for name, key in _shared(batch, training):
            overlapping[name].append(key)
        batch.clear()

    for name, documents in held_out.items():
        for key, ids in documents:
            batch.append((name, key, ids))
            size += len(ids)
            if size >= AT_ONCE:  # or else memory would grow with the text
                look()
                size = 0
    look()
    return {name: list(dict.fromkeys(keys)) for name, keys in overlapping.items()}


def _shared(
    documents: list[tuple[str, str, NDArray[Any]]], training: Iterable[NDArray[Any]]
) -> Iterator[tuple[str, str]]:
    """(split, id) of the documents, (split, id, tokens), that share a span with `training`."""
    known = np.empty(sum(max(0, len(ids) - SHINGLE + 1) for _, _, ids in documents), np.uint64)
    start = 0
    for _, _, ids in documents:
        hashes = _hashes(ids)
        known[start : start + len(hashes)] = hashes
        start += len(hashes)
    known.sort()
    present = _present(known, training)
    for name, key, ids in documents:
        if not len(hashes := _hashes(ids)):
            continue
        hits = present[np.searchsorted(known, hashes)]
        if hits.any() and _longest_run(hits) >= min(SPAN - SHINGLE + 1, len(hits)):
            yield name, key


def _hashes(ids: NDArray[Any]) -> UInts:
    """A 64-bit hash of every SHINGLE tokens in a row; none where there are fewer."""
    count = max(0, len(ids) - SHINGLE + 1)
    # Mixed first (splitmix64), or small ids would make hashes that differ little.
    mixed = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    total = np.zeros(count, np.uint64)
    for i in range(SHINGLE):
        total *= np.uint64(0xD1342543DE82EF95)
        total += mixed[i : i + count]
    return total


def _present(known: UInts, training: Iterable[NDArray[Any]]) -> NDArray[np.bool_]:
    """Which of the sorted hashes `known` are among those of the training text.

    Of equal ones the first is marked, which `np.searchsorted` finds.
    """
    present = np.zeros(len(known), bool)
    if not len(known):
        return present
    shift = np.uint64(64 - FILTER_BITS)
    prefilter = np.zeros(2**FILTER_BITS, bool)  # most of the training text is ruled out by this
    prefilter[known >> shift] = True
    before = np.empty(0, np.int64)
    for piece in training:
        ids = np.concatenate([before, piece])
        before = ids[-(SHINGLE - 1) :]
        hashes = _hashes(ids)
        hashes = hashes[prefilter[hashes >> shift]]
        positions = np.searchsorted(known, hashes)
        positions[positions == len(known)] = 0
        present[positions[known[positions] == hashes]] = True
    return present


def _longest_run(hits: NDArray[np.bool_]) -> int:
    """The most True in a row."""
    misses = np.flatnonzero(np.concatenate([[True], ~hits, [True]]))
    return int(np.diff(misses).max()) - 1


def _spans(table: Dataset) -> Iterator[tuple[str, NDArray[Any]]]:
    """(id, tokens) of held-out documents; of pairs, each completion or turn without its end."""
    paired = "skipped" in table.column_names
    for batch in token_tables.batches(table):
        column = batch.column("tokens")
        ids, lengths = column.flatten().to_numpy(), column.value_lengths().to_numpy()
        skipped = batch.column("skipped").to_numpy() if paired else np.zeros_like(lengths)
        ends = np.cumsum(lengths, dtype=np.int64)
        keys = batch.column("id").to_pylist()
        if "scored" in table.column_names:  # every turn by itself
            marks = batch.column("scored").flatten().to_numpy(zero_copy_only=False)
            for key, end, length in zip(keys, ends, lengths, strict=True):
                edges = np.diff(np.r_[False, marks[end - length : end], False].astype(np.int8))
                starts, stops = (np.flatnonzero(edges == step) for step in (1, -1))
                for start, stop in zip(starts, stops, strict=True):
                    yield str(key), ids[end - length + start : end - length + stop - 1]
            continue
        for key, end, length, given in zip(keys, ends, lengths, skipped, strict=True):
            yield str(key), ids[end - length + given : end - paired]


@dataclass(frozen=True)
class _Training:
    """The training text in pieces; of pairs, completions, apart by what is not predicted."""

    blocks: Dataset

    def __iter__(self) -> Iterator[NDArray[Any]]:
        paired = "targets" in self.blocks.column_names
        last: NDArray[Any] = np.empty(0, np.int64)
        for batch in token_tables.batches(self.blocks):
            column = batch.column("targets" if paired else "tokens")
            size = max(1, CHUNK // max(1, len(column[0])))
            for start in range(0, len(column), size):
                part = column.slice(start, size)
                ids = part.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
                if paired:
                    yield np.append(ids, IGNORE)
                    continue
                rows = ids.reshape(len(part), -1)  # neighbours share an id
                last = rows[-1, -1:]
                yield rows[:, :-1].reshape(-1)
        yield last


# --------------------------------------------------------------------------- what is said


def facts(
    cfg: DataConfig,
    texts: dict[str, Index],
    text_of: Callable[[str, str], str],
    blocks: Dataset,
    held_out: dict[str, Dataset],
) -> tuple[dict[str, Any], list[str]]:
    """`duplicates` and `near_duplicates` for result.json, and what is to be said of them.

    `texts` has documents by split, of pairs the prompts; `text_of` gives one by split and id.
    Near-duplicates are counted without duplicates of training. Packaged texts are counted alike
    and are not warned of.
    """
    same = duplicates(texts)
    alike = {
        name: [key for key in keys if key not in set(same.get(f"{name}_in_training", ()))]
        for name, keys in near(blocks, held_out, cfg.cache_dir).items()
    }
    counts = {
        "duplicates": {name: len(keys) for name, keys in same.items()},
        "near_duplicates": {name: len(keys) for name, keys in alike.items()},
    }
    messages: list[str] = []
    if cfg.source in PACKAGED:
        return counts, messages
    kind = "prompts" if cfg.source == "pairs" else "documents"
    num = {name: len(index) for name, index in texts.items()}
    total = sum(num.values())
    for label, keys in same.items():
        name, _, other = label.partition("_in_")
        if keys and other:
            first = text_of(name, keys[0])
            messages.append(
                f"data={cfg.name}: {len(keys)} of {num[name]} {name} {kind} are in {other} too, "
                f"word for word, as the source has them: the first is {first[:60]!r}"
            )
    if (twice := len(same["documents"])) and not messages:
        messages.append(
            f"data={cfg.name}: {twice} of {total} {kind} are duplicates of another; all copies of "
            "a text are in one split"
        )
    for name, keys in alike.items():
        if len(keys) > NEAR_SHARE * num[name]:
            messages.append(
                f"data={cfg.name}: {len(keys)} of {num[name]} {name} {kind} are near-duplicates: "
                f"they share {SPAN} tokens in a row or more with the training text, or are all in "
                f"it; the first is {keys[0]}"
            )
    return counts, messages


def of_further(
    cfgs: dict[str, DataConfig],
    training: Sequence[Dataset],
    further: dict[str, Dataset],
    trained_on: DataConfig,
) -> tuple[dict[str, int], list[str]]:
    """Documents of the further texts (`evaluate.also`) that are in the training text, by name.

    For result.json, and what is to be said of them: their perplexity is none of unseen text.
    """
    if not further:
        return {}, []
    overlapping: dict[str, list[str]] = {name: [] for name in further}
    for blocks in training:
        for name, keys in near(blocks, further, trained_on.cache_dir).items():
            overlapping[name] = list(dict.fromkeys([*overlapping[name], *keys]))
    messages = [
        f"evaluate.also.{name}: {len(keys)} of {len(further[name])} documents are in the training "
        f"text: they share {SPAN} tokens in a row or more with it, or are all in it; the first is "
        f"{keys[0]}"
        for name, keys in overlapping.items()
        if keys and cfgs[name].source not in PACKAGED
    ]
    return {name: len(keys) for name, keys in overlapping.items()}, messages
