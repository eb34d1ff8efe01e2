"""Tables of tokens made of a text, and found again by the text's digest: without reading the text.

A manifest in `data.cache_dir` names the tables of tokens, and holds what was found out on the way.
It is found by the content of the files (`harness.system.contents`, which looks at sizes and times
of files that it knows), and by all that the tables depend on.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from harness.config.errors import ConfigError
from harness.config.naming import PATHS
from harness.config.paths import PACKAGE
from harness.config.schema import DataConfig
from harness.data import chat, documents, overlap, packing, pairs, sequences
from harness.data import token_tables as tables
from harness.data.splits import Index
from harness.system import contents
from harness.system.atomic import write_atomically

CACHE_FORMAT = "2"  # part of a table's key; raise it when its layout changes
READERS = (  # what says how a text is read, and what is made of it
    "data/*.py", "system/encodings.py", "system/files.py",
)  # fmt: skip
KNOWN_BY_CONTENT = ("sha256:", "commit:")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Manifest:
    """Holds what was made of the splits of a text: tables, counts and facts."""

    tables: dict[str, str]  # by split: the name of its folder
    num_documents: dict[str, int]
    facts: dict[str, Any]  # for result.json
    warnings: list[str]


def key_of(
    cfg: DataConfig, content: str, tokenizer: str, begins: tuple[int, ...], splits: Sequence[str]
) -> str:
    """What tells the tables of `splits` from others; `tokenizer` is a fingerprint."""
    apart = (*PATHS, "cache_dir", "streaming")
    fields = {k: v for k, v in vars(cfg).items() if k not in apart}
    values = [_code(), content, tokenizer, list(begins), list(splits), fields]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


@cache
def _code() -> str:
    """A digest of the code that reads texts: where it changes, texts are read again."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in READERS for path in PACKAGE.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def find(cfg: DataConfig, content: str, key: str) -> Manifest | None:
    """The manifest of `key`; None where there is none, or where `content` says nothing certain."""
    if not content.startswith(KNOWN_BY_CONTENT):
        return None
    with suppress(OSError, ValueError, TypeError):
        return Manifest(**json.loads(_file(cfg, key).read_text("utf-8")))
    return None


def keep(cfg: DataConfig, content: str, key: str, manifest: Manifest) -> None:
    """Write the manifest of `key`; a cache that is for reading only keeps none."""
    if not content.startswith(KNOWN_BY_CONTENT):
        return
    with suppress(OSError):
        _file(cfg, key).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(_file(cfg, key), json.dumps(asdict(manifest)))


def _file(cfg: DataConfig, key: str) -> Path:
    return Path(cfg.cache_dir) / "prepared" / f"{key}.json"


@contextmanager
def alone(cfg: DataConfig, key: str) -> Iterator[None]:
    """Hold what belongs to `key`, so that several runs do not prepare the same text at once.

    Another run that holds it is waited for. The kernel gives it up when its holder is gone.
    """
    try:
        folder = Path(cfg.cache_dir) / "prepared"
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / f".{key}.lock").open("w")
    except OSError:  # what cannot be written is told of where the tables are
        yield
        return
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"another run prepares data={cfg.name}: waiting for it"
            log.info(message)
            print(message, file=sys.stderr)
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError:  # a disk without locks: then each prepares it, to the same result
            pass
        yield


# --------------------------------------------------------------------------- making them


def tables_of(
    cfg: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    wanted: Sequence[str],
    begins: tuple[int, ...],
) -> tuple[dict[str, Dataset], Manifest, bool]:
    """The tables of splits, what was found out about them, and whether one was made now.

    Raises:
        ConfigError: the text changed while it was read, or as `prepare`.
    """
    vocabulary = fingerprint(tokenizer)
    content = _content(cfg)
    known_by = vocabulary
    if cfg.source == "pairs" and cfg.chat_template == "auto":  # which conversations are written by
        known_by += str(tokenizer.chat_template)
    key = key_of(cfg, content, known_by, begins, wanted)
    if cached := _found(cfg, content, key):
        return *cached, False
    with alone(cfg, key):
        if cached := _found(cfg, content, key):  # another run has made it meanwhile
            return *cached, False
        ready, manifest, fresh = _made(cfg, tokenizer, vocabulary, wanted, begins)
        if _content(cfg) != content:
            raise ConfigError(
                f"the text at {cfg.path or cfg.id or cfg.name} changed while it was read: the same "
                "command again reads it as it is now"
            )
        keep(cfg, content, key, manifest)
    return ready, manifest, fresh


def _content(cfg: DataConfig) -> str:
    """What the text of `cfg` is, without asking the hub: "" where that is not certain."""
    if cfg.id and not Path(cfg.id).is_dir():
        pinned = re.fullmatch(r"[0-9a-f]{40}", cfg.revision or "")
        return f"commit:{cfg.id}@{cfg.revision}" if pinned else ""
    return contents.text_of(cfg)


def _found(cfg: DataConfig, content: str, key: str) -> tuple[dict[str, Dataset], Manifest] | None:
    """Tables that were made before, without a look at the text."""
    if (manifest := find(cfg, content, key)) is None:
        return None
    loaded = {}
    for name, folder in manifest.tables.items():
        if (table := tables.load(Path(cfg.cache_dir) / "tokens" / folder)) is None:
            return None
        loaded[name] = table.with_format("numpy")
    return loaded, manifest


def _made(
    cfg: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: str,
    wanted: Sequence[str],
    begins: tuple[int, ...],
) -> tuple[dict[str, Dataset], Manifest, bool]:
    """The tables of splits, found by what is in them or made now."""
    facts: dict[str, Any] = {}
    warnings: list[str] = []
    cache = Path(cfg.cache_dir) / "tokens"
    if cfg.source == "pairs":
        task = pairs.task(cfg, wanted)
        splits = task.splits
        chats = any(pair.turns for split_pairs in splits.values() for pair in split_pairs)
        template = chat.template_of(tokenizer, cfg.chat_template) if chats else None
        rule = facts["rule"] = task.rule | {"loss_on": _loss_on(cfg, chats)}
        if template is not None:
            rule["chat_template"] = template.described()
            vocabulary += template.text
        log.info("records of data=%s: %s", cfg.name, rule)
        counts = {name: len(split_pairs) for name, split_pairs in splits.items()}
        texts = {name: Index.of((pair.id, pair.prompt) for pair in splits[name]) for name in wanted}
        folders = {
            name: cache / _key(_known(splits[name]), vocabulary, _kind(cfg, name, begins))
            for name in wanted
        }

        def text_of(split: str, key: str) -> str:
            return next(pair.prompt for pair in splits[split] if pair.id == key)

    else:
        corpus = documents.corpus(cfg, wanted)
        rule = facts["rule"] = corpus.rule()
        rule_text = "; ".join(f"{key.replace('_', ' ')}: {value}" for key, value in rule.items())
        log.info("data=%s: %s", cfg.name, rule_text)
        texts = {name: corpus.index(name) for name in wanted}
        counts = {name: len(index) for name, index in texts.items()}
        text_of = corpus.text
        folders = {
            name: cache / _key(texts[name], vocabulary, _kind(cfg, name, begins)) for name in wanted
        }
    loaded = {name: tables.load(folder) for name, folder in folders.items()}
    missing = [name for name, table in loaded.items() if table is None]
    if missing and cfg.source == "pairs":
        for name in missing:
            _write_pairs(cfg, splits[name], folders[name], name, tokenizer, begins)
    elif missing:
        packing.write(
            cfg,
            corpus,
            {name: folders[name] for name in missing},
            lambda batch: encode(batch, tokenizer),
            tokenizer,
            begins,
        )
    ready = {name: loaded[name] or _there(folders[name]) for name in wanted}
    if longer := {name: n for name, f in folders.items() if (n := tables.facts_of(f))}:
        facts["too_long"] = longer
    ready = {name: table.with_format("numpy") for name, table in ready.items()}
    if "train" in ready:
        held_out = {name: table for name, table in ready.items() if name != "train"}
        copies, warnings = overlap.facts(cfg, texts, text_of, ready["train"], held_out)
        facts = copies | facts
    kept = {name: folder.name for name, folder in folders.items()}
    return ready, Manifest(kept, counts, facts, warnings), bool(missing)


def _there(folder: Path) -> Dataset:
    table = tables.load(folder)
    if table is None:
        raise OSError(f"{folder} was written and cannot be read")
    return table


def _loss_on(cfg: DataConfig, chats: bool) -> str:
    """What is predicted, in words."""
    if cfg.loss_on == "all":
        return "every token"
    if not chats:
        return "the completion and its end-of-text token"
    which = "the assistant's turns" if cfg.loss_on == "assistant" else "the assistant's last turn"
    return f"{which} with the end of each"


def _known(split_pairs: list[pairs.Pair]) -> Index:
    return Index.of(
        (
            pair.id,
            json.dumps([pair.prompt, pair.completions, *([pair.turns] if pair.turns else [])]),
        )
        for pair in split_pairs
    )


def _kind(cfg: DataConfig, split: str, begins: tuple[int, ...]) -> str:
    """What, besides texts and tokenizer, the table of a split depends on."""
    block = cfg.context_length if split == "train" else 0  # 0: documents as they are
    kind = str(block)
    if cfg.source == "pairs":
        kind = f"pairs {cfg.packing} {cfg.context_length} {block}"
        if (chosen := (cfg.loss_on, cfg.too_long)) != (DataConfig.loss_on, DataConfig.too_long):
            kind += f" {chosen}"
    if begins and (cfg.source == "pairs" or block):  # evaluation puts it before documents itself
        kind += f" after {begins}"
    return kind


def _write_pairs(
    cfg: DataConfig,
    split_pairs: list[pairs.Pair],
    folder: Path,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    begins: tuple[int, ...],
) -> None:
    coming: Iterable[pa.Table]
    if split == "train":
        coming, facts = sequences.blocks(split_pairs, tokenizer, cfg, begins)
    else:
        table = sequences.evaluated(split_pairs, tokenizer, cfg, begins)
        coming, facts = [table], sequences.longer_than_a_window(table, cfg.context_length)
    writer = tables.Writer(folder)
    try:
        for table in coming:
            writer.write(table)
        writer.finish(facts=facts)
    except BaseException:
        writer.discard()
        raise


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """What changes with the vocabulary, the merges and the end-of-text token of a tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{text}{tokenizer.eos_token_id}".encode()).hexdigest()


def _key(texts: Index, tokenizer: str, kind: str) -> str:
    """The name of a table: what its documents, tokenizer and kind make it."""
    digest = hashlib.sha256("\0".join((CACHE_FORMAT, tokenizer, kind)).encode())
    digest.update(texts.digest())
    return digest.hexdigest()[:32]


def encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of every text, no special tokens added, on all cores."""
    # Documents may be longer than the model's context: they are windowed later.
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return list(encoded["input_ids"])
