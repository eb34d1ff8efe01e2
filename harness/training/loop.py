"""The training loop: the same for every method, since only `requires_grad` tells them apart."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from harness.config import ending, run_config
from harness.config.errors import ConfigError
from harness.config.run_config import RunConfig
from harness.config.schema import TrainConfig
from harness.data.token_data import Batch, Data, batch_of
from harness.system.machine import out_of_memory
from harness.system.signals import Stop
from harness.training import memory, optimizers, sharding
from harness.training.averaging import Average
from harness.training.neftune import Noise

logger = logging.getLogger(__name__)

WARM_UP_STEPS = 3  # not timed: allocators, caches and (if asked for) the compiler settle
MEMORY_STEP = 1  # (or the last) not timed: followed tensor by tensor; the optimizer has its state


class NonFiniteLossError(ArithmeticError):
    """The loss became NaN or infinite; the message names the step."""


class Paused(Exception):  # noqa: N818 - no error: the run has come to `launch.pause_at`
    """The run has trained to the step where it was to stop; a checkpoint holds all of it."""


class PassOutOfMemoryError(MemoryError):
    """A forward or backward pass did not fit; weights and optimizer are as before the step."""


@dataclass
class State:
    """Where a run stands: with weights, optimizer and generators, all that goes on from here."""

    micro_batch: int  # blocks per forward pass; `train.on_oom` may halve what was asked for
    step: int = 0  # optimizer steps taken
    validated: int = -1  # the last step after which validation was read
    tokens: int = 0  # predicted tokens trained on
    train_seconds: float = 0.0  # wall time of all optimizer steps, evaluation excluded
    evaluate_seconds: float = 0.0
    evaluated_positions: int = 0  # that evaluation has computed, padding included
    train_joules: float = 0.0  # of the optimizer steps that were metered
    evaluate_joules: float = 0.0
    metered_steps: int = 0  # all of them, or the joules are not those of the run
    start_seconds: float = 0.0  # of reading training text before step 0 (`methods.starts`)
    timed_tokens: int = 0  # of the steps that count for the speed
    timed_seconds: float = 0.0
    best_step: int = 0
    best_nll: float = math.inf  # mean nats per validation token
    memory: dict[str, Any] = field(default_factory=dict)  # of the step that was followed
    resumed_at: list[int] = field(default_factory=list)  # steps after which the run was cut
    validations: list[float] = field(default_factory=list)  # every nll so far, before step 1 first
    ended_by: str | None = None  # what ended the run before its steps, if anything did

    @property
    def tokens_per_second(self) -> float | None:
        """Return the predicted tokens per second over the timed steps."""
        return self.timed_tokens / self.timed_seconds if self.timed_tokens else None


def learning_rate(step: int, cfg: TrainConfig) -> float:
    """Rate of optimizer step `step` (from 0): linear warm-up to `lr`, then the schedule down to
    `min_lr_ratio` x `lr` at the last step.

    Of wsd (warm-up, stable, decay; Hu et al., arXiv 2404.06395) the last `cooldown` of the steps
    fall linearly, and those before them are at `lr`."""
    warmup = round(cfg.warmup * cfg.steps)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    if cfg.schedule == "constant":
        return cfg.lr
    if cfg.schedule == "wsd":
        falling = round(cfg.cooldown * cfg.steps)
        fallen = max(0, step - (cfg.steps - 1 - falling)) / max(1, falling)
        return cfg.lr * (1 - (1 - cfg.min_lr_ratio) * fallen)
    progress = (step - warmup) / max(1, cfg.steps - 1 - warmup)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if cfg.schedule == "cosine" else 1 - progress
    return cfg.lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * shape)


def blocks_per_rank(run: RunConfig, world: int) -> int:
    """Blocks of one optimizer step on one rank; the global batch does not depend on `world`."""
    blocks = run.train.batch_tokens // run.data.context_length
    if blocks % (run.train.micro_batch * world):
        raise ConfigError(
            f"train.batch_tokens={run.train.batch_tokens} is {blocks} blocks, which do not divide "
            f"among {world} processes of train.micro_batch={run.train.micro_batch}"
        )
    return blocks // world


def accumulate(
    prepared: nn.Module,
    batches: Iterable[Batch],
    num_tokens: float,
    accelerator: Accelerator,
    penalty: Callable[[], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Add the gradient of the mean nll over `num_tokens` tokens; returns their summed nats.

    Ranks average their gradients: with an equal share of all ranks' tokens as `num_tokens` the
    result is the gradient of the mean over all ranks. `penalty` is added to it, and what the
    adapter's method adds by itself (`NextToken.own_loss`), and not to what is returned.
    """
    total = torch.zeros((), device=accelerator.device)
    todo = list(batches)
    language_model: Any = accelerator.unwrap_model(prepared)
    if penalty is not None:  # first: the last backward pass is the one that ranks average after
        with accelerator.no_sync(prepared):
            accelerator.backward(penalty())
    for index, batch in enumerate(todo):
        last = index == len(todo) - 1
        with nullcontext() if last else accelerator.no_sync(prepared):
            nll = prepared(*batch.to(accelerator.device))
            objective = nll.objective / num_tokens
            if (own := language_model.own_loss()) is not None:  # of this pass, so a share of it
                objective = objective + own / len(todo)
            accelerator.backward(objective)
        total += nll.nats.sum()
        del nll
    return total


def apply(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    cfg: TrainConfig,
    stepped: Callable[[], None] | None = None,
) -> torch.Tensor:
    """Clip the gradients, step, call `stepped`, free them; returns the norm before clipping."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    norm = accelerator.clip_grad_norm_(trainable, cfg.max_grad_norm or math.inf)
    assert norm is not None
    norm = sharding.full_tensor(norm)
    optimizer.step()
    if stepped is not None:
        stepped()
    optimizer.zero_grad()
    return norm


@dataclass(frozen=True)
class Training:
    """Holds what a run trains, by what, and on which text; nothing of it is replaced meanwhile.

    Without an `optimizer` nothing trains. `penalty` is added to the mean nll in the gradient, and
    not in the loss that is logged. `after_step` gets the number of each step (from 0) once it is
    taken, while its gradients are there; `final_from` is how many steps are taken when what it
    changes is final, before which no validation chooses a checkpoint.
    """

    prepared: nn.Module  # a `NextToken`, as Accelerate prepared it
    data: Data
    run: RunConfig
    accelerator: Accelerator
    optimizer: torch.optim.Optimizer | None
    penalty: Callable[[], torch.Tensor] | None = None
    average: Average | None = None  # of what trains, which is evaluated in its place
    noise: Noise | None = None  # on the embeddings
    after_step: Callable[[int], None] | None = None
    final_from: int | None = None

    def takes_newest(self, state: State) -> bool:
        """Whether the newest weights count as the best: what the method changes is not final."""
        if self.final_from is None:
            return False
        return state.step < self.final_from or math.isinf(state.best_nll)


@dataclass(frozen=True)
class Hooks:
    """Holds what the loop calls on its way."""

    validate: Callable[[], float]  # mean nats per validation token
    keep: Callable[[], None]  # after the lowest of these so far
    save: Callable[[], None]  # where a checkpoint is due, and when the run is told to stop
    log: Callable[[dict[str, Any]], None]  # takes a row of metrics
    joules: Callable[[], float | None] = lambda: None  # of the machine's counters, if it has any


def optimizer_step(
    training: Training, step: int, micro_batch: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Take optimizer step `step` (from 0) in passes of `micro_batch` blocks.

    Returns:
        Summed nats of this rank, the gradient's norm, and how many tokens all ranks have predicted.

    Raises:
        PassOutOfMemoryError: a pass did not fit; the step can be taken again.
    """
    run, data, accelerator = training.run, training.data, training.accelerator
    optimizer = training.optimizer
    assert optimizer is not None
    world, rank = accelerator.num_processes, accelerator.process_index
    per_rank = blocks_per_rank(run, world)
    order = data.order(run.seed, step, per_rank * world)
    num_tokens = data.num_predicted(order)
    order = data.by_length(order[rank::world])
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, run.train) * group.get("lr_scale", 1.0)
    batches = [
        batch_of(data.blocks, order[first : first + micro_batch])
        for first in range(0, per_rank, micro_batch)
    ]
    if training.noise:
        training.noise.begin(step)
    try:
        total = accumulate(
            training.prepared, batches, num_tokens / world, accelerator, training.penalty
        )
    except Exception as error:
        if out_of_memory(error):  # nothing has moved yet: the step can be taken again
            raise PassOutOfMemoryError(f"{error} (in optimizer step {step + 1})") from error
        raise
    model = accelerator.unwrap_model(training.prepared)
    stepped = training.after_step and partial(training.after_step, step)
    norm = apply(model, optimizer, accelerator, run.train, stepped)
    if training.average:
        training.average.update()
    return total, norm, num_tokens


def train(
    training: Training, state: State, hooks: Hooks, stop: Stop, *, quiet: bool = False
) -> None:
    """Train what requires gradients from `state` on, which has all that moves.

    Without an optimizer validation is read once. `quiet` leaves out the bar.

    Raises:
        NonFiniteLossError: naming the step.
        Paused: at `launch.pause_at`, or beyond it already; a checkpoint has been written.
        KeyboardInterrupt: told to stop; a checkpoint has been written.
    """
    run, accelerator, optimizer = training.run, training.accelerator, training.optimizer
    cfg, world, average = run.train, accelerator.num_processes, training.average
    steps = cfg.steps if optimizer is not None else 0
    first = state.step
    model = accelerator.unwrap_model(training.prepared).model
    training.prepared.train()
    optimizers.start(optimizer)
    every = cfg.checkpoint_interval or run.evaluate.interval
    saved = state.step  # the step of the last checkpoint
    bar = tqdm(
        total=steps,
        initial=first,
        desc=run.method.name,
        unit="step",
        disable=quiet or not (sys.stderr.isatty() and accelerator.is_main_process),
        leave=False,
    )
    with stop.deferred(), bar:
        while True:
            ended = state.step == steps or state.ended_by is not None
            due = state.step % run.evaluate.interval == 0 or ended
            if due and state.validated < state.step:
                try:  # ranks must all do the same: they read validation to its end
                    averaged = average.in_model() if average else nullcontext()
                    with optimizers.evaluation(optimizer), averaged:
                        with stop.interruptible() if world == 1 else nullcontext():
                            nll = hooks.validate()
                        newest = state.step == 0 or training.takes_newest(state)
                        if newest or nll < state.best_nll:
                            state.best_step = state.step
                            state.best_nll = nll if math.isfinite(nll) else math.inf
                            hooks.keep()
                except KeyboardInterrupt:
                    if saved < state.step:
                        hooks.save()
                    raise
                hooks.log({"step": state.step, "tokens": state.tokens, "eval/validation/nll": nll})
                state.validated = state.step
                state.validations.append(nll)
                if not ended and ending.stops_early(state.validations, cfg.early_stopping):
                    state.ended_by, ended = "early_stopping", True
                if state.step:
                    hooks.save()
                    saved = state.step
            if ended:
                return
            if run.launch.pause_at is not None and state.step >= run.launch.pause_at:
                raise Paused  # validation was read, and so a checkpoint written
            stopping = stop.requested and world == 1
            if saved < state.step and (stopping or state.step % every == 0):
                hooks.save()
                saved = state.step
            if stopping:
                raise KeyboardInterrupt
            assert optimizer is not None
            joules_before = hooks.joules()
            start = time.perf_counter()
            follow = state.step == min(MEMORY_STEP, steps - 1)
            try:
                averages = average.held() if average else ()
                following = memory.measured(model, optimizer, state.memory, averages)
                with following if follow else nullcontext():
                    total, norm, num_tokens = optimizer_step(
                        training, state.step, state.micro_batch
                    )
            except PassOutOfMemoryError:
                fewer = run_config.smaller_micro_batch(run, state.micro_batch)
                if cfg.on_oom == "fail" or not fewer or world > 1:
                    raise
                logger.warning("out of memory: micro-batch %d, now %d", state.micro_batch, fewer)
                state.micro_batch = fewer
                optimizer.zero_grad()
                state.memory.clear()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            # The one place where the host waits for what the device has computed.
            stop_requested = torch.full_like(total, float(stop.requested))
            seconds = state.start_seconds + state.train_seconds + time.perf_counter() - start
            spent = torch.full_like(total, seconds)
            summed = accelerator.reduce(torch.stack([total, stop_requested, spent]), "sum")
            nats, asked_to_stop, spent_by_all, grad_norm = torch.cat(
                [summed, norm.reshape(1)]
            ).tolist()
            mean_nll = nats / num_tokens
            seconds = time.perf_counter() - start
            joules = hooks.joules()
            if joules is not None and joules_before is not None:
                state.train_joules += joules - joules_before
                state.metered_steps += 1
            if not math.isfinite(mean_nll):
                raise NonFiniteLossError(
                    f"the loss is {mean_nll} at step {state.step + 1} of {steps}"
                )
            if state.step >= first + WARM_UP_STEPS and not follow:
                state.timed_tokens += num_tokens
                state.timed_seconds += seconds
            rate = learning_rate(state.step, cfg)
            state.step += 1
            state.tokens += num_tokens
            state.train_seconds += seconds
            if state.step == training.final_from:  # what was best until now was another model
                state.best_nll = math.inf
            hooks.log(
                {
                    "step": state.step,
                    "tokens": state.tokens,
                    "train/nll": mean_nll,
                    "train/lr": rate,
                    "train/grad_norm": grad_norm,
                    "train/step_seconds": seconds,
                }
            )
            if cfg.max_seconds and spent_by_all / world >= cfg.max_seconds and state.step < steps:
                state.ended_by = "max_seconds"
            bar.update()
            bar.set_postfix_str(f"loss {mean_nll:.3f}, {num_tokens / seconds:,.0f} tokens/s")
            if world > 1 and asked_to_stop:  # every rank has read the same sum
                hooks.save()
                raise KeyboardInterrupt
