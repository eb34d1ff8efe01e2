"""SHA-256 of files and folders; a large file that has not changed is not read twice.

A file is known by its real path, device, inode, size and times of change. The time that the system
sets itself (ctime) is one of them, so that a copy that keeps the old modification time is noticed.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from harness.config.errors import ConfigError

# A file may change twice within one tick of a file system's clock: its digest is kept only when the
# file has been left alone for so long.
SETTLED_SECONDS = 2.0
LARGE_BYTES = 2**22  # from here on a digest is also kept on disk
_known: dict[tuple[object, ...], str] = {}


def of_file(file: Path, cache_dir: str) -> str:
    """The SHA-256 of a file's content; that of a large file is kept in `cache_dir`.

    Raises:
        ConfigError: the file cannot be read, or is written to all the time.
    """
    try:
        return _of_file(file.resolve(), Path(cache_dir) / "digests")
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror})") from error


def of_files(named: Iterable[tuple[str, Path]], cache_dir: str) -> str:
    """The SHA-256 of the names and contents of files, in their order.

    Raises:
        ConfigError: one of them cannot be read.
    """
    pairs = list(named)
    stamps, newest, size = _stamps(pairs)
    folder = Path(cache_dir) / "digests"
    kept = folder / hashlib.sha256(repr(stamps).encode(errors="replace")).hexdigest()[:32]
    if stamps and size >= LARGE_BYTES and (sha256 := _read(kept)):
        return sha256
    began = time.time()
    digest = hashlib.sha256()
    for name, file in pairs:
        digest.update(f"{name}\0{of_file(file, cache_dir)}\n".encode(errors="surrogateescape"))
    sha256 = digest.hexdigest()
    settled = size >= LARGE_BYTES and began - newest > SETTLED_SECONDS
    if stamps and settled and _stamps(pairs)[0] == stamps:
        _keep(kept, sha256)
    return sha256


def _stamps(named: list[tuple[str, Path]]) -> tuple[list[tuple[object, ...]], float, int]:
    """What tells several files as they are now, when the last one changed, and their bytes."""
    stamps: list[tuple[object, ...]] = []
    newest, size = 0.0, 0
    try:
        for name, file in named:
            path = file.resolve()
            status = path.stat()
            stamps.append((name, *_stamp(path, status)))
            newest = max(newest, status.st_mtime, status.st_ctime)
            size += status.st_size
    except OSError:  # which reading it says
        return [], 0.0, 0
    return stamps, newest, size


def _of_file(path: Path, folder: Path) -> str:
    for _ in range(3):
        status = path.stat()
        stamp = _stamp(path, status)
        kept = folder / hashlib.sha256(repr(stamp).encode()).hexdigest()[:32]
        large = status.st_size >= LARGE_BYTES
        if stamp in _known:
            return _known[stamp]
        if large and (sha256 := _read(kept)):
            return _known.setdefault(stamp, sha256)
        began = time.time()
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while part := stream.read(2**20):
                digest.update(part)
        if _stamp(path, path.stat()) != stamp:
            continue  # written to meanwhile
        sha256 = digest.hexdigest()
        if began - max(status.st_mtime, status.st_ctime) > SETTLED_SECONDS:
            _known[stamp] = sha256
            if large:
                _keep(kept, sha256)
        return sha256
    raise ConfigError(f"{path} is being written to: wait until it is whole")


def _stamp(path: Path, s: os.stat_result) -> tuple[object, ...]:
    return str(path), s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns


def _read(kept: Path) -> str | None:
    """A digest that was kept whole."""
    with suppress(OSError, UnicodeDecodeError):
        if re.fullmatch(r"[0-9a-f]{64}", text := kept.read_text("ascii")):
            return text
    return None


def _keep(path: Path, digest: str) -> None:
    """Keep a digest, whole or not at all; a folder that cannot be written keeps none."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
        with os.fdopen(handle, "w") as stream:
            stream.write(digest)
        os.replace(scratch, path)
