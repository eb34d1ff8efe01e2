"""Several ranks evaluate as one: what fails on one of them fails on all, and none waits for ever.

A rank that raised would leave the others in a collective that it never enters. So every rank does
its own share first, without a word to the others, and then all say how it went.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from accelerate import Accelerator
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from harness.system.machine import out_of_memory

# A rank that failed early waits for the others' shares. Ranks that divide a model go through it
# batch by batch together: one that failed alone has left the others stuck in the model.
WHOLE, DIVIDED = timedelta(days=1), timedelta(minutes=1)


class OtherRankError(RuntimeError):
    """Another rank failed at what this one has done."""


class RanksApartError(RuntimeError):
    """This rank failed, and the others cannot be told: the run cannot go on."""


@contextmanager
def together(accelerator: Accelerator | None, *, divided: bool = False) -> Iterator[None]:
    """Raise on every rank what the body raises on any; a process by itself just does the body.

    The body must hold no collective, but for those of a model that is `divided` among the ranks.

    Raises:
        OtherRankError: another rank failed; a failure of this rank's own is raised as it is.
        RanksApartError: this rank alone failed, in a model that is divided.
    """
    if accelerator is None or not distributed.is_initialized():
        yield
        return
    own: Exception | None = None
    try:
        yield
    except Exception as error:  # whatever it is, the others must hear of it
        own = error
    failures: list[str | None] = [None] * accelerator.num_processes
    text = f"{type(own).__name__}: {own}" if own else None
    if own and out_of_memory(own):
        text = f"out of memory: {text}"
    try:
        distributed.all_gather_object(failures, text, group=_group(DIVIDED if divided else WHOLE))
    except RuntimeError as error:
        if own:
            raise RanksApartError(f"one rank alone failed ({text})") from own
        raise error
    if own:
        raise own
    for rank, failure in enumerate(failures):
        if failure:
            raise OtherRankError(f"rank {rank} failed ({failure})")


@functools.cache
def _group(timeout: timedelta) -> Any:
    """A group of all ranks for this alone: what is sent in it never meets another collective."""
    return distributed.new_group(backend="gloo", timeout=timeout)


def to_evaluate(prepared: nn.Module) -> tuple[nn.Module, bool]:
    """What a rank evaluates of a prepared module, and whether it is divided among the ranks.

    DDP sends the first rank's buffers to all in every forward pass; here that is done once.
    """
    if not isinstance(prepared, DistributedDataParallel):
        return prepared, isinstance(prepared, FSDPModule)
    for buffer in prepared.module.buffers():
        same = buffer.detach().contiguous()
        distributed.broadcast(same, 0)
        if same.data_ptr() != buffer.data_ptr():
            buffer.copy_(same)
    return prepared.module, False
