"""The positions of its model's context that a run needs, and those that prompts take up."""

from __future__ import annotations

from typing import Any

import peft

from harness.config.errors import ConfigError
from harness.config.method_schema import PeftMethod
from harness.config.run_config import RunConfig
from harness.methods.peft_config import configured, peft_class


def num_virtual_tokens(run: RunConfig) -> int:
    """Positions that a prompt method takes from the model's context."""
    method = run.method
    if not isinstance(method, PeftMethod):
        return 0
    config_class = peft_class(method)
    if not issubclass(config_class, peft.PromptLearningConfig):
        return 0
    config: Any = configured(config_class, {}, method.fields)  # CPT counts its own tokens
    return int(config.num_virtual_tokens)


def check_context(run: RunConfig, limit: int | None) -> None:
    """Training and evaluation windows against the positions that a model has.

    Raises:
        ConfigError: with the longest context that fits.
    """
    longest = max(run.data.context_length, run.evaluation_context)
    virtual = num_virtual_tokens(run)  # of prompt methods: they take up positions
    if limit is not None and longest + virtual > limit:
        extra = f" and {virtual} virtual tokens are" if virtual else " is"
        raise ConfigError(
            f"a context of {longest} tokens{extra} longer than {run.model.name}'s {limit}: "
            f"lower data.context_length (and evaluate.context_length) to {limit - virtual} or less"
        )
