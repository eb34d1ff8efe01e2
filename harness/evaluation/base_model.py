"""The base that a run starts from, evaluated as such where the method changes it before step 1.

Most adapters start as nothing. Prompts, a truncated SVD or LoRA with `init=false` do not: there the
run's step 0 is not the base, and what is forgotten is counted from the base. The probe of
`harness.evaluation.probes` tells the two apart, so that all others need no further evaluation.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from harness.config.run_config import RunConfig
from harness.evaluation import probes
from harness.models import pretrained
from harness.models.next_token import FAILED, NextToken
from harness.system.internals import prepared_models_kept

Unadapted = Callable[[], AbstractContextManager[nn.Module]]


class Base:
    """What the base says of a few tokens, taken before the method is put on it."""

    def __init__(self, base: PreTrainedModel, run: RunConfig, room: int | None) -> None:
        self.run, self.room = run, room
        self.nats, self.reaction = probes.start_nats(NextToken(base), room)

    def is_at(self, predicts: NextToken) -> bool:
        """Tell whether another base predicts the same, by its `predicts`."""
        nats, _ = probes.start_nats(predicts, self.room)
        return self.reaction.differs(nats, self.nats) is False

    def apart(
        self,
        bare: NextToken,
        prepared: nn.Module,
        config: PretrainedConfig,
        accelerator: Accelerator,
    ) -> Unadapted | None:
        """How to evaluate the base, or None where the adapted model starts as the base.

        `bare` is the adapted model, `prepared` the same as Accelerate made it ready. Its adapter is
        switched off where that gives the base; else the base is loaded again (some methods change
        the weights that they are put on).
        """
        if self.is_at(bare):
            return None
        if isinstance(bare.model, PeftModel):
            try:
                with switched_off(bare.model):
                    same = self.is_at(bare)
            except FAILED:
                same = False
            if same:
                return lambda: _without_adapter(bare.model, prepared)
        return lambda: _loaded_again(self.run, config, accelerator)


@contextmanager
def switched_off(model: Any) -> Iterator[None]:
    """PEFT's `disable_adapter`, after which just what trained before trains again."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, trains in trained:  # PEFT lets all of an adapter train
            parameter.requires_grad_(trains)


@contextmanager
def _without_adapter(model: nn.Module, prepared: nn.Module) -> Iterator[nn.Module]:
    with switched_off(model):
        yield prepared


@contextmanager
def _loaded_again(
    run: RunConfig, config: PretrainedConfig, accelerator: Accelerator
) -> Iterator[nn.Module]:
    """The base as the run loaded it; draws that come later are as they would have been."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        set_seed(run.seed)  # of a base that is drawn, these are the draws
        base = pretrained.load_model(run, config)
    random.setstate(python)
    np.random.set_state(numpy)
    with accelerator.autocast():
        predicts = NextToken(base.to(accelerator.device))
    with prepared_models_kept(accelerator):
        yield accelerator.prepare_model(predicts, evaluation_mode=True)
