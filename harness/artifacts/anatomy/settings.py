"""The settings of `harness anatomy`: conf/anatomy.yaml, and what the command line changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from harness.config.errors import ConfigError, nearest
from harness.config.paths import CONF_DIR


@dataclass(frozen=True)
class Settings:
    """What is measured of an update; conf/anatomy.yaml has the defaults and says what each is."""

    intruder_k: int
    intruder_epsilon: float
    directions: int
    function_tokens: int

    def __post_init__(self) -> None:
        for name, least in (("intruder_k", 1), ("directions", 1), ("function_tokens", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name}={value}: expected a whole number from {least} on")
        epsilon = self.intruder_epsilon
        if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 < epsilon < 1:
            raise ConfigError(f"intruder_epsilon={epsilon}: expected a cosine between 0 and 1")


def read(overrides: Sequence[str] = ()) -> Settings:
    """Read conf/anatomy.yaml and change what `overrides`, each KEY=VALUE, name.

    Raises:
        ConfigError: no such key, or a value that cannot be.
    """
    values: dict[str, Any] = yaml.safe_load((CONF_DIR / "anatomy.yaml").read_text("utf-8"))
    known = [field.name for field in dataclasses.fields(Settings)]
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or key not in known:
            raise ConfigError(
                f"{override}: expected KEY=VALUE of {', '.join(known)}; {nearest(key, known)}"
            )
        values[key] = yaml.safe_load(value)
    return Settings(**values)
