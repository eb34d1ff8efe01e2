"""The training text that a start of LoRA reads before step 0."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator

from harness.config import naming
from harness.config.errors import ConfigError
from harness.config.method_schema import LoraMethod
from harness.config.run_config import RunConfig
from harness.data import token_data
from harness.methods import initialisation, starts
from harness.results import run_record


def start_text_of(
    run: RunConfig, run_dir: Path, text: token_data.Data, accelerator: Accelerator
) -> starts.TrainingText | None:
    """What a start of LoRA reads of the training split: the sequences of the run's first steps.

    None for methods that read nothing before step 0.

    Raises:
        ConfigError: the training split has fewer sequences.
    """
    if not initialisation.reads_text(run):
        return None
    assert isinstance(run.method, LoraMethod)
    wanted, micro = run.method.start_sequences, run.train.micro_batch
    if wanted > text.num_blocks:
        raise ConfigError(
            f"method.start_sequences={wanted}: the training text has {text.num_blocks} sequences "
            f"of data.context_length={run.data.context_length}; expected {text.num_blocks} or fewer"
        )
    order = text.order(run.seed, 0, wanted)
    batches = [
        token_data.batch_of(text.blocks, order[first : first + micro])
        for first in range(0, wanted, micro)
    ]
    path, identity = run_dir / run_record.START, naming.identity(run)
    return starts.TrainingText(batches, path, identity, accelerator.autocast)
