"""The parts of a mixture of texts (data=mix): their weights, and which of them is held out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from harness.config.errors import ConfigError, nearest
from harness.config.schema import DataConfig

WEIGHT = "weight"  # the field of a part beside those of its text


@dataclass(frozen=True)
class Part:
    """Holds one text of a mixture, with its share of the training blocks."""

    name: str
    share: Fraction  # of the training blocks; all shares are 1 together
    text: DataConfig


def parts(cfg: DataConfig) -> list[Part]:
    """The parts of a mixture in their order; none of another text.

    Raises:
        ConfigError: a weight that is no number or negative, or weights that are 0 together.
    """
    weights: dict[str, Fraction] = {}
    for name, fields in (cfg.parts or {}).items():
        weight = fields.get(WEIGHT)
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight < 0:
            raise ConfigError(
                f"data.parts.{name}={weight}: expected a weight, a number of 0 or more, as in "
                "data.parts={kjv:0.9,docstrings:0.1}"
            )
        weights[name] = Fraction(str(weight))  # as it is written: 0.1 is a tenth
    total = sum(weights.values())
    if weights and not total:
        raise ConfigError(
            f"data.parts={{{', '.join(f'{name}: 0' for name in weights)}}}: the weights are 0 "
            "together; expected one above 0"
        )
    return [
        Part(name, weight / total, DataConfig(**_fields(cfg.parts[name])))
        for name, weight in weights.items()
        if cfg.parts
    ]


def _fields(part: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key != WEIGHT}


def held_out_part(cfg: DataConfig) -> Part:
    """The part whose validation and test documents are the mixture's: the first, unless named.

    Raises:
        ConfigError: no part is called so.
    """
    all_parts = parts(cfg)
    requested = cfg.held_out_part
    if requested is None:
        return all_parts[0]
    for part in all_parts:
        if part.name == requested:
            return part
    names = [part.name for part in all_parts]
    raise ConfigError(f"data.held_out_part={requested}: {nearest(requested, names)}")


def evaluated_text(cfg: DataConfig) -> DataConfig:
    """The text whose documents are held out: that of a mixture's part, or `cfg` itself."""
    return held_out_part(cfg).text if cfg.parts else cfg
