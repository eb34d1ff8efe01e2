"""Start one run: its directory, whether it is done already, its worker, and what became of it."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from harness import config, results
from harness.config import ConfigError, RunConfig
from harness.worker import describe

# glibc gives large blocks back to the system when they are freed and asks for them again: each
# training step would fault in a gigabyte of pages anew. Kept, and in huge pages, a step of GPT-2 in
# bf16 is 13 % faster (experiments/bench/training_step). Other C libraries do not read this.
ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296"
    ":glibc.malloc.trim_threshold=4294967296"
}


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    run_dir: Path
    status: str  # finished | skipped | failed
    exit_code: int = 0
    message: str = ""

    def summary(self) -> str:
        """One line for the terminal."""
        if self.status == "failed":
            return "failed"  # the reason is on stderr already, and under the table of a sweep
        result = results.read(self.run_dir) or {}
        perplexity = results.get(result, "quality.test.perplexity")
        seconds = result.get("wall_seconds") or 0
        done = "already finished" if self.status == "skipped" else f"finished in {seconds:.0f} s"
        return f"{done}, test perplexity {perplexity:.2f}" if perplexity else done


def launch(run: RunConfig, command: str) -> Outcome:
    """Run `run` in a fresh process and wait for it; a finished one is not run again.

    Raises:
        ConfigError: the directory cannot be written, or holds another configuration's run.
    """
    run_dir = run.run_dir
    found = results.read(run_dir)
    if found is not None and found["status"] == "finished" and not run.rerun:
        if results.get(found, "run.identity") == config.identity(run):
            return Outcome(run_dir, "skipped")
        raise ConfigError(
            f"{run_dir} holds a finished run of another configuration ({difference(found, run)}): "
            "choose another run_name, or rerun=true to replace it"
        )
    prepare(run, command)
    worker = subprocess.Popen(
        [sys.executable, "-m", "harness.worker", str(run_dir)],
        env=ALLOCATOR
        | os.environ
        | {"PYTHONPATH": _python_path(), "TOKENIZERS_PARALLELISM": "true"},
    )
    try:
        code = worker.wait()
    except KeyboardInterrupt:  # Ctrl-C, which the worker has seen too, or a SIGTERM to us alone
        worker.terminate()
        try:
            worker.wait(timeout=20)  # it writes down that it was interrupted
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
        raise
    if code == 0:
        return Outcome(run_dir, "finished")
    record = results.read(run_dir)
    if record is None or record["status"] == "running":  # it died without a word
        reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        failure = {
            "class": "killed" if code < 0 else "error",
            "message": f"the worker was {reason}",
        }
        record = (record or {}) | {"status": "failed", "failure": failure}
        results.write(run_dir, record)
        print(f"error: {failure['message']} (see {run_dir / 'log.txt'})", file=sys.stderr)
    return Outcome(run_dir, "failed", code, results.get(record, "failure.message") or "")


def prepare(run: RunConfig, command: str) -> None:
    """Make the run directory anew: config.yaml, command.txt and a result that says `running`."""
    run_dir = run.run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        for old in run_dir.iterdir():  # of a run that is made again
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        OmegaConf.save(OmegaConf.create(config.to_dict(run)), run_dir / "config.yaml")
        (run_dir / "command.txt").write_text(command + "\n", "utf-8")
        results.write(run_dir, {"status": "running"} | describe(run, run_dir))
    except OSError as error:
        raise ConfigError(
            f"outputs_dir={run.outputs_dir}: cannot write {run_dir} ({error.strerror})"
        ) from error


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


def _python_path() -> str:
    """The package's parent folder first, so that the worker runs the same sources."""
    parts = [str(config.REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(part for part in parts if part)
