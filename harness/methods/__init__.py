"""Every way to adapt a model. `adapt` is the only thing that knows which method a run uses."""

from __future__ import annotations

import dataclasses

import peft
import torch
from torch import nn
from transformers import PreTrainedModel

from harness.config.errors import ConfigError
from harness.config.method_schema import LoraMethod, PeftMethod, SvdMethod
from harness.config.run_config import RunConfig
from harness.methods import for_optimizer, refusals, starts
from harness.methods.adapters import ADAPTERS, lora, targets_of
from harness.methods.initialisation import reads_text, reads_weights

DENSE = {  # methods that need weights as they are, and why
    "full": "packed weights cannot be trained",
    "udv": "packed weights cannot be decomposed",
    "truncate": "packed weights cannot be decomposed",
}


def adapt(
    model: PreTrainedModel, run: RunConfig, text: starts.TrainingText | None = None
) -> nn.Module:
    """Turn the base model into the model that is trained: what trains has `requires_grad`.

    The adapter's own random draws come from torch's global generator, which the worker seeds.
    `text` is what a start of LoRA may read of the training split (`reads_text`).

    Raises:
        ConfigError: a target, rank or field that does not fit this model.
    """
    if getattr(model.config, "quantization_config", None) and run.method.name in DENSE:
        raise ConfigError(
            f"method={run.method.name}: {run.model.name} is quantised, and {DENSE[run.method.name]}"
            "; use method=lora or method=peft, or a base that is not quantised"
        )
    with_text = reads_text(run)
    adapted = lora(model, run, text) if with_text else ADAPTERS[run.method.name](model, run)
    if isinstance(adapted, peft.PeftModel):
        refusals.check_run(adapted, run)
    for_optimizer.fit(adapted, run)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.bfloat16:
            raise ConfigError(
                f"model.frozen_dtype=bf16: this method trains {name}, a weight of the base, and "
                "what trains must be fp32; set model.frozen_dtype=fp32"
            )
    return adapted


def check(model: PreTrainedModel, run: RunConfig) -> nn.Module:
    """`adapt` on a model without weights: names, shapes and ranks, before anything is loaded.

    What only the weights can tell is replaced: a rank by energy counts as the full one, and an
    initialisation from the weights as PEFT's default.
    """
    method = run.method
    if isinstance(method, SvdMethod) and method.energy is not None:
        method = dataclasses.replace(method, energy=None, rank="full")
    if isinstance(method, LoraMethod) and reads_weights(method.init):
        matched = targets_of(model, run, method.fields)
        starts.check(method.init, model, matched, method.fields)
        others = {k: v for k, v in method.fields.items() if k not in starts.CONFIGS}
        method = dataclasses.replace(method, init=True, fields=others)
    init = "init_lora_weights"
    given = method.fields.get(init) if isinstance(method, PeftMethod) else None
    if isinstance(method, PeftMethod) and reads_weights(given) and not starts.reads_text(given):
        method = dataclasses.replace(method, fields={**method.fields, init: True})
    return adapt(model, dataclasses.replace(run, method=method))
