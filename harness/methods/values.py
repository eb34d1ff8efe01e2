"""`method.fields` against PEFT's config class: what type a value has, and what range.

PEFT takes any value, mostly without a word.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import enum
import math
import re
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, Union

from harness.config.errors import ConfigError, nearest

SCALE = re.compile("alpha|lambda|scal")  # PEFT calls these int, and divides by them
# What a number may be, by the end of its field's name.
RANGES: list[tuple[str, Callable[[float], bool], str]] = [
    (r"dropout(_p)?", lambda v: 0 <= v < 1, "a probability in [0, 1)"),
    (r"(?<!regularization)[._](alpha|lambda|scaling)", lambda v: v > 0, "a number above 0"),
    (r"\.(r|num_samples|buffer_size|num_groups|nblocks)", lambda v: v >= 1, "1 or more"),
    (r"(loss|reg)_weight|regularization_alpha", lambda v: v >= 0, "0 or more"),
    (r"kasa_config\.(beta|gamma)", lambda v: v >= 0, "0 or more"),  # weights of its loss
    (r"\.dirichlet_prior", lambda v: v > 0, "a number above 0"),
]


def typed(config_class: type, fields: dict[str, Any], where: str) -> dict[str, Any]:
    """`fields` as `config_class` is to get them: copies, with its sub-configurations built.

    Raises:
        ConfigError: a value of another type than the field's.
    """
    hints = typing.get_type_hints(config_class)
    defaults = {f.name: f.default for f in dataclasses.fields(config_class)}
    converted: dict[str, Any] = {}
    for name, value in copy.deepcopy(fields).items():
        hint, key = hints[name], f"{where}.{name}"
        if value is None and defaults[name] is None:
            converted[name] = None
            continue
        if name == "modules_to_save" and isinstance(value, str):
            raise ConfigError(f"{key}={value!r}: expected a list of names, [{value}]")
        if options := _options(hint):
            _check_option(value, options, key)
        if not _fits(value, hint, name):
            raise ConfigError(f"{key}={value!r}: expected {_named(hint)}")
        _check_range(value, defaults[name], key)
        if name.endswith("_pattern") and isinstance(value, dict):
            _check_pattern_values(value, name, hints, key)
        converted[name] = _built(value, hint, key)
    return converted


def _options(hint: Any) -> list[str]:
    """The values of a field that has an enumeration, written out as a text or not; else none."""
    every = (hint, *typing.get_args(hint))
    kinds = [
        option for option in every if isinstance(option, type) and issubclass(option, enum.Enum)
    ]
    return [str(member.value) for kind in kinds for member in kind]


def _check_option(value: Any, options: list[str], key: str) -> None:
    """One of the values of an enumeration; PEFT takes any other text, and does what it falls to."""
    if value in options:
        return
    fold = {option.casefold(): option for option in options}
    near = difflib.get_close_matches(str(value).casefold(), fold, n=1)
    hint = f"; did you mean '{fold[near[0]]}'?" if near else ""
    raise ConfigError(f"{key}={value!r}: expected one of {', '.join(options)}{hint}")


def _check_range(value: Any, default: Any, key: str) -> None:
    """A number that the method's formulas allow; a default is one (OFT's r of 0)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value == default:
        return
    for ending, allowed, expected in RANGES:
        if re.search(f"({ending})$", key) and not allowed(value):
            usual = isinstance(default, int | float) and f" (PEFT's default is {default})"
            raise ConfigError(f"{key}={value}: expected {expected}{usual or ''}")


def _check_pattern_values(
    pattern: dict[str, Any], name: str, hints: dict[str, Any], key: str
) -> None:
    """A pattern's values are of the type of the field that they replace."""
    stem = name.removesuffix("_pattern")
    names = [f for f in hints if f == stem or f.endswith(f"_{stem}")]
    names += ["r"] if stem == "rank" and "r" in hints else []
    for text, value in pattern.items():
        if isinstance(value, dict):
            inner = next(iter(value))
            raise ConfigError(
                f"{key}.{text}.{inner}: dots make keys of keys here; write "
                f"+{key}={{{text}.{inner}: …}}"
            )
        if names and not _fits(value, hints[names[0]], names[0]):
            raise ConfigError(f"{key}.{text}={value!r}: expected {_named(hints[names[0]])}")
        if isinstance(value, int | float) and value <= 0:
            raise ConfigError(f"{key}.{text}={value!r}: expected a number above 0")


def _fits(value: Any, hint: Any, name: str) -> bool:
    """Whether `value` is of the type `hint`, or is turned into it by PEFT."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument, name) for argument in arguments)
    if origin is Literal:
        # Where an option is described rather than written out, any text may be one.
        described = any("[" in str(option) for option in arguments)
        return value in arguments or (described and isinstance(value, str))
    if hint in (None, type(None)):
        return value is None
    if hint is bool or isinstance(value, bool):
        return isinstance(value, bool) and hint is bool
    if hint is float or (hint is int and SCALE.search(name)):
        return isinstance(value, int | float) and math.isfinite(value)
    if hint in (int, str):
        return isinstance(value, hint)
    if hint is dict or origin is dict:
        values = (value.values() if isinstance(value, dict) else ()) if arguments else ()
        return isinstance(value, dict) and all(_fits(v, arguments[1], name) for v in values)
    if hint in (list, set, tuple) or origin in (list, set, tuple):
        if not isinstance(value, list | tuple | set):
            return False
        if origin is tuple and Ellipsis not in arguments:
            return len(value) == len(arguments) and all(
                _fits(v, argument, name) for v, argument in zip(value, arguments, strict=True)
            )
        return all(_fits(v, arguments[0], name) for v in value) if arguments else True
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return value in [member.value for member in hint]
    if dataclasses.is_dataclass(hint):
        return isinstance(value, dict | hint)
    return True


def _named(hint: Any) -> str:
    """The type in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_named(argument) for argument in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if hint in (None, type(None)):
        return "null"
    if dataclasses.is_dataclass(hint):
        return f"fields of {getattr(hint, '__name__', hint)}"
    if arguments and origin in (list, set, tuple):
        return f"a {origin.__name__} of {', '.join(_named(argument) for argument in arguments)}"
    words = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def _built(value: Any, hint: Any, key: str) -> Any:
    """A sub-configuration (KasaConfig, …) from its fields; anything else as it is."""
    options = typing.get_args(hint) or (hint,)
    inner: Any = next((option for option in options if dataclasses.is_dataclass(option)), None)
    if inner is None or not isinstance(value, dict):
        return value
    known = [f.name for f in dataclasses.fields(inner)]
    for name in value:
        if name not in known:
            raise ConfigError(f"{key}.{name}: {nearest(name, known, limit=60)}")
    try:
        return inner(**typed(inner, value, key))
    except (ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{key}: {error}") from error
