"""Embeddings and head that share one weight, and an adapter that sits on one of them or on both.

PEFT adds an adapter to its own module alone: with LoRA on the embeddings W + B A is looked up, and
a tied head goes on multiplying by W. What is merged must be that model, so a shared weight is
copied first, and the saved configuration says that nothing is tied any more (PEFT sees to that).
"""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from harness.config.errors import ConfigError


def merged(model: PeftModel) -> nn.Module:
    """Merge the adapter and unload PEFT, in place; logits stay, also where weights were tied."""
    holders: dict[int, int] = {}  # id of a parameter -> modules that hold it
    for module in model.modules():
        for parameter in module._parameters.values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            base: Any = module.get_base_layer()
            weight = getattr(base, "weight", None)
            if weight is not None and holders.get(id(weight), 0) > 1:
                base.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    return model.merge_and_unload()


def check_tied(model: PeftModel) -> None:
    """What `ensure_weight_tying` asks of PEFT, which ties less than it says.

    Raises:
        ConfigError: nothing was tied, or adapters of targets: two parameters over one memory.
    """
    first: Any = model.get_input_embeddings()
    last: Any = model.get_output_embeddings()
    key = "method.fields.ensure_weight_tying"
    save = "method.fields.modules_to_save=[lm_head]"
    if isinstance(first, BaseTunerLayer) or isinstance(last, BaseTunerLayer):
        raise ConfigError(
            f"{key}: PEFT ties adapters of targets by two parameters over one memory, which the "
            f"optimizer would move twice; target one of embeddings and head, or train the weight "
            f"itself: {save}"
        )
    if last is None or first.weight is not last.weight or not first.weight.requires_grad:
        raise ConfigError(
            f"{key}: nothing that trains is tied here; it needs a model whose embeddings and head "
            f"are tied, and the head by name: {save}"
        )
