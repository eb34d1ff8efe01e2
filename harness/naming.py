"""What a run is called, and what makes it another run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re

from harness.config import (
    SECTIONS,
    LoraMethod,
    MethodConfig,
    PeftMethod,
    RunConfig,
    SvdMethod,
    UdvMethod,
    to_dict,
)

NOT_IDENTITY = (  # what moves no number of a run
    "experiment_name", "run_name", "outputs_dir", "rerun", "retry", "save_merged", "launch",
    "tracker",
)  # fmt: skip
# Keys that came later: a run that leaves them alone is the run that it was before.
_LATER = {
    "model": ("package", "gguf", "remote_code", "strict"),
    "data": (
        "packing", "separator", "prompt_field", "completion_field", "prompt_style", "train_share",
    ),
    "targets": ("roles",),
    "evaluate": ("generate", "protocol"),
}  # fmt: skip
NOT_IDENTITY_OF_TRAINING = ("on_oom", "checkpoint_every", "rates", "lr_from")


def identity(run: RunConfig) -> str:
    """SHA-256 of everything in the config that can move the run's numbers."""
    values = {k: v for k, v in to_dict(run).items() if k not in NOT_IDENTITY}
    texts = (values["data"], *values["evaluate"]["also"].values())
    parts = [(section, values[section]) for section in _LATER if section != "data"]
    for section, found in [*parts, *(("data", fields) for fields in texts)]:
        defaults = {field.name: field.default for field in dataclasses.fields(SECTIONS[section])}
        for name in _LATER[section]:
            if found[name] in (defaults[name], []):
                del found[name]
    for fields in texts:
        del fields["cache_dir"]
        if fields["source"] in ("text_files", "pairs") and fields["path"]:
            from harness.documents import files_digest

            fields["files"] = files_digest(fields["path"])  # the same path, another text
    del values["model"]["cache_dir"]
    for key in NOT_IDENTITY_OF_TRAINING:
        del values["train"][key]
    if isinstance(run.method, LoraMethod):
        values["method"]["alpha"] = float(run.method.lora_alpha)  # 2r and its number are one
    if not run.method.takes_targets:
        del values["targets"]
    if not run.method.trains:
        del values["train"]
    if is_deterministic(run):
        del values["seed"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def is_deterministic(run: RunConfig) -> bool:
    """Whether the seed moves nothing: a model that neither trains nor is drawn at random."""
    drawn = run.model.architecture or not run.model.strict  # in part
    drawn = drawn or getattr(run.method, "which", None) == "random"
    return not run.method.trains and not drawn


def label(method: MethodConfig) -> str:
    """What run names and tables call a method."""
    if method.label:
        return method.label
    if isinstance(method, PeftMethod):
        return method.peft_type.lower()
    if isinstance(method, UdvMethod):
        return f"udv-{method.train}" + ("-keep" if method.residual == "keep" else "")
    return method.name


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
        parts += [f"r{method.r}", f"a{method.lora_alpha:g}"]
    if isinstance(method, SvdMethod):
        parts.append(f"k{method.kept}")
    if method.trains:
        parts.append(f"lr{run.train.lr:g}")
    parts += [] if is_deterministic(run) else [f"s{run.seed}"]
    parts.append(identity(run)[:6])
    return "-".join(re.sub(r"[^\w.=+-]", "_", part) for part in parts)
