"""The state of any optimizer as tensors by name, for a checkpoint, and back.

Most optimizers keep tensors by parameter. PEFT's LoRA-FA keeps them by names, with counts as plain
numbers; schedule-free keeps its count and its average's weight in the groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from harness.training import sharding
from harness.training.optimizers import parts_of

# KIND/FIELD/OWNER. Owners are parameters, names of the optimizer's own, or groups (PART.INDEX);
# what is no tensor there is a number.
TENSOR, NUMBER = "optimizer", "optimizer_number"
NAMED, NAMED_NUMBER = "optimizer_named", "optimizer_named_number"
GROUP = "optimizer_group"
TABLES = ("qmap1", "qmap2")  # values of 8-bit codes, which all of bitsandbytes' parameters share


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state, by the names of parameters, of its own and of groups."""
    state: dict[str, torch.Tensor] = {}
    names: dict[Any, str] = {p: name for name, p in model.named_parameters()}
    for place, part in enumerate(parts_of(optimizer)):
        for owner, values in part.state.items():
            for field, value in values.items():
                tensor, number = (
                    (NAMED, NAMED_NUMBER) if isinstance(owner, str) else (TENSOR, NUMBER)
                )
                name = owner if isinstance(owner, str) else names[owner]
                if isinstance(value, torch.Tensor):
                    # A file has no two names of one tensor.
                    state[f"{tensor}/{field}/{name}"] = value.clone() if field in TABLES else value
                elif value is not None:
                    state[f"{number}/{field}/{name}"] = _number(value)
        for index, group in enumerate(part.param_groups if _counts_in_groups(part) else ()):
            for field, value in group.items():
                if isinstance(value, bool | int | float):
                    state[f"{GROUP}/{field}/{place}.{index}"] = _number(value)
    return state


def restore(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, torch.Tensor]
) -> None:
    """Put back what `tensors` gave; the names must be the same."""
    parameters = dict(model.named_parameters())
    parts = parts_of(optimizer)
    owner_of = {
        parameter: part
        for part in parts
        for group in part.param_groups
        for parameter in group["params"]
    }
    by_names: dict[str, dict[str, Any]] = {}
    tables: dict[Any, Any] = {}
    kept: Any
    for key, value in saved.items():
        kind, _, rest = key.partition("/")
        field, _, owner = rest.partition("/")
        if kind in (NAMED, NAMED_NUMBER):
            by_name = value.item() if kind == NAMED_NUMBER else value
            by_names.setdefault(owner, {})[field] = by_name
        elif kind == GROUP:
            place, _, index = owner.partition(".")
            parts[int(place)].param_groups[int(index)][field] = value.item()
        elif kind in (TENSOR, NUMBER):
            parameter = parameters[owner]
            is_number = kind == NUMBER
            kept = value.item() if is_number else sharding.distribute_like(value, parameter)
            if isinstance(kept, torch.Tensor):
                kept = _laid_out_like(parameter, kept)
            kept = tables.setdefault((field, kept.device), kept) if field in TABLES else kept
            owner_of[parameter].state[parameter][field] = kept
    if by_names:
        (part,) = parts
        state: Any = part.state
        device = next(iter(owner_of)).device
        for name, values in by_names.items():
            state[name] = {
                field: value.to(device, copy=True) if isinstance(value, torch.Tensor) else value
                for field, value in values.items()
            }


def _laid_out_like(parameter: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    """`value` with the strides of a parameter of its shape: fused kernels pair them by address."""
    if value.shape != parameter.shape or value.stride() == parameter.stride():
        return value
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def _counts_in_groups(part: torch.optim.Optimizer) -> bool:
    """Whether a step changes numbers of the groups; no optimizer of torch does that."""
    return "train_mode" in part.defaults


def _number(value: bool | int | float) -> torch.Tensor:
    kinds = {bool: torch.bool, int: torch.int64, float: torch.float64}
    return torch.tensor(value, dtype=kinds[type(value)])
