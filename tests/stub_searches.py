"""Searches over the planted problem of stub_search.py, as a user starts them."""

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from harness.config.paths import REPOSITORY

STUB = Path(__file__).with_name("stub_search.py")
SEARCH = [
    "search", "train.lr=tag(log,interval(1e-4,1e-1))", "method.r=1,8,64", "search.trials=12",
    "search.rungs=[4,8]", "train.steps=16", "evaluate.interval=2", "experiment_name=x",
]  # fmt: skip


def start(folder, *arguments, seconds=0.0, together=1):
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, str(STUB), *arguments], cwd=folder, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "STUB_SECONDS": str(seconds),
                          "STUB_TOGETHER": str(together)},
    )  # fmt: skip


def finish(process, status=0):
    said, errors = process.communicate(timeout=600)
    assert process.returncode == status, said + errors
    return said + errors


def several(folder, *commands):
    """Status, error and output of every command, in one process."""
    said = finish(start(folder, "--several", json.dumps(commands)))
    return json.loads(said.partition("FOUND")[2].splitlines()[0])


def trials(folder):
    with (folder / "outputs/x/search/trials.csv").open() as stream:
        return list(csv.DictReader(stream))


def taken(folder):
    """How often each step of each run was taken."""
    return Counter((folder / "steps.log").read_text().splitlines())
