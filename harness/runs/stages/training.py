"""The training of a run: from its start or its last checkpoint to the weights that are best."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from harness.config import ending
from harness.config.run_config import RunConfig
from harness.methods import adalora, model_facts, objective, starts
from harness.methods.starts import Statistic
from harness.runs import predictions
from harness.runs.stages.adaptation import Adapted
from harness.runs.stages.preparation import Prepared
from harness.runs.stages.setup import Setup
from harness.runs.stages.texts import Texts
from harness.system.signals import Stop
from harness.training import loop, optimizers
from harness.training.evaluator import Evaluator
from harness.training.run_state import Elapsed, RunState


@dataclass(frozen=True)
class Trained:
    """A run with the weights that validation chose."""

    run: RunConfig  # with the steps that `train.max_flops` leaves of those asked for
    standing: RunState
    held_out: Evaluator
    start: Statistic | None  # what the method's start has read of the training text
    setup_seconds: float  # until the first step


def train(
    setup: Setup,
    texts: Texts,
    adapted: Adapted,
    prepared: Prepared,
    stop: Stop,
    so_far: Elapsed,
    *,
    quiet: bool,
) -> Trained:
    """Train, with the base evaluated before and the further texts before and after.

    Raises:
        ConfigError: `train.max_flops` is less than a step takes, or a checkpoint does not fit.
        loop.Paused: the run has come to `launch.pause_at`.
        KeyboardInterrupt: told to stop.
    """
    start = starts.facts_of(adapted.start_text)
    run = _within_max_flops(setup, start)
    optimizer = _optimizer(run, setup, adapted)
    standing = RunState(
        run, setup.run_dir, adapted.model, optimizer, setup.accelerator, setup.process, so_far
    )
    standing.state.start_seconds = start.seconds if start else 0.0
    setup.result["quality"] = standing.quality
    held_out = _evaluator(setup, texts, prepared, standing)
    setup_seconds = time.perf_counter() - setup.began
    with standing.metrics:
        if standing.state.validated < 0:
            held_out.evaluate_base()
        setup.process.turn("train")
        try:
            training, hooks = _training(run, texts, prepared, standing), _hooks(standing, held_out)
            loop.train(training, standing.state, hooks, stop, quiet=quiet)
        except loop.Paused:
            state = standing.state
            setup.result["run"] |= {"paused_at": state.step, "resumed_at": state.resumed_at}
            raise
        standing.load_best()  # from here on with the weights that validation chose
        setup.result["method"] |= model_facts.rank_facts(adapted.model)
        held_out.evaluate_adapted()
    _record(setup, run, texts, standing)
    return Trained(run, standing, held_out, start, setup_seconds)


def _within_max_flops(setup: Setup, start: Statistic | None) -> RunConfig:
    """The run with as many steps as `train.max_flops` allows beside what its start has taken."""
    run = setup.run
    if not run.train.max_flops:
        return run
    known = predictions.recorded(run, setup.base_config, setup.accelerator) or {}
    spent = starts.flops_of(start, known.get("evaluate_flops_per_token"))
    return ending.within_flops(run, known.get("train_flops_per_token"), spent)


def _optimizer(run: RunConfig, setup: Setup, adapted: Adapted) -> torch.optim.Optimizer | None:
    """The optimizer of what trains, as Accelerate prepared it; None where nothing does."""
    if not adapted.trains:
        return None
    optimizer = optimizers.make_optimizer(adapted.model, run.train, run.optimizer)
    return setup.accelerator.prepare_optimizer(optimizer)


def _evaluator(setup: Setup, texts: Texts, prepared: Prepared, standing: RunState) -> Evaluator:
    return Evaluator(
        texts.own.held_out | texts.further,
        list(texts.further),
        prepared.model,
        standing,
        context=setup.run.evaluation_context,
        stride=setup.stride,
        bos=setup.prefix.id,
        batch_tokens=prepared.batch_tokens,
        batching=prepared.batching,
        unadapted=prepared.unadapted,
    )


def _training(
    run: RunConfig, texts: Texts, prepared: Prepared, standing: RunState
) -> loop.Training:
    """What the loop trains, with what the method adds to the loss and does after a step."""
    return loop.Training(
        prepared.model,
        texts.own,
        run,
        standing.accelerator,
        standing.optimizer,
        objective.penalty(standing.model, run),
        standing.average,
        prepared.noise,
        adalora.after_step(standing.model, run),
        adalora.last_cut(run),
    )


def _hooks(standing: RunState, held_out: Evaluator) -> loop.Hooks:
    return loop.Hooks(
        held_out.validate,
        standing.keep,
        standing.save,
        standing.metrics.log,
        standing.meter.read,
    )


def _record(setup: Setup, run: RunConfig, texts: Texts, standing: RunState) -> None:
    """Note where the run was cut, what ended it, and how much of its text it has seen."""
    result, state = setup.result, standing.state
    result["run"]["resumed_at"] = state.resumed_at
    capped = "max_flops" if run.train.steps < setup.run.train.steps else "steps"
    result["run"]["ended_by"] = state.ended_by or capped
    step_blocks = run.train.batch_tokens // run.data.context_length
    result["train"] = {
        "epochs": texts.own.epochs(state.step * step_blocks),
        "micro_batch_asked": run.train.micro_batch,
        "micro_batch": state.micro_batch,
    }
    if standing.optimizer is not None:
        result["train"]["groups"] = optimizers.described(standing.optimizer)
