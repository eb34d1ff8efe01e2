"""The result of a run: its schema, an atomic write, and the collection of many.

`RUN_DIR/result.json` is the truth; tables, reports and trackers are views of it.

`harness.results.schema` has every key with its type and unit, as conf/RESULT.md shows them, and
`harness.results.record_types` the types of what is read.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from harness.config import labels, naming, peft_fields, renamed, run_config
from harness.config.method_schema import LoraMethod
from harness.config.run_config import RunConfig
from harness.results.record_types import Record
from harness.system.atomic import write_atomically

SCHEMA_VERSION = 2
FILE_NAME = "result.json"
# Of a run that is not finished: a folder, the weights that validation has chosen so far, room for
# the result on a disk that fills, and a folder with the adapter as it started.
CHECKPOINTS, BEST, RESERVE = "checkpoints", "best.safetensors", ".reserve"
INITIAL = "initial_adapter"
START = "start.safetensors"  # what a start of LoRA has read off training text
RANK_FAILURE = "failure-rank-"  # what a rank but the first has to say
RANK_LOG = "log-rank-"  # and its log
INTERRUPTED = {"class": "interrupted", "message": "interrupted"}
RETRYABLE = (None, "config", "killed")  # classes of failure that a sweep tries again unasked
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
METRICS_NAME = "metrics.jsonl"
SWEEP_NAME = "sweep.json"
log = logging.getLogger(__name__)


def write(run_dir: Path, result: Mapping[str, Any]) -> None:
    """Write result.json whole or not at all; NaN and infinity become null, which JSON can hold."""
    text = json.dumps(finite({"schema_version": SCHEMA_VERSION, **result}), indent=2)
    write_atomically(run_dir / FILE_NAME, text + "\n")


def describe(run: RunConfig, run_dir: Path) -> dict[str, Any]:
    """Return the record of a run before anything is loaded: identity, command, config."""
    command = run_dir / "command.txt"
    return {
        "run": {
            "name": naming.run_name(run),
            "experiment": run.experiment_name,
            "seed": run.seed,
            "identity": naming.identity(run),
            "configuration": naming.configuration(run),
            "contents": dict(run.contents),
            "command": command.read_text("utf-8").strip() if command.is_file() else None,
        },
        "config": settings(run),
        "model": {"name": labels.of_model(run.model)},
        "data": {"name": labels.of_text(run.data)},
        "method": describe_method(run),
    }


def settings(run: RunConfig) -> dict[str, Any]:
    """The configuration as plain containers, without the contents that `run.contents` has."""
    return {key: value for key, value in run_config.to_dict(run).items() if key != "contents"}


def describe_method(run: RunConfig) -> dict[str, Any]:
    """What tables show of the method; what it does not have is None."""
    method = run.method
    fields = {key: getattr(method, key, None) for key in ("r", "train", "residual")}
    rank = getattr(method, "kept", fields["r"])
    if isinstance(method, LoraMethod):
        rank = naming.with_pattern(method)
    return fields | {
        "name": method.name,
        "label": naming.label(method),
        "rank": rank and str(rank),  # r of LoRA, k of the SVD methods (or "full", or a share)
        "alpha": getattr(method, "lora_alpha", None),
        "targets": labels.of_targets(run) if _adapts_targets(run) else None,
        "lr": run.train.lr if method.trains else None,
        "lr_from": run.train.lr_from,
        "deterministic": naming.is_deterministic(run),
    }


def _adapts_targets(run: RunConfig) -> bool:
    """Whether `targets` says what the method adapts: prompts and the like adapt no matrices."""
    kind = getattr(run.method, "peft_type", None)
    return run.method.takes_targets and (kind is None or peft_fields.takes_matrices(kind))


def finite(value: Any) -> Any:
    """Return `value` with NaN and infinity as None, since JSON has no words for them."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, float) and value - value != 0:  # NaN and infinity
        return None
    return value


class Metrics:
    """RUN_DIR/metrics.jsonl, one row for a step and one for a validation.

    A run that goes on after `step`, with validation read up to `validated`, keeps the rows so far.
    """

    def __init__(self, run_dir: Path, step: int, validated: int, *, write: bool = True) -> None:
        path = run_dir / METRICS_NAME
        self._stream = None
        if not write:
            return
        kept = [
            row
            for row in (read_metrics(run_dir) if step else ())
            if row["step"] <= _last(row, step, validated)
        ]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._stream = path.open("a", encoding="utf-8", buffering=1)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._stream is not None:
            self._stream.close()

    def log(self, row: dict[str, Any]) -> None:
        """Add a row to the metrics, in which NaN and infinity become null."""
        if self._stream is not None:
            self._stream.write(json.dumps(finite(row)) + "\n")

    def sync(self) -> None:
        """Bring the rows that were logged to the disk, past the system's own cache."""
        if self._stream is not None:
            os.fsync(self._stream.fileno())


def _last(row: dict[str, Any], step: int, validated: int) -> int:
    """The last step of which a row of this kind is true of a run that goes on after `step`."""
    return step if "train/nll" in row else validated if "eval/validation/nll" in row else 0


def documents_name(name: str, when: str = "after") -> str:
    """File of nats per document on a split, or on a further text `before` or `after` adaptation."""
    return f"documents-{name}{'-before' if when == 'before' else ''}.parquet"


def can_resume(run_dir: Path) -> bool:
    """Return whether a run was cut after it had written a checkpoint."""
    return any((run_dir / CHECKPOINTS).glob("[0-9]*"))


def clear(run_dir: Path) -> None:
    """Delete the files that only an unfinished run needs, once it is finished."""
    free_reserve(run_dir)
    for name in (BEST, CHECKPOINTS, INITIAL, START):
        path = run_dir / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def keep_reserve(run_dir: Path) -> None:
    """Keep room on the disk for the result, in case that the disk fills."""
    (run_dir / RESERVE).write_bytes(b"-" * 2**18)


def free_reserve(run_dir: Path) -> None:
    """Give the room that `keep_reserve` has kept back to the disk."""
    with suppress(OSError):
        (run_dir / RESERVE).unlink(missing_ok=True)


def write_rank_failure(run_dir: Path, rank: int, failure: dict[str, Any]) -> None:
    """What ended a rank that does not write the result; ranks that others ended say nothing."""
    if failure["class"] not in ("killed", "interrupted"):
        text = json.dumps({"time": time.time()} | failure)
        write_atomically(run_dir / f"{RANK_FAILURE}{rank}.json", text)


def rank_failures(run_dir: Path) -> list[dict[str, Any]]:
    """Return what ended the ranks of this attempt, the earliest failure first."""
    failures = []
    for path in run_dir.glob(f"{RANK_FAILURE}*.json"):
        with suppress(OSError, ValueError):
            failures.append(json.loads(path.read_text("utf-8")))
    return sorted(failures, key=lambda failure: float(failure.pop("time")))


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without a last line that was cut."""
    rows = []
    with suppress(FileNotFoundError), (run_dir / METRICS_NAME).open(encoding="utf-8") as stream:
        for line in stream:
            with suppress(ValueError):
                rows.append(json.loads(line))
    return rows


def last_metrics(run_dir: Path) -> dict[str, Any]:
    """The last whole row of metrics.jsonl, read from its end; {} where there is none."""
    try:
        with (run_dir / METRICS_NAME).open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - 4096))
            lines = stream.read().splitlines(keepends=True)
    except OSError:
        return {}
    for line in reversed(lines):
        if line.endswith(b"\n"):
            with suppress(ValueError):
                return dict(json.loads(line))
    return {}


def tail(path: Path, lines: int = 20) -> list[str]:
    """Return the last lines of a log, to be quoted in a message."""
    try:
        return path.read_text("utf-8", errors="replace").splitlines()[-lines:]
    except OSError:
        return []


def read(run_dir: Path) -> Record | None:
    """The result in `run_dir`, or None where there is none (yet) or it cannot be read."""
    try:
        result = json.loads((run_dir / FILE_NAME).read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read: %s", run_dir / FILE_NAME, error)
        return None
    version = result.get("schema_version") if isinstance(result, dict) else None
    if version not in range(1, SCHEMA_VERSION + 1):
        log.warning(
            "%s has schema version %s, and this harness reads 1 to %d",
            run_dir / FILE_NAME, version, SCHEMA_VERSION,
        )  # fmt: skip
        return None
    return upgraded(result)


def upgraded(record: Record) -> Record:
    """Return a record of an older schema version as one of today's; today's is returned as it is.

    Version 1 has the old names of `harness.config.renamed`, and `evaluation.context`; `saved` may
    be one folder.
    """
    if record["schema_version"] == SCHEMA_VERSION:
        return record
    current: dict[str, Any] = {**record, "schema_version": SCHEMA_VERSION}
    if "config" in current:
        current["config"] = renamed.in_config(current["config"])
    if "context" in (evaluation := dict(current.get("evaluation") or {})):
        evaluation["context_length"] = evaluation.pop("context")
        current["evaluation"] = evaluation
    if isinstance(saved := current.get("saved"), str):
        current["saved"] = [saved]
    return cast(Record, current)


def new_path(path: str) -> str:
    """Return the dotted path that a number of a record has today."""
    if path.startswith("config."):
        return f"config.{renamed.new_key(path.removeprefix('config.'))}"
    return {"evaluation.context": "evaluation.context_length"}.get(path, path)


def write_sweep(folder: Path, runs: dict[str, str], command: str | None = None) -> None:
    """Write down which runs a sweep is of, by directory, and why one was refused, or "".

    `command` is kept as it was typed, with its runs, beside those of earlier sweeps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    commands = [known for known in sweep_commands(folder) if known["command"] != command]
    if command is not None:
        commands.append({"command": command, "runs": list(runs)})
    sweep = {"runs": runs} | ({"commands": commands} if commands else {})
    write_atomically(folder / SWEEP_NAME, json.dumps(sweep, indent=1) + "\n")


def read_sweep(folder: Path) -> dict[str, str]:
    """The runs of the last sweep into `folder`, as written; {} where there was none."""
    return dict(_sweep(folder).get("runs") or {})


def sweep_commands(folder: Path) -> list[dict[str, Any]]:
    """The commands of the sweeps into `folder`, {command, runs}, the last one last."""
    return list(_sweep(folder).get("commands") or [])


def _sweep(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / SWEEP_NAME).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def collect(folder: Path) -> Iterator[tuple[Path, Record]]:
    """(run directory, result) of every run of an experiment, by name."""
    for path in sorted(folder.glob(f"*/{FILE_NAME}")):
        if (result := read(path.parent)) is not None:
            yield path.parent, result


def get(result: Mapping[str, Any], path: str) -> Any:
    """Return the value at a dotted path in a record, or None where it has none."""
    value: Any = result
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def command_line(arguments: list[str]) -> str:
    """Return the command line that passes these arguments to the program."""
    return shlex.join(["harness", *arguments])


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted keys, for trackers whose parameters are a flat table; lists as JSON."""
    by_key: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            by_key |= flat(value, f"{name}.")
        else:
            plain = isinstance(value, str | int | float) or value is None
            by_key[name] = value if plain else json.dumps(value)
    return by_key
