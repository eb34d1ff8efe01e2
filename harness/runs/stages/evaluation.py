"""The evaluation of a run at its end: the test set is read here, once, and nowhere else."""

from __future__ import annotations

from harness.evaluation import generation, protocols
from harness.runs.failures import kept_result
from harness.runs.stages.adaptation import Adapted
from harness.runs.stages.preparation import Prepared
from harness.runs.stages.setup import Setup
from harness.runs.stages.texts import Texts
from harness.runs.stages.training import Trained


def evaluate(
    setup: Setup, texts: Texts, adapted: Adapted, prepared: Prepared, trained: Trained
) -> None:
    """Measure the best weights on validation and test, and what else the run asks for.

    Once the test set was read a failure takes nothing away: what fails on one rank, all leave out.
    """
    quality, standing = setup.result["quality"], trained.standing
    quality |= {
        "best_step": standing.state.best_step,
        "validation": trained.held_out.summarize("validation", standing.best),
    }
    if setup.run.evaluate.test:
        nats = trained.held_out.nats("test")
        quality["test"] = trained.held_out.summarize("test", nats)
    _by_protocol(setup, texts, prepared)
    _classify(setup, texts, prepared)
    _generate(setup, adapted, prepared)


def _by_protocol(setup: Setup, texts: Texts, prepared: Prepared) -> None:
    """The test split once more, as `evaluate.protocol` reads it."""
    if texts.by_protocol is None:
        return
    result = setup.result
    with setup.process.phase("evaluate"), kept_result(result, "evaluate.protocol failed"):
        result["quality"]["test_protocol"] = protocols.measure(
            prepared.model,
            texts.by_protocol,
            batch_tokens=prepared.batch_tokens,
            batching=prepared.batching,
            precision=setup.precision,
            accelerator=setup.accelerator,
        )


def _classify(setup: Setup, texts: Texts, prepared: Prepared) -> None:
    """The labels of held-out prompts, as `evaluate.classify` asks for them."""
    if texts.task is None:
        return
    result = setup.result
    with setup.process.phase("evaluate"), kept_result(result, "evaluate.classify failed"):
        result["quality"]["classification"] = texts.task.measure(
            prepared.model,
            setup.run_dir,
            context=setup.run.evaluation_context,
            stride=setup.stride,
            batch_tokens=prepared.batch_tokens,
            batching=prepared.batching,
            accelerator=setup.accelerator,
        )


def _generate(setup: Setup, adapted: Adapted, prepared: Prepared) -> None:
    """The completions of test prompts and their scores, as `evaluate.generate` asks for them."""
    run, result = setup.run, setup.result
    if not (prepared.prompts and run.evaluate.generate):
        return
    setup.process.turn("generate")
    with kept_result(result, "evaluate.generate failed"):
        completed = generation.complete(
            adapted.model,
            setup.tokenizer,
            prepared.prompts,
            run.evaluate.generate,
            setup.accelerator,
            prepared.prompts_batching,
            setup.prefix.begins,
            run.data.chat_template,
        )
        if setup.accelerator.is_main_process:
            result["quality"]["generation"] = generation.scored(
                prepared.prompts, completed, setup.run_dir
            )
