"""When training ends: after its steps, or before them.

train.steps, train.epochs      the length of the run; epochs become steps when it is composed
train.max_flops                a cap that is known beforehand: the schedule ends with it
train.max_seconds              a cap that is not: the run ends wherever its schedule is by then
train.early_stopping           validation no longer improves

Seconds and FLOPs are those of optimizer steps; evaluation is not in them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from harness.config.errors import ConfigError
from harness.config.run_config import RunConfig
from harness.config.schema import EarlyStopping

DEFAULT_STEPS = 100


def stops_early(validations: Sequence[float], cfg: EarlyStopping) -> bool:
    """Whether the last `patience` of these validation nll, in order, brought no improvement.

    An improvement is an nll below the lowest so far by more than `min_delta`, nats per token. What
    is not finite is none. The first, before training, counts as the lowest to begin with.
    """
    if cfg.patience is None:
        return False
    lowest, since = math.inf, 0
    for nll in validations:
        if nll < lowest - cfg.min_delta:
            lowest, since = nll, 0
        else:
            since += 1
    return since >= cfg.patience


def asked_steps(train: dict[str, Any], *, planned: bool) -> Any:
    """`train.steps` of a configuration: as given, or the default; 1 until epochs are steps.

    A `planned` run has had its epochs turned into steps, and has both.

    Raises:
        ConfigError: both are given.
    """
    steps, epochs = train.get("steps"), train.get("epochs")
    if steps is None:
        return DEFAULT_STEPS if epochs is None else 1
    if epochs is not None and not planned:
        raise ConfigError(
            f"train.steps={steps} and train.epochs={epochs}: one of them says how long a run is; "
            "for epochs add train.steps=null"
        )
    return steps  # of whatever type was given, which is checked with the other keys


def within_flops(
    run: RunConfig, flops_per_token: float | None, spent: float | None = 0.0
) -> RunConfig:
    """The run with as many of its steps as `train.max_flops` allows, of which some are `spent`.

    Raises:
        ConfigError: the FLOPs of a step are not known before it, or are more than the cap.
    """
    max_flops = run.train.max_flops
    if max_flops is None or not run.method.trains or not run.train.steps:
        return run
    if not flops_per_token or spent is None:
        raise ConfigError(
            f"train.max_flops={max_flops:g}: what a step of method={run.method.name} takes is not "
            "known before it runs; set train.steps, or train.max_seconds"
        )
    step = flops_per_token * run.train.batch_tokens
    if max_flops - spent < step:
        before = f" after the {spent:.3g} of method.init={getattr(run.method, 'init', '')}"
        raise ConfigError(
            f"train.max_flops={max_flops:g} is less than one optimizer step, {step:.3g}"
            f"{before if spent else ''}"
        )
    steps = min(run.train.steps, int((max_flops - spent) // step))
    return replace(run, train=replace(run.train, steps=steps))


def told(record: Mapping[str, Any]) -> str | None:
    """Why and where a run of result.json ended before its steps, in words; None if it did not."""
    why = (record.get("run") or {}).get("ended_by")
    if why in (None, "steps"):
        return None
    done, planned = record["speed"]["steps"], record["config"]["train"]["steps"]
    return f"train.{why} ended it after {done} of {planned} steps"
