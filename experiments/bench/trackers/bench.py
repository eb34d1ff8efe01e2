"""What a tracker costs a sweep whose W&B service cannot be reached, and whether results stay.

    python experiments/bench/trackers/bench.py      # about 25 minutes, nothing beside it

The same sweep without a tracker, with W&B at a port that refuses, and with W&B at a port that takes
connections and never answers, in turn. Writes results.csv beside this file: seconds of the
optimizer steps, seconds of the whole command and until the last result, and whether every nats of
every document are the bits of the sweep without a tracker.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from harness.config.paths import REPOSITORY
from harness.results import run_record
from harness.runs.worker_process import ALLOCATOR

HERE = Path(__file__).resolve().parent
SWEEP = ["-m", "method=lora", "train.steps=60", "train.lr=2e-2", "seed=0,1",
    "data.validation_share=0.005", "data.test_share=0.005"]  # fmt: skip
KINDS = ("none", "refuses", "swallows")


def sweep(folder: Path, name: str, port: int | None) -> dict[str, float]:
    """Seconds of one sweep, with W&B at `port` if given."""
    unreachable = {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": "a" * 40}
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "harness", *SWEEP, f"experiment_name={name}"]
        + (["tracker=wandb"] if port else []),
        cwd=folder, capture_output=True, text=True,
        env=ALLOCATOR | dict(os.environ) | {"PYTHONPATH": str(REPOSITORY)}
        | (unreachable if port else {}),
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    ended = time.time()
    runs = list(run_record.collect(folder / "outputs" / name))
    last = max((run_dir / run_record.FILE_NAME).stat().st_mtime for run_dir, _ in runs)
    return {
        "train_s": sum(result["speed"]["train_seconds"] for _, result in runs),
        "last_result_s": last - began,
        "command_s": ended - began,
    }


def documents(folder: Path) -> dict[str, bytes]:
    """The nats of every document of every run."""
    return {
        f"{path.parent.name}/{path.name}": path.read_bytes()
        for path in sorted(folder.glob("*/documents-*.parquet"))
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    rounds = parser.parse_args().rounds
    refusing, swallowing = socket.socket(), socket.socket()
    for listener in (refusing, swallowing):
        listener.bind(("127.0.0.1", 0))
    swallowing.listen(128)  # connections are taken, and nothing is ever said
    ports = {"refuses": refusing.getsockname()[1], "swallows": swallowing.getsockname()[1]}
    rows: list[dict[str, object]] = []
    ratios: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for index in range(rounds):
            order = KINDS[index % 3 :] + KINDS[: index % 3]  # the machine's own drift cancels
            found = {kind: sweep(folder, f"{kind}{index}", ports.get(kind)) for kind in order}
            plain = documents(folder / "outputs" / f"none{index}")
            for kind in KINDS:
                same = documents(folder / "outputs" / f"{kind}{index}") == plain
                assert plain
                row = {"round": index + 1, "tracker": kind, "identical": same}
                for name, seconds in found[kind].items():
                    row[name] = round(seconds, 2)
                    ratios.setdefault((kind, name), []).append(seconds / found["none"][name])
                rows.append(row)
                print(row, flush=True)
    for (kind, name), values in ratios.items():
        print(f"{kind} {name}: {statistics.median(values):.4f} of none ({values})")
    pd.DataFrame(rows).to_csv(HERE / "results.csv", index=False)


if __name__ == "__main__":
    main()
