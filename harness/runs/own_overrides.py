"""The overrides by which a sweep tells its runs what their user has not typed."""

from __future__ import annotations

import json
from collections.abc import Iterable

from harness.config.run_config import RunConfig

SINCE = "launch.since="  # when the sweep began
PLANNED = "++contents="  # what they are to read
PAUSE = "++launch.pause_at="  # where those of a search are to pause


def planned(run: RunConfig) -> str:
    """The override that fixes what a run of a sweep reads, whenever it starts.

    Text or weights that change while it waits make it fail, and not another run of it.
    """
    pairs = (f"{key}:{json.dumps(value)}" for key, value in run.contents.items())
    return f"{PLANNED}{{{','.join(pairs)}}}"


def without_own(overrides: Iterable[str]) -> list[str]:
    """The overrides that a user gave, without those by which a sweep tells its runs."""
    return [text for text in overrides if not text.startswith((SINCE, PLANNED, PAUSE))]
