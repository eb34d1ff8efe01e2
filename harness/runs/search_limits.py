"""What candidates of a search are compared by, and what each may need at most by its plan."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.config.errors import ConfigError, nearest
from harness.config.run_config import RunConfig
from harness.config.sizes import parse_bytes
from harness.results import run_record

# Objective -> the number of result.json; the first is measured at every rung.
OBJECTIVES = {
    "validation.nll": "",  # nats per token: the lowest so far, as the best checkpoint has it
    "parameters.trainable": "parameters.trainable",
    "memory.peak_bytes": "memory.peak_bytes",
    "speed.train_seconds": "speed.train_seconds",
    "saved.bytes": "",  # of the adapter's files, or of the model's where it leaves no adapter
}
KEYS = ("memory.peak_bytes", "parameters.trainable", "parameters.total")


@dataclass(frozen=True)
class Limit:
    """The most that a candidate may need of something, by its plan."""

    key: str  # one of KEYS; memory is the most of training and evaluation, as `harness plan` marks
    most: int

    def __str__(self) -> str:
        return f"{self.key} <= {self.most:,}"


def read(text: str) -> Limit:
    """`memory.peak_bytes<=8GiB`.

    Raises:
        ConfigError: another form, or something that no plan knows.
    """
    match = re.fullmatch(r"\s*([\w.]+)\s*<=\s*(\S.*?)\s*", text)
    if match is None:
        raise ConfigError(
            f"hydra.sweeper.constraints: {text}: expected KEY<=NUMBER, as in "
            "memory.peak_bytes<=8GiB"
        )
    key, value = match.groups()
    if key not in KEYS:
        raise ConfigError(f"hydra.sweeper.constraints: {key}: {nearest(key, KEYS)}")
    return Limit(key, parse_bytes(value, f"hydra.sweeper.constraints: {key}"))


def measured(run_dir: Path, objective: str) -> float | None:
    """What a finished run has of an objective beside validation; None where it has not."""
    if objective == "saved.bytes":
        folders = [run_dir / name for name in ("adapter", "model") if (run_dir / name).is_dir()]
        files = [path for path in folders[0].rglob("*") if path.is_file()] if folders else []
        return float(sum(path.stat().st_size for path in files)) if files else None
    value = run_record.get(run_record.read(run_dir) or {}, OBJECTIVES[objective])
    return None if value is None else float(value)


def why_not(run: RunConfig, limits: Sequence[Limit]) -> str | None:
    """The first limit that the plan of `run` is above, in words; None where it is within all.

    Raises:
        ConfigError: only a run can tell what is needed.
    """
    if not limits:
        return None
    from harness.runs import estimate, evaluation_batches  # torch: seconds to import

    planned, model_config, accelerator = estimate.setting(run)
    batch = evaluation_batches.largest_batch(run, model_config)
    prediction = estimate.predict(planned, model_config, accelerator, batch)
    if prediction is None:
        raise ConfigError(
            f"hydra.sweeper.constraints: what {run.run_dir.name} needs is not known before it runs"
        )
    needs = {
        "memory.peak_bytes": prediction.needed_bytes,
        "parameters.trainable": prediction.parameters.trainable,
        "parameters.total": prediction.parameters.total,
    }
    for limit in limits:
        if needs[limit.key] > limit.most:
            return f"{limit.key}={needs[limit.key]:,} is above {limit.most:,}"
    return None
