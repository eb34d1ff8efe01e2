"""Configuration keys that have another name now; the old names keep working.

Configurations of older runs have the old names, and so have the identities of all runs: a run
keeps the identity that it had before its keys were renamed.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from harness.config import schema
from harness.config.errors import ConfigError

# Section -> old name -> what to write now.
RENAMED = {
    "data": {"context": "context_length"},
    "train": {
        "final_lr": "min_lr_ratio", "clip": "max_grad_norm",
        "checkpoint_every": "checkpoint_interval",
    },
    "evaluate": {"context": "context_length", "every": "interval"},
}  # fmt: skip
TEXTS = {("evaluate", "also"), ("data", "parts")}  # mappings of names to texts, as data has them
_told: set[str] = set()


def new_key(key: str) -> str:
    """Return the name that a dotted key has now; most have the same."""
    parts = key.split(".")
    text = len(parts) == 4 and tuple(parts[:2]) in TEXTS
    if text or len(parts) == 2:
        names = RENAMED.get("data" if text else parts[0], {})
        parts[-1] = names.get(parts[-1], parts[-1])
    return ".".join(parts)


def in_overrides(overrides: Iterable[str], *, told: bool = True) -> list[str]:
    """Return overrides with the keys of today; `told`: say which changed."""
    return [_renamed(text, told=told) for text in overrides]


def _renamed(text: str, *, told: bool = False) -> str:
    marks, key, rest = re.fullmatch(r"([+~]*)([^=@]*)(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]  # matches every text
    new = new_key(key)
    if told and new != key:
        tell(key, new)
    return f"{marks}{new}{rest}"


def in_grid(grid: Mapping[str, Any], *, told: bool = True) -> dict[str, Any]:
    """Return a grid of a sweep, values by key, with the keys of today; `told`: say which changed.

    Raises:
        ConfigError: the old name and the new one are both there.
    """
    values: dict[str, Any] = {}
    for key, value in grid.items():
        new = new_key(str(key))
        if new in values or (new != key and new in grid):
            raise ConfigError(f"{key} and {new} are two names of one key: write {new} alone")
        if told and new != key:
            tell(str(key), new)
        values[new] = value
    return values


def in_setting(setting: Mapping[str, Any]) -> dict[str, Any]:
    """Return the setting of a file of conf/rates, by dotted keys, with the keys of today."""
    values = in_grid(setting, told=False)
    if isinstance(texts := values.get("data.parts"), dict):
        values["data.parts"] = {name: in_section(text, "data") for name, text in texts.items()}
    return values


def in_config(
    config: dict[str, Any], *, told: bool = False, typed: Collection[str] = ()
) -> dict[str, Any]:
    """Return a configuration as plain containers with the keys of today; `told`: say which changed.

    An old name comes from a file: `typed` has the keys of the command line, which come before it.

    Raises:
        ConfigError: the old name and the new one are both set in files, to different values.
    """
    current = dict(config)
    for section in RENAMED:
        if isinstance(current.get(section), dict):
            current[section] = in_section(current[section], section, told=told, typed=typed)
    for section, name in TEXTS:
        texts = current[section].get(name) if isinstance(current.get(section), dict) else None
        if isinstance(texts, dict):
            current[section][name] = {
                key: in_section(fields, "data", f"{section}.{name}.{key}", told=told)
                if isinstance(fields, dict)
                else fields
                for key, fields in texts.items()
            }
    return current


def in_section(
    values: dict[str, Any],
    section: str,
    where: str = "",
    *,
    told: bool = False,
    typed: Collection[str] = (),
) -> dict[str, Any]:
    """Return the fields of one section with the names of today, as `in_config` does.

    `where` is what messages call the section, if not by its name.
    """
    current, where = dict(values), where or section
    usual = schema.defaults(schema.SECTIONS[section])
    for old, new in RENAMED[section].items():
        if old not in current:
            continue
        value = current.pop(old)
        if told:
            tell(f"{where}.{old}", f"{where}.{new}")
        if f"{where}.{new}" in typed:
            continue
        if current.get(new, value) not in (value, usual[new]):
            raise ConfigError(
                f"{where}.{old}={value} and {where}.{new}={current[new]} are two names of one "
                f"value: write {where}.{new}"
            )
        current[new] = value
    return current


def with_reference(config: DictConfig, key: str) -> DictConfig:
    """Return a copy of a configuration in which an old name refers to the new one, as ${train.clip}
    in a file of one's own needs."""
    config = copy.deepcopy(config)
    OmegaConf.update(config, key, f"${{{new_key(key)}}}", force_add=True)
    return config


def is_same(before: str, now: str) -> bool:
    """Whether overrides, joined by blanks in any order, are the same but for renamed keys."""
    return sorted(map(_renamed, before.split(" "))) == sorted(now.split(" "))


def as_before(values: dict[str, Any]) -> None:
    """Put the old names back into a configuration, in place: what identities are made of."""
    for section, fields in _sections(values):
        for old, new in RENAMED[section].items():
            if new in fields:
                fields[old] = fields.pop(new)


def _sections(values: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping of a configuration that has renamed keys, with the section it is like."""
    for section in RENAMED:
        if section in values:
            yield section, values[section]
    for section, name in TEXTS:
        for fields in ((values.get(section) or {}).get(name) or {}).values():
            yield "data", fields


def tell(old: str, new: str) -> None:
    """Say on stderr what to write now, once a key and process."""
    if old not in _told:
        _told.add(old)
        print(f"{old} is {new} now; the old name still works", file=sys.stderr)
