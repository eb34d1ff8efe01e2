"""The program as processes of two ranks, and what they leave."""

import os
import subprocess
import sys
import time

from harness.config.paths import REPOSITORY
from harness.results import run_record

SAME = [
    "train.steps=4", "evaluate.interval=2", "data.validation_share=0.003", "data.test_share=0.003",
    "data.context_length=64", "train.batch_tokens=512", "train.micro_batch=2", "train.threads=1",
]  # fmt: skip


def metrics(tmp_path, name):
    rows = run_record.read_metrics(tmp_path / "outputs" / "scratch" / name)
    return [{k: v for k, v in row.items() if k != "train/step_seconds"} for row in rows]


def start(tmp_path, *command):
    return subprocess.Popen(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ranks_of(folder):
    """Process ids of the ranks that work in a run's folder."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as stream:
                words = stream.read().split(b"\0")
        except OSError:
            continue
        if b"harness.runs.worker" in words and str(folder).encode() in words:
            found.append(int(pid))
    return sorted(found)


def started(tmp_path, run_dir, steps, *arguments):
    """The program as a process of its own, whose run has taken so many steps."""
    controller = start(tmp_path, sys.executable, "-m", "harness", *arguments)
    while run_record.last_metrics(run_dir).get("step", 0) < steps:
        assert controller.poll() is None, controller.communicate()
        time.sleep(0.01)
    return controller
