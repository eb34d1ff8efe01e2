"""What is in the user's files, read strictly.

Nothing is guessed, cut or dropped: what cannot be read as it stands is refused with its file and
line. One rule for line ends: in every format "\\r\\n" and "\\r" in a text are read as "\\n", so
that the same text gives the same tokens. Needs the standard library only, and pyarrow for .parquet,
.arrow and .zst.
"""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from harness.config.errors import ConfigError
from harness.system import encodings, lfs
from harness.system.encodings import COMPRESSED, opened, unified
from harness.system.encodings import lines as _lines
from harness.system.files import TABLES, TEXTS, kind, walk

OF_A_FOLDER = ("dataset_infos.json", "dataset_dict.json", "dataset_info.json", "state.json")
JSON_SPACE = " \t\r\n"  # RFC 8259
ROWS = 1000  # of a table that are read at a time
CHARS = 2**16  # of a JSON array that are read at a time

Record = dict[str, Any]


# --------------------------------------------------------------------------- what is in them


def text(file: Path, encoding: str | None = None) -> str:
    """All of a text file.

    Raises:
        ConfigError: it is not text in its encoding (`harness.system.encodings`).
    """
    return "".join(encodings.chunks(file, encoding))


def checked(value: Any, where: str, name: str) -> str:
    """A field's text with its line ends unified.

    Raises:
        ConfigError: it is not a string, or holds half of a surrogate pair.
    """
    if not isinstance(value, str):
        shown = "null" if value is None else type(value).__name__
        raise ConfigError(f"{where}: {name} is {shown}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = f"\\u{ord(value[error.start]):04x}"
        raise ConfigError(f"{where}, {name}: a lone surrogate is not text ({code})") from error
    return unified(value)


def records(
    file: Path, columns: Sequence[str] | None = None, encoding: str | None = None
) -> Iterator[tuple[str, Record]]:
    """(where, record) of every record of a file that is none of TEXTS, in order.

    `where` names file and record for messages. `columns` may be all that is read of a table, and
    those that it does not have are then not in its records.

    Raises:
        ConfigError: the file is not what its name says, or a record is broken or ambiguous.
    """
    if kind(file) in TABLES:
        return _table(file, columns)
    readers = {
        ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _csv,
    }  # fmt: skip
    return readers[kind(file)](file, encoding)


def check_folder(folder: Path) -> None:
    """Read the files of a folder that another library is going to read, as far as they are known.

    Raises:
        ConfigError: as `records` and `text`.
    """
    for file in filter(Path.is_file, walk(folder)):
        lfs.refuse_pointers([file])
        if kind(file) == ".txt":
            text(file)
        elif kind(file) not in ("", *TEXTS, *TABLES) and file.name not in OF_A_FOLDER:
            for _ in records(file):
                pass


def _csv(file: Path, encoding: str | None = None) -> Iterator[tuple[str, Record]]:
    csv.field_size_limit(2**31 - 1)  # a document may be longer than the default's 128 KiB
    # A row may also end at a lone "\r", as csv and pandas have it.
    read = _lines(file, encoding)
    pieces = (piece for _, line in read for piece in io.StringIO(line, newline=""))
    tabs = kind(file) == ".tsv"
    reader = csv.reader(pieces, strict=True, delimiter="\t" if tabs else ",")
    header: list[str] | None = None
    number = 0
    while True:
        where = f"{file}, line {reader.line_num + 1}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = "a quoted field does not end" if "end of data" in str(error) else error
            form = "TSV" if tabs else "CSV"
            raise ConfigError(f"{where}: not {form} ({reason})") from error
        if not row:  # an empty line
            continue
        if header is None:
            header = row
            if twice := [name for name, count in Counter(header).items() if name and count > 1]:
                raise ConfigError(f"{where}: the header has {twice[0]!r} twice")
            continue
        number += 1
        if len(row) != len(header):
            raise ConfigError(
                f"{where}: expected {len(header)} fields as in the header, found {len(row)}; a "
                f"field with a {'tab' if tabs else 'comma'} or a line end must be quoted"
            )
        yield f"{where}, record {number}", dict(zip(header, row, strict=True))


class _RefusedError(ValueError):
    """JSON that Python reads and that is ambiguous or no JSON."""


def _members(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) < len(pairs):
        name = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise _RefusedError(f"the key {name!r} twice in an object")
    return record


def _constant(name: str) -> Any:
    raise _RefusedError(f"{name} is not JSON's")


_DECODER = json.JSONDecoder(object_pairs_hook=_members, parse_constant=_constant)


def _decoded(text: str, begin: int, where: str) -> tuple[Record, int]:
    """The object that begins at `begin`, and where it ends."""
    try:
        value, end = _DECODER.raw_decode(text, begin)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or str(error)
        reason = "nested too deeply" if isinstance(error, RecursionError) else reason
        raise ConfigError(f"{where}: not JSON ({reason})") from error
    if not isinstance(value, dict):
        excerpt = text[begin : begin + 40]
        raise ConfigError(f"{where}: expected a JSON object, found {excerpt!r}")
    return value, end


def _json_lines(file: Path, encoding: str | None = None) -> Iterator[tuple[str, Record]]:
    for number, line in _lines(file, encoding):
        if record := line.strip(JSON_SPACE):
            where = f"{file}, line {number}"
            value, end = _decoded(record, 0, where)
            if end < len(record):
                raise ConfigError(
                    f"{where}: not JSON (more after the object: {record[end:][:40]!r})"
                )
            yield where, value


def _json(file: Path, encoding: str | None = None) -> Iterator[tuple[str, Record]]:
    """Records of one array, or of lines where the file does not begin with `[`."""
    array = _Array(line for _, line in _lines(file, encoding))
    if array.next() != "[":
        yield from _json_lines(file, encoding)
        return
    array.position += 1
    number = 0
    while array.next() != "]" or number:  # or else it is empty
        number += 1
        where = f"{file}, record {number}"
        yield where, array.record(where)
        if array.next() == "]":
            break
        if array.next() != ",":
            raise ConfigError(f"{where}: not JSON (expected , or ] after it)")
        array.position += 1
    array.position += 1
    if array.next():
        rest = array.text[array.position :].rstrip(JSON_SPACE)
        raise ConfigError(f"{file}: not JSON (more after the array: {rest[:40]!r})")


class _Array:
    """A JSON text that is read a part at a time: `text` from `position` on is still to be read."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self.text = ""
        self.position = 0

    def _more(self, chars: int) -> bool:
        """Read `chars` characters or more; whether there were any."""
        parts = [self.text[self.position :]]
        self.position, num_read = 0, 0
        while num_read < chars and (line := next(self._lines, "")):
            parts.append(line)
            num_read += len(line)
        self.text = "".join(parts)
        return num_read > 0

    def next(self) -> str:
        """Return the next character that is no white space, or "" at the end."""
        while True:
            while self.position < len(self.text):
                if self.text[self.position] not in JSON_SPACE:
                    return self.text[self.position]
                self.position += 1
            if not self._more(CHARS):
                return ""

    def record(self, where: str) -> Record:
        """Read the JSON object that comes next, up to the brace that closes it."""
        self.next()
        while True:
            try:
                value, end = _decoded(self.text, self.position, where)
            except ConfigError:  # it may end in what is not read yet
                if not self._more(max(CHARS, len(self.text) - self.position)):
                    raise
                continue
            self.position = end
            return value


def _table(file: Path, columns: Sequence[str] | None) -> Iterator[tuple[str, Record]]:
    """Records of a .parquet file, or of an .arrow file: Arrow's IPC format, file or stream."""
    import pyarrow as pa

    number = 0
    what = kind(file)[1:]
    try:
        with _seekable(file) as stream:
            for batch in _batches(file, stream, columns):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{file}, record {number}", record
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}, record {number + 1} or after: not UTF-8 text") from error
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"data.path: {file} is not a {what} file ({error})") from error


def _batches(file: Path, stream: BinaryIO, columns: Sequence[str] | None) -> Iterator[Any]:
    """Record batches of at most ROWS rows, of `columns` where the table has any of them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def wanted(existing: list[str]) -> list[str]:
        if twice := [name for name, count in Counter(existing).items() if count > 1]:
            raise ConfigError(f"{file}: two columns are called {twice[0]!r}")
        # Without a column that is asked for, its records say what there is instead.
        return [name for name in existing if columns is None or name in columns] or existing

    if kind(file) == ".parquet":
        with pq.ParquetFile(stream) as source:
            names = wanted(source.schema_arrow.names)
            yield from source.iter_batches(ROWS, columns=names)
        return
    is_file = stream.read(6) == b"ARROW1"
    stream.seek(0)
    if is_file:
        reader = pa.ipc.open_file(stream)
        coming = (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        reader = coming = pa.ipc.open_stream(stream)
    names = wanted(reader.schema.names)
    for batch in coming:
        for start in range(0, batch.num_rows, ROWS):
            yield batch.select(names).slice(start, ROWS)


@contextmanager
def _seekable(file: Path) -> Iterator[BinaryIO]:
    """The bytes of a file; of a compressed one, unpacked into a temporary file."""
    with opened(file) as stream:
        if file.suffix.lower() not in COMPRESSED:
            yield stream
            return
        with tempfile.TemporaryFile() as unpacked:
            while chunk := stream.read(2**20):
                unpacked.write(chunk)
            unpacked.seek(0)
            yield unpacked
