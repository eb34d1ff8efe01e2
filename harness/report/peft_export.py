"""Finished runs as results of PEFT's method_comparison, in the format that its app reads.

    harness report --as-peft-results outputs/main

A file a run: run_info, train_info and meta_info, with the keys of its `processing.py`. "test
accuracy" is that of the labels where the run has measured it (evaluate.labels), and else null: a
perplexity is no accuracy. It stands beside it as "test perplexity", which their app leaves out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.config.errors import ConfigError
from harness.results import run_record
from harness.results.record_types import Record
from harness.system import atomic

FOLDER = Path("report") / "peft_results"
PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")
MEMORY = "the peak of live tensors of a training step; no average and no percentile is measured"


def write(folder: Path) -> Iterator[Path]:
    """Write a file for every finished run of an experiment's folder; yields their paths.

    Raises:
        ConfigError: no run there has finished.
    """
    done = [(path, r) for path, r in run_record.collect(folder) if r["status"] == "finished"]
    if not done:
        raise ConfigError(f"{folder} has no finished run")
    out = folder / FOLDER
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.json"):  # of runs that are gone
        old.unlink()
    for run_dir, record in done:
        path = out / f"{run_dir.name}.json"
        text = json.dumps(run_record.finite(result(run_dir, record)), indent=2)
        atomic.write_atomically(path, text)
        yield path


def result(run_dir: Path, record: Record) -> dict[str, Any]:
    """One run's record in their format; what it has not measured is null."""

    def get(path: str) -> Any:
        return run_record.get(record, path)

    adapter = run_dir / "adapter" / "adapter_config.json"
    peft_config = json.loads(adapter.read_text("utf-8")) if adapter.is_file() else None
    peak = get("memory.peak_bytes")
    also = dict(get("quality.also") or {})
    forgetting = None
    if also:
        (text, scores), *_ = also.items()
        forgetting = _nats(scores.get("after")) - _nats(scores.get("before"))
        also = {"forgetting of": text}
    last = {
        "step": get("speed.steps"),
        "test accuracy": get("quality.classification.test.accuracy"),
        "test perplexity": get("quality.test.perplexity"),
        "train loss": _train_loss(run_dir),
        "train samples": get("speed.steps") * _per_step(record),
        "train total tokens": get("speed.tokens"),
        "forgetting": forgetting,
        **also,
    }
    versions = get("environment.versions") or {}
    packages: dict[str, Any] = {}
    for name in PACKAGES:
        packages |= {f"{name}-version": versions.get(name), f"{name}-commit-hash": None}
    return {
        "run_info": {
            "created_at": record["date"],
            "total_time": record["wall_seconds"],
            "experiment_name": f"{get('method.label')}/{run_dir.name}",
            "peft_branch": "main",
            "train_config": {
                "model_id": get("model.source") or get("model.name"),
                "seed": get("run.seed"),
                "max_steps": get("speed.steps"),
                "max_seq_length": get("config.data.context_length"),
                "batch_size": _per_step(record),
                "optimizer_kwargs": {"lr": get("method.lr")},
            },
            "peft_config": peft_config,
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": peak,
            "accelerator_memory_max": peak,
            "accelerator_memory_reserved_99th": peak,
            "train_time": get("speed.train_seconds"),
            "file_size": _saved_bytes(run_dir),
            "num_trainable_params": get("parameters.trainable"),
            "num_total_params": get("parameters.total"),
            "status": "success",
            "metrics": [last],
        },
        "meta_info": {
            "model_info": {"sha": get("model.revision"), "created_at": None},
            "dataset_info": {get("data.name"): {"sha": None, "created_at": None}},
            "package_info": packages,
            "system_info": get("environment.hardware"),
            "accelerator_memory": MEMORY,
        },
    }


def _nats(scores: dict[str, Any] | None) -> float:
    return float(scores["nll_nats"]) / scores["num_tokens"] if scores else float("nan")


def _per_step(record: Record) -> int:
    """Sequences of an optimizer step."""
    config = record["config"]
    return int(config["train"]["batch_tokens"] // config["data"]["context_length"])


def _train_loss(run_dir: Path) -> float | None:
    """Nats per token of the last optimizer step that was logged."""
    return next(
        (
            float(row["train/nll"])
            for row in reversed(run_record.read_metrics(run_dir))
            if row.get("train/nll") is not None
        ),
        None,
    )


def _saved_bytes(run_dir: Path) -> int:
    """What the run saved to be shipped: its adapter, or the whole model."""
    for name in ("adapter", "model"):
        if (folder := run_dir / name).is_dir():
            return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return 0
