"""What is done about a run's directory: a pure function of what is in it and what was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from harness.results.run_record import RETRYABLE


class Decision(Enum):
    """Lists what the launcher can do about a run."""

    START = "start it from the beginning"
    RESUME = "go on from its checkpoint"
    SKIP = "leave it: it is finished"
    LEAVE = "leave it: it failed, and its record says why; or it has come to its pause"
    REFUSE_FILES = "refuse: files, and no record"
    REFUSE_FINISHED = "refuse: a finished run of another configuration"
    REFUSE_UNFINISHED = "refuse: the checkpoint of another configuration's run"


@dataclass(frozen=True)
class Found:
    """Describes what a run's directory holds before anything is done."""

    # of result.json: finished, failed, interrupted, running, paused; None: there is none
    status: str | None = None
    same: bool = False  # whether it is of this configuration
    failure_class: str | None = None
    can_resume: bool = False  # whether there is a checkpoint
    ended: float = 0.0  # seconds since 1970, of the record
    paused_at: int | None = None  # optimizer step
    other_files: bool = False  # whether there are files that no run of ours leaves first


@dataclass(frozen=True)
class Request:
    """Describes what was asked for: a rerun, further attempts, a sweep, a pause."""

    rerun: bool = False  # replace whatever is there
    retry: int = 0  # further attempts; in a sweep also at what failed before
    sweep: bool = False
    since: float | None = None  # seconds since 1970: when the sweep began
    pause_at: int | None = None  # optimizer step after which to stop; None: at the end


def decide(previous: Found, request: Request) -> Decision:
    """Return what is done about a run.

    Another controller of the same sweep may have done it, or tried, since the sweep began: that
    counts before anything else. A finished run is skipped, a cut one resumed, and of another
    configuration neither is replaced unless `rerun` says so. A paused run goes on, unless it is to
    pause where it is, or before. In a sweep what failed by itself stays
    as it is, unless `retry` is above 0 or the failure is of RETRYABLE.
    """
    if request.since is not None and previous.same and previous.ended > request.since:
        if previous.status == "finished":
            return Decision.SKIP
        if previous.status == "failed":
            return Decision.LEAVE
    if request.rerun:
        return Decision.START
    if previous.status is None:
        return Decision.REFUSE_FILES if previous.other_files else Decision.START
    if previous.status == "finished":
        return Decision.SKIP if previous.same else Decision.REFUSE_FINISHED
    if previous.can_resume and not previous.same:
        return Decision.REFUSE_UNFINISHED
    pause_at = request.pause_at
    paused_at = previous.paused_at if previous.status == "paused" else None
    if previous.same and pause_at is not None and paused_at is not None and paused_at >= pause_at:
        return Decision.LEAVE
    by_itself = previous.status == "failed" and previous.failure_class not in RETRYABLE
    if by_itself and previous.same and request.sweep and not request.retry:
        return Decision.LEAVE
    return Decision.RESUME if previous.can_resume else Decision.START
