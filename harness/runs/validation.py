"""What can be known of a configuration to be wrong without torch, the text or the model."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from pathlib import Path
from typing import Any

from harness.config import labels
from harness.config.errors import ConfigError, nearest
from harness.config.paths import ASSETS_DIR, options
from harness.config.run_config import RunConfig
from harness.config.schema import DataConfig, FullMethod, LoraMethod, PeftMethod, SvdMethod
from harness.data import sources
from harness.data.documents import SOURCES, SPLITS  # needs the standard library only
from harness.system import encodings, files, gguf_file
from harness.system.files import find_files

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
    "data.source": (*SOURCES, "pairs"),
    "data.packing": ("packed", "padded"),
    "data.split": ("hash", "contiguous"),
    "data.prompt_style": ("as_is", "e2e"),
    "train.schedule": ("cosine", "linear", "constant"),
    "train.precision": ("fp32", "bf16", "auto"),
    "train.on_oom": ("halve", "fail"),
    "evaluate.prefix": ("auto", "bos", "eos", "none"),
    "evaluate.protocol": ("documents", "hf_guide", "lm_eval", "gpt2_paper"),
    "evaluate.classify": ("auto", "always", "never"),
    "model.gelu": ("fused", "as_saved"),
    "model.frozen_dtype": ("fp32", "bf16"),
    "model.unfuse_qkv": ("auto", True, False),
    "model.strict": (True, False),
    "method.bias": ("none", "all", "lora_only"),
    "method.which": ("top", "bottom", "random"),
    "method.train": ("d", "u", "v", "udv"),
    "method.residual": ("drop", "keep"),
}


def _require(condition: bool, key: str, value: Any, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{key}={value}: expected {expected}")


def validate(run: RunConfig) -> None:
    """Everything that can be known without torch; raises ConfigError."""
    for key, choices in CHOICES.items():
        group, name = key.split(".")
        section = getattr(run, group)
        if hasattr(section, name) and getattr(section, name) not in choices:
            value = getattr(section, name)
            raise ConfigError(f"{key}={value!r}: {nearest(str(value), map(str, choices))}")

    if run.save_merged not in SAVE_MERGED:
        raise ConfigError(
            f"save_merged={run.save_merged!r}: {nearest(run.save_merged, SAVE_MERGED)}"
        )

    model, data, train, ev = run.model, run.data, run.train, run.evaluate
    kinds = ("asset", "path", "id", "package", "architecture")
    sources = [key for key in kinds if getattr(model, key)]
    if len(sources) != 1:
        raise ConfigError(
            f"model={model.name} has {' and '.join(sources) or 'no source'}: expected exactly one "
            f"of {', '.join(kinds)}" + "; set model.id=…" * (model.name == "hub")
        )
    if model.asset and not (ASSETS_DIR / model.asset).is_dir():
        there = [p.name for p in ASSETS_DIR.glob("*") if p.is_dir()]
        raise ConfigError(
            f"model.asset={model.asset!r} is not there: {nearest(model.asset, there)}"
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
    labels.check(run)
    _require(0 <= model.dropout < 1, "model.dropout", model.dropout, "a probability in [0, 1)")

    _require(data.context >= 2, "data.context", data.context, "at least 2 tokens")
    also = {f"evaluate.also.{name}": text for name, text in ev.also.items()}
    for where, text in {"data": data, **also}.items():
        _validate_split(text, where)
        most = text.document_chars
        _require(most is None or most > 0, f"{where}.document_chars", most, "1 or more, or null")
    for key in ("validation_share", "test_share"):
        _require(
            0 < getattr(data, key) < 0.5, f"data.{key}", getattr(data, key), "a share in (0, 0.5)"
        )
    share = data.train_share
    _require(0 < share <= 1, "data.train_share", share, "a share in (0, 1]")
    if data.source == "text_files":
        _validate_files(data, "data")
    if data.source == "hub" and not data.id:
        raise ConfigError("data=hub needs data.id, the id of a text data set on the hub")
    if data.source == "pairs":
        _validate_pairs(data, "data")

    positive = ("batch_tokens", "micro_batch", "lr", "eps")
    for key in positive:
        value = getattr(train, key)
        _require(0 < value < float("inf"), f"train.{key}", value, "a finite number above 0")
    _validate_steps(run)
    for key in ("epochs", "max_seconds", "max_flops"):
        value = getattr(train, key)
        fine = value is None or 0 < value < math.inf
        _require(fine, f"train.{key}", value, "a finite number above 0, or null")
    stopping = train.early_stopping
    patience, key = stopping.patience, "train.early_stopping"
    fine = patience is None or patience > 0
    _require(fine, f"{key}.patience", patience, "1 or more validations, or null")
    fine = 0 <= stopping.min_delta < math.inf
    _require(fine, f"{key}.min_delta", stopping.min_delta, "0 or more nats per token")
    for key in ("beta1", "beta2"):
        _require(
            0 <= getattr(train, key) < 1, f"train.{key}", getattr(train, key), "a value in [0, 1)"
        )
    _require(0 <= train.warmup <= 1, "train.warmup", train.warmup, "a share of the steps in [0, 1]")
    _require(0 <= train.final_lr <= 1, "train.final_lr", train.final_lr, "a share of lr in [0, 1]")
    _require(
        0 <= train.label_smoothing < 1,
        "train.label_smoothing",
        train.label_smoothing,
        "a share in [0, 1)",
    )
    if model.frozen_dtype == "bf16" and train.precision == "fp32":
        raise ConfigError(
            "model.frozen_dtype=bf16 with train.precision=fp32: fp32 products need fp32 weights; "
            "set train.precision=bf16"
        )
    if isinstance(run.method, FullMethod) and run.method.train_only:
        empty = [entry for entry in run.method.train_only if not entry.strip()]
        _require(not empty, "method.train_only", run.method.train_only, "names that are not empty")
        if model.frozen_dtype == "bf16":
            raise ConfigError(
                "model.frozen_dtype=bf16 with method.train_only: the base is loaded in one dtype, "
                "and what trains of it must be fp32; set model.frozen_dtype=fp32"
            )
    _require(train.weight_decay >= 0, "train.weight_decay", train.weight_decay, "0 or more")
    _require(
        train.clip is None or train.clip > 0, "train.clip", train.clip, "a norm above 0, or null"
    )
    _require(
        train.threads is None or train.threads > 0, "train.threads", train.threads, "1 or more"
    )
    every = train.checkpoint_every
    _require(every is None or every > 0, "train.checkpoint_every", every, "1 or more, or null")
    _require(run.retry >= 0, "retry", run.retry, "0 or more further attempts")
    _validate_launch(run)
    _validate_tracker(run)
    chunk = train.micro_batch * data.context
    if train.batch_tokens % chunk:
        options = sorted(
            {
                max(chunk, train.batch_tokens // chunk * chunk),
                -(-train.batch_tokens // chunk) * chunk,
            }
        )
        raise ConfigError(
            f"train.batch_tokens={train.batch_tokens} is not a multiple of train.micro_batch x "
            f"data.context = {train.micro_batch} x {data.context} = {chunk}: "
            f"try {' or '.join(map(str, options))}"
        )

    for name, text in ev.also.items():
        where = f"evaluate.also.{name}"
        if text.source == "pairs":
            _validate_pairs(text, where)
        if not re.fullmatch(r"\w+", name) or name in SPLITS:
            raise ConfigError(f"{where}: expected letters, digits, _, and no split's name")
        own = ("source", "path", "id", "config_name", "packages")
        if all(getattr(text, key) == getattr(data, key) for key in own):
            raise ConfigError(
                f"{where} is the text that is trained on ({data.name}), whose test set is read "
                "once, at the end: name another"
            )
        if text.source not in CHOICES["data.source"]:
            there = [str(choice) for choice in CHOICES["data.source"]]
            raise ConfigError(f"{where}.source={text.source}: {nearest(text.source, there)}")
        if text.source == "text_files":
            _validate_files(text, where)
        for key in ("validation_share", "test_share"):
            share = getattr(text, key)
            _require(0 < share < 0.5, f"{where}.{key}", share, "a share in (0, 0.5)")
    if ev.also and not ev.test:
        raise ConfigError(
            "evaluate.test=false reads no test set, and evaluate.also reads those of "
            f"{', '.join(ev.also)}: leave one of them out"
        )
    if ev.generate is not None:
        _validate_generate(run)
    if ev.classify == "always" and data.source != "pairs":
        raise ConfigError(
            f"evaluate.classify=always: data={data.name} has no completions to choose from; use a "
            "data set of pairs (data=pairs), or evaluate.classify=auto"
        )
    for key in ("validation_tokens", "test_tokens"):
        most = getattr(ev, key)
        _require(most is None or most > 0, f"evaluate.{key}", most, "1 or more tokens, or null")
    if ev.test_tokens is not None and (ev.protocol != "documents" or ev.generate is not None):
        other = "generate" if ev.generate is not None else f"protocol={ev.protocol}"
        raise ConfigError(
            f"evaluate.test_tokens={ev.test_tokens} with evaluate.{other}, which reads the test "
            "set as a whole: leave one of them out"
        )
    _require(ev.every > 0, "evaluate.every", ev.every, "1 or more optimizer steps")
    _require(
        ev.batch_tokens is None or ev.batch_tokens > 0,
        "evaluate.batch_tokens",
        ev.batch_tokens,
        "1 or more tokens, or null",
    )
    context = run.evaluation_context
    _require(context >= 1, "evaluate.context", context, "1 or more tokens")
    stride = context if ev.stride is None else ev.stride
    _require(1 <= stride <= context, "evaluate.stride", stride, f"1 to the context of {context}")

    if ev.protocol != "documents":
        _validate_protocol(run, context, stride)

    if isinstance(run.method, LoraMethod):
        _require(run.method.r >= 1, "method.r", run.method.r, "a rank of 1 or more")
        _require(0 <= run.method.dropout < 1, "method.dropout", run.method.dropout, "in [0, 1)")
        alpha = run.method.lora_alpha
        _require(0 < alpha < float("inf"), "method.alpha", run.method.alpha, "a number above 0")
    if isinstance(run.method, SvdMethod) and run.method.energy is not None:
        _require(
            0 < run.method.energy <= 1, "method.energy", run.method.energy, "a share in (0, 1]"
        )
        if run.method.rank is not None:
            raise ConfigError(
                f"method.rank={run.method.rank} and method.energy={run.method.energy} are "
                "alternatives: set one of them to null"
            )
    if isinstance(run.method, PeftMethod) and run.method.peft_type in ("???", ""):
        raise ConfigError("method=peft needs method.peft_type, e.g. method.peft_type=IA3")
    _require(0 <= run.seed < 2**32, "seed", run.seed, "0 to 2^32 - 1")
    for key in ("run_name", "experiment_name"):
        name = getattr(run, key)
        if name is not None and not re.fullmatch(r"\w[\w.=+-]*", name):
            raise ConfigError(
                f"{key}={name!r}: expected letters, digits, . _ = + -, and first a letter or digit"
            )


def _validate_steps(run: RunConfig) -> None:
    """No steps are no training: the row would be the base's, under the name of a method."""
    steps, method = run.train.steps, run.method
    if not method.trains:
        _require(steps >= 0, "train.steps", steps, "0 or more optimizer steps")
    elif steps == 0:
        same = f"method=truncate method.rank={getattr(method, 'rank', None) or 'full'}"
        untrained = same if getattr(method, "residual", "") == "drop" else "method=none"
        raise ConfigError(
            f"train.steps=0 with method={method.name}: nothing would be trained; expected 1 or "
            f"more optimizer steps, or {untrained}, which says so"
        )
    _require(steps >= 0, "train.steps", steps, "1 or more optimizer steps")


def _validate_split(data: DataConfig, where: str) -> None:
    """How a text is split, and what says where its held-out text is."""
    if data.split not in CHOICES["data.split"]:
        there = map(str, CHOICES["data.split"])
        raise ConfigError(f"{where}.split={data.split}: {nearest(data.split, there)}")
    if data.encoding:
        encodings.check_name(data.encoding)
    for key in ("validation_path", "test_path"):
        if getattr(data, key) and not data.path:
            raise ConfigError(
                f"{where}.{key}={getattr(data, key)} belongs to text of your own: expected "
                f"data=text_files or data=pairs with {where}.path, and this is data={data.name}"
            )


def _validate_files(data: DataConfig, where: str) -> None:
    """The files of a text of one's own: all are there, and no two splits share one."""
    for key in ("path", "validation_path", "test_path"):
        value = getattr(data, key)
        several = value if isinstance(value, list) else [value] if value else []
        if not all(isinstance(one, str) and one for one in several):
            raise ConfigError(
                f"{where}.{key}={value}: expected a file, a folder, a glob or a list of them"
            )
    sources.own_files(data, files.OF_PAIRS if data.source == "pairs" else files.KINDS)


def _validate_pairs(data: DataConfig, where: str) -> None:
    if bool(data.path) == bool(data.id):
        raise ConfigError(
            f"{where}: {data.name} needs one of {where}.path (a file or folder of pairs) and "
            f"{where}.id (a data set on the hub); it has path={data.path} and id={data.id}"
        )
    if data.path:
        _validate_files(data, where)
    for key in ("packing", "prompt_style"):
        if (value := getattr(data, key)) not in CHOICES[f"data.{key}"]:
            there = map(str, CHOICES[f"data.{key}"])
            raise ConfigError(f"{where}.{key}={value}: {nearest(value, there)}")
    _require(bool(data.separator), f"{where}.separator", repr(data.separator), "some characters")
    if unknown := set(data.split_names) - set(SPLITS):
        name = sorted(unknown)[0]
        raise ConfigError(f"{where}.split_names.{name}: {nearest(name, SPLITS)}")


def _validate_generate(run: RunConfig) -> None:
    asked = run.evaluate.generate
    assert asked is not None
    if run.data.source != "pairs":
        raise ConfigError(
            f"evaluate.generate completes prompts, and data={run.data.name} has none: use a data "
            "set of pairs (data=e2e_nlg, data=pairs), or evaluate.generate=null"
        )
    if not run.evaluate.test:
        raise ConfigError("evaluate.generate completes the test set, and evaluate.test=false")
    for key in ("num_beams", "max_new_tokens", "batch"):
        value = getattr(asked, key)
        _require(value > 0, f"evaluate.generate.{key}", value, "1 or more")
    n, most = asked.no_repeat_ngram, asked.prompts
    _require(n >= 0, "evaluate.generate.no_repeat_ngram", n, "a length, or 0 for off")
    _require(most is None or most > 0, "evaluate.generate.prompts", most, "1 or more, or null")


def _validate_protocol(run: RunConfig, context: int, stride: int) -> None:
    """What a published protocol needs (`evaluate.protocol`): the test set's rows as they are."""
    data, where = run.data, f"evaluate.protocol={run.evaluate.protocol}"
    if not run.evaluate.test:
        raise ConfigError(f"{where} reads the test set, and evaluate.test=false: leave one out")
    if data.source not in ("hub", "text_files"):
        raise ConfigError(
            f"{where} with data={data.name}: it is of rows as WikiText has them; expected "
            "data=wikitext2, data=hub or data=text_files"
        )
    if data.document_chars is not None:
        raise ConfigError(f"{where} reads whole rows: leave out data.document_chars")
    if run.evaluate.protocol == "lm_eval" and stride != context:
        raise ConfigError(
            f"evaluate.stride={stride} with {where}, whose windows do not overlap: leave it out, "
            f"or set it to the context of {context}"
        )
    if data.source == "text_files":
        found = find_files(data.path, encoding=data.encoding)
        if len(found) != 1 or files.kind(found[0]) != ".txt":
            raise ConfigError(f"{where}: expected data.path to be one .txt file, the test set")
        if run.method.trains:
            raise ConfigError(
                f"{where} reads all of {found[0]}, which method={run.method.name} trains on: use "
                "data=hub data.id=FOLDER, with train.txt, valid.txt and test.txt, or method=none"
            )


def _validate_tracker(run: RunConfig) -> None:
    for name, asked in run.tracker.items():
        if name not in TRACKERS:
            raise ConfigError(f"tracker.{name}: {nearest(name, TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            what = f"-e '.[{name}]'" if name in WITH_AN_EXTRA else name
            raise ConfigError(f"tracker={name} is not installed: pip install {what}")
        known = TRACKERS[name]
        if not isinstance(asked, dict):
            raise ConfigError(f"tracker.{name}={asked}: expected options: {', '.join(known)}")
        for key in asked:
            if key not in known:
                raise ConfigError(f"tracker.{name}.{key}: {nearest(key, known)}")
    mode = (run.tracker.get("wandb") or {}).get("mode", "online")
    if mode not in ("online", "offline"):
        raise ConfigError(f"tracker.wandb.mode={mode}: {nearest(str(mode), ('online', 'offline'))}")


def _validate_launch(run: RunConfig) -> None:
    launch = run.launch
    ranks = launch.num_processes
    _require(ranks > 0, "launch.num_processes", ranks, "1 or more")
    _require(launch.cores is None or launch.cores > 0, "launch.cores", launch.cores, "1 or more")
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
    blocks = run.train.batch_tokens // run.data.context
    step = run.train.micro_batch * ranks
    if ranks > 1 and blocks % step:
        fits = [n for n in range(1, run.train.micro_batch + 1) if blocks % (n * ranks) == 0]
        raise ConfigError(
            f"train.batch_tokens={run.train.batch_tokens} is {blocks} blocks, which do not divide "
            f"among launch.num_processes={ranks} of train.micro_batch={run.train.micro_batch}: "
            + (f"try train.micro_batch={fits[-1]}" if fits else f"make them a multiple of {ranks}")
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
        "train.compile=true": (run.train.compile, "is untried on a divided model", "false"),
        "evaluate.generate": (
            run.evaluate.generate,
            "runs ranks apart that must run alike",
            "null",
        ),
        "method.orthogonality": (getattr(run.method, "orthogonality", 0), whole, "0"),
    }
    for asked, (there, why, instead) in refused.items():
        if there:
            key = asked.partition("=")[0]
            raise ConfigError(
                f"launch.accelerate=fsdp: {asked} {why}; set {key}={instead}, or "
                "launch.accelerate=ddp"
            )
