"""The user's files: which there are, and what is in them, read strictly.

Nothing is guessed, cut or dropped: what cannot be read as it stands is refused with its file and
line. One rule for line ends: in every format "\\r\\n" and "\\r" in a text are read as "\\n", so
that the same text gives the same tokens. Needs the standard library only, and pyarrow for .parquet
and .zst.
"""

from __future__ import annotations

import csv
import difflib
import glob
import gzip
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from harness import lfs
from harness.config import ConfigError

KINDS = (".txt", ".jsonl", ".json", ".csv", ".parquet")
COMPRESSED = (".gz", ".zst")  # of any of these but .parquet
KNOWN = f"{', '.join(KINDS)} (also with {' or '.join(COMPRESSED)})"
OF_A_FOLDER = ("dataset_infos.json", "dataset_dict.json", "dataset_info.json", "state.json")
JSON_SPACE = " \t\r\n"  # RFC 8259

Record = dict[str, Any]


def kind(file: Path) -> str:
    """The one of KINDS that a file's name says, in any case and compressed or not; "" for none."""
    name = file.name.lower()
    for end in COMPRESSED:
        if name.endswith(end):
            found = Path(name.removesuffix(end)).suffix
            return found if found in KINDS and found != ".parquet" else ""
    return Path(name).suffix if Path(name).suffix in KINDS else ""


def stem(file: Path) -> str:
    """The name of a file without the ends that say its kind, in lower case."""
    name = file.name.lower()
    for end in COMPRESSED:
        name = name.removesuffix(end)
    return name.removesuffix(kind(file))


# --------------------------------------------------------------------------- which files


def find_files(path: str | None) -> list[Path]:
    """Files that `path` (a file, a folder or a glob) names, sorted, each real file once.

    Of a folder, those of KINDS, in linked folders too; `left_out` has the others.

    Raises:
        ConfigError: there is none, or one is empty, binary, of another kind or cannot be read.
    """
    if not path:
        raise ConfigError("data=text_files needs data.path: a file, a folder or a glob")
    root = Path(path).expanduser()
    if root.is_file():
        files = [root]
    elif root.is_dir():
        files = [file for file in _walk(root) if kind(file) and file.is_file()]
        if not files:
            raise ConfigError(f"data.path={path}: no {KNOWN} files in this folder")
    else:
        files = _once(Path(f) for f in sorted(glob.glob(str(root), recursive=True)))
        files = sorted(file for file in files if file.is_file())
        if not files:
            beside = [f.name for f in root.parent.glob("*")] if root.parent.is_dir() else []
            close = difflib.get_close_matches(root.name, beside, n=1)
            hint = f"; did you mean '{root.parent / close[0]}'?" if close else ""
            raise ConfigError(f"data.path={path}: no such file or folder{hint}")
    for file in files:
        if not kind(file):
            raise ConfigError(f"data.path: {file} is not one of {KNOWN}")
        if not os.access(file, os.R_OK):
            raise ConfigError(f"data.path: {file} cannot be read (permission)")
        lfs.refuse_pointers([file])
        with _opened(file) as stream:
            beginning = stream.read(8192)
        if not beginning:
            raise ConfigError(f"data.path: {file} is empty")
        if kind(file) != ".parquet" and b"\0" in beginning:
            utf16 = beginning[:2] in (b"\xff\xfe", b"\xfe\xff")
            what = "UTF-16; save it as UTF-8" if utf16 else "binary, not text"
            raise ConfigError(f"data.path: {file} is {what}")
    return files


def left_out(path: str | None) -> list[Path]:
    """The files of the folder `path` that `find_files` does not read; hidden ones do not count."""
    root = Path(path or "").expanduser()
    if not path or not root.is_dir():
        return []
    return [file for file in _walk(root) if not (kind(file) and file.is_file())]


def names(files: Sequence[Path], path: str | None) -> list[str]:
    """What documents are called by: each file's place below the folder that all are in.

    It is that of the real file, or of the link where the real file is outside of `path`: it does
    not depend on where the folder is, or on how `path` is spelled.
    """
    root = Path(path or "").expanduser()
    places = []
    for file in files:
        place = file.resolve()
        if root.is_dir() and not place.is_relative_to(root.resolve()):
            place = root.resolve() / file.relative_to(root)
        places.append(place)
    top = Path(os.path.commonpath([place.parent for place in places]))
    return [place.relative_to(top).as_posix() for place in places]


def _walk(root: Path) -> list[Path]:
    """All files in a folder and in the folders that are linked in it, sorted, each real one once.

    What is hidden, such as a cache, is no text of the folder.

    Raises:
        ConfigError: a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise ConfigError(f"data.path: {error.filename} cannot be read ({error.strerror})")

    found: list[Path] = []
    links: list[Path] = []
    walked: set[str] = set()
    waiting = [root]
    while waiting:  # a folder's own files first, then what is linked: the real name is kept
        for folder, inner, files in os.walk(waiting.pop(0), onerror=refuse):
            real = os.path.realpath(folder)
            if real in walked:
                inner.clear()
                continue
            walked.add(real)
            inner[:] = [name for name in inner if not name.startswith(".")]
            waiting += [Path(folder, name) for name in sorted(inner) if _is_link(folder, name)]
            for name in sorted(name for name in files if not name.startswith(".")):
                (links if _is_link(folder, name) else found).append(Path(folder, name))
    return sorted(_once([*found, *sorted(links)]))


def _is_link(folder: str, name: str) -> bool:
    return Path(folder, name).is_symlink()


def _once(files: Iterable[Path]) -> list[Path]:
    """Of several names of a real file, the first."""
    found: dict[str, Path] = {}
    for file in files:
        found.setdefault(os.path.realpath(file), file)
    return list(found.values())


# --------------------------------------------------------------------------- what is in them


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed; a failure to read them is a ConfigError."""
    end = file.suffix.lower()
    try:
        if end == ".gz":
            with gzip.open(file, "rb") as unpacked:
                yield unpacked  # type: ignore[misc]  # a BufferedIOBase, which reads as well
        elif end == ".zst":
            import pyarrow as pa

            with pa.input_stream(str(file), compression="zstd") as source:
                yield io.BufferedReader(source)
        else:
            with file.open("rb") as stream:
                yield stream
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"data.path: {file} cannot be read ({error})") from error


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    r"""(number, line) of a text file. Lines end at "\n" and nothing else.

    A byte-order mark at the beginning is not text.

    Raises:
        ConfigError: a line is not UTF-8, or holds a NUL.
    """
    with _opened(file) as stream:
        for number, line in enumerate(stream, 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ConfigError(
                    f"{file}, line {number}: not UTF-8 text (byte 0x{line[error.start]:02x}: "
                    f"{error.reason})"
                ) from error
            if "\0" in text:
                raise ConfigError(f"{file}, line {number}: a NUL byte; the file is not text")
            yield number, text.removeprefix("\ufeff") if number == 1 else text


def text(file: Path) -> str:
    """All of a text file.

    Raises:
        ConfigError: a line is not UTF-8 text.
    """
    return unified("".join(line for _, line in _lines(file)))


def unified(text: str) -> str:
    r"""`text` with "\n" for "\r\n" and "\r", as Python reads text files."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


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


def records(file: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[str, Record]]:
    """(where, record) of every record of a file that is no .txt, in order.

    `where` names file and record for messages. `columns` may be all that is read of a .parquet
    file, and those that it does not have are then not in its records.

    Raises:
        ConfigError: the file is not what its name says, or a record is broken or ambiguous.
    """
    readers = {".jsonl": _json_lines, ".json": _json, ".csv": _csv}
    if kind(file) == ".parquet":
        return _parquet(file, columns)
    return readers[kind(file)](file)


def check_folder(folder: Path) -> None:
    """Read the files of a folder that another library is going to read, as far as they are known.

    Raises:
        ConfigError: as `records` and `text`.
    """
    for file in filter(Path.is_file, _walk(folder)):
        lfs.refuse_pointers([file])
        if kind(file) == ".txt":
            text(file)
        elif kind(file) in (".csv", ".jsonl", ".json") and file.name not in OF_A_FOLDER:
            for _ in records(file):
                pass


def _csv(file: Path) -> Iterator[tuple[str, Record]]:
    csv.field_size_limit(2**31 - 1)  # a document may be longer than the default's 128 KiB
    # A row may also end at a lone "\r", as csv and pandas have it.
    pieces = (piece for _, line in _lines(file) for piece in io.StringIO(line, newline=""))
    reader = csv.reader(pieces, strict=True)
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
            raise ConfigError(f"{where}: not CSV ({reason})") from error
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
                "field with a comma or a line end must be quoted"
            )
        yield f"{where}, record {number}", dict(zip(header, row, strict=True))


class _RefusedError(ValueError):
    """JSON that Python reads and that is ambiguous or no JSON."""


def _members(pairs: list[tuple[str, Any]]) -> Record:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise _RefusedError(f"the key {name!r} twice in an object")
    return found


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
        found = text[begin : begin + 40]
        raise ConfigError(f"{where}: expected a JSON object, found {found!r}")
    return value, end


def _json_lines(file: Path) -> Iterator[tuple[str, Record]]:
    for number, line in _lines(file):
        if record := line.strip(JSON_SPACE):
            where = f"{file}, line {number}"
            value, end = _decoded(record, 0, where)
            if end < len(record):
                raise ConfigError(
                    f"{where}: not JSON (more after the object: {record[end:][:40]!r})"
                )
            yield where, value


def _json(file: Path) -> Iterator[tuple[str, Record]]:
    """Records of one array, or of lines where the file does not begin with `[`."""
    whole = "".join(line for _, line in _lines(file))
    position = _past_space(whole, 0)
    if whole[position : position + 1] != "[":
        yield from _json_lines(file)
        return
    position = _past_space(whole, position + 1)
    number = 0
    while number or whole[position : position + 1] != "]":  # or else it is empty
        number += 1
        where = f"{file}, record {number}"
        value, position = _decoded(whole, position, where)
        yield where, value
        position = _past_space(whole, position)
        if whole[position : position + 1] == "]":
            break
        if whole[position : position + 1] != ",":
            raise ConfigError(f"{where}: not JSON (expected , or ] after it)")
        position = _past_space(whole, position + 1)
    if rest := whole[position + 1 :].strip(JSON_SPACE):
        raise ConfigError(f"{file}: not JSON (more after the array: {rest[:40]!r})")


def _past_space(text: str, position: int) -> int:
    while text[position : position + 1] and text[position] in JSON_SPACE:
        position += 1
    return position


def _parquet(file: Path, columns: Sequence[str] | None) -> Iterator[tuple[str, Record]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as source:
            there = source.schema_arrow.names
            if twice := [name for name, count in Counter(there).items() if count > 1]:
                raise ConfigError(f"{file}: two columns are called {twice[0]!r}")
            wanted = [name for name in there if columns is None or name in columns]
            number = 0
            # Without a column that is asked for, its records say what there is instead.
            for batch in source.iter_batches(columns=wanted or there):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{file}, record {number}", record
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}, record {number + 1} or after: not UTF-8 text") from error
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"data.path: {file} is not a parquet file ({error})") from error
