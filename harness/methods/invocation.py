"""Activated LoRA (aLoRA, arXiv 2504.12397): the text must hold its invocation tokens.

An aLoRA adapter acts from the last place in a row where its invocation tokens stand, and PEFT looks
for them in the whole row. Without them it trains nothing and says nothing. In running text, whether
a token is predicted with the adapter would hang on whether the tokens come again later. So a row
has to be one prompt with its completion, and the tokens stand once, in the prompt.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from peft import PeftModel
from torch import nn

from harness.config import ConfigError, DataConfig
from harness.data import Data
from harness.loss import IGNORE


def check(model: nn.Module, data: DataConfig, text: Data) -> None:
    """Check every row of `text`, where the adapter of `model` is an aLoRA.

    Raises:
        ConfigError: the text has no prompts, or rows without the tokens or with several of them.
    """
    if not isinstance(model, PeftModel):
        return
    tokens = getattr(model.active_peft_config, "alora_invocation_tokens", None)
    if not tokens:
        return
    key = f"method.fields.alora_invocation_tokens={list(tokens)}"
    if data.source != "pairs" or data.packing != "padded":
        raise ConfigError(
            f"{key}: aLoRA acts from its invocation tokens to the end of a row, which must be a "
            "prompt with its completion: use data=pairs and data.packing=padded"
        )
    splits = {"train": _prompts_and_rest(text.blocks)}
    splits |= {name: _prompts_and_rest(rows) for name, rows in text.held_out.items()}
    for name, rows in splits.items():
        none = sum(_count(prompt, tokens) == 0 for prompt, _ in rows)
        if none:
            raise ConfigError(
                f"{key}: {none} of {len(rows)} prompts of the {name} split do not hold these "
                "tokens, and aLoRA would leave their completions to the base model; expected the "
                "tokens in every prompt, as the tokenizer writes them there"
            )
        several = sum(_count(np.concatenate(row), tokens) > 1 for row in rows)
        if several:
            raise ConfigError(
                f"{key}: {several} of {len(rows)} rows of the {name} split hold these tokens more "
                "than once, and aLoRA would act from the last place only; expected them once, in "
                "the prompt"
            )


def _prompts_and_rest(rows: Dataset) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """The ids of every row, up to where its completion begins and from there on."""
    found = []
    for row in rows:
        if "inputs" in row:  # of training: the first target that counts is the completion's first
            ids, first = row["inputs"], int((row["targets"] != IGNORE).argmax()) + 1
        else:
            ids, first = np.append(row["first"], row["tokens"]), int(row["skipped"]) + 1
        found.append((ids[:first], ids[first:]))
    return found


def _count(ids: NDArray[Any], tokens: list[int]) -> int:
    """How often `tokens` stand in `ids`, one after another."""
    if len(ids) < len(tokens):
        return 0
    windows = np.lib.stride_tricks.sliding_window_view(ids, len(tokens))
    return int((windows == np.asarray(tokens)).all(axis=1).sum())
