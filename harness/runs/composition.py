"""From what Hydra composed to a RunConfig; `harness.runs.mistakes` says what is wrong with it.

Every value is checked against the schemas of `harness.config.schema`; no torch is imported.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from harness.config import (
    ending,
    keys,
    matrix_roles,
    parts,
    rate_lookup,
    rates,
    renamed,
    unused_keys,
)
from harness.config.errors import ConfigError, nearest
from harness.config.matrix_roles import resolved
from harness.config.method_schema import METHODS, AdaloraMethod, LoraMethod
from harness.config.optimizers import OPTIMIZERS, OptimizerConfig
from harness.config.paths import CONF_DIR, options
from harness.config.run_config import RunConfig
from harness.config.schema import (
    SECTIONS,
    DataConfig,
    EarlyStopping,
    GenerateConfig,
    LatencyConfig,
    ParameterGroup,
    RootConfig,
    TrainConfig,
    defaults,
)
from harness.runs import early_checks
from harness.runs.mistakes import explain
from harness.runs.validation import validate
from harness.system import contents

# The paths of a configuration, by section; a hub id has neither ~ nor $ in it.
PATHS = {
    "model": ("path", "tokenizer", "remote_code", "cache_dir"),
    "data": ("path", "validation_path", "test_path", "id", "cache_dir"),
    "train": ("rates",),
}


def from_hydra(
    cfg: DictConfig,
    overrides: Iterable[str] = (),
    *,
    validated: bool = True,
    recorded: bool = False,
) -> RunConfig:
    """Resolve, type-check and, unless `validated` is false, validate a composed config.

    What its text and weights hold is fixed here (`harness.system.contents`), unless it says so
    already. `overrides` are those of the command line, which come before old names of keys in
    files; a config that was `recorded` has old names without a word.

    Raises:
        ConfigError: naming the key, its value and what was expected.
    """
    if "hydra" in cfg:  # a sweep's own composition carries Hydra's section along
        cfg = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    _refuse_lists_of_options(overrides := list(overrides))
    try:
        values = _resolved(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    given = {unused_keys.key_of(text) for text in overrides}
    values = renamed.in_config(values, told=not recorded, typed=given)
    tracker = values.pop("tracker", None) or {}
    method = values.pop("method", None)
    name = method.get("name") if isinstance(method, dict) else method
    if name not in METHODS:
        raise ConfigError(f"method.name={name!r} is not a method: {nearest(str(name), METHODS)}")
    if isinstance(method, dict) and isinstance(fields := method.get("fields"), dict):
        method["fields"] = {key: _path_or_other(value) for key, value in fields.items()}
    sections = {"method": _typed(METHODS[name], method, "method")}
    # A run from before there was a choice has AdamW.
    sections["optimizer"], shared = _optimizer(values.pop("optimizer", {"name": "adamw"}))
    for key, schema in SECTIONS.items():
        section = values.pop(key, None)
        if not isinstance(section, dict):
            raise ConfigError(f"{key}={section!r}: expected an option of conf/{key} or its fields")
        _expand(section, key)
        if key == "train":
            section |= _shared(shared, section)
            stopping = _early_stopping(section.pop("early_stopping", None) or {})
            groups = _groups(section.pop("groups", None) or [])
            requested = section | {"early_stopping": stopping, "groups": groups}
            section["steps"] = ending.asked_steps(section, planned=bool(values.get("contents")))
            if section.get("lr") in ("auto", "tuned"):
                section |= _rate(requested | section, sections)
        further = section.pop("also", None) if key == "evaluate" else None
        mixed = section.pop("parts", None) if key == "data" else None
        completing = section.pop("generate", None) if key == "evaluate" else None
        timing = section.pop("latency", None) if key == "evaluate" else None
        sections[key] = _typed(schema, section, key)
        if key == "train":
            sections[key] = replace(sections[key], early_stopping=stopping, groups=groups)
        if further:
            sections[key] = replace(sections[key], also=_also(further, sections["data"]))
        if mixed is not None:
            sections[key] = replace(sections[key], parts=_parts(mixed, sections[key]))
        if completing:
            completions = _typed(GenerateConfig, completing, "evaluate.generate")
            sections[key] = replace(sections[key], generate=completions)
        if timing not in (None, False):
            sections[key] = replace(sections[key], latency=_latency(timing))
    values["outputs_dir"] = expanded(values.get("outputs_dir"), "outputs_dir")
    values.setdefault("contents", {})  # of a run from before it was written down
    run = RunConfig(**vars(_typed(RootConfig, values)), **sections, tracker=tracker)
    if not validated:
        return resolved(run)
    validate(run)
    run = resolved(run)
    if not run.contents:  # or else the run was planned before
        early_checks.check(run)
        run = replace(run, contents=contents.of(run))
        contents.check_apart(run)
    if run.train.epochs is not None and requested.get("steps") is None:
        run = _with_epochs(run, requested, sections)
    return run


def _refuse_lists_of_options(overrides: list[str]) -> None:
    """Hydra merges the options of a list into one, of which the last wins: `targets=[q,v]` is v."""
    for text in overrides:
        key, _, value = text.lstrip("+~").partition("=")
        if key in keys.GROUPS and value.startswith("["):
            names = [name.strip() for name in value.strip("[]").split(",")]
            both = f"; for all of them at once, {matrix_roles.combined(names)}"
            raise ConfigError(
                f"{text}: expected one option of conf/{key}, as in {key}={names[0]}; several are a "
                f"sweep: harness sweep {key}={','.join(names)}{both if key == 'targets' else ''}"
            )


def _resolved(cfg: DictConfig) -> dict[str, Any]:
    """A config as plain containers; an interpolation may have the old name of a key."""
    while True:
        try:
            plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        except InterpolationKeyError as error:
            key = re.search(r"'([\w.]+)'", str(error))
            if key is None or renamed.new_key(key[1]) == key[1] or OmegaConf.select(cfg, key[1]):
                raise
            cfg = renamed.with_reference(cfg, key[1])
        else:
            assert isinstance(plain, dict)
            return {str(key): value for key, value in plain.items()}


def _optimizer(section: Any) -> tuple[OptimizerConfig, dict[str, Any]]:
    """The optimizer's own fields, and those of TrainConfig that its file of conf/optimizer has."""
    name = section.get("name") if isinstance(section, dict) else section
    if name not in OPTIMIZERS or not isinstance(section, dict):
        raise ConfigError(f"optimizer={name}: {nearest(str(name), OPTIMIZERS)}")
    schema = OPTIMIZERS[name]
    shared = {key: value for key, value in section.items() if key in schema.shared}
    own = {key: value for key, value in section.items() if key not in schema.shared}
    optimizer = _typed(schema, own, "optimizer")
    assert isinstance(optimizer, OptimizerConfig)
    return optimizer, shared


def _shared(of_optimizer: dict[str, Any], train: dict[str, Any]) -> dict[str, Any]:
    """What the optimizer's keys say of the values that TrainConfig holds; ConfigError."""
    usual = defaults(TrainConfig)
    for key, value in of_optimizer.items():
        train_value = train.get(key, value)
        if value != train_value and train_value != usual[key]:
            raise ConfigError(
                f"optimizer.{key}={value} and train.{key}={train_value} are two names of one "
                "value: give one of them"
            )
    return of_optimizer


def _early_stopping(fields: Any) -> EarlyStopping:
    if not isinstance(fields, dict):
        raise ConfigError(
            f"train.early_stopping={fields}: expected its fields, as in "
            "train.early_stopping.patience=3"
        )
    early_stopping = _typed(EarlyStopping, fields, "train.early_stopping")
    assert isinstance(early_stopping, EarlyStopping)
    return early_stopping


def _latency(fields: Any) -> LatencyConfig:
    if fields is not True and not isinstance(fields, dict):
        raise ConfigError(
            f"evaluate.latency={fields}: expected true, false, or its fields, as in "
            "evaluate.latency={repeats: 5}"
        )
    latency = _typed(LatencyConfig, {} if fields is True else fields, "evaluate.latency")
    assert isinstance(latency, LatencyConfig)
    return latency


def _groups(entries: Any) -> list[ParameterGroup]:
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(
            f"train.groups={entries}: expected a list of mappings, as in "
            "train.groups=[{match: wte, lr_scale: 0.1}]"
        )
    return [_typed(ParameterGroup, entry, f"train.groups[{i}]") for i, entry in enumerate(entries)]


def _with_epochs(run: RunConfig, requested: dict[str, Any], sections: dict[str, Any]) -> RunConfig:
    """The run with the steps of its epochs, and the rate for so many."""
    from harness.training import epochs  # transformers, which takes seconds to import

    fields: dict[str, Any] = {"steps": epochs.steps_of_epochs(run)}
    if requested.get("lr") in ("auto", "tuned"):
        fields |= _rate(requested | fields, sections)
    return replace(run, train=replace(run.train, **fields))


def expanded(path: Any, key: str = "outputs_dir") -> Any:
    """A path of the configuration with `~` and `$VAR` as a shell has them.

    Raises:
        ConfigError: no such user or variable, and no such file either.
    """
    if isinstance(path, list):
        return [expanded(entry, key) for entry in path]
    if not isinstance(path, str) or not ("$" in path or path.startswith("~")):
        return path
    expansion = os.path.expanduser(os.path.expandvars(path))  # noqa: PTH111 - Path's raises
    left = re.search(r"\$(\w+|\{\w+\})", expansion)
    if (left or expansion.startswith("~")) and not os.path.exists(expansion):
        why = f"the environment has no {left[0]}" if left else "there is no such user"
        raise ConfigError(f"{key}={path}: {why}; write the path out")
    return expansion


# For Hydra's own paths, which it makes before a run is composed.
OmegaConf.register_new_resolver("expanded", expanded, replace=True)


def _expand(section: dict[str, Any], key: str, where: str = "") -> None:
    """Expand the paths of a section, in place."""
    for name in PATHS.get(key, ()):
        if name in section:
            section[name] = expanded(section[name], f"{where or key}.{name}")


def _path_or_other(value: Any) -> Any:
    """A field of PEFT's, expanded where it is a path that exists; of a pattern `$` is its own."""
    if not isinstance(value, str) or not ("$" in value or value.startswith("~")):
        return value
    expansion = os.path.expanduser(os.path.expandvars(value))  # noqa: PTH111 - Path's raises
    return expansion if os.path.exists(expansion) else value


def _rate(train: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    """lr and lr_from of train.lr=auto and train.lr=tuned."""
    model, method, name = sections["model"], sections["method"], sections["targets"].name
    optimizer = sections["optimizer"]
    lora = isinstance(method, LoraMethod | AdaloraMethod)
    if lora and not (method.r > 0 and 0 < method.lora_alpha < math.inf):
        return {"lr": TrainConfig.lr}  # a method that validation refuses
    setting = rates.setting_of(model, sections["data"], train)
    if train["lr"] == "auto":
        lr, lr_from = rate_lookup.automatic(
            train.get("rates"), method, name, model, setting, optimizer
        )
    else:
        lr, lr_from = rate_lookup.resolve(train.get("rates"), method, name, setting, optimizer)
    return {"lr": lr, "lr_from": lr_from}


def _also(texts: Any, data: DataConfig) -> dict[str, DataConfig]:
    """The texts of evaluate.also: names of conf/data, or fields by name on top of such a file."""
    names = [texts] if isinstance(texts, str) else texts
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        names = {name: {} for name in names}
    if not isinstance(names, dict) or not all(isinstance(v, dict) for v in names.values()):
        raise ConfigError(
            f"evaluate.also={texts}: expected names of conf/data, as in [docstrings_held_out], or "
            "{mine: {source: text_files, path: FILE}}"
        )
    own = {"cache_dir": data.cache_dir}
    return {name: _text(name, fields, "evaluate.also", own) for name, fields in names.items()}


def _parts(entries: Any, data: DataConfig) -> dict[str, Any]:
    """The parts of data=mix, with a weight and all fields of their texts each."""
    if not isinstance(entries, dict) or not entries:
        raise ConfigError(
            f"data.parts={entries}: expected weights by name of conf/data, as in "
            "data.parts={kjv:0.9,docstrings:0.1}, or {mine: {weight: 0.1, source: text_files, "
            "path: FILE}}"
        )
    weighted_texts = {}
    own = {"cache_dir": data.cache_dir, "context_length": data.context_length}
    for name, part in entries.items():
        fields = dict(part) if isinstance(part, dict) else {parts.WEIGHT: part}
        weight = fields.pop(parts.WEIGHT, None)
        text = _text(str(name), fields, "data.parts", own)
        weighted_texts[str(name)] = {parts.WEIGHT: weight, **vars(text)}
    return weighted_texts


def _text(name: str, fields: dict[str, Any], where: str, own: dict[str, Any]) -> DataConfig:
    """A text by the name of conf/data, or by fields on top of the file of its source.

    `own` has what it shares with the text of the run.
    """
    available = [option for option in options("data") if option not in ("source", "mix")]
    base = name if name in available else str(fields.get("source", name))
    if base not in available:
        raise ConfigError(f"{where}: no data set {base}; {nearest(base, available)}")
    known = [f.name for f in dataclasses.fields(DataConfig)]
    if unknown := [key for key in fields if key not in known]:
        raise ConfigError(f"{where}.{name}.{unknown[0]}: {nearest(unknown[0], known)}")
    merged = _data_file(base) | fields | {"name": name} | own
    merged = renamed.in_section(merged, "data", f"{where}.{name}")
    _expand(merged, "data", f"{where}.{name}")
    if missing := [key for key, value in merged.items() if value == "???"]:
        raise ConfigError(f"{where}.{name}.{missing[0]} is missing")
    data_config = _typed(DataConfig, merged, f"{where}.{name}")
    assert isinstance(data_config, DataConfig)
    return data_config


def _data_file(option: str) -> dict[str, Any]:
    """conf/data/<option>.yaml with its defaults, which are further files of the folder."""
    loaded = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "data" / f"{option}.yaml"))
    assert isinstance(loaded, dict)
    own = {str(key): value for key, value in loaded.items()}
    merged: dict[str, Any] = {}
    for other in own.pop("defaults", ["_self_"]):
        merged |= own if other == "_self_" else _data_file(other)
    return merged


def load(path: Path, *, validated: bool = True) -> RunConfig:
    """The RunConfig that a controller wrote to `path` (config.yaml of a run directory).

    Not `validated`, it may name text and trackers that are no longer there.
    """
    loaded = OmegaConf.load(path)
    assert isinstance(loaded, DictConfig)
    return from_hydra(loaded, validated=validated, recorded=True)


def _typed(schema: type, values: Any, where: str = "") -> Any:
    """`values` checked against a dataclass; raises ConfigError naming key and type."""
    typed = OmegaConf.structured(schema)
    OmegaConf.set_readonly(typed, None)  # a frozen dataclass makes a read-only node
    try:
        return OmegaConf.to_object(OmegaConf.merge(typed, values))
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error, where, [str(key) for key in typed], schema)) from error
