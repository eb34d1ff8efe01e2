"""PEFT's LoRA layer with one fused product instead of a chain of them.

    y = x W + b + s (x A^T) B^T      x (N, n), W (n, m), A (r, n), B (m, r), s = alpha / r

PEFT adds the low-rank part as tensors of its own: two more (N, m) temporaries forward and one
backward, and under autocast x is widened to A's float32 and narrowed again. Here both products
accumulate into the base's result, x is cast once, and backward does the same for x's gradient.
Everything else - merging, saving, variants, dropout - is PEFT's own layer.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn
from transformers.pytorch_utils import Conv1D

from harness.system.internals import internal

has_any_global_hook = internal("_has_any_global_hook")


def fuse(config: Any) -> Any:
    """Let PEFT build `FusedLinear` for the `nn.Linear` and `Conv1D` targets of a `LoraConfig`."""
    layers: dict[Any, Any] = {nn.Linear: _dispatch, Conv1D: _dispatch}  # PEFT calls them only
    config._register_custom_module(layers)
    return config


def _dispatch(
    target: nn.Module,
    adapter_name: str,
    config: LoraConfig,
    parameter_name: Any = None,
    **rest: Any,
) -> FusedLinear | None:
    if parameter_name is not None or type(target) not in (nn.Linear, Conv1D):
        return None  # PEFT's next dispatcher: another tuner's layer, a bare parameter
    if type(target.weight) is not nn.Parameter:
        return None  # quantised by torchao, say: a tensor class with products of its own
    is_conv1d = type(target) is Conv1D
    config.fan_in_fan_out = is_conv1d  # as PEFT's own dispatcher does, which warns of it
    return FusedLinear(
        target, adapter_name, config=config, is_target_conv_1d_layer=is_conv1d, **rest
    )


class FusedLinear(Linear):
    """`peft.tuners.lora.Linear` that takes the fused product where it is the same function."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Map x (..., n) to (..., m)."""
        name = self._fusable() if not args and not kwargs else None
        if name is None:
            return super().forward(x, *args, **kwargs)
        base: Any = self.base_layer
        flat = x.reshape(-1, x.shape[-1])
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else base.weight.dtype
        y = _LoraProduct.apply(
            flat.to(dtype),  # outside the product, so that autograd follows the cast
            base.weight if self.is_target_conv_1d_layer else base.weight.t(),
            base.bias,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
        )
        return y.view(*x.shape[:-1], y.shape[-1])

    @property
    def fuses(self) -> bool:
        """Tell whether the next forward pass takes the fused product, and not PEFT's own."""
        return self._fusable() is not None

    def _fusable(self) -> str | None:
        """The one adapter to add, or None where PEFT's own forward has more to do."""
        if self.disable_adapters or self.merged:
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or active[0] in self.lora_variant:
            return None
        (name,) = active
        base: Any = self.base_layer
        trains = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
        plain = type(base) in (nn.Linear, Conv1D)
        parts = (base, self.lora_A[name], self.lora_B[name], self.lora_dropout[name])
        hooked = any(_has_hooks(part) for part in parts)  # a fused product would not call them
        dropout = not isinstance(self.lora_dropout[name], nn.Identity)
        if trains or not plain or hooked or dropout or self.lora_B[name].bias is not None:
            return None
        return name


def _has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` would also call what is hung on it, or on every module.

    Accelerate's hooks replace `forward` of the module itself.
    """
    own = vars(module).get("forward")
    return bool(
        (own is not None and getattr(own, "__func__", None) is not type(module).forward)
        or has_any_global_hook()
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


class _LoraProduct(torch.autograd.Function):
    """y (N, m) of x (N, n), a frozen W (n, m) and b (m,), and A (r, n), B (m, r) that train."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        ctx.scale = scale
        with torch.autocast(x.device.type, enabled=False):
            weight, a_cast, b_cast = (t.to(x.dtype) for t in (weight, a, b))
            y = torch.mm(x, weight) if bias is None else torch.addmm(bias.to(x.dtype), x, weight)
            h = torch.mm(x, a_cast.t())  # (N, r)
            y.addmm_(h, b_cast.t(), alpha=scale)
        ctx.save_for_backward(x, weight, h, a, b)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight, h, a, b = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: h was computed where autograd did not look
            return _differentiable_backward(ctx, grad, x, weight, a, b)
        a_cast, b_cast = a.to(x.dtype), b.to(x.dtype)
        grad_h = torch.mm(grad, b_cast).mul_(ctx.scale)  # (N, r)
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[3]:
            grad_a = torch.mm(grad_h.t(), x).to(a.dtype)
        if ctx.needs_input_grad[4]:
            grad_b = torch.mm(grad.t(), h).mul_(ctx.scale).to(b.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad, weight.t()).addmm_(grad_h, a_cast)
        return grad_x, None, None, grad_a, grad_b, None


def _differentiable_backward(
    ctx: Any,
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
) -> Any:
    """The same gradients by operations that autograd can differentiate again."""
    a_cast, b_cast = a.to(x.dtype), b.to(x.dtype)
    grad_h = ctx.scale * (grad @ b_cast)  # (N, r)
    grad_x = grad @ weight.t() + grad_h @ a_cast
    grad_a = (grad_h.t() @ x).to(a.dtype)
    grad_b = (ctx.scale * (grad.t() @ (x @ a_cast.t()))).to(b.dtype)
    needed = ctx.needs_input_grad
    return (
        grad_x if needed[0] else None,
        None,
        None,
        grad_a if needed[3] else None,
        grad_b if needed[4] else None,
        None,
    )
