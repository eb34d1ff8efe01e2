"""The program `harness`, also `python -m harness`; its commands are in `harness.commands.cli`."""

from __future__ import annotations

import signal
import sys

listens = signal.getsignal(signal.SIGINT) is signal.default_int_handler
if listens:  # a Ctrl-C during the imports is no traceback either
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from harness.commands import cli  # noqa: E402 - after the signal's handler


def program() -> int:
    """The console script `harness`; returns the exit status."""
    return cli.main(sys.argv[1:], listens=listens)


if __name__ == "__main__":
    sys.exit(program())
