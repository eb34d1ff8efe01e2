"""The adapted model made ready for training and evaluation, and how it may be evaluated."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from accelerate import Accelerator
from torch import nn

from harness.config.run_config import RunConfig
from harness.data import pairs
from harness.data.pairs import Pair
from harness.evaluation import generation, latency, probes, sliding_window
from harness.evaluation.base_model import Unadapted
from harness.models.next_token import NextToken
from harness.runs.stages.adaptation import Adapted
from harness.runs.stages.setup import Setup
from harness.system import contents
from harness.training import sharding
from harness.training.neftune import Noise

log = logging.getLogger("harness")


@dataclass(frozen=True)
class Prepared:
    """A `NextToken` as Accelerate prepared it, and what was found out about it before training."""

    model: nn.Module
    batch_tokens: int  # of an evaluation batch
    batching: str  # of `probes.batching`
    prompts: list[Pair]  # that are completed at the end; none where `evaluate.generate` is null
    prompts_batching: str  # how prompts may share a batch
    noise: Noise | None  # of NEFTune, on the embeddings
    unadapted: Unadapted | None  # gives the base, where the run does not start from it


def prepare(setup: Setup, adapted: Adapted) -> Prepared:
    """Try the model with a few tokens, and prepare it once.

    So every method is evaluated at the same precision, at every step.

    Raises:
        ConfigError: the model sees what it predicts, cannot do what the run asks of it, or its
            files are no longer what they were.
    """
    run, accelerator, model = setup.run, setup.accelerator, adapted.model
    with accelerator.autocast():
        bare = NextToken(model, run.train.label_smoothing)
        batch_tokens, batching = _probe(setup, bare, adapted.room)
    if run.evaluate.latency:
        with accelerator.autocast():
            latency.check(model, run.evaluate.latency, adapted.room)
    prompts, prompts_batching = _prompts(setup, adapted)
    noise = None
    if adapted.trains and run.train.neftune_alpha:
        noise = Noise(model, run.train.neftune_alpha, run.seed, accelerator.process_index)
    contents.check(run)  # again, now that all of it was read
    prepared = _by_accelerate(run, bare, accelerator, trains=adapted.trains)
    with accelerator.autocast():
        unadapted = adapted.at_base and adapted.at_base.apart(
            bare, prepared, setup.base_config, accelerator
        )
    return Prepared(
        prepared, batch_tokens, batching, prompts, prompts_batching, noise, unadapted or None
    )


def _probe(setup: Setup, bare: NextToken, room: int | None) -> tuple[int, str]:
    """Tokens of an evaluation batch and how rows may share one; refuses what looks ahead."""
    run, base_config, name = setup.run, setup.base_config, setup.run.model.name
    setup.result["model"]["causal"] = probes.check_causal(bare, name, base_config, room)
    batch_tokens = run.evaluate.batch_tokens or sliding_window.batch_tokens(base_config)
    widest = min(run.evaluation_context, batch_tokens // 2)
    batching = probes.batching(bare, name, base_config, widest)
    log.info("evaluation batches: %s", batching)
    if run.data.source == "pairs":
        probes.check_blocks(bare, run, base_config)
    return batch_tokens, batching


def _prompts(setup: Setup, adapted: Adapted) -> tuple[list[Pair], str]:
    """The test prompts to complete at the end, and how they may share a batch."""
    run = setup.run
    if not run.evaluate.generate:
        return [], probes.PADDED
    prompts = pairs.read(run.data)["test"][: run.evaluate.generate.prompts]
    together = generation.check(
        adapted.model,
        setup.tokenizer,
        prompts,
        run.evaluate.generate,
        setup.accelerator,
        adapted.room,
        setup.prefix.begins,
        run.data.chat_template,
    )
    return prompts, together


def _by_accelerate(
    run: RunConfig, bare: NextToken, accelerator: Accelerator, *, trains: bool
) -> nn.Module:
    """The model on its device, divided among ranks where the run asks for it."""
    if run.launch.sharded:
        prepared = accelerator.prepare_model(bare, device_placement=False, evaluation_mode=True)
        return sharding.shard(prepared, accelerator)
    return accelerator.prepare_model(bare, evaluation_mode=not trains)
