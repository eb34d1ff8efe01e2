"""What each configuration wrote after one prompt of the test set, beside the base."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness.report.sheet import Cell, Column, Sheet
from harness.report.table import Row

FILE_NAME = "generations.jsonl"  # of a run with evaluate.generate
MOST = 600  # characters of a completion that are shown


def sheet(rows: Sequence[Row]) -> Sheet | None:
    """The completions of the first prompt that all rows with completions share; None if none do.

    The base comes first, then the rows in their order; of several seeds the first run is shown.
    """
    written = {
        row.name: completions for row in rows if (completions := _completions(row.run_dirs[0]))
    }
    shared = [
        key for key in next(iter(written.values()), {}) if all(key in w for w in written.values())
    ]
    if not shared:
        return None
    first = shared[0]
    ordered = sorted(
        (row for row in rows if row.name in written),
        key=lambda row: row.values["method.name"] != "none",
    )
    prompt = next(iter(written.values()))[first]["prompt"]
    references = next(iter(written.values()))[first].get("references") or []
    lines = [
        [Cell(row.name, row.name), Cell(_cut(written[row.name][first]["completion"]))]
        for row in ordered
    ]
    lines += [[Cell("reference", "reference"), Cell(_cut(text))] for text in references[:1]]
    columns = [
        Column("name", "configuration", text=True), Column("completion", "completion", text=True),
    ]  # fmt: skip
    note = "The first test prompt that every one of them completed; of several seeds the first run."
    return Sheet(f"Samples: {_cut(prompt)}", columns, lines, [note])


def _completions(run_dir: Path) -> dict[str, dict[str, Any]]:
    """The completions of a run by the id of their prompt, in their order."""
    completions: dict[str, dict[str, Any]] = {}
    with suppress(OSError, ValueError, KeyError, TypeError):
        for line in (run_dir / FILE_NAME).read_text("utf-8").splitlines():
            record = json.loads(line)
            completions[str(record["id"])] = {
                "prompt": str(record["prompt"]), "completion": str(record["completion"]),
                "references": record.get("references"),
            }  # fmt: skip
    return completions


def _cut(text: str) -> str:
    shown = " ".join(text.split())
    return shown if len(shown) <= MOST else f"{shown[: MOST - 2]} …"
