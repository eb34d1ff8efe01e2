"""One worker of a run from its start to its end, and what is written down where it cannot."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from harness.config.run_config import RunConfig
from harness.results import run_record
from harness.results.record_types import Failure, Record
from harness.runs import worker_process
from harness.runs.outcomes import Outcome, of_record
from harness.system import lock, machine
from harness.system.console import reason

KILLED_FOR_MEMORY = "the worker was killed by the system, which was out of memory"


def attempt(run: RunConfig, claim: lock.Claim, *, quiet: bool) -> Outcome:
    """Start a worker and wait for its end.

    Raises:
        KeyboardInterrupt: told to stop; the worker has stopped.
    """
    run_dir = run.run_dir
    kills = machine.oom_kills()
    ranks = run.launch.num_processes > 1
    by_hand = os.environ.get("WORLD_SIZE", "1") != "1"  # we are a rank of an accelerate launch
    try:
        if by_hand:
            from harness.runs import worker

            code = worker.main(run_dir)
        elif ranks:
            code = worker_process.wait_for(*worker_process.accelerate(run, claim))
        else:
            code = worker_process.wait_for(*worker_process.fork(run, claim, quiet))
    except KeyboardInterrupt:
        record = run_record.read(run_dir) or {}
        if record.get("status") == "running":  # stopped at once, or before it had begun
            record_failure(run_dir, record, "interrupted", run_record.INTERRUPTED)
        raise
    record = run_record.read(run_dir) or Record(status="running")
    failure: Mapping[str, Any] = record.get("failure") or {}
    # Ranks end one another: who says no more than that may not know why.
    silent = failure.get("class") in ("killed", "interrupted") and (ranks or by_hand)
    if record["status"] == "running" or silent:
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"gone, exit status {code}"
        gone = {
            "class": "killed" if code < 0 or ranks else "error",
            "message": "a rank was killed" if ranks else f"the worker was {how}",
            "log_tail": run_record.tail(run_dir / "log.txt"),
        }
        if machine.oom_kills() > kills and (ranks or code == -signal.SIGKILL):
            gone |= {"class": "oom", "message": KILLED_FOR_MEMORY}
        elif rank_failures := run_record.rank_failures(run_dir):
            gone = rank_failures[0]
        elif by_hand:
            gone = dict(failure) or gone
        failure = gone
        status = "interrupted" if failure["class"] == "interrupted" else "failed"
        record = record_failure(run_dir, record, status, failure)
    return of_record(run_dir, record)


def record_failure(
    run_dir: Path, record: Record, status: str, failure: Mapping[str, Any]
) -> Record:
    """Write down what became of a run that could not do so itself."""
    run_record.free_reserve(run_dir)
    failed = record | Record(status=status, failure=cast(Failure, failure))
    try:
        run_record.write(run_dir, failed)
    except OSError as error:
        failed["failure"] = {"class": "disk", "message": f"{run_dir}: {reason(error)}"}
    return failed
