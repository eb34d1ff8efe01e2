"""What an optimizer that is made for LoRA asks of the adapter, and what it freezes of it."""

from __future__ import annotations

import re

import peft
from torch import nn

from harness.config.errors import ConfigError
from harness.config.run_config import RunConfig

PAIR = re.compile(r"(.+)\.lora_(A|B)\.(.+)\.weight")


def fit(model: nn.Module, run: RunConfig) -> None:
    """Freeze what `run.optimizer` leaves alone (LoRA-FA: every A) in an adapted model.

    Raises:
        ConfigError: the adapter has not the matrices that the optimizer is made for.
    """
    name = run.optimizer.name
    if not run.method.trains or name not in ("lora_plus", "lora_fa", "riemannian"):
        return
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    firsts = {n for n in trains if ".lora_A." in n}
    seconds = {n for n in trains if ".lora_B." in n or ".lora_embedding_B." in n}
    if not isinstance(model, peft.PeftModel) or not seconds:
        _refuse(run, "it is for LoRA, and no lora_B trains")
    if name == "riemannian" and not firsts:
        _refuse(run, "it is for LoRA's A and B together, and no lora_A trains")
    if name == "lora_fa":
        _freeze_first_factors(model, run, trains)


def _freeze_first_factors(model: nn.Module, run: RunConfig, trains: set[str]) -> None:
    """LoRA-FA's A. PEFT pairs what has lora in its name two by two, so that all must be pairs."""
    parameters = dict(model.named_parameters())
    for name in parameters:
        if "lora" not in name:
            continue
        match = PAIR.fullmatch(name)
        other = match and f"{match[1]}.lora_{'B' if match[2] == 'A' else 'A'}.{match[3]}.weight"
        if other not in parameters:
            _refuse(
                run, f"it steps LoRA's A and B alone, and here is {name}, which is no such pair"
            )
        if match and match[2] == "B" and name not in trains:
            _refuse(run, f"it trains B, and {name} does not train")
    for name, parameter in parameters.items():
        if ".lora_A." in name:
            parameter.requires_grad_(False)


def _refuse(run: RunConfig, why: str) -> None:
    method = getattr(run.method, "peft_type", None) or run.method.name
    raise ConfigError(f"optimizer={run.optimizer.name} with method={method}: {why}")
