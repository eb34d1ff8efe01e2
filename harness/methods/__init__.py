"""Every way to adapt a model. `adapt` is the only thing that knows which method a run uses."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from harness.config import ConfigError, LoraMethod, PeftMethod, RunConfig, TargetsConfig, nearest
from harness.models import matrices


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
    matched = matched_targets(model, run.targets, all_layers=not _picks_layers(method.fields))
    _check_rank("method.r", method.r, matched)
    named = {
        "r": method.r,
        "lora_alpha": method.lora_alpha,
        "lora_dropout": method.dropout,
        "use_rslora": method.use_rslora,
        "use_dora": method.use_dora,
        "bias": method.bias,
        "init_lora_weights": method.init,
        "target_modules": list(run.targets.modules),
        "fan_in_fan_out": _is_conv1d(model, matched),
    }
    if clash := sorted(named.keys() & method.fields.keys()):
        raise ConfigError(f"method.fields.{clash[0]}: set it by its own key of method or targets")
    return _wrap(model, _peft_config(peft.LoraConfig, named | method.fields))


def _peft(model: PreTrainedModel, run: RunConfig) -> nn.Module:
    method = run.method
    assert isinstance(method, PeftMethod)
    name = method.peft_type.upper()
    classes = {str(getattr(k, "value", k)): v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if name not in classes:
        raise ConfigError(f"method.peft_type={method.peft_type}: {nearest(name, classes)}")
    config_class = classes[name]
    names = {f.name for f in dataclasses.fields(config_class)}
    named: dict[str, Any] = {}
    if "target_modules" in names and "target_modules" not in method.fields:
        matched = matched_targets(model, run.targets, all_layers=not _picks_layers(method.fields))
        named["target_modules"] = list(run.targets.modules)
        if "fan_in_fan_out" in names:
            named["fan_in_fan_out"] = _is_conv1d(model, matched)
        if "feedforward_modules" in names:  # IA3 scales these at their input
            named["feedforward_modules"] = [m for m in run.targets.modules if m.startswith("mlp")]
    return _wrap(model, _peft_config(config_class, named | method.fields))


ADAPTERS = {"none": _none, "full": _full, "lora": _lora, "peft": _peft}


# --------------------------------------------------------------------------- PEFT


def _peft_config(config_class: type, fields: dict[str, Any]) -> peft.PeftConfig:
    """A PEFT config from fields by name; an unknown one is named, with the nearest that exists."""
    known = {f.name for f in dataclasses.fields(config_class)}
    for name in fields:
        if name not in known:
            raise ConfigError(
                f"method.fields.{name}: {config_class.__name__} has no such field; "
                f"{nearest(name, known, most=60)}"
            )
    try:
        return config_class(task_type="CAUSAL_LM", **fields)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{config_class.__name__}: {error}") from error


def _wrap(model: PreTrainedModel, config: peft.PeftConfig) -> nn.Module:
    try:
        return peft.get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ConfigError(f"{kind} does not fit this model: {error}") from error


def _picks_layers(fields: dict[str, Any]) -> bool:
    return bool({"layers_to_transform", "exclude_modules", "target_parameters"} & fields.keys())


def _is_conv1d(model: nn.Module, names: dict[str, tuple[int, int]]) -> bool:
    """GPT-2 stores its weights (in, out), which PEFT calls fan_in_fan_out."""
    return any(isinstance(model.get_submodule(name), Conv1D) for name in names)


# --------------------------------------------------------------------------- targets


def matched_targets(
    model: nn.Module, targets: TargetsConfig, *, all_layers: bool = True
) -> dict[str, tuple[int, int]]:
    """Name -> (in, out) of the matrices that `targets` names, as PEFT matches suffixes.

    Raises:
        ConfigError: a suffix matches nothing, not every layer, or several matrices of one layer.
    """
    there = matrices(model)
    layers = {match[1] for name in there if (match := re.search(r"\.(\d+)\.", name))}
    kinds = sorted({re.sub(r"^.*\.\d+\.", "", name) for name in there})
    found: dict[str, tuple[int, int]] = {}
    if not targets.modules:
        raise ConfigError(f"targets={targets.name} names no modules; {nearest('', kinds)}")
    for suffix in targets.modules:
        matches = [name for name in there if name == suffix or name.endswith(f".{suffix}")]
        if not matches:
            raise ConfigError(
                f"targets={targets.name}: '{suffix}' matches no matrix of this model; "
                f"there are: {', '.join(kinds)}"
            )
        in_layers = [match[1] for name in matches if (match := re.search(r"\.(\d+)\.", name))]
        if len(set(in_layers)) < len(in_layers):
            same = sorted({re.sub(r"^.*\.\d+\.", "", name) for name in matches})
            raise ConfigError(
                f"targets={targets.name}: '{suffix}' matches several matrices of a layer; "
                f"write one of: {', '.join(same)}"
            )
        if all_layers and in_layers and set(in_layers) != layers:
            missing = ", ".join(sorted(layers - set(in_layers), key=int))
            raise ConfigError(
                f"targets={targets.name}: '{suffix}' is in {len(in_layers)} of {len(layers)} "
                f"layers (not in {missing}); there are: {', '.join(kinds)}"
            )
        found |= {name: there[name] for name in matches}
    return found


def _check_rank(key: str, rank: int, matched: dict[str, tuple[int, int]]) -> None:
    name, shape = min(matched.items(), key=lambda item: min(item[1]))
    if rank > min(shape):
        raise ConfigError(
            f"{key}={rank} is larger than {name} of {shape[0]} x {shape[1]} allows: "
            f"{min(shape)} at most"
        )
