"""The costs of a run: speed, memory, FLOPs and energy, beside those that were predicted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from harness.data import token_data
from harness.methods import starts
from harness.runs import evaluation_batches, flops, predictions
from harness.runs.failures import kept_result
from harness.runs.stages.setup import Setup
from harness.runs.stages.texts import Texts
from harness.runs.stages.training import Trained


def record(setup: Setup, texts: Texts, trained: Trained) -> None:
    """Note what training and evaluation took; what comes after counts as export."""
    _record_speed(setup, trained)
    setup.process.turn("export")
    _record_memory(setup, trained)
    # After the peaks are read: it is quick, but it takes memory of its own.
    predicted = _predicted(setup, texts, trained)
    setup.result["predicted"] = predicted
    _record_flops(setup, trained, predicted)


def _record_speed(setup: Setup, trained: Trained) -> None:
    result, state, start = setup.result, trained.standing.state, trained.start
    result["speed"] = {
        "tokens_per_second": state.tokens_per_second,
        "train_seconds": state.train_seconds,
        "evaluate_seconds": state.evaluate_seconds,
        "setup_seconds": trained.setup_seconds,
        "steps": state.step,
        "tokens": state.tokens,
    }
    if start:
        result["speed"] |= {"start_tokens": start.tokens, "start_seconds": start.seconds}
        result["method"]["start_passes"] = start.passes


def _record_memory(setup: Setup, trained: Trained) -> None:
    """Of the step that was followed or, where nothing trains, of evaluation."""
    standing = trained.standing
    state = standing.state
    setup.result["memory"] = (state.memory or standing.at_evaluation) | {
        "phase": "train" if state.memory else "evaluate",
        "evaluate": standing.at_evaluation,
        "process_peak_bytes": setup.process.peak_bytes,
        "process_peak_by_phase": setup.process.by_phase,
    }


def _predicted(setup: Setup, texts: Texts, trained: Trained) -> dict[str, Any] | None:
    """What is predicted of the run as it was done; None where nothing can be."""
    run, base_config = trained.run, setup.base_config
    done = replace(run, train=replace(run.train, micro_batch=trained.standing.state.micro_batch))
    validation = token_data.document_sizes(texts.own.held_out["validation"])
    batches = evaluation_batches.batches_of(run, base_config, validation, trained.held_out.batching)
    followed = batches[0] if batches else None
    with kept_result(setup.result, "memory and FLOPs could not be predicted"):
        return predictions.recorded(done, base_config, setup.accelerator, followed)
    return None


def _record_flops(setup: Setup, trained: Trained, predicted: dict[str, Any] | None) -> None:
    """FLOPs by those of a token, which are predicted, and the energy that was metered."""
    result, state = setup.result, trained.standing.state
    if trained.start and predicted:
        start_flops = starts.flops_of(trained.start, predicted["evaluate_flops_per_token"])
        result["speed"]["start_flops"] = start_flops
    result["costs"] = flops.spent_flops(trained.run, state, predicted)
    result["costs"]["energy"] = trained.standing.energy()
    # Of pairs tokens are those of completions, and FLOPs those of every position.
    if predicted and state.tokens_per_second and trained.run.data.source != "pairs":
        per_second = predicted["train_flops_per_token"] * state.tokens_per_second
        result["speed"]["gflops_per_second"] = per_second / 1e9
