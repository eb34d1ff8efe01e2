"""What became of the runs of a command: their status, and why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness.results import numbers, run_record
from harness.results.record_types import Record


@dataclass(frozen=True)
class Outcome:
    """Holds what became of a run: its status, and why."""

    run_dir: Path
    status: str  # finished | skipped | failed | interrupted | paused | busy | refused
    message: str = ""
    failure_class: str = ""

    @property
    def exit_code(self) -> int:
        """What the program's exit status would be for this run alone."""
        wrong = self.status == "refused" or self.failure_class == "config"
        return 0 if self.status in ("finished", "skipped", "paused") else 2 if wrong else 1

    def summary(self) -> str:
        """Describe the outcome in one line for the terminal."""
        if self.status in ("refused", "busy"):
            return self.message
        if self.status in ("failed", "interrupted"):
            log = self.run_dir / "log.txt"
            return f"{self.status} ({self.failure_class}): {self.message} (see {log})"
        result = run_record.read(self.run_dir) or {}
        if self.status == "paused":
            step, steps = (
                run_record.get(result, k) for k in ("run.paused_at", "config.train.steps")
            )
            return f"paused after step {step} of {steps}; a later or no launch.pause_at goes on"
        perplexity = run_record.get(result, "quality.test.perplexity")
        seconds = result.get("wall_seconds") or 0
        done = "already finished" if self.status == "skipped" else f"finished in {seconds:.0f} s"
        problems = "".join(f"; {problem}" for problem in result.get("problems") or [])
        return (
            f"{done}, test perplexity {numbers.perplexity(perplexity)}" if perplexity else done
        ) + problems


OUTCOMES: list[Outcome] = []  # of the one run, or of the sweep


def of_record(run_dir: Path, record: Record) -> Outcome:
    """What a run's result.json says became of it."""
    failure = record.get("failure") or {}
    message = (failure.get("message") or "").splitlines()
    kind = failure.get("class") or ""
    return Outcome(run_dir, record["status"], message[0] if message else "", kind)
