"""Split GPT-2's fused attention projection into q, k and v, and join it again.

GPT-2 keeps three projections in one `Conv1D`, `attn.c_attn`, whose output is split by columns
(`GPT2Attention.forward` in `transformers`):

    [q | k | v] = x W + b,      W = [W_q | W_k | W_v] (d, 3 d),      b = [b_q | b_k | b_v] (3 d)

so that an adapter on `c_attn` is one adapter for all three. The LoRA paper adapts q and v only,
which needs three matrices: `unfuse_qkv` makes `attn.c_attn` a module with children `q`, `k`, `v`.

Legend: B batch, T time, d width of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.pytorch_utils import Conv1D

M = TypeVar("M", bound=nn.Module)

# Suffixes for PEFT's target_modules on an unfused model. PEFT compares whole dotted parts from the
# right, so none of them can match another layer of GPT-2.
UNFUSED_TARGETS = {"q": "attn.c_attn.q", "k": "attn.c_attn.k", "v": "attn.c_attn.v"}


class UnfusedQKV(nn.Module):
    """Stands in for `c_attn`: three `Conv1D` (d, d) side by side, (B, T, d) -> (B, T, 3 d).

    Each child is called as a module, not read for its weight to make one large product: PEFT's
    layers, and the hooks of inits that observe activations (EVA, CorDA), act in a child's forward,
    and nothing more is kept for the backward pass than `c_attn` keeps.
    """

    def __init__(self, q: Conv1D, k: Conv1D, v: Conv1D) -> None:
        super().__init__()
        self.q = q
        self.k = k
        self.v = v

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[q | k | v] of x, in the order in which `GPT2Attention` splits it."""
        return torch.cat((self.q(x), self.k(x), self.v(x)), dim=-1)


def unfuse_qkv(model: M) -> M:
    """Replace every self-attention's `c_attn` by separate q, k and v, in place; returns `model`.

    Weights are copied by columns, so nothing is rounded, no random number is drawn and the model's
    parameter count stays. Dtype, device (meta too), `requires_grad` and train/eval mode carry over.
    Each column of a matrix product is computed as before, so outputs keep their bits wherever the
    library's kernel does not depend on the number of columns (fp32 and bf16 on the CPU tried; to
    rounding elsewhere). The gradient of x is a sum of three products where it was one, x_grad =
    sum_i y_i_grad W_i^T, and agrees to rounding, as do then the gradients of the layers below.

    Unfuse before adapters and the optimizer are made, and `fuse_qkv` before `save_pretrained`:
    plain `transformers` does not know the split names and would start such a file's attention from
    random weights. An unfused model is returned as it is. Cross-attention (`add_cross_attention`)
    keeps its own `c_attn`, which holds k and v of another sequence.

    Raises:
        ValueError: no GPT-2 attention in `model`, or its `c_attn` is adapted, quantized or not of
            the expected shape; `model` is then unchanged.
    """
    attentions = list(_self_attentions(model))
    for name, attention in attentions:
        _check_fused(name, attention)
    for _, attention in attentions:
        fused = attention.c_attn
        if isinstance(fused, UnfusedQKV):
            continue
        weights = fused.weight.detach().split(attention.split_size, dim=1)
        biases = fused.bias.detach().split(attention.split_size)
        parts = [
            # Compact copies: a view would keep all three alive, and could not be saved on its own.
            _conv1d(
                weight.clone(memory_format=torch.contiguous_format),
                bias.clone(),
                fused.weight.requires_grad,
                fused.bias.requires_grad,
            )
            for weight, bias in zip(weights, biases, strict=True)
        ]
        # By name: transformers declares the attribute to be a Conv1D.
        attention.add_module("c_attn", UnfusedQKV(*parts).train(fused.training))
    return model


def fuse_qkv(model: M) -> M:
    """Undo `unfuse_qkv` in place: `model` is again a plain GPT-2, bit for bit; returns `model`.

    A joined parameter requires a gradient if one of its three parts does. A fused model is returned
    as it is.

    Raises:
        ValueError: no GPT-2 attention in `model`; or q, k or v still carries an adapter (merge and
            unload it first), is not a `Conv1D`, or the three differ in dtype or device; `model` is
            then unchanged.
    """
    attentions = list(_self_attentions(model))
    for name, attention in attentions:
        if isinstance(attention.c_attn, UnfusedQKV):
            _check_unfused(name, attention.c_attn)
        else:
            _check_fused(name, attention)
    for _, attention in attentions:
        split = attention.c_attn
        if not isinstance(split, UnfusedQKV):
            continue
        parts = (split.q, split.k, split.v)
        attention.c_attn = _conv1d(
            torch.cat([part.weight.detach() for part in parts], dim=1),
            torch.cat([part.bias.detach() for part in parts]),
            any(part.weight.requires_grad for part in parts),
            any(part.bias.requires_grad for part in parts),
        ).train(split.training)
    return model


def is_unfused(model: nn.Module) -> bool:
    """Whether q, k and v of `model` are separate through `unfuse_qkv`."""
    return any(isinstance(module, UnfusedQKV) for module in model.modules())


def _self_attentions(model: nn.Module) -> Iterator[tuple[str, GPT2Attention]]:
    """(name, module) of GPT-2's self-attentions; a model without any is an error."""
    attentions = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, GPT2Attention) and not module.is_cross_attention
    ]
    if not attentions:
        matrices = {
            name.rpartition(".")[2]: None
            for name, module in model.named_modules()
            if name and isinstance(module, nn.Linear | nn.Embedding | Conv1D)
        }
        raise ValueError(
            f"unfuse_qkv: {type(model).__name__} has no GPT-2 attention with a fused c_attn; its "
            f"matrices are {', '.join(matrices) or 'none'}. Only GPT-2 (model_type gpt2, any head) "
            "can be unfused; name q, k and v by the model's own layers where it keeps them apart"
        )
    yield from attentions


def _check_fused(name: str, attention: GPT2Attention) -> None:
    """Refuse a `c_attn` that is neither a plain fused `Conv1D` nor split already."""
    fused = attention.c_attn
    if isinstance(fused, UnfusedQKV):
        return
    plain = isinstance(fused, Conv1D)
    if not plain:
        raise ValueError(
            f"{name}.c_attn is a {type(fused).__module__}.{type(fused).__name__}, not a plain "
            "Conv1D: unfuse before adapters are added or weights quantized, or unload them first"
        )
    expected = 3 * attention.split_size
    if fused.weight.shape[1] != expected:
        raise ValueError(
            f"{name}.c_attn has {fused.weight.shape[1]} output columns, expected {expected}: "
            f"q, k and v of {attention.split_size} each"
        )


def _check_unfused(name: str, split: UnfusedQKV) -> None:
    """Refuse parts that cannot be joined without loss."""
    for child, part in split.named_children():
        plain = isinstance(part, Conv1D)
        if not plain:
            raise ValueError(
                f"{name}.c_attn.{child} is a {type(part).__module__}.{type(part).__name__}, not a "
                "plain Conv1D: call merge_and_unload() before fuse_qkv"
            )
    kinds = {(part.weight.dtype, part.weight.device) for part in (split.q, split.k, split.v)}
    if len(kinds) > 1:
        raise ValueError(
            f"{name}.c_attn: q, k and v must share dtype and device to be fused, found "
            f"{', '.join(sorted(f'{dtype} on {device}' for dtype, device in kinds))}"
        )


def _conv1d(weight: torch.Tensor, bias: torch.Tensor, weight_grad: bool, bias_grad: bool) -> Conv1D:
    """A `Conv1D` that holds weight (in, out) and bias (out) themselves."""
    with torch.device("meta"):  # its random init would cost time and move the global generator
        conv = Conv1D(weight.shape[1], weight.shape[0])
    conv.weight = nn.Parameter(weight, requires_grad=weight_grad)
    conv.bias = nn.Parameter(bias, requires_grad=bias_grad)
    return conv
