"""What a method adds to the loss that it trains by."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from harness.config.method_schema import AdaloraMethod, UdvMethod
from harness.config.run_config import RunConfig
from harness.methods import adalora, udv


def penalty(model: nn.Module, run: RunConfig) -> Callable[[], torch.Tensor] | None:
    """What the method adds to the loss, or None: the orthogonality of U and V, or of A and B."""
    if isinstance(run.method, UdvMethod) and run.method.orthogonality:
        return lambda: udv.orthogonality_penalty(model)
    if isinstance(run.method, AdaloraMethod) and run.method.orth_reg_weight:
        return lambda: adalora.orthogonal_penalty(model)
    return None
