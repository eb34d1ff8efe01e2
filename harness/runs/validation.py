"""What can be known of a configuration to be wrong without torch, the text or the model."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from pathlib import Path

from harness.config import labels, model_shapes
from harness.config.errors import ConfigError, nearest, require
from harness.config.paths import ASSETS_DIR, options
from harness.config.run_config import RunConfig
from harness.config.schema import TrainConfig
from harness.runs import validate_text
from harness.runs.validate_method import validate_method
from harness.runs.validate_optimizer import validate_optimizer
from harness.runs.validate_quantize import validate_quantize
from harness.system import gguf_file

TRACKERS = {  # Accelerate's names, and the options of conf/tracker
    "wandb": ("project", "entity", "mode", "adapters", "patience"),
    "tensorboard": ("patience",),
    "trackio": ("project", "patience"),
    "mlflow": ("uri", "patience"),
    "comet_ml": ("project", "init", "patience"),
    "clearml": ("project", "init", "patience"),
    "aim": ("init", "patience"),
    "swanlab": ("project", "init", "patience"),
}
WITH_AN_EXTRA = ("wandb", "tensorboard", "trackio")  # of pyproject.toml
SAVE_MERGED = ("auto", "always", "never")
CHOICES = {
    **validate_text.CHOICES,
    "train.schedule": ("cosine", "linear", "constant", "wsd"),
    "train.precision": ("fp32", "bf16", "auto"),
    "train.on_oom": ("halve", "fail"),
    "evaluate.prefix": ("auto", "bos", "eos", "none"),
    "evaluate.protocol": ("documents", "hf_guide", "lm_eval", "gpt2_paper"),
    "evaluate.classify": ("auto", "always", "never"),
    "model.gelu": ("fused", "as_saved"),
    "model.frozen_dtype": ("fp32", "bf16"),
    "model.unfuse_qkv": ("auto", True, False),
    "model.quantize": ("none", "int8", "nf4", "fp4"),
    "model.double_quant": (True, False),
    "model.compute_dtype": ("auto", "fp32", "bf16"),
    "model.linear": ("auto", True, False),
    "model.strict": (True, False),
    "method.bias": ("none", "all", "lora_only"),
    "method.which": ("top", "bottom", "random"),
    "method.train": ("d", "u", "v", "udv"),
    "method.residual": ("drop", "keep"),
}


def validate(run: RunConfig) -> None:
    """Check everything that can be known without torch, section by section; raises ConfigError."""
    _validate_choices(run)
    _validate_root(run)
    _validate_model(run)
    validate_text.validate_data(run)
    labels.check(run)
    _validate_train(run)
    _validate_launch(run)
    _validate_tracker(run)
    _validate_batch(run)
    validate_text.validate_evaluation(run)
    validate_method(run)
    validate_optimizer(run)
    validate_quantize(run)


def _validate_choices(run: RunConfig) -> None:
    """Values that are one of a few words."""
    for key, choices in CHOICES.items():
        group, name = key.split(".")
        section = getattr(run, group)
        if hasattr(section, name) and getattr(section, name) not in choices:
            value = getattr(section, name)
            raise ConfigError(f"{key}={value!r}: {nearest(str(value), map(str, choices))}")


def _validate_root(run: RunConfig) -> None:
    """The plain values of conf/config.yaml."""
    if run.save_merged not in SAVE_MERGED:
        raise ConfigError(
            f"save_merged={run.save_merged!r}: {nearest(run.save_merged, SAVE_MERGED)}"
        )

    require(run.retry >= 0, "retry", run.retry, "0 or more further attempts")
    require(0 <= run.seed < 2**32, "seed", run.seed, "0 to 2^32 - 1")
    for key in ("run_name", "experiment_name"):
        name = getattr(run, key)
        if name is not None and not re.fullmatch(r"\w[\w.=+-]*", name):
            raise ConfigError(
                f"{key}={name!r}: expected letters, digits, . _ = + -, and first a letter or digit"
            )


def _validate_model(run: RunConfig) -> None:
    """Where the base comes from: exactly one source, which is there."""
    model = run.model
    kinds = ("asset", "path", "id", "package", "architecture")
    sources = [key for key in kinds if getattr(model, key)]
    if len(sources) != 1:
        raise ConfigError(
            f"model={model.name} has {' and '.join(sources) or 'no source'}: expected exactly one "
            f"of {', '.join(kinds)}" + "; set model.id=…" * (model.name == "hub")
        )
    if model.asset and not (ASSETS_DIR / model.asset).is_dir():
        assets = [p.name for p in ASSETS_DIR.glob("*") if p.is_dir()]
        raise ConfigError(
            f"model.asset={model.asset!r} is not there: {nearest(model.asset, assets)}"
        )
    if model.path and not Path(model.path).is_dir():
        raise ConfigError(f"model.path={model.path!r}: no such folder")
    if model.package and not model.gguf:
        raise ConfigError(f"model.package={model.package} needs model.gguf, a file in it")
    if model.gguf and not model.package:  # a package is looked for where it is needed
        gguf_file.file_of(model)
    if model.remote_code and model.remote_code not in (model.id, model.path):
        raise ConfigError(
            f"model.remote_code={model.remote_code} names another model than "
            f"{model.id or model.path or model.name}: a model's own code is run only where it is "
            "asked for by that model's id or folder"
        )
    require(0 <= model.dropout < 1, "model.dropout", model.dropout, "a probability in [0, 1)")


def _validate_train(run: RunConfig) -> None:
    """Numbers of the optimizer and the schedule in their ranges."""
    train = run.train
    positive = ("batch_tokens", "micro_batch", "lr", "eps")
    for key in positive:
        value = getattr(train, key)
        require(0 < value < float("inf"), f"train.{key}", value, "a finite number above 0")
    _validate_steps(run)
    for key in ("epochs", "max_seconds", "max_flops"):
        value = getattr(train, key)
        fine = value is None or 0 < value < math.inf
        require(fine, f"train.{key}", value, "a finite number above 0, or null")
    stopping = train.early_stopping
    patience, key = stopping.patience, "train.early_stopping"
    fine = patience is None or patience > 0
    require(fine, f"{key}.patience", patience, "1 or more validations, or null")
    fine = 0 <= stopping.min_delta < math.inf
    require(fine, f"{key}.min_delta", stopping.min_delta, "0 or more nats per token")
    for key in ("beta1", "beta2"):
        require(
            0 <= getattr(train, key) < 1, f"train.{key}", getattr(train, key), "a value in [0, 1)"
        )
    require(0 <= train.warmup <= 1, "train.warmup", train.warmup, "a share of the steps in [0, 1]")
    room = 1 - train.warmup
    if train.schedule == "wsd":
        fine = 0 <= train.cooldown <= room
        require(fine, "train.cooldown", train.cooldown, f"a share in [0, {room:g}], beside warmup")
    elif train.cooldown != TrainConfig.cooldown:
        raise ConfigError(
            f"train.cooldown={train.cooldown:g} with train.schedule={train.schedule}: only wsd has "
            "a cool-down; set train.schedule=wsd"
        )
    require(
        0 <= train.min_lr_ratio <= 1,
        "train.min_lr_ratio",
        train.min_lr_ratio,
        "a share of lr in [0, 1]",
    )
    require(
        0 <= train.label_smoothing < 1,
        "train.label_smoothing",
        train.label_smoothing,
        "a share in [0, 1)",
    )
    require(train.weight_decay >= 0, "train.weight_decay", train.weight_decay, "0 or more")
    require(
        train.max_grad_norm is None or train.max_grad_norm > 0,
        "train.max_grad_norm",
        train.max_grad_norm,
        "a norm above 0, or null",
    )
    alpha = train.neftune_alpha
    fine = alpha is None or 0 < alpha < math.inf
    require(fine, "train.neftune_alpha", alpha, "a finite number above 0, or null")
    fine = train.ema is None or 0 <= train.ema < 1
    require(fine, "train.ema", train.ema, "a decay in [0, 1), or null")
    require(train.threads is None or train.threads > 0, "train.threads", train.threads, "1 or more")
    every = train.checkpoint_interval
    require(every is None or every > 0, "train.checkpoint_interval", every, "1 or more, or null")


def _validate_batch(run: RunConfig) -> None:
    """An optimizer step is a whole number of micro-batches."""
    train, data = run.train, run.data
    chunk = train.micro_batch * data.context_length
    if train.batch_tokens % chunk:
        model_shapes.check_context(run)  # or the advice below leads to what cannot run
        options = sorted(
            {
                max(chunk, train.batch_tokens // chunk * chunk),
                -(-train.batch_tokens // chunk) * chunk,
            }
        )
        raise ConfigError(
            f"train.batch_tokens={train.batch_tokens} is not a multiple of train.micro_batch x "
            f"data.context_length = {train.micro_batch} x {data.context_length} = {chunk}: "
            f"try {' or '.join(map(str, options))}"
        )


def _validate_steps(run: RunConfig) -> None:
    """No steps are no training: the row would be the base's, under the name of a method."""
    steps, method = run.train.steps, run.method
    if not method.trains:
        require(steps >= 0, "train.steps", steps, "0 or more optimizer steps")
    elif steps == 0:
        same = f"method=truncate method.rank={getattr(method, 'rank', None) or 'full'}"
        untrained = same if getattr(method, "residual", "") == "drop" else "method=none"
        raise ConfigError(
            f"train.steps=0 with method={method.name}: nothing would be trained; expected 1 or "
            f"more optimizer steps, or {untrained}, which says so"
        )
    require(steps >= 0, "train.steps", steps, "1 or more optimizer steps")


def _validate_tracker(run: RunConfig) -> None:
    for name, fields in run.tracker.items():
        if name not in TRACKERS:
            raise ConfigError(f"tracker.{name}: {nearest(name, TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            what = f"-e '.[{name}]'" if name in WITH_AN_EXTRA else name
            raise ConfigError(f"tracker={name} is not installed: pip install {what}")
        known = TRACKERS[name]
        if not isinstance(fields, dict):
            raise ConfigError(f"tracker.{name}={fields}: expected options: {', '.join(known)}")
        for key in fields:
            if key not in known:
                raise ConfigError(f"tracker.{name}.{key}: {nearest(key, known)}")
    mode = (run.tracker.get("wandb") or {}).get("mode", "online")
    if mode not in ("online", "offline"):
        raise ConfigError(f"tracker.wandb.mode={mode}: {nearest(str(mode), ('online', 'offline'))}")


def _validate_launch(run: RunConfig) -> None:
    launch = run.launch
    ranks = launch.num_processes
    require(ranks > 0, "launch.num_processes", ranks, "1 or more")
    require(launch.cores is None or launch.cores > 0, "launch.cores", launch.cores, "1 or more")
    _validate_pause(run)
    if launch.accelerate is not None and launch.accelerate not in options("accelerate"):
        raise ConfigError(
            f"launch.accelerate={launch.accelerate}: "
            f"{nearest(launch.accelerate, options('accelerate'))}"
        )
    if launch.accelerate == "single_gpu" and ranks > 1:
        raise ConfigError(
            f"launch.accelerate=single_gpu starts one process, and launch.num_processes={ranks} "
            "asks for more: set launch.accelerate=ddp"
        )
    if launch.sharded:
        _validate_sharded(run)
    blocks = run.train.batch_tokens // run.data.context_length
    step = run.train.micro_batch * ranks
    if ranks > 1 and blocks % step:
        fits = [n for n in range(1, run.train.micro_batch + 1) if blocks % (n * ranks) == 0]
        raise ConfigError(
            f"train.batch_tokens={run.train.batch_tokens} is {blocks} blocks, which do not divide "
            f"among launch.num_processes={ranks} of train.micro_batch={run.train.micro_batch}: "
            + (f"try train.micro_batch={fits[-1]}" if fits else f"make them a multiple of {ranks}")
        )


def _validate_pause(run: RunConfig) -> None:
    """A pause is where validation is read anyway, or else the run would be another one."""
    pause_at, every = run.launch.pause_at, run.evaluate.interval
    if pause_at is None or (pause_at >= run.train.steps and run.train.epochs is None):
        return  # it finishes
    require(pause_at > 0, "launch.pause_at", pause_at, "1 or more optimizer steps, or null")
    if every > 0 and pause_at % every:
        near = [step for step in (pause_at // every * every, -(-pause_at // every) * every) if step]
        raise ConfigError(
            f"launch.pause_at={pause_at} is not a multiple of evaluate.interval={every}, and a run "
            f"pauses where validation is read: try {' or '.join(map(str, near))}"
        )


def _validate_sharded(run: RunConfig) -> None:
    """What ranks that divide a model among them cannot do."""
    by_hand = os.environ.get("WORLD_SIZE", "1") != "1"  # we are a rank of an accelerate launch
    if run.launch.num_processes == 1 and not by_hand:
        raise ConfigError(
            "launch.accelerate=fsdp divides a model, and launch.num_processes=1 is one rank: "
            "set launch.num_processes to 2 or more"
        )
    whole = "reads weights outside of a forward pass, where a rank has a part of them"
    refused = {
        "train.ema": (run.train.ema, "is untried on a divided model", "null"),
        "train.compile=true": (run.train.compile, "is untried on a divided model", "false"),
        "evaluate.generate": (
            run.evaluate.generate,
            "runs ranks apart that must run alike",
            "null",
        ),
        "method.orthogonality": (getattr(run.method, "orthogonality", 0), whole, "0"),
    }
    for setting, (given, why, instead) in refused.items():
        if given:
            key = setting.partition("=")[0]
            raise ConfigError(
                f"launch.accelerate=fsdp: {setting} {why}; set {key}={instead}, or "
                "launch.accelerate=ddp"
            )
