"""FLOPs: counted by formula, those that a run has spent, and how many this machine does."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from harness.config.run_config import RunConfig
from harness.system.internals import internal
from harness.training.loop import State

TorchDispatchMode: Any = internal("TorchDispatchMode")

aten = torch.ops.aten


def _in_place_product(out: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
    return int(2 * a.shape[0] * a.shape[1] * b.shape[1])


def _packed_product(a: Any, b: Any, shape: Any, *_: Any, **__: Any) -> int:
    return int(2 * (a.numel() // a.shape[-1]) * shape[0] * shape[1])


def _scaled_product(a: Any, b: Any, *_: Any, **__: Any) -> int:
    return int(2 * (a.numel() // a.shape[-1]) * b.shape[0] * b.shape[1])


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q.shape, k.shape, v.shape))


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape))


# Formulas that torch lacks; of attention the masked half counts too. They are kept here: torch's
# own table belongs to the whole process, and takes one formula for an operation.
FORMULAS: dict[Any, Callable[..., int]] = {
    aten.addmm_: _in_place_product,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
# Those of bitsandbytes, which is there only where it is used.
BY_NAME: dict[str, Callable[..., int]] = {
    "bitsandbytes.gemm_4bit": _packed_product,
    "bitsandbytes.int8_scaled_mm": _scaled_product,
}


class Flops(TorchDispatchMode):
    """Counts FLOPs by formula. FlopCounterMode does, too, and keeps tensors alive."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        operation = func._overloadpacket
        formula = FORMULAS.get(operation) or flop_registry.get(operation)
        if formula := formula or BY_NAME.get(str(operation)):
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def spent_flops(run: RunConfig, state: State, predicted: dict[str, Any] | None) -> dict[str, float]:
    """FLOPs of all optimizer steps, and of validation, test and further texts; none if unknown.

    By the FLOPs of a token that `predicted` counts, and the positions that were computed: padding
    and prompts, which nothing is predicted for, cost as much. An evaluated token counts as one of
    the largest batch.
    """
    if predicted is None:
        return {}
    steps = state.step * run.train.batch_tokens
    return {
        "train_flops": predicted["train_flops_per_token"] * steps,
        "evaluate_flops": predicted["evaluate_flops_per_token"] * state.evaluated_positions,
    }


def gemm_rate(run: RunConfig, width: int, precision: str, seconds: float = 2.0) -> float:
    """FLOPs a second of this machine's matrix products, in the shape of the run's MLP: a median."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    tokens = run.train.micro_batch * run.data.context_length
    x = torch.randn(tokens, width, dtype=dtype, device=device)
    w = torch.randn(width, 4 * width, dtype=dtype, device=device)
    rates: list[float] = []
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(rates) < 3:
        start = time.perf_counter()
        torch.mm(x, w)
        if device == "cuda":
            torch.cuda.synchronize()
        rates.append(2 * tokens * w.numel() / (time.perf_counter() - start))
    return statistics.median(rates[1:])
