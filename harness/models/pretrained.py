"""Load a causal language model, its configuration and its tokenizer."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers.auto import AutoHfQuantizer

from harness.config import matrix_roles
from harness.config.errors import ConfigError, nearest
from harness.config.method_schema import FullMethod
from harness.config.paths import ASSETS_DIR
from harness.config.run_config import RunConfig
from harness.config.schema import ModelConfig
from harness.models import linear, quantize, weights
from harness.models import quantized as packed
from harness.models.model_files import from_source, source_of
from harness.models.split_qkv import UNFUSED_TARGETS, unfuse_qkv
from harness.system import lfs, network

# The same tanh approximation, as one kernel that keeps one activation instead of many.
COMPOSED_GELU, FUSED_GELU = "gelu_new", "gelu_pytorch_tanh"
ACTIVATION_FIELDS = ("activation_function", "hidden_act")  # GPT-2's and its relatives', and others'


def load_config(cfg: ModelConfig) -> PretrainedConfig:
    """The model's configuration with the harness's choices written in: dropout and GELU.

    Raises:
        ConfigError: the source is not there (says which models are), it holds an adapter, its
            weights are packed by a package that is not installed, or it takes more than text.
    """
    if not cfg.architecture:
        revision = cfg.revision if cfg.id else None
        weights.refuse_adapter(source_of(cfg), revision)
        lfs.refuse_pointers([Path(source_of(cfg), "config.json")])
    config = _config_as_saved(cfg)
    text = config.get_text_config()
    if text is not config:
        raise ConfigError(
            f"model={cfg.name}: a {config.model_type} model takes more than text; its language "
            f"model ({text.model_type}) is a part of it. Save that part by itself, as "
            "conf/README.md shows under Models, and give the folder: model=local model.path=…"
        )
    _check_packed(cfg, config)
    if cfg.quantize != "none" and (packing := packed.packing_of(config)):
        raise ConfigError(
            f"model.quantize={cfg.quantize}: the weights of model={cfg.name} are quantised already "
            f"({packing}): set model.quantize=none, or give a folder of weights that are not"
        )
    for name in dropout_fields(config):
        setattr(config, name, cfg.dropout)
    composed = _gelu_field(config)
    if cfg.gelu == "fused" and composed:
        setattr(config, composed, FUSED_GELU)
    config.use_cache = False
    return config


def _check_packed(cfg: ModelConfig, config: PretrainedConfig) -> None:
    """Raise ConfigError where weights are quantised and cannot be read here; it names a package."""
    stored = getattr(config, "quantization_config", None)
    if not stored:
        return
    try:
        AutoHfQuantizer.from_config(stored, pre_quantized=True).validate_environment()
    except (ImportError, RuntimeError, ValueError, TypeError) as error:
        reason = re.sub(r"\s+", " ", str(error)).strip()
        raise ConfigError(
            f"model={cfg.name}: its weights are quantised ({packed.packing_of(config)}), which "
            f"cannot be read here: {reason}"
        ) from error


def dropout_fields(config: PretrainedConfig) -> list[str]:
    """Under which names an architecture keeps its probabilities of dropout, of layers too.

    Not those of heads for other tasks, which a language model has not.
    """
    return [
        name
        for name, value in vars(config).items()
        if "drop" in name
        and isinstance(value, float | int)
        and not isinstance(value, bool)
        and not name.startswith(("summary_", "classifier_", "seq_classif_", "qa_"))
    ]


def facts(cfg: ModelConfig, config: PretrainedConfig) -> dict[str, Any]:
    """What result.json says of the model that `load_config` made of `cfg`."""
    saved = _config_as_saved(cfg)
    name = _gelu_field(saved)
    activation = None
    for field in ACTIVATION_FIELDS:
        activation = getattr(config, field, activation)
    if name and activation == FUSED_GELU:
        activation = f"{COMPOSED_GELU} -> {FUSED_GELU} (fused)"
    return {
        "type": config.model_type,
        "source": cfg.asset or cfg.path or cfg.id or cfg.package,
        "revision": network.commit_of(cfg.id, cfg.revision) if cfg.id else None,
        "activation": activation,
        "tied_embeddings": bool(getattr(config, "tie_word_embeddings", False)),
    }


def _gelu_field(config: PretrainedConfig) -> str | None:
    """Where a configuration asks for the composed tanh GELU, if it does."""
    return next((f for f in ACTIVATION_FIELDS if getattr(config, f, None) == COMPOSED_GELU), None)


def max_context(config: PretrainedConfig) -> int | None:
    """Most positions the model takes, or None where the configuration states no limit."""
    limit = getattr(config, "max_position_embeddings", None)  # GPT-2 maps it to n_positions
    return int(limit) if limit else None


def _config_as_saved(cfg: ModelConfig) -> PretrainedConfig:
    if cfg.architecture:
        fields = dict(cfg.architecture)
        kind = fields.pop("model_type", "gpt2")
        try:
            plain = AutoConfig.for_model(kind)
            config = AutoConfig.for_model(kind, **fields)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"model.architecture: {str(error).splitlines()[0]}") from error
        for name in fields:  # any keyword is taken, and kept without effect
            if not hasattr(plain, name):
                known = [key for key in vars(plain) if not key.startswith("_")]
                raise ConfigError(f"model.architecture.{name}: {nearest(name, known)}")
        return config
    return from_source(AutoConfig.from_pretrained, cfg, source_of(cfg))


def load_tokenizer(cfg: ModelConfig, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, checked for the end-of-text token that joins documents and against the model.

    Raises:
        ConfigError: no tokenizer there, one that encodes nothing, or one with too many ids.
    """
    source = cfg.tokenizer or source_of(cfg)
    if not source:
        raise ConfigError(
            "model.architecture needs model.tokenizer: an asset, a folder or a hub id"
        )
    if (ASSETS_DIR / source).is_dir():
        source = str(ASSETS_DIR / source)
    lfs.refuse_pointers(Path(source, name) for name in weights.TOKENIZER_FILES)
    tokenizer = from_source(AutoTokenizer.from_pretrained, cfg, source)
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer of {source} has no end-of-text token to join documents by"
        )
    if not tokenizer("some text")["input_ids"]:
        raise ConfigError(f"{source} holds no tokenizer: give model.tokenizer=…")
    if len(tokenizer) > config.vocab_size:
        raise ConfigError(
            f"the tokenizer of {source} has {len(tokenizer)} ids, more than the model's vocabulary "
            f"of {config.vocab_size}"
        )
    return tokenizer


def tokenizer_at_hand(cfg: ModelConfig, config: PretrainedConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer if it ships with the package or is a folder here, or else None."""
    source = cfg.tokenizer or cfg.asset or (None if cfg.gguf else cfg.path)
    if not source or not ((ASSETS_DIR / source).is_dir() or Path(source).expanduser().is_dir()):
        return None
    try:
        return load_tokenizer(cfg, config)
    except ConfigError:
        return None


def load_model(run: RunConfig, config: PretrainedConfig) -> PreTrainedModel:
    """The model with pretrained weights, or random ones if `architecture` is given.

    In fp32, or in `model.frozen_dtype` where the method freezes the base. q, k and v come apart
    (`harness.models.split_qkv`) where `wants_unfused` says so, `Conv1D` becomes `nn.Linear` where
    `harness.models.linear` does, and then `model.quantize` packs the matrices
    (`harness.models.quantize`).

    Raises:
        ConfigError: the weights cannot be read, or (with `model.strict`) are not the model's.
    """
    return load_with_misfits(run, config)[0]


def load_with_misfits(
    run: RunConfig, config: PretrainedConfig
) -> tuple[PreTrainedModel, weights.Misfits]:
    """`load_model`, and which weights are not the file's: none with `model.strict`."""
    cfg = run.model
    if cfg.architecture:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype_of(run))
        misfits = weights.Misfits([], [], [])
    else:
        options = {"config": config, "dtype": dtype_of(run), "strict": False}
        model, misfits = from_source(weights.load, cfg, source_of(cfg), **options)
    if cfg.strict and misfits:
        raise ConfigError(
            f"model={cfg.name}: the weights in {source_of(cfg)} are not those of the model in its "
            f"config.json: {misfits}. Put the right files there, or set "
            "model.strict=false: what is missing is then drawn at random, and the result says what"
        )
    return _prepared(model, run, config), misfits


def _prepared(model: PreTrainedModel, run: RunConfig, config: PretrainedConfig) -> PreTrainedModel:
    """`model` with q, k and v apart, `Conv1D` turned and matrices packed, where the run asks."""
    model = _as_asked(model, run, config)
    if scheme := quantize.scheme(run):
        model = quantize.quantize(model, scheme)
    packed.keep_differentiable(model)
    return model


def without_files(run: RunConfig) -> RunConfig:
    """`run` with its model's architecture from conf/model instead of a folder or the hub.

    A model that conf/model does not describe, `model.path=…` or another id, stays as it is.
    """
    architecture = matrix_roles.shape_of(run.model)
    if not architecture:
        return run
    gone: dict[str, Any] = dict.fromkeys(("asset", "id", "package", "gguf"))
    return replace(run, model=replace(run.model, **gone, architecture=architecture))


def on_meta(run: RunConfig, config: PretrainedConfig) -> PreTrainedModel:
    """The same modules without weights, in milliseconds: enough for counts and checks of names."""
    options = {"dtype": dtype_of(run), "trust_remote_code": bool(run.model.remote_code)}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **options)
    return _prepared(model, run, config)


def dtype_of(run: RunConfig) -> torch.dtype:
    """What the base model is held in; weights that train are always fp32 (`methods.adapt`)."""
    narrow = run.model.frozen_dtype == "bf16" and run.method.name != "full"
    return torch.bfloat16 if narrow else torch.float32


def wants_unfused(run: RunConfig, config: PretrainedConfig) -> bool:
    """Whether q, k and v are to be three matrices: if asked for, or if a target names one alone."""
    if run.model.unfuse_qkv != "auto":
        return bool(run.model.unfuse_qkv)
    if isinstance(run.method, FullMethod):
        table = matrix_roles.SUFFIXES.get(config.model_type, {})
        named = [table.get(entry, entry) for entry in run.method.train_only]
    elif run.method.takes_targets:
        named = matrix_roles.modules_of(run.targets, config.model_type) or []
    else:
        return False
    return any(name in UNFUSED_TARGETS.values() for name in named)


def _as_asked(model: PreTrainedModel, run: RunConfig, config: PretrainedConfig) -> PreTrainedModel:
    """The model with q, k and v apart, and with `nn.Linear` for `Conv1D`, where that is wanted."""
    try:
        model = unfuse_qkv(model) if wants_unfused(run, config) else model
    except ValueError as error:
        raise ConfigError(f"model.unfuse_qkv: {error}") from error
    return linear.as_asked(model, run)
