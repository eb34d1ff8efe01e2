"""The result of a run: its schema, an atomic write, and the collection of many.

`RUN_DIR/result.json` is the truth; tables, reports and trackers are views of it.

Stable keys: status (finished | failed | running), failure.{class, message}, run.name, run.seed,
run.command, method.name, parameters.total, parameters.trainable, memory.peak_bytes,
memory.by_category (bytes), speed.tokens_per_second, speed.train_seconds,
quality.step0.validation.perplexity, quality.validation.perplexity, quality.test.{nll_nats,
num_tokens, perplexity, word_perplexity, bits_per_byte}, environment.{commit, versions, hardware}.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
FILE_NAME = "result.json"
log = logging.getLogger(__name__)


def write(run_dir: Path, result: dict[str, Any]) -> None:
    """Write result.json whole or not at all; NaN and infinity become null, which JSON can hold."""
    text = json.dumps(finite({"schema_version": SCHEMA_VERSION, **result}), indent=2)
    handle, scratch = tempfile.mkstemp(dir=run_dir, prefix=".result-")
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        stream.write(text + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.chmod(scratch, 0o644)
    os.replace(scratch, run_dir / FILE_NAME)


def finite(value: Any) -> Any:
    """`value` with NaN and infinity as None, which JSON can hold."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, float) and value - value != 0:  # NaN and infinity
        return None
    return value


def read(run_dir: Path) -> dict[str, Any] | None:
    """The result in `run_dir`, or None where there is none (yet) or it cannot be read."""
    try:
        result = json.loads((run_dir / FILE_NAME).read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read: %s", run_dir / FILE_NAME, error)
        return None
    if not isinstance(result, dict) or result.get("schema_version") != SCHEMA_VERSION:
        log.warning("%s is not a result of schema version %d", run_dir / FILE_NAME, SCHEMA_VERSION)
        return None
    return result


def collect(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(run directory, result) of every run of an experiment, by name."""
    for path in sorted(folder.glob(f"*/{FILE_NAME}")):
        if (result := read(path.parent)) is not None:
            yield path.parent, result


def get(result: dict[str, Any], path: str) -> Any:
    """The value at a dotted path, or None."""
    value: Any = result
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value
