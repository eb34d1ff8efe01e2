"""Documents to tokens: packed training blocks and evaluation documents, cached and memory-mapped.

The cache is keyed by content (text, tokenizer, block length), so that it can never be stale, and a
folder appears in it only when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from harness import contents, documents, files, overlap, pairs, prepared, sources
from harness.config import ConfigError, DataConfig
from harness.console import reason
from harness.loss import IGNORE
from harness.prepared import Manifest

log = logging.getLogger(__name__)
CACHE_FORMAT = "1"  # part of every key; raise it when the layout of a cached table changes


@dataclass(frozen=True)
class Data:
    """The text of one run, as tokens on disk."""

    blocks: Dataset  # train: `tokens`, context + 1 ids; or what `pairs.blocks` has
    held_out: dict[str, Dataset]  # by split: id, tokens, num_words, num_bytes per document
    num_documents: dict[str, int]  # by split
    tokenized: bool  # whether anything was tokenised now, rather than found in the cache
    tokenizer: str  # twelve digits that change with its vocabulary, merges or end-of-text token
    facts: dict[str, Any] = field(default_factory=dict)  # for result.json: copies, files left out
    warnings: list[str] = field(default_factory=list)  # what the user is to know of the text

    @property
    def num_blocks(self) -> int:
        """Training blocks of one epoch."""
        return len(self.blocks)

    def num_predicted(self, indices: list[int]) -> int:
        """Tokens that the blocks at `indices` predict."""
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
    """Blocks of a micro-batch, int64."""

    inputs: torch.Tensor  # (B, T)
    targets: torch.Tensor  # (B, T), IGNORE where nothing is predicted
    positions: torch.Tensor | None  # (B, T), 0 where another sequence begins; None: one a row

    @property
    def ids(self) -> torch.Tensor:
        """(B, T + 1): of text, the blocks as they were cut."""
        return torch.cat([self.inputs, self.targets[:, -1:]], dim=1)

    def to(self, device: torch.device) -> Batch:
        """On `device`."""
        positions = None if self.positions is None else self.positions.to(device)
        return Batch(self.inputs.to(device), self.targets.to(device), positions)


def prepare(
    cfg: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    test: bool = True,
    begins: tuple[int, ...] = (),
) -> Data:
    """Read, tokenise and pack the documents of `cfg`, or find the result in the cache.

    `begins` is put in front of every document of a training block and every prompt (`Prefix`).
    Without `test` that split is not in the result: nothing that gets it can read it.

    Raises:
        ConfigError: no text, or less than one block of it.
    """
    wanted = documents.SPLITS if test else ("train", "validation")
    tables, made, fresh = _prepared(cfg, tokenizer, wanted, begins)
    blocks = tables.pop("train")
    unread, said = left_out(cfg)
    return Data(
        blocks,
        tables,
        made.num_documents,
        fresh,
        _tokenizer_fingerprint(tokenizer)[:12],
        made.facts | unread,
        [*said, *made.warnings],
    )


def _prepared(
    cfg: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    wanted: Sequence[str],
    begins: tuple[int, ...],
) -> tuple[dict[str, Dataset], Manifest, bool]:
    """The tables of splits, what was found out about them, and whether one was made now.

    Raises:
        ConfigError: the text changed while it was read, or as `prepare`.
    """
    fingerprint = _tokenizer_fingerprint(tokenizer)
    content = _content(cfg)
    key = prepared.key_of(cfg, content, fingerprint, begins, wanted)
    if found := _found(cfg, content, key):
        return *found, False
    with prepared.alone(cfg, key):
        if found := _found(cfg, content, key):  # another run has made it meanwhile
            return *found, False
        tables, made, fresh = _made(cfg, tokenizer, fingerprint, wanted, begins)
        if _content(cfg) != content:
            raise ConfigError(
                f"the text at {cfg.path or cfg.id or cfg.name} changed while it was read: the same "
                "command again reads it as it is now"
            )
        prepared.keep(cfg, content, key, made)
    return tables, made, fresh


def _content(cfg: DataConfig) -> str:
    """What the text of `cfg` is, without asking the hub: "" where that is not certain."""
    if cfg.id and not Path(cfg.id).is_dir():
        pinned = re.fullmatch(r"[0-9a-f]{40}", cfg.revision or "")
        return f"commit:{cfg.id}@{cfg.revision}" if pinned else ""
    return contents.text_of(cfg)


def _found(cfg: DataConfig, content: str, key: str) -> tuple[dict[str, Dataset], Manifest] | None:
    """Tables that were made before, without a look at the text."""
    if (made := prepared.find(cfg, content, key)) is None:
        return None
    tables = {}
    for name, folder in made.tables.items():
        if (table := _load(Path(cfg.cache_dir) / "tokens" / folder)) is None:
            return None
        tables[name] = table.with_format("numpy")
    return tables, made


def _made(
    cfg: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    fingerprint: str,
    wanted: Sequence[str],
    begins: tuple[int, ...],
) -> tuple[dict[str, Dataset], Manifest, bool]:
    tables, counts, folders, fresh = {}, {}, {}, False
    texts: dict[str, list[documents.Document]] = {}  # what must not be in two splits
    facts: dict[str, Any] = {}
    warnings: list[str] = []
    found: dict[str, list[Any]]
    if cfg.source == "pairs":
        found = {**pairs.read(cfg, wanted)}
    else:
        corpus = documents.corpus(cfg, wanted)
        rule, found = corpus.rule(), {**documents.held(corpus)}
        log.info("documents of data=%s: %s; split: %s", cfg.name, rule["documents"], rule["split"])
        facts["rule"] = rule
    for name, docs in found.items():
        block = cfg.context if name == "train" else 0
        tables[name], folders[name], new = _table(cfg, docs, tokenizer, fingerprint, block, begins)
        counts[name] = len(docs)
        fresh = fresh or new
        texts[name] = [(doc.id, doc.prompt) if isinstance(doc, pairs.Pair) else doc for doc in docs]
    if "train" in tables:
        held_out = {name: table for name, table in tables.items() if name != "train"}
        copies, warnings = overlap.facts(cfg, texts, tables["train"], held_out)
        facts = copies | facts
    return tables, Manifest(folders, counts, facts, warnings), fresh


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
    said = f"data.path={cfg.path}: {len(left)} file(s) are left out: {names}"
    first = [str(file) for file in left[:100]]
    return {"left_out": {"files": len(left), "first": first}}, [said]


def prepare_test(
    cfg: DataConfig, tokenizer: PreTrainedTokenizerBase, *, begins: tuple[int, ...] = ()
) -> Dataset:
    """The test split alone, as `Data.held_out` has it, of a text that is not trained on."""
    return _prepared(cfg, tokenizer, ("test",), begins)[0]["test"]


AT_HAND_BYTES = 64 * 2**20  # of files that a prediction reads; more fill every batch


def held_out_sizes(
    cfg: DataConfig, splits: Sequence[str], tokenizer: PreTrainedTokenizerBase | None
) -> list[list[int] | None]:
    """Tokens of every document of some held-out `splits`, if the text is on this machine.

    Nothing is cached. Without a `tokenizer` bytes stand for tokens, of which no document has more.
    None for each split whose text is not at hand, cannot be read, or is long.
    """
    unknown: list[list[int] | None] = [None] * len(splits)
    try:
        if cfg.source in ("text_files", "pairs") and not cfg.id:
            own = sources.own_files(cfg).values()
            if sum(file.stat().st_size for found in own for file in found) > AT_HAND_BYTES:
                return unknown
        elif cfg.source != "kjv":
            return unknown
        if cfg.source == "pairs":
            if tokenizer is None:
                return unknown
            tables = [
                pairs.evaluated(rows, tokenizer, cfg.context)
                for rows in pairs.read(cfg, splits).values()
            ]
            return [pc.list_value_length(table["tokens"]).to_pylist() for table in tables]
        found = documents.read(cfg, splits)
    except (ConfigError, OSError):
        return unknown
    if tokenizer is None:
        return [[len(text.encode()) for _, text in docs] for docs in found.values()]
    return [[len(ids) for ids in _encode(docs, tokenizer)] for docs in found.values()]


def _table(
    cfg: DataConfig,
    docs: list[Any],
    tokenizer: PreTrainedTokenizerBase,
    fingerprint: str,
    block: int,
    begins: tuple[int, ...] = (),
) -> tuple[Dataset, str, bool]:
    """Blocks of `block` + 1 ids (0: documents as they are), their folder, and whether it is new."""
    paired = cfg.source == "pairs"
    if paired:  # what the key is made of
        texts = [(pair.id, json.dumps([pair.prompt, pair.completions])) for pair in docs]
        kind = f"pairs {cfg.packing} {cfg.context} {block}"
    else:
        texts, kind = docs, str(block)
    if begins and (paired or block):  # evaluation puts it in front of documents by itself
        kind += f" after {begins}"
    folder = Path(cfg.cache_dir) / "tokens" / _key(texts, fingerprint, kind)
    found = _load(folder)
    fresh = found is None
    if found is None:
        if paired and block:
            table = pairs.blocks(docs, tokenizer, block, cfg.packing, begins)
        elif paired:
            table = pairs.evaluated(docs, tokenizer, cfg.context, begins)
        else:
            table = _pack(docs, tokenizer, block, begins) if block else _tokenize(docs, tokenizer)
        _save(Dataset(table), folder)
        found = Dataset.load_from_disk(str(folder))
    return found.with_format("numpy"), folder.name, fresh


def _tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{text}{tokenizer.eos_token_id}".encode()).hexdigest()


def _key(docs: list[documents.Document], tokenizer: str, block: str) -> str:
    digest = hashlib.sha256("\0".join((CACHE_FORMAT, tokenizer, block)).encode())
    for name, text in docs:
        for part in (name, text):
            encoded = part.encode()
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
    return digest.hexdigest()[:32]


def _load(folder: Path) -> Dataset | None:
    """The table in `folder`; None where there is none, and a damaged one is cleared away."""
    if not folder.exists():
        return None
    try:
        return Dataset.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        log.warning("the cached tokens in %s are damaged and made again: %s", folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _save(dataset: Dataset, folder: Path) -> None:
    """Write beside `folder` and rename: a killed run or a second one leaves no half table."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.mkdtemp(dir=folder.parent, prefix=".writing-")
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir: cannot write {folder.parent} ({reason(error)})"
        ) from error
    dataset.save_to_disk(scratch)
    try:
        Path(scratch).rename(folder)
    except OSError:
        shutil.rmtree(scratch, ignore_errors=True)
        if not folder.exists():  # not another process that was first
            raise


def _encode(docs: list[documents.Document], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of every text, no special tokens added."""
    ids: list[list[int]] = []
    for start in range(0, len(docs), 1000):
        texts = [text for _, text in docs[start : start + 1000]]
        # Documents may be longer than the model's context: they are windowed later.
        batch = tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids += batch["input_ids"]
    return ids


def _pack(
    docs: list[documents.Document],
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    begins: tuple[int, ...] = (),
) -> pa.Table:
    """Documents joined by the end-of-text token, cut into blocks of context + 1 ids.

    With `begins` every document is these ids, its text and the end-of-text token.

    Neighbouring blocks share one id, so that every id of the stream but the first is predicted
    once; a tail shorter than a block is left out.
    """
    end = tokenizer.eos_token_id
    encoded = _encode(docs, tokenizer)
    if begins:
        parts = [[*begins, *ids, end] for ids in encoded]
    else:
        parts = [*([end, *ids] for ids in encoded), [end]]
    stream = np.concatenate([np.array(ids, dtype=np.int32) for ids in parts])
    if len(stream) <= context:
        raise ConfigError(
            f"the training split of {len(stream)} tokens is shorter than one block of data.context="
            f"{context}: lower data.context or give more text"
        )
    starts = np.arange((len(stream) - 1) // context) * context
    values = pa.array(stream[starts[:, None] + np.arange(context + 1)].reshape(-1))
    return pa.table({"tokens": pa.FixedSizeListArray.from_arrays(values, context + 1)})


def _tokenize(docs: list[documents.Document], tokenizer: PreTrainedTokenizerBase) -> pa.Table:
    """One row a document, with the counts that word perplexity and bits per byte divide by."""
    return pa.table(
        {
            "id": [name for name, _ in docs],
            "tokens": pa.array(_encode(docs, tokenizer), type=pa.list_(pa.int32())),
            "num_words": [len(text.split()) for _, text in docs],
            "num_bytes": [len(text.encode()) for _, text in docs],
        }
    )


def document_sizes(dataset: Dataset) -> list[int]:
    """Tokens of every document of a held-out split."""
    return list(pc.list_value_length(dataset.data.column("tokens")).to_pylist())


def num_tokens(dataset: Dataset) -> int:
    """Tokens of a held-out split."""
    return int(pc.sum(pc.list_value_length(dataset.data.column("tokens"))).as_py())


# --------------------------------------------------------------------------- data order


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_blocks: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_blocks)


def block_order(seed: int, step: int, batch: int, num_blocks: int) -> list[int]:
    """Indices of the `batch` blocks of optimizer step `step` (from 0), all ranks together.

    A pure function: every epoch is a permutation drawn from (seed, epoch), read `batch` at a time
    and across epochs, whatever the number of ranks, the accumulation, a resume or the method.
    """
    positions = range(step * batch, (step + 1) * batch)
    return [int(_permutation(seed, p // num_blocks, num_blocks)[p % num_blocks]) for p in positions]


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
