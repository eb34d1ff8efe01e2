"""The adapter of every method by its name: what it is built of, and what of it trains."""

from __future__ import annotations

import dataclasses
from typing import Any, cast, get_args, get_origin, get_type_hints

import peft
from torch import nn
from transformers import PreTrainedModel

from harness.config import matrix_roles, peft_fields
from harness.config.errors import ConfigError
from harness.config.method_schema import (
    AdaloraMethod,
    FullMethod,
    LoraMethod,
    PeftMethod,
    SvdMethod,
    UdvMethod,
)
from harness.config.run_config import RunConfig
from harness.methods import adalora, fields, lora_layer, refusals, starts, targets, train_only, udv
from harness.methods.peft_adapter import wrapped
from harness.methods.peft_config import configured, peft_class


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


def lora(
    model: PreTrainedModel, run: RunConfig, text: starts.TrainingText | None = None
) -> nn.Module:
    """LoRA, from the start that `method.init` says; `text` is what such a start may read."""
    method = run.method
    assert isinstance(method, LoraMethod)
    matched = targets_of(model, run, method.fields)
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
    config = lora_layer.fuse(configured(peft.LoraConfig, named, method.fields))
    fields.check_names(config, model, patterns, "method")
    expected = fields.pattern_values(config, model, patterns)
    if not starts.reads_text(method.init):
        adapted = wrapped(model, config, method.fields)
    else:
        others = {k: v for k, v in method.fields.items() if k not in starts.CONFIGS}
        adapted = starts.started(config, model, text, lambda: wrapped(model, config, others))
    if method.init != "eva":  # which moves ranks
        refusals.check_patterns_used(config, cast(Any, adapted), expected, "method")
    return adapted


def _adalora(model: PreTrainedModel, run: RunConfig) -> nn.Module:
    method = run.method
    assert isinstance(method, AdaloraMethod)
    matched = targets_of(model, run, method.fields)
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
    config = configured(peft.AdaLoraConfig, named, method.fields)
    adapted = wrapped(model, config, method.fields)
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
    matched = targets_of(model, run, method.fields)
    named |= {
        "rank": method.rank,
        "energy": method.energy,
        "which": method.which,
        "rank_pattern": dict(method.rank_pattern),
        "seed": run.seed,
        "target_modules": matched.suffixes,
    }
    config = configured(udv.UDVConfig, named, method.fields)
    fields.check_names(config, model, ["rank_pattern"], "method")
    return wrapped(model, config, method.fields)


def _peft(model: PreTrainedModel, run: RunConfig) -> nn.Module:
    method = run.method
    assert isinstance(method, PeftMethod)
    config_class = peft_class(method)
    names = {f.name for f in dataclasses.fields(config_class)}
    named: dict[str, Any] = {}
    conv1d = False
    if takes_matrices(method, config_class):
        matched = targets_of(model, run, method.fields)
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
    return wrapped(model, configured(config_class, named, method.fields), method.fields)


def takes_matrices(method: PeftMethod, config_class: type) -> bool:
    """Whether `targets` says what the method adapts; or else PEFT's default or its own fields."""
    hint = get_type_hints(config_class).get("target_modules")
    if hint is None or "target_modules" in method.fields:
        return False
    lists = any(get_origin(option) is list for option in get_args(hint))
    return lists and method.peft_type.upper() not in peft_fields.OTHER_MODULES


def _check_ranks(fields: dict[str, Any], matched: targets.Targets) -> None:
    """`r` against the matrices it is for."""
    name, limit = matched.smallest()
    rank = fields.get("r")
    if isinstance(rank, int) and rank > limit:
        raise ConfigError(f"method.r={rank}: {name} allows a rank of {limit} at most")


def targets_of(model: PreTrainedModel, run: RunConfig, fields: dict[str, Any]) -> targets.Targets:
    """The matrices that `targets` names; all layers must have them, unless a field says which."""
    limits = {"layers_to_transform", "exclude_modules", "target_parameters"} & fields.keys()
    return targets.resolve(model, run.targets, all_layers=not limits)


ADAPTERS = {
    "none": _none,
    "full": _full,
    "lora": lora,
    "adalora": _adalora,
    "udv": _udv,
    "truncate": _truncate,
    "peft": _peft,
}
