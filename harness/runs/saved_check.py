"""Whether what was saved is the model that was evaluated: a few documents, measured again.

A run keeps a few of its validation documents with the nats that it measured on them. What it saves,
and what `harness.artifacts.export` writes, is loaded from the disk and must give the same nats.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from torch import nn

from harness.config.errors import ConfigError
from harness.evaluation import sliding_window
from harness.evaluation.sliding_window import Nats
from harness.models import weights
from harness.models.next_token import NextToken
from harness.results import environment
from harness.runs.finished_run import ADAPTER, MODEL, Saved
from harness.system import atomic

FILE_NAME = "check.parquet"
LEAST, MOST, ROWS = 16, 512, 8  # tokens of a document, of all together, and documents
# Mean absolute difference in nats a token that rounding may make: other kernels, batches, merging.
# On gpt2_mini: in fp32 on one machine some 1e-6; in bf16 nothing with the same kernels, and 0.001
# to 0.0035 with others or with weights in bf16. Weights moved by a hundredth of their spread move
# nats by 0.007 to 0.012, so a base that has changed by less can pass in bf16.
TOLERANCE = {"fp32": 1e-3, "bf16": 1e-2}
log = logging.getLogger("harness")


def keep(run_dir: Path, documents: Dataset, found: Nats, bos: int | None) -> None:
    """Write a few rows of `documents` to RUN_DIR, with `found`, their nats and predicted tokens."""
    nll, num_tokens = found
    # The shortest ones that say something, and shorter ones where there are no others.
    order = np.lexsort((num_tokens, num_tokens < LEAST))
    order = order[num_tokens[order] > 0][:ROWS]
    if not len(order):
        return
    total = np.cumsum(num_tokens[order])
    chosen = order[: max(1, int((total <= MOST).sum()))]
    table = documents.with_format("arrow").select(chosen.tolist())[:]
    table = table.append_column("nll_nats", pa.array(nll[chosen]))
    table = table.append_column("predicted", pa.array(num_tokens[chosen]))
    table = table.replace_schema_metadata({"bos": json.dumps(bos)})
    atomic.write_atomically(run_dir / FILE_NAME, lambda scratch: pq.write_table(table, scratch))


def difference(run: Saved, model: nn.Module) -> tuple[float, float] | None:
    """Mean absolute difference of `model`'s nats from the run's, in nats a token; what may be.

    None where the run has kept no documents.

    Raises:
        ConfigError: the file is there and is no such table.
    """
    path = run.run_dir / FILE_NAME
    if not path.is_file():
        return None
    try:
        table = pq.read_table(path)
        expected, predicted = (table[name].to_numpy() for name in ("nll_nats", "predicted"))
        bos = json.loads(table.schema.metadata[b"bos"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error})") from error
    evaluation = run.record["evaluation"]
    precision = environment.precision_of(run.run)
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        nll, count = sliding_window.document_nll(
            NextToken(model),
            Dataset(table.replace_schema_metadata(None)),
            context=evaluation["context_length"],
            stride=evaluation["stride"],
            bos=bos,
            batch_tokens=run.run.evaluate.batch_tokens or 2 * MOST,
            batching=sliding_window.ONE_WIDTH,  # which holds for every model
        )
    if not np.array_equal(count, predicted):
        raise ConfigError(f"{path}: {count.tolist()} tokens were predicted, not {predicted}")
    mean_difference = float(np.abs(nll - expected).sum() / predicted.sum())
    return mean_difference, TOLERANCE[precision]


def compare(run: Saved, model: nn.Module, what: str) -> float | None:
    """`difference`, which must be within the tolerance; None where there is nothing to compare.

    Raises:
        ConfigError: it is not, or not a number.
    """
    measured = difference(run, model)
    if measured is None:
        return None
    apart, tolerance = measured
    if not apart <= tolerance:  # NaN too
        raise ConfigError(
            f"{what} is not the model that the run evaluated: on a few validation documents it "
            f"differs by {apart:.3g} nats a token (at most {tolerance:g} is rounding): the base, "
            f"or what the run saved, has changed since"
        )
    return apart


def check(run: Saved) -> dict[str, Any]:
    """What result.json says of the folders that a run has saved; an error is noted, not raised.

    `nats_per_token` is the largest difference of a folder, None where none could be measured.
    """
    largest: float | None = None
    problem = None
    gc.collect()  # the model that trained
    try:
        for folder, model in _saved_models(run):
            apart = compare(run, model.to(_device()), f"what {run.run_dir / folder} loads to")
            if apart is not None:
                largest = max(largest or 0.0, apart)
    except Exception as error:  # whatever it is, the test result stands
        problem = " ".join(f"{error}".split()) or type(error).__name__
        log.warning("the saved model could not be confirmed", exc_info=True)
    return {"nats_per_token": largest, "failure": problem}


def _device() -> torch.device:
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def _saved_models(run: Saved) -> Iterator[tuple[str, nn.Module]]:
    """Every folder that the run has saved, and the model it loads to."""
    for folder in run.record["saved"]:
        if folder == MODEL:
            yield folder, weights.load(run.folder(MODEL))[0].eval()
        elif folder == ADAPTER:
            yield folder, run.model()
