"""The blocks of a transformer: found, compiled, and run again in the backward pass."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn

from harness.config.errors import ConfigError
from harness.config.schema import TrainConfig


def checkpoint_activations(model: nn.Module, cfg: TrainConfig) -> nn.Module:
    """With `train.checkpointing` keep a block's input only, and run the block again in backward.

    Raises:
        ConfigError: an architecture that has no blocks to checkpoint.
    """
    if cfg.checkpointing and any(p.requires_grad for p in model.parameters()):
        kind = str(model.active_peft_config.peft_type) if isinstance(model, PeftModel) else ""
        if kind.removeprefix("PeftType.") in ("PREFIX_TUNING", "CARTRIDGE"):
            raise ConfigError(
                "train.checkpointing=true: it would drop the prompts' keys and values, which pass "
                "by the blocks' cache; set it to false"
            )
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        try:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise ConfigError(f"train.checkpointing=true: {error}") from error
    return model


def compile_blocks(model: nn.Module) -> nn.Module:
    """Compile every transformer block, in place: blocks are alike and share what is compiled.

    Raises:
        ConfigError: an architecture that names no blocks.
    """
    model_blocks = blocks(model)
    if not model_blocks:
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        raise ConfigError(
            f"train.compile=true: {type(base).__name__} names no blocks to compile; set it to false"
        )
    for block in model_blocks:
        block.compile()
    return model


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks, or nothing where the architecture names none."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    names = base._no_split_modules or ()
    return [module for module in base.modules() if type(module).__name__ in names]
