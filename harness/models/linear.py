"""GPT-2's `Conv1D` as `nn.Linear`, for methods that know no other layer, and back again.

`Conv1D` (`transformers.pytorch_utils`) holds W^T (in, out), where `nn.Linear` holds W (out, in):

    y = x W^T + b,      Conv1D: addmm(b, x, weight),      nn.Linear: addmm(b, x, weight.T)

The new weight is a transposed copy, contiguous as PEFT, FSDP and fused optimizers take weights to
be: PEFT's SUPERTUNING would merge into a copy of a view, and leave the weight as it was. Turning
back is exact; logits are the same to the rounding of the library's kernels for W and W^T.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from harness.config import matrix_roles, peft_fields
from harness.config.errors import ConfigError
from harness.config.run_config import RunConfig
from harness.models.split_qkv import UNFUSED_TARGETS, fuse_qkv, is_unfused

M = TypeVar("M", bound=nn.Module)
MARK = "was_conv1d"  # an attribute of a turned layer; lm_head and other layers lack it


def turn(model: M) -> M:
    """Replace every `Conv1D` by an `nn.Linear` of the same function, in place; returns `model`.

    Weights become (out, in); parameters are counted as before, and no random number is drawn.
    Dtype, device (meta too), `requires_grad` and train/eval mode carry over. Turn after
    `unfuse_qkv`, before adapters and the optimizer are made, and `as_published` before
    `save_pretrained`.
    """
    for name, conv in list(_of_type(model, Conv1D)):
        linear = _linear(conv.weight.detach().t().contiguous(), conv)
        model.set_submodule(name, linear.train(conv.training))
    return model


def as_published(model: M) -> M:
    """Undo `turn` and `unfuse_qkv` in place: plain `transformers` loads what is saved then.

    Raises:
        ValueError: a layer still carries an adapter (merge and unload it first).
    """
    for name, linear in list(_of_type(model, nn.Linear)):
        if not getattr(linear, MARK, False):
            continue
        if name.endswith(".base_layer"):
            raise ValueError(f"{name} carries an adapter: call merge_and_unload() first")
        with torch.device("meta"):  # its random start would cost time and move the generator
            conv = Conv1D(linear.out_features, linear.in_features)
        conv.weight = nn.Parameter(
            linear.weight.detach().t().contiguous(), linear.weight.requires_grad
        )
        conv.bias = linear.bias
        model.set_submodule(name, conv.train(linear.training))
    return fuse_qkv(model) if is_unfused(model) else model


def is_turned(model: nn.Module) -> bool:
    """Whether `turn` has replaced a layer of `model`, which may carry an adapter by now."""
    return any(getattr(module, MARK, False) for module in model.modules())


def as_asked(model: M, run: RunConfig) -> M:
    """Turn `model` where `model.linear` says so, or with `auto` where the method needs it.

    A method needs it where PEFT's layers for it take no `Conv1D` and a target is one.

    Raises:
        ConfigError: true for a model without `Conv1D`, or false with a method that needs it.
    """
    setting, names = run.model.linear, [name for name, _ in _of_type(model, Conv1D)]
    if setting is True and not names:
        raise ConfigError(
            f"model.linear=true: {type(model).__name__} has no Conv1D to turn, its matrices are "
            "nn.Linear already; leave it at auto"
        )
    why = peft_fields.needs_linear(run.method)
    needed = bool(why) and bool(list(_targeted(names, run, _type_of(model))))
    if setting is False and needed:
        raise ConfigError(f"model.linear=false: {why}; {peft_fields.TURN}")
    wanted = setting is True or (setting == "auto" and needed)
    return turn(model) if wanted else model


def needs_turned_base(model: nn.Module) -> bool:
    """Whether the adapter of `model` fits no published `Conv1D`, so that a base is turned for it.

    That is where its base is turned and PEFT's layers take no `Conv1D`, or where the adapter holds
    weights of the base themselves, which are transposed. Others load onto either.
    """
    if not isinstance(model, PeftModel) or not is_turned(model):
        return False
    config: Any = model.active_peft_config
    init, kasa = (getattr(config, name, None) for name in ("init_lora_weights", "kasa_config"))
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    weights = ("modules_to_save", "target_parameters")
    holds = any(getattr(config, name, None) for name in weights)
    return holds or bool(peft_fields.why_linear(kind, init, kasa))


def _targeted(names: list[str], run: RunConfig, model_type: str) -> Iterator[str]:
    """Of the `Conv1D` modules `names` those that the run's targets name, as far as can be told."""
    named: Any = getattr(run.method, "fields", {}).get("target_modules")
    if named is None:
        named = matrix_roles.modules_of(run.targets, model_type)
    for name in names:
        whole = name
        for part in UNFUSED_TARGETS.values():  # which c_attn stands for
            whole = whole.removesuffix(part.removeprefix("attn.c_attn")) if part in name else whole
        if named is None or named == "all-linear":
            yield name
        elif isinstance(named, str):
            with suppress(re.error):  # which `harness.methods.fields` says by name
                if re.fullmatch(named, name) or re.fullmatch(named, whole):
                    yield name
        elif any(f".{full}".endswith(f".{end}") for full in (name, whole) for end in named):
            yield name


def _type_of(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def _of_type(model: nn.Module, kind: type[nn.Module]) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if name and isinstance(module, kind):
            yield name, module


def _linear(weight: torch.Tensor, conv: Conv1D) -> nn.Linear:
    """An `nn.Linear` that holds `weight` (out, in) and the bias of `conv` themselves."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
    linear.bias = conv.bias
    setattr(linear, MARK, True)
    return linear


# What a reader of an adapter runs on the published base, with plain PyTorch and transformers.
CODE = """\
import torch
from transformers.pytorch_utils import Conv1D
for name, conv in list(base.named_modules()):  # the adapter is on nn.Linear, which holds W
    if isinstance(conv, Conv1D):
        linear = torch.nn.Linear(conv.nx, conv.nf)
        linear.weight = torch.nn.Parameter(conv.weight.detach().T.contiguous())
        linear.bias = conv.bias
        base.set_submodule(name, linear)"""
SECTION = f"""

## Loading it

The adapter is on `nn.Linear`, and GPT-2 as it is published has `Conv1D` in its place. Turn them
first, which keeps the function; `base` is the model that `base_model` names:

```python
import peft
{CODE}
model = peft.PeftModel.from_pretrained(base, FOLDER)
```
"""
