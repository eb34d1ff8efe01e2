"""The keys of a configuration: which there are, what people also call them, and what they take."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterable
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from harness.config.errors import nearest
from harness.config.method_schema import METHODS
from harness.config.optimizers import OPTIMIZERS
from harness.config.schema import SECTIONS, EarlyStopping, GenerateConfig, LatencyConfig, RootConfig

# Names of other programs, for keys of ours. Several keys are told with what each one is.
ALIASES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("learning_rate", "lr_rate", "peak_lr"), ("train.lr",)),
    **dict.fromkeys(
        ("epoch", "num_epochs", "num_train_epochs", "max_epochs"),
        ("train.epochs",),
    ),
    **dict.fromkeys(
        ("max_steps", "num_steps", "n_steps", "iters", "iterations", "max_iters", "train_steps"),
        ("train.steps",),
    ),
    **dict.fromkeys(
        (
            "batch", "bs", "batch_size", "train_batch_size", "per_device_train_batch_size",
            "micro_batch_size",
        ),
        ("train.batch_tokens (tokens of a step)", "train.micro_batch (blocks at a time)"),
    ),
    **dict.fromkeys(
        ("grad_accum", "accumulation", "gradient_accumulation_steps", "accumulate_grad_batches"),
        ("train.batch_tokens (accumulated from blocks of train.micro_batch)",),
    ),
    **dict.fromkeys(("rank", "lora_r", "lora_rank"), ("method.r", "method.rank")),
    "k": ("method.rank",),
    "lora_alpha": ("method.alpha",),
    "lora_dropout": ("method.dropout",),
    "init_lora_weights": ("method.init",),
    "target_modules": ("targets.modules",),
    "target": ("targets",),
    "modules_to_train": ("method.train_only",),
    **dict.fromkeys(
        ("model_name", "model_name_or_path", "base_model", "pretrained_model_name_or_path"),
        ("model", "model.path", "model.id"),
    ),
    **dict.fromkeys(
        ("dataset", "dataset_name", "train_file", "data_path", "data_dir", "text"),
        ("data", "data.path", "data.id"),
    ),
    **dict.fromkeys(
        (
            "block_size", "seq_len", "seq_length", "max_length", "max_seq_length",
            "max_seq_len", "sequence_length",
        ),
        ("data.context_length",),
    ),
    **dict.fromkeys(
        ("warmup_steps", "warmup_ratio", "warmup_iters", "num_warmup_steps"),
        ("train.warmup (a share of the steps)",),
    ),
    **dict.fromkeys(("wd", "decay"), ("train.weight_decay",)),
    **dict.fromkeys(
        ("grad_clip", "gradient_clip", "gradient_clip_val", "clip_grad_norm"),
        ("train.max_grad_norm",),
    ),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler", "scheduler"), ("train.schedule",)),
    **dict.fromkeys(
        ("fp16", "bf16", "dtype", "torch_dtype", "mixed_precision"), ("train.precision",)
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), ("train.beta1", "train.beta2")),
    "adam_epsilon": ("train.eps",),
    **dict.fromkeys(("optim", "optimizer_name", "optimizer_type", "optim_type"), ("optimizer",)),
    **dict.fromkeys(("loraplus_lr_ratio", "loraplus_ratio", "lr_ratio"), ("optimizer.ratio",)),
    "gradient_checkpointing": ("train.checkpointing",),
    "torch_compile": ("train.compile",),
    **dict.fromkeys(("num_threads", "n_threads", "cpus"), ("train.threads", "launch.cores")),
    **dict.fromkeys(("save_steps", "save_every", "save_interval"), ("train.checkpoint_interval",)),
    **dict.fromkeys(("eval_steps", "eval_every", "eval_interval"), ("evaluate.interval",)),
    **dict.fromkeys(("output_dir", "out_dir", "output", "logdir", "log_dir"), ("outputs_dir",)),
    **dict.fromkeys(("random_seed", "random_state", "seeds"), ("seed",)),
    **dict.fromkeys(
        ("num_gpus", "gpus", "n_gpus", "devices", "nproc_per_node", "world_size"),
        ("launch.num_processes",),
    ),
    **dict.fromkeys(("report_to", "logger", "wandb"), ("tracker",)),
    **dict.fromkeys(("experiment_id", "exp", "exp_name"), ("experiment_name", "experiment")),
    **dict.fromkeys(("overwrite", "force", "overwrite_output_dir"), ("rerun",)),
}  # fmt: skip
GROUPS = (
    "model", "data", "targets", "method", "train", "optimizer", "evaluate", "tracker", "experiment",
)  # fmt: skip
EXAMPLES = {  # where the default is no good one
    "train.lr": "2e-3, or auto or tuned",
    "method.alpha": "16, or 2r",
    "method.rank": "64, 0.25 or full",
}


def schemas() -> dict[str, list[tuple[str, type]]]:
    """Section -> (whose, schema): of `method` one a method, of the root "" has the plain keys."""
    by_section: dict[str, list[tuple[str, type]]] = {"": [("", RootConfig)]}
    by_section |= {section: [("", schema)] for section, schema in SECTIONS.items()}
    by_section["method"] = list(METHODS.items())
    by_section["optimizer"] = list(OPTIMIZERS.items())
    by_section["evaluate.generate"] = [("", GenerateConfig)]
    by_section["evaluate.latency"] = [("", LatencyConfig)]
    by_section["train.early_stopping"] = [("", EarlyStopping)]
    return by_section


@cache
def leaves() -> dict[str, dict[str, tuple[str, ...]]]:
    """Last part of a key -> the keys that end so, each with the methods that have it."""
    by_name: dict[str, dict[str, tuple[str, ...]]] = {}
    for section, several in schemas().items():
        for whose, schema in several:
            for field in dataclasses.fields(schema):
                key = f"{section}.{field.name}" if section else field.name
                keys = by_name.setdefault(field.name, {})
                keys[key] = (*keys.get(key, ()), whose) if whose else ()
    for name in ("contents", "lr_from", "since", "name"):  # the harness's own, or a label
        by_name.pop(name, None)
    return by_name


def every() -> set[str]:
    """Return all keys and groups that can be given on the command line."""
    return {key for keys in leaves().values() for key in keys} | set(GROUPS)


def elsewhere(key: str, method: str = "") -> str:
    """End of a message on an unknown key: the keys that are called so, or meant; "" for none.

    With `method`, the one that is configured, a key that others have is told with their names.
    """
    last = key.rsplit(".", 1)[-1]
    whole = key.replace("-", "_").removeprefix("train.").removeprefix("data.")
    candidates = list(leaves().get(last, {}))
    for name in (whole, last.replace("-", "_").lower()):
        candidates += [other for other in ALIASES.get(name, ()) if other not in candidates]
    candidates = [other for other in candidates if other != key or other in leaves().get(last, {})]
    if not candidates:
        return ""
    suggestions = sorted(
        (_with_owners(other, method) for other in candidates), key=lambda t: " (of " in t
    )
    return f"did you mean {' or '.join(suggestions)}?"


def _with_owners(key: str, method: str) -> str:
    owners = leaves().get(key.rsplit(".", 1)[-1], {}).get(key, ())
    if (
        not key.startswith(("method.", "optimizer."))
        or not owners
        or method in owners
        or not method
    ):
        return f"'{key}'" if " (" not in key else key
    return f"'{key}' (of {key.partition('.')[0]}={' and '.join(owners)})"


def close(key: str) -> str:
    """The nearest of all keys, by its last part, as the end of a message; "" for none."""
    hint = nearest(key.rsplit(".", 1)[-1], leaves())
    if not hint.startswith("did you mean"):
        return ""
    keys = leaves()[hint.split("'")[1]]
    return f"did you mean {' or '.join(repr(other) for other in keys)}?"


def expected(schema: type, name: str, section: str = "") -> str:
    """What a key takes, in words: `a whole number`; "" where anything goes."""
    hints = get_type_hints(schema)
    key = f"{section}.{name}" if section else name
    if name not in hints:
        return ""
    example = EXAMPLES.get(key)
    words = _words(hints[name])
    if name.endswith("seconds"):
        words = words.replace("a number", "a number of seconds")
    default = next((f.default for f in dataclasses.fields(schema) if f.name == name), None)
    if example is None and isinstance(default, int | float) and not isinstance(default, bool):
        example = f"{default:g}"
    return f"{words}, as in {key}={example}" if example and words else words


def _words(hint: Any) -> str:
    kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if get_origin(hint) in (Union, types.UnionType):
        parts = [_words(part) for part in get_args(hint) if part is not type(None)]
        return _joined([*parts, "null"] if type(None) in get_args(hint) else parts)
    if get_origin(hint) is list:
        return "a list, as [a,b]"
    if get_origin(hint) is dict:
        return "a mapping, as {a: b}"
    return kinds.get(hint, "")


def _joined(words: Iterable[str]) -> str:
    return " or ".join(word for word in words if word)
