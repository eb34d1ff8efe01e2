"""Negative log-likelihood of tokens, in nats."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def token_nll(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Nats of every target given the inputs up to it; 0 where the target is -100.

    Shapes: inputs, targets (B, T) int64, targets[b, t] follows inputs[b, t]; returns (B, T) fp32.
    Methods that prepend virtual tokens return more than T positions: the last T are ours.
    """
    logits = model(input_ids=inputs).logits[:, -inputs.shape[1] :]
    nll = F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="none"
    )
    return nll.view_as(targets)


def block_nll(model: nn.Module, blocks: torch.Tensor) -> torch.Tensor:
    """Summed nats of packed blocks (B, T + 1), every id but a block's first predicted: a scalar."""
    return token_nll(model, blocks[:, :-1], blocks[:, 1:]).sum()
