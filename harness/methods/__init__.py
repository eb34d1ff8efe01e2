"""Every way to adapt a model. `adapt` is the only thing that knows which method a run uses."""

from __future__ import annotations

import copy
import dataclasses
import dis
import re
from collections.abc import Callable
from typing import Any, cast, get_args, get_origin, get_type_hints

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from transformers import PreTrainedModel

from harness.config import matrix_roles, peft_fields
from harness.config.errors import ConfigError, nearest
from harness.config.run_config import RunConfig
from harness.config.schema import (
    AdaloraMethod,
    FullMethod,
    LoraMethod,
    PeftMethod,
    SvdMethod,
    UdvMethod,
)
from harness.methods import (
    adalora,
    fields,
    for_optimizer,
    lora_layer,
    refusals,
    starts,
    targets,
    train_only,
    udv,
    weight_tying,
)
from harness.methods.model_facts import factored_total, rank_facts, svd_facts
from harness.methods.values import typed

__all__ = ["factored_total", "rank_facts", "svd_facts"]


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
    adapted = _lora(model, run, text) if with_text else ADAPTERS[run.method.name](model, run)
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


def _none(model: PreTrainedModel, run: RunConfig) -> nn.Module:
    return model.requires_grad_(False)


def _full(model: PreTrainedModel, run: RunConfig) -> nn.Module:
    assert isinstance(run.method, FullMethod)
    if not run.method.train_only:
        return model.requires_grad_(True)
    model.requires_grad_(False)
    for parameter in train_only.select(model, run.method.train_only).values():
        parameter.requires_grad_(True)
    return model


def _lora(
    model: PreTrainedModel, run: RunConfig, text: starts.TrainingText | None = None
) -> nn.Module:
    method = run.method
    assert isinstance(method, LoraMethod)
    matched = _targets(model, run, method.fields)
    _check_ranks({"r": method.r}, matched)
    refusals.check_init(method.init, matched.conv1d, "method.init")
    starts.check(method.init, model, matched, method.fields)
    patterns = {
        name: dict(getattr(method, name))
        for name in ("rank_pattern", "alpha_pattern")
        if getattr(method, name)
    }
    named = {
        "r": method.r,
        "lora_alpha": method.lora_alpha,
        "lora_dropout": method.dropout,
        "use_rslora": method.use_rslora,
        "use_dora": method.use_dora,
        "bias": method.bias,
        "init_lora_weights": method.init,
        "target_modules": matched.suffixes,
        "fan_in_fan_out": matched.conv1d,
        **patterns,
    }
    if method.init == "lora_ga" and "lora_ga_config" not in method.fields:
        named["lora_ga_config"] = peft.LoraGAConfig()
    config = lora_layer.fuse(_peft_config(peft.LoraConfig, named, method.fields))
    fields.check_names(config, model, patterns, "method")
    expected = fields.pattern_values(config, model, patterns)
    if not starts.reads_text(method.init):
        adapted = _wrap(model, config, method.fields)
    else:
        others = {k: v for k, v in method.fields.items() if k not in starts.CONFIGS}
        adapted = starts.started(config, model, text, lambda: _wrap(model, config, others))
    if method.init != "eva":  # which moves ranks
        refusals.check_patterns_used(config, cast(Any, adapted), expected, "method")
    return adapted


def reads_text(run: RunConfig) -> bool:
    """Whether the method starts from training text that is read before step 0."""
    return isinstance(run.method, LoraMethod) and starts.reads_text(run.method.init)


def moves_ranks(run: RunConfig) -> bool:
    """Whether the text says what ranks matrices get, as EVA's does where its rho is not 1."""
    method = run.method
    if not isinstance(method, LoraMethod) or method.init != "eva":
        return False
    given: dict[str, Any] = method.fields.get("eva_config") or {}
    return float(given.get("rho", peft.EvaConfig().rho)) != 1


def _adalora(model: PreTrainedModel, run: RunConfig) -> nn.Module:
    method = run.method
    assert isinstance(method, AdaloraMethod)
    matched = _targets(model, run, method.fields)
    name, limit = matched.smallest()
    if method.first_rank > limit:
        raise ConfigError(
            f"method.init_r={method.first_rank}: {name} allows a rank of {limit} at most"
        )
    start = method.fields.get("init_lora_weights", True)
    if not isinstance(start, bool):
        raise ConfigError(
            f"method.fields.init_lora_weights={start}: AdaLoRA has one start of its own, and PEFT "
            "takes any name for it; leave it out"
        )
    named = adalora.config_fields(method, run.train.steps) | {
        "target_modules": matched.suffixes,
        "fan_in_fan_out": matched.conv1d,
    }
    config = _peft_config(peft.AdaLoraConfig, named, method.fields)
    adapted = _wrap(model, config, method.fields)
    for name, parameter in adapted.named_parameters():
        if ".ranknum." in name:  # the first rank, which PEFT lets train where it moves or casts it
            parameter.requires_grad_(False)
    return adapted


def _truncate(model: PreTrainedModel, run: RunConfig) -> nn.Module:
    return _svd(model, run, train="none", residual="drop")


def _udv(model: PreTrainedModel, run: RunConfig) -> nn.Module:
    method = run.method
    assert isinstance(method, UdvMethod)
    return _svd(
        model,
        run,
        train=method.train,
        residual=method.residual,
        orthogonality=method.orthogonality,
        store_factors=method.store_factors,
    )


def _svd(model: PreTrainedModel, run: RunConfig, **named: Any) -> nn.Module:
    method = run.method
    assert isinstance(method, SvdMethod)
    matched = _targets(model, run, method.fields)
    named |= {
        "rank": method.rank,
        "energy": method.energy,
        "which": method.which,
        "rank_pattern": dict(method.rank_pattern),
        "seed": run.seed,
        "target_modules": matched.suffixes,
    }
    config = _peft_config(udv.UDVConfig, named, method.fields)
    fields.check_names(config, model, ["rank_pattern"], "method")
    return _wrap(model, config, method.fields)


def _peft(model: PreTrainedModel, run: RunConfig) -> nn.Module:
    method = run.method
    assert isinstance(method, PeftMethod)
    config_class = peft_class(method)
    names = {f.name for f in dataclasses.fields(config_class)}
    named: dict[str, Any] = {}
    conv1d = False
    if _takes_matrices(method, config_class):
        matched = _targets(model, run, method.fields)
        conv1d = matched.conv1d
        _check_ranks(method.fields, matched)
        named["target_modules"] = matched.suffixes
        if "fan_in_fan_out" in names:
            named["fan_in_fan_out"] = matched.conv1d
        if "feedforward_modules" in names:  # IA3 scales these at their input
            mlp = matrix_roles.mlp_of(model.config.model_type)
            named["feedforward_modules"] = [
                m for m in matched.suffixes if m in mlp or m.startswith("mlp")
            ]
    init = "init_lora_weights"
    if init in names:
        refusals.check_init(method.fields.get(init), conv1d, f"method.fields.{init}")
    named = {key: value for key, value in named.items() if key not in method.fields}
    return _wrap(model, _peft_config(config_class, named, method.fields), method.fields)


def peft_class(method: PeftMethod) -> type[peft.PeftConfig]:
    """PEFT's configuration class of a method by its name.

    Raises:
        ConfigError: PEFT has no such method, or no run here can train it.
    """
    classes = {str(getattr(k, "value", k)): v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    name = method.peft_type.upper()
    if name not in classes:
        raise ConfigError(f"method.peft_type={method.peft_type}: {nearest(name, classes)}")
    refusals.check_type(name, classes[name])
    return classes[name]


def _takes_matrices(method: PeftMethod, config_class: type) -> bool:
    """Whether `targets` says what the method adapts; or else PEFT's default or its own fields."""
    hint = get_type_hints(config_class).get("target_modules")
    if hint is None or "target_modules" in method.fields:
        return False
    lists = any(get_origin(one) is list for one in get_args(hint))
    return lists and method.peft_type.upper() not in peft_fields.OTHER_MODULES


ADAPTERS = {
    "none": _none,
    "full": _full,
    "lora": _lora,
    "adalora": _adalora,
    "udv": _udv,
    "truncate": _truncate,
    "peft": _peft,
}


DENSE = {  # methods that need weights as they are, and why
    "full": "packed weights cannot be trained",
    "udv": "packed weights cannot be decomposed",
    "truncate": "packed weights cannot be decomposed",
}


def check(model: PreTrainedModel, run: RunConfig) -> nn.Module:
    """`adapt` on a model without weights: names, shapes and ranks, before anything is loaded.

    What only the weights can tell is replaced: a rank by energy counts as the full one, and an
    initialisation from the weights as PEFT's default.
    """
    method = run.method
    if isinstance(method, SvdMethod) and method.energy is not None:
        method = dataclasses.replace(method, energy=None, rank="full")
    if isinstance(method, LoraMethod) and _reads_weights(method.init):
        matched = _targets(model, run, method.fields)
        starts.check(method.init, model, matched, method.fields)
        others = {k: v for k, v in method.fields.items() if k not in starts.CONFIGS}
        method = dataclasses.replace(method, init=True, fields=others)
    init = "init_lora_weights"
    given = method.fields.get(init) if isinstance(method, PeftMethod) else None
    if isinstance(method, PeftMethod) and _reads_weights(given) and not starts.reads_text(given):
        method = dataclasses.replace(method, fields={**method.fields, init: True})
    return adapt(model, dataclasses.replace(run, method=method))


FROM_WEIGHTS = ("pissa", "corda", "loftq", "mica", "eva", "lora_ga")  # inits that read the weights


def _reads_weights(init: Any) -> bool:
    """Whether `check` leaves a start out: not what is refused, nor MiCA, which trains A alone."""
    return str(init).startswith(FROM_WEIGHTS) and init not in ("mica", "loftq")


def num_virtual_tokens(run: RunConfig) -> int:
    """Positions that a prompt method takes from the model's context."""
    method = run.method
    if not isinstance(method, PeftMethod):
        return 0
    config_class = peft_class(method)
    if not issubclass(config_class, peft.PromptLearningConfig):
        return 0
    config: Any = _peft_config(config_class, {}, method.fields)  # CPT counts its own tokens
    return int(config.num_virtual_tokens)


def check_context(run: RunConfig, limit: int | None) -> None:
    """Training and evaluation windows against the positions that a model has.

    Raises:
        ConfigError: with the longest context that fits.
    """
    longest = max(run.data.context, run.evaluation_context)
    virtual = num_virtual_tokens(run)  # of prompt methods: they take up positions
    if limit is not None and longest + virtual > limit:
        extra = f" and {virtual} virtual tokens are" if virtual else " is"
        raise ConfigError(
            f"a context of {longest} tokens{extra} longer than {run.model.name}'s {limit}: "
            f"lower data.context (and evaluate.context) to {limit - virtual} or less"
        )


def _check_ranks(fields: dict[str, Any], matched: targets.Targets) -> None:
    """`r` against the matrices it is for."""
    name, limit = matched.smallest()
    rank = fields.get("r")
    if isinstance(rank, int) and rank > limit:
        raise ConfigError(f"method.r={rank}: {name} allows a rank of {limit} at most")


def trained_alone(model: nn.Module, run: RunConfig) -> dict[str, Any]:
    """Of `method.train_only`: the kinds of weights that train, and which of them are tied."""
    if not getattr(run.method, "train_only", None):
        return {}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    kinds = dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", name) for name in trained)
    return {"trained": list(kinds), "tied": train_only.tied(model)}


def penalty(model: nn.Module, run: RunConfig) -> Callable[[], torch.Tensor] | None:
    """What the method adds to the loss, or None: the orthogonality of U and V, or of A and B."""
    if isinstance(run.method, UdvMethod) and run.method.orthogonality:
        return lambda: udv.orthogonality_penalty(model)
    if isinstance(run.method, AdaloraMethod) and run.method.orth_reg_weight:
        return lambda: adalora.orthogonal_penalty(model)
    return None


def _targets(model: PreTrainedModel, run: RunConfig, fields: dict[str, Any]) -> targets.Targets:
    some = {"layers_to_transform", "exclude_modules", "target_parameters"} & fields.keys()
    return targets.resolve(model, run.targets, all_layers=not some)


# --------------------------------------------------------------------------- PEFT


def _peft_config(
    config_class: type, named: dict[str, Any], given: dict[str, Any]
) -> peft.PeftConfig:
    """A PEFT config from what the harness sets and `method.fields`, which names any other field.

    It gets copies: PEFT changes lists and dicts of its config in place.
    """
    where = "method.fields"
    known = {f.name for f in dataclasses.fields(config_class)}
    for name in given:
        if name in named:
            raise ConfigError(f"{where}.{name}: set it by its own key of method or targets")
        if name not in known:
            raise ConfigError(
                f"{where}.{name}: {config_class.__name__} has no such field; "
                f"{nearest(name, known, most=60)}"
            )
    refusals.check_given(config_class, given, where)
    made = typed(config_class, given, where)
    try:
        config = config_class(task_type="CAUSAL_LM", **copy.deepcopy(named), **made)
    except UNFIT as error:
        raise ConfigError(f"{config_class.__name__}: {error}") from error
    refusals.check_built(config)
    return config


def _wrap(model: PreTrainedModel, config: Any, given: dict[str, Any]) -> nn.Module:
    """`model` with PEFT's adapter, after checks of `given`, the fields that the user has set."""
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
        if kind != "ADALORA":  # whose penalty training adds (`penalty`)
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


class NeedsWeightsError(ConfigError):
    """A method that cannot be built on the meta device: `check` and counts cannot tell about it."""


# What PEFT's methods raise when a model, a field or a missing package does not suit them.
UNFIT = (
    ValueError, TypeError, NotImplementedError, AttributeError, ImportError, RuntimeError, KeyError,
    IndexError, AssertionError, OSError,
)  # fmt: skip
