"""Sizes as people write them."""

from __future__ import annotations

import re

from harness.config.errors import ConfigError


def parse_bytes(text: str, key: str = "plan.limit") -> int:
    """8GiB, 500MB, 1.5e9 … as bytes.

    Raises:
        ConfigError: not a size, naming the `key` that has it.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([KMGT]i?B|B)?\s*", text, re.IGNORECASE)
    if not match:
        raise ConfigError(f"{key}={text}: expected a size, e.g. 8GiB or 500MB")
    unit = (match[2] or "B").upper()
    base = 1024 if "I" in unit else 1000
    return int(float(match[1]) * base ** " KMGT".index(unit[0] if unit != "B" else " "))
