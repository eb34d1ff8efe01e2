"""`method.fields` against the model: names that match something.

PEFT ignores a name that matches no module, mostly without a word. What a field means is read off
its name and its type, so that a field of a new PEFT method is checked too:

| field | what it names |
| --- | --- |
| `*_pattern`, a dict | modules that are adapted, by PEFT's own regular expressions |
| `*modules*`, text or a list | modules: adapted ones, excluded ones, ones that train whole |
| `target_parameters` | parameters |
| `layers_to_transform`, `layers_pattern`, `layer_replication` | layers |
| `*token_indices`, `*_tokens`, `*token_ids`, lists or dicts of numbers | ids of the vocabulary |
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from typing import Any

import peft
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import (
    check_target_module_exists,
)
from torch import nn

from harness.config.errors import ConfigError, nearest
from harness.models.model_size import matrices
from harness.system.internals import internal

ExcludedModule: Any = internal("_ExcludedModule")
include_all_linear_layers = internal("_maybe_include_all_linear_layers")


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
            parameter_names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
            _each_matches(value, parameter_names, _by_suffix, key, "parameter")
        elif "modules" in name and isinstance(value, str | list | set | tuple):
            _check_modules(config, model, value, name, key)
        elif isinstance(value, list | dict) and re.search(r"token_ind|_tokens$|token_ids$", name):
            _check_tokens(model, value, key)


def adapted_names(config: peft.PeftConfig, model: nn.Module) -> list[str]:
    """Names of the modules that PEFT would adapt, by its own rule; none for methods without one."""
    if getattr(config, "target_modules", None) is None:
        return []
    config = include_all_linear_layers(copy.copy(config), model)
    rule = _rule(config)
    hits = ((name, rule(config, name)) for name, _ in model.named_modules() if name)
    return [name for name, hit in hits if hit and not isinstance(hit, ExcludedModule)]


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
    value: Any, names: list[str], rule: Callable[[str, str], bool], key: str, noun: str
) -> None:
    """Every name (or the one regular expression) matches one of the names that are there."""
    for text in [value] if isinstance(value, str) else sorted(value):
        try:
            matched = any((_by_regex if isinstance(value, str) else rule)(text, n) for n in names)
        except re.error as error:
            raise ConfigError(f"{key}: '{text}' is no regular expression: {error}") from error
        if not matched:
            raise ConfigError(
                f"{key}: '{text}' matches no {noun}; {nearest(text, _choices(text, names))}"
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
    probe: Any = copy.copy(config)
    probe.layers_to_transform = None
    names = adapted_names(probe, model)
    numbers = {int(n) for name in names for n in re.findall(r"(?<=\.)\d+(?=\.)", name)}
    rule, adapted = _rule(config), []
    for number in sorted(numbers):
        probe.layers_to_transform = [number]
        if any(
            hit and not isinstance(hit, ExcludedModule) for hit in (rule(probe, n) for n in names)
        ):
            adapted.append(number)
    return adapted


def _check_layers(config: peft.PeftConfig, model: nn.Module, value: Any, key: str) -> None:
    layers = _numbered(config, model)
    if copies := getattr(config, "layer_replication", None):
        layers = list(range(sum(end - start for start, end in copies)))
    for index in [value] if isinstance(value, int) else value:
        if index not in layers:
            span = (
                f"0 to {layers[-1]}"
                if layers == list(range(len(layers))) and layers
                else str(layers)
            )
            raise ConfigError(f"{key}: there is no layer {index} to adapt; expected {span}")


def _check_layers_pattern(config: peft.PeftConfig, model: nn.Module, value: Any, key: str) -> None:
    lists = {m[1] for n, _ in model.named_modules() if (m := re.search(r"([^.]+)\.\d+\.", n))}
    for text in [value] if isinstance(value, str) else value:
        probe: Any = copy.copy(config)
        probe.layers_pattern = [text]
        if not _numbered(probe, model):
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
        module_names = [n for n, _ in model.named_modules(remove_duplicate=False) if n]
        _each_matches(list(value), module_names, _by_ending, key, "module of this model")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = [i for part in value.values() for i in part] if isinstance(value, dict) else value
    for index in ids:
        if not (isinstance(index, int) and 0 <= index < vocabulary):
            raise ConfigError(f"{key}: {index} is no token; expected ids of 0 to {vocabulary - 1}")
