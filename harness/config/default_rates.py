"""The learning rate that a method starts from on a model for which no search has found one.

Sources:
    LoRA and full fine-tuning: "LoRA Without Regret" (Thinking Machines, 2025) and the formula that
        its authors fitted for Llama models, 5e-5 * 10 * (2000 / width) ** 0.781 for LoRA at alpha
        32 and any rank, a tenth of it for full fine-tuning. On gpt2_mini (width 256) that is a
        quarter and an eighth of what 80 steps like best (conf/rates): the safe side, for LoRA
        diverges at twice its best rate there.
    alpha: the best rates of gpt2_mini fall with its square root at r = 8 (alpha 8 to 32) and along
        alpha = 2r (r = 1 to 64).
    U D V^T and full fine-tuning of some weights: their rate on gpt2_mini over that of full
        fine-tuning, or of LoRA for all three factors.
    PEFT's methods: method_comparison/MetaMathQA of PEFT (Llama 3.2 3B, width 3072; 1e-4 where it
        has no rate of its own for a method). Matrices scale with the width as LoRA does; prompts
        and what multiplies activations do not.
A width that is not known is taken as 1024.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from harness.config.errors import ConfigError
from harness.config.matrix_roles import shape_of
from harness.config.method_schema import (
    AdaloraMethod,
    FullMethod,
    LoraMethod,
    MethodConfig,
    PeftMethod,
    UdvMethod,
)
from harness.config.optimizers import LoraPlusOptimizer, MuonOptimizer, OptimizerConfig
from harness.config.paths import ASSETS_DIR
from harness.config.schema import ModelConfig

LIKE_ADAMW = ("lora_plus", "lora_fa", "riemannian", "muon", "schedule_free", "adamw_8bit")
WIDTH_KEYS = ("hidden_size", "n_embd", "d_model", "dim")  # of configurations in transformers' way
UNKNOWN_WIDTH = 1024
EXPONENT = 0.781
FULL = 5e-5  # at width 2000
LORA_OVER_FULL = 10.0  # at alpha 32
FROM_SCRATCH = 2e-3  # at width 256: experiments/pretrain_gpt2_mini
VECTOR_RATE = 1e-3  # of biases and norms, as of PEFT's LN_TUNING
UDV_OVER_FULL = {"d": 150.0, "u": 0.75, "v": 0.75, "udv": 0.75}  # conf/rates/gpt2_mini_kjv.yaml
PEFT_WIDTH = 3072
PEFT_RATES = {  # of matrices, at PEFT_WIDTH
    "DELORA": 1e-3, "FROD": 1e-3, "GLORA": 5e-4, "GRALORA": 2e-4, "HIRA": 4.5e-3, "LOKR": 3e-3,
    "OSF": 5e-5, "SHIRA": 3e-4, "TINYLORA": 1e-3, "VBLORA": 5e-4,
}  # fmt: skip
PEFT_OTHER = 1e-4
PEFT_RATES_AT_ANY_WIDTH = {
    "ADAPTION_PROMPT": 5e-3, "C3A": 3e-1, "CPT": 1e-3, "IA3": 5e-3, "LN_TUNING": 1e-3,
    "PREFIX_TUNING": 5e-3, "PROMPT_TUNING": 1e-3, "P_TUNING": 1e-3, "PVERA": 3e-3, "ROAD": 1e-3,
    "TRAINABLE_TOKENS": 2e-1, "VERA": 1e-3,
}  # fmt: skip


def default_rate(method: MethodConfig, model: ModelConfig) -> tuple[float, str]:
    """A peak learning rate for AdamW, and in words what it was made of."""
    width = width_of(model)
    wide = f"width {width}" if width else f"width not known, taken as {UNKNOWN_WIDTH}"
    width = width or UNKNOWN_WIDTH
    full = FULL * (2000 / width) ** EXPONENT
    if isinstance(method, LoraMethod | AdaloraMethod):
        alpha = float(method.lora_alpha)
        if isinstance(method, LoraMethod) and method.use_rslora:  # which scales by alpha / sqrt(r)
            alpha *= math.sqrt(method.r)
        rate = LORA_OVER_FULL * full * math.sqrt(32 / alpha)
        return _rounded(rate), f"default: {wide}, alpha {alpha:g}"
    if isinstance(method, PeftMethod):
        kind = method.peft_type.upper()
        if kind in PEFT_RATES_AT_ANY_WIDTH:
            return PEFT_RATES_AT_ANY_WIDTH[kind], f"default: PEFT's of {kind}"
        rate = PEFT_RATES.get(kind, PEFT_OTHER) * (PEFT_WIDTH / width) ** EXPONENT
        return _rounded(rate), f"default: PEFT's of {kind}, {wide}"
    if isinstance(method, UdvMethod):
        return _rounded(UDV_OVER_FULL.get(method.train, 1.0) * full), f"default: {wide}"
    if isinstance(method, FullMethod) and model.architecture:
        rate = FROM_SCRATCH * (256 / width) ** EXPONENT
        return _rounded(rate), f"default: from random weights, {wide}"
    if isinstance(method, FullMethod) and method.train_only:
        if set(method.train_only) <= {"biases", "norms"}:
            return VECTOR_RATE, "default: of vectors"
        return _rounded(2 * full), f"default: {wide}"
    return _rounded(full), f"default: {wide}"


def from_adamw(lr: float, lr_from: str, optimizer: OptimizerConfig) -> tuple[float, str]:
    """Where an optimizer's own rates were not searched for: a rate made of AdamW's.

    Half of it on an optimizer whose steps are of AdamW's size, as of all that was tuned for
    something similar; for LoRA+ divided by the root of its ratio, so that A's rate goes down by as
    much as B's goes up.

    Raises:
        ConfigError: the optimizer's steps are of another size.
    """
    another = isinstance(optimizer, MuonOptimizer) and optimizer.adjust_lr == "original"
    if another or optimizer.name not in LIKE_ADAMW:
        what = "optimizer.adjust_lr=original" if another else f"optimizer={optimizer.name}"
        raise ConfigError(
            f"train.lr=auto: {what} has no default rate, and none was searched for: give "
            "train.lr=…, or tune it (conf/experiment/tune.yaml)"
        )
    ratio = optimizer.ratio if isinstance(optimizer, LoraPlusOptimizer) else 1.0
    ratio = ratio if ratio > 0 else 1.0  # or else validation refuses it
    rate = float(f"{lr / 2 / math.sqrt(ratio):.3g}")
    root = f", over the root of optimizer.ratio={ratio:g}" if ratio != 1 else ""
    origin = lr_from.removeprefix("default: ")
    return rate, f"default: half of AdamW's rate ({origin}){root}"


def width_of(model: ModelConfig) -> int | None:
    """The width of the hidden states, from the configuration or its files; None where unknown."""
    for described in (model.architecture, _file_of(model), shape_of(model)):
        inner = described.get("text_config")
        for keys in (described, inner if isinstance(inner, dict) else {}):
            for key in WIDTH_KEYS:
                if isinstance(value := keys.get(key), int) and value > 0:
                    return value
    return None


def _file_of(model: ModelConfig) -> dict[str, Any]:
    folder = ASSETS_DIR / model.asset if model.asset else Path(model.path) if model.path else None
    file: str | Path | None = folder / "config.json" if folder else None
    if not folder and model.id:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model.id, "config.json", revision=model.revision)
        file = cached if isinstance(cached, str) else None
    try:
        config = json.loads(Path(file).read_text("utf-8")) if file else {}
    except (OSError, ValueError):  # which loading says by name
        return {}
    return config if isinstance(config, dict) else {}


def _rounded(rate: float) -> float:
    return float(f"{rate:.2g}")
