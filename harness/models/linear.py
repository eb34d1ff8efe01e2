"""GPT-2's `Conv1D` as `nn.Linear`, which all that knows matrices knows: the same map, transposed.

y = x W + b,   Conv1D's W (in, out);   nn.Linear has W^T (out, in)
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

M = TypeVar("M", bound=nn.Module)


def turn(model: M) -> M:
    """Replace every `Conv1D` by an `nn.Linear` of the same function, in place; returns `model`.

    Dtype, device (meta too), `requires_grad` and train/eval mode carry over. Weights are copied,
    one matrix after another, so that none is held twice for long.
    """
    for name, module in list(model.named_modules()):
        if type(module) is Conv1D:
            model.set_submodule(name, _linear(module))
    return model


def _linear(conv: Conv1D) -> nn.Linear:
    inside, outside = conv.weight.shape
    with torch.device("meta"):  # its random init would cost time and move the global generator
        linear = nn.Linear(inside, outside)
    linear.weight = nn.Parameter(conv.weight.detach().t().contiguous(), conv.weight.requires_grad)
    linear.bias = nn.Parameter(conv.bias.detach(), conv.bias.requires_grad)
    return linear.train(conv.training)
