"""What packing a base in few bits has cost, and what merging costs: perplexities of validation.

    unquantized          the base before it was packed
    quantized            the base that the run has adapted
    adapted              the packed base with the adapter of the chosen checkpoint
    merged_dequantized   that adapter merged into the packed weights, written out in fp32
    merged_original      the same adapter merged into the base before it was packed

Adapters are what the run has saved, loaded and merged by PEFT.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from harness.config.run_config import RunConfig
from harness.evaluation import sliding_window
from harness.methods import merging, weight_tying
from harness.models import linear, pretrained, quantize, weights
from harness.models.next_token import NextToken
from harness.runs.finished_run import ADAPTER
from harness.system.internals import prepared_models_kept
from harness.training.evaluator import Evaluator


def measure(
    run: RunConfig,
    config: PretrainedConfig,
    held_out: Evaluator,
    accelerator: Accelerator,
    *,
    adapter: bool,
) -> dict[str, Any]:
    """The perplexities, each a QUALITY of `harness.results.schema`; read after all else of a run.

    Without an `adapter` in the run's directory nothing is merged, and where it cannot be merged
    `not_merged` says why.
    """
    quality = held_out.standing.quality
    perplexities: dict[str, Any] = {"quantized": quality["base"]["validation"]}
    if adapter:
        perplexities["adapted"] = quality["validation"]
    folder = held_out.standing.run_dir / ADAPTER if adapter else None
    for name, model in _models(run, config, folder):
        if isinstance(model, str):
            perplexities["not_merged"] = model
            continue
        with accelerator.autocast():
            predicts = NextToken(model.to(accelerator.device))
        with prepared_models_kept(accelerator):
            prepared = accelerator.prepare_model(predicts, evaluation_mode=True)
            nats = held_out.nats("validation", prepared=prepared)
        perplexities[name] = sliding_window.quality(*nats, held_out.texts["validation"])
        del model, predicts, prepared
        gc.collect()  # or else two models are there at once
    return perplexities


def _models(
    run: RunConfig, config: PretrainedConfig, adapter: Path | None
) -> Iterator[tuple[str, nn.Module | str]]:
    """Each model by its name in the result, or why there is none, one after another."""
    yield "unquantized", unquantized(run, config)
    if adapter is None:
        return
    for name in ("merged_dequantized", "merged_original"):
        base = unquantized(run, config) if name == "merged_original" else written_out(run, config)
        model = weights.load_adapter(base, adapter)
        if reason := merging.reason_unsupported(model):
            yield name, reason
            return
        yield name, weight_tying.merged(model)


def unquantized(run: RunConfig, config: PretrainedConfig) -> PreTrainedModel:
    """The base of a run before it was packed, with the modules that were."""
    plain = replace(run.model, quantize="none", double_quant=False, compute_dtype="auto")
    set_seed(run.seed)  # of a base that is drawn, these are the draws
    return linear.turn(pretrained.load_model(replace(run, model=plain), config)).eval()


def written_out(run: RunConfig, config: PretrainedConfig) -> PreTrainedModel:
    """The packed base of a run, with what its weights stand for in fp32."""
    set_seed(run.seed)
    return quantize.dequantized(pretrained.load_model(run, config)).eval()
