"""What of an optimizer can be known to be wrong without torch or the model."""

from __future__ import annotations

import importlib.util
import math
from importlib.metadata import version

from packaging.version import Version

from harness.config.errors import ConfigError, nearest, require
from harness.config.method_schema import LoraMethod, PeftMethod
from harness.config.optimizers import (
    Adamw8bitOptimizer,
    LoraPlusOptimizer,
    MuonOptimizer,
    RiemannianOptimizer,
    ScheduleFreeOptimizer,
    SgdOptimizer,
)
from harness.config.run_config import RunConfig
from harness.config.schema import TrainConfig, defaults

OF_LORA = {  # and what of LoRA they step
    "lora_plus": "B with a rate of its own",
    "lora_fa": "B alone",
    "riemannian": "A and B together",
}
MUON_SINCE = "2.9"  # of torch
DIVIDED = ("adamw", "sgd", "lora_plus")  # which step every element by itself


def validate_optimizer(run: RunConfig) -> None:
    """The optimizer's own numbers, what it needs, and what of `train` it does not have."""
    if not run.method.trains:
        return
    _validate_unused(run)
    _validate_numbers(run)
    _validate_groups(run)
    _validate_packages(run)
    _validate_fit(run)
    if run.launch.sharded and run.optimizer.name not in DIVIDED:
        raise ConfigError(
            f"launch.accelerate=fsdp: optimizer={run.optimizer.name} reads whole matrices, or is "
            f"untried, where a rank has a part of them; choose one of {', '.join(DIVIDED)}, or "
            "launch.accelerate=ddp"
        )


def _validate_unused(run: RunConfig) -> None:
    """Hyperparameters of `train` that were set and the optimizer does not have."""
    usual = defaults(TrainConfig)
    for key in ("beta1", "beta2", "eps", "weight_decay"):
        value = getattr(run.train, key)
        if key not in run.optimizer.shared and value != usual[key]:
            raise ConfigError(
                f"train.{key}={value}: optimizer={run.optimizer.name} has no {key}: leave it out"
            )


def _validate_numbers(run: RunConfig) -> None:
    optimizer = run.optimizer

    def check(key: str, fine: bool, expected: str) -> None:
        require(fine, f"optimizer.{key}", getattr(optimizer, key), expected)

    if isinstance(optimizer, SgdOptimizer):
        check("momentum", 0 <= optimizer.momentum < 1, "a value in [0, 1)")
        check("dampening", 0 <= optimizer.dampening < 1, "a value in [0, 1)")
        plain = optimizer.momentum > 0 and optimizer.dampening == 0
        check(
            "nesterov",
            plain or not optimizer.nesterov,
            "false, or momentum above 0 and dampening 0",
        )
    if isinstance(optimizer, LoraPlusOptimizer):
        for key in ("ratio", "embedding_ratio"):
            check(key, 0 < getattr(optimizer, key) < math.inf, "a finite number above 0")
    if isinstance(optimizer, RiemannianOptimizer):
        check("reg", 0 < optimizer.reg < math.inf, "a finite number above 0")
    if isinstance(optimizer, MuonOptimizer):
        check("momentum", 0 <= optimizer.momentum < 1, "a value in [0, 1)")
        check("ns_steps", 1 <= optimizer.ns_steps < 100, "1 to 99 iterations")
        check("ns_coefficients", len(optimizer.ns_coefficients) == 3, "three numbers")
        check("ns_eps", 0 < optimizer.ns_eps < math.inf, "a finite number above 0")
        check("rest_ratio", 0 < optimizer.rest_ratio < math.inf, "a finite number above 0")
        adjust_lr, choices = optimizer.adjust_lr, ("match_rms_adamw", "original")
        if adjust_lr not in choices:
            raise ConfigError(f"optimizer.adjust_lr={adjust_lr}: {nearest(adjust_lr, choices)}")
    if isinstance(optimizer, Adamw8bitOptimizer):
        check("min_8bit_size", optimizer.min_8bit_size > 0, "1 or more elements")
    if isinstance(optimizer, ScheduleFreeOptimizer):
        check("step_power", 0 <= optimizer.step_power < math.inf, "0 or more")
        check("lr_power", 0 <= optimizer.lr_power < math.inf, "0 or more")
        beta1 = run.train.beta1
        require(0 < beta1 < 1, "train.beta1", beta1, "a value in (0, 1) for schedule_free")
        if run.train.ema:
            raise ConfigError(
                f"optimizer=schedule_free with train.ema={run.train.ema:g}: it evaluates an "
                "average of its own; set train.ema=null"
            )
        if run.train.schedule != "constant":
            raise ConfigError(
                f"optimizer=schedule_free with train.schedule={run.train.schedule}: its average of "
                "weights stands in place of a falling rate; set train.schedule=constant"
            )


def _validate_groups(run: RunConfig) -> None:
    for i, group in enumerate(run.train.groups):
        key = f"train.groups[{i}]"
        require(bool(group.match.strip(". ")), f"{key}.match", group.match, "a name")
        fine = 0 < group.lr_scale < math.inf
        require(fine, f"{key}.lr_scale", group.lr_scale, "a finite number above 0")
        fine = group.weight_decay is None or 0 <= group.weight_decay < math.inf
        require(fine, f"{key}.weight_decay", group.weight_decay, "0 or more, or null")


def _validate_packages(run: RunConfig) -> None:
    name, package = run.optimizer.name, run.optimizer.package
    if package and importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"optimizer={name} needs the package {package}, which is not installed: "
            f"pip install -e '.[{run.optimizer.extra}]' (or pip install {package})"
        )
    if name == "muon" and Version(version("torch")) < Version(MUON_SINCE):
        raise ConfigError(
            f"optimizer=muon needs torch {MUON_SINCE} or newer, and {version('torch')} is "
            f"installed: pip install 'torch>={MUON_SINCE}'"
        )


def _validate_fit(run: RunConfig) -> None:
    """Optimizers for LoRA with methods that have no such factors; the others the model tells."""
    name, method = run.optimizer.name, run.method
    if name not in OF_LORA:
        return
    what = f"optimizer={name} steps LoRA's {OF_LORA[name]}"
    if not isinstance(method, LoraMethod | PeftMethod):
        raise ConfigError(f"{what}, and method={method.name} has no LoRA: choose another optimizer")
    if isinstance(method, LoraMethod) and method.init == "mica":
        raise ConfigError(f"{what}, and of method.init=mica one factor is frozen and one trains: "
                          "choose another optimizer")  # fmt: skip
    if isinstance(method, LoraMethod) and method.use_dora and name == "lora_fa":
        raise ConfigError(f"{what}, and method.use_dora=true trains magnitudes too: leave it out")
