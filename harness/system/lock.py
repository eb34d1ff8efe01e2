"""Who does what: the claim on a run's directory, and the runs that share this machine.

Both are `flock`s, which the kernel gives up when their holders are gone, however they went. A claim
is held by the controller and by its worker together: either of them alone keeps others away. Ranks,
whose launcher closes what they would inherit, hold another, `.ranks`, that a claim needs free.
On a disk that nodes share, `flock` must work between them (NFS 4, Lustre mounted with `flock`).
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import reduction
from pathlib import Path
from typing import IO, Any

from harness.config.errors import ConfigError
from harness.system import scratch

CLAIM_NAME = ".claim"
RANKS_NAME = ".ranks"
log = logging.getLogger(__name__)


class Claim:
    """The exclusive right to a run's directory, until `release` or the end of all its holders."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def release(self) -> None:
        """Give the claim up in this process; a worker that inherited it keeps it."""
        os.close(self.descriptor)

    def note(self, worker: int | None = None) -> None:
        """Write down who has it: this process, and the one that it has started for the run."""
        who = {"host": socket.gethostname(), "pid": os.getpid(), "worker": worker}
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, json.dumps(who).encode(), 0)

    def __getstate__(self) -> Any:  # to a worker that is being started: the same open file
        return reduction.DupFd(self.descriptor)

    def __setstate__(self, state: Any) -> None:
        self.descriptor = state.detach()


def claim(run_dir: Path) -> Claim | None:
    """Claim `run_dir`, which must exist; None if another process has it (`holder` names it)."""
    if (mine := _claim(run_dir)) is None:
        time.sleep(0.1)  # it may have been looked at, no more (`is_claimed`)
        mine = _claim(run_dir)
    return mine


def _claim(run_dir: Path) -> Claim | None:
    descriptor = os.open(run_dir / CLAIM_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if ranks_at(run_dir):
            raise BlockingIOError
        mine = Claim(descriptor)
        mine.note()
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        os.close(descriptor)
        raise
    return mine


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Wait until no other process is in here with the same file, which is made; then go in.

    The kernel lets the next one in when a process is gone, however it went.
    """
    with path.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def holder(run_dir: Path) -> str:
    """Return who claimed `run_dir` last, as in "process 123 on host"."""
    note = _noted(run_dir)
    return f"process {note['pid']} on {note['host']}" if note else "another process"


def _noted(run_dir: Path) -> dict[str, Any]:
    try:
        note = json.loads((run_dir / CLAIM_NAME).read_text())
        return note if note.keys() >= {"host", "pid", "worker"} else {}
    except (OSError, ValueError, AttributeError):
        return {}


def is_claimed(run_dir: Path) -> bool:
    """Return whether a process is working at `run_dir` at this moment."""
    return _is_locked(run_dir / CLAIM_NAME) or ranks_at(run_dir)


def worker_at(run_dir: Path) -> int | None:
    """The process that was started for the run under way in `run_dir`, if it is of this machine."""
    note = _noted(run_dir) if is_claimed(run_dir) else {}
    return note.get("worker") if note.get("host") == socket.gethostname() else None


def join(run_dir: Path) -> bool:
    """As a rank, hold `run_dir` until this process ends; False if the run is another launcher's.

    The parent of a rank is the launcher that the claim names.
    """
    stream = (run_dir / RANKS_NAME).open("w")
    fcntl.flock(stream, fcntl.LOCK_SH)
    _joined.append(stream)
    return bool(_noted(run_dir).get("worker") == os.getppid())


_joined: list[IO[str]] = []  # held open


def ranks_at(run_dir: Path, *, patience_seconds: float = 0.0) -> bool:
    """Return whether ranks hold `run_dir`, and still do after so many seconds."""
    end = time.monotonic() + patience_seconds
    while locked := _is_locked(run_dir / RANKS_NAME):
        if time.monotonic() >= end:
            break
        time.sleep(0.05)
    return locked


def _is_locked(path: Path) -> bool:
    try:
        with path.open("r+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


# ------------------------------------------------------------------- runs beside one another


_slots: list[tuple[int, IO[str]]] = []  # this process's own, held open


def slot(number: int) -> int:
    """A number below `number` that no other process of this machine has, until this one ends.

    Where all are taken it is 0.

    Raises:
        ConfigError: the folder in which they are taken is not this user's own.
    """
    for index in range(0 if _slots else number):
        try:
            stream = (scratch.machine_folder() / f"slot-{index}").open("a")
        except OSError as error:
            raise ConfigError(f"the GPUs cannot be divided among runs: {error}") from error
        if not _is_held(stream):
            _slots.append((index, stream))
            break
        stream.close()
    return _slots[0][0] if _slots else 0


def _is_held(stream: IO[str]) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


class ConcurrentRuns:
    """Counts the most runs of this user that were under way at once, from now on.

    Every run has a file that it holds locked; whoever starts writes into all of them how many there
    are now. Programs that do not share `scratch.machine_folder` do not see each other.
    """

    def __init__(self) -> None:
        self._folder = scratch.machine_folder()
        with (self._folder / "lock").open("w") as door:
            fcntl.flock(door, fcntl.LOCK_EX)
            active = []
            for path in self._folder.glob("*.run"):
                with path.open("a") as stream:
                    if _is_held(stream):
                        active.append(path)
                    else:  # of a run that is gone
                        path.unlink()
            self._most = 0
            self._path = self._folder / f"{os.getpid()}.run"
            self._stream = self._path.open("a")
            fcntl.flock(self._stream, fcntl.LOCK_EX)
            for path in [*active, self._path]:
                with path.open("a") as stream:
                    stream.write(f"{len(active)}\n")

    def most(self) -> int:
        """Return the most other runs that were there at any one time so far."""
        with suppress(OSError):
            self._most = max(int(line) for line in self._path.read_text().split())
        return self._most

    def end(self) -> None:
        """No longer count as a run that is under way; `most` stays what it was."""
        self.most()
        with suppress(OSError):
            self._path.unlink()
            self._stream.close()


def concurrent_runs() -> ConcurrentRuns | None:
    """Begin to count, or None, with a warning, where the folder for it is not to be had."""
    try:
        return ConcurrentRuns()
    except OSError as error:
        log.warning("the runs beside this one are not counted: %s", error)
        print(f"warning: the runs beside this one are not counted: {error}", file=sys.stderr)
        return None
