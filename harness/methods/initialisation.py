"""What the start of a run's method is made from: training text, or the base's weights."""

from __future__ import annotations

from typing import Any

import peft

from harness.config.method_schema import LoraMethod
from harness.config.run_config import RunConfig
from harness.methods import starts

FROM_WEIGHTS = ("pissa", "corda", "loftq", "mica", "eva", "lora_ga")  # inits that read the weights


def reads_text(run: RunConfig) -> bool:
    """Whether the method starts from training text that is read before step 0."""
    return isinstance(run.method, LoraMethod) and starts.reads_text(run.method.init)


def moves_ranks(run: RunConfig) -> bool:
    """Whether the text says what ranks matrices get, as EVA's does where its rho is not 1."""
    method = run.method
    if not isinstance(method, LoraMethod) or method.init != "eva":
        return False
    given: dict[str, Any] = method.fields.get("eva_config") or {}
    return float(given.get("rho", peft.EvaConfig().rho)) != 1


def reads_weights(init: Any) -> bool:
    """Whether `methods.check` leaves a start out: not what is refused, nor MiCA, as it trains A."""
    return str(init).startswith(FROM_WEIGHTS) and init not in ("mica", "loftq")
