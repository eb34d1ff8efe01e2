"""Where text comes from: every source gives documents, split once into train, validation and test.

A source that is not split already is split by `split`, so that no two splits share a text; the rule
depends on nothing but the documents' ids and which of them are copies: every method, seed and
machine sees the same split. Copies in a source that comes split are counted
(`harness.data.overlap`).

A source can be read again and again, one document at a time: what holds a whole text in memory is
`read`, which is for small ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.config.errors import ConfigError
from harness.config.schema import DataConfig
from harness.data.docstrings import docstrings
from harness.data.hub import hub
from harness.data.kjv import kjv
from harness.data.sources import SPLITS, Document, Source, text_files

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
        cut_names = [name for name, (part, _) in self.places.items() if name != part]
        split = split_rule(self.cfg, cut_names, list(self.source.parts))
        rule = {"documents": self.source.unit, "split": split}
        if blank := {part: n for part, n in self.source.blank.items() if n}:
            counts = ", ".join(f"{n} of {part}" for part, n in blank.items())
            rule["left_out"] = f"without text (null or white space): {counts}"
        return rule

    def index(self, split: str) -> Index:
        """Return the index of the documents of a split, in the order of the split."""
        part, positions = self.places[split]
        return self.indexes[part].take(positions)

    def text(self, split: str, key: str) -> str:
        """Return the text of the document `key` of a split, as it was read."""
        return next(text for _, _, (document_id, text) in self.walk([split]) if document_id == key)

    def walk(self, wanted: Sequence[str]) -> Iterator[tuple[str, int, Document]]:
        """(split, place in it, document) of the splits `wanted`, in the order of the source.

        Raises:
            ConfigError: the source is not what it was when it was split.
        """
        import numpy as np

        max_chars = self.cfg.document_chars
        for part, documents in self.source.parts.items():
            index = self.indexes.get(part)
            names = [name for name in wanted if self.places[name][0] == part]
            if index is None or not names:
                continue
            name_index = np.full(len(index), -1, np.int8)  # which of names
            rank = np.empty(len(index), np.int64)
            for number, name in enumerate(names):
                positions = self.places[name][1]
                name_index[positions], rank[positions] = number, np.arange(len(positions))
            changed = f"the text at {self.cfg.path or self.cfg.name} changed while it was read"
            count = 0  # documents come one at a time: no more of them is held here
            for i, (key, text) in enumerate(documents()):
                count += 1
                if i >= len(index):
                    break
                if name_index[i] >= 0:
                    document = key, text[:max_chars]
                    if not index.has(i, document):
                        raise ConfigError(changed)
                    yield names[name_index[i]], int(rank[i]), document
            if count != len(index):
                raise ConfigError(changed)


def split_rule(cfg: DataConfig, cut_names: Sequence[str], existing: Sequence[str]) -> str:
    """How documents were split, in words: the `existing` splits, and those that were cut."""
    how = f"as the source has it: {', '.join(existing)}"
    if not cut_names:
        return how
    order = (
        "contiguous: the last documents are test, those before them validation"
        if cfg.split == "contiguous"
        else "hash: the first documents by the SHA-256 of their ids are test, the next validation"
    )
    return (
        order
        if len(cut_names) == 2
        else f"{cut_names[0]} is cut from train, {order}; the others {how}"
    )


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
        assigned = assign(train, cfg.validation_share, cfg.test_share, cfg.split)
        import numpy as np

        left = np.ones(len(train), bool)
        for name in missing:
            places[name] = ("train", assigned[name])
            left[assigned[name]] = False
        places["train"] = ("train", np.flatnonzero(left))
    places["train"] = ("train", share_of(train, places["train"][1], cfg.train_share))
    for name in splits:
        part, positions = places[name]
        if indexes[part].blank[positions].all():
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
    ranked: dict[str, list[tuple[int, Document]]] = {name: [] for name in text.places}
    for name, rank, document in text.walk(list(text.places)):
        ranked[name].append((rank, document))
    return {name: [doc for _, doc in sorted(docs)] for name, docs in ranked.items()}


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
    positions = assign(index, validation_share, test_share, how)
    return {name: [documents[i] for i in indices] for name, indices in positions.items()}


SOURCES: dict[str, Callable[[DataConfig], Source]] = {
    "kjv": kjv,
    "text_files": text_files,
    "hub": hub,
    "docstrings": docstrings,
}
