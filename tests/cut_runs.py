"""Runs of a small model in processes of their own, which are cut and go on."""

import dataclasses
import multiprocessing
import os
import signal

import pandas as pd

from harness.results import run_record
from harness.runs import run_directory, worker
from harness.training import checkpoint

# Dropout, so that the generators matter; validation at its best before the end, and not at it.
CONFIG = [
    "method=lora", "method.r=2", "method.dropout=0.1", "train.steps=12", "evaluate.interval=4",
    "train.checkpoint_interval=2", "train.lr=0.03", "train.schedule=constant",
    "data.validation_share=0.003", "data.test_share=0.003", "data.context_length=32",
    "train.batch_tokens=128", "train.micro_batch=2", "train.threads=1",
    # Two or three source files of a small package, as a further text.
    "evaluate.also={more: {source: docstrings, packages: [tqdm], test_share: 0.1}}",
]  # fmt: skip
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["harness.runs.worker"])


def _worker(run_dir, deadly, number):
    """Do the run; at the `number`-th call of `deadly` in `checkpoint` die by SIGKILL."""
    calls = 0
    if deadly:
        owners = {"fsync": os, "clear": run_record}
        owner, name = owners.get(deadly, checkpoint), deadly
        original = getattr(owner, name)

        def die(*arguments, **named):
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **named)

        setattr(owner, name, die)
    raise SystemExit(worker.main(run_dir, quiet=True))


def start(run, *, deadly="", number=0, micro_batch=None):
    """Begin a run, or go on with it, in a process of its own, which `_worker` may kill."""
    go_on = run_record.can_resume(run.run_dir)
    run_directory.prepare(run, "test", go_on=go_on, micro_batch=micro_batch)
    process = FORK.Process(target=_worker, args=(run.run_dir, deadly, number))
    process.start()
    return process


def finish(process):
    process.join(300)
    return process.exitcode


def run_until(run, pause_at=None):
    """Run in a process of its own, up to a step; its result."""
    run = dataclasses.replace(run, launch=dataclasses.replace(run.launch, pause_at=pause_at))
    run.run_dir.mkdir(parents=True, exist_ok=True)
    finish(start(run))
    return run_record.read(run.run_dir)


def outcome(run_dir, texts=("validation", "test", "more-before", "more")):
    """All that must not depend on how often the run was cut; the nats of documents of `texts`."""
    result = run_record.read(run_dir)
    assert result["status"] == "finished", result
    rows = [
        {key: value for key, value in row.items() if key != "train/step_seconds"}
        for row in run_record.read_metrics(run_dir)
    ]
    adapter = (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()
    tables = [pd.read_parquet(run_dir / f"documents-{name}.parquet") for name in texts]
    return result["quality"], rows, adapter, [t.nll_nats.tolist() for t in tables]
