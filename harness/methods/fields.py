"""`method.fields` against PEFT's config class and the model: types, and names that match something.

PEFT takes any value, and ignores a name that matches no module, mostly without a word. What a field
means is read off its name and its type, so that a field of a new PEFT method is checked too:

| field | what it names |
| --- | --- |
| `*_pattern`, a dict | modules that are adapted, by PEFT's own regular expressions |
| `*modules*` | modules of the model: adapted ones, excluded ones, ones that train whole |
| `target_parameters` | parameters |
| `layers_to_transform`, `layers_pattern`, `layer_replication` | layers |
| `*token_indices`, `*_tokens`, `*token_ids`, lists or dicts of numbers | ids of the vocabulary |
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import math
import re
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, Literal, Union

import peft
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import (
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from torch import nn

from harness.config import ConfigError, nearest
from harness.models import matrices

SCALE = re.compile("alpha|lambda|scal")  # PEFT calls these int, and divides by them


# --------------------------------------------------------------------------- types of values


def typed(config_class: type, fields: dict[str, Any], where: str) -> dict[str, Any]:
    """`fields` as `config_class` is to get them: copies, with its sub-configurations built.

    Raises:
        ConfigError: a value of another type than the field's.
    """
    hints = typing.get_type_hints(config_class)
    defaults = {f.name: f.default for f in dataclasses.fields(config_class)}
    made: dict[str, Any] = {}
    for name, value in copy.deepcopy(fields).items():
        hint, key = hints[name], f"{where}.{name}"
        if value is None and defaults[name] is None:
            made[name] = None
            continue
        if name == "modules_to_save" and isinstance(value, str):
            raise ConfigError(f"{key}={value!r}: expected a list of names, [{value}]")
        if not _fits(value, hint, name):
            raise ConfigError(f"{key}={value!r}: expected {_named(hint)}")
        if name.endswith("_pattern") and isinstance(value, dict):
            _check_pattern_values(value, name, hints, key)
        made[name] = _built(value, hint, key)
    return made


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
        return any(_fits(value, one, name) for one in arguments)
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
                _fits(v, one, name) for v, one in zip(value, arguments, strict=True)
            )
        return all(_fits(v, arguments[0], name) for v in value) if arguments else True
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return isinstance(value, str)  # a value that it has not is an error of PEFT's own
    if dataclasses.is_dataclass(hint):
        return isinstance(value, dict | hint)
    return True


def _named(hint: Any) -> str:
    """The type in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_named(one) for one in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if hint in (None, type(None)):
        return "null"
    if dataclasses.is_dataclass(hint):
        return f"fields of {getattr(hint, '__name__', hint)}"
    if arguments and origin in (list, set, tuple):
        return f"a {origin.__name__} of {', '.join(_named(one) for one in arguments)}"
    words = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def _built(value: Any, hint: Any, key: str) -> Any:
    """A sub-configuration (KasaConfig, …) from its fields; anything else as it is."""
    options = typing.get_args(hint) or (hint,)
    inner: Any = next((one for one in options if dataclasses.is_dataclass(one)), None)
    if inner is None or not isinstance(value, dict):
        return value
    known = [f.name for f in dataclasses.fields(inner)]
    for name in value:
        if name not in known:
            raise ConfigError(f"{key}.{name}: {nearest(name, known, most=60)}")
    try:
        return inner(**typed(inner, value, key))
    except (ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{key}: {error}") from error


# --------------------------------------------------------------------------- names in the model


def check_names(
    config: peft.PeftConfig, model: nn.Module, given: Iterable[str], where: str
) -> None:
    """Every name in the fields `given` of `config` against `model`, before it is adapted.

    Raises:
        ConfigError: a name that matches nothing, a pattern that another one hides, a layer or a
            token id that the model has not; with the nearest name or the range there is.
    """
    for name in sorted(given):  # layers_pattern before layers_to_transform, which goes by it
        value = getattr(config, name, None)
        if value is None or value == [] or value == {}:
            continue
        key = f"{where}.{name}"
        if name.endswith("_pattern") and isinstance(value, dict):
            _check_patterns(config, model, value, name, key)
        elif name == "layers_to_transform":
            _check_layers(config, model, value, key)
        elif name == "layers_pattern":
            _check_layers_pattern(config, model, value, key)
        elif name == "layer_replication":
            _check_ranges(model, value, key)
        elif name == "target_parameters":
            there = [n for n, _ in model.named_parameters(remove_duplicate=False)]
            _each_matches(value, there, _by_suffix, key, "parameter")
        elif "modules" in name:
            _check_modules(config, model, value, name, key)
        elif isinstance(value, list | dict) and re.search(r"token_ind|_tokens$|token_ids$", name):
            _check_tokens(model, value, key)


def adapted_names(config: peft.PeftConfig, model: nn.Module) -> list[str]:
    """Names of the modules that PEFT would adapt, by its own rule; none for methods without one."""
    if getattr(config, "target_modules", None) is None:
        return []
    config = _maybe_include_all_linear_layers(copy.copy(config), model)
    rule = _rule(config)
    found = ((name, rule(config, name)) for name, _ in model.named_modules() if name)
    return [name for name, hit in found if hit and not isinstance(hit, _ExcludedModule)]


def pattern_key(config: peft.PeftConfig, pattern: Iterable[str], module: str) -> str | None:
    """The first key of a `*_pattern` that PEFT applies to `module`, or None."""
    anywhere = config.peft_type == "OSF"  # which searches, where the others match to the end
    for key in pattern:
        if re.search(key, module) if anywhere else re.match(rf"(.*\.)?({key})$", module):
            return key
    return None


def pattern_values(
    config: Any, model: nn.Module, given: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """What each module should get by the `*_pattern` fields of `given`: {field: {module: v}}."""
    expected: dict[str, dict[str, Any]] = {}
    for name in given:
        pattern = getattr(config, name, None)
        if name.endswith("_pattern") and isinstance(pattern, dict):
            for module in adapted_names(config, model):
                if key := pattern_key(config, pattern, module):
                    expected.setdefault(name, {})[module] = pattern[key]
    return expected


def _rule(config: peft.PeftConfig) -> Callable[[Any, str], Any]:
    tuners: dict[Any, Any] = {**PEFT_TYPE_TO_TUNER_MAPPING}
    tuner = tuners.get(config.peft_type)
    return getattr(tuner, "_check_target_module_exists", check_target_module_exists)


def _kinds(names: Iterable[str]) -> list[str]:
    """Module names without their layer: h.3.attn.c_attn as attn.c_attn."""
    return sorted({re.sub(r"^.*\.\d+\.", "", name) for name in names if name})


def _choices(text: str, names: Iterable[str]) -> list[str]:
    """What `text` may have meant: kinds of modules, by their last part where it has one part."""
    kinds = _kinds(names)
    return kinds if "." in text else sorted({kind.rpartition(".")[2] for kind in kinds})


def _by_suffix(text: str, name: str) -> bool:
    return name == text or name.endswith(f".{text}")


def _by_ending(text: str, name: str) -> bool:
    return name.endswith(text)


def _by_regex(text: str, name: str) -> bool:
    return re.fullmatch(text, name) is not None


def _each_matches(
    value: Any, there: list[str], rule: Callable[[str, str], bool], key: str, noun: str
) -> None:
    """Every name (or the one regular expression) matches one of the names that are there."""
    for text in [value] if isinstance(value, str) else sorted(value):
        try:
            found = any((_by_regex if isinstance(value, str) else rule)(text, n) for n in there)
        except re.error as error:
            raise ConfigError(f"{key}: '{text}' is no regular expression: {error}") from error
        if not found:
            raise ConfigError(
                f"{key}: '{text}' matches no {noun}; {nearest(text, _choices(text, there))}"
            )


def _check_modules(
    config: peft.PeftConfig, model: nn.Module, value: Any, name: str, key: str
) -> None:
    everything = [n for n, _ in model.named_modules(remove_duplicate=False) if n]
    if name == "target_modules":
        if value != "all-linear":
            _each_matches(value, everything, _by_suffix, key, "module of this model")
    elif name == "modules_to_save":
        _each_matches(value, everything, _by_ending, key, "module of this model")
    elif name == "exclude_modules":
        without: Any = copy.copy(config)
        without.exclude_modules = None
        targeted = adapted_names(without, model)
        _each_matches(value, targeted, _by_suffix, key, "module that would be adapted")
    else:  # as IA3's feedforward_modules: some of those that are adapted
        targeted = adapted_names(config, model)
        _each_matches(value, targeted, _by_ending, key, "module that is adapted")


def _check_patterns(
    config: peft.PeftConfig, model: nn.Module, pattern: dict[str, Any], name: str, key: str
) -> None:
    targeted = adapted_names(config, model)
    try:
        used = {module: pattern_key(config, pattern, module) for module in targeted}
    except re.error as error:
        raise ConfigError(f"{key}: not a regular expression: {error}") from error
    for text in pattern:
        modules = [module for module, winner in used.items() if winner == text]
        if not modules:
            hidden = next(
                (w for m, w in used.items() if w and pattern_key(config, [text], m)), None
            )
            if hidden:
                raise ConfigError(
                    f"{key}: '{text}' is never used: '{hidden}' stands before it and matches the "
                    "same modules; the first one that matches counts"
                )
            raise ConfigError(
                f"{key}: '{text}' matches no module that is adapted; "
                f"{nearest(text, _choices(text, targeted))}"
            )
        rank = pattern[text]
        if name != "rank_pattern" or not isinstance(rank, int):
            continue
        shapes = matrices(model)
        for module in modules:
            if module in shapes and rank > min(shapes[module]):
                raise ConfigError(
                    f"{key}.{text}={rank}: {module} allows a rank of {min(shapes[module])} at most"
                )


def _numbered(config: peft.PeftConfig, model: nn.Module) -> list[int]:
    """Indices of layers that have a module to adapt, as PEFT reads them off the names."""
    some: Any = copy.copy(config)
    some.layers_to_transform = None
    names = adapted_names(some, model)
    numbers = {int(n) for name in names for n in re.findall(r"(?<=\.)\d+(?=\.)", name)}
    rule, found = _rule(config), []
    for number in sorted(numbers):
        some.layers_to_transform = [number]
        if any(
            hit and not isinstance(hit, _ExcludedModule) for hit in (rule(some, n) for n in names)
        ):
            found.append(number)
    return found


def _check_layers(config: peft.PeftConfig, model: nn.Module, value: Any, key: str) -> None:
    there = _numbered(config, model)
    if copies := getattr(config, "layer_replication", None):
        there = list(range(sum(end - start for start, end in copies)))
    for index in [value] if isinstance(value, int) else value:
        if index not in there:
            span = f"0 to {there[-1]}" if there == list(range(len(there))) and there else str(there)
            raise ConfigError(f"{key}: there is no layer {index} to adapt; expected {span}")


def _check_layers_pattern(config: peft.PeftConfig, model: nn.Module, value: Any, key: str) -> None:
    lists = {m[1] for n, _ in model.named_modules() if (m := re.search(r"([^.]+)\.\d+\.", n))}
    for text in [value] if isinstance(value, str) else value:
        one: Any = copy.copy(config)
        one.layers_pattern = [text]
        if not _numbered(one, model):
            raise ConfigError(f"{key}: '{text}' matches no list of layers; {nearest(text, lists)}")


def _check_ranges(model: Any, value: Any, key: str) -> None:
    layers = model.config.num_hidden_layers
    for start, end in value:
        if not 0 <= start < end <= layers:
            raise ConfigError(
                f"{key}: [{start}, {end}] is no range of layers; expected [first, end) with "
                f"0 <= first < end <= {layers}"
            )


def _check_tokens(model: Any, value: Any, key: str) -> None:
    if isinstance(value, dict):
        there = [n for n, _ in model.named_modules(remove_duplicate=False) if n]
        _each_matches(list(value), there, _by_ending, key, "module of this model")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = [i for part in value.values() for i in part] if isinstance(value, dict) else value
    for index in ids:
        if not (isinstance(index, int) and 0 <= index < vocabulary):
            raise ConfigError(f"{key}: {index} is no token; expected ids of 0 to {vocabulary - 1}")
