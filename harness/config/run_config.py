"""One run's whole configuration: its sections, its directory and its values as plain containers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config import labels, naming
from harness.config.method_schema import MethodConfig
from harness.config.optimizers import OptimizerConfig
from harness.config.schema import (
    DataConfig,
    EvaluateConfig,
    LaunchConfig,
    ModelConfig,
    RootConfig,
    TargetsConfig,
    TrainConfig,
)


@dataclass(frozen=True)
class RunConfig(RootConfig):
    """One configuration with one seed: all that a worker needs to know."""

    model: ModelConfig
    data: DataConfig
    method: MethodConfig  # one of METHODS
    targets: TargetsConfig
    train: TrainConfig
    optimizer: OptimizerConfig  # one of OPTIMIZERS
    evaluate: EvaluateConfig
    launch: LaunchConfig
    tracker: dict[str, Any]  # conf/tracker: options by the tracker's name

    def __repr__(self) -> str:
        steps = f", {self.train.steps} steps" if self.method.trains else ""
        model, text = labels.of_model(self.model), labels.of_text(self.data)
        return f"RunConfig({naming.run_name(self)}: {model} on {text}{steps})"

    @property
    def evaluation_context(self) -> int:
        """Return the tokens of the sliding window that documents are evaluated by."""
        return (
            self.data.context_length
            if self.evaluate.context_length is None
            else self.evaluate.context_length
        )

    @property
    def run_dir(self) -> Path:
        """Return the directory of the run: <outputs_dir>/<experiment_name>/<run_name>."""
        return Path(self.outputs_dir) / self.experiment_name / naming.run_name(self)


def to_dict(run: RunConfig) -> dict[str, Any]:
    """Return the configuration as plain containers, for config.yaml and result.json."""
    return dataclasses.asdict(run)


def smaller_micro_batch(run: RunConfig, micro_batch: int) -> int | None:
    """The most blocks, up to half of `micro_batch`, that divide those of an optimizer step."""
    blocks = run.train.batch_tokens // run.data.context_length // run.launch.num_processes
    return next((n for n in range(micro_batch // 2, 0, -1) if blocks % n == 0), None)
