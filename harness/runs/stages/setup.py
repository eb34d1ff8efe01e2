"""The setup of a run: its files, the machine, and names and shapes checked before any weights."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import Accelerator
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from harness import methods
from harness.config.run_config import RunConfig
from harness.evaluation import prefix
from harness.evaluation.prefix import Prefix
from harness.methods import peft_adapter, positions
from harness.methods.svd import CACHE_ENV
from harness.models import model_files, pretrained, weights
from harness.results import environment
from harness.runs import failures
from harness.system import contents, network
from harness.training import memory, optimizers


@dataclass(frozen=True)
class Setup:
    """What all stages of a run share."""

    run: RunConfig  # its files are pinned
    run_dir: Path
    result: dict[str, Any]  # of result.json, which every stage adds to
    began: float  # by time.perf_counter()
    process: memory.ProcessPeaks
    precision: str  # fp32 | bf16
    accelerator: Accelerator
    base_config: PretrainedConfig
    max_positions: int | None  # of the base, if it has a limit
    tokenizer: PreTrainedTokenizerBase
    prefix: Prefix  # what documents follow

    @property
    def stride(self) -> int:
        """Return the tokens that an evaluation window begins after the one before it."""
        return self.run.evaluate.stride or self.run.evaluation_context

    def warn(self, warnings: list[str]) -> None:
        """Tell the user, by the first of all ranks."""
        for warning in warnings if self.accelerator.is_main_process else []:
            failures.warn(warning)


def begin(run: RunConfig, run_dir: Path, result: dict[str, Any]) -> Setup:
    """Check a run and make its machine ready, before any text is read or any weight is loaded.

    Raises:
        ConfigError: a file, a name or a shape that does not fit.
    """
    run = _with_its_files(run)
    datasets.disable_progress_bars()  # the training bar is the only one
    transformers.utils.logging.disable_progress_bar()
    began = time.perf_counter()
    process = memory.ProcessPeaks("setup")
    os.environ[CACHE_ENV] = run.data.cache_dir  # factors of a base weight, for a whole sweep
    precision = environment.precision_of(run)
    accelerator = _accelerator(run, precision)
    result["environment"] = environment.describe() | {
        "processes": accelerator.num_processes,
        "sharded": run.launch.sharded,
    }
    base_config = pretrained.load_config(run.model)
    result["model"] |= pretrained.facts(run.model, base_config)
    max_positions = pretrained.max_context(base_config)
    _check_names_and_shapes(run, base_config, max_positions)
    tokenizer = pretrained.load_tokenizer(run.model, base_config)
    return Setup(
        run,
        run_dir,
        result,
        began,
        process,
        precision,
        accelerator,
        base_config,
        max_positions,
        tokenizer,
        prefix.find(tokenizer, run.evaluate.prefix),
    )


def _with_its_files(run: RunConfig) -> RunConfig:
    """The run with its files pinned, once they are what they were when it was composed."""
    if run.data.id or run.model.id or run.model.tokenizer:
        network.go_offline_if_unreachable()
    contents.check(run)
    return contents.pinned(run)


def _accelerator(run: RunConfig, precision: str) -> Accelerator:
    """The device, the precision and the threads that the run computes with."""
    if warning := environment.precision_warning(precision):
        failures.warn(warning)
    accelerator = Accelerator(
        mixed_precision=environment.mixed_precision(precision),
        cpu=not torch.accelerator.is_available(),  # which ranks on a CPU must be told
    )
    cores = run.launch.cores or environment.usable_cores()
    torch.set_num_threads(run.train.threads or max(1, cores // accelerator.num_processes))
    return accelerator


def _check_names_and_shapes(
    run: RunConfig, base_config: PretrainedConfig, max_positions: int | None
) -> None:
    """Build the adapted model on the meta device, before anything is read or loaded."""
    if not run.model.architecture:
        weights.check_files(model_files.source_of(run.model))
    positions.check_context(run, max_positions)
    with suppress(peft_adapter.NeedsWeightsError):  # then on the real model
        checked = methods.check(pretrained.on_meta(run, base_config), run)
        optimizers.matches(checked, run.train.groups)
