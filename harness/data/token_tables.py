"""Tables of tokens on disk: written a batch at a time, mapped into memory, whole or not there.

A table is a folder of `data.cache_dir`/tokens, named by what is in it: an Arrow stream, and beside
it its size, by which a table that was cut off is noticed.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray

from harness.config.errors import ConfigError
from harness.system.console import reason

IGNORE = -100  # a target that is not predicted

TABLE, SIZE, UNSORTED = "table.arrow", "table.json", "unsorted.arrow"
SCRATCH = ".writing-"
LEFT_SECONDS = 86_400.0
ROWS = 1000  # of a table that is put into another order, at a time
log = logging.getLogger(__name__)


class Writer:
    """A table that is being written: `folder` is there after `finish`, and only then."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            _clear(folder.parent)
            self.scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=SCRATCH))
        except OSError as error:
            raise ConfigError(
                f"data.cache_dir: cannot write {folder.parent} ({reason(error)})"
            ) from error
        self._writer: pa.RecordBatchStreamWriter | None = None
        self._rows = 0

    def write(self, table: pa.Table) -> None:
        """Add rows; the first ones say what the columns are."""
        if self._writer is None:
            self._writer = pa.ipc.new_stream(str(self.scratch / TABLE), table.schema)
        self._writer.write_table(table)
        self._rows += table.num_rows

    def finish(
        self, ranks: NDArray[np.int64] | None = None, facts: dict[str, Any] | None = None
    ) -> None:
        """Make it whole; with `ranks`, row i goes to place ranks[i]. `facts_of` gives `facts`."""
        assert self._writer is not None, "a table without a row"
        self._writer.close()
        file = self.scratch / TABLE
        if ranks is not None and (ranks[1:] < ranks[:-1]).any():
            unsorted = file.rename(self.scratch / UNSORTED)
            with pa.memory_map(str(unsorted)) as source:
                rows = pa.ipc.open_stream(source).read_all()
                order = np.argsort(ranks)
                with pa.ipc.new_stream(str(file), rows.schema) as writer:
                    for start in range(0, len(order), ROWS):
                        writer.write_table(rows.take(pa.array(order[start : start + ROWS])))
            unsorted.unlink()
        size = {"bytes": file.stat().st_size, "rows": self._rows} | (
            {"facts": facts} if facts else {}
        )
        (self.scratch / SIZE).write_text(json.dumps(size))
        try:
            self.scratch.rename(self.folder)
        except OSError:
            self.discard()
            if not self.folder.exists():  # not another process that was first
                raise

    def discard(self) -> None:
        """Delete what has been written so far, so that nothing half-made is left behind."""
        shutil.rmtree(self.scratch, ignore_errors=True)


def _clear(folder: Path) -> None:
    """Remove what killed runs have left half-written, once nobody has written to it for a day."""
    for scratch in folder.glob(f"{SCRATCH}*"):
        with suppress(OSError):
            newest = max(file.stat().st_mtime for file in (scratch, *scratch.iterdir()))
            if time.time() - newest > LEFT_SECONDS:
                shutil.rmtree(scratch, ignore_errors=True)


def load(folder: Path) -> Dataset | None:
    """The table in `folder`; None where there is none, and a damaged one is cleared away."""
    if not folder.exists():
        return None
    try:
        size = json.loads((folder / SIZE).read_text())
        if size["bytes"] != (folder / TABLE).stat().st_size:
            raise ValueError(f"{folder / TABLE} does not have its {size['bytes']} bytes")
        table = Dataset.from_file(str(folder / TABLE))
        if len(table) != size["rows"]:
            raise ValueError(f"{folder / TABLE} does not have its {size['rows']} rows")
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        log.warning("the cached tokens in %s are damaged and made again: %s", folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return table


def facts_of(folder: Path) -> dict[str, Any]:
    """Return what was found out and written down when the table in `folder` was made."""
    return dict(json.loads((folder / SIZE).read_text()).get("facts", {}))


def name_of(table: Dataset) -> str:
    """Return the name of a table's folder: a digest of all that its content depends on."""
    return Path(table.cache_files[0]["filename"]).parent.name


def batches(table: Dataset) -> Iterator[pa.RecordBatch]:
    """A table's rows, read from its file a batch at a time: no more of it is in memory."""
    with (
        pa.OSFile(str(table.cache_files[0]["filename"])) as source,
        pa.ipc.open_stream(source) as reader,
    ):
        yield from reader
