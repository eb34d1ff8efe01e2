"""The error that names a mistake of the user, and the nearest valid choice for its message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class ConfigError(ValueError):
    """Something impossible was asked for; the message says what, and what would be possible."""


def nearest(bad: str, choices: Iterable[str], *, limit: int = 24) -> str:
    """End of an error message: the closest choice to `bad`, or else the choices there are."""
    names = sorted(str(choice) for choice in choices)
    same = [name for name in names if name.lower() == str(bad).lower()]
    if close := same or difflib.get_close_matches(str(bad), names, n=1, cutoff=0.6):
        return f"did you mean '{close[0]}'?"
    if not names:
        return "there is none to choose from"
    shown = ", ".join(names[:limit]) + (", …" if len(names) > limit else "")
    return f"choose one of: {shown}"


def require(condition: bool, key: str, value: Any, expected: str) -> None:
    """Raise ConfigError, naming the key, its value and what was expected, unless `condition`."""
    if not condition:
        raise ConfigError(f"{key}={value}: expected {expected}")
