"""State that training moves without a gradient: buffers, generators, numbers and samples of layers.

A model's weights and its optimizer are not all of a run's state. Some layers change their buffers
in the forward pass (running statistics; MonteCLoRA's expert weights), and some draw random numbers
ahead of time, or from a generator of their own (PVERA). Some note in Python what they have done
(VeLoRA: whether its projection is made), or keep running means there (AdaLoRA). A checkpoint
without these resumes to other numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from harness.methods import adalora
from harness.system.internals import internal
from harness.training import sharding

BufferDict: Any = internal("BufferDict")

# Prefixes of names in `BufferState.tensors`.
BUFFER, SAMPLER, GENERATOR, NUMBER, ALLOCATOR = PREFIXES = (
    "buffer/", "sampler/", "generator/", "number/", "allocator/",
)  # fmt: skip


class BufferState:
    """Which state of a model's layers belongs into a checkpoint; made before the first step."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        fixed = _owned(model)["dict"]
        self._start = {n: _digest(b) for n, b in model.named_buffers() if n not in fixed}
        self._numbers = {name: container[key] for name, container, key in _numbers(model)}

    def tensors(self, *, factors: bool) -> dict[str, torch.Tensor]:
        """Return the state by name: what moved or what an adapter owns, samples and generators.

        Frozen factors and projections, which PEFT keeps in a `BufferDict`, count with `factors`,
        and then only those that the adapter's file would hold too: the others are computed again.
        So do the running means by which AdaLoRA cuts its ranks; which it has cut always counts.
        """
        own = _owned(self.model)
        kept = own["state"] | (own["dict"] & self.model.state_dict().keys() if factors else set())
        tensors = {
            BUFFER + name: buffer.detach()
            for name, buffer in self.model.named_buffers()
            if name in kept or self._has_moved(name, buffer)
        }
        for name, sampler in _samplers(self.model):
            tensors[f"{SAMPLER}{name}/index"] = torch.tensor(sampler.index)
            for key in sampler.buffer[0]:
                drawn = torch.stack([sample[key] for sample in sampler.buffer])
                tensors[f"{SAMPLER}{name}/{key}"] = drawn.detach()
        for name, generator in _generators(self.model):
            tensors[GENERATOR + name] = generator.get_state()
        for name, container, key in _numbers(self.model):
            if self._numbers.get(name) != container[key]:
                tensors[NUMBER + name] = torch.tensor(container[key])
        allocated = adalora.state(self.model, means=factors)
        return tensors | {ALLOCATOR + name: tensor for name, tensor in allocated.items()}

    def restore(self, tensors: dict[str, torch.Tensor], *, factors: bool = False) -> None:
        """Put back what `tensors` returned with the same `factors`; other names are left alone."""
        allocated = {
            name.removeprefix(ALLOCATOR): tensor
            for name, tensor in tensors.items()
            if name.startswith(ALLOCATOR)
        }
        adalora.restore(self.model, allocated, means=factors)
        buffers = dict(self.model.named_buffers())
        for name, tensor in tensors.items():
            if name.startswith(BUFFER):
                old = buffers[name.removeprefix(BUFFER)]
                owner, _, leaf = name.removeprefix(BUFFER).rpartition(".")
                module = self.model.get_submodule(owner)
                module._buffers[leaf] = tensor.to(device=old.device, dtype=old.dtype)
        for name, sampler in _samplers(self.model):
            own = f"{SAMPLER}{name}/"
            drawn = {key.removeprefix(own): t for key, t in tensors.items() if key.startswith(own)}
            if drawn:
                sampler.index = int(drawn.pop("index"))
                device = sampler.device
                sampler.buffer = [
                    {key: values[i].to(device) for key, values in drawn.items()}
                    for i in range(len(next(iter(drawn.values()))))
                ]

        for name, generator in _generators(self.model):
            if GENERATOR + name in tensors:
                generator.set_state(tensors[GENERATOR + name].cpu())
        for name, container, key in _numbers(self.model):
            if NUMBER + name in tensors:
                container[key] = tensors[NUMBER + name].item()

    def _has_moved(self, name: str, buffer: torch.Tensor) -> bool:
        """Whether a buffer, unless in a `BufferDict`, holds other values than at the start."""
        return name in self._start and self._start[name] != _digest(buffer)


def _digest(buffer: torch.Tensor) -> bytes:
    """A checksum of a buffer's values; some kernels write without counting up its version."""
    if buffer.is_meta:
        return b""
    plain = sharding.full_tensor(buffer.detach()).cpu().contiguous()
    return hashlib.blake2b(plain.reshape(-1).view(torch.uint8).numpy().data).digest()


def _owned(model: nn.Module) -> dict[str, set[str]]:
    """Names of the buffers of adapter layers: their `state`, and those in a `BufferDict`."""
    names: dict[str, set[str]] = {"state": set(), "dict": set()}
    for prefix, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        assert isinstance(layer, nn.Module)
        for inside, module in layer.named_modules():
            if inside.split(".")[0] == "base_layer":
                continue
            kind = "dict" if isinstance(module, BufferDict) else "state"
            path = ".".join(part for part in (prefix, inside) if part)
            names[kind] |= {f"{path}.{leaf}" for leaf in module._buffers}
    return names


def _samplers(model: nn.Module) -> list[tuple[str, Any]]:
    """The objects, by their module's name, that hold random draws for later steps."""
    try:
        from peft.tuners.lora.monteclora import BufferedMontecloraSampler
    except ImportError:  # a PEFT without MonteCLoRA
        return []
    return [
        (name, module.sampler)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "sampler", None), BufferedMontecloraSampler)
    ]


def _generators(model: nn.Module) -> list[tuple[str, torch.Generator]]:
    """Generators that modules hold as attributes, in dicts and lists too, by where they are."""

    def within(path: str, value: Any) -> Iterator[tuple[str, torch.Generator]]:
        if isinstance(value, torch.Generator):
            yield path, value
        elif isinstance(value, dict | list | tuple):
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                yield from within(f"{path}/{key}", part)

    return [
        pair
        for prefix, module in model.named_modules()
        for attribute, value in vars(module).items()
        for pair in within(f"{prefix}/{attribute}", value)
    ]


def _numbers(model: nn.Module) -> list[tuple[str, dict[Any, Any], Any]]:
    """Numbers and truth values that adapter layers hold in dicts: (name, dict, key)."""
    return [
        (f"{prefix}/{attribute}/{key}", value, key)
        for prefix, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer)
        for attribute, value in vars(layer).items()
        if type(value) is dict and not attribute.startswith("_")
        for key, number in value.items()
        if isinstance(number, bool | int | float)
    ]
