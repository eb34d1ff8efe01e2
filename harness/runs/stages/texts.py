"""All the text that a run reads: what it trains on, and what it is evaluated on."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from harness.data import overlap, token_data
from harness.evaluation import classification, protocols
from harness.runs.stages.setup import Setup

log = logging.getLogger("harness")


@dataclass(frozen=True)
class Texts:
    """The text of a run as tokens, with what else its test split is read for."""

    own: token_data.Data  # of `data`: training blocks and held-out documents
    further: dict[str, Dataset]  # of `evaluate.also`, by name
    by_protocol: protocols.Text | None  # the test split as `evaluate.protocol` reads it
    task: classification.Task | None  # of `evaluate.classify`


def read(setup: Setup) -> Texts:
    """Read and tokenise what is not in the cache yet, on the first of all ranks.

    Raises:
        ConfigError: a split is missing or has nothing to predict.
    """
    run, tokenizer, begins = setup.run, setup.tokenizer, setup.prefix.begins
    with setup.accelerator.main_process_first():
        limits = token_data.most_tokens(run)
        own = token_data.prepare(
            run.data, tokenizer, test=run.evaluate.test, begins=begins, most=limits
        )
        evaluated = own.facts.pop("evaluated", {})  # where a split is read in part
        further = {}
        for name, cfg in run.evaluate.also.items():
            further[name], part = token_data.prepare_test(
                cfg, tokenizer, begins=begins, most=limits["test"]
            )
            evaluated |= {name: part} if part else {}
        in_training, copies = overlap.of_further(run.evaluate.also, own.training, further, run.data)
        by_protocol = protocols.read(run, tokenizer)
        ids = {name: set(table["id"]) for name, table in own.held_out.items()}
        task = classification.read(run, tokenizer, begins, ids)
    texts = Texts(own, further, by_protocol, task)
    _record(setup, texts, evaluated, in_training)
    left_out = [
        message for cfg in run.evaluate.also.values() for message in token_data.left_out(cfg)[1]
    ]
    setup.warn([*own.warnings, *left_out, *copies, *(task.warnings if task else [])])
    return texts


def _record(
    setup: Setup, texts: Texts, evaluated: dict[str, Any], in_training: dict[str, int]
) -> None:
    """Note how much text there is, how it is evaluated, and what of it training has seen."""
    result, own = setup.result, texts.own
    result["data"] |= {"num_documents": own.num_documents, "num_blocks": own.num_blocks}
    result["evaluation"] = {
        "context_length": setup.run.evaluation_context,
        "stride": setup.stride,
        "prefix": setup.prefix.recorded(),
        "tokenizer": own.tokenizer,
    }
    if evaluated:  # runs whose parts differ are not compared
        result["evaluation"]["part"] = evaluated
    result["data"] |= own.facts
    log.info("data: %s, tokenised now: %s", own.num_documents, own.tokenized)
    if in_training:
        result["data"]["further_in_training"] = in_training
