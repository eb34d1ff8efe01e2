"""Documents to tokens: packed training blocks and evaluation documents, cached and memory-mapped.

The cache is keyed by content (text, tokenizer, block length), so that it can never be stale, and a
folder appears in it only when it is complete. Text is read, tokenised and packed a part at a time:
memory does not grow with it. Of pairs it does: their text, and five bytes a token, are in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from harness.config import parts as mix
from harness.config.errors import ConfigError
from harness.config.run_config import RunConfig
from harness.config.schema import DataConfig
from harness.data import (
    documents,
    mixture,
    overlap,
    packing,
    pairs,
    sequences,
    sources,
    subset,
    token_cache,
)
from harness.data.token_tables import IGNORE
from harness.system import files

log = logging.getLogger(__name__)
LONG_TOKENS = 500_000  # of validation, from where on it is said that a part would do


@dataclass(frozen=True)
class Data:
    """The text of one run as tokens on the disk: training blocks and held-out documents."""

    blocks: Dataset  # train: `tokens`, context + 1 ids; or what `sequences.blocks` has
    held_out: dict[str, Dataset]  # by split: id, tokens, num_words, num_bytes per document
    num_documents: dict[str, int]  # by split
    tokenized: bool  # whether anything was tokenised now, rather than found in the cache
    tokenizer: str  # twelve digits that change with its vocabulary, merges or end-of-text token
    facts: dict[str, Any] = field(default_factory=dict)  # for result.json: copies, files left out
    warnings: list[str] = field(default_factory=list)  # what the user is to know of the text

    # Of a mixture: (share, training blocks) of every part, which follow one another in `blocks`.
    parts: tuple[tuple[Fraction, Dataset], ...] = ()

    @property
    def num_blocks(self) -> int:
        """Training blocks of one epoch; of a mixture, those of all parts."""
        return len(self.blocks)

    @property
    def training(self) -> list[Dataset]:
        """Return the tables of training blocks, one a part of a mixture."""
        return [table for _, table in self.parts] or [self.blocks]

    def order(self, seed: int, step: int, batch: int) -> list[int]:
        """Indices of the `batch` blocks of optimizer step `step` (from 0), all ranks together.

        A pure function, as `block_order`, which each part of a mixture follows by itself.
        """
        if not self.parts:
            return block_order(seed, step, batch, self.num_blocks)
        first = [0, *accumulate(len(table) for _, table in self.parts)]
        shares = [share for share, _ in self.parts]
        places = mixture.places(shares, step * batch, batch)
        return [first[part] + block_at(seed, n, len(self.parts[part][1])) for part, n in places]

    def epochs(self, num_blocks: int) -> float:
        """How often the training text was gone through after so many blocks.

        Of a mixture, the part that is held out, which is the first one here.
        """
        share, table = self.parts[0] if self.parts else (1, self.blocks)
        return float(share * num_blocks) / len(table)

    def num_predicted(self, indices: list[int]) -> int:
        """Return the number of tokens that the blocks at `indices` predict."""
        if "num_predicted" in self.blocks.column_names:
            return int(pc.sum(self._column("num_predicted", indices)).as_py())
        return len(indices) * (len(self.blocks[indices[0]]["tokens"]) - 1)

    def by_length(self, indices: list[int]) -> list[int]:
        """The same blocks, alike in length beside one another; as they are where all are alike."""
        if "inputs" not in self.blocks.column_names:
            return indices
        lengths = pc.list_value_length(self._column("inputs", indices)).to_pylist()
        return [i for _, i in sorted(zip(lengths, indices, strict=True))]

    def _column(self, name: str, indices: list[int]) -> pa.ChunkedArray:
        """One column of the blocks at `indices`, without reading the others."""
        return self.blocks.data.column(name).take(indices)


class Batch(NamedTuple):
    """The blocks of a micro-batch as the model takes them, int64 of B sequences by T tokens."""

    inputs: torch.Tensor  # (B, T)
    targets: torch.Tensor  # (B, T), IGNORE where nothing is predicted
    positions: torch.Tensor | None  # (B, T), 0 where another sequence begins; None: one a row

    @property
    def ids(self) -> torch.Tensor:
        """Return (B, T + 1) ids: of text, the blocks as they were cut."""
        return torch.cat([self.inputs, self.targets[:, -1:]], dim=1)

    def to(self, device: torch.device) -> Batch:
        """Return the same batch with its tensors on `device`, copied if they are not there."""
        positions = None if self.positions is None else self.positions.to(device)
        return Batch(self.inputs.to(device), self.targets.to(device), positions)


def prepare(
    cfg: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    test: bool = True,
    begins: tuple[int, ...] = (),
    most: Mapping[str, int | None] = MappingProxyType({}),
) -> Data:
    """Read, tokenise and pack the documents of `cfg`, or find the result in the cache.

    `begins` is put in front of every document of a training block and every prompt (`Prefix`).
    Without `test` that split is not in the result: nothing that gets it can read it. `most` has the
    predicted tokens that a fixed part of a held-out split may have (`harness.data.subset`).

    Raises:
        ConfigError: no text, or less than one block of it.
    """
    if cfg.parts:
        return _mixed(cfg, tokenizer, test=test, begins=begins, most=most)
    wanted = documents.SPLITS if test else ("train", "validation")
    held_out, manifest, fresh = token_cache.tables_of(cfg, tokenizer, wanted, begins)
    blocks = held_out.pop("train")
    unread, messages = left_out(cfg)
    parts: dict[str, Dataset] = {}
    evaluated: dict[str, Any] = {}
    for name, table in held_out.items():
        parts[name], chosen = subset.of(table, most.get(name))
        evaluated |= {name: chosen} if chosen else {}
        if name == "validation" and not chosen and num_tokens(table) > LONG_TOKENS:
            messages = [*messages, _long(cfg, num_tokens(table))]
    if evaluated:
        unread = unread | {"evaluated": evaluated}
    return Data(
        blocks,
        parts,
        manifest.num_documents,
        fresh,
        token_cache.fingerprint(tokenizer)[:12],
        manifest.facts | unread,
        [*messages, *manifest.warnings],
    )


def _mixed(
    cfg: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    test: bool,
    begins: tuple[int, ...],
    most: Mapping[str, int | None],
) -> Data:
    """The training blocks of all parts of a mixture, and the held-out documents of one of them.

    A part without a share is not read, unless its documents are held out.
    """
    main_part = mix.held_out_part(cfg)
    main = prepare(main_part.text, tokenizer, test=test, begins=begins, most=most)
    tables: list[tuple[Fraction, Dataset]] = [(main_part.share, main.blocks)]
    facts: dict[str, Any] = {
        main_part.name: {"share": float(main_part.share), "num_blocks": main.num_blocks}
    }
    messages, fresh = list(main.warnings), main.tokenized
    for part in mix.parts(cfg):
        if part.name == main_part.name or not part.share:
            continue
        part_tables, manifest, now = token_cache.tables_of(part.text, tokenizer, ("train",), begins)
        blocks = part_tables["train"]
        tables.append((part.share, blocks))
        fresh = fresh or now
        alike = overlap.near(blocks, main.held_out, cfg.cache_dir)
        facts[part.name] = {
            "share": float(part.share),
            "num_blocks": len(blocks),
            "num_documents": manifest.num_documents["train"],
            "has_held_out": {name: len(keys) for name, keys in alike.items()},
        }
        messages += [
            f"data.parts.{part.name}: {len(keys)} {name} documents of {main_part.name} share "
            f"tokens in a row with it, or are all in it; the first is {keys[0]}"
            for name, keys in alike.items()
            if keys
        ]
        messages += [*left_out(part.text)[1], *manifest.warnings]
    blocks = concatenate_datasets([table for _, table in tables]).with_format("numpy")
    known = main.facts | {"parts": facts}
    return replace(
        main, blocks=blocks, parts=tuple(tables), facts=known, warnings=messages, tokenized=fresh
    )


def most_tokens(run: RunConfig) -> dict[str, int | None]:
    """Predicted tokens that a run reads of its held-out splits at most; None where it reads all."""
    return {"validation": run.evaluate.validation_tokens, "test": run.evaluate.test_tokens}


def left_out(cfg: DataConfig) -> tuple[dict[str, Any], list[str]]:
    """The files of a folder that are not read, for result.json and as a warning."""
    if cfg.source not in ("text_files", "pairs") or not cfg.path:
        return {}, []
    if cfg.source == "pairs":
        left = sorted({*files.left_out(cfg.path, files.OF_PAIRS), *pairs.left_out(cfg)})
    else:
        left = files.left_out(cfg.path)
    if not left:
        return {}, []
    names = ", ".join(str(file) for file in left[:5]) + ", …" * (len(left) > 5)
    message = f"data.path={cfg.path}: {len(left)} file(s) are left out: {names}"
    first = [str(file) for file in left[:100]]
    return {"left_out": {"files": len(left), "first": first}}, [message]


def _long(cfg: DataConfig, count: int) -> str:
    return (
        f"data={cfg.name}: every validation reads {count:,} tokens; "
        f"evaluate.validation_tokens={LONG_TOKENS} reads a fixed part of them"
    )


def prepare_test(
    cfg: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    begins: tuple[int, ...] = (),
    most: int | None = None,
) -> tuple[Dataset, dict[str, Any]]:
    """The test split alone, of a text that is not trained on, and which part of it it is.

    As `Data.held_out` has it, and {} or what `subset.of` says.
    """
    return subset.of(token_cache.tables_of(cfg, tokenizer, ("test",), begins)[0]["test"], most)


AT_HAND_BYTES = 64 * 2**20  # of files that a prediction reads; more fill every batch


def held_out_sizes(
    cfg: DataConfig,
    splits: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    most: Mapping[str, int | None] = MappingProxyType({}),
) -> list[list[int] | None]:
    """Tokens of every document of some held-out `splits`, if the text is on this machine.

    Of the part of each that is within `most` tokens. Nothing is cached. Without a `tokenizer` bytes
    stand for tokens, of which no document has more.
    None for each split whose text is not at hand, cannot be read, or is long.
    """
    unknown: list[list[int] | None] = [None] * len(splits)
    cfg = mix.evaluated_text(cfg)
    try:
        if cfg.source in ("text_files", "pairs") and not cfg.id:
            kinds = files.OF_PAIRS if cfg.source == "pairs" else files.KINDS
            own = sources.own_files(cfg, kinds).values()
            if sum(file.stat().st_size for paths in own for file in paths) > AT_HAND_BYTES:
                return unknown
        elif cfg.source != "kjv":
            return unknown
        if cfg.source == "pairs":
            if tokenizer is None:
                return unknown
            rows = pairs.read(cfg, splits).values()
            tables = [
                Dataset(sequences.evaluated(split_pairs, tokenizer, cfg)) for split_pairs in rows
            ]
            return [
                _sizes(
                    table["id"], subset.num_predicted(table), document_sizes(table), most.get(name)
                )
                for name, table in zip(splits, tables, strict=True)
            ]
        texts = documents.read(cfg, splits)
    except (ConfigError, OSError):
        return unknown
    if tokenizer is None:
        return [[len(text.encode()) for _, text in docs] for docs in texts.values()]
    sizes: list[list[int] | None] = []
    for name, docs in texts.items():
        counts: list[int] = []
        for start in range(0, len(docs), packing.BATCH_DOCUMENTS):
            batch = [text for _, text in docs[start : start + packing.BATCH_DOCUMENTS]]
            counts += [len(ids) for ids in token_cache.encode(batch, tokenizer)]
        sizes.append(_sizes([key for key, _ in docs], np.array(counts), counts, most.get(name)))
    return sizes


def _sizes(
    ids: Sequence[str], predicted: NDArray[np.int64], sizes: list[int], limit: int | None
) -> list[int]:
    """The sizes of the documents that are within `limit` predicted tokens."""
    if limit is None or predicted.sum() <= limit:
        return sizes
    return [sizes[i] for i in subset.within(ids, predicted, limit)]


def document_sizes(dataset: Dataset) -> list[int]:
    """Return the number of tokens of every document of a held-out split."""
    return list(pc.list_value_length(dataset.data.column("tokens")).to_pylist())


def num_tokens(dataset: Dataset) -> int:
    """Return the number of tokens of all documents of a held-out split."""
    return int(pc.sum(pc.list_value_length(dataset.data.column("tokens"))).as_py())


# --------------------------------------------------------------------------- data order


@lru_cache(maxsize=8)  # of the parts of a mixture, too
def _permutation(seed: int, epoch: int, num_blocks: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_blocks)


def block_order(seed: int, step: int, batch: int, num_blocks: int) -> list[int]:
    """Indices of the `batch` blocks of optimizer step `step` (from 0), all ranks together.

    A pure function: every epoch is a permutation drawn from (seed, epoch), read `batch` at a time
    and across epochs, whatever the number of ranks, the accumulation, a resume or the method.
    """
    positions = range(step * batch, (step + 1) * batch)
    return [block_at(seed, position, num_blocks) for position in positions]


def block_at(seed: int, position: int, num_blocks: int) -> int:
    """Which of the blocks comes at a position (from 0) of the training order."""
    return int(_permutation(seed, position // num_blocks, num_blocks)[position % num_blocks])


def batch_of(blocks: Dataset, indices: list[int]) -> Batch:
    """The blocks at `indices`, the shorter ones padded at their end to the longest."""
    rows = blocks[indices]
    if "tokens" in rows:
        ids = torch.from_numpy(np.stack(rows["tokens"]).astype(np.int64))
        return Batch(ids[:, :-1], ids[:, 1:], None)
    width = max(len(inputs) for inputs in rows["inputs"])

    def padded(name: str, value: int) -> torch.Tensor:
        filled = torch.full((len(indices), width), value)
        for row, values in enumerate(rows[name]):
            filled[row, : len(values)] = torch.from_numpy(values.astype(np.int64))
        return filled

    # What pads is never looked at by what is predicted: it comes after it.
    inputs, targets = padded("inputs", 0), padded("targets", IGNORE)
    several = any((positions[1:] == 0).any() for positions in rows["positions"])
    return Batch(inputs, targets, padded("positions", 0) if several else None)
