"""The model of a run: its base is loaded, and the method put on it."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass

from accelerate.utils import set_seed
from torch import nn
from transformers import PreTrainedModel

from harness import methods
from harness.config.errors import ConfigError
from harness.config.run_config import RunConfig
from harness.evaluation import base_model
from harness.methods import invocation, merging, model_facts, positions, starts
from harness.models import linear, model_size, pretrained, transformer_blocks
from harness.runs import failures
from harness.runs.stages.setup import Setup
from harness.runs.stages.texts import Texts
from harness.training import checkpoint
from harness.training.start_text import start_text_of

log = logging.getLogger("harness")


@dataclass(frozen=True)
class Adapted:
    """The adapted model, whose weights that train require gradients."""

    model: nn.Module
    trains: bool  # whether any weight does
    room: int | None  # positions that the model has for tokens, if it has a limit
    at_base: base_model.Base | None  # what the base says; None where no method changes it
    start_text: starts.TrainingText | None  # what the method's start has read
    merged: bool  # whether the whole model is saved


def adapt(setup: Setup, texts: Texts) -> Adapted:
    """Load the base and put the method on it, on the run's device; draws are by the seed.

    Raises:
        ConfigError: weights, targets or fields that do not fit, or a model that cannot be merged.
    """
    run, accelerator = setup.run, setup.accelerator
    set_seed(run.seed)
    base = _load_base(setup)
    limit = setup.max_positions
    room = None if limit is None else limit - positions.num_virtual_tokens(run)
    with accelerator.autocast():
        changes = run.method.name not in ("none", "full")
        at_base = base_model.Base(base, run, room) if changes else None
    start_text = start_text_of(run, setup.run_dir, texts.own, accelerator)
    if start_text and not run.launch.sharded:  # or else the device need not hold all of it
        base = base.to(accelerator.device)
    with accelerator.main_process_first() if start_text else nullcontext():
        model = methods.adapt(base, run, start_text)
    if linear.is_turned(model):
        setup.result["model"]["linear"] = True
    merged = _is_to_be_merged(setup, model)
    setup.warn(invocation.check(model, run.data, texts.own, texts.further))
    if accelerator.is_main_process:
        checkpoint.keep_initial(model, setup.run_dir)
    if not run.launch.sharded:  # or else the device need not hold all of it
        model = model.to(accelerator.device)
    counted = _record(setup, model)
    if accelerator.process_index:  # the same start, and dropout of its own
        set_seed(run.seed + accelerator.process_index * 1_000_003)
    transformer_blocks.checkpoint_activations(model, run.train)
    if run.train.compile:
        transformer_blocks.compile_blocks(model)
    return Adapted(model, counted.trainable > 0, room, at_base, start_text, merged)


def _load_base(setup: Setup) -> PreTrainedModel:
    """The base with its weights; those that do not fit are noted, where the run lets them."""
    base, misfits = pretrained.load_with_misfits(setup.run, setup.base_config)
    if not setup.run.model.strict:
        setup.result["model"]["weights"] = {
            "random": misfits.random,
            "left_out": misfits.unexpected,
        }
    if misfits:
        failures.warn(f"model.strict=false: {misfits}")
    setup.result["parameters"] = {"base": model_size.count_parameters(base).total}
    return base


def _is_to_be_merged(setup: Setup, model: nn.Module) -> bool:
    """Whether the adapted model is saved as a whole: as it is asked for, and can be done.

    Raises:
        ConfigError: `save_merged=always`, and it cannot be.
    """
    run = setup.run
    another = linear.needs_turned_base(model) or pretrained.wants_unfused(run, setup.base_config)
    merged = wants_merged(run, another)
    if merged and (reason := merging.reason_unsupported(model)):
        if run.save_merged == "always":
            raise ConfigError(f"save_merged=always: {reason}; set save_merged=never")
        log.info("no model/ will be saved: %s", reason)
        merged = False
    return merged


def wants_merged(run: RunConfig, another: bool) -> bool:
    """Whether the adapted model is to be saved as a whole, beside or in place of an adapter.

    `another`: the adapter is of another base than the published one.
    """
    if run.save_merged == "auto":  # where an adapter alone would lack its base
        return another or bool(run.model.architecture) or run.method.name == "truncate"
    return run.save_merged == "always"


def _record(setup: Setup, model: nn.Module) -> model_size.Parameters:
    """Note what the method has made of the base; the number of its parameters."""
    result = setup.result
    result["method"] |= model_facts.svd_facts(model) | model_facts.trained_alone(model, setup.run)
    counted = model_size.count_parameters(model)
    result["parameters"] |= {
        "total": counted.total,
        "trainable": counted.trainable,
        "trainable_percent": counted.trainable_percent,
        "factored": model_facts.factored_total(model),  # with U, D, V in place of W; else None
    }
    log.info("parameters: %s, of %s", result["parameters"], result["method"].get("trained", "all"))
    return counted
