"""Where a run stands, and what it has found out on the way: a checkpoint holds all of it.

With what trains, the optimizer's state and the generators (`harness.training.checkpoint`), a run
that was cut goes on from it to the same numbers.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from harness.config.errors import ConfigError
from harness.config.run_config import RunConfig
from harness.evaluation.sliding_window import Nats
from harness.results import run_record
from harness.system import energy, lock
from harness.training import checkpoint, memory
from harness.training.averaging import Average
from harness.training.buffers import BufferState
from harness.training.loop import State

SEVERAL = "the run has several processes, of which each reads its own machine alone"
log = logging.getLogger("harness")


@dataclass
class Elapsed:
    """What a run has had of the machine; a checkpoint keeps it for the run that goes on."""

    started: float  # seconds since 1970
    beside: lock.ConcurrentRuns | None = None
    wall_seconds: float = 0.0  # of the parts before this one, up to their checkpoints
    runs_beside: int = 0  # in those parts, at most

    def go_on(self, facts: dict[str, Any]) -> None:
        """Take over what `facts` said of the parts before."""
        self.wall_seconds, self.runs_beside = facts["wall_seconds"], facts["runs_beside"] or 0

    def facts(self) -> dict[str, Any]:
        """Of all parts together; runs beside are None where they are not counted."""
        runs_beside = max(self.runs_beside, self.beside.most()) if self.beside else None
        seconds = self.wall_seconds + time.time() - self.started
        return {"wall_seconds": seconds, "runs_beside": runs_beside}

    def end(self) -> None:
        """No longer count as a run that is under way."""
        if self.beside:
            self.beside.end()


class RunState:
    """A run between its first step and its result, begun anew or gone on with from a checkpoint.

    Raises:
        ConfigError: the checkpoint is of another number of ranks (`check_ranks`).
    """

    def __init__(
        self,
        run: RunConfig,
        run_dir: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        accelerator: Accelerator,
        process: memory.ProcessPeaks,
        so_far: Elapsed,
    ) -> None:
        self.average = None  # of what trains, with train.ema
        if optimizer is not None and run.train.ema:
            self.average = Average(model, run.train.ema)
        self.run_dir = run_dir
        self.model = model
        self.optimizer = optimizer  # None: nothing trains, and there are no checkpoints
        self.buffers = BufferState(model)
        self.accelerator = accelerator
        self.process = process
        self.so_far = so_far
        alone = accelerator.num_processes == 1  # of several, one does not see all machines
        self.meter = energy.meter(memory.gpu_uuids()) if alone else energy.none(SEVERAL)
        # Halved by the controller after a kill for memory.
        halved = run_record.get(run_record.read(run_dir) or {}, "run.micro_batch")
        self.state = State(micro_batch=halved or run.train.micro_batch)
        self.quality: dict[str, Any] = {"also": {}}  # of result.json
        self.at_evaluation: dict[str, Any] = {}  # memory
        nothing = (np.zeros(0), np.zeros(0, np.int64))
        self.newest: Nats = nothing  # of validation documents, when they were read last
        self.best: Nats = nothing  # and after the step that is the best so far
        latest = checkpoint.latest(run_dir)
        if latest is not None and optimizer is not None:
            check_ranks(run, latest.facts["processes"], accelerator.num_processes)
            self._go_on(latest, halved, optimizer)
        self.metrics = run_record.Metrics(
            run_dir, self.state.step, self.state.validated, write=accelerator.is_main_process
        )

    @property
    def _best_path(self) -> Path:
        return self.run_dir / run_record.BEST

    def _facts(self) -> dict[str, Any]:
        """What a checkpoint says beside its tensors; `_go_on` reads it."""
        return {
            "state": dataclasses.asdict(self.state),
            "at_evaluation": self.at_evaluation,
            "step0": self.quality["step0"],
            "base": self.quality.get("base"),
            "also": self.quality["also"],
            "process": self.process.by_phase,
            "processes": self.accelerator.num_processes,
            "so_far": self.so_far.facts(),
        }

    def _go_on(
        self,
        latest: checkpoint.Checkpoint,
        halved: int | None,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        facts, tensors = latest.facts, latest.tensors
        self.so_far.go_on(facts["so_far"])
        self.state = State(**facts["state"])
        self.state.micro_batch = min(halved or self.state.micro_batch, self.state.micro_batch)
        self.state.resumed_at.append(self.state.step)
        self.at_evaluation = facts["at_evaluation"]
        self.quality = {"step0": facts["step0"], "also": facts["also"]}
        if base := facts.get("base"):
            self.quality["base"] = base
        self.process.go_on(facts["process"])
        self.best = (tensors["best/nll"].numpy(), tensors["best/num_tokens"].numpy())
        checkpoint.restore(self.model, optimizer, tensors)
        self.buffers.restore(tensors, factors=True)
        if self.average:
            self.average.restore(tensors)
        checkpoint.restore_generators(latest, self.accelerator.process_index)
        if self.accelerator.is_main_process:
            checkpoint.load_best(latest, self._best_path)
        log.info("goes on after step %d", self.state.step)

    def energy(self) -> dict[str, Any]:
        """Joules of optimizer steps and of evaluation, of what, and why others are left out."""
        state, left_out = self.state, dict(self.meter.left_out)
        if self.meter.of and state.metered_steps < state.step:
            left_out["all"] = f"{state.metered_steps} of {state.step} steps were metered"
        if not self.meter.of or "all" in left_out:
            return {"of": [], "left_out": left_out}
        return {
            "of": self.meter.of,
            "left_out": left_out,
            "train_joules": state.train_joules,
            "evaluate_joules": state.evaluate_joules,
        }

    def save(self) -> None:
        """Write a checkpoint, all ranks together."""
        assert self.optimizer is not None
        self.metrics.sync()
        self.process.turn("train")  # so that the peak so far is in by_phase
        tensors = checkpoint.state_tensors(self.model, self.optimizer)
        tensors |= self.buffers.tensors(factors=True)
        tensors |= self.average.tensors() if self.average else {}
        tensors["best/nll"], tensors["best/num_tokens"] = map(torch.from_numpy, self.best)
        checkpoint.save(self.run_dir, tensors, self._facts(), self._best_path, self.accelerator)

    def keep(self) -> None:
        """Take the weights of now, whose validation was just read, for the best so far."""
        self.best = self.newest
        if self.optimizer is not None:
            write = self.accelerator.is_main_process
            checkpoint.save_trained(self.model, self._best_path, buffers=self.buffers, write=write)

    def load_best(self) -> None:
        """Put the weights that validation chose into the model."""
        self.accelerator.wait_for_everyone()
        if self.optimizer is not None:
            checkpoint.load_trained(self.model, self._best_path, buffers=self.buffers)


def check_ranks(run: RunConfig, before: int, now: int) -> None:
    """Raise ConfigError where a run cannot go on with another number of processes."""
    if now != before and (run.model.dropout or getattr(run.method, "dropout", 0)):
        raise ConfigError(
            f"the run was cut with launch.num_processes={before}, whose draws of dropout {now} "
            f"cannot go on with: set launch.num_processes={before}, or rerun=true to begin again"
        )
