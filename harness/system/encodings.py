"""The bytes of a text file as text: what it is compressed with, and its encoding.

Text is UTF-8, or what a byte-order mark says (UTF-8, UTF-16 or UTF-32), or what `data.encoding`
says. Nothing else is guessed: other bytes are refused, with the encoding that they look like.
"""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from harness.config.errors import ConfigError

COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
MARKS = (  # the longer first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
CHUNK_BYTES = 2**16
SAMPLE_BYTES = 2**15  # that a guess at an encoding looks at


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed; a failure to read them is a ConfigError."""
    end = file.suffix.lower()
    broken: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    try:
        if end == ".gz":
            with gzip.open(file, "rb") as unpacked:
                yield unpacked  # type: ignore[misc]  # a BufferedIOBase, which reads as well
        elif end == ".zst":
            import pyarrow as pa

            with pa.input_stream(str(file), compression="zstd") as source:
                yield io.BufferedReader(source)
        elif end == ".xz":
            import lzma

            broken = (*broken, lzma.LZMAError)
            with lzma.open(file, "rb") as unpacked:
                yield unpacked  # type: ignore[misc]
        elif end == ".bz2":
            import bz2

            with bz2.open(file, "rb") as unpacked:
                yield unpacked  # type: ignore[misc]
        else:
            with file.open("rb") as stream:
                yield stream
    except ImportError as error:
        raise ConfigError(
            f"data.path: {file}: this Python was built without {error.name}"
        ) from error
    except broken as error:
        raise ConfigError(f"data.path: {file} cannot be read ({error})") from error


def marked(beginning: bytes) -> str | None:
    """The encoding that a byte-order mark at the beginning of a file says; None without one."""
    return next((name for mark, name in MARKS if beginning.startswith(mark)), None)


def check_name(encoding: str) -> None:
    """Raise ConfigError unless Python knows the text encoding `encoding`."""
    try:
        known = codecs.lookup(encoding)._is_text_encoding
    except (LookupError, ValueError):  # a NUL in the name
        known = False
    if not known:
        raise ConfigError(
            f"data.encoding={encoding}: no such encoding; expected one that Python knows, such as "
            "utf-8, utf-16, utf-16-le, cp1252, latin-1, shift_jis or gb18030"
        )


def of_file(file: Path, encoding: str | None) -> str:
    """The encoding of a file: its byte-order mark's, else `encoding`, else UTF-8."""
    with opened(file) as stream:
        mark = marked(stream.read(4))
    return mark or codecs.lookup(encoding or "utf-8").name


def lines(file: Path, encoding: str | None = None) -> Iterator[tuple[int, str]]:
    r"""(number, line) of a text file. Lines end at "\n" and nothing else.

    A byte-order mark at the beginning is not text.

    Raises:
        ConfigError: the file is not text in its encoding, or holds a NUL.
    """
    name = of_file(file, encoding)
    number = 0
    for number, line in enumerate(_lines(file, name), 1):
        if "\0" in line:
            raise ConfigError(f"{file}, line {number}: a NUL byte; the file is not text")
        yield number, line.removeprefix("\ufeff") if number == 1 else line


def _lines(file: Path, name: str) -> Iterator[str]:
    if name != "utf-8":  # whose line ends need not be one byte
        yield from _split(_decoded(file, name))
        return
    offset = 0
    with opened(file) as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                rest = line[error.start :] + stream.read(SAMPLE_BYTES)
                raise _refused(f"{file}, line {number}", name, error, offset, line + rest) from None
            offset += len(line)


def _split(pieces: Iterator[str]) -> Iterator[str]:
    """Lines of a text that comes in pieces."""
    rest: list[str] = []
    for piece in pieces:
        first, *others = piece.split("\n")
        rest.append(first)
        for other in others:
            yield "".join(rest) + "\n"
            rest = [other]
    if last := "".join(rest):
        yield last


def chunks(file: Path, encoding: str | None = None) -> Iterator[str]:
    r"""A text file in pieces, however long its lines are; with "\n" for "\r\n" and "\r".

    Raises:
        ConfigError: the file is not text in its encoding, or holds a NUL.
    """
    pending, line = "", 1
    for number, piece in enumerate(_decoded(file, of_file(file, encoding))):
        if (position := piece.find("\0")) >= 0:
            line += piece.count("\n", 0, position)
            raise ConfigError(f"{file}, line {line}: a NUL byte; the file is not text")
        line += piece.count("\n")
        text = pending + (piece if number else piece.removeprefix("\ufeff"))
        pending = "\r" if text.endswith("\r") else ""  # whose "\n" may be the next piece's first
        yield unified(text.removesuffix("\r"))
    if pending:
        yield "\n"


def unified(text: str) -> str:
    r"""`text` with "\n" for "\r\n" and "\r", as Python reads text files."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _decoded(file: Path, name: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(name)("strict")
    offset, line = 0, 1
    with opened(file) as stream:
        while True:
            chunk = stream.read(CHUNK_BYTES)
            waiting = len(decoder.getstate()[0])  # the beginning of a character
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                before = error.object[: error.start].decode(name, "ignore")
                where = f"{file}, line {line + before.count(chr(10))}"
                raise _refused(where, name, error, offset - waiting, error.object) from None
            offset += len(chunk)
            line += text.count("\n")
            if text:
                yield text
            if not chunk:
                return


def _refused(
    where: str, name: str, error: UnicodeDecodeError, offset: int, sample: bytes
) -> ConfigError:
    """What is said of bytes that are no text; they come after `offset` bytes of the file."""
    shown = {"utf-8": "UTF-8", "utf-16": "UTF-16", "utf-32": "UTF-32"}.get(name, name)
    position = offset + error.start
    message = (
        f"{where}: not {shown} text (byte 0x{error.object[error.start]:02x} at offset {position:,}"
    )
    message += f": {error.reason})"
    guess = likely(sample[-SAMPLE_BYTES:] if len(sample) > SAMPLE_BYTES else sample)
    if codecs.lookup(guess).name != name:
        message += f"; it looks like {guess}: if it is, set data.encoding={guess}"
    return ConfigError(message)


def likely(sample: bytes) -> str:
    """The name of an encoding that bytes which are not UTF-8 look like; a guess for a message."""
    nuls = [sample[start::2].count(0) for start in (0, 1)]
    if sum(nuls) > len(sample) / 8:
        return "utf-16-be" if nuls[0] > nuls[1] else "utf-16-le"
    high = sum(byte >= 0x80 for byte in sample)
    if high > len(sample) / 4:  # mostly letters that are not Latin
        try:
            from charset_normalizer import from_bytes  # where `requests` has brought it along
        except ImportError:
            pass
        else:
            best = from_bytes(sample).best()
            if best is not None and best.encoding not in ("utf_8", "ascii"):
                return str(best.encoding)
    undefined = any(byte in (0x81, 0x8D, 0x8F, 0x90, 0x9D) for byte in sample)
    return "latin-1" if undefined else "cp1252"
