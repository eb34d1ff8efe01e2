"""What PEFT offers and a run here does not do: refused with the reason, whichever way it is asked.

`before` looks at a configuration, before there is an adapted model; `after` asks the adapted model
itself, so that what a new PEFT method wants of a training loop is found without a list of names.
What PEFT documents as a loss to be added by the caller is added (`NextToken.own_loss`).
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging as transformers_logging

from harness.config.errors import ConfigError
from harness.config.run_config import RunConfig
from harness.methods import starts
from harness.models.next_token import own_losses

ADAPTER = "default"

LOFTQ = (
    "PEFT's LoftQ runs on CUDA alone, and puts quantised weights in the place of the base's, so "
    "that the adapter would not fit the base that it names"
)
FROM_TEXT = "it reads training text before step 0, which method=lora does: method=lora method.init="
TYPES = {
    "ADALORA": "it has a method of its own here, which cuts its ranks after every step: use "
    "method=adalora",
    "XLORA": "X-LoRA mixes adapters that were trained before, and a run trains one",
}
FIELDS = {
    "arrow_config": "Arrow routes between adapters that were trained before, and a run trains one",
    "runtime_config": "it moves work between GPU and CPU, which launch and train settle here",
    "megatron_config": "it is for the parallel layers of Megatron, which no model here has",
    "megatron_core": "it is for the parallel layers of Megatron, which no model here has",
}
OF_THE_MODEL = ("token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules")
NEVER_ACTS = {  # read by PEFT, to no effect
    ("OFT", "module_dropout"): "PEFT makes its layer of it and never calls it",
    ("CPT", "num_virtual_tokens"): "it is the number of cpt_token_ids",
}
# (method, field) -> the field without whose value (None: any that is true) it does nothing.
ACTS_WITH: dict[tuple[str, str], tuple[str, Any]] = {
    ("P_TUNING", "encoder_num_layers"): ("encoder_reparameterization_type", "LSTM"),
    ("PREFIX_TUNING", "encoder_hidden_size"): ("prefix_projection", None),
    ("OFT", "eps"): ("coft", None),
    ("MISS", "mini_r"): ("init_weights", "mini"),
    ("ADAMSS", "svd_threshold"): ("use_dynamic_rank", None),
    ("LOKR", "rank_dropout_scale"): ("rank_dropout", None),
    ("LOHA", "rank_dropout_scale"): ("rank_dropout", None),
}
# Act through the biases of the adapted layers alone.
ON_BIASES = {("GLORA", "config_C"), ("GLORA", "config_D_E")}
OF_THE_HARNESS = {f.name for f in dataclasses.fields(peft.PeftConfig)}  # what every method has


def kind(config: peft.PeftConfig) -> str:
    """Return the name that PEFT has for a method, such as LORA."""
    return str(getattr(config.peft_type, "value", config.peft_type))


# --------------------------------------------------------------------------- before


def check_type(name: str, config_class: type) -> None:
    """Refuse a method that no run can train.

    Raises:
        ConfigError: with the reason.
    """
    key = f"method.peft_type={name}"
    if name in TYPES:
        raise ConfigError(f"{key}: {TYPES[name]}")
    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING[name]  # type: ignore[index]  # by name, as PEFT is
    if "task_ids" in inspect.signature(tuner.forward).parameters:
        raise ConfigError(
            f"{key}: it needs the task of every example (task_ids), and a text has one task"
        )
    # A switch of its own says whether the hook does anything: see `check_config`.
    if hasattr(tuner, "update_and_allocate") and not _switch(config_class):
        raise ConfigError(f"{key}: {_MOVES}")


_MOVES = (
    "it changes its own ranks or masks after every step (update_and_allocate), which the training "
    "loop does not do"
)


def _switch(config_class: type) -> str | None:
    """The field that turns `update_and_allocate` on, where there is one."""
    return next((f.name for f in dataclasses.fields(config_class) if f.name == "use_asa"), None)


def check_given(config_class: type, fields: dict[str, Any], where: str) -> None:
    """Refuse fields that a run cannot set, whatever their values.

    Raises:
        ConfigError: with the reason.
    """
    for name, value in fields.items():
        key = f"{where}.{name}"
        if name in OF_THE_HARNESS:
            raise ConfigError(f"{key}: the harness sets it for every method; leave it out")
        if name in FIELDS and value is not None:
            raise ConfigError(f"{key}: {FIELDS[name]}")
        if name == "loftq_config" and value:
            raise ConfigError(f"{key}: {LOFTQ}; use pissa")
    switch = _switch(config_class)
    if switch and fields.get(switch):
        raise ConfigError(f"{where}.{switch}: {_MOVES}; set it to false")


def check_init(init: Any, conv1d: bool, key: str) -> None:
    """LoRA's start (`init_lora_weights`), however it is asked for.

    Raises:
        ConfigError: a start that reads the data, or is wrong on this model.
    """
    if init == "loftq":
        raise ConfigError(f"{key}={init}: {LOFTQ}; use pissa")
    if starts.reads_text(init) and key != "method.init":
        raise ConfigError(f"{key}={init}: {FROM_TEXT}{init}")
    if init == "olora" and conv1d:
        raise ConfigError(
            f"{key}={init} is wrong on GPT-2: PEFT takes the weight as (out, in) there, and "
            "Conv1D stores it (in, out); leave model.linear at auto, or use pissa or orthogonal"
        )


def check_built(config: peft.PeftConfig) -> None:
    """Refuse a configuration that lacks what PEFT needs.

    Raises:
        ConfigError: naming the field.
    """
    if config.is_prompt_learning and not getattr(config, "num_virtual_tokens", None):
        raise ConfigError(
            f"{kind(config)} needs method.fields.num_virtual_tokens, how many tokens stand before "
            "the text, e.g. +method.fields.num_virtual_tokens=16"
        )
    tokens = getattr(config, "num_virtual_tokens", None)
    if tokens is not None and tokens < 1:
        raise ConfigError(f"method.fields.num_virtual_tokens={tokens}: expected 1 or more")


# --------------------------------------------------------------------------- after


@contextmanager
def reading(config: Any) -> Iterator[set[str]]:
    """The names of the fields of `config` that are read in the body, but for its own methods."""
    seen: set[str] = set()
    own = type(config)

    def read(self: Any, name: str) -> Any:
        code = inspect.currentframe().f_back.f_code  # type: ignore[union-attr]  # CPython has both
        if code.co_name != "__post_init__":
            seen.add(name)
        return object.__getattribute__(self, name)

    config.__class__ = type(own.__name__, (own,), {"__getattribute__": read})
    try:
        yield seen
    finally:
        config.__class__ = own


def check_read(
    config: Any, given: dict[str, Any], seen: set[str], by_loss: set[str], where: str
) -> None:
    """Refuse a field that is read neither to build nor to run the adapter, or to no effect.

    What PEFT reads and does nothing with is known by name (NEVER_ACTS, ACTS_WITH).

    `seen` holds the fields that PEFT has read to build the adapter and to run it, `by_loss` those
    that it has read when the model was given labels.

    Raises:
        ConfigError: naming the field.
    """
    defaults = {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(config)
    }
    for name, value in given.items():
        saving = name.startswith("save_")  # which PEFT reads when it saves
        if value == defaults[name] or saving:
            continue
        key = f"{where}.{name}={value}"
        if reason := _no_effect(config, name):
            raise ConfigError(f"{key}: {kind(config)} does nothing with it: {reason}")
        if name in seen:
            continue
        if name not in by_loss:
            raise ConfigError(
                f"{key}: {kind(config)} does nothing with it here: PEFT reads it neither when it "
                "builds this adapter nor when the model runs; leave it out"
            )
        if value not in (0, None, "none"):
            raise ConfigError(
                f"{key}: it acts through the loss that PEFT's own forward pass makes of labels, "
                "which a run here does not train on; leave it out"
            )


def _no_effect(config: Any, name: str) -> str | None:
    """Why PEFT reads a field to no effect, as the end of a message; None where it has one."""
    method = kind(config)
    if name in OF_THE_MODEL and config.is_prompt_learning:
        return "the model says it; leave it out"
    if reason := NEVER_ACTS.get((method, name)):
        return f"{reason}; leave it out"
    other, wanted = ACTS_WITH.get((method, name), ("", None))
    if not other:
        return None
    value = getattr(config, other)
    current = str(getattr(value, "value", value))
    if (current == wanted) if wanted is not None else value:
        return None
    return f"it acts with {f'{other}={wanted}' if wanted else other} alone"


def try_out(adapted: PeftModel, *, labels: bool) -> float | None:
    """Run a few tokens through a freshly adapted model, whose weights and generators stay.

    Returns the loss that PEFT adds to the model's, in nats; 0 without labels, and None where the
    meta device did not let the model run.

    Raises:
        ConfigError: the model does not run.
    """
    try:
        return _added_loss(adapted, labels)
    except Exception as error:  # of any kind, from within an adapter of others
        if next(adapted.parameters()).device.type == "meta":
            return None
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "alloc" in str(error):
            raise
        raise ConfigError(
            f"{kind(adapted.active_peft_config)} does not run on this model: {error}"
        ) from error


def check_added(config: Any, added: float) -> None:
    """Refuse a method with a loss of its own, which a run here does not train on.

    Raises:
        ConfigError: with the fields that turn it off.
    """
    if abs(added) <= 1e-3 or math.isnan(added):  # NaN: of no token of the text
        return
    off = ", ".join(
        f"method.fields.{f.name}=0" for f in dataclasses.fields(config) if "loss_weight" in f.name
    )
    if "cpt_tokens_type_mask" in vars(config):
        off = "leave label tokens (4) out of method.fields.cpt_tokens_type_mask"
    raise ConfigError(
        f"{kind(config)}: PEFT adds a term of its own to the model's loss ({added:+.3g} nats on a "
        f"trial), which a run here does not train on; {off or 'no field turns it off'}"
    )


def check_run(adapted: PeftModel, run: RunConfig) -> None:
    """Refuse what an adapter and a setting of the run cannot do together.

    Raises:
        ConfigError: naming both.
    """
    config: Any = adapted.active_peft_config
    for name in own_losses(adapted):
        field = f"{name.removeprefix('_get_').removesuffix('_loss')}_config"
        if getattr(config, field, None) is not None and run.launch.sharded:
            raise ConfigError(
                f"launch.accelerate=fsdp with method.fields.{field}: its loss reads weights "
                "outside of a forward pass, where a rank has a part of them; set "
                "launch.accelerate=ddp"
            )
    for module in adapted.modules():
        factors = getattr(module, "boft_R", {})  # PEFT's own, by adapter
        if ADAPTER in factors and len(factors[ADAPTER]) != config.boft_n_butterfly_factor:
            raise ConfigError(
                f"method.fields.boft_n_butterfly_factor={config.boft_n_butterfly_factor}: PEFT "
                f"makes {len(factors[ADAPTER])} of it here, for its CUDA extension is not built; "
                f"set it to {len(factors[ADAPTER])}"
            )
    if getattr(config, "monteclora_config", None) is not None and run.train.checkpointing:
        raise ConfigError(
            "train.checkpointing=true with method.fields.monteclora_config: the second pass "
            "through a block would draw other noise; set it to false"
        )


@torch.no_grad()
def _added_loss(adapted: PeftModel, with_labels: bool) -> float:
    """The loss that the model reports, less the mean nats of its logits.

    What trains is moved a little for it, since an adapter may begin as nothing at all.
    """
    base: Any = adapted.get_base_model()
    trained = [p for p in adapted.parameters() if p.requires_grad and p.is_floating_point()]
    before = [p.detach().clone() for p in trained]
    training = [(module, module.training) for module in adapted.modules()]
    device = next(adapted.parameters()).device
    ids = torch.arange(6, device=device)[None] % base.get_input_embeddings().weight.shape[0]
    labels = ids.clone()
    labels[:, 0] = -100  # what stands before the text predicts it, and counts in some methods
    given = {"labels": labels} if with_labels else {}
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it warns of which loss it takes
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            adapted.eval()
            for parameter in trained:
                parameter.add_(1e-2)
            outputs = adapted(input_ids=ids, use_cache=False, **given)
    finally:
        for parameter, old in zip(trained, before, strict=True):
            parameter.copy_(old)
        for module, mode in training:
            module.training = mode
        transformers_logging.set_verbosity(verbosity)
    if device.type == "meta" or not with_labels or outputs.loss is None:
        return 0.0
    logits = outputs.logits[:, -ids.shape[1] : -1].float().flatten(0, 1)
    return float(outputs.loss.float() - F.cross_entropy(logits, labels[:, 1:].flatten()))


def check_biases(config: Any, adapted: PeftModel, given: dict[str, Any], where: str) -> None:
    """Refuse a field that acts through biases where there are none.

    Raises:
        ConfigError: naming the field.
    """
    base: Any = adapted.get_base_model()
    layers = [m.get_base_layer() for m in base.modules() if isinstance(m, BaseTunerLayer)]
    has_bias = any(getattr(layer, "bias", None) is not None for layer in layers)
    keys = {name: f"{where}.{name}" for name in given if (kind(config), name) in ON_BIASES}
    keys["bias"] = f"{where}.bias" if "bias" in given else "method.bias"
    for name, key in keys.items():
        value, default = (getattr(c, name, "none") for c in (config, type(config)))
        everywhere = name == "bias" and value == "all"
        if everywhere and any(n.endswith("bias") for n, _ in base.named_parameters()):
            continue
        if value != default and not has_bias:
            subject = "nothing in the model" if everywhere else "none of the adapted layers"
            raise ConfigError(
                f"{key}={value}: {kind(config)} does nothing with it here: {subject} has a bias; "
                "leave it out"
            )


def check_patterns_used(
    config: Any, adapted: PeftModel, expected: dict[str, dict[str, Any]], where: str
) -> None:
    """Compare what the layers hold with the `*_pattern` fields: {field: {module: value}}.

    Raises:
        ConfigError: PEFT has not used a value.
    """
    base: Any = adapted.get_base_model()
    names = {"rank": ("r",), "alpha": ("alpha", "lora_alpha")}
    for name, values in expected.items():
        stem = name.removesuffix("_pattern")
        for module, value in values.items():
            layer: nn.Module = base.get_submodule(module)
            if not isinstance(layer, BaseTunerLayer):
                continue
            for attribute, by_adapter in vars(layer).items():
                meant = attribute in names.get(stem, ()) or attribute.endswith(stem)
                if not meant or not isinstance(by_adapter, dict) or ADAPTER not in by_adapter:
                    continue
                if by_adapter[ADAPTER] != value:
                    raise ConfigError(
                        f"{where}.{name}: PEFT gives {module} {by_adapter[ADAPTER]} instead of "
                        f"{value}: write its key as the end of the module's name"
                    )
