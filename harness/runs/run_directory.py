"""The directory of a run: what is in it, made ready for a worker, and taken away again.

Where it is, `RunConfig.run_dir` says (harness/config/run_config.py).
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from omegaconf import OmegaConf

from harness.config import run_config
from harness.config.errors import ConfigError
from harness.config.run_config import RunConfig
from harness.results import run_record
from harness.results.record_types import Record
from harness.runs.decision import Found
from harness.runs.differences import is_same
from harness.runs.outcomes import Outcome
from harness.system import atomic, lock
from harness.system.console import reason

# All that there is in a run's directory before its first record.
BEFORE_THE_RECORD = (lock.CLAIM_NAME, lock.RANKS_NAME, "config.yaml", "command.txt")


def _of_a_further_rank(path: Path) -> bool:
    """Whether a rank of our own `accelerate launch` writes the file, and may have begun to."""
    by_hand = os.environ.get("WORLD_SIZE", "1") != "1"
    return by_hand and path.name.startswith(run_record.RANK_LOG)


def found(run: RunConfig, record: Record | None) -> Found:
    """What the run's directory holds; `record` is its result.json."""
    run_dir = run.run_dir
    if record is None:
        half_written = atomic.scratch_prefix(run_record.FILE_NAME)
        names = {
            path.name
            for path in run_dir.iterdir()
            if not _of_a_further_rank(path) and not path.name.startswith(half_written)
        }
        return Found(other_files=not names <= set(BEFORE_THE_RECORD))
    return Found(
        status=record["status"],
        same=is_same(record, run),
        failure_class=(record.get("failure") or {}).get("class"),
        can_resume=run_record.can_resume(run_dir),
        paused_at=run_record.get(record, "run.paused_at"),
        ended=(run_dir / run_record.FILE_NAME).stat().st_mtime,
    )


def prepare(
    run: RunConfig, command: str, *, go_on: bool = False, micro_batch: int | None = None
) -> None:
    """Make the run directory ready: config.yaml, command.txt and a result that says `running`.

    What was there is cleared away, unless the run is to `go_on` from its checkpoint.
    """
    run_dir = run.run_dir
    locks = (lock.CLAIM_NAME, lock.RANKS_NAME)
    for old in run_dir.glob(f"{run_record.RANK_FAILURE}*") if go_on else run_dir.iterdir():
        if old.name not in locks and not _of_a_further_rank(old):
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    OmegaConf.save(OmegaConf.create(run_config.to_dict(run)), run_dir / "config.yaml")
    (run_dir / "command.txt").write_text(command + "\n", "utf-8")
    record = {"status": "running"} | run_record.describe(run, run_dir)
    record["run"]["micro_batch"] = micro_batch
    run_record.write(run_dir, record)


def undone(outcome: Outcome, created: list[Path]) -> Outcome:
    """What a mistake in the configuration leaves: no directory that was made for it.

    One that was there before stays, and so does what was measured before the mistake was found.
    """
    run_dir = outcome.run_dir
    by_hand = os.environ.get("WORLD_SIZE", "1") != "1"  # further ranks write to it
    if run_dir not in created or by_hand or run_record.read_metrics(run_dir):
        return outcome
    shutil.rmtree(run_dir, ignore_errors=True)
    for folder in created[1:]:
        with suppress(OSError):  # another run is in it
            folder.rmdir()
    return replace(outcome, status="refused")


def unwritable(run: RunConfig, error: OSError) -> Outcome:
    """A full disk is a failure like any other; whatever else hinders writing is a ConfigError."""
    message = f"outputs_dir={run.outputs_dir}: cannot write {run.run_dir} ({reason(error)})"
    if error.errno in run_record.DISK_ERRORS:
        return Outcome(run.run_dir, "failed", message, "disk")
    raise ConfigError(message) from error
