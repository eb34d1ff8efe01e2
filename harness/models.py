"""Load a causal language model and its tokenizer, and count its parameters."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import OmegaConf
from peft import PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from harness import network
from harness.config import (
    ASSETS_DIR,
    CONF_DIR,
    ConfigError,
    ModelConfig,
    RunConfig,
    TrainConfig,
    nearest,
)
from harness.lstm import register_lstm
from harness.unfuse import UNFUSED_TARGETS, unfuse_qkv

register_lstm()  # `model_type: lstm` for AutoConfig and AutoModelForCausalLM

# Names under which architectures keep their dropout probabilities.
DROPOUT_FIELDS = (
    "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "attention_dropout", "hidden_dropout",
    "activation_dropout",
)  # fmt: skip


def source_of(cfg: ModelConfig) -> str:
    """Folder or hub id that the model's files come from."""
    return str(ASSETS_DIR / cfg.asset) if cfg.asset else cfg.path or cfg.id or ""


def load_config(cfg: ModelConfig) -> PretrainedConfig:
    """The model's configuration with the harness's choices written in: dropout and GELU.

    Raises:
        ConfigError: the source is not there; says which models are.
    """
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
    else:
        config = _from_source(AutoConfig, cfg, source_of(cfg))
    for name in DROPOUT_FIELDS:
        if isinstance(getattr(config, name, None), float | int):
            setattr(config, name, cfg.dropout)
    if cfg.gelu == "fused" and getattr(config, "activation_function", None) == "gelu_new":
        # The same tanh approximation, as one kernel that keeps one activation instead of many.
        config.activation_function = "gelu_pytorch_tanh"
    config.use_cache = False
    return config


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
    tokenizer = _from_source(AutoTokenizer, cfg, source)
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


def load_model(run: RunConfig, config: PretrainedConfig) -> PreTrainedModel:
    """The model with pretrained weights, or random ones if `architecture` is given.

    In fp32, or in `model.frozen_dtype` where the method freezes the base. q, k and v come apart
    (`harness.unfuse`) where `wants_unfused` says so.
    """
    if run.model.architecture:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype_of(run))
    else:
        options = {"config": config, "dtype": dtype_of(run)}
        model = _from_source(AutoModelForCausalLM, run.model, source_of(run.model), **options)
    return _unfused(model) if wants_unfused(run) else model


def without_files(run: RunConfig) -> RunConfig:
    """`run` with its model's architecture from conf/model instead of a folder or the hub.

    A model that conf/model does not describe, `model.path=…` or another id, stays as it is.
    """
    model = run.model
    known = CONF_DIR / "model" / f"{model.name}.yaml"
    if not model.shape or model.architecture or model.path or not known.is_file():
        return run
    if model.id != OmegaConf.select(OmegaConf.load(known), "id"):
        return run
    architecture = {"model_type": "gpt2", **model.shape}
    model = replace(model, asset=None, path=None, id=None, architecture=architecture)
    return replace(run, model=model)


def on_meta(run: RunConfig, config: PretrainedConfig) -> PreTrainedModel:
    """The same modules without weights, in milliseconds: enough for counts and checks of names."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype_of(run))
    return _unfused(model) if wants_unfused(run) else model


def checkpoint_activations(model: nn.Module, cfg: TrainConfig) -> nn.Module:
    """With `train.checkpointing` keep a block's input only, and run the block again in backward.

    Raises:
        ConfigError: an architecture that has no blocks to checkpoint.
    """
    if cfg.checkpointing and any(p.requires_grad for p in model.parameters()):
        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            raise ConfigError(
                "train.checkpointing=true: it would drop the prompts' keys and values, which pass "
                "by the blocks' cache; set it to false"
            )
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        try:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise ConfigError(f"train.checkpointing=true: {error}") from error
    return model


def compile_blocks(model: nn.Module) -> nn.Module:
    """Compile every transformer block, in place: blocks are alike and share what is compiled.

    Raises:
        ConfigError: an architecture that names no blocks.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    names = base._no_split_modules or ()
    blocks = [module for module in base.modules() if type(module).__name__ in names]
    if not blocks:
        raise ConfigError(
            f"train.compile=true: {type(base).__name__} names no blocks to compile; set it to false"
        )
    for block in blocks:
        block.compile()
    return model


def dtype_of(run: RunConfig) -> torch.dtype:
    """What the base model is held in; weights that train are always fp32 (`methods.adapt`)."""
    narrow = run.model.frozen_dtype == "bf16" and run.method.name != "full"
    return torch.bfloat16 if narrow else torch.float32


def wants_unfused(run: RunConfig) -> bool:
    """Whether q, k and v are to be three matrices: if asked for, or if a target names one alone."""
    if run.model.unfuse_qkv != "auto":
        return bool(run.model.unfuse_qkv)
    alone = any(name in UNFUSED_TARGETS.values() for name in run.targets.modules)
    return alone and run.method.name not in ("none", "full")


def _unfused(model: PreTrainedModel) -> PreTrainedModel:
    try:
        return unfuse_qkv(model)
    except ValueError as error:
        raise ConfigError(f"model.unfuse_qkv: {error}") from error


def _from_source(kind: Any, cfg: ModelConfig, source: str, **options: Any) -> Any:
    """`kind.from_pretrained(source)`, with an error that says which models there are instead."""
    revision = {"revision": cfg.revision} if cfg.revision and source == cfg.id else {}
    try:
        return kind.from_pretrained(source, **revision, **options)
    except (OSError, ValueError) as error:
        reason = re.sub(r"\s+", " ", str(error)).strip()[:200]
        shipped = ", ".join(p.name for p in sorted(ASSETS_DIR.iterdir()) if p.is_dir())
        raise ConfigError(
            f"model={cfg.name}: {source!r} could not be loaded ({reason}). "
            f"Models that ship with the harness: {shipped}. In the local hub cache: "
            f"{', '.join(network.cached('models')) or 'none'}. Or give a folder: model.path=…"
        ) from error


# --------------------------------------------------------------------------- shape and size


@dataclass(frozen=True)
class Parameters:
    """Numbers of elements, tied weights counted once."""

    total: int
    trainable: int

    @property
    def trainable_percent(self) -> float:
        """Trainable share in per cent."""
        return 100 * self.trainable / self.total


def count_parameters(model: nn.Module) -> Parameters:
    """Elements of `model`'s parameters; `named_parameters` lists a tied tensor once."""
    parameters = list(model.parameters())
    return Parameters(
        total=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
    )


def max_context(config: PretrainedConfig) -> int | None:
    """Most positions the model takes, or None where the configuration states no limit."""
    limit = getattr(config, "max_position_embeddings", None)  # GPT-2 maps it to n_positions
    return int(limit) if limit else None


def matrices(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Name -> (in, out) of every weight matrix a method can adapt."""
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            shapes[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            shapes[name] = (module.nx, module.nf)
        elif isinstance(module, nn.Embedding):
            shapes[name] = (module.num_embeddings, module.embedding_dim)
    return shapes
