"""What a source of documents is, and the user's own files as one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from harness.config.errors import ConfigError, nearest
from harness.config.schema import DataConfig
from harness.data import forms, passages, records
from harness.system import encodings, files
from harness.system.files import find_files

Document = tuple[str, str]  # (id, text)
SPLITS = ("train", "validation", "test")
LEAST_FILES = 3  # of text that are documents as they are; one or two are cut into passages


@dataclass(frozen=True)
class Source:
    """The documents of a source by the split that it has them in; one without splits has train."""

    parts: dict[str, Callable[[], Iterator[Document]]]
    unit: str = "record"  # what a document is, in words
    blank: dict[str, int] = field(default_factory=dict)  # of them without text, of parts read once


def _texts(file: Path, cfg: DataConfig, whole: bool) -> Iterator[tuple[str, Any]]:
    """(where, text) of every document of one file, in order; None where a record has none.

    A text file is a document, or several where there is a separator, or passages unless `whole`.
    """
    if files.kind(file) in files.TEXTS:
        pieces: Iterable[str]
        if cfg.document_separator:
            pieces = records.text(file, cfg.encoding).split(cfg.document_separator)
            pieces = pieces[:-1] if len(pieces) > 1 and not pieces[-1].strip() else pieces
        elif whole:
            pieces = [records.text(file, cfg.encoding)]
        else:
            pieces = passages.cut(encodings.chunks(file, cfg.encoding))
        for number, piece in enumerate(pieces, 1):
            yield f"{file}, document {number}", piece
        return
    for where, record in records.records(file, [cfg.text_field], cfg.encoding):
        if cfg.text_field not in record:
            form = forms.of_text(record)
            other = f"; these are records of the form {form}, which data=pairs reads" * bool(form)
            raise ConfigError(
                f"data.text_field={cfg.text_field}: {where} has no such field; "
                f"{nearest(cfg.text_field, list(record))}{other}"
            )
        yield where, record[cfg.text_field]


def text_files(cfg: DataConfig) -> Source:
    """The user's own files (`files.KINDS`): a file of text is a document, or a record is one.

    One text file, or two, are cut into passages (`harness.data.passages`), unless
    `document_separator` says where documents end. Records, files and pieces between separators that
    hold null or white space are no documents, and are counted, but for what follows the last
    separator of a file. Files of `validation_path` and `test_path` are these splits, and so
    are those of a saved data set.
    """
    by_split = own_files(cfg)
    whole = {name: _is_whole(paths, cfg) for name, paths in by_split.items()}
    units = {_unit(paths, cfg, whole[name]): name for name, paths in by_split.items()}
    blank: dict[str, int] = {}
    unit = "; ".join(units) if len(units) == 1 else "; ".join(f"{v}: {k}" for k, v in units.items())

    def documents(name: str) -> Iterator[Document]:
        path = {"validation": cfg.validation_path, "test": cfg.test_path}.get(name) or cfg.path
        count = 0
        for called, file in zip(files.names(by_split[name], path), by_split[name], strict=True):
            for number, (where, value) in enumerate(_texts(file, cfg, whole[name])):
                text = "" if value is None else records.checked(value, where, cfg.text_field)
                if text.strip():
                    yield f"{called}#{number}", text
                else:
                    count += 1
        blank[name] = count

    return Source({name: partial(documents, name) for name in by_split}, unit, blank)


def _is_whole(paths: list[Path], cfg: DataConfig) -> bool:
    only_text = all(files.kind(file) in files.TEXTS for file in paths)
    return bool(cfg.document_separator) or not only_text or len(paths) >= LEAST_FILES


def _unit(paths: list[Path], cfg: DataConfig, whole: bool) -> str:
    kinds = {files.kind(file) in files.TEXTS for file in paths}
    if not whole:
        return (
            "passage of a text file: paragraphs, which blank lines divide, grouped to at least "
            f"{passages.PASSAGE_CHARS:,} characters (fewer in a short text)"
        )
    text = f"piece of a text file between {cfg.document_separator!r}"
    words = {True: text if cfg.document_separator else "text file", False: "record"}
    return " or ".join(words[kind] for kind in sorted(kinds, reverse=True))


def own_files(cfg: DataConfig, kinds: Sequence[str] = files.KINDS) -> dict[str, list[Path]]:
    """The files of text of one's own by split; those of `path` are train's, or as a saved data set.

    Raises:
        ConfigError: one file is in two splits, or as `find_files`.
    """
    tables = files.saved(Path(cfg.path).expanduser()) if isinstance(cfg.path, str) else {}
    if "train" in tables and len(tables) == 1 and not cfg.split_names:
        tables = {}
    by_split: dict[str, list[Path]] = {}
    for name in SPLITS if tables else ():
        split_name = cfg.split_names.get(name, name)
        if split_name in tables:
            by_split[name] = tables[split_name]
        elif name in cfg.split_names or name == "train":
            raise ConfigError(
                f"data.split_names.{name}={split_name}: {cfg.path} has no such split; "
                f"{nearest(split_name, tables)}"
            )
    if not tables:
        by_split["train"] = find_files(cfg.path, encoding=cfg.encoding, kinds=kinds)
    for name, path in (("validation", cfg.validation_path), ("test", cfg.test_path)):
        if path:
            by_split[name] = find_files(path, encoding=cfg.encoding, kinds=kinds)
    seen: dict[str, str] = {}
    for name, paths in by_split.items():
        for file in paths:
            other = seen.setdefault(os.path.realpath(file), name)
            if other != name:
                raise ConfigError(
                    f"data.{name}_path: {file} is also among the files of {other}: a text can be "
                    "in one split only"
                )
    return {name: by_split[name] for name in SPLITS if name in by_split}
