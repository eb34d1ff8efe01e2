"""Which documents are train, validation and test: by what is known of them without their text.

An `Index` has 57 bytes and the id for each document, so that a text of any size can be split.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from harness.config.errors import ConfigError
from harness.data.sources import SPLITS

WIDTH = 16  # bytes of a digest: enough that no two are the same by chance
Digests = NDArray[np.bytes_]  # (N,) of WIDTH bytes
Positions = NDArray[np.int64]  # of documents in the order of their source


@dataclass(frozen=True)
class Index:
    """Documents in the order of their source: digests of ids and texts, and no text."""

    places: Digests  # SHA-256 of the id, its beginning
    texts: Digests  # of the text as it is used
    alike: Digests  # the same without regard to white space: by which documents are duplicates
    blank: NDArray[np.bool_]  # whether it is white space
    num_bytes: NDArray[np.int64]
    ids: pa.ChunkedArray

    def __len__(self) -> int:
        return len(self.places)

    @staticmethod
    def of(
        documents: Iterable[tuple[str, str]],
        document_chars: int | None = None,
        *,
        exact: bool = False,
    ) -> Index:
        """The index of (id, text); of a text its first `document_chars` characters count.

        `exact`: texts that differ in white space alone are no duplicates.
        """
        places, texts, blank, alike = bytearray(), bytearray(), bytearray(), bytearray()
        sizes = array("q")
        parts: list[pa.Array] = []
        waiting: list[str] = []
        for key, text in documents:
            used = text[:document_chars]
            places += place(key)
            encoded = used.encode()
            sizes.append(len(encoded))
            texts += (own := _digest(encoded))
            words = " ".join(used.split())
            alike += own if exact or words == used else _digest(words.encode())
            blank.append(not used or used.isspace())
            waiting.append(key)
            if len(waiting) == 10_000:
                parts.append(pa.array(waiting, pa.string()))
                waiting = []
        parts.append(pa.array(waiting, pa.string()))
        kind = f"S{WIDTH}"
        return Index(
            np.frombuffer(bytes(places), kind),
            np.frombuffer(bytes(texts), kind),
            np.frombuffer(bytes(alike), kind),
            np.frombuffer(bytes(blank), bool),
            np.array(sizes, np.int64),
            pa.chunked_array(parts),
        )

    def has(self, i: int, document: tuple[str, str]) -> bool:
        """Return whether document i is this (id, text as it is used)."""
        key, text = document
        known = place(key), _digest(text.encode())  # numpy leaves out NULs at the end
        return (self.places[i], self.texts[i]) == tuple(part.rstrip(b"\0") for part in known)

    def take(self, positions: Positions) -> Index:
        """Return the index of the documents at these positions, in their order."""
        ids = self.ids.take(pa.array(positions))
        columns = (
            self.places[positions],
            self.texts[positions],
            self.alike[positions],
            self.blank[positions],
        )
        return Index(*columns, self.num_bytes[positions], ids)

    def digest(self) -> bytes:
        """What tells these documents, their ids and their order from others."""
        return hashlib.sha256(self.places.tobytes() + self.texts.tobytes()).digest()


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=WIDTH).digest()


def place(key: str) -> bytes:
    """What documents are ordered by: the beginning of the SHA-256 of their id."""
    return hashlib.sha256(key.encode()).digest()[:WIDTH]


def assign(
    index: Index, validation_share: float, test_share: float, how: str
) -> dict[str, Positions]:
    """The documents of each split, in its order; `documents.split` says which.

    Raises:
        ConfigError: fewer than three different documents, or none left to train on.
    """
    _, first, group, sizes = np.unique(
        index.alike, return_index=True, return_inverse=True, return_counts=True
    )
    group = group.reshape(-1)
    if len(first) < 3:
        different = f", {len(first)} different," if len(first) < len(index) else ""
        raise ConfigError(
            f"{len(index)} document(s){different} cannot be split into train, validation and "
            "test: give at least 3 files or records, or a longer text"
        )
    members = np.argsort(group, kind="stable")  # by group, in the order of the source
    ends = np.cumsum(sizes)
    if how == "contiguous":  # from the end
        ranked = np.argsort(-first, kind="stable")
    else:
        known_by = first.copy()
        for g in np.flatnonzero(sizes > 1):
            alike = members[ends[g] - sizes[g] : ends[g]]
            ids = index.ids.take(pa.array(alike)).to_pylist()
            known_by[g] = alike[min(range(len(ids)), key=ids.__getitem__)]
        ranked = np.argsort(index.places[known_by], kind="stable")
    positions: dict[str, Positions] = {}
    taken = np.zeros(len(index), bool)
    for name, share in (("test", test_share), ("validation", validation_share)):
        chosen, ranked = _first(ranked, sizes, max(1, round(share * len(index))))
        parts = [members[ends[g] - sizes[g] : ends[g]] for g in chosen]
        positions[name] = np.concatenate([np.empty(0, np.int64), *parts])
        if how == "contiguous":
            positions[name].sort()
        taken[positions[name]] = True
    positions["train"] = np.flatnonzero(~taken)
    if not len(positions["train"]):
        raise ConfigError(f"no training documents left of {len(index)}: lower the shares")
    return {name: positions[name] for name in SPLITS}


def _first(
    ranked: NDArray[np.int64], sizes: NDArray[np.int64], room: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first groups that there is room for, and those that are left.

    Where there is room for none, the smallest.
    """
    taken = np.zeros(len(ranked), bool)
    for i, size in enumerate(sizes[ranked]):
        if size <= room:
            taken[i] = True
            room -= size
        if not room:
            break
    if not taken.any() and len(ranked):
        taken[np.argmin(sizes[ranked])] = True
    return ranked[taken], ranked[~taken]


def share_of(index: Index, positions: Positions, share: float) -> Positions:
    """The first of `positions` by the place of their documents, at least one, in their order."""
    if share >= 1:
        return positions
    ranked = np.argsort(index.places[positions], kind="stable")
    return np.sort(positions[ranked[: max(1, round(share * len(positions)))]])
