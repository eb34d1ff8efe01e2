"""Activated LoRA (aLoRA, arXiv 2504.12397): the text must hold its invocation tokens.

An aLoRA adapter acts from the last place in a row where its invocation tokens stand, and PEFT looks
for them in the whole row. Without them it trains nothing and says nothing. In running text, whether
a token is predicted with the adapter would hang on whether the tokens come again later. So a row
has to be one prompt with its completion, and the tokens stand once, in the prompt. A further text
(`evaluate.also`) may do without the tokens: there the base is measured, which is said.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from peft import PeftModel
from torch import nn

from harness.config.errors import ConfigError
from harness.config.schema import DataConfig
from harness.data.token_data import Data
from harness.data.token_tables import IGNORE


def check(model: nn.Module, data: DataConfig, text: Data, further: dict[str, Dataset]) -> list[str]:
    """Check every row of `text` and of the `further` texts, where the adapter is an aLoRA.

    Returns what is to be said of further texts without the tokens.

    Raises:
        ConfigError: the text has no prompts, or rows without the tokens or with several of them; a
            further text has the tokens elsewhere than once, in a prompt.
    """
    if not isinstance(model, PeftModel):
        return []
    tokens = getattr(model.active_peft_config, "alora_invocation_tokens", None)
    if not tokens:
        return []
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
    messages = (_further(f"evaluate.also.{name}", rows, tokens) for name, rows in further.items())
    return [message for message in messages if message]


def _further(key: str, rows: Dataset, tokens: list[int]) -> str | None:
    """What is to be said of a further text: how many of its rows are left to the base model."""
    if "skipped" in rows.column_names:
        parts = _prompts_and_rest(rows)
    else:  # running text, in which no place of the tokens is a right one
        parts = [(row["tokens"][:0], row["tokens"]) for row in rows]
    in_prompt = [_count(prompt, tokens) for prompt, _ in parts]
    in_all = [_count(np.concatenate(part), tokens) for part in parts]
    wrong = sum(
        n > min(num_in_prompt, 1) for n, num_in_prompt in zip(in_all, in_prompt, strict=True)
    )
    if wrong:
        raise ConfigError(
            f"{key}: {wrong} of {len(parts)} rows hold aLoRA's invocation tokens {list(tokens)} "
            "elsewhere than once, in a prompt, and what stands before their last place would be "
            "left to the base model; leave this text out of evaluate.also"
        )
    none = in_all.count(0)
    if not none:
        return None
    return (
        f"{key}: {none} of {len(parts)} rows do not hold aLoRA's invocation tokens {list(tokens)}, "
        "and their nats are those of the base model"
    )


def _prompts_and_rest(rows: Dataset) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """The ids of every row, up to where its completion begins and from there on."""
    parts = []
    for row in rows:
        if "inputs" in row:  # of training: the first target that counts is the completion's first
            ids, first = row["inputs"], int((row["targets"] != IGNORE).argmax()) + 1
        else:
            ids, first = np.append(row["first"], row["tokens"]), int(row["skipped"]) + 1
        parts.append((ids[:first], ids[first:]))
    return parts


def _count(ids: NDArray[Any], tokens: list[int]) -> int:
    """How often `tokens` stand in `ids`, one after another."""
    if len(ids) < len(tokens):
        return 0
    windows = np.lib.stride_tricks.sliding_window_view(ids, len(tokens))
    return int((windows == np.asarray(tokens)).all(axis=1).sum())
