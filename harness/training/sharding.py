"""One copy of a model over all ranks: each keeps its part of every weight, gradient and moment.

`fully_shard` (torch's FSDP2) gathers a block's weights when the block runs and lets go of them
after it, forward and backward; its gradients are averaged and scattered as soon as they are there.
Outside of a pass every parameter is a DTensor that holds rows 1/N of itself. Accelerate has its own
FSDP on accelerators only: this one is the same on a CPU, where it is tested.

Every rank loads the whole model into the host's memory first; a device sees it block by block.
Buffers, and with them the frozen factors of `udv`, stay whole on every rank.
"""

from __future__ import annotations

from collections import Counter
from typing import cast

import torch
from accelerate import Accelerator
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from harness.config.errors import ConfigError
from harness.models import transformer_blocks


def shard(prepared: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Divide a `NextToken` among the ranks, in place, on `accelerator.device`.

    Before the optimizer is made: parameters are replaced. All ranks start from the first one's
    values, as under DDP, and must from then on run equal numbers of passes.

    Raises:
        ConfigError: a parameter without dimensions, or one that several blocks share.
    """
    blocks = transformer_blocks.blocks(cast(nn.Module, prepared.model))
    _check(prepared, blocks)
    with torch.no_grad():
        for tensor in [*prepared.parameters(), *prepared.buffers()]:
            same = tensor.to(accelerator.device)
            distributed.broadcast(same, 0)
            tensor.copy_(same)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    # The root, too, lets go after forward: after an evaluation no backward pass would do it.
    for module in [*blocks, prepared]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return prepared


def _check(prepared: nn.Module, blocks: list[nn.Module]) -> None:
    inside = [id(p) for block in blocks for p in block.parameters()]
    owners = Counter(inside)
    parts = {id(part) for block in blocks for part in block.modules()}
    for holder in prepared.modules():
        if id(holder) not in parts:
            owners.update({id(p) for p in holder.parameters(recurse=False)} & set(inside))
    for name, parameter in prepared.named_parameters():
        short = name.removeprefix("model.")
        if not parameter.ndim:
            raise ConfigError(
                f"launch.accelerate=fsdp: {short} has no dimension to divide; use ddp"
            )
        if owners[id(parameter)] > 1:
            raise ConfigError(
                f"launch.accelerate=fsdp: {short} is shared by several blocks, which are divided "
                "one by one; use ddp"
            )


def to_local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor: its part of a divided one, or all of another."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor. A divided one is gathered: all ranks must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distribute_like(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A copy of a whole tensor on the device of `like`, divided as that is if their shapes agree.

    Every rank has the same `value` and takes its part of it.
    """
    value = value.to(like.device, copy=True)
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def unshard(model: nn.Module, *, keep: bool) -> None:
    """Make a divided model whole again, on the CPU of the rank that says `keep`, to be saved.

    All ranks must call it. The model that is kept is not to be run any more.
    """
    whole: dict[int, nn.Parameter] = {}  # id of a divided parameter -> the whole one
    for parameter in model.parameters():
        full = full_tensor(parameter.detach())
        if keep:
            whole[id(parameter)] = nn.Parameter(full.cpu(), parameter.requires_grad)
    for module in model.modules() if keep else ():
        for name, divided in module._parameters.items():
            module._parameters[name] = None if divided is None else whole[id(divided)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.cpu()
