"""The predictions of `estimate` that result.json records, kept in data.cache_dir."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PretrainedConfig

from harness.config.paths import PACKAGE
from harness.config.run_config import RunConfig
from harness.results import environment
from harness.runs.estimate import predict
from harness.runs.evaluation_batches import Shape, full_batch
from harness.system.atomic import write_atomically

# What moves no byte: rates, seeds, the text itself. Sweeps over these ask for one prediction.
_NO_MATTER = {
    "train": ("lr", "lr_from", "rates", "schedule", "warmup", "min_lr_ratio", "beta1", "beta2",
              "eps", "weight_decay", "steps", "threads", "on_oom", "checkpoint_interval", "epochs",
              "max_seconds", "max_flops", "early_stopping", "groups", "cooldown"),
    "evaluate": ("stride", "interval"),
    "method": ("label",),
}  # fmt: skip


def recorded(
    run: RunConfig,
    model_config: PretrainedConfig,
    accelerator: Accelerator,
    evaluated: Shape | None = None,
) -> dict[str, Any] | None:
    """`estimate.predict` as result.json records it, made anew where this code has not made it yet.

    `run` is the run as it was done: with the micro-batch that fitted.
    """
    values: dict[str, Any] = {
        k: v for k, v in vars(run).items() if k in ("model", "targets", "optimizer")
    }
    for section, names in _NO_MATTER.items():
        fields = vars(getattr(run, section))
        values[section] = {k: v for k, v in fields.items() if k not in names}
    values["steps"] = min(run.train.steps, 2)  # none, the first alone, or one after it
    values["evaluated"] = evaluated or full_batch(run, model_config)
    values["blocks"] = [run.data.context_length, run.data.source == "pairs" and run.data.packing]
    values["on"] = [str(accelerator.device), accelerator.num_processes, environment.versions()]
    values["sharded"] = run.launch.sharded
    digest = hashlib.sha256(repr(values).encode())
    for source in sorted(PACKAGE.rglob("*.py")):
        digest.update(source.read_bytes())
    path = Path(run.data.cache_dir) / "predictions" / f"{digest.hexdigest()[:32]}.json"
    with suppress(OSError, ValueError):
        return dict(json.loads(path.read_text("utf-8")))
    prediction = predict(run, model_config, accelerator, evaluated)
    if prediction is None:
        return None
    with suppress(OSError):  # a disk without room costs the next run half a second
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(prediction.as_record()))
    return prediction.as_record()
