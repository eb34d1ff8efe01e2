"""The program with a worker that trains nothing: losses are a formula, so that searches are cheap.

    python tests/stub_search.py ARGUMENT ...       one command, as `python -m harness`
    python tests/stub_search.py --several JSON     many commands; prints status and errors

Every step that a worker takes is a line of steps.log in the working directory. STUB_SECONDS is how
long a step takes, STUB_TOGETHER how many programs begin their first run together.
"""

import contextlib
import io
import json
import math
import os
import sys
import time
from pathlib import Path

from harness.commands import cli
from harness.results import run_record
from harness.runs import outcomes, worker_attempt

BEST_LR, DIVERGES = 7e-3, 0.5
SEED, RANK = 13, 64  # of runs that diverge, whatever their rate
STEP_SECONDS = float(os.environ.get("STUB_SECONDS", "0"))
TOGETHER = int(os.environ.get("STUB_TOGETHER", "1"))


def nll(run, step):
    """Validation nll after `step`: lowest at BEST_LR and the largest rank.

    Above DIVERGES a rate is as good as the best, until the run diverges.
    """
    apart = 0.0 if run.train.lr > DIVERGES else math.log10(run.train.lr / BEST_LR)
    rank = getattr(run.method, "r", None)
    worse = 0.3 if run.method.name == "full" else 0.1 / rank if rank else 0.2
    return 3 + apart**2 + worse + 2 * math.exp(-step / 4) + 0.001 * run.seed


def wait_for_the_others():
    """Until as many programs as STUB_TOGETHER says have a run to begin."""
    Path(f"begun-{os.getpid()}").touch()
    while len(list(Path().glob("begun-*"))) < TOGETHER:
        time.sleep(0.01)


def attempt(run, claim, *, quiet):
    """In place of `worker_attempt.attempt`: train on to the pause or the end, and save nothing."""
    assert not run.evaluate.test
    wait_for_the_others()
    run_dir, every = run.run_dir, run.evaluate.interval
    kept = sorted((run_dir / run_record.CHECKPOINTS).glob("[0-9]*"))
    first = int(kept[-1].name) if kept else 0
    metrics = run_record.Metrics(run_dir, first, first)
    end = min(run.train.steps, run.launch.pause_at or run.train.steps)
    record = run_record.read(run_dir)
    with metrics:
        if not first:
            metrics.log({"step": 0, "tokens": 0, "eval/validation/nll": nll(run, 0)})
        for step in range(first + 1, end + 1):
            time.sleep(STEP_SECONDS)
            unlucky = (run.seed, getattr(run.method, "r", None)) == (SEED, RANK)
            if (run.train.lr > DIVERGES or unlucky) and step > 5:
                failure = {"class": "nan", "message": f"the loss is nan at step {step}"}
                return outcomes.of_record(
                    run_dir, worker_attempt.record_failure(run_dir, record, "failed", failure)
                )
            with Path("steps.log").open("a") as log:
                log.write(f"{run_dir.name} {step}\n")
            metrics.log({"step": step, "tokens": step, "train/nll": 1.0})
            if step % every == 0:
                metrics.log({"step": step, "tokens": step, "eval/validation/nll": nll(run, step)})
                (run_dir / run_record.CHECKPOINTS / f"{step:06d}").mkdir(parents=True)
    if end < run.train.steps:
        record["status"] = "paused"
        record["run"]["paused_at"] = end
    else:
        record["status"] = "finished"
        read = {"nll_nats": nll(run, end), "num_tokens": 1}
        record["quality"] = {"best_step": end, "validation": read}
        record["parameters"] = {"trainable": 1000 * (getattr(run.method, "r", None) or 50)}
        record["memory"] = {"peak_bytes": 10}
        record["speed"] = {"train_seconds": 1.0}
        run_record.clear(run_dir)
    run_record.write(run_dir, record)
    return outcomes.of_record(run_dir, record)


def several(commands):
    """Status and error of each command, run one after the other in this process."""
    found = []
    for arguments in commands:
        outcomes.OUTCOMES.clear()
        errors, said = io.StringIO(), io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(said):
            status = cli.main(arguments)
        found.append([status, errors.getvalue(), said.getvalue()])
    print("FOUND" + json.dumps(found))
    return 0


if __name__ == "__main__":
    worker_attempt.attempt = attempt
    if sys.argv[1] == "--several":
        sys.exit(several(json.loads(sys.argv[2])))
    sys.exit(cli.main(sys.argv[1:]))
