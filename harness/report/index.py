"""One page over all experiments of a folder: every configuration, searched and compared.

    harness report outputs --index     outputs/index.html
    harness serve outputs              the same from a local server, always as it is now

What is in a row comes from the runs' result.json alone, so that the page is quick to make. Two rows
can be compared on quality where they were evaluated alike: on the same documents, by the same
window, prefix and tokenizer. Paired tests are on the page of an experiment.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from harness.config.errors import ConfigError
from harness.report import columns, table
from harness.report.table import Row
from harness.results import numbers, run_record
from harness.results.run_record import flat
from harness.system import atomic

FILE_NAME = "index.html"
TEMPLATE = Path(__file__).with_name("index.html.j2")
# Of a row, in the page's columns: path in the row's values -> heading and format.
NUMBERS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "parameters.trainable": ("trainable", numbers.count),
    "memory.peak_bytes": ("peak MiB", numbers.mib),
    "speed.tokens_per_second": ("tok/s", numbers.count),
    "quality.validation.perplexity": ("val", numbers.perplexity),
    "quality.test.perplexity": ("test", numbers.perplexity),
    "quality.test.bits_per_byte": ("bits/byte", "{:.3f}".format),
    f"{table.CLASSIFIED}.accuracy": ("accuracy", numbers.share),
}


@dataclass(frozen=True)
class Experiment:
    """One folder of runs in short: its name and page, how many runs it has and its date."""

    name: str
    page: str | None  # its own page, relative to the index; None where it was not made
    counts: dict[str, int]  # runs by status
    changed: float  # seconds since 1970, of its newest result
    problem: str = ""  # why its rows are missing


def find(root: Path) -> list[Path]:
    """Return the folders below `root` that hold runs, in the order of their names."""
    return sorted({path.parent.parent for path in root.glob(f"*/*/{run_record.FILE_NAME}")})


def text(root: Path) -> str:
    """The page over all experiments in `root`.

    Raises:
        ConfigError: there is none.
    """
    folders = find(root)
    if not folders:
        raise ConfigError(
            f"{root}: no experiment; expected a folder of folders of runs, as outputs has"
        )
    experiments, lines = [], []
    for folder in folders:
        experiment, own = _read(folder)
        experiments.append(experiment)
        lines += own
    data = {
        "experiments": [vars(entry) for entry in experiments],
        "rows": lines,
        "numbers": [heading for heading, _ in NUMBERS.values()],
    }
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(
        title=root.resolve().name or str(root),
        command=f"harness report {shlex.quote(str(root))} --index",
        made=time.strftime("%Y-%m-%d %H:%M"),
        data=_in_a_script(data),
    )


def write(root: Path) -> Path:
    """Write the page over all experiments into `root`; returns the path of the page."""
    path = root / FILE_NAME
    atomic.write_atomically(path, text(root))
    return path


def _in_a_script(data: Any) -> Any:
    """JSON that nothing in it can end the script of."""
    plain = json.dumps(run_record.finite(data), sort_keys=True)
    for character in "<>&\u2028\u2029":
        plain = plain.replace(character, f"\\u{ord(character):04x}")
    return markupsafe.Markup(plain)


def _read(folder: Path) -> tuple[Experiment, list[dict[str, Any]]]:
    counts: dict[str, int] = {}
    changed = 0.0
    for run_dir, record in run_record.collect(folder):
        status = str(record.get("status"))
        counts[status] = counts.get(status, 0) + 1
        changed = max(changed, (run_dir / run_record.FILE_NAME).stat().st_mtime)
    own_page = folder / "report" / "index.html"
    page = f"{folder.name}/report/index.html" if own_page.is_file() else None
    try:
        rows = [_line(folder, row) for row in table.rows(folder)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # a record of another kind
        return Experiment(
            folder.name, page, counts, changed, f"{type(error).__name__}: {error}"
        ), []
    return Experiment(folder.name, page, counts, changed), rows


def _line(folder: Path, row: Row) -> dict[str, Any]:
    """A row as the page has it."""
    values, first = row.values, row.records[0]
    config = flat(first["config"])
    method = first["method"]
    settings = {key: value for key, value in config.items() if value is not None}
    settings["method.lr"] = method.get("lr")
    return {
        "experiment": folder.name,
        "name": row.name,
        "also": values["also"],
        "model": run_record.get(first, "model.name"),
        "data": run_record.get(first, "data.name"),
        "steps": run_record.get(first, "config.train.steps") if method.get("lr") else None,
        "seeds": values["seeds"],
        "values": {h: values.get(path) for path, (h, _) in NUMBERS.items()},
        "shown": {h: _shown(row, path, form) for path, (h, form) in NUMBERS.items()},
        "shared": bool(values.get(table.SHARED)),
        "default_rate": not columns.is_own_rate(values.get(table.LR_FROM)),
        "alike": _alike(row),
        "settings": settings,
        "runs": [os.path.relpath(run_dir, folder.parent) for run_dir in row.run_dirs],
    }


def _shown(row: Row, path: str, form: Callable[[Any], str]) -> str:
    cell = columns.text_of(row.values.get(path), form)
    shared = path in table.MEASURED and row.values.get(table.SHARED) and cell != "-"
    return f"{cell}*" if shared else cell


def _alike(row: Row) -> str:
    """What two rows must share for their qualities to be compared, as a few digits.

    The text by its contents where they were recorded, and else by its name; how many documents and
    tokens of it were evaluated; the window, the prefix and the tokenizer.
    """
    first = row.records[0]
    contents = {
        key: value
        for key, value in (run_record.get(first, "run.contents") or {}).items()
        if key == "data"
    }
    evaluation = first.get("evaluation") or {}
    parts = [
        contents or run_record.get(first, "data.name"),
        run_record.get(first, "data.num_documents.test"),
        run_record.get(first, "quality.test.num_tokens"),
        [evaluation.get(key) for key in ("context_length", "stride", "tokenizer")],
        run_record.get(first, "evaluation.prefix.id"),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]
