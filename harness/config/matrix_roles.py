"""What a weight matrix does (q, k, v, o …), and what each architecture calls it.

    targets=qv            the roles q and v; targets.modules=[…] names modules instead

One table for all architectures. Imports no torch: the controller names runs by what roles come to.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from harness.config.errors import ConfigError, nearest
from harness.config.paths import ASSETS_DIR, CONF_DIR
from harness.config.schema import ModelConfig, TargetsConfig

if TYPE_CHECKING:
    from harness.config.run_config import RunConfig

ROLES = {
    "q": "query",
    "k": "key",
    "v": "value",
    "qkv": "query, key and value, in one matrix where the architecture has one",
    "o": "output of attention",
    "mlp_in": "first matrix of the MLP, with the gate where both are one matrix",
    "gate": "gate of the MLP; left out of a set where there is none",
    "mlp_out": "last matrix of the MLP",
    "embeddings": "token embeddings",
    "head": "output head",
}

# Options of conf/targets of one role each, and what other models call these matrices.
OPTION_ROLES = {
    "q": "q", "k": "k", "v": "v", "c_attn": "qkv", "o": "o", "c_fc": "mlp_in", "gate": "gate",
    "c_proj": "mlp_out", "embeddings": "embeddings", "head": "head",
}  # fmt: skip
OF_OTHER_MODELS = {
    **dict.fromkeys(("q_proj", "query", "wq", "q_lin"), "q"),
    **dict.fromkeys(("k_proj", "key", "wk", "k_lin"), "k"),
    **dict.fromkeys(("v_proj", "value", "wv", "v_lin"), "v"),
    **dict.fromkeys(("qkv", "query_key_value", "qkv_proj"), "c_attn"),
    **dict.fromkeys(("o_proj", "out_proj", "wo", "dense"), "o"),
    **dict.fromkeys(("up_proj", "fc1", "fc_in", "dense_h_to_4h", "mlp_in", "w1"), "c_fc"),
    **dict.fromkeys(("down_proj", "fc2", "fc_out", "dense_4h_to_h", "mlp_out", "w2"), "c_proj"),
    "gate_proj": "gate",
    **dict.fromkeys(("attention", "self_attn"), "attn"),
    **dict.fromkeys(("all_linear", "all-linear"), "all"),
    **dict.fromkeys(("wte", "embed_tokens"), "embeddings"),
    "lm_head": "head",
}  # fmt: skip


def combined(options: Sequence[str]) -> str:
    """Return the override that takes the matrices of several options of conf/targets together."""
    roles = [OPTION_ROLES.get(OF_OTHER_MODELS.get(name, name)) for name in options]
    if None in roles:
        return "targets.roles=[…] or targets.modules=[…]"
    return f"targets.roles=[{','.join(map(str, roles))}]"


_QKV = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}
_ENDS = {"embeddings": "embed_tokens", "head": "lm_head"}
_UP_DOWN = {"mlp_in": "mlp.up_proj", "mlp_out": "mlp.down_proj"}
_LLAMA = _QKV | {"o": "self_attn.o_proj", "gate": "mlp.gate_proj"} | _UP_DOWN | _ENDS
_OPT = _QKV | {"o": "self_attn.out_proj", "mlp_in": "fc1", "mlp_out": "fc2"} | _ENDS
_NO_GATE = {role: name for role, name in _LLAMA.items() if role != "gate"}
_H_TO_4H = {"mlp_in": "mlp.dense_h_to_4h", "mlp_out": "mlp.dense_4h_to_h"}
_BLOOM = {
    "qkv": "self_attention.query_key_value", "o": "self_attention.dense", **_H_TO_4H,
    "embeddings": "word_embeddings", "head": "lm_head",
}  # fmt: skip
_GPT = {"mlp_in": "mlp.c_fc", "mlp_out": "mlp.c_proj", "embeddings": "wte", "head": "lm_head"}
_FC = {"mlp_in": "mlp.fc_in", "mlp_out": "mlp.fc_out", "embeddings": "wte", "head": "lm_head"}

# config.model_type of transformers -> role -> module name suffix. A fused matrix has the role qkv
# alone: its parts cannot be named one by one, but for GPT-2's, which `harness.models.split_qkv`
# takes apart.
SUFFIXES: dict[str, dict[str, str]] = {
    "gpt2": {
        "qkv": "attn.c_attn", "q": "attn.c_attn.q", "k": "attn.c_attn.k", "v": "attn.c_attn.v",
        "o": "attn.c_proj", **_GPT,
    },
    "gpt_bigcode": {"qkv": "attn.c_attn", "o": "attn.c_proj", **_GPT},
    "gpt_neo": {
        "q": "attn.attention.q_proj", "k": "attn.attention.k_proj", "v": "attn.attention.v_proj",
        "o": "attn.attention.out_proj", **_GPT,
    },
    "gptj": {"q": "attn.q_proj", "k": "attn.k_proj", "v": "attn.v_proj", "o": "attn.out_proj"}
    | _FC,
    "codegen": {"qkv": "attn.qkv_proj", "o": "attn.out_proj", **_FC},
    "gpt_neox": {
        "qkv": "attention.query_key_value", "o": "attention.dense", **_H_TO_4H,
        "embeddings": "embed_in", "head": "lm_head",
    },
    "bloom": _BLOOM,
    "falcon": _BLOOM,
    "persimmon": {"qkv": "self_attn.query_key_value", "o": "self_attn.dense", **_H_TO_4H, **_ENDS},
    "mpt": {
        "qkv": "attn.Wqkv", "o": "attn.out_proj", "mlp_in": "ffn.up_proj",
        "mlp_out": "ffn.down_proj", "embeddings": "wte", "head": "lm_head",
    },
    "opt": _OPT,
    "xglm": _OPT,
    "biogpt": _OPT | {"head": "output_projection"},
    "phi": _QKV | {"o": "self_attn.dense", "mlp_in": "mlp.fc1", "mlp_out": "mlp.fc2"} | _ENDS,
    "phi3": {
        "qkv": "self_attn.qkv_proj", "o": "self_attn.o_proj", "mlp_in": "mlp.gate_up_proj",
        "mlp_out": "mlp.down_proj", **_ENDS,
    },
    "glm": _NO_GATE | {"mlp_in": "mlp.gate_up_proj"},
    "starcoder2": _NO_GATE | {"mlp_in": "mlp.c_fc", "mlp_out": "mlp.c_proj"},
    "nemotron": _NO_GATE,
    "apertus": _NO_GATE,
    **dict.fromkeys(
        (
            "llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text",
            "olmo", "olmo2", "granite", "stablelm", "cohere", "helium", "ernie4_5", "exaone4",
        ),
        _LLAMA,
    ),
    "lstm": {"embeddings": "embedding", "head": "head"},
}  # fmt: skip


def modules_of(targets: TargetsConfig, model_type: str) -> list[str] | None:
    """Module name suffixes of a set: its modules, or else its roles by the table.

    None where the table does not have the architecture.

    Raises:
        ConfigError: no such role, or one that this architecture does not have.
    """
    if targets.modules or not targets.roles:
        return list(targets.modules)
    for role in targets.roles:
        if role not in ROLES:
            raise ConfigError(f"targets.roles: no role '{role}'; {nearest(role, ROLES)}")
    if model_type not in SUFFIXES:
        return None
    table = SUFFIXES[model_type]
    suffixes: list[str] = []
    for role in targets.roles:
        if role in table:
            suffixes.append(table[role])
        elif role == "qkv" and "q" in table:
            suffixes += [table[part] for part in ("q", "k", "v")]
        elif role in ("q", "k", "v") and "qkv" in table:
            raise ConfigError(
                f"targets={targets.name}: {model_type} keeps q, k and v in one matrix, "
                f"{table['qkv']}, of which '{role}' cannot be adapted alone: take all three, as "
                "targets=c_attn, attn and all do"
            )
        elif role != "gate" or len(targets.roles) == 1:
            hint = " (try targets=lstm)" if model_type == "lstm" else ""
            raise ConfigError(
                f"targets={targets.name}: {model_type} has no matrix for '{role}'{hint}; it has: "
                f"{', '.join(table)}"
            )
    return list(dict.fromkeys(suffixes))


def mlp_of(model_type: str) -> set[str]:
    """Module name suffixes of an architecture's MLP, as far as the table knows it."""
    table = SUFFIXES.get(model_type, {})
    return {table[role] for role in ("mlp_in", "gate", "mlp_out") if role in table}


def resolved(run: RunConfig) -> RunConfig:
    """`run` with modules in place of roles, where its architecture is known without the model.

    A model of the hub that conf/model does not describe keeps its roles until it is loaded.
    """
    kind = model_type(run.model)
    if kind is None or not run.method.takes_targets:
        return run
    modules = modules_of(run.targets, kind)
    if modules is None:
        return run
    return replace(run, targets=replace(run.targets, modules=modules, roles=[]))


def model_type(cfg: ModelConfig) -> str | None:
    """The architecture as transformers names it, if the configuration or a local file tells."""
    if cfg.architecture:
        return str(cfg.architecture.get("model_type", "gpt2"))
    folder = ASSETS_DIR / cfg.asset if cfg.asset else Path(cfg.path) if cfg.path else None
    if folder is not None and not cfg.gguf:
        try:
            kind = json.loads((folder / "config.json").read_text("utf-8")).get("model_type")
        except (OSError, ValueError):
            return None
        return str(kind) if kind else None
    shape = shape_of(cfg)
    return str(shape["model_type"]) if shape else None


def shape_of(cfg: ModelConfig) -> dict[str, Any]:
    """`model.shape` as an architecture; empty where conf/model/<name>.yaml describes another model.

    That is one whose folder, id or package was overridden.
    """
    known = CONF_DIR / "model" / f"{cfg.name}.yaml"
    if not cfg.shape or cfg.architecture or cfg.path or not known.is_file():
        return {}
    described = OmegaConf.load(known)
    if any(getattr(cfg, key) != OmegaConf.select(described, key) for key in ("id", "package")):
        return {}
    return {"model_type": "gpt2", **cfg.shape}
