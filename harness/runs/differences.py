"""Whether a record is of a run, and in which keys their configurations differ."""

from __future__ import annotations

from typing import Any

from harness.config import matrix_roles, naming
from harness.config.run_config import RunConfig
from harness.results import run_record
from harness.results.record_types import Record
from harness.system import contents


def is_same(record: Record, run: RunConfig) -> bool:
    """Whether a record is of `run`; one from before contents were recorded is so by identity."""
    of_assets = run_record.get(record, "run.configuration") in (None, naming.configuration(run))
    alike = of_assets and bool(run_record.get(record, "run.identity") == naming.identity(run))
    return alike and _prefix_before(record, run) is None


def _prefix_before(record: Record, run: RunConfig) -> str | None:
    """The prefix of a finished record from before `evaluate.prefix`, where today's is another.

    Documents followed EOS then, of whatever model; today they follow BOS where the tokenizer says
    so. What ships with the harness has none.
    """
    model = run.model
    evaluation = record.get("evaluation") or {}
    shipped = model.asset or model.package or model.architecture or matrix_roles.shape_of(model)
    if not evaluation or "prefix" in evaluation or run.evaluate.prefix != "auto" or shipped:
        return None
    from harness.evaluation import prefix
    from harness.models import pretrained

    tokenizer = pretrained.load_tokenizer(model, pretrained.load_config(model))
    return None if prefix.find(tokenizer).name == "eos" else "eos"


def difference(record: Record, run: RunConfig) -> str:
    """The keys in which a recorded configuration differs from `run`, with both values."""
    before = run_record.get(record, "run.contents") or {}
    old = _flat(record.get("config") or {})
    old |= {f"contents of {key}": contents.short(value) for key, value in before.items()}
    new = _flat(run_record.settings(run))
    if before:
        new |= {f"contents of {k}": contents.short(v) for k, v in run.contents.items()}
    if prefix := _prefix_before(record, run):
        old["evaluate.prefix"] = prefix
    keys = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    return ", ".join(f"{k}: {old.get(k)} there, {new.get(k)} now" for k in keys[:6]) or "unknown"


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
