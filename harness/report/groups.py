"""Which finished runs make one row: the same configuration on the same text, every seed once.

Runs with `run.configuration` belong together where that is the same: it covers the contents of
texts and weights. Older records have no such key, and belong together where their settings are the
same. Either way they are kept apart where they counted other documents or blocks of training text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.config import naming
from harness.results import run_record
from harness.results.record_types import Record

DIGITS = 6  # of a digest, as run names have them


@dataclass(frozen=True)
class Group:
    """Finished runs of one configuration on one text, a seed each."""

    run_dirs: list[Path]
    records: list[Record]  # their result.json
    repeated: dict[Path, str]  # runs of a seed that another of them has -> which, and what differs
    content: dict[str, str] = field(default_factory=dict)  # tells it from others of equal settings


def find(folder: Path, run_dirs: Collection[Path] | None = None) -> list[Group]:
    """The groups of a folder's finished runs, or of `run_dirs` alone, by their first run's name."""
    by_key: dict[str, list[tuple[Path, Record]]] = {}
    for run_dir, record in run_record.collect(folder):
        if record["status"] == "finished" and (run_dirs is None or run_dir in run_dirs):
            by_key.setdefault(_key(record), []).append((run_dir, record))
    return _told_apart([_once(runs) for runs in by_key.values()])


def settings(record: Record) -> dict[str, Any]:
    """A run's config without what varies within a configuration: seed, and what moves nothing."""
    config = record["config"]
    kept = {k: v for k, v in config.items() if k not in (*naming.NOT_IDENTITY, "seed")}
    for section, names in {
        "train": naming.NOT_IDENTITY_OF_TRAINING, "model": ("cache_dir",), "data": ("cache_dir",)
    }.items():  # fmt: skip
        if section in kept:
            kept[section] = {k: v for k, v in kept[section].items() if k not in names}
    return kept


def _key(record: Record) -> str:
    known = run_record.get(record, "run.configuration")
    return json.dumps([known or settings(record), _counts(record)], sort_keys=True)


def _counts(record: Record) -> dict[str, Any]:
    """How much text a run has read: other numbers are other text."""
    documents = run_record.get(record, "data.num_documents") or {}
    counts = {f"documents.{split}": count for split, count in documents.items()}
    return counts | {"blocks": run_record.get(record, "data.num_blocks")}


def _once(runs: list[tuple[Path, Record]]) -> Group:
    """Every seed once: by the run whose result was written first (by name, if at the same time)."""

    def written(run: tuple[Path, Record]) -> tuple[int, str]:
        return (run[0] / run_record.FILE_NAME).stat().st_mtime_ns, run[0].name

    first: dict[Any, tuple[Path, Record]] = {}
    repeated = {}
    for run_dir, record in sorted(runs, key=written):
        kept_dir, kept = first.setdefault(record["config"]["seed"], (run_dir, record))
        if kept_dir != run_dir:
            repeated[run_dir] = (
                f"the same configuration and seed as {kept_dir.name}, which finished first and is "
                f"in the table; {_difference(record, kept)}"
            )
    kept_runs = [run for run in runs if run[0] not in repeated]
    return Group([run_dir for run_dir, _ in kept_runs], [r for _, r in kept_runs], repeated)


def _difference(record: Record, kept: Record) -> str:
    """Whether two runs that should be the same are, in words."""
    for text in ("test", "validation"):
        own_nll, kept_nll = (run_record.get(r, f"quality.{text}.nll_nats") for r in (record, kept))
        if None in (own_nll, kept_nll) or own_nll == kept_nll:
            continue
        if math.isclose(own_nll, kept_nll, rel_tol=1e-6):
            return "their numbers are the same to rounding"
        ours, theirs = (run_record.get(r, f"quality.{text}.perplexity") for r in (record, kept))
        return f"their numbers differ: {text} perplexity {_told(ours)} here, {_told(theirs)} there"
    return "their numbers are the same"


def _told(perplexity: float | None) -> str:
    return "infinite" if perplexity is None else f"{perplexity:.6g}"


def _told_apart(groups: list[Group]) -> list[Group]:
    """The groups; those of equal settings with the contents in which they differ."""
    alike: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        same = json.dumps(settings(group.records[0]), sort_keys=True)
        alike.setdefault(same, []).append(i)
    distinct = list(groups)
    for members in alike.values():
        if len(members) == 1:
            continue
        contents = [_contents(groups[i].records[0]) for i in members]
        keys = list(dict.fromkeys(key for content in contents for key in content))
        varying = [key for key in keys if len({content.get(key) for content in contents}) > 1]
        shown_keys = [key for key in varying if key != "configuration"] or varying
        for i, content in zip(members, contents, strict=True):
            own = {key: content[key] for key in shown_keys if key in content}
            distinct[i] = replace(groups[i], content=own)
    return distinct


def _contents(record: Record) -> dict[str, str]:
    """What a run has read, in short: digests where there are any, else counts."""
    names = {"data": "text", "model": "weights", "model.tokenizer": "tokenizer"}
    contents = {}
    for key, content in (run_record.get(record, "run.contents") or {}).items():
        kind, _, value = content.partition(":")
        short = value.strip() if kind in ("packages", "unknown") else value[:DIGITS]
        contents[names.get(key, key)] = short
    if not contents:
        counts = _counts(record).items()
        contents = {f"data.{k}": str(v) for k, v in counts if v is not None}
    known = run_record.get(record, "run.configuration")
    return contents | ({"configuration": known[:DIGITS]} if known else {})
