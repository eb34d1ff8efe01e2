"""Start the worker of a run: forked from a server, or as ranks by `accelerate launch`.

The server has imported torch and all the rest once and has done nothing with it: the second run of
a sweep starts in a hundredth of a second, in a process as fresh as the first one's.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import ModuleType
from typing import Any

from harness.config import paths
from harness.config.run_config import RunConfig
from harness.system import lock, scratch
from harness.system.machine import die_with_parent

# glibc gives large blocks back to the system when they are freed and asks for them again: each
# training step would fault in a gigabyte of pages anew. Kept, and in huge pages, a step of GPT-2 in
# bf16 is 13 % faster (experiments/bench/training_step). Other C libraries do not read this.
ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296"
    ":glibc.malloc.trim_threshold=4294967296"
}
# Ranks that divide a model gather and free blocks all the time, and kept memory fills with holes:
# for LoRA of 40 M parameters in two, a rank's peak on a CPU is 1.5 GiB, and 0.8 GiB where large
# blocks go back, at twice the time. By hand, it is for whoever launches to set this.
SHARDED_ALLOCATOR = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1048576"}
# A thread of OpenMP that waits for the others spins, which is cheap as long as every thread has a
# core: two runs on the cores of one take not twice but eleven times as long. With a short spin they
# take twice as long, and a run by itself as long as before.
THREADS = {"GOMP_SPINCOUNT": "1000"}
SERVER_GONE = 255  # multiprocessing's exit status of a process whose server was killed


def _work(run: RunConfig, claim: lock.Claim, environment: dict[str, str], quiet: bool) -> None:
    """In the forked process: the worker, which stops if its controller is gone."""
    from harness.runs import worker

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
    process: ForkServerProcess = multiprocessing.get_context("forkserver").Process(
        target=_work, args=(run, claim, _device(run.launch.cores is not None), quiet)
    )
    for _ in range(10):
        try:
            _start(process)
            break
        except (EOFError, ConnectionError) as error:  # the server was killed before it was ready
            gone = error
            time.sleep(0.2)  # until the system says so: then a new one is started
    else:
        raise gone
    claim.note(worker=process.pid)

    def wait() -> int:
        process.join()
        assert process.pid is not None and process.exitcode is not None
        while process.exitcode == SERVER_GONE and _is_alive(process.pid):
            time.sleep(0.1)  # the run goes on; its result tells how it ended
        return process.exitcode

    return process, wait


def _start(process: ForkServerProcess) -> None:
    """Fork from the server, which is started the first time.

    A Ctrl-C is for the controller and the workers: the server is deaf to it from its first import
    on, and a worker hears it when it is ready to (`Stop.listen`).
    """
    with _our_multiprocessing():
        resource_tracker.ensure_running()  # first, since it unblocks the signal
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            _server.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        process.start()


_server = forkserver.ForkServer()  # multiprocessing's own is the caller's
_server.set_forkserver_preload(["harness.runs.forkserver"])
_starting = threading.Lock()  # what starting a worker replaces for a while is the process's


@contextmanager
def _our_multiprocessing() -> Iterator[None]:
    """multiprocessing as workers are started by it; afterwards all is as the caller has it.

    It has one server, one start method and one list of modules a process, and asks for them by
    name. The workers' server is another one, at a socket whose path is short enough, with an
    environment of its own; the caller's start method may be one that it does not know (joblib's);
    and the caller's script, which would be run again in every worker, is hidden from it. A second
    thread waits: it would take what it finds for the caller's.
    """
    with _starting:
        environment, script = dict(os.environ), sys.modules["__main__"]
        method = multiprocessing.get_start_method(allow_none=True)
        sockets: Any = connection  # whose stubs leave this function out
        connect, address = forkserver.connect_to_new_process, sockets.arbitrary_address
        try:
            os.environ.update(_environment())
            sys.modules["__main__"] = ModuleType("__main__")
            multiprocessing.set_start_method("forkserver", force=True)
            forkserver.connect_to_new_process = _server.connect_to_new_process
            sockets.arbitrary_address = lambda family: str(scratch.socket_path())
            yield
        finally:
            forkserver.connect_to_new_process, sockets.arbitrary_address = connect, address
            multiprocessing.set_start_method(method, force=True)
            sys.modules["__main__"] = script
            os.environ.clear()
            os.environ.update(environment)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def accelerate(run: RunConfig, claim: lock.Claim) -> tuple[Any, Callable[[], int]]:
    """The launcher of a run of several ranks, and how to wait for its exit status."""
    name = run.launch.accelerate or ("ddp" if _gpus() else "cpu")
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(paths.CONF_DIR / "accelerate" / f"{name}.yaml")),
        *("--num_processes", str(run.launch.num_processes)),
        *("--main_process_port", "0"),  # a free one: several runs of a sweep may be under way
        *("-m", "harness.runs.worker", str(run.run_dir)),
    ]
    with (run.run_dir / "launch.txt").open("w") as stream:
        process = subprocess.Popen(
            command,
            env=_environment(sharded=run.launch.sharded)
            | dict(os.environ)
            | {"PYTHONPATH": _python_path()},
            stdout=stream,
            stderr=subprocess.STDOUT,
            pass_fds=(claim.descriptor,),
            preexec_fn=die_with_parent,
            start_new_session=True,  # a terminal's Ctrl-C comes from us, once (`wait_for`)
        )
    claim.note(worker=process.pid)

    def wait() -> int:
        code = process.wait()
        lock.ranks_at(run.run_dir, patience_seconds=60)  # they are being killed by the kernel
        return code

    return process, wait


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


def _environment(*, sharded: bool = False) -> dict[str, str]:
    """What a worker gets beyond the controller's environment."""
    own = {"PYTHONPATH": _python_path(), "TOKENIZERS_PARALLELISM": "true"}
    tuned = (SHARDED_ALLOCATOR if sharded else ALLOCATOR) | THREADS
    return {k: v for k, v in tuned.items() if k not in os.environ} | own


def _python_path() -> str:
    """The package's parent folder first, so that the worker runs the same sources."""
    parts = [str(paths.REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(part for part in parts if part)


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    matches = [re.fullmatch(r"nvidia(\d+)", path.name) for path in Path("/dev").glob("nvidia*")]
    return sorted(match[1] for match in matches if match)


def _device(divided: bool) -> dict[str, str]:
    """Where runs divide a machine with several GPUs among them: one of them for this run."""
    gpus = _gpus()
    if not divided or len(gpus) < 2:
        return {}
    return {"CUDA_VISIBLE_DEVICES": gpus[lock.slot(len(gpus))]}
