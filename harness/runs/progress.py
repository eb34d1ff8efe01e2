"""A sweep as it goes: one live view on a terminal, and else a line whenever a run ends.

It reads the runs' own files, so that it shows the runs of any launcher, on any machine that shares
the disk, and of other controllers too.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from harness.config import naming
from harness.config.run_config import RunConfig
from harness.results import numbers, run_record
from harness.results.record_types import Record
from harness.system import lock

ENDED = ("finished", "failed", "interrupted", "paused")
PERIOD_SECONDS = 0.5


@dataclass
class _Seen:
    """What is known of one run."""

    run: RunConfig
    modified: float = 0.0  # of result.json
    status: str = "waiting"
    record: Record = field(default_factory=lambda: Record())
    before: str = ""  # the status when the sweep began, if the run had ended then
    said: bool = False  # whether its end has been told; another attempt has an end of its own

    @property
    def name(self) -> str:
        return naming.run_name(self.run)

    def look(self) -> bool:
        """Read what is new; whether the status has changed."""
        path = self.run.run_dir / run_record.FILE_NAME
        try:
            modified = path.stat().st_mtime_ns
        except OSError:
            return False
        if modified == self.modified:
            return False
        self.modified, old = modified, self.status
        self.record = run_record.read(self.run.run_dir) or self.record
        self.status = self.record.get("status", self.status)
        self.said = self.said and self.status in ENDED
        return self.status != old

    def begin(self) -> None:
        """See what is there before the sweep: what will run again, or may, is yet to come."""
        self.look()
        if self.run.rerun or (self.status == "running" and not lock.is_claimed(self.run.run_dir)):
            self.status = "waiting"
        elif self.status in ENDED:
            self.before = self.status
            self.status = "finished" if self.before == "finished" else "waiting"

    def share(self) -> float:
        """How much of its steps a running run has done."""
        return self.step() / max(1, self.steps)

    @property
    def steps(self) -> int:
        """The step at which it will end, or pause."""
        steps, pause = self.run.train.steps, self.run.launch.pause_at
        return steps if pause is None else min(steps, pause)

    def step(self) -> int:
        """The last optimizer step in metrics.jsonl."""
        row = run_record.last_metrics(self.run.run_dir)
        return int(row.get("step", 0))

    def line(self) -> str:
        """What became of it."""
        if self.status == "finished":
            value = run_record.get(self.record, "quality.test.perplexity")
            text = f"finished in {self.record.get('wall_seconds') or 0:.0f} s"
            text = "already finished" if self.before == "finished" else text
            return f"{text}, test perplexity {numbers.perplexity(value)}" if value else text
        if self.status == "paused":
            step, steps = run_record.get(self.record, "run.paused_at"), self.run.train.steps
            return f"paused after step {step} of {steps}"
        failure = self.record.get("failure") or {}
        message = (failure.get("message") or "").splitlines()
        return f"{self.status} ({failure.get('class')}): {message[0] if message else ''}"


class View:
    """Shows the runs of a sweep while its body runs."""

    def __init__(self, runs: list[RunConfig]) -> None:
        self._seen = [_Seen(run) for run in runs]
        self._started = time.monotonic()
        self._over = threading.Event()
        self._console = Console()
        self._live: Live | None = None
        for seen in self._seen:
            seen.begin()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> View:
        for seen in self._seen:
            if seen.before == "finished":
                self._say(seen)
        if self._console.is_terminal:
            self._live = Live(self._picture(), console=self._console, refresh_per_second=4)
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._over.set()
        self._thread.join()
        self._look()
        for seen in self._seen:
            if seen.status == "waiting" and seen.before:
                seen.status = seen.before  # it failed earlier, and was left as it is
                if error[0] is None:
                    self._say(seen)
        if self._live is not None:
            self._live.update(self._picture())
            self._live.stop()

    def _watch(self) -> None:
        while not self._over.wait(PERIOD_SECONDS):
            self._look()
            if self._live is not None:
                self._live.update(self._picture())

    def _look(self) -> None:
        for seen in self._seen:
            if seen.look() and seen.status in ENDED and not seen.said:
                self._say(seen)

    def _say(self, seen: _Seen) -> None:
        seen.said = True
        ended = sum(seen.said for seen in self._seen)
        print(f"[{ended}/{len(self._seen)}] {seen.name} {seen.line()}", flush=True)

    def _picture(self) -> Group:
        counts = Counter(seen.status for seen in self._seen)
        skipped = sum(seen.before == "finished" for seen in self._seen)
        running = [seen for seen in self._seen if seen.status == "running"]
        todo = [seen for seen in self._seen if seen.before != "finished"]
        shares = [s.share() if s.status == "running" else s.status in ENDED for s in todo]
        done = sum(shares)
        elapsed = time.monotonic() - self._started
        left = elapsed * (len(todo) - done) / done if done else None
        parts = [
            f"{counts['finished'] - skipped} done",
            *([f"{counts['paused']} paused"] if counts["paused"] else []),
            f"{len(running)} running",
            f"{counts['failed'] + counts['interrupted']} failed", f"{skipped} skipped",
            f"{counts['waiting']} waiting",
        ]  # fmt: skip
        if left is not None:
            parts.append(f"{_duration(left)} left")
        best = self._best()
        table = Table.grid(padding=(0, 1))
        for seen in running:
            step, steps = seen.step(), seen.steps
            table.add_row(
                seen.name, ProgressBar(total=max(1, steps), completed=step, width=24),
                f"step {step} of {steps}",
            )  # fmt: skip
        return Group(Text(", ".join(parts)), *([Text(best)] if best else []), table)

    def _best(self) -> str:
        finished = [
            (value, seen.name)
            for seen in self._seen
            if seen.status == "finished"
            and (value := run_record.get(seen.record, "quality.validation.perplexity")) is not None
        ]
        if not finished:
            return ""
        value, name = min(finished)
        return f"best so far on validation: {numbers.perplexity(value)}, {name}"


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min" if seconds >= 100 else f"{seconds:.0f} s"
