"""What a run costs beyond its training and evaluation: in a sweep, and as a process of its own.

    make bench                     # or: python experiments/bench/sweep_overhead/bench.py

The same 12 short runs twice a round: by one `python -m harness -m …`, whose workers are forked from
a server, and by a plain `python -m harness.runs.worker` for each. Then a sweep over 12 ranks. A
run's overhead is the time from the end of the run before (of the first one in a sweep: from the
start of the command) to its own end, less what its worker spent in optimizer steps and evaluation.
Writes results.csv beside this file.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from hydra import compose, initialize_config_dir

from harness.config import paths
from harness.config.paths import REPOSITORY
from harness.config.run_config import RunConfig
from harness.results import run_record
from harness.runs import composition, run_directory
from harness.runs.worker_process import ALLOCATOR

HERE = Path(__file__).resolve().parent
RUNS = 12
SHORT = [
    "method=lora", "train.steps=4", "evaluate.interval=4", "data.validation_share=0.005",
    "data.test_share=0.005",
]  # fmt: skip


def start(*arguments: str, cwd: str) -> None:
    """A python with the harness's sources and its workers' environment."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=cwd,
        env=ALLOCATOR | dict(os.environ) | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])


def run_config(folder: str, name: str, seed: int) -> RunConfig:
    """The configuration of one run by itself."""
    with initialize_config_dir(str(paths.CONF_DIR), version_base="1.3"):
        where = [f"outputs_dir={folder}/outputs", f"experiment_name={name}", f"seed={seed}"]
        return composition.from_hydra(compose("config", [*SHORT, *where]))


def overheads(folder: Path, began: list[float]) -> list[float]:
    """Seconds of every run beyond training and evaluation, in the order of the runs.

    `began` holds when a run's command started, or only that of the sweep's.
    """
    runs = sorted(
        ((run_dir / run_record.FILE_NAME).stat().st_mtime, result["speed"])
        for run_dir, result in run_record.collect(folder)
    )
    assert len(runs) == RUNS
    found, last = [], began[0]
    for index, (end, speed) in enumerate(runs):
        start = began[index] if len(began) == RUNS else last
        found.append(end - start - speed["train_seconds"] - speed["evaluate_seconds"])
        last = end
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        start("harness", *SHORT, "experiment_name=warm-up", cwd=scratch)  # caches of the disk
        for index in range(rounds):
            began = [time.time()]
            name = f"sweep{index}"
            sweep_of = ["-m", f"seed=range({RUNS})", f"experiment_name={name}"]
            start("harness", *sweep_of, *SHORT, cwd=scratch)
            sweep = overheads(Path(scratch) / "outputs" / name, began)
            began = [time.time()]
            name = f"ranks{index}"  # every run has shapes of its own, which are predicted anew
            sweep_of = ["-m", f"method.r=range(1,{RUNS + 1})", f"experiment_name={name}"]
            start("harness", *sweep_of, *SHORT, cwd=scratch)
            ranks = overheads(Path(scratch) / "outputs" / name, began)
            began = []
            name = f"plain{index}"
            for seed in range(RUNS):
                run = run_config(scratch, name, seed)
                run.run_dir.mkdir(parents=True)
                run_directory.prepare(run, "bench")
                began.append(time.time())
                start("harness.runs.worker", str(run.run_dir), cwd=scratch)
            plain = overheads(Path(scratch) / "outputs" / name, began)
            rows.append(
                {
                    "round": index + 1,
                    "sweep_first_s": round(sweep[0], 2),
                    "sweep_later_s": round(statistics.median(sweep[1:]), 2),
                    "sweep_later_worst_s": round(max(sweep[1:]), 2),
                    "ranks_later_s": round(statistics.median(ranks[1:]), 2),
                    "plain_s": round(statistics.median(plain), 2),
                    "ratio": round(statistics.median(plain) / statistics.median(sweep[1:]), 1),
                }
            )
            print(rows[-1], flush=True)
    pd.DataFrame(rows).to_csv(HERE / "results.csv", index=False)


if __name__ == "__main__":
    main()
