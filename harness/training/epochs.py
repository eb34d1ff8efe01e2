"""How many optimizer steps `train.epochs` passes over a training text are."""

from __future__ import annotations

import math

from harness.config.run_config import RunConfig
from harness.data import token_data
from harness.evaluation import prefix
from harness.models import pretrained


def steps_of_epochs(run: RunConfig) -> int:
    """The optimizer steps of `train.epochs` passes over the training text, rounded up.

    The text is read, and tokenised where that was not done before.

    Raises:
        ConfigError: the text or the tokenizer cannot be read.
    """

    epochs = run.train.epochs
    assert epochs is not None
    tokenizer = pretrained.load_tokenizer(run.model, pretrained.load_config(run.model))
    begins = prefix.find(tokenizer, run.evaluate.prefix).begins
    blocks = token_data.prepare(run.data, tokenizer, test=False, begins=begins).num_blocks
    return max(1, math.ceil(epochs * blocks * run.data.context_length / run.train.batch_tokens))
