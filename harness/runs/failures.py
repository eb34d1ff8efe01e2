"""What goes wrong in a run: its class in result.json, what is noted and gone on from, warnings."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from harness.evaluation import ranks
from harness.results import run_record
from harness.system import machine
from harness.training import loop

log = logging.getLogger("harness")


def warn(warning: str) -> None:
    """Tell the user, on standard error and in the log."""
    log.warning(warning)
    print(f"warning: {warning}", file=sys.stderr)


def failure_class(error: Exception) -> str:
    """oom | nan | disk | killed (another rank) | error, for result.json."""
    if isinstance(error, loop.NonFiniteLossError):
        return "nan"
    if machine.out_of_memory(error):
        return "oom"
    if isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error):
        return "killed"
    words = ("No space left on device", "os error 28", "Disk quota exceeded")
    if getattr(error, "errno", None) in run_record.DISK_ERRORS:
        return "disk"
    if any(word in str(error) for word in words):
        return "disk"
    return "error"


@contextmanager
def kept_result(result: dict[str, Any], what: str) -> Iterator[None]:
    """Note a failure after the test set was read in `result["problems"]`, and go on.

    A full disk still fails the run, which a retry resumes: nothing more could be written. So does
    what one rank alone has, of a model that is divided (`ranks.together`).
    """
    try:
        yield
    except ranks.RanksApartError:
        raise
    except Exception as error:
        if failure_class(error) == "disk":
            raise
        message = f"{what} ({type(error).__name__}: {error})"
        log.exception(what)
        if os.environ.get("RANK", "0") == "0":
            print(f"warning: {message}", file=sys.stderr)
        result.setdefault("problems", []).append(message)
