"""Runs of a folder that are under way: how far they are, and how long they will take."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from harness.results import numbers, run_record
from harness.system import lock

VALIDATION = "eval/validation/nll"


@dataclass(frozen=True)
class Running:
    """A run that a worker is training now: its step, its perplexity and the time that is left."""

    name: str  # of its directory
    step: int
    steps: int
    left: str  # the time that its remaining steps will take, in words; "" before it can be known
    perplexity: str  # of its last validation, or ""


def running(folder: Path, run_dirs: Collection[Path] | None = None) -> list[Running]:
    """Every run in `folder`, or of `run_dirs`, whose worker is alive, by name."""
    runs = []
    for path in sorted(folder.glob(f"*/{run_record.FILE_NAME}")):
        if run_dirs is not None and path.parent not in run_dirs:
            continue
        record = run_record.read(path.parent)
        if record is None or record["status"] != "running" or not lock.is_claimed(path.parent):
            continue
        metrics = run_record.read_metrics(path.parent)
        step = max((int(row["step"]) for row in metrics), default=0)
        steps = int(run_record.get(record, "config.train.steps") or 0)
        each = [row["train/step_seconds"] for row in metrics if row.get("train/step_seconds")]
        left = sum(each) / len(each) * (steps - step) if each else None
        losses = [row[VALIDATION] for row in metrics if row.get(VALIDATION) is not None]
        shown = numbers.perplexity(math.exp(losses[-1])) if losses and losses[-1] < 100 else ""
        runs.append(Running(path.parent.name, step, steps, _duration(left), shown))
    return runs


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if seconds >= 100 else f"{seconds:.0f} s"
