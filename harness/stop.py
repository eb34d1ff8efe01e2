"""SIGINT and SIGTERM: an order to stop where nothing is lost; a second Ctrl-C stops at once.

A controller that is told to stop passes SIGTERM on to its worker, which a terminal has sent SIGINT
already: the two together are one order.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stop:
    """Whether the run is to stop. Raises KeyboardInterrupt at once, except within `deferred`."""

    def __init__(self) -> None:
        self.requested = False
        self._interrupts = 0
        self._deferring = False

    def listen(self) -> Stop:
        """Take over both signals of this process."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._heard)
        return self

    def _heard(self, number: int, frame: Any) -> None:
        self.requested = True
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1 or not self._deferring:
            raise KeyboardInterrupt

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note an order; whoever defers looks at `requested` where stopping is safe."""
        before, self._deferring = self._deferring, True
        try:
            yield
        finally:
            self._deferring = before

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within `deferred`, a part that may be broken off; an order noted before breaks it too."""
        before, self._deferring = self._deferring, False
        try:
            if self.requested:
                raise KeyboardInterrupt
            yield
        finally:
            self._deferring = before
