"""The training loop: the same for every method, since only `requires_grad` tells them apart."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from harness import memory
from harness.checkpoint import load_trained, save_trained
from harness.config import ConfigError, RunConfig, TrainConfig
from harness.data import Data, batch_of, block_order

WARM_UP_STEPS = 3  # not timed: allocators, caches and (if asked for) the compiler settle
MEMORY_STEP = 1  # (or the last) not timed: followed tensor by tensor; the optimizer has its state


class NonFiniteLossError(ArithmeticError):
    """The loss became NaN or infinite; the message names the step."""


@dataclass
class Trained:
    """What the loop leaves behind; the model holds the best checkpoint's weights."""

    steps: int = 0
    tokens: int = 0  # predicted tokens trained on
    train_seconds: float = 0.0  # wall time of all optimizer steps, evaluation excluded
    tokens_per_second: float | None = None  # over the timed steps
    best_step: int = 0
    best_nll: float = math.inf  # mean nats per validation token
    memory: dict[str, Any] = field(default_factory=dict)


def learning_rate(step: int, cfg: TrainConfig) -> float:
    """Rate of optimizer step `step` (from 0): linear warm-up to `lr`, then the schedule down to
    `final_lr` x `lr` at the last step."""
    warmup = round(cfg.warmup * cfg.steps)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    if cfg.schedule == "constant":
        return cfg.lr
    progress = (step - warmup) / max(1, cfg.steps - 1 - warmup)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if cfg.schedule == "cosine" else 1 - progress
    return cfg.lr * (cfg.final_lr + (1 - cfg.final_lr) * shape)


def make_optimizer(model: nn.Module, cfg: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over what trains; weight decay on matrices only, as is usual for GPT-2."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=cfg.lr,
        betas=(cfg.beta1, cfg.beta2),
        eps=cfg.eps,
        fused=True,
    )


def blocks_per_rank(run: RunConfig, world: int) -> int:
    """Blocks of one optimizer step on one rank; the global batch does not depend on `world`."""
    blocks = run.train.batch_tokens // run.data.context
    if blocks % (run.train.micro_batch * world):
        raise ConfigError(
            f"train.batch_tokens={run.train.batch_tokens} is {blocks} blocks, which do not divide "
            f"among {world} processes of train.micro_batch={run.train.micro_batch}"
        )
    return blocks // world


def accumulate(
    prepared: nn.Module,
    batches: Iterable[torch.Tensor],
    num_tokens: int,
    accelerator: Accelerator,
    penalty: Callable[[], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Add the gradient of the mean nll over `num_tokens` tokens; returns their summed nats.

    `batches` are micro-batches of blocks (B, T + 1), of which every id but a block's first is
    predicted. Ranks average their gradients: with a rank's own `num_tokens` the result is the
    gradient of the mean over all ranks. `penalty` is added to it, and not to what is returned.
    """
    total = torch.zeros((), device=accelerator.device)
    todo = list(batches)
    for index, blocks in enumerate(todo):
        last = index == len(todo) - 1
        with nullcontext() if last else accelerator.no_sync(prepared):
            blocks = blocks.to(accelerator.device)
            found = prepared(blocks[:, :-1], blocks[:, 1:])
            accelerator.backward(found.objective / num_tokens)
            if penalty is not None and last:
                accelerator.backward(penalty())
        total += found.nats.sum()
        del found
    return total


def apply(
    model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator, cfg: TrainConfig
) -> torch.Tensor:
    """Clip the gradients, step, free them; returns the norm before clipping."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    norm = accelerator.clip_grad_norm_(trainable, cfg.clip or math.inf)
    assert norm is not None
    optimizer.step()
    optimizer.zero_grad()
    return norm


def train(
    prepared: nn.Module,
    data: Data,
    run: RunConfig,
    accelerator: Accelerator,
    validate: Callable[[], float],
    log: Callable[[dict[str, Any]], None],
    step0_nll: float,
    best_path: Path,
    penalty: Callable[[], torch.Tensor] | None = None,
) -> Trained:
    """Train what requires gradients in a `NextToken`, as Accelerate prepared it; keep the best.

    Best is the lowest on validation. `validate` gives mean nats per validation token, `log` takes
    one row of metrics, `step0_nll` is the validation before the first step, `penalty` is added to
    the mean nll in the gradient (not in the loss that is logged). Returns with the best weights
    loaded into the model.

    Raises:
        NonFiniteLossError: naming the step.
    """
    cfg, world, rank = run.train, accelerator.num_processes, accelerator.process_index
    model = accelerator.unwrap_model(prepared).model
    out = Trained(best_nll=step0_nll)
    if cfg.steps == 0 or not any(p.requires_grad for p in model.parameters()):
        return out
    optimizer = accelerator.prepare_optimizer(make_optimizer(model, cfg))
    prepared.train()
    per_rank = blocks_per_rank(run, world)
    num_blocks = per_rank * world
    timed_tokens, timed_seconds = 0, 0.0
    if accelerator.is_main_process:
        save_trained(model, best_path)

    bar = tqdm(
        total=cfg.steps,
        desc=run.method.name,
        unit="step",
        disable=not (sys.stderr.isatty() and accelerator.is_main_process),
        leave=False,
    )
    for step in range(cfg.steps):
        start = time.perf_counter()
        order = block_order(run.seed, step, num_blocks, data.num_blocks)[rank::world]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg)
        follow = step == min(MEMORY_STEP, cfg.steps - 1)
        with memory.measured(model, optimizer, out.memory) if follow else nullcontext():
            total = accumulate(
                prepared,
                [
                    batch_of(data.blocks, order[first : first + cfg.micro_batch])
                    for first in range(0, per_rank, cfg.micro_batch)
                ],
                per_rank * run.data.context,
                accelerator,
                penalty,
            )
            norm = apply(model, optimizer, accelerator, cfg)
        # The one place where the host waits for what the device has computed.
        nats, grad_norm = torch.stack([accelerator.reduce(total, "sum"), norm]).tolist()
        mean_nll = nats / cfg.batch_tokens
        seconds = time.perf_counter() - start
        if not math.isfinite(mean_nll):
            raise NonFiniteLossError(f"the loss is {mean_nll} at step {step + 1} of {cfg.steps}")

        out.steps, out.tokens = step + 1, out.tokens + cfg.batch_tokens
        out.train_seconds += seconds
        if step >= WARM_UP_STEPS and not follow:
            timed_tokens, timed_seconds = timed_tokens + cfg.batch_tokens, timed_seconds + seconds
            out.tokens_per_second = timed_tokens / timed_seconds
        row: dict[str, Any] = {
            "step": out.steps,
            "tokens": out.tokens,
            "train/nll": mean_nll,
            "train/lr": learning_rate(step, cfg),
            "train/grad_norm": grad_norm,
            "train/step_seconds": seconds,
        }
        if out.steps % run.evaluate.every == 0 or out.steps == cfg.steps:
            nll_now = validate()
            row["eval/validation/nll"] = nll_now
            if nll_now < out.best_nll:
                out.best_step, out.best_nll = out.steps, nll_now
                if accelerator.is_main_process:
                    save_trained(model, best_path)
        log(row)
        bar.update()
        bar.set_postfix_str(f"loss {mean_nll:.3f}, {cfg.batch_tokens / seconds:,.0f} tokens/s")
    bar.close()
    accelerator.wait_for_everyone()
    load_trained(model, best_path)
    return out
