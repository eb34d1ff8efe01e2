"""What git-lfs leaves in place of a large file that was not fetched: three lines of text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from harness.config.errors import ConfigError

POINTER = b"version https://git-lfs.github.com/spec"


def refuse_pointers(paths: Iterable[Path]) -> None:
    """Raise ConfigError where one of the files is a git-lfs pointer."""
    for path in paths:
        if path.is_file():
            with path.open("rb") as stream:
                start = stream.read(len(POINTER))
            if start == POINTER:
                raise ConfigError(
                    f"{path} is a git-lfs pointer and not the file itself: run `git lfs pull` in "
                    f"{path.parent}"
                )
