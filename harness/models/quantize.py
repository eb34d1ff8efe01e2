"""Hold a base's matrices in 8 or 4 bits, by bitsandbytes, once its weights are loaded.

The matrices of the blocks are packed; embeddings, the head, norms and biases stay as they are.

    nf4, fp4   blocks of 64 weights, each 4 bits of a code times the block's largest (QLoRA,
               arXiv 2305.14314); with `double_quant` the blocks' scales are in 8 bits as well
    int8       a scale for each row, without the 16-bit columns of outliers (LLM.int8(),
               arXiv 2208.07339, at a threshold of 0): with these a prediction depends on all
               tokens of a batch. Evaluation has inputs in 8 bits, too; on a CPU training has not.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from harness.config.errors import ConfigError
from harness.config.run_config import RunConfig
from harness.models import linear

BLOCK, OF_SCALES = 64, 256  # weights that share a scale, and scales that share one


def options(run: RunConfig) -> dict[str, Any]:
    """`model.quantize` and its fields by the names of `BitsAndBytesConfig`; {} without it."""
    model = run.model
    if model.quantize == "none":
        return {}
    if model.quantize == "int8":
        return {"load_in_8bit": True, "llm_int8_threshold": 0.0}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": model.quantize,
        "bnb_4bit_use_double_quant": model.double_quant,
        "bnb_4bit_compute_dtype": str(compute_dtype(run)).removeprefix("torch."),
    }


def scheme(run: RunConfig) -> BitsAndBytesConfig | None:
    """The same as transformers has it, or None."""
    if not (settings := options(run)):
        return None
    # It says at every product of 8 bits that it rounds the inputs.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return BitsAndBytesConfig(**settings)


def compute_dtype(run: RunConfig) -> torch.dtype:
    """What products with weights of 4 bits are computed in: by default the run's precision."""
    dtype = run.train.precision if run.model.compute_dtype == "auto" else run.model.compute_dtype
    if dtype == "auto":
        dtype = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
    return torch.bfloat16 if dtype == "bf16" else torch.float32


def quantize(model: PreTrainedModel, config: BitsAndBytesConfig) -> PreTrainedModel:
    """Pack the matrices of `model`, in place, and move it to where it will run; returns it.

    Of a model on the meta device only shapes are made.

    Raises:
        ConfigError: there is no matrix to pack.
    """
    import bitsandbytes as bnb

    linear.turn(model)
    matrices = _packable(model)
    if not matrices:
        raise ConfigError(
            f"model.quantize: {type(model).__name__} has no linear layer beside its head, and "
            "nothing else is quantised; set model.quantize=none"
        )
    for name, matrix in matrices.items():
        size = (matrix.in_features, matrix.out_features, matrix.bias is not None)
        new: Any
        with torch.device("meta"):
            if config.load_in_8bit:
                new = bnb.nn.Linear8bitLt(
                    *size, has_fp16_weights=False, threshold=config.llm_int8_threshold
                )
            else:
                new = bnb.nn.Linear4bit(
                    *size,
                    compute_dtype=config.bnb_4bit_compute_dtype,
                    compress_statistics=config.bnb_4bit_use_double_quant,
                    quant_type=config.bnb_4bit_quant_type,
                )
        if matrix.weight.is_meta:
            new.weight = _shapes_alone(new, matrix.weight)
        else:
            extra = {key: value for key, value in vars(new.weight).items() if key != "data"}
            plain = matrix.weight.detach().contiguous()  # a view, where `linear` has turned it
            new.weight = type(new.weight)(plain, **(extra | {"requires_grad": False})).to(_device())
        new.bias = matrix.bias
        model.set_submodule(name, new.train(matrix.training))
    model.requires_grad_(False)
    _mark(model, config)
    # bitsandbytes loses the scales of 8 bits that move after a first forward pass.
    moved: Any = model  # transformers types its own `to` otherwise
    return model if next(model.parameters()).is_meta else moved.to(_device())


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """Write packed matrices out again, in place, as bitsandbytes does: `nn.Linear` in fp32."""
    import bitsandbytes as bnb

    for name, packed in list(model.named_modules()):
        if not isinstance(packed, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            continue
        with torch.device("meta"):
            plain = nn.Linear(packed.in_features, packed.out_features, packed.bias is not None)
        weight: Any = packed.weight
        if isinstance(packed, bnb.nn.Linear4bit):
            values = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        else:
            scales = packed.state.SCB if weight.SCB is None else weight.SCB
            values = bnb.functional.int8_vectorwise_dequant(weight.data, scales)
        plain.weight = nn.Parameter(values.float(), requires_grad=False)
        if packed.bias is not None:
            plain.bias = nn.Parameter(packed.bias.detach().float(), requires_grad=False)
        model.set_submodule(name, plain.train(packed.training))
    _unmark(model)
    return model


def _packable(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The matrices that are packed by name: linear layers but the head, and none that is tied."""
    head, first = model.get_output_embeddings(), model.get_input_embeddings()
    tied = getattr(first, "weight", None)
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and module.weight is not tied
    }


def _device() -> torch.device:
    """The device of this process."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def _mark(model: Any, config: BitsAndBytesConfig) -> None:
    """Say of a model what PEFT and transformers ask of one that was loaded quantised."""
    model.is_quantized = True
    model.is_loaded_in_8bit = bool(config.load_in_8bit)
    model.is_loaded_in_4bit = bool(config.load_in_4bit)
    model.quantization_method = config.quant_method
    model.config = copy.deepcopy(model.config)  # the base's own says how to load it
    model.config.quantization_config = config


def _unmark(model: Any) -> None:
    for name in (
        "is_quantized",
        "is_loaded_in_8bit",
        "is_loaded_in_4bit",
        "quantization_method",
        "hf_quantizer",
    ):
        vars(model).pop(name, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


# ------------------------------------------------------------------------- without values


def _shapes_alone(new: Any, weight: torch.Tensor) -> nn.Parameter:
    """The packed parameter of a matrix (out, in) on the meta device, with the scales beside it.

    Source of the shapes: `bitsandbytes.functional.quantize_4bit` and `int8_vectorwise_quant`.
    """
    import bitsandbytes as bnb

    parameter = new.weight

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if isinstance(new, bnb.nn.Linear8bitLt):
        data = empty(*weight.shape, dtype=torch.int8)
        return bnb.nn.Int8Params(data, requires_grad=False, CB=data, SCB=empty(weight.shape[0]))
    blocks = -(-weight.numel() // BLOCK)
    state = bnb.functional.QuantState(
        absmax=empty(blocks),
        shape=weight.shape,
        code=empty(16),
        blocksize=BLOCK,
        quant_type=parameter.quant_type,
        dtype=weight.dtype,
    )
    if parameter.compress_statistics:
        state.absmax, state.offset, state.nested = empty(blocks, dtype=torch.uint8), empty(), True
        state.state2 = bnb.functional.QuantState(
            absmax=empty(-(-blocks // OF_SCALES)),
            code=empty(256),
            blocksize=OF_SCALES,
            dtype=torch.float32,
        )
    new.quant_state = state
    return bnb.nn.Params4bit(
        empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8),
        requires_grad=False,
        quant_state=state,
        compress_statistics=parameter.compress_statistics,
        quant_type=parameter.quant_type,
        bnb_quantized=True,
        module=new,
    )
