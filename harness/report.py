"""The table of an experiment: one row per configuration, on the terminal and as results.csv.

    python -m harness.report outputs/main
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from harness import results

COLUMNS = {  # heading -> path in result.json
    "method": "method.name",
    "targets": "method.targets",
    "r": "method.r",
    "alpha": "method.alpha",
    "lr": "method.lr",
    "seed": "run.seed",
    "trainable": "parameters.trainable",
    "% of total": "parameters.trainable_percent",
    "peak MiB": "memory.peak_bytes",
    "tokens/s": "speed.tokens_per_second",
    "step-0 val ppl": "quality.step0.validation.perplexity",
    "val ppl": "quality.validation.perplexity",
    "test ppl": "quality.test.perplexity",
}


def _text(heading: str, value: Any) -> str:
    if value is None:
        return "-"
    if heading == "peak MiB":
        return f"{value / 2**20:,.0f}"
    if heading in ("trainable", "tokens/s"):
        return f"{value:,.0f}"
    if "ppl" in heading or heading == "% of total":
        return f"{value:.2f}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def print_table(folder: Path, run_dirs: Sequence[Path] | None = None) -> None:
    """Print the finished runs of `folder` (or those in `run_dirs`) and write results.csv there."""
    finished = [(d, r) for d, r in results.collect(folder) if r["status"] == "finished"]
    shown = [(d, r) for d, r in finished if run_dirs is None or d in run_dirs]
    table = Table(title=str(folder), title_justify="left")
    for heading in COLUMNS:
        table.add_column(heading, justify="left" if heading in ("method", "targets") else "right")
    for _, result in shown:
        table.add_row(*(_text(h, results.get(result, path)) for h, path in COLUMNS.items()))
    Console().print(table)
    if finished:
        with (folder / "results.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["run", *COLUMNS.values()])
            for run_dir, result in finished:
                writer.writerow([run_dir.name, *(results.get(result, p) for p in COLUMNS.values())])
    print(f"regenerate: python -m harness.report {folder}   (runs and results.csv are in there)")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python -m harness.report OUTPUTS/EXPERIMENT (a folder of runs)")
    print_table(Path(sys.argv[1]))
