"""Whether an adapter can be merged into the base, asked before training."""

from __future__ import annotations

import copy

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from harness.models import quantized


def reason_unsupported(model: nn.Module) -> str | None:
    """Return why the adapter of `model` cannot be merged, in PEFT's words; None where it can.

    Every layer is merged in a copy, one after another: a method may take some layers and not
    others. `model` and torch's generators stay as they are.
    """
    if not isinstance(model, PeftModel):
        return None
    kind = getattr(model.active_peft_config.peft_type, "value", model.active_peft_config.peft_type)
    if not hasattr(model, "merge_and_unload"):
        return f"{kind} has nothing to merge: it adds prompts, not weights"
    if packing := quantized.packing_of(getattr(model, "config", None)):
        return (
            f"{kind} cannot be merged into weights quantised by {packing}: the sums would be "
            "rounded to as few bits, which is another model"
        )
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            check = getattr(model.base_model, "_check_merge_allowed", None)
            if check is not None:
                check()
            for layer in model.modules():
                if isinstance(layer, BaseTunerLayer):
                    copy.deepcopy(layer).merge()
    except Exception as error:  # whatever a method raises where it cannot do it
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"{kind} cannot be merged ({reason[:200]})"
    return None
