"""Write a file whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def scratch_prefix(name: str) -> str:
    """Return how the names of files begin that a kill while `name` was written has left behind."""
    return f".{name}-"


def write_atomically(path: Path, content: str | Callable[[str], object]) -> None:
    """Write a text, or what `content` puts into the file it is given the name of, to `path`.

    It is written beside `path`, flushed to the disk and renamed.
    """
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=scratch_prefix(path.name))
    os.close(handle)
    try:
        if isinstance(content, str):
            Path(scratch).write_text(content, "utf-8", newline="")
        else:
            content(scratch)
        with open(scratch, "rb") as stream:
            os.fsync(stream.fileno())
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
