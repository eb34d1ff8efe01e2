"""Bases whose weights are stored quantised, by bitsandbytes or torchao: their bytes, their passes.

A quantised weight is more than its parameter: scales and codes lie beside it, as attributes of the
parameter (bitsandbytes) or as the tensors that a tensor subclass wraps (torchao).
"""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from harness.system.internals import internal

is_traceable_wrapper_subclass: Any = internal("is_traceable_wrapper_subclass")


def packing_of(config: Any) -> str | None:
    """By which method the weights are quantised in their files, or None."""
    stored = getattr(config, "quantization_config", None)
    if not stored:
        return None
    fields = stored if isinstance(stored, dict) else vars(stored)
    method = fields.get("quant_method", "unknown")
    return str(getattr(method, "value", method))


def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that a quantised one consists of; none for a plain one."""
    if is_traceable_wrapper_subclass(tensor) and not isinstance(tensor, DTensor):
        names, _ = cast(Any, tensor).__tensor_flatten__()
        inner = [getattr(tensor, name) for name in names]
        return [plain for part in inner for plain in (parts(part) or [part])]
    if not isinstance(tensor, nn.Parameter):
        return []
    beside = list(_beside(tensor))
    return [tensor.data, *beside] if beside else []


def _beside(parameter: nn.Parameter) -> Iterator[torch.Tensor]:
    """The scales and codes of a parameter of bitsandbytes."""
    attributes = vars(parameter)
    for state in (
        attributes.get("quant_state"),
        getattr(attributes.get("quant_state"), "state2", None),
    ):
        for name in ("absmax", "code", "offset"):
            if isinstance(value := getattr(state, name, None), torch.Tensor):
                yield value
    for name in ("CB", "SCB"):
        if isinstance(value := attributes.get(name), torch.Tensor):
            yield value


def as_packed(plain: nn.Parameter, packed: Any, make: Callable[[torch.Tensor], Any]) -> Any:
    """Give `plain` what lies beside `packed`, a parameter of bitsandbytes, as `make` makes it.

    Layers ask their parameter for its scales, whatever its class is. Of others nothing changes.
    """
    for name, value in vars(packed).items():
        if name in ("CB", "SCB") and isinstance(value, torch.Tensor):
            setattr(plain, name, make(value) if name == "SCB" else plain.data)
        if name == "quant_state" and value is not None:
            state = copy.copy(value)
            state.state2 = copy.copy(value.state2)
            for quant_state in filter(None, (state, state.state2)):
                for part in ("absmax", "code", "offset"):
                    if isinstance(tensor := getattr(quant_state, part, None), torch.Tensor):
                        setattr(quant_state, part, make(tensor))
            plain.quant_state = state  # type: ignore[attr-defined]  # as on bitsandbytes' own
    return plain


def held_by_modules(model: nn.Module) -> list[torch.Tensor]:
    """The scales of 8-bit weights, which a layer takes from its parameter at its first product."""
    states = (getattr(module, "state", None) for module in model.modules())
    scales = (getattr(state, name, None) for state in states for name in ("CB", "SCB"))
    return [tensor for tensor in scales if isinstance(tensor, torch.Tensor)]


def keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew for inference on CPUs with AVX512-BF16.

    Once an evaluation has packed them so, products no longer pass a gradient on to their input, in
    training too: steps after the first validation would be wrong, or fail.
    Source: `bitsandbytes.nn.Linear4bit.forward` and `bitsandbytes.matmul_4bit` of 0.50.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  # not of nn.Module


def mixes_tokens(config: Any) -> bool:
    """Whether products of 8-bit weights depend on all tokens of a batch.

    LLM.int8() multiplies a column of the activations in 16 bits where one of them is an outlier,
    at any token (Dettmers et al. 2022, section 3.2).
    """
    stored: Any = getattr(config, "quantization_config", None) or {}
    fields = stored if isinstance(stored, dict) else vars(stored)
    eight = fields.get("load_in_8bit", fields.get("_load_in_8bit"))
    return bool(eight and fields.get("llm_int8_threshold", 6.0) > 0)


def stored_bytes(folder: Path) -> int:
    """Bytes of all tensors in a folder's safetensors files, from their headers.

    Source: the safetensors format: eight bytes of length, then a JSON object of the tensors.

    Raises:
        OSError: no such file.
    """
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        total += sum(end - start for start, end in (e["data_offsets"] for e in header.values()))
    if not total:
        raise FileNotFoundError(f"{folder}: no safetensors file, so that sizes are not known")
    return total
