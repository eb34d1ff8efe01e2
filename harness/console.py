"""How the commands end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def reason(error: OSError) -> str:
    """What the system says of an error, or, of one that a library has made, its message."""
    return error.strerror or str(error) or type(error).__name__


def ended(main: Callable[[], int]) -> int:
    """The exit status of a command; 1 where whoever read its output has gone, as `head` does."""
    try:
        try:
            return main()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
