"""Runs of a folder that its table, or the table's statistics, are without, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.report.evidence import Findings
from harness.results import run_record
from harness.system import lock

AGAIN = "the same command tries it again"


@dataclass(frozen=True)
class Missing:
    """A run that has no place in the table or in its statistics, and the reason."""

    name: str  # of its directory
    # failed | interrupted | paused | running | waiting | refused | unreadable | repeated |
    # not compared
    status: str
    reason: str
    next: str = ""  # what becomes of it
    log: bool = False  # whether it has one

    def __str__(self) -> str:
        return "; ".join(filter(None, (self.reason, self.next)))


def find(findings: Findings) -> list[Missing]:
    """Every such run of those asked for: begun, by name, and then those of the last sweep only."""
    folder, planned = findings.folder, run_record.read_sweep(findings.folder)
    names = ("config.yaml", run_record.FILE_NAME)
    run_dirs = {path.parent for name in names for path in folder.glob(f"*/{name}")}
    runs = [
        run
        for run_dir in sorted(run_dirs)
        if not planned.get(run_dir.name) and (run := _begun(run_dir)) is not None
    ]
    repeated = [
        Missing(run_dir.name, "repeated", reason, log=(run_dir / "log.txt").exists())
        for row in findings.rows
        for run_dir, reason in row.repeated.items()
    ]
    runs += [
        *repeated,
        *_not_compared(findings),
        *_not_begun(run_dirs, planned, folder),
    ]
    selected = findings.run_dirs
    return [run for run in runs if selected is None or folder / run.name in selected]


def _begun(run_dir: Path) -> Missing | None:
    """What became of a run that has a configuration in its directory; None if it is finished."""
    name, log = run_dir.name, (run_dir / "log.txt").exists()
    record = run_record.read(run_dir)
    if record is None:
        reason = "there is no result.json that can be read"
        return Missing(name, "unreadable", reason, "rerun=true replaces it", log)
    status = str(record["status"])
    if status == "finished":
        return None
    if status == "running":
        step, steps = _step(run_dir), run_record.get(record, "config.train.steps")
        progress = f"at step {step}" + (f" of {steps}" if steps else "")
        if lock.is_claimed(run_dir):
            return Missing(name, "running", progress, log=log)  # which the page shows by itself
        return Missing(name, "interrupted", f"its process went {progress}", _goes_on(run_dir), log)
    if status == "interrupted":
        return Missing(name, status, f"at step {_step(run_dir)}", _goes_on(run_dir), log)
    if status == "paused":
        steps = run_record.get(record, "config.train.steps")
        reason = f"after step {run_record.get(record, 'run.paused_at')} of {steps}"
        return Missing(name, status, reason, "a search goes on with it, or leaves it", log)
    failure = record.get("failure") or {}
    lines = (failure.get("message") or "").splitlines()
    kind = failure.get("class")
    reason = ": ".join(filter(None, (kind, lines[0] if lines else "")))
    left = "a sweep leaves it as it is until retry=1"
    return Missing(name, status, reason, AGAIN if kind in run_record.RETRYABLE else left, log)


def _step(run_dir: Path) -> int:
    return int(run_record.last_metrics(run_dir).get("step", 0))


def _goes_on(run_dir: Path) -> str:
    return "the same command goes on with it" if run_record.can_resume(run_dir) else AGAIN


def _not_compared(findings: Findings) -> Iterator[Missing]:
    """Finished runs without a number that the others have."""
    if "test" in findings.found:
        for row in findings.rows:
            if run_record.get(row.records[0], "quality.test") is None:
                for run_dir in row.run_dirs:
                    reason = "it was not evaluated on the test set"
                    yield Missing(run_dir.name, "not compared", reason, log=True)


def _not_begun(begun: set[Path], planned: dict[str, str], folder: Path) -> Iterator[Missing]:
    """Runs that the last sweep has refused, or has not come to."""
    for name, refused in planned.items():
        if refused:
            yield Missing(name, "refused", refused)
        elif folder / name not in begun:
            yield Missing(name, "waiting", "the sweep has not come to it", "the same command does")
