"""Launch one run: its directory, whether it is done already, its worker, and what became of it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import sys
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from harness.config import matrix_roles, naming, run_config, unused_keys
from harness.config.errors import ConfigError
from harness.config.run_config import RunConfig
from harness.results import numbers, run_record
from harness.results.run_record import command_line
from harness.runs import composition, progress, tracking, worker_process
from harness.runs.decision import Decision, Found, Request, decide
from harness.system import atomic, contents, lock, machine
from harness.system.console import reason

KILLED_FOR_MEMORY = "the worker was killed by the system, which was out of memory"
WORTH_RETRYING = ("killed", "oom", "disk")


@dataclass(frozen=True)
class Outcome:
    """Holds what became of a run: its status, and why."""

    run_dir: Path
    status: str  # finished | skipped | failed | interrupted | paused | busy | refused
    message: str = ""
    failure_class: str = ""

    @property
    def exit_code(self) -> int:
        """What the program's exit status would be for this run alone."""
        wrong = self.status == "refused" or self.failure_class == "config"
        return 0 if self.status in ("finished", "skipped", "paused") else 2 if wrong else 1

    def summary(self) -> str:
        """Describe the outcome in one line for the terminal."""
        if self.status in ("refused", "busy"):
            return self.message
        if self.status in ("failed", "interrupted"):
            log = self.run_dir / "log.txt"
            return f"{self.status} ({self.failure_class}): {self.message} (see {log})"
        result = run_record.read(self.run_dir) or {}
        if self.status == "paused":
            at, steps = (run_record.get(result, k) for k in ("run.paused_at", "config.train.steps"))
            return f"paused after step {at} of {steps}; a later or no launch.pause_at goes on"
        perplexity = run_record.get(result, "quality.test.perplexity")
        seconds = result.get("wall_seconds") or 0
        done = "already finished" if self.status == "skipped" else f"finished in {seconds:.0f} s"
        problems = "".join(f"; {problem}" for problem in result.get("problems") or [])
        return (
            f"{done}, test perplexity {numbers.perplexity(perplexity)}" if perplexity else done
        ) + problems


OUTCOMES: list[Outcome] = []  # of the one run, or of the sweep
TYPED: list[str] = []  # after the program's name, before it became Hydra's arguments in sys.argv
SINCE = "launch.since="  # the override by which a sweep tells its runs when it began
PLANNED = "++contents="  # and the one by which it tells them what they are to read
PAUSE = "++launch.pause_at="  # and the one by which a search tells them where to pause


def task(cfg: DictConfig) -> Outcome:
    """What Hydra calls for every run, in this process or in a launcher's."""
    hydra_config = HydraConfig.get()
    if os.environ.get("WORLD_SIZE", "1") != "1":  # a rank does not outlive accelerate launch
        machine.die_with_parent(signal.SIGKILL)
    sweep = hydra_config.mode == RunMode.MULTIRUN
    own = [*without_own(hydra_config.overrides.task), "hydra.mode=RUN"]
    command = command_line(["run", *own]) if sweep else typed()  # which makes this run alone
    try:
        _go_to(hydra_config.runtime.cwd)
        run = composition.from_hydra(cfg)
        unused_keys.refuse_targets(hydra_config.overrides.task, run)
        cores = run.launch.cores or _cores_left_by(hydra_config.launcher)
        run = replace(run, launch=replace(run.launch, cores=cores))
        # Ranks have no bar of their own: their output goes to a file.
        viewed = not sweep and run.launch.num_processes > 1 and sys.stdout.isatty()
        followed = (
            nullcontext() if sweep or rank() else tracking.TrackerProcesses([run], sweep=False)
        )
        with followed, progress.View([run]) if viewed else nullcontext():
            outcome = launch(run, command, sweep=sweep)
    except ConfigError as error:
        outcome = Outcome(Path(str(cfg.outputs_dir)), "refused", str(error))
    if not sweep:
        OUTCOMES.append(outcome)
        if outcome.exit_code == 0 and not rank():
            print(outcome.summary(), flush=True)
    return outcome


def planned(run: RunConfig) -> str:
    """The override that fixes what a run of a sweep reads, whenever it starts.

    Text or weights that change while it waits make it fail, and not another run of it.
    """
    pairs = (f"{key}:{json.dumps(value)}" for key, value in run.contents.items())
    return f"{PLANNED}{{{','.join(pairs)}}}"


def without_own(overrides: Iterable[str]) -> list[str]:
    """The overrides that a user gave, without those by which a sweep tells its runs."""
    return [text for text in overrides if not text.startswith((SINCE, PLANNED, PAUSE))]


def _go_to(folder: str) -> None:
    """Work where the program was started, also in a launcher's process that began elsewhere."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise ConfigError(
            f"{folder}, where the sweep was started, is not on {socket.gethostname()} "
            f"({reason(error)}): start it in a folder that all machines share"
        ) from error


def _cores_left_by(launcher: Any) -> int | None:
    """The cores that Hydra's launcher leaves a run: joblib's, Ray's, submitit's word for it."""
    if n_jobs := OmegaConf.select(launcher, "n_jobs"):  # negative: counted from all cores down
        number = n_jobs if n_jobs > 0 else machine.usable_cores() + 1 + n_jobs
        return max(1, machine.usable_cores() // max(1, number))
    for key in ("ray.remote.num_cpus", "cpus_per_task"):
        if found := OmegaConf.select(launcher, key):
            return max(1, int(found))
    return 1 if OmegaConf.select(launcher, "ray") else None  # Ray's own default


def launch(run: RunConfig, command: str, *, sweep: bool = False, quiet: bool = False) -> Outcome:
    """Do `run` in a fresh process and wait for it; what is finished is not done again.

    The worker of a run by itself draws a bar, unless it is to be `quiet`.

    A run that was cut goes on from its last checkpoint. In a sweep, one that failed before is left
    as it is, unless `retry` asks for further attempts or it is of `results.RETRYABLE`.

    Raises:
        ConfigError: the directory cannot be written, or holds another configuration's run.
        KeyboardInterrupt: told to stop; the worker has stopped.
    """
    run_dir = run.run_dir
    if rank():
        return _further_rank(run)
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        claim = lock.claim(run_dir)
    except OSError as error:
        return _unwritable(run, error)
    if claim is None:
        return Outcome(run_dir, "busy", f"{lock.holder(run_dir)} is at {run_dir}")
    try:
        outcome = _launch(run, command, claim, sweep, quiet)
        return _undone(outcome, made) if outcome.failure_class == "config" else outcome
    finally:
        claim.release()


def _undone(outcome: Outcome, made: list[Path]) -> Outcome:
    """What a mistake in the configuration leaves: no directory that was made for it.

    One that was there before stays, and so does what was measured before the mistake was found.
    """
    run_dir = outcome.run_dir
    by_hand = os.environ.get("WORLD_SIZE", "1") != "1"  # further ranks write to it
    if run_dir not in made or by_hand or run_record.read_metrics(run_dir):
        return outcome
    shutil.rmtree(run_dir, ignore_errors=True)
    for folder in made[1:]:
        with suppress(OSError):  # another run is in it
            folder.rmdir()
    return replace(outcome, status="refused")


def _unwritable(run: RunConfig, error: OSError) -> Outcome:
    """A full disk is a failure like any other; whatever else hinders writing is a ConfigError."""
    message = f"outputs_dir={run.outputs_dir}: cannot write {run.run_dir} ({reason(error)})"
    if error.errno in run_record.DISK_ERRORS:
        return Outcome(run.run_dir, "failed", message, "disk")
    raise ConfigError(message) from error


def rank() -> int:
    """Which rank of an `accelerate launch -m harness` this process is."""
    return int(os.environ.get("RANK", "0"))


def _further_rank(run: RunConfig) -> Outcome:
    """A rank that follows the first one, which writes the files."""
    from harness.runs import worker

    found = run_record.read(run.run_dir)
    if found is not None and found["status"] == "finished" and not run.rerun:
        return Outcome(run.run_dir, "skipped")
    run.run_dir.mkdir(parents=True, exist_ok=True)
    code = worker.main(run.run_dir, run=run)
    return Outcome(run.run_dir, "finished" if code == 0 else "failed")


# All that there is in a run's directory before its first record.
BEFORE_THE_RECORD = (lock.CLAIM_NAME, lock.RANKS_NAME, "config.yaml", "command.txt")


def _of_a_further_rank(path: Path) -> bool:
    """Whether a rank of our own `accelerate launch` writes the file, and may have begun to."""
    by_hand = os.environ.get("WORLD_SIZE", "1") != "1"
    return by_hand and path.name.startswith(run_record.RANK_LOG)


def _found(run: RunConfig, record: dict[str, Any] | None) -> Found:
    """What the run's directory holds; `record` is its result.json."""
    run_dir = run.run_dir
    if record is None:
        half_written = atomic.scratch_prefix(run_record.FILE_NAME)
        names = {
            path.name
            for path in run_dir.iterdir()
            if not _of_a_further_rank(path) and not path.name.startswith(half_written)
        }
        return Found(other_files=not names <= set(BEFORE_THE_RECORD))
    return Found(
        status=record["status"],
        same=is_same(record, run),
        failure_class=(record.get("failure") or {}).get("class"),
        can_resume=run_record.can_resume(run_dir),
        paused_at=run_record.get(record, "run.paused_at"),
        ended=(run_dir / run_record.FILE_NAME).stat().st_mtime,
    )


def _launch(run: RunConfig, command: str, claim: lock.Claim, sweep: bool, quiet: bool) -> Outcome:
    run_dir = run.run_dir
    record = run_record.read(run_dir)
    launching = run.launch
    asked = Request(run.rerun, run.retry, sweep, launching.since or None, launching.pause_at)
    decided = decide(_found(run, record), asked)
    if decided is Decision.REFUSE_FILES:
        raise ConfigError(
            f"{run_dir} holds files and no result.json that can be read: choose another run_name, "
            "or rerun=true to replace them"
        )
    if record is not None and decided in (Decision.REFUSE_FINISHED, Decision.REFUSE_UNFINISHED):
        finished = decided is Decision.REFUSE_FINISHED
        state = "a finished run" if finished else "the checkpoint of an unfinished run"
        raise ConfigError(
            f"{run_dir} holds {state} of another configuration ({difference(record, run)}): "
            "choose another run_name, or rerun=true to replace it"
        )
    if decided is Decision.SKIP:
        run_record.clear(run_dir)  # what a kill at the very end left
        return Outcome(run_dir, "skipped")
    if record is not None and decided is Decision.LEAVE:
        return _outcome(run_dir, record)
    go_on, attempts, micro_batch = decided is Decision.RESUME, run.retry, None
    while True:
        try:
            prepare(run, command, go_on=go_on, micro_batch=micro_batch)
        except OSError as error:
            return _unwritable(run, error)
        outcome = _attempt(run, claim, quiet=sweep or quiet)
        go_on = True
        fewer = run_config.smaller_micro_batch(run, micro_batch or run.train.micro_batch)
        # What the worker had no time to do by itself, and ranks do not do one without the others.
        halves = outcome.message == KILLED_FOR_MEMORY or (
            run.launch.num_processes > 1 and outcome.message.startswith("PassOutOfMemoryError")
        )
        if halves and run.train.on_oom == "halve" and fewer:
            micro_batch = fewer
        elif outcome.failure_class in WORTH_RETRYING and attempts:
            attempts -= 1
        else:
            return outcome


def _attempt(run: RunConfig, claim: lock.Claim, *, quiet: bool) -> Outcome:
    """One worker from its start to its end."""
    run_dir = run.run_dir
    kills = machine.oom_kills()
    ranks = run.launch.num_processes > 1
    by_hand = os.environ.get("WORLD_SIZE", "1") != "1"  # we are a rank of an accelerate launch
    try:
        if by_hand:
            from harness.runs import worker

            code = worker.main(run_dir)
        elif ranks:
            code = worker_process.wait_for(*worker_process.accelerate(run, claim))
        else:
            code = worker_process.wait_for(*worker_process.fork(run, claim, quiet))
    except KeyboardInterrupt:
        record = run_record.read(run_dir) or {}
        if record.get("status") == "running":  # stopped at once, or before it had begun
            _record(run_dir, record, "interrupted", run_record.INTERRUPTED)
        raise
    record = run_record.read(run_dir) or {"status": "running"}
    failure = record.get("failure") or {}
    # Ranks end one another: who says no more than that may not know why.
    silent = failure.get("class") in ("killed", "interrupted") and (ranks or by_hand)
    if record["status"] == "running" or silent:
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"gone, exit status {code}"
        failure = {
            "class": "killed" if code < 0 or ranks else "error",
            "message": "a rank was killed" if ranks else f"the worker was {how}",
            "log_tail": run_record.tail(run_dir / "log.txt"),
        }
        if machine.oom_kills() > kills and (ranks or code == -signal.SIGKILL):
            failure |= {"class": "oom", "message": KILLED_FOR_MEMORY}
        elif told := run_record.rank_failures(run_dir):
            failure = told[0]
        elif by_hand:
            failure = record.get("failure") or failure
        status = "interrupted" if failure["class"] == "interrupted" else "failed"
        record = _record(run_dir, record, status, failure)
    return _outcome(run_dir, record)


def _record(
    run_dir: Path, record: dict[str, Any], status: str, failure: dict[str, Any]
) -> dict[str, Any]:
    """Write down what became of a run that could not do so itself."""
    run_record.free_reserve(run_dir)
    record = record | {"status": status, "failure": failure}
    try:
        run_record.write(run_dir, record)
    except OSError as error:
        record["failure"] = {"class": "disk", "message": f"{run_dir}: {reason(error)}"}
    return record


def _outcome(run_dir: Path, record: dict[str, Any]) -> Outcome:
    failure = record.get("failure") or {}
    message = (failure.get("message") or "").splitlines()
    kind = failure.get("class") or ""
    return Outcome(run_dir, record["status"], message[0] if message else "", kind)


def prepare(
    run: RunConfig, command: str, *, go_on: bool = False, micro_batch: int | None = None
) -> None:
    """Make the run directory ready: config.yaml, command.txt and a result that says `running`.

    What was there is cleared away, unless the run is to `go_on` from its checkpoint.
    """
    run_dir = run.run_dir
    locks = (lock.CLAIM_NAME, lock.RANKS_NAME)
    for old in run_dir.glob(f"{run_record.RANK_FAILURE}*") if go_on else run_dir.iterdir():
        if old.name not in locks and not _of_a_further_rank(old):
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    OmegaConf.save(OmegaConf.create(run_config.to_dict(run)), run_dir / "config.yaml")
    (run_dir / "command.txt").write_text(command + "\n", "utf-8")
    record = {"status": "running"} | run_record.describe(run, run_dir)
    record["run"]["micro_batch"] = micro_batch
    run_record.write(run_dir, record)


# --------------------------------------------------------------------------------- descriptions


def is_same(found: dict[str, Any], run: RunConfig) -> bool:
    """Whether a record is of `run`; one from before contents were recorded is so by identity."""
    of_assets = run_record.get(found, "run.configuration") in (None, naming.configuration(run))
    alike = of_assets and bool(run_record.get(found, "run.identity") == naming.identity(run))
    return alike and _prefix_before(found, run) is None


def _prefix_before(found: dict[str, Any], run: RunConfig) -> str | None:
    """The prefix of a finished record from before `evaluate.prefix`, where today's is another.

    Documents followed EOS then, of whatever model; today they follow BOS where the tokenizer says
    so. What ships with the harness has none.
    """
    model = run.model
    evaluation = found.get("evaluation") or {}
    shipped = model.asset or model.package or model.architecture or matrix_roles.shape_of(model)
    if not evaluation or "prefix" in evaluation or run.evaluate.prefix != "auto" or shipped:
        return None
    from harness.evaluation import prefix
    from harness.models import pretrained

    tokenizer = pretrained.load_tokenizer(model, pretrained.load_config(model))
    return None if prefix.find(tokenizer).name == "eos" else "eos"


def difference(found: dict[str, Any], run: RunConfig) -> str:
    """The keys in which a recorded configuration differs from `run`, with both values."""
    before = run_record.get(found, "run.contents") or {}
    old = _flat(found.get("config") or {})
    old |= {f"contents of {key}": contents.short(value) for key, value in before.items()}
    new = _flat(run_record.settings(run))
    if before:
        new |= {f"contents of {k}": contents.short(v) for k, v in run.contents.items()}
    if prefix := _prefix_before(found, run):
        old["evaluate.prefix"] = prefix
    keys = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    return ", ".join(f"{k}: {old.get(k)} there, {new.get(k)} now" for k in keys[:6]) or "unknown"


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def typed() -> str:
    """The command that the user typed, to be typed again."""
    as_module = Path(sys.argv[0]).name == "__main__.py"
    program = ["python", "-m", "harness"] if as_module else ["harness"]
    return shlex.join([*program, *(TYPED or sys.argv[1:])])
