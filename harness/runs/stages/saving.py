"""The saving of what a run has trained, and what packing its base in few bits has cost."""

from __future__ import annotations

from harness.evaluation import ranks
from harness.runs import quantisation_cost, saved_check, saved_costs
from harness.runs.failures import kept_result
from harness.runs.finished_run import ADAPTER
from harness.runs.stages.adaptation import Adapted
from harness.runs.stages.setup import Setup
from harness.runs.stages.texts import Texts
from harness.runs.stages.training import Trained
from harness.training import checkpoint, sharding


def save(setup: Setup, texts: Texts, adapted: Adapted, trained: Trained) -> None:
    """Write adapter/ or model/ to the run's directory, and measure a quantised base's cost."""
    accelerator, result = setup.accelerator, setup.result
    with kept_result(result, "what was trained could not be saved"):
        if setup.run.launch.sharded:
            with ranks.together(accelerator, divided=True):
                sharding.unshard(adapted.model, keep=accelerator.is_main_process)
        if accelerator.is_main_process:
            _export(setup, texts, adapted, trained)
    if setup.run.model.quantize != "none":
        with kept_result(result, "the cost of quantising could not be measured"):
            adapter = ADAPTER in result.get("saved", ())
            result["quality"]["quantization"] = quantisation_cost.measure(
                trained.run, setup.base_config, trained.held_out, accelerator, adapter=adapter
            )


def _export(setup: Setup, texts: Texts, adapted: Adapted, trained: Trained) -> None:
    """The files of the model, with some documents to try it by when it is loaded again."""
    result, run_dir = setup.result, setup.run_dir
    result["saved"] = checkpoint.export(
        adapted.model, setup.tokenizer, run_dir, merged=adapted.merged
    )
    validation, best = texts.own.held_out["validation"], trained.standing.best
    saved_check.keep(run_dir, validation, best, trained.held_out.bos)
    bytes_to_ship = saved_costs.bytes_to_ship(run_dir, result["saved"])
    result["costs"]["adapter_bytes"] = bytes_to_ship
