"""What the runs of a page were made with: commit, hardware, versions and command."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from harness.report.table import Row
from harness.results import run_record


def provenance(rows: Sequence[Row]) -> dict[str, list[str]]:
    """What the runs were made with; each value with its number of runs where they differ."""
    paths = {
        "commit": "environment.commit",
        "CPU": "environment.hardware.cpu",
        "GPUs": "environment.hardware.gpus",
        "threads": "environment.hardware.threads",
        "versions": "environment.versions",
        "command": "run.command",
    }
    by_title = {}
    records = [record for row in rows for record in row.records]
    for title, path in paths.items():
        counted: Counter[str] = Counter()
        for record in records:
            value = run_record.get(record, path)
            if isinstance(value, dict):
                value = ", ".join(f"{k} {v}" for k, v in value.items())
            elif isinstance(value, list):
                value = ", ".join(map(str, value))
            if value not in (None, ""):
                counted[str(value)] += 1
        several = len(counted) > 1
        shown = [f"{v} ({n} runs)" if several else v for v, n in counted.most_common(4)]
        if title == "command":
            shown = (
                shown[:1]
                if not several
                else [f"{next(iter(counted))} (and {len(counted) - 1} more)"]
            )
        if shown:
            by_title[title] = shown
    return by_title
