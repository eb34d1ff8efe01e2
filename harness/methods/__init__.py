"""Every way to adapt a model. `adapt` is the only thing that knows which method a run uses."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from transformers import PreTrainedModel

from harness import roles
from harness.config import (
    ConfigError,
    LoraMethod,
    PeftMethod,
    RunConfig,
    SvdMethod,
    UdvMethod,
    nearest,
)
from harness.methods import lora_layer, svd, targets, tying, udv


def adapt(model: PreTrainedModel, run: RunConfig) -> nn.Module:
    """Turn the base model into the model that is trained: what trains has `requires_grad`.

    The adapter's own random draws come from torch's global generator, which the worker seeds.

    Raises:
        ConfigError: a target, rank or field that does not fit this model.
    """
    if getattr(model.config, "quantization_config", None) and run.method.name in DENSE:
        raise ConfigError(
            f"method={run.method.name}: {run.model.name} is quantised, and {DENSE[run.method.name]}"
            "; use method=lora or method=peft, or a base that is not quantised"
        )
    adapted = ADAPTERS[run.method.name](model, run)
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
    return model.requires_grad_(True)


def _lora(model: PreTrainedModel, run: RunConfig) -> nn.Module:
    method = run.method
    assert isinstance(method, LoraMethod)
    matched = _targets(model, run, method.fields)
    _check_ranks({"r": method.r, **method.fields}, matched)
    _check_init(str(method.init), matched)
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
    return _wrap(model, lora_layer.fuse(_peft_config(peft.LoraConfig, named, method.fields)))


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
    for pattern in method.rank_pattern:
        if not any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in matched.shapes):
            raise ConfigError(
                f"method.rank_pattern: '{pattern}' matches none of the targets; "
                f"{nearest(pattern, matched.suffixes)}"
            )
    named |= {
        "rank": method.rank,
        "energy": method.energy,
        "which": method.which,
        "rank_pattern": dict(method.rank_pattern),
        "seed": run.seed,
        "target_modules": matched.suffixes,
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
            mlp = roles.mlp_of(model.config.model_type)
            named["feedforward_modules"] = [
                m for m in matched.suffixes if m in mlp or m.startswith("mlp")
            ]
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
    if isinstance(method, LoraMethod) and str(method.init).startswith(FROM_WEIGHTS):
        _check_init(str(method.init), _targets(model, run, method.fields))
        if method.init != "mica":  # which trains A alone
            method = dataclasses.replace(method, init=True)
    return adapt(model, dataclasses.replace(run, method=method))


def _check_init(init: str, matched: targets.Targets) -> None:
    if init in REFUSED_INITS:
        raise ConfigError(f"method.init={init}: {REFUSED_INITS[init]}")
    if init in ("olora", "loftq") and matched.conv1d:
        raise ConfigError(
            f"method.init={init} is wrong on GPT-2: PEFT takes the weight as (out, in) there, and "
            "Conv1D stores it (in, out); use init=pissa or orthogonal"
        )


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


def svd_facts(model: nn.Module) -> dict[str, Any]:
    """What the SVD came to: seconds, decompositions computed and read, and k by kind of matrix."""
    ranks: dict[str, set[int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, udv.UDVLayer):
            kind = re.sub(r"^.*\.\d+\.", "", name.removeprefix("base_model.model."))
            ranks.setdefault(kind, set()).update(s.rank for s in module.udv_specs.values())
    if not ranks:
        return {}
    return {
        "svd_seconds": svd.svd_seconds(),
        "svd_decompositions": svd.svd_counts(),
        "ranks": {kind: sorted(found) for kind, found in ranks.items()},
    }


def factored_total(model: nn.Module) -> int | None:
    """Elements of a truncated model if W were dropped for its factors; None for other models."""
    layers = [m for m in model.modules() if isinstance(m, udv.UDVLayer)]
    dropped = [m for m in layers if not any(spec.keep for spec in m.udv_specs.values())]
    if not layers or len(dropped) < len(layers):
        return None
    base = sum(p.numel() for n, p in model.named_parameters() if ".udv_" not in n)
    for layer in dropped:
        (spec,) = layer.udv_specs.values()
        m, n = layer.out_features, layer.in_features
        base += spec.rank * (m + n + 1) - m * n
    return base


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
        # On the meta device PEFT's initialisations are left out, some of which read the weights.
        on_meta = next(model.parameters()).device.type == "meta"
        adapted = peft.get_peft_model(model, config, low_cpu_mem_usage=on_meta)
    except UNFIT as error:
        if "meta tensor" in str(error):
            raise NeedsWeightsError(f"{kind} reads the weights to be built") from error
        raise ConfigError(f"{kind} does not fit this model: {error}") from error
    if getattr(config, "train", "") != "none" and not any(
        p.requires_grad for p in adapted.parameters()
    ):
        raise ConfigError(f"{kind} would train nothing: check method.fields")
    if getattr(config, "ensure_weight_tying", False):
        tying.check_tied(adapted)
    return adapted


class NeedsWeightsError(ConfigError):
    """A method that cannot be built on the meta device: `check` and counts cannot tell about it."""


# What PEFT's methods raise when a model, a field or a missing package does not suit them.
UNFIT = (
    ValueError, TypeError, NotImplementedError, AttributeError, ImportError, RuntimeError, KeyError,
)  # fmt: skip
