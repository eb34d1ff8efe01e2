"""Launch one run: whether it is done already, its worker, and whether it is worth another try."""

from __future__ import annotations

import os

from harness.config import run_config
from harness.config.errors import ConfigError
from harness.config.run_config import RunConfig
from harness.results import run_record
from harness.runs import run_directory, worker_attempt
from harness.runs.decision import Decision, Request, decide
from harness.runs.differences import difference
from harness.runs.outcomes import Outcome, of_record
from harness.system import lock

WORTH_RETRYING = ("killed", "oom", "disk")


def launch(run: RunConfig, command: str, *, sweep: bool = False, quiet: bool = False) -> Outcome:
    """Do `run` in a fresh process and wait for it; what is finished is not done again.

    The worker of a run by itself draws a bar, unless it is to be `quiet`.

    A run that was cut goes on from its last checkpoint. In a sweep, one that failed before is left
    as it is, unless `retry` asks for further attempts or it is of `run_record.RETRYABLE`.

    Raises:
        ConfigError: the directory cannot be written, or holds another configuration's run.
        KeyboardInterrupt: told to stop; the worker has stopped.
    """
    run_dir = run.run_dir
    if rank():
        return _further_rank(run)
    created = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        claim = lock.claim(run_dir)
    except OSError as error:
        return run_directory.unwritable(run, error)
    if claim is None:
        return Outcome(run_dir, "busy", f"{lock.holder(run_dir)} is at {run_dir}")
    try:
        outcome = _launch(run, command, claim, sweep, quiet)
        return (
            run_directory.undone(outcome, created) if outcome.failure_class == "config" else outcome
        )
    finally:
        claim.release()


def rank() -> int:
    """Which rank of an `accelerate launch -m harness` this process is."""
    return int(os.environ.get("RANK", "0"))


def _further_rank(run: RunConfig) -> Outcome:
    """A rank that follows the first one, which writes the files."""
    from harness.runs import worker

    record = run_record.read(run.run_dir)
    if record is not None and record["status"] == "finished" and not run.rerun:
        return Outcome(run.run_dir, "skipped")
    run.run_dir.mkdir(parents=True, exist_ok=True)
    code = worker.main(run.run_dir, run=run)
    return Outcome(run.run_dir, "finished" if code == 0 else "failed")


def _launch(run: RunConfig, command: str, claim: lock.Claim, sweep: bool, quiet: bool) -> Outcome:
    run_dir = run.run_dir
    record = run_record.read(run_dir)
    launching = run.launch
    request = Request(run.rerun, run.retry, sweep, launching.since or None, launching.pause_at)
    decided = decide(run_directory.found(run, record), request)
    if decided is Decision.REFUSE_FILES:
        raise ConfigError(
            f"{run_dir} holds files and no result.json that can be read: choose another run_name, "
            "or rerun=true to replace them"
        )
    if record is not None and decided in (Decision.REFUSE_FINISHED, Decision.REFUSE_UNFINISHED):
        finished = decided is Decision.REFUSE_FINISHED
        state = "a finished run" if finished else "the checkpoint of an unfinished run"
        raise ConfigError(
            f"{run_dir} holds {state} of another configuration ({difference(record, run)}): "
            "choose another run_name, or rerun=true to replace it"
        )
    if decided is Decision.SKIP:
        run_record.clear(run_dir)  # what a kill at the very end left
        return Outcome(run_dir, "skipped")
    if record is not None and decided is Decision.LEAVE:
        return of_record(run_dir, record)
    go_on, attempts, micro_batch = decided is Decision.RESUME, run.retry, None
    while True:
        try:
            run_directory.prepare(run, command, go_on=go_on, micro_batch=micro_batch)
        except OSError as error:
            return run_directory.unwritable(run, error)
        outcome = worker_attempt.attempt(run, claim, quiet=sweep or quiet)
        go_on = True
        fewer = run_config.smaller_micro_batch(run, micro_batch or run.train.micro_batch)
        # What the worker had no time to do by itself, and ranks do not do one without the others.
        halves = outcome.message == worker_attempt.KILLED_FOR_MEMORY or (
            run.launch.num_processes > 1 and outcome.message.startswith("PassOutOfMemoryError")
        )
        if halves and run.train.on_oom == "halve" and fewer:
            micro_batch = fewer
        elif outcome.failure_class in WORTH_RETRYING and attempts:
            attempts -= 1
        else:
            return outcome
