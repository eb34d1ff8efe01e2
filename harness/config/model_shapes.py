"""What a model's configuration tells of its matrices, so that a mistake is found without torch.

GPT-2 and Llama by their configurations (a local file, `model.architecture` or `model.shape`); of
other architectures nothing is said here, and the worker finds the same mistakes on the model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness.config import matrix_roles, peft_fields
from harness.config.errors import ConfigError, nearest
from harness.config.method_schema import AdaloraMethod, LoraMethod, PeftMethod, SvdMethod
from harness.config.paths import ASSETS_DIR
from harness.config.run_config import RunConfig
from harness.config.schema import ModelConfig

LLAMAS = ("llama", "mistral", "qwen2")


def check_context(run: RunConfig) -> None:
    """Refuse a context that is longer than a GPT-2 has positions; raises ConfigError."""
    described = _configuration(run.model)
    limit = described.get("n_positions") if described.get("model_type") == "gpt2" else None
    longest = max(run.data.context_length, run.evaluation_context)
    if isinstance(limit, int) and longest > limit:
        raise ConfigError(
            f"a context of {longest} tokens is longer than {run.model.name}'s {limit}: lower "
            f"data.context_length (and evaluate.context_length) to {limit} or less"
        )


def check(run: RunConfig) -> None:
    """Context, targets and ranks against a model whose shapes are known.

    Raises:
        ConfigError: as `harness.methods` says it of the model itself.
    """
    check_context(run)
    described = _configuration(run.model)
    shapes = matrices(described)
    if not shapes or not isinstance(
        run.method, LoraMethod | AdaloraMethod | SvdMethod | PeftMethod
    ):
        return
    ends = ("wte", "wpe", "lm_head")  # of GPT-2 the modules that are no Conv1D
    why = "" if set(run.targets.modules) <= set(ends) else peft_fields.needs_linear(run.method)
    if run.model.linear is False and described.get("model_type") == "gpt2" and why:
        raise ConfigError(f"model.linear=false: {why}; {peft_fields.TURN}")
    if run.method.fields.keys() & {"target_modules", "exclude_modules", "target_parameters"}:
        return  # PEFT's own choice
    sides: dict[str, int] = {}
    for name in run.targets.modules:
        last = [kind for kind in shapes if kind == name or name.endswith(f".{kind}")]
        if not last and not any(kind.endswith(f".{name}") for kind in shapes):
            kinds = [kind for kind in shapes if ".c_attn." not in kind]
            raise ConfigError(
                f"targets={run.targets.name}: '{name}' matches no matrix of {run.model.name}; "
                f"{nearest(name, kinds)}"
            )
        sides |= {kind: min(shapes[kind]) for kind in last}
    if sides and not isinstance(run.method, PeftMethod):
        _check_rank(run.method, sides)


def _check_rank(method: LoraMethod | AdaloraMethod | SvdMethod, sides: dict[str, int]) -> None:
    name = min(sides, key=lambda kind: sides[kind])
    if isinstance(method, SvdMethod):
        key, rank = "rank", method.rank
    elif isinstance(method, AdaloraMethod):
        key, rank = "init_r", method.first_rank
    else:
        key, rank = "r", method.r
    if getattr(method, "rank_pattern", None):  # other ranks for some of them
        return
    if isinstance(rank, int) and not isinstance(rank, bool) and rank > sides[name]:
        raise ConfigError(f"method.{key}={rank}: {name} allows a rank of {sides[name]} at most")


def matrices(described: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Kind of matrix (`attn.c_attn`) -> its sides; empty where they are not known."""
    kind = described.get("model_type")
    try:
        if kind == "gpt2":
            return _gpt2(described)
        return _llama(described) if kind in LLAMAS else {}
    except (KeyError, TypeError):  # a configuration that leaves something to a default
        return {}


def _gpt2(described: dict[str, Any]) -> dict[str, tuple[int, int]]:
    width, words = described["n_embd"], described["vocab_size"]
    inner = described.get("n_inner") or 4 * width
    parts = {f"attn.c_attn.{part}": (width, width) for part in "qkv"}  # `harness.models.split_qkv`
    return parts | {
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (width, inner),
        "mlp.c_proj": (inner, width),
        "wte": (words, width),
        "wpe": (described["n_positions"], width),
        "lm_head": (width, words),
    }


def _llama(described: dict[str, Any]) -> dict[str, tuple[int, int]]:
    width, inner, words = (
        described[key] for key in ("hidden_size", "intermediate_size", "vocab_size")
    )
    heads = described["num_attention_heads"]
    head = described.get("head_dim") or width // heads
    values = head * (described.get("num_key_value_heads") or heads)
    return {
        "self_attn.q_proj": (width, head * heads),
        "self_attn.k_proj": (width, values),
        "self_attn.v_proj": (width, values),
        "self_attn.o_proj": (head * heads, width),
        "mlp.gate_proj": (width, inner),
        "mlp.up_proj": (width, inner),
        "mlp.down_proj": (inner, width),
        "embed_tokens": (words, width),
        "lm_head": (width, words),
    }


def _configuration(model: ModelConfig) -> dict[str, Any]:
    """A model's configuration as a mapping, or an empty one where no file of this machine has it.

    Raises:
        ConfigError: `model.path` is a folder without one.
    """
    if model.architecture:
        return {"model_type": "gpt2", **model.architecture}
    folder = ASSETS_DIR / model.asset if model.asset else Path(model.path) if model.path else None
    if folder is None:
        return matrix_roles.shape_of(model)
    if model.gguf:
        return {}
    file = folder / "config.json"
    if not file.is_file() and not (folder / "adapter_config.json").is_file():
        inside = [p.parent.name for p in sorted(folder.glob("*/config.json"))]
        hint = f"; did you mean '{folder / inside[0]}'?" if inside else ""
        raise ConfigError(
            f"model.path={folder}: no config.json in this folder, which a model as transformers "
            f"saves it has{hint}"
        )
    try:
        config = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):  # which loading says by name
        return {}
    return config if isinstance(config, dict) else {}
