"""What can be known to be wrong of a method's own fields without torch, the text or the model."""

from __future__ import annotations

import math
from typing import Any

from harness.config import rank_schedule
from harness.config.errors import ConfigError, require
from harness.config.method_schema import (
    AdaloraMethod,
    FullMethod,
    LoraMethod,
    PeftMethod,
    SvdMethod,
)
from harness.config.run_config import RunConfig

FROM_TEXT = ("eva", "corda", "lora_ga")  # of method.init: starts that read training text
CONFIG_OF = {f"{init}_config": init for init in (*FROM_TEXT, "loftq")}  # LoraConfig's fields


def validate_method(run: RunConfig) -> None:
    """Check the method's own numbers, and what it asks of the model and the precision.

    Raises:
        ConfigError: naming the key.
    """
    method = run.method
    if run.model.frozen_dtype == "bf16" and run.train.precision == "fp32":
        raise ConfigError(
            "model.frozen_dtype=bf16 with train.precision=fp32: fp32 products need fp32 weights; "
            "set train.precision=bf16"
        )
    if isinstance(method, FullMethod) and method.train_only:
        empty = [entry for entry in method.train_only if not entry.strip()]
        require(not empty, "method.train_only", method.train_only, "names that are not empty")
        if run.model.frozen_dtype == "bf16":
            raise ConfigError(
                "model.frozen_dtype=bf16 with method.train_only: the base is loaded in one dtype, "
                "and what trains of it must be fp32; set model.frozen_dtype=fp32"
            )
    if isinstance(method, LoraMethod):
        _lora(method)
    if isinstance(method, AdaloraMethod):
        _adalora(run, method)
        if run.train.ema:
            raise ConfigError(
                f"method=adalora with train.ema={run.train.ema:g}: triplets that are cut would "
                "live on in the average; set train.ema=null"
            )
    if isinstance(method, SvdMethod) and method.energy is not None:
        require(0 < method.energy <= 1, "method.energy", method.energy, "a share in (0, 1]")
        if method.rank is not None:
            raise ConfigError(
                f"method.rank={method.rank} and method.energy={method.energy} are "
                "alternatives: set one of them to null"
            )
    if isinstance(method, PeftMethod) and method.peft_type in ("???", ""):
        raise ConfigError("method=peft needs method.peft_type, e.g. method.peft_type=IA3")


def _lora(method: LoraMethod) -> None:
    require(method.r >= 1, "method.r", method.r, "a rank of 1 or more")
    require(0 <= method.dropout < 1, "method.dropout", method.dropout, "in [0, 1)")
    require(0 < method.lora_alpha < math.inf, "method.alpha", method.alpha, "a number above 0")
    for key, rank in method.rank_pattern.items():
        require(_whole(rank) and rank >= 1, f"method.rank_pattern.{key}", rank, "a rank: 1 or more")
    for key, alpha in method.alpha_pattern.items():
        fine = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        fine = fine and 0 < alpha < math.inf
        require(fine, f"method.alpha_pattern.{key}", alpha, "a number above 0")
    for name in ("rank_pattern", "alpha_pattern"):
        if getattr(method, name) and name in method.fields:
            raise ConfigError(f"method.fields.{name}: method.{name} says it already; leave it out")
    _start(method)


def _start(method: LoraMethod) -> None:
    """A start that reads training text, and the fields that go with it."""
    init, reads = method.init, method.init in FROM_TEXT
    usual = LoraMethod("lora").start_sequences
    count = method.start_sequences
    require(count >= 1, "method.start_sequences", count, "1 or more sequences of training text")
    if not reads and count != usual:
        raise ConfigError(
            f"method.start_sequences={count}: method.init={init} reads no training text; leave it "
            f"out, or set method.init to one of {', '.join(FROM_TEXT)}"
        )
    for name, start in CONFIG_OF.items():
        if method.fields.get(name) and start in FROM_TEXT and init != start:
            raise ConfigError(
                f"method.fields.{name}: it is for method.init={start}, and this is "
                f"method.init={init}; leave it out"
            )
    files: dict[str, Any] = method.fields.get("corda_config") or {}
    for name in ("cache_file", "covariance_file"):
        if isinstance(files, dict) and files.get(name):
            raise ConfigError(
                f"method.fields.corda_config.{name}: what it holds would stand in for the run's "
                "own training text; leave it out"
            )
    if init in ("corda", "lora_ga"):
        # PEFT saves such an adapter as the difference of two LoRAs, and nothing beside them.
        beside = {
            "method.use_dora": method.use_dora,
            "method.bias": method.bias != "none" and method.bias,
            "method.fields.modules_to_save": method.fields.get("modules_to_save"),
            "method.fields.trainable_token_indices": method.fields.get("trainable_token_indices"),
        }
        for key, value in beside.items():
            if value:
                shown = str(value).lower() if isinstance(value, bool) else value
                raise ConfigError(
                    f"method.init={init} with {key}={shown}: it takes its start off the base's "
                    "weights, so PEFT saves A and B alone, as their difference from the start; "
                    "leave one of them out"
                )
        patterns = ("rank_pattern", "alpha_pattern")
        used = [p for p in patterns if getattr(method, p) or method.fields.get(p)]
        if method.use_rslora and used:
            raise ConfigError(
                f"method.init={init} with method.use_rslora=true and method.{used[0]}: PEFT cannot "
                "save such an adapter as a plain LoRA; leave one of them out"
            )


def _adalora(run: RunConfig, method: AdaloraMethod) -> None:
    rank_schedule.check(method)
    planned = run.train.epochs is None or run.train.steps > 1  # or else its steps come later
    if planned and run.train.steps:
        rank_schedule.schedule_of(method, run.train.steps)
    why = "ranks are cut on a schedule over train.steps, and the run might end before"
    ends = {
        "train.max_seconds": run.train.max_seconds,
        "train.early_stopping.patience": run.train.early_stopping.patience,
    }
    for key, value in ends.items():
        if value is not None:
            raise ConfigError(f"{key}={value} with method=adalora: {why}; set {key}=null")
    if run.launch.sharded:
        raise ConfigError(
            "launch.accelerate=fsdp with method=adalora: it reads whole gradients after a step, of "
            "which a rank has a part; set launch.accelerate=ddp"
        )
    if run.optimizer.name == "schedule_free":
        raise ConfigError(
            "optimizer=schedule_free with method=adalora: it evaluates an average of the weights, "
            "in which ranks that were cut come back; choose another optimizer"
        )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
