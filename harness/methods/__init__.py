"""Every way to adapt a model. `adapt` is the only thing that knows which method a run uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from transformers import PreTrainedModel

from harness.config import (
    ConfigError,
    LoraMethod,
    PeftMethod,
    RunConfig,
    SvdMethod,
    UdvMethod,
    nearest,
)
from harness.methods import targets, udv


def adapt(model: PreTrainedModel, run: RunConfig) -> nn.Module:
    """Turn the base model into the model that is trained: what trains has `requires_grad`.

    The adapter's own random draws come from torch's global generator, which the worker seeds.

    Raises:
        ConfigError: a target, rank or field that does not fit this model.
    """
    return ADAPTERS[run.method.name](model, run)


def _none(model: PreTrainedModel, run: RunConfig) -> nn.Module:
    return model.requires_grad_(False)


def _full(model: PreTrainedModel, run: RunConfig) -> nn.Module:
    return model.requires_grad_(True)


def _lora(model: PreTrainedModel, run: RunConfig) -> nn.Module:
    method = run.method
    assert isinstance(method, LoraMethod)
    matched = _targets(model, run, method.fields)
    _check_ranks({"r": method.r, **method.fields}, matched)
    if str(method.init) in REFUSED_INITS:
        raise ConfigError(f"method.init={method.init}: {REFUSED_INITS[str(method.init)]}")
    if method.init == "olora" and matched.conv1d:
        raise ConfigError(
            "method.init=olora is wrong on GPT-2: PEFT's OLoRA takes the weight as (out, in), and "
            "Conv1D stores it (in, out); use init=pissa or orthogonal"
        )
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
    }
    return _wrap(model, _peft_config(peft.LoraConfig, named, method.fields))


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
    named |= {
        "rank": method.rank if method.energy is None else None,
        "energy": method.energy,
        "which": method.which,
        "rank_pattern": dict(method.rank_pattern),
        "seed": run.seed,
        "target_modules": _targets(model, run, method.fields).suffixes,
    }
    return _wrap(model, _peft_config(udv.UDVConfig, named, method.fields))


def _peft(model: PreTrainedModel, run: RunConfig) -> nn.Module:
    method = run.method
    assert isinstance(method, PeftMethod)
    name = method.peft_type.upper()
    classes = {str(getattr(k, "value", k)): v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if name not in classes:
        raise ConfigError(f"method.peft_type={method.peft_type}: {nearest(name, classes)}")
    if name in REFUSED_TYPES:
        raise ConfigError(f"method.peft_type={method.peft_type}: {REFUSED_TYPES[name]}")
    config_class = classes[name]
    names = {f.name for f in dataclasses.fields(config_class)}
    named: dict[str, Any] = {}
    # LN_TUNING trains whole modules, the norms by PEFT's default: targets name matrices.
    own = name == "LN_TUNING" or "target_modules" in method.fields
    if "target_modules" in names and not own:
        matched = _targets(model, run, method.fields)
        _check_ranks(method.fields, matched)
        named["target_modules"] = matched.suffixes
        if "fan_in_fan_out" in names:
            named["fan_in_fan_out"] = matched.conv1d
        if "feedforward_modules" in names:  # IA3 scales these at their input
            named["feedforward_modules"] = [m for m in matched.suffixes if m.startswith("mlp")]
    named = {key: value for key, value in named.items() if key not in method.fields}
    return _wrap(model, _peft_config(config_class, named, method.fields))


ADAPTERS = {
    "none": _none,
    "full": _full,
    "lora": _lora,
    "udv": _udv,
    "truncate": _truncate,
    "peft": _peft,
}


def check(model: PreTrainedModel, run: RunConfig) -> nn.Module:
    """`adapt` on a model without weights: names, shapes and ranks, before anything is loaded.

    What only the weights can tell is replaced: a rank by energy counts as the full one, and an
    initialisation from the weights as PEFT's default.
    """
    method = run.method
    if isinstance(method, SvdMethod) and method.energy is not None:
        method = dataclasses.replace(method, energy=None, rank="full")
    if isinstance(method, LoraMethod) and str(method.init).startswith(FROM_WEIGHTS):
        method = dataclasses.replace(method, init=True)
    try:
        return adapt(model, dataclasses.replace(run, method=method))
    except ConfigError as error:
        if isinstance(method, PeftMethod) and "meta tensor" in str(error):
            return model  # PEFT reads weights to build this method: checked on the real model
        raise


FROM_WEIGHTS = ("pissa", "corda", "loftq", "mica", "eva", "lora_ga")  # inits that read the weights


REFUSED_INITS = {  # each needs a pass over the data that nothing here makes
    "eva": "EVA reads activations of the training data first, which this harness does not do",
    "corda": "CorDA reads activations of the training data first, which this harness does not do",
    "lora_ga": "LoRA-GA reads gradients of the training data first, which this harness does not do",
}
REFUSED_TYPES = {
    "ADALORA": "AdaLoRA moves its ranks after every step, which the training loop does not do",
}


def num_virtual_tokens(run: RunConfig) -> int:
    """Positions that a prompt method takes from the model's context."""
    if isinstance(run.method, PeftMethod):
        return int(run.method.fields.get("num_virtual_tokens") or 0)
    return 0


def _check_ranks(fields: dict[str, Any], matched: targets.Targets) -> None:
    """`r` and `rank_pattern` against the matrices they are for."""
    name, limit = matched.smallest()
    rank = fields.get("r")
    if isinstance(rank, int) and rank > limit:
        raise ConfigError(f"method.r={rank}: {name} allows a rank of {limit} at most")
    for pattern, rank in (fields.get("rank_pattern") or {}).items():
        for name, shape in matched.shapes.items():
            if name.endswith(pattern) and rank > min(shape):
                raise ConfigError(
                    f"method.fields.rank_pattern.{pattern}={rank}: {name} allows a rank of "
                    f"{min(shape)} at most"
                )


def penalty(model: nn.Module, run: RunConfig) -> Callable[[], torch.Tensor] | None:
    """What the method adds to the loss, or None: the orthogonality of U and V."""
    if isinstance(run.method, UdvMethod) and run.method.orthogonality:
        return lambda: udv.orthogonality_penalty(model)
    return None


def _targets(model: PreTrainedModel, run: RunConfig, fields: dict[str, Any]) -> targets.Targets:
    some = {"layers_to_transform", "exclude_modules", "target_parameters"} & fields.keys()
    return targets.resolve(model, run.targets, all_layers=not some)


# --------------------------------------------------------------------------- PEFT


def _peft_config(
    config_class: type, named: dict[str, Any], fields: dict[str, Any]
) -> peft.PeftConfig:
    """A PEFT config from what the harness sets and `method.fields`, which names any other field."""
    known = {f.name for f in dataclasses.fields(config_class)}
    for name in fields:
        if name in named:
            raise ConfigError(f"method.fields.{name}: set it by its own key of method or targets")
        if name not in known:
            raise ConfigError(
                f"method.fields.{name}: {config_class.__name__} has no such field; "
                f"{nearest(name, known, most=60)}"
            )
    try:
        return config_class(task_type="CAUSAL_LM", **named, **fields)
    except UNFIT as error:
        raise ConfigError(f"{config_class.__name__}: {error}") from error


def _wrap(model: PreTrainedModel, config: peft.PeftConfig) -> nn.Module:
    kind = getattr(config.peft_type, "value", config.peft_type)
    try:
        adapted = peft.get_peft_model(model, config)
    except UNFIT as error:
        raise ConfigError(f"{kind} does not fit this model: {error}") from error
    if getattr(config, "train", "") != "none" and not any(
        p.requires_grad for p in adapted.parameters()
    ):
        raise ConfigError(f"{kind} would train nothing: check method.fields")
    return adapted


# What PEFT's methods raise when a model, a field or a missing package does not suit them.
UNFIT = (
    ValueError, TypeError, NotImplementedError, AttributeError, ImportError, RuntimeError, KeyError,
)  # fmt: skip
