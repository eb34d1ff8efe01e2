"""SIGINT and SIGTERM: an order to stop where nothing is lost; a second Ctrl-C stops at once.

A controller that is told to stop passes SIGTERM on to its worker, which a terminal has sent SIGINT
already: the two together are one order.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def forward_signals(workers: Callable[[], set[int]]) -> Iterator[None]:
    """Within, an order goes to the processes of `workers` first, which have time to end.

    Then, or at a second order, it raises KeyboardInterrupt: whoever keeps those processes may kill
    them at that. Outside the main thread, which signals go to, nothing changes.
    """
    signalled: set[int] | None = None

    def heard(number: int, frame: Any) -> None:
        nonlocal signalled
        if signalled is None:
            signalled = workers()
            for pid in signalled:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            while workers() & signalled:
                time.sleep(0.1)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, heard) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stop:
    """Whether the run is to stop.

    It only notes the order, except within `interruptible`, where it raises KeyboardInterrupt, once;
    a second Ctrl-C raises it anywhere.
    """

    def __init__(self) -> None:
        self.requested = False
        self._raised = False
        self._interrupts = 0
        self._deferring = True

    def listen(self) -> Stop:
        """Take over both signals of this process, and let through what was held back so far."""
        for number in SIGNALS:
            signal.signal(number, self._handle_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def ignore(self) -> None:
        """Ignore further signals: what is left to do is short and must be done."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _handle_signal(self, number: int, frame: Any) -> None:
        self.requested = True
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1 or not (self._deferring or self._raised):
            self._raised = True
            raise KeyboardInterrupt

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A part of `interruptible` that looks at `requested` itself, where stopping is safe."""
        before, self._deferring = self._deferring, True
        try:
            yield
        finally:
            self._deferring = before

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A part that may be broken off anywhere; an order noted before breaks it off too."""
        before, self._deferring = self._deferring, False
        try:
            if self.requested and not self._raised:
                self._raised = True
                raise KeyboardInterrupt
            yield
        finally:
            self._deferring = before
