"""A tracker's own process: reads what a sweep's runs write and hands it to Accelerate's tracker.

    python -m harness.runs.tracker_process NAME     started by `tracking`, which names the runs

It reads metrics.jsonl and result.json at idle priority, until its standard input ends;
`harness.runs.trackers` has the trackers.

W&B's conventions: group is the experiment, job_type the method, tags are model and data; tokens are
the step axis; the summary has plain names (test/perplexity, parameters/trainable, memory/peak_gib).
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import shlex
import sys
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.results import run_record
from harness.results.record_types import Record
from harness.runs import trackers
from harness.system import atomic

PERIOD_SECONDS = 1.0
ENDED = ("finished", "failed", "interrupted")


@dataclass
class Followed:
    """One run as a tracker knows it; kept beside the run, so that a later sweep goes on with it."""

    run_dir: Path
    marker: Path
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    last: dict[str, int] = field(default_factory=dict)  # kind of row -> last step that was logged
    ended: str = ""  # what its end was, told to the tracker
    modified: int = 0  # of result.json
    inode: int = 0  # of metrics.jsonl
    offset: int = 0  # of its first byte that was not read
    tracker: Any = None

    def load(self) -> None:
        """Take over what an earlier sweep has tracked of this very run."""
        with suppress(OSError, ValueError, KeyError):
            known = json.loads(self.marker.read_text("utf-8"))
            self.id, self.last, self.ended = known["id"], known["last"], known["ended"]

    def save(self) -> None:
        """Write down what has been tracked, so that nothing is sent twice."""
        known = {"id": self.id, "last": self.last, "ended": self.ended}
        atomic.write_atomically(self.marker, json.dumps(known))

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows of metrics.jsonl that the tracker has not seen; a resumed run has a new file."""
        try:
            stream = (self.run_dir / run_record.METRICS_NAME).open("rb")
        except FileNotFoundError:
            return
        with stream:
            if (inode := os.fstat(stream.fileno()).st_ino) != self.inode:
                self.inode, self.offset = inode, 0
            stream.seek(self.offset)
            for line in stream:
                if not line.endswith(b"\n"):
                    return  # it is being written
                self.offset += len(line)
                row = json.loads(line)
                kind = next((key for key in row if "/" in key), "")
                if row["step"] > self.last.get(kind, -1):
                    self.last[kind] = row["step"]
                    yield row


class Follower:
    """Hands what runs write to trackers; `make` starts one for a run.

    Where a process has one run of the tracker at a time, a run that goes on beside another is read
    from its files when the other has ended.
    """

    def __init__(self, name: str, spec: dict[str, Any], make: Any) -> None:
        self.make = make
        self.one_at_a_time = name in trackers.ONE_AT_A_TIME
        self.followed = [Followed(Path(d), Path(d) / f".tracked-{name}.json") for d in spec["runs"]]
        for followed in self.followed:
            followed.load()

    def look(self, *, last: bool = False) -> None:
        """Read what is new of every run; the `last` time, what is open then is left as it is."""
        for followed in sorted(self.followed, key=lambda followed: followed.tracker is None):
            waits = self.one_at_a_time and followed.tracker is None
            if waits and any(other.tracker is not None for other in self.followed):
                continue
            try:
                self._look(followed)
            except FileNotFoundError:
                continue  # a run directory that is being cleared
            if last and self.one_at_a_time and followed.tracker is not None:
                followed.tracker.leave()
                followed.tracker = None

    def _look(self, followed: Followed) -> None:
        path = followed.run_dir / run_record.FILE_NAME
        modified = path.stat().st_mtime_ns
        record = run_record.read(followed.run_dir)
        if record is None:
            return
        status = record["status"]
        if followed.ended == "finished" and followed.tracker is None:
            if followed.marker.exists():
                return
            # Replaced: another run.
            followed.ended, followed.last, followed.id = "", {}, uuid.uuid4().hex[:8]
        new = modified != followed.modified
        if followed.tracker is None:
            if not new or (followed.ended == status and status in ENDED):
                return
            followed.tracker = self.make(record, followed)
            followed.ended = ""
        for row in followed.rows():
            self._log(followed, row)
        if status in ENDED:
            self._end(followed, record)
        followed.modified = modified
        if followed.run_dir.is_dir():
            followed.save()

    def _log(self, followed: Followed, row: dict[str, Any]) -> None:
        values = {k: v for k, v in row.items() if v is not None}
        if (nll := values.get("eval/validation/nll")) is not None:
            values["eval/validation/perplexity"] = math.exp(min(nll, 700))
        followed.tracker.log(values, row["tokens"])

    def _end(self, followed: Followed, record: Record) -> None:
        followed.tracker.end(followed.run_dir, record)
        followed.ended, followed.tracker = record["status"], None


def unreachable() -> str | None:
    """Why W&B cannot be reached, or None."""
    import wandb

    try:
        # Any answer will do. The client itself tries a server that does not answer for a minute.
        with suppress(urllib.error.HTTPError):
            urllib.request.urlopen(wandb.setup().settings.base_url, timeout=5).close()
        if not (os.environ.get("WANDB_API_KEY") or wandb.Api(timeout=10).api_key):
            return "there is no key (wandb login)"
        wandb.Api(timeout=10).viewer  # noqa: B018 - asks the server
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def main(name: str) -> int:
    """Follow the runs that standard input names until it ends."""
    os.setpriority(os.PRIO_PROCESS, 0, 19)
    if hasattr(os, "SCHED_IDLE"):
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    logging.basicConfig(level=logging.INFO)
    spec = json.loads(sys.stdin.readline())
    over = threading.Event()

    def listen() -> None:
        sys.stdin.read()
        over.set()

    threading.Thread(target=listen, daemon=True).start()
    reason = None
    if name == "wandb":
        spec["mode"] = spec["options"]["mode"]
        if spec["mode"] == "online" and (reason := unreachable()):
            spec["mode"] = "offline"
        if spec["sweep"]:  # loaded while the runs leave a core idle, and not when all wait for it
            importlib.import_module("harness.report.files")
    follower = Follower(
        name, spec, lambda record, followed: trackers.Adapter(name, spec, record, followed)
    )
    last = False
    while True:
        follower.look(last=last)
        if last:
            break
        last = over.wait(PERIOD_SECONDS)
    if name == "wandb" and spec["sweep"]:
        summarise(spec)
    count = sum(bool(followed.ended) for followed in follower.followed)
    folder = Path(spec["folder"])
    if name == "wandb" and spec["mode"] == "offline":
        why = f" since W&B could not be reached ({reason})" if reason else ""
        # A line that works from anywhere, for this experiment.
        upload = (
            f"cd {shlex.quote(str(folder))} && {shlex.quote(sys.executable)} -m wandb sync --yes"
        )
        message = f"{count} runs offline in {folder / 'wandb'}{why}; to upload: {upload}"
    elif name == "tensorboard":
        message = f"{count} runs; tensorboard --logdir {shlex.quote(str(folder / 'tensorboard'))}"
    elif name == "trackio":
        here = f"TRACKIO_DIR={shlex.quote(os.environ.get('TRACKIO_DIR', str(folder / 'trackio')))}"
        message = f"{count} runs; {here} trackio show --project {spec['options']['project']}"
    elif name == "wandb":
        message = f"{count} runs in project {spec['options']['project']}"
    else:
        message = f"{count} runs; {trackers.where(name, spec)}"
    print(f"tracked: {message}", flush=True)
    return 0


def summarise(spec: dict[str, Any]) -> None:
    """One W&B run for the sweep: its table, its figures and its page."""
    import pandas as pd
    import wandb

    from harness.report import evidence, files
    from harness.report import summary as tables

    folder = Path(spec["folder"])
    findings = evidence.find(folder)
    if not findings.rows:
        return
    page = files.write(findings)
    run = wandb.init(
        project=spec["options"]["project"], entity=spec["options"]["entity"], mode=spec["mode"],
        dir=spec["folder"], name=f"{spec['experiment']}: summary", group=spec["experiment"],
        job_type="summary", reinit="create_new", save_code=False,
        settings=wandb.Settings(init_timeout=15, x_disable_stats=True, console="off"),
    )  # fmt: skip
    names, lines = tables.results_lines(findings)
    table = pd.DataFrame(lines, columns=names)  # not by way of CSV, where a label 'NA' is no text
    pictures = {
        f"figures/{path.stem}": wandb.Image(str(path))
        for path in sorted((page.parent / "figures").glob("*.png"))
    }
    run.log({"results": wandb.Table(dataframe=table.astype(object)), **pictures})
    artifact = wandb.Artifact(f"report-{spec['experiment']}", "report")
    artifact.add_file(str(page))
    run.log_artifact(artifact)
    run.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
