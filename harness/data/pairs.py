"""Tasks with a prompt and a completion: E2E NLG, WebNLG, DART, any file of pairs or conversations.

A prompt has one completion or several (references). Of a conversation the assistant's last turn is
the completion, and all turns before it are the prompt. `harness.data.forms` has the forms of
records, `harness.data.sequences` what becomes of them. Of a source that is not split already, no
two splits share a prompt, or the beginning of a conversation up to the assistant's first turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.config.errors import ConfigError, nearest
from harness.config.schema import DataConfig
from harness.data import documents, forms, hub, records
from harness.data.forms import Row, Turn
from harness.system import files

STEMS = {"train": "train", "valid": "validation", "validation": "validation", "dev": "validation",
         "test": "test"}  # fmt: skip
E2E_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}


@dataclass(frozen=True)
class Pair:
    """Holds a prompt, or the turns of a conversation, and what may follow it."""

    id: str
    prompt: str
    completions: list[str]
    turns: tuple[Turn, ...] = ()  # of a conversation: what comes before the completion

    @property
    def opening(self) -> str:
        """What no two splits share: the prompt, or the turns before the assistant's first one."""
        roles = [role for role, _ in self.turns]
        if "assistant" not in roles[1:]:
            return self.prompt
        return forms.as_text(self.turns[: roles.index("assistant", 1)])


@dataclass(frozen=True)
class Task:
    """The pairs of a data set by split, and how its records were read."""

    splits: dict[str, list[Pair]]
    rule: dict[str, str]  # in words, for the log and result.json


def read(cfg: DataConfig, splits: Sequence[str] = documents.SPLITS) -> dict[str, list[Pair]]:
    """The pairs of a data config by split; raises ConfigError where one would be empty."""
    return task(cfg, splits).splits


def task(cfg: DataConfig, splits: Sequence[str] = documents.SPLITS) -> Task:
    """The pairs of a data config by split, and what was found out of its records.

    Raises:
        ConfigError: a split would be empty, or a record cannot be read (`harness.data.forms`).
    """
    rows, form = _hub_rows(cfg) if cfg.id else _file_rows(cfg)
    by_split = {name: _grouped(name, split_rows, cfg) for name, split_rows in rows.items()}
    cut_names = [name for name in documents.SPLITS if name not in by_split]
    for missing in cut_names:
        # By prompts: all completions of one stay together. The test's share is of what validation
        # leaves.
        ids = [(pair.id, pair.opening) for pair in by_split["train"]]
        chosen = documents.split(ids, cfg.validation_share, cfg.test_share, how=cfg.split)[missing]
        names = {name for name, _ in chosen}
        by_split[missing] = [pair for pair in by_split["train"] if pair.id in names]
        by_split["train"] = [pair for pair in by_split["train"] if pair.id not in names]
    kept = documents.share_of([pair.id for pair in by_split["train"]], cfg.train_share)
    by_split["train"] = [pair for pair in by_split["train"] if pair.id in kept]
    for name in splits:
        if not by_split[name]:
            raise ConfigError(f"data={cfg.name}: the {name} split has no pair")
    rule = {
        "documents": forms.WORDS[form],
        "split": documents.split_rule(cfg, cut_names, list(rows)),
        "record_form": form,
    }
    if left_out := sum(row.left_out for split_rows in rows.values() for row in split_rows):
        rule["left_out"] = f"{left_out} turns after the assistant's last one"
    if repeated := sum(row.separated_again for split_rows in rows.values() for row in split_rows):
        rule["separator_again"] = f"{repeated} completions have {cfg.separator!r} in them"
    return Task({name: by_split[name] for name in splits}, rule)


def _grouped(split: str, rows: list[Row], cfg: DataConfig) -> list[Pair]:
    """One Pair a prompt, in the order of the source."""
    by_prompt: dict[tuple[str, tuple[Turn, ...]], list[str]] = {}
    for row in rows:  # one that comes twice counts twice, as published
        prompt = row.prompt if row.turns else styled(row.prompt, cfg)
        known = by_prompt.setdefault((prompt, row.turns), [])
        known += [text.strip() for text in row.completions if text.strip()]
    return [
        Pair(f"{split}/{number}", prompt, completions, turns)
        for number, ((prompt, turns), completions) in enumerate(by_prompt.items())
        if prompt and completions
    ]


def styled(prompt: str, cfg: DataConfig) -> str:
    """With `data.prompt_style=e2e` name[X], eatType[Y] as `name : X | Type : Y`; stripped."""
    slots = re.findall(r"\s*([^,\[\]]+)\[([^\]]*)\]", prompt) if cfg.prompt_style == "e2e" else []
    if slots:
        prompt = " | ".join(f"{E2E_NAMES.get(name, name)} : {value}" for name, value in slots)
    return prompt.strip()


# --------------------------------------------------------------------------- files and the hub


def _file_rows(cfg: DataConfig) -> tuple[dict[str, list[Row]], str]:
    """The rows by split, and the form of all of them."""
    by_split = {split: [file] for split, file in _files(cfg).items()}
    for split, path in (("validation", cfg.validation_path), ("test", cfg.test_path)):
        if path:
            by_split[split] = files.find_files(path, encoding=cfg.encoding, kinds=files.OF_PAIRS)
    rows: dict[str, list[Row]] = {}
    form: str | None = None
    for split in sorted(by_split, key=lambda name: name != "train"):  # whose form counts
        rows[split] = []
        for file in by_split[split]:
            new_rows = _rows(file, cfg, form)
            form = form or (new_rows[0].form if new_rows and new_rows[0].form != "lines" else None)
            rows[split] += new_rows
    return {split: rows[split] for split in by_split}, form or "lines"


def left_out(cfg: DataConfig) -> list[Path]:
    """Return the files of `cfg.path` that belong to no split, and so are not read."""
    return sorted(set(_found(cfg)) - set(_files(cfg).values()))


def _found(cfg: DataConfig) -> list[Path]:
    return files.find_files(cfg.path, encoding=cfg.encoding, kinds=files.OF_PAIRS)


def _files(cfg: DataConfig) -> dict[str, Path]:
    """By split, the folder's files that split_names or their own names say; or one file."""
    paths = _found(cfg)
    if len(paths) == 1 and not cfg.split_names:
        return {"train": paths[0]}
    by_split: dict[str, Path] = {}
    for file in paths if not cfg.split_names else []:
        if (split := STEMS.get(files.stem(file))) and (
            other := by_split.setdefault(split, file)
        ) != file:
            raise ConfigError(
                f"data.path={cfg.path}: {other} and {file} could both be its {split} split; say "
                "which is which: '+data.split_names={train: FILE, test: FILE}'"
            )
    names = [file.name for file in paths]
    for split, name in cfg.split_names.items():
        if name not in names:
            raise ConfigError(f"data.split_names.{split}={name}: {nearest(name, names)}")
        if names.count(name) > 1:
            raise ConfigError(
                f"data.split_names.{split}={name}: {names.count(name)} files in {cfg.path} are "
                "called so; give them names of their own"
            )
        by_split[split] = paths[names.index(name)]
    if "train" not in by_split:
        raise ConfigError(
            f"data.path={cfg.path}: no training file among {', '.join(names[:12])}; say which is "
            "which: '+data.split_names={train: FILE, test: FILE}'"
        )
    return by_split


def _rows(file: Path, cfg: DataConfig, form: str | None) -> list[Row]:
    """The rows of a file of `prompt||completion` lines, or of records of one `form`."""
    if files.kind(file) != ".txt":
        coming = records.records(file, encoding=cfg.encoding)
        return [_filled(row, where) for where, row in forms.rows(coming, cfg, form)]
    rows: list[Row] = []
    for number, line in enumerate(records.text(file, cfg.encoding).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        prompt, separator, completion = line.partition(cfg.separator)
        if not separator:
            raise ConfigError(
                f"{where}: no {cfg.separator!r} between prompt and completion in {line[:60]!r}; "
                "set data.separator"
            )
        repeated = cfg.separator in completion
        rows.append(_filled(Row(prompt, [completion], separated_again=repeated), where))
    return rows


def _filled(row: Row, where: str) -> Row:
    """`row`; raises ConfigError where its prompt or all of its completions are empty."""
    if not row.prompt.strip() or not any(text.strip() for text in row.completions):
        what = "completion" if row.prompt.strip() else "prompt"
        raise ConfigError(f"{where}: the {what} is empty; leave the record out of the file")
    return row


def _hub_rows(cfg: DataConfig) -> tuple[dict[str, list[Row]], str]:
    by_split: dict[str, list[Row]] = {}
    form: str | None = None
    for name, (source, rows) in hub.hub_splits(cfg).items():
        fetched = hub.fetched(cfg, source, rows)
        coming = ((f"{cfg.id}, {source} record {n}", row) for n, row in enumerate(fetched, 1))
        split_rows = list(forms.rows(coming, cfg, form))
        form = form or (split_rows[0][1].form if split_rows else None)
        by_split[name] = [
            row if row.form == "pair" else _filled(row, where) for where, row in split_rows
        ]
    return by_split, form or "pair"
