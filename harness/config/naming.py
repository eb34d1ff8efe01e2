"""What a run is called, and what makes it another run."""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

from harness.config import renamed, schema
from harness.config.method_schema import (
    AdaloraMethod,
    FullMethod,
    LoraMethod,
    MethodConfig,
    PeftMethod,
    SvdMethod,
    UdvMethod,
)
from harness.config.schema import SECTIONS

if TYPE_CHECKING:
    from harness.config.run_config import RunConfig

NOT_IDENTITY = (  # what moves no number of a run
    "experiment_name", "run_name", "outputs_dir", "rerun", "retry", "save_merged", "launch",
    "tracker", "contents",
)  # fmt: skip
# Keys that came later: a run that leaves them alone is the run that it was before.
_LATER = {
    "model": (
        "package", "gguf", "remote_code", "strict", "quantize", "double_quant", "compute_dtype",
        "linear",
    ),
    "data": (
        "packing", "separator", "prompt_field", "completion_field", "prompt_style", "train_share",
        "split", "validation_path", "test_path", "encoding", "record_form", "chat_template",
        "loss_on", "too_long", "parts", "held_out_part", "max_rows",
    ),
    "targets": ("roles",),
    "train": (
        "max_seconds", "max_flops", "early_stopping", "groups", "neftune_alpha", "ema", "cooldown",
    ),
    "evaluate": (
        "generate", "protocol", "prefix", "classify", "validation_tokens", "test_tokens",
        "latency",
    ),
}  # fmt: skip
LATER_OF_LORA = ("start_sequences", "rank_pattern", "alpha_pattern")
PATHS = ("path", "id", "validation_path", "test_path")  # which contents stand for
NOT_IDENTITY_OF_TRAINING = (  # epochs are in the steps
    "on_oom", "checkpoint_interval", "rates", "lr_from", "epochs",
)  # fmt: skip


def identity(run: RunConfig) -> str:
    """SHA-256 of everything in the config that can move the run's numbers.

    Text and weights count by what was in them when the run was planned (`run.contents`), and not by
    the spelling of their path. Nothing is read from the disk.
    """
    return _hash(_values(run))


def configuration(run: RunConfig) -> str:
    """SHA-256 of the same without the seed: runs that share it are seeds of one configuration.

    It also covers the contents of assets and packages, which the identity has by name alone.
    """
    values = _values(run)
    values.pop("seed", None)
    return _hash(values | {"contents": run.contents})


def _hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _values(run: RunConfig) -> dict[str, Any]:
    """What an identity is of, as plain containers."""
    values = {k: v for k, v in schema.plain(run).items() if k not in NOT_IDENTITY}
    also = values["evaluate"]["also"]
    texts = {"data": values["data"]} | {f"evaluate.also.{name}": also[name] for name in also}
    mixed = values["data"]["parts"] or {}
    texts |= {f"data.parts.{name}": mixed[name] for name in mixed}
    parts = [(section, values[section]) for section in _LATER if section != "data"]
    for section, section_values in [*parts, *(("data", fields) for fields in texts.values())]:
        defaults = schema.defaults(SECTIONS[section])
        for name in _LATER[section]:
            if section_values[name] in (defaults[name], []):
                del section_values[name]
    if values["train"].get("ema") == 0:  # none, as null
        del values["train"]["ema"]
    for key, fields in texts.items():
        del fields["cache_dir"], fields["streaming"]
        _by_content(fields, run.contents.get(key, ""))
    model = values["model"]
    del model["cache_dir"]
    if model.get("path") and "remote_code" in model:  # the same folder, however spelled
        model["remote_code"] = True
    _by_content(model, run.contents.get("model", ""))
    kind, _, content = run.contents.get("model.tokenizer", "").partition(":")
    if kind in ("sha256", "commit"):
        model["tokenizer"] = content if kind == "sha256" else f"{run.model.tokenizer}@{content}"
    for key in NOT_IDENTITY_OF_TRAINING:
        del values["train"][key]
    for key, content in run.contents.items():
        if key.startswith("method.fields."):  # what the path holds, in place of its spelling
            values["method"]["fields"][key.removeprefix("method.fields.")] = content
    if isinstance(run.method, LoraMethod):
        values["method"]["alpha"] = float(run.method.lora_alpha)  # 2r and its number are one
        usual = schema.defaults(LoraMethod)
        for key in LATER_OF_LORA:
            if values["method"][key] == usual[key]:
                del values["method"][key]
    if isinstance(run.method, AdaloraMethod):
        values["method"] |= {"alpha": float(run.method.lora_alpha), "init_r": run.method.first_rank}
    if isinstance(run.method, FullMethod):  # a set; and without it the run that it was before
        only = sorted(set(values["method"].pop("train_only")))
        values["method"] |= {"train_only": only} if only else {}
    if not run.method.takes_targets:
        del values["targets"]
    if run.optimizer.name == "adamw" or not run.method.trains:  # all runs were AdamW's once
        del values["optimizer"]
    if not run.method.trains:
        del values["train"]
    if is_deterministic(run):
        del values["seed"]
    renamed.as_before(values)
    return values


def _by_content(fields: dict[str, Any], content: str) -> None:
    """Put what was read in place of where it was: a path, or a branch of the hub."""
    kind, _, value = content.partition(":")
    if kind == "commit":
        fields["revision"] = value
    if kind == "sha256":
        fields |= {key: None for key in PATHS if key in fields} | {"content": value}


def is_deterministic(run: RunConfig) -> bool:
    """Whether the seed moves nothing: a model that neither trains nor is drawn at random."""
    drawn = run.model.architecture or not run.model.strict  # in part
    drawn = drawn or getattr(run.method, "which", None) == "random"
    return not run.method.trains and not drawn


def label(method: MethodConfig) -> str:
    """Return the name by which run names and tables call a method."""
    if method.label:
        return method.label
    if isinstance(method, PeftMethod):
        return method.peft_type.lower()
    if isinstance(method, UdvMethod):
        return f"udv-{method.train}" + ("-keep" if method.residual == "keep" else "")
    if isinstance(method, FullMethod) and method.train_only:
        return f"full-only-{'+'.join(sorted(set(method.train_only)))}"
    return method.name


def with_pattern(method: LoraMethod) -> str:
    """Return r of LoRA with the other ranks of method.rank_pattern, as in 8+attn.c_attn=16."""
    parts = [str(method.r), *(f"{key}={rank}" for key, rank in method.rank_pattern.items())]
    return "+".join(parts if len(parts) < 4 else [*parts[:3], f"{len(parts) - 3}more"])


def run_name(run: RunConfig) -> str:
    """`run_name` as given, or what most sweeps vary, readable, then six digits of the identity.

    The digits keep two runs apart that differ in anything that the readable part leaves out.
    """
    if run.run_name:
        return run.run_name
    method = run.method
    parts = [label(method)]
    if method.takes_targets:
        parts.append(run.targets.name)
    if isinstance(method, LoraMethod):
        parts += [f"r{with_pattern(method)}", f"a{method.lora_alpha:g}"]
    if isinstance(method, AdaloraMethod):
        parts += [f"r{method.first_rank}to{method.r}", f"a{method.lora_alpha:g}"]
    if isinstance(method, SvdMethod):
        parts.append(f"k{method.kept}")
    if method.trains:
        parts += [] if run.optimizer.name == "adamw" else [run.optimizer.name]
        parts.append(f"lr{run.train.lr:g}")
    parts += [] if is_deterministic(run) else [f"s{run.seed}"]
    parts.append(identity(run)[:6])
    return "-".join(re.sub(r"[^\w.=+-]", "_", part) for part in parts)
