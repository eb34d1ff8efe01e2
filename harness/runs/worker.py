"""One run, from RUN_DIR/config.yaml to RUN_DIR/result.json: python -m harness.runs.worker RUN_DIR.

A fresh process per run: peak memory is a headline metric, so runs share no allocator and no caches.
A checkpoint in RUN_DIR is gone on from. Exit status: 0 finished, or paused at `launch.pause_at`; 75
told to stop (the same command goes on), 2 a mistake in the configuration, 1 any other failure.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import signal
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from harness.config.errors import ConfigError
from harness.config.run_config import RunConfig
from harness.results import run_record
from harness.results.record_types import Record
from harness.runs import composition, saved_check, saved_costs
from harness.runs.failures import failure_class
from harness.runs.finished_run import Saved
from harness.runs.stages import (
    adaptation,
    costs,
    evaluation,
    preparation,
    saving,
    setup,
    texts,
    training,
)
from harness.system import lock, machine
from harness.system.signals import Stop
from harness.training import loop
from harness.training.run_state import Elapsed

RESUME_ME = 75  # exit status: EX_TEMPFAIL of sysexits.h
log = logging.getLogger("harness")


def main(run_dir: Path, *, run: RunConfig | None = None, quiet: bool = False) -> int:
    """Do the run; whatever happens ends in result.json, and the traceback in log.txt.

    Of several ranks all do the run, and the first one writes. `run` is what RUN_DIR/config.yaml
    says, for those who know it already; `quiet` leaves out the bar.
    """
    gc.freeze()  # a million imported objects, which the collector would look at again and again
    stop = Stop().listen()
    rank = int(os.environ.get("RANK", "0"))
    log_path = run_dir / (f"{run_record.RANK_LOG}{rank}.txt" if rank else "log.txt")
    handler = logging.FileHandler(log_path, delay=True)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
        handlers=[handler],
    )
    logging.raiseExceptions = False  # a full disk is told of once, by the result
    logging.captureWarnings(True)
    result: dict[str, Any] = {"status": "failed"}
    code = 1
    so_far = None
    try:
        try:
            with stop.interruptible(), log_path.open("a") as crash_log:
                faulthandler.enable(crash_log)  # a segfault leaves its stack there
                if rank == 0:
                    run_record.keep_reserve(run_dir)
                    so_far = Elapsed(time.time(), lock.concurrent_runs())
                run = run or composition.load(run_dir / "config.yaml")
                result |= run_record.describe(run, run_dir)
                perform(run, run_dir, result, stop, so_far or Elapsed(time.time()), quiet=quiet)
        finally:
            stop.ignore()
            faulthandler.disable()
        result["status"] = "finished"
        code = 0
    except loop.Paused:
        result["status"] = "paused"
        code = 0
    except KeyboardInterrupt:
        result["status"] = "interrupted"
        result["failure"] = dict(run_record.INTERRUPTED)
        log.warning("interrupted")
        code = RESUME_ME
    except ConfigError as error:
        result["failure"] = {"class": "config", "message": str(error)}
        log.exception("refused")
        code = 2
    except Exception as error:  # whatever it is, it is recorded and the sweep goes on
        message = f"{type(error).__name__}: {error}"
        result["failure"] = {"class": failure_class(error), "message": message}
        log.exception("failed")
    if "failure" in result:
        result["failure"]["log_tail"] = run_record.tail(log_path)
    if rank:
        if "failure" in result:
            run_record.write_rank_failure(run_dir, rank, result["failure"])
        return code
    if so_far:
        facts = so_far.facts()
        result["wall_seconds"] = facts["wall_seconds"]
        result["date"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        result.setdefault("environment", {})["runs_beside"] = facts["runs_beside"]
    run_record.free_reserve(run_dir)
    run_record.write(run_dir, result)
    if result["status"] == "finished":  # until then the run goes on from its last checkpoint
        run_record.clear(run_dir)
        _measure_costs(run, run_dir, result, so_far)
    if so_far:
        so_far.end()
    if result["status"] == "finished":
        _confirm_saved(run, run_dir, result)
    return code


def _measure_costs(
    run: RunConfig | None, run_dir: Path, result: dict[str, Any], so_far: Elapsed | None
) -> None:
    """Note in the result, which stands, how fast what was saved loads and runs (`saved_costs`)."""
    if run is None or run.evaluate.latency is None:
        return
    measured = result.setdefault("costs", {})
    measured["failure"] = saved_costs.UNMEASURED  # of a kill, which leaves no time to say so
    with suppress(OSError):
        run_record.write(run_dir, result)
    figures = saved_costs.measure(Saved(run_dir, run, cast(Record, result)))
    del measured["failure"]
    measured |= figures
    if so_far:  # the most at any time of the run, and of this
        result["environment"]["runs_beside"] = so_far.facts()["runs_beside"]
    if failure := measured.get("failure"):
        print(f"warning: evaluate.latency failed ({failure})", file=sys.stderr)
    with suppress(OSError):
        run_record.write(run_dir, result)


def _confirm_saved(run: RunConfig | None, run_dir: Path, result: dict[str, Any]) -> None:
    """Load what was saved and note in the result, which stands, whether it is the same model."""
    if run is None or not result.get("saved"):
        return
    result["saved_check"] = saved_check.check(Saved(run_dir, run, cast(Record, result)))
    if failure := result["saved_check"]["failure"]:
        print(f"warning: {failure}", file=sys.stderr)
    with suppress(OSError):
        run_record.write(run_dir, result)


def perform(
    run: RunConfig,
    run_dir: Path,
    result: dict[str, Any],
    stop: Stop,
    so_far: Elapsed,
    *,
    quiet: bool,
) -> None:
    """text -> model -> method -> train -> evaluate -> save; fills `result` as it goes."""
    begun = setup.begin(run, run_dir, result)
    read = texts.read(begun)
    adapted = adaptation.adapt(begun, read)
    prepared = preparation.prepare(begun, adapted)
    trained = training.train(begun, read, adapted, prepared, stop, so_far, quiet=quiet)
    evaluation.evaluate(begun, read, adapted, prepared, trained)
    costs.record(begun, read, trained)
    saving.save(begun, read, adapted, trained)


if __name__ == "__main__":
    warnings.simplefilter("default")
    folder = Path(sys.argv[1])
    if "RANK" in os.environ:
        machine.die_with_parent(signal.SIGKILL)  # no rank outlives the launcher of all
        if not lock.join(folder):
            sys.exit(f"{folder}: the launcher of this rank is gone")
    sys.exit(main(folder))
