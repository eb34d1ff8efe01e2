"""Trackers: each follows a sweep's files in a process of its own, and never touches a run.

The controller starts `python -m harness.runs.tracker_process NAME` for every tracker that is asked
for and tells it on standard input which runs there are. Whatever becomes of it (an error, a hang, a
kill), the runs' results are the same and take as long. When the input ends the sweep is over: the
tracker reads the rest and stops, or is stopped after its patience.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness.config.run_config import RunConfig
from harness.results import run_record
from harness.system.console import reason


class TrackerProcesses:
    """The trackers of a sweep, while its body runs."""

    def __init__(self, runs: Sequence[RunConfig], sweep: bool) -> None:
        self._asked = runs[0].tracker if runs else {}
        self._runs = list(runs)
        self._sweep = sweep
        self._folder = runs[0].run_dir.parent if runs else Path()
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._stopped: set[str] = set()

    def __enter__(self) -> TrackerProcesses:
        for name, options in self._asked.items():
            spec = {
                "options": options,
                "experiment": self._runs[0].experiment_name,
                "folder": str(self._folder.resolve()),
                "runs": [str(run.run_dir.resolve()) for run in self._runs],
                "sweep": self._sweep,
            }
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                with log_path(self._folder, name).open("w") as stream:
                    process = subprocess.Popen(
                        [sys.executable, "-m", "harness.runs.tracker_process", name],
                        stdin=subprocess.PIPE, stdout=stream, stderr=stream, text=True,
                        start_new_session=True, env=_environment(self._folder),
                    )  # fmt: skip
                assert process.stdin is not None
                process.stdin.write(json.dumps(spec) + "\n")
                process.stdin.flush()
                self._processes[name] = process
            except OSError as error:
                print(f"{name}: not tracked ({reason(error)}); the runs go on", file=sys.stderr)
        return self

    def __exit__(self, *error: Any) -> None:
        for process in self._processes.values():
            with suppress(OSError):
                assert process.stdin is not None
                process.stdin.close()
        began = time.monotonic()
        for name, process in self._processes.items():
            left = self._asked[name].get("patience", 30) - (time.monotonic() - began)
            try:
                process.wait(max(0.1, left))
            except subprocess.TimeoutExpired:
                with suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                self._stopped.add(name)
            print(f"{name}: {self._said(name, process.returncode)}", flush=True)

    def _said(self, name: str, code: int) -> str:
        """The tracker's last word, or what became of it."""
        path = log_path(self._folder, name)
        last = [line for line in run_record.tail(path, 200) if line.startswith("tracked: ")]
        if code == 0 and last:
            return last[-1].removeprefix("tracked: ")
        how = f"was killed by signal {-code}" if code < 0 else f"failed (exit status {code})"
        what = "did not end in time and was stopped" if name in self._stopped else how
        return f"{what}; results are not touched (see {path})"


def log_path(folder: Path, name: str) -> Path:
    """Where the tracker of that name writes what it and its libraries say."""
    return folder / f"tracker-{name}.log"


def _environment(folder: Path) -> dict[str, str]:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    silent = {"WANDB_SILENT": "true", "WANDB_CONSOLE": "off", "GRPC_VERBOSITY": "ERROR"}
    silent |= {"TF_CPP_MIN_LOG_LEVEL": "3"}
    private = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}  # what was not asked for
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "ACCELERATE_", "FORK_", "TORCHELASTIC_")
    own = {k: v for k, v in os.environ.items() if not k.startswith(ranks)}  # it is no rank
    # Trackio keeps its database in the sweep's folder, and asks no hub whose token this is.
    local = {"TRACKIO_DIR": str(folder.resolve() / "trackio"), "HF_HUB_OFFLINE": "1"}
    return private | local | own | threads | silent
