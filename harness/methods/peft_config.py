"""PEFT's configuration of a method, from what the run sets and from `method.fields`."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from harness.config.errors import ConfigError, nearest
from harness.config.method_schema import PeftMethod
from harness.methods import refusals
from harness.methods.values import typed

# What PEFT's methods raise when a model, a field or a missing package does not suit them.
UNFIT = (
    ValueError, TypeError, NotImplementedError, AttributeError, ImportError, RuntimeError, KeyError,
    IndexError, AssertionError, OSError,
)  # fmt: skip


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


def configured(config_class: type, named: dict[str, Any], given: dict[str, Any]) -> peft.PeftConfig:
    """A PEFT config of what the harness sets and `method.fields`, which names any other field.

    It gets copies: PEFT changes lists and dicts of its config in place.

    Raises:
        ConfigError: a field that there is not, that has its own key, or whose value does not fit.
    """
    where = "method.fields"
    known = {f.name for f in dataclasses.fields(config_class)}
    for name in given:
        if name in named:
            raise ConfigError(f"{where}.{name}: set it by its own key of method or targets")
        if name not in known:
            raise ConfigError(
                f"{where}.{name}: {config_class.__name__} has no such field; "
                f"{nearest(name, known, limit=60)}"
            )
    refusals.check_given(config_class, given, where)
    built = typed(config_class, given, where)
    try:
        config = config_class(task_type="CAUSAL_LM", **copy.deepcopy(named), **built)
    except UNFIT as error:
        raise ConfigError(f"{config_class.__name__}: {error}") from error
    refusals.check_built(config)
    return config
