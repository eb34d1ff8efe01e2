"""Tasks with a prompt and a completion: E2E NLG, WebNLG, DART, and any file of pairs.

A prompt has one completion or several (references), and a sequence is

    prompt <|endoftext|> " " completion <|endoftext|>

of which the completion and its end-of-text token are predicted (Hu et al. 2021, examples/NLG of
microsoft/LoRA); before the prompt stands BOS where `harness.evaluation.prefix` says so.
A training block holds one sequence, or with `data.packing=packed` as many as fit in
`data.context`: each has its own positions and sees itself alone, so that packing changes no loss.
Of a source that is not split already, no two splits share a prompt.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from harness.config.errors import ConfigError, nearest
from harness.config.schema import DataConfig
from harness.data import documents, records
from harness.data.token_tables import IGNORE
from harness.system import files

STEMS = {"train": "train", "valid": "validation", "validation": "validation", "dev": "validation",
         "test": "test"}  # fmt: skip
E2E_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}


@dataclass(frozen=True)
class Pair:
    """A prompt and what may follow it."""

    id: str
    prompt: str
    completions: list[str]


@dataclass(frozen=True)
class Example:
    """Ids of a prompt with one of its completions, the first `num_prompt` of them given."""

    pair: str  # its id
    ids: list[int]
    num_prompt: int
    completion: str

    @property
    def length(self) -> int:
        """Inputs, and so targets."""
        return len(self.ids) - 1


def read(cfg: DataConfig, splits: Sequence[str] = documents.SPLITS) -> dict[str, list[Pair]]:
    """The pairs of a data config by split; raises ConfigError where one would be empty."""
    rows = _hub_rows(cfg) if cfg.id else _file_rows(cfg)
    found = {name: _grouped(name, pairs, cfg) for name, pairs in rows.items()}
    for missing in [name for name in documents.SPLITS if name not in found]:
        # By prompts: all completions of one stay together. The test's share is of what validation
        # leaves.
        ids = [(pair.id, pair.prompt) for pair in found["train"]]
        cut = documents.split(ids, cfg.validation_share, cfg.test_share, how=cfg.split)[missing]
        names = {name for name, _ in cut}
        found[missing] = [pair for pair in found["train"] if pair.id in names]
        found["train"] = [pair for pair in found["train"] if pair.id not in names]
    kept = documents.share_of([pair.id for pair in found["train"]], cfg.train_share)
    found["train"] = [pair for pair in found["train"] if pair.id in kept]
    for name in splits:
        if not found[name]:
            raise ConfigError(f"data={cfg.name}: the {name} split has no pair")
    return {name: found[name] for name in splits}


def _grouped(split: str, rows: list[tuple[str, list[str]]], cfg: DataConfig) -> list[Pair]:
    """One Pair a prompt, in the order of the source."""
    by_prompt: dict[str, list[str]] = {}
    for prompt, completions in rows:  # one that comes twice counts twice, as published
        known = by_prompt.setdefault(styled(prompt, cfg), [])
        known += [text.strip() for text in completions if text.strip()]
    return [
        Pair(f"{split}/{number}", prompt, completions)
        for number, (prompt, completions) in enumerate(by_prompt.items())
        if prompt and completions
    ]


def styled(prompt: str, cfg: DataConfig) -> str:
    """With `data.prompt_style=e2e` name[X], eatType[Y] as `name : X | Type : Y`; stripped."""
    slots = re.findall(r"\s*([^,\[\]]+)\[([^\]]*)\]", prompt) if cfg.prompt_style == "e2e" else []
    if slots:
        prompt = " | ".join(f"{E2E_NAMES.get(name, name)} : {value}" for name, value in slots)
    return prompt.strip()


# --------------------------------------------------------------------------- files and the hub


def _file_rows(cfg: DataConfig) -> dict[str, list[tuple[str, list[str]]]]:
    found = {split: list(_rows(file, cfg)) for split, file in _files(cfg).items()}
    for split, path in (("validation", cfg.validation_path), ("test", cfg.test_path)):
        if path:
            own = files.find_files(path, encoding=cfg.encoding, kinds=files.OF_PAIRS)
            found[split] = [row for file in own for row in _rows(file, cfg)]
    return found


def left_out(cfg: DataConfig) -> list[Path]:
    """The files of `cfg.path` that are no split's."""
    return sorted(set(_found(cfg)) - set(_files(cfg).values()))


def _found(cfg: DataConfig) -> list[Path]:
    return files.find_files(cfg.path, encoding=cfg.encoding, kinds=files.OF_PAIRS)


def _files(cfg: DataConfig) -> dict[str, Path]:
    """By split, the folder's files that split_names or their own names say; or one file."""
    found = _found(cfg)
    if len(found) == 1 and not cfg.split_names:
        return {"train": found[0]}
    by_split: dict[str, Path] = {}
    for file in found if not cfg.split_names else []:
        if (split := STEMS.get(files.stem(file))) and (
            other := by_split.setdefault(split, file)
        ) != file:
            raise ConfigError(
                f"data.path={cfg.path}: {other} and {file} could both be its {split} split; say "
                "which is which: '+data.split_names={train: FILE, test: FILE}'"
            )
    names = [file.name for file in found]
    for split, name in cfg.split_names.items():
        if name not in names:
            raise ConfigError(f"data.split_names.{split}={name}: {nearest(name, names)}")
        if names.count(name) > 1:
            raise ConfigError(
                f"data.split_names.{split}={name}: {names.count(name)} files in {cfg.path} are "
                "called so; give them names of their own"
            )
        by_split[split] = found[names.index(name)]
    if "train" not in by_split:
        raise ConfigError(
            f"data.path={cfg.path}: no training file among {', '.join(names[:12])}; say which is "
            "which: '+data.split_names={train: FILE, test: FILE}'"
        )
    return by_split


def _rows(file: Path, cfg: DataConfig) -> Iterator[tuple[str, list[str]]]:
    """(prompt, completions) of a file of `prompt||completion` lines, or of records."""
    if files.kind(file) != ".txt":
        for where, record in records.records(file, encoding=cfg.encoding):
            yield _filled(_fields(record, cfg, where), where)
        return
    for number, line in enumerate(records.text(file, cfg.encoding).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        prompt, found, completion = line.partition(cfg.separator)
        if not found:
            raise ConfigError(
                f"{where}: no {cfg.separator!r} between prompt and completion in {line[:60]!r}; "
                "set data.separator"
            )
        yield _filled((prompt, [completion]), where)


def _filled(row: tuple[str, list[str]], where: str) -> tuple[str, list[str]]:
    """`row`; raises ConfigError where its prompt or all of its completions are empty."""
    prompt, completions = row
    if not prompt.strip() or not any(text.strip() for text in completions):
        what = "completion" if prompt.strip() else "prompt"
        raise ConfigError(f"{where}: the {what} is empty; leave the record out of the file")
    return row


def _fields(record: dict[str, Any], cfg: DataConfig, where: str) -> tuple[str, list[str]]:
    """Prompt and completions of a record; lists of strings are slots, and references."""
    asked = cfg.completion_field
    either = [asked] if isinstance(asked, str) else list(asked)
    for key, name in [("prompt", cfg.prompt_field), *(("completion", name) for name in either)]:
        if name not in record:
            raise ConfigError(
                f"data.{key}_field={name}: {where} has no such field; {nearest(name, record)}"
            )
    slots = record[cfg.prompt_field]
    if isinstance(slots, list):  # of texts, or of triples
        slots = " | ".join(
            " : ".join(_texts(slot, where, cfg.prompt_field)) if isinstance(slot, list) else slot
            for slot in _texts(slots, where, cfg.prompt_field, nested=True)
        )
    (prompt,) = _texts([slots], where, cfg.prompt_field)
    name = next((name for name in either if record[name] not in (None, "", [])), either[0])
    completions = record[name] if isinstance(record[name], list) else [record[name]]
    return prompt, _texts(completions, where, name)


def _texts(values: list[Any], where: str, name: str, *, nested: bool = False) -> list[Any]:
    """Texts with their line ends unified; with `nested`, lists among them stay as they are.

    Raises:
        ConfigError: one is neither.
    """
    for value in values:
        if isinstance(value, dict):
            chat = {"role", "content"} <= set(value)
            why = "; chat messages are not rendered: give the text that they become" * chat
            raise ConfigError(
                f"{where}: {name}: expected text or a list of texts, found {str(value)[:60]}{why}"
            )
    return [
        value if nested and isinstance(value, list) else records.checked(value, where, name)
        for value in values
    ]


def _hub_rows(cfg: DataConfig) -> dict[str, list[tuple[str, list[str]]]]:
    return {
        name: [
            _fields(row, cfg, f"{cfg.id}, {source} record {number}")
            for number, row in enumerate(rows, 1)
        ]
        for name, (source, rows) in documents.hub_splits(cfg).items()
    }


# --------------------------------------------------------------------------- to tokens


def sequences(
    pairs: list[Pair],
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    begins: tuple[int, ...] = (),
) -> list[Example]:
    """Every prompt, after the ids `begins`, with each of its completions.

    Raises:
        ConfigError: one is longer than `context`.
    """
    end = tokenizer.eos_token_id
    assert isinstance(end, int)
    completions = [text for pair in pairs for text in pair.completions]
    prompts = _encode([pair.prompt for pair in pairs], tokenizer)
    answers = iter(_encode([f" {text}" for text in completions], tokenizer))
    found = []
    for pair, prompt in zip(pairs, prompts, strict=True):
        given = [*begins, *prompt, end]
        for text in pair.completions:
            found.append(Example(pair.id, [*given, *next(answers), end], len(given), text))
    longest = max(found, key=lambda one: one.length)
    if longest.length > context:
        raise ConfigError(
            f"{longest.pair} with its completion is {longest.length} tokens, longer than "
            f"data.context={context}: set data.context={longest.length} or more"
        )
    return found


def prompt_ids(
    prompt: str, tokenizer: PreTrainedTokenizerBase, begins: tuple[int, ...] = ()
) -> list[int]:
    """What a model is given to complete."""
    return [*begins, *_encode([prompt], tokenizer)[0], tokenizer.eos_token_id]


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return list(encoded["input_ids"])


def blocks(
    pairs: list[Pair],
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    packing: str,
    begins: tuple[int, ...] = (),
) -> pa.Table:
    """Training blocks: inputs, targets (IGNORE over prompts and padding), positions, num_predicted.

    With `packed` every block is `context` long and no sequence is cut: a sequence goes into the
    fullest block that has room (best fit), in an order that mixes prompts and depends on nothing
    but their ids. With `padded` a block is a sequence, as long as it is.
    """
    end = tokenizer.eos_token_id
    found = sequences(pairs, tokenizer, context, begins)
    order = sorted(
        range(len(found)),
        key=lambda i: hashlib.sha256(f"{found[i].pair}#{found[i].completion}".encode()).digest(),
    )
    bins: list[list[Example]] = []
    room: list[tuple[int, int]] = []  # (positions left, bin), ascending
    for one in (found[i] for i in order):
        at = bisect_left(room, (one.length, -1)) if packing == "packed" else len(room)
        if at == len(room):
            bins.append([one])
            left, index = context - one.length, len(bins) - 1
        else:
            left, index = room.pop(at)
            bins[index].append(one)
            left -= one.length
        if left >= 2 and packing == "packed":
            insort(room, (left, index))
    columns: dict[str, list[Any]] = {"inputs": [], "targets": [], "positions": []}
    for members in bins:
        width = context if packing == "packed" else members[0].length
        pad = width - sum(one.length for one in members)
        columns["inputs"].append([*chain(*(one.ids[:-1] for one in members)), *[end] * pad])
        columns["targets"].append([*chain(*map(_targets, members)), *[IGNORE] * pad])
        columns["positions"].append([*chain(*(range(one.length) for one in members)), *range(pad)])
    kind = pa.list_(pa.int32())
    table = {name: pa.array(values, type=kind) for name, values in columns.items()}
    predicted = [sum(t != IGNORE for t in targets) for targets in columns["targets"]]
    return pa.table(table | {"num_predicted": predicted})


def _targets(one: Example) -> list[int]:
    return [IGNORE] * (one.num_prompt - 1) + one.ids[one.num_prompt :]


def evaluated(
    pairs: list[Pair],
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    begins: tuple[int, ...] = (),
) -> pa.Table:
    """One row a sequence, as `data` has documents; words and bytes are the completion's.

    `first` is the id before `tokens`, of which the first `skipped` are the prompt's.
    """
    found = sequences(pairs, tokenizer, context, begins)
    return pa.table(
        {
            "id": [one.pair for one in found],
            "first": [one.ids[0] for one in found],
            "tokens": pa.array([one.ids[1:] for one in found], type=pa.list_(pa.int32())),
            "skipped": [one.num_prompt - 1 for one in found],
            "num_words": [len(one.completion.split()) for one in found],
            "num_bytes": [len(one.completion.encode()) for one in found],
        }
    )
