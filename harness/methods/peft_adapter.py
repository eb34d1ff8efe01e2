"""PEFT's adapter on a model, and what is refused of it once it is there."""

from __future__ import annotations

import copy
import dis
from typing import Any

import peft
from torch import nn
from transformers import PreTrainedModel

from harness.config.errors import ConfigError
from harness.methods import fields, refusals, udv, weight_tying
from harness.methods.peft_config import UNFIT


class NeedsWeightsError(ConfigError):
    """A method that cannot be built on the meta device: `check` and counts cannot tell about it."""


def wrapped(model: PreTrainedModel, config: Any, given: dict[str, Any]) -> nn.Module:
    """`model` with PEFT's adapter, after checks of `given`, the fields that the user has set.

    Raises:
        ConfigError: the adapter does not fit the model, or does not do what a field asks.
        NeedsWeightsError: it cannot be built on the meta device.
    """
    kind, where = refusals.kind(config), "method.fields"
    fields.check_names(config, model, given, where)
    patterns = fields.pattern_values(config, model, given)
    # On the meta device PEFT's initialisations are left out, some of which read the weights; but
    # with them go the ties of weights, and MonteCLoRA's parameters.
    on_meta = next(model.parameters()).device.type == "meta"
    needed = ("ensure_weight_tying", "monteclora_config")
    left_out = on_meta and not any(getattr(config, name, None) for name in needed)
    modules_to_save = copy.copy(getattr(config, "modules_to_save", None))
    with refusals.reading(config) as seen:
        try:
            adapted = peft.get_peft_model(model, config, low_cpu_mem_usage=left_out)
        except UNFIT as error:
            if on_meta and not _raised_by_peft(error):
                raise NeedsWeightsError(f"{kind} reads the weights to be built") from error
            raise ConfigError(f"{kind} does not fit this model: {error}") from error
        ran = kind == udv.PEFT_TYPE or refusals.try_out(adapted, labels=False) is not None
    if kind != udv.PEFT_TYPE and ran:  # udv is ours, and says itself what it cannot do
        with refusals.reading(config) as by_loss:
            added = refusals.try_out(adapted, labels=True)
        refusals.check_read(config, given, seen, by_loss, where)
        if kind != "ADALORA":  # whose penalty training adds (`objective.penalty`)
            refusals.check_added(config, added or 0.0)
    refusals.check_biases(config, adapted, given, where)
    refusals.check_patterns_used(config, adapted, patterns, where)
    if getattr(config, "train", "") != "none" and not any(
        p.requires_grad for p in adapted.parameters()
    ):
        raise ConfigError(
            f"{kind} would train nothing on this model: it has no parameters for these targets"
        )
    if getattr(config, "ensure_weight_tying", False):
        weight_tying.check_tied(adapted)
        # PEFT has put the embeddings in the place of the head. By that name an adapter of GPT-2 is
        # not tied when it is loaded: PEFT knows embed_tokens and lm_head, and no wte.
        config.modules_to_save = modules_to_save
    return adapted


def _raised_by_peft(error: BaseException) -> bool:
    """Whether PEFT said so itself, rather than an operation on a tensor without values."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code = trace.tb_frame.f_code
    opcode = dis.opname[code.co_code[trace.tb_lasti]]
    module = str(trace.tb_frame.f_globals.get("__name__", ""))
    return opcode == "RAISE_VARARGS" and module.startswith(("peft.", "harness."))
