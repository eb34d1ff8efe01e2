"""A fixed part of a held-out text, where all of it would take too long to read each time.

Documents are taken in the order of the SHA-256 of their ids, until the next one would bring more
than so many predicted tokens: every run, method and seed reads the same ones, and a smaller part is
within a larger one. Of pairs, a prompt is taken with all its completions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

from harness.data import token_tables
from harness.data.splits import place

ROWS = 1000  # that are copied at a time


def within(ids: Sequence[str], num_tokens: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """The rows that stay within `limit` predicted tokens, in their order; one document at least."""
    sizes: dict[str, int] = {}
    for key, count in zip(ids, num_tokens.tolist(), strict=True):
        sizes[key] = sizes.get(key, 0) + count
    taken: set[str] = set()
    left = limit
    for key in sorted(sizes, key=place):
        if taken and sizes[key] > left:
            break
        taken.add(key)
        left -= sizes[key]
    return np.flatnonzero([key in taken for key in ids])


def num_predicted(table: Dataset) -> NDArray[np.int64]:
    """Return the number of predicted tokens of each row of a held-out table."""
    if "scored" in table.column_names:  # of several turns
        marks = table.data.column("scored").to_pylist()
        return np.array([sum(row_marks) for row_marks in marks], np.int64)
    counts = pc.list_value_length(table.data.column("tokens")).to_numpy().astype(np.int64)
    if "skipped" in table.column_names:  # of pairs: the prompt's
        counts = counts - table.data.column("skipped").to_numpy()
    return counts


def of(table: Dataset, limit: int | None) -> tuple[Dataset, dict[str, Any]]:
    """The part of a held-out table within `limit` tokens, and what it is; {} where it is all of it.

    The part is a table of its own beside the whole one, made where it is not there yet.
    """
    counts = num_predicted(table)
    if limit is None or counts.sum() <= limit:
        return table, {}
    ids = table.data.column("id").to_pylist()
    rows = within(ids, counts, limit)
    folder = Path(table.cache_files[0]["filename"]).parent
    name = hashlib.sha256(f"{folder.name} {rows.tolist()}".encode()).hexdigest()[:32]
    part = token_tables.load(folder.with_name(name))
    if part is None:
        writer = token_tables.Writer(folder.with_name(name))
        try:
            for start in range(0, len(rows), ROWS):
                writer.write(table.data.table.take(pa.array(rows[start : start + ROWS])))
            writer.finish()
        except BaseException:
            writer.discard()
            raise
        part = token_tables.load(folder.with_name(name))
        assert part is not None, f"{folder.with_name(name)} was written"
    chosen = [ids[i] for i in rows]
    facts = {
        "most_tokens": limit,
        "tokens": int(counts[rows].sum()),
        "of_tokens": int(counts.sum()),
        "documents": len(set(chosen)),
        "of_documents": len(set(ids)),
        "ids": hashlib.sha256("\n".join(chosen).encode()).hexdigest()[:12],
    }
    return part.with_format("numpy"), facts
