"""LoRA on q, k and v apart, written as one LoRA on GPT-2's fused `c_attn`: the same function.

    [q | k | v] = x W + s [x A_q^T B_q^T | 0 | x A_v^T B_v^T]                     (q and v adapted)
                = x W + s (x A^T) B^T,    A = [A_q; A_v] (2 r, d),
                                          B = [B_q 0; 0 0; 0 B_v] (3 d, 2 r)

so that what was trained on a model whose q, k and v are three matrices (`harness.models.split_qkv`)
loads onto the published one. The zeros of B are held as numbers: the file grows, and training that
went on from it would move them.

Legend: d width, r rank, s = alpha / r, n parts adapted (1 to 3); all n share r and s.
"""

from __future__ import annotations

import copy
import math
import re

import peft
import torch

from harness.methods.initialisation import FROM_WEIGHTS
from harness.models.split_qkv import UNFUSED_TARGETS

Tensors = dict[str, torch.Tensor]
FUSED = "attn.c_attn"


def is_split(config: peft.PeftConfig) -> bool:
    """Whether an adapter is on q, k or v alone, which a published GPT-2 has not."""
    named = getattr(config, "target_modules", None)
    return not isinstance(named, str) and bool(set(named or ()) & set(UNFUSED_TARGETS.values()))


def reason_unsupported(config: peft.PeftConfig) -> str | None:
    """Why `join` cannot write this adapter, or None where it can."""
    if not isinstance(config, peft.LoraConfig) or isinstance(config, peft.AdaLoraConfig):
        return f"{getattr(config.peft_type, 'value', config.peft_type)} is not LoRA"
    if config.use_dora:
        return "use_dora=true"
    if config.bias != "none" or config.lora_bias:
        return "it trains biases"
    if config.rank_pattern or config.alpha_pattern:
        return "its matrices have ranks or scales of their own"
    if str(config.init_lora_weights).startswith((*FROM_WEIGHTS, "olora")):
        return f"init={config.init_lora_weights} changes or reads the base's weights"
    if config.modules_to_save or config.trainable_token_indices:
        return "it trains more than LoRA's matrices"
    if config.exclude_modules:
        return "exclude_modules names modules that are apart"
    return None


def join(config: peft.LoraConfig, tensors: Tensors) -> tuple[peft.LoraConfig, Tensors]:
    """The configuration and tensors, named as in PEFT's file, of the LoRA on `c_attn`.

    Shapes: per layer, A (r, d) and B (d, r) of each part become A (n r, d) and B (3 d, n r).
    """
    pattern = re.compile(r"(?P<prefix>.*\.c_attn)\.(?P<part>[qkv])\.lora_(?P<factor>[AB])\.weight")
    joined: Tensors = {}
    parts: dict[str, dict[str, Tensors]] = {}
    for name, tensor in tensors.items():
        if match := pattern.fullmatch(name):
            parts.setdefault(match["prefix"], {}).setdefault(match["part"], {})[match["factor"]] = (
                tensor
            )
        else:
            joined[name] = tensor
    for prefix, factors in parts.items():
        letters = [letter for letter in "qkv" if letter in factors]
        width, rank = factors[letters[0]]["B"].shape
        b = factors[letters[0]]["B"].new_zeros(3 * width, len(letters) * rank)
        for column, letter in enumerate(letters):
            row = "qkv".index(letter) * width
            b[row : row + width, column * rank : (column + 1) * rank] = factors[letter]["B"]
        joined[f"{prefix}.lora_A.weight"] = torch.cat([factors[letter]["A"] for letter in letters])
        joined[f"{prefix}.lora_B.weight"] = b
    (number,) = {len(factors) for factors in parts.values()}
    config = copy.deepcopy(config)
    kept = set(config.target_modules or ()) - set(UNFUSED_TARGETS.values())
    config.target_modules = sorted(kept | {FUSED})
    # alpha' / (n r) = alpha / r, and with rsLoRA alpha' / sqrt(n r) = alpha / sqrt(r)
    growth = math.sqrt(number) if config.use_rslora else number
    config.rank_pattern = {FUSED: number * config.r}
    config.alpha_pattern = {FUSED: growth * config.lora_alpha}
    config.init_lora_weights = True
    return config, joined
