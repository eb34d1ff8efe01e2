"""What every command has of the terminal: its exit status, its errors, and what it is doing."""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TypeVar

from harness.config.errors import ConfigError

T = TypeVar("T")


def reason(error: OSError) -> str:
    """What the system says of an error, or, of one that a library has made, its message."""
    return error.strerror or str(error) or type(error).__name__


def ended(main: Callable[[], int]) -> int:
    """Call a command's main function; returns its exit status.

    2 for a mistake in what was asked for (ConfigError) and for a file that cannot be read or
    written, each with a line on standard error; 130 for Ctrl-C; 1 where whoever read the output
    has closed it, as `head` does.
    """
    try:
        try:
            return main()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{reason(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def command(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """Decorate a command's main function: every command ends as `ended` says."""

    @functools.wraps(main)
    def wrapped(arguments: list[str]) -> int:
        return ended(lambda: main(arguments))

    return wrapped


def tracked(items: Sequence[T], what: str) -> Iterable[T]:
    """Yield the items with a bar on standard error, where that is a terminal; it vanishes after."""
    from rich.console import Console  # rich takes a while to import
    from rich.progress import track

    console, shown = Console(stderr=True), sys.stderr.isatty()
    return track(items, what, console=console, transient=True, disable=not shown)


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Say on standard error what is being done, where that is a terminal, until it is done."""
    from rich.console import Console

    with Console(stderr=True).status(f"{what} …") if sys.stderr.isatty() else nullcontext():
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Keep from the terminal what libraries say of a model that they load, for a while."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def quiet_command(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """Decorate a command that loads models: as `command` does, and `quiet`."""

    @functools.wraps(main)
    def wrapped(arguments: list[str]) -> int:
        with quiet():
            return ended(lambda: main(arguments))

    return wrapped
