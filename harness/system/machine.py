"""What the machine gives a process: cores, signals of the kernel, and memory that has run out."""

from __future__ import annotations

import ctypes
import os
import re
import signal
from contextlib import suppress
from pathlib import Path


def usable_cores() -> int:
    """Cores that this process may use, which taskset and containers limit."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Have the kernel send this process a signal when its parent is gone (Linux only)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG


def oom_kills() -> int:
    """Processes that the kernel has killed for memory so far, in this control group or at all."""
    group = Path("/sys/fs/cgroup/memory.events")
    for path in (group, Path("/proc/vmstat")):
        with suppress(OSError):
            if match := re.search(r"^oom_kill (\d+)", path.read_text(), re.MULTILINE):
                return int(match[1])
    return 0


def out_of_memory(error: Exception) -> bool:
    """Return whether an allocation failed, on a GPU or in the host's memory."""
    import torch  # which whoever has such an error has imported

    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        word in str(error) for word in words
    )
