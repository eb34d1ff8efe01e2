"""The training step of this harness beside the HF Trainer with PEFT, on the same work.

    make bench                     # or: python experiments/bench/training_step/bench.py
    python experiments/bench/training_step/bench.py --device cuda

Every case runs in a process of its own, cases alternate within a round, and the table shows medians
over rounds: step time and tokens/s (medians of the timed steps), peak resident memory, peak of
live tensors, and the share of this machine's own GEMM rate, measured in the same process just
before. The losses of `--loss-steps` steps of both sides go to losses.csv. The harness runs with
the allocator settings that its worker gets. Both sides read the same tokens (the King James text)
in the same order, from the same random weights, with AdamW at a constant rate, no weight decay,
gradients clipped at 1. The Trainer runs with its defaults, which include the model's dropout of
0.1 and the GELU composed in Python; `trainer-nodropout` is it without dropout, for the loss.

On a GPU a step ends when the device has computed it, and memory is the allocator's: its peak within
a step (live_mib), and what it has reserved of the device (reserved_mib) in place of the process's.

Writes results.csv, or results-cuda.csv, beside this file.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SHAPES = {  # model overrides, vocabulary
    "gpt2": ({"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024}, 50257),
    "mini": ({"n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": 256}, 4096),
}
BATCHES = {  # blocks, tokens a block
    ("gpt2", "cpu"): (4, 512),
    ("gpt2", "cuda"): (32, 512),
    ("mini", "cpu"): (8, 128),
    ("mini", "cuda"): (8, 128),
}
STEPS = {("gpt2", "cpu"): 1, ("gpt2", "cuda"): 6, ("mini", "cpu"): 20, ("mini", "cuda"): 20}
ON_CPU = [  # shape, side, method, precision
    ("gpt2", "trainer", "lora", "fp32"),
    ("gpt2", "harness", "lora", "fp32"),
    ("gpt2", "trainer", "lora", "bf16"),
    ("gpt2", "harness", "lora", "bf16"),
    ("gpt2", "harness", "lora", "bf16-frozen"),
    ("gpt2", "trainer", "full", "fp32"),
    ("gpt2", "harness", "full", "fp32"),
    ("gpt2", "harness", "udv", "fp32"),
    ("mini", "trainer", "lora", "fp32"),
    ("mini", "harness", "lora", "fp32"),
]
ON_CUDA = [
    ("gpt2", "trainer", "lora", "fp32"),
    ("gpt2", "harness", "lora", "fp32"),
    ("gpt2", "trainer", "lora", "bf16"),
    ("gpt2", "harness", "lora", "bf16"),
    ("gpt2", "harness", "lora", "bf16-frozen"),
    ("gpt2", "harness", "lora", "bf16-compiled"),
    ("gpt2", "trainer", "full", "bf16"),
    ("gpt2", "harness", "full", "bf16"),
    ("gpt2", "harness", "udv", "bf16"),
    ("mini", "trainer", "lora", "fp32"),
    ("mini", "harness", "lora", "fp32"),
]
CASES = {"cpu": ON_CPU, "cuda": ON_CUDA}
LR, R = 1e-3, 8


def overrides(shape: str, method: str, precision: str, device: str) -> list[str]:
    """The harness's configuration of a case."""
    (sizes, vocab), (blocks, tokens) = SHAPES[shape], BATCHES[shape, device]
    found = [
        "model=gpt2_mini_init", f"model.name={shape}", f"model.architecture.vocab_size={vocab}",
        *(f"model.architecture.{key}={value}" for key, value in sizes.items()),
        f"data.context_length={tokens}", f"train.micro_batch={blocks}",
        f"train.batch_tokens={blocks * tokens}", f"method={method}",
        f"train.lr={LR}", "train.schedule=constant", "train.warmup=0",
        f"train.precision={precision.partition('-')[0]}",
    ]  # fmt: skip
    if method == "lora":
        found += [f"method.r={R}", "targets=c_attn"]
    if method == "udv":  # as many singular triplets as a quarter of the width, on every matrix
        found += [f"method.rank={sizes['n_embd'] // 4}", "targets=all"]
    if precision.endswith("-frozen"):
        found.append("model.frozen_dtype=bf16")
    if precision.endswith("-compiled"):
        found.append("train.compile=true")
    return found


def finished(device: str) -> float:
    """Now, when the device has done all that it was asked for; seconds."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def held(device: str) -> dict[str, int | None]:
    """The most memory so far: the process's, or what CUDA's allocator has reserved."""
    import torch

    from harness.training import memory

    if device == "cuda":
        return {"reserved_bytes": torch.cuda.max_memory_reserved()}
    return {"rss_bytes": memory.process_peak_bytes()}


def measure(
    shape: str, side: str, method: str, precision: str, *, device: str, steps: int
) -> dict[str, Any]:
    """One case in this process: the milliseconds of every step and the rest."""
    import torch
    from accelerate.utils import set_seed
    from hydra import compose, initialize_config_dir

    from harness.config import paths
    from harness.data import token_data
    from harness.models import pretrained
    from harness.results import environment
    from harness.runs import composition, flops

    torch.set_num_threads(environment.usable_cores())
    with initialize_config_dir(str(paths.CONF_DIR), version_base="1.3"):
        run = composition.from_hydra(compose("config", overrides(shape, method, precision, device)))
    model_config = pretrained.load_config(run.model)
    text = token_data.prepare(run.data, pretrained.load_tokenizer(run.model, model_config))
    blocks = [
        token_data.batch_of(
            text.blocks, token_data.block_order(0, step, run.train.micro_batch, text.num_blocks)
        )
        for step in range(steps)
    ]
    rate = flops.gemm_rate(run, model_config.hidden_size, precision.partition("-")[0], 1.0)
    set_seed(0)
    go = on_harness if side == "harness" else on_trainer
    found = go(run, model_config, blocks, device, dropout=0.1 if side == "trainer" else 0.0)
    return found | {"gemm_gflops": rate / 1e9}


def on_harness(
    run: Any, model_config: Any, blocks: list[Any], device: str, dropout: float
) -> dict[str, Any]:
    """As `harness.runs.worker` does it."""
    from accelerate import Accelerator

    from harness import methods
    from harness.models import pretrained, transformer_blocks
    from harness.models.next_token import NextToken
    from harness.runs import estimate
    from harness.training import loop, memory, optimizers

    bf16 = run.train.precision == "bf16"
    accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no", cpu=device == "cpu")
    model = methods.adapt(pretrained.load_model(run, model_config), run).to(accelerator.device)
    if run.train.compile:
        transformer_blocks.compile_blocks(model)
    prepared = accelerator.prepare_model(NextToken(model))
    optimizer = accelerator.prepare_optimizer(
        optimizers.make_optimizer(model, run.train, run.optimizer)
    )
    prepared.train()
    num_tokens = blocks[0].targets.numel()
    seconds, losses = [], []
    peaks = memory.ProcessPeaks("setup")
    peaks.turn("train")

    def step(batch: Any) -> None:
        start = time.perf_counter()
        total = loop.accumulate(prepared, [batch], num_tokens, accelerator)
        loop.apply(model, optimizer, accelerator, run.train)
        losses.append(total.item() / num_tokens)
        seconds.append(finished(device) - start)

    for batch in blocks:
        step(batch)
    most = held(device)
    live: dict[str, Any] = {}
    with memory.measured(model, optimizer, live):
        step(blocks[0])
    flops = estimate.predict(run, model_config, accelerator)
    return {
        **most,
        "seconds": seconds[:-1],
        "losses": losses[:-1],
        "live_bytes": live["peak_bytes"],
        "flops_per_token": flops.train_flops_per_token if flops else None,
        "tokens": num_tokens,
    }


def on_trainer(
    run: Any, model_config: Any, blocks: list[Any], device: str, dropout: float
) -> dict[str, Any]:
    """As a user of transformers and PEFT does it, with the Trainer's defaults."""
    import tempfile

    import peft
    import torch
    from torch.utils.data import Dataset
    from transformers import (
        AutoModelForCausalLM,
        GPT2Config,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from harness.training import memory

    fields = dict(run.model.architecture)
    fields.pop("model_type")
    drops: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    model = AutoModelForCausalLM.from_config(GPT2Config(**fields, **drops), dtype=torch.float32)
    if run.method.name == "lora":
        lora = peft.LoraConfig(
            r=R, lora_alpha=2 * R, target_modules=["c_attn"], fan_in_fan_out=True,
            task_type="CAUSAL_LM",
        )  # fmt: skip
        model = peft.get_peft_model(model, lora)
    # The model shifts the labels: every id but a block's first is predicted. The first is marked,
    # or the Trainer would count it when it divides by the number of targets.
    rows = [row for batch in [*blocks, blocks[0]] for row in batch.ids]

    class Rows(Dataset[Any]):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            labels = rows[index].clone()
            labels[0] = -100
            return {"input_ids": rows[index], "labels": labels}

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            texts: Any = self.train_dataset
            return torch.utils.data.SequentialSampler(texts)

    seconds: list[float] = []
    found: dict[str, Any] = {}
    peaks = memory.ProcessPeaks("setup")

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            peaks.turn("train")

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == len(blocks):  # one more, for the live tensors alone
                found.update(held(device))
                self.report: dict[str, Any] = {}
                self.live = memory.measured(kwargs["model"], kwargs["optimizer"], self.report)
                self.live.__enter__()
            self.start = finished(device)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seconds.append(finished(device) - self.start)
            if state.global_step == len(blocks) + 1:
                self.live.__exit__(None, None, None)
                found["live_bytes"] = self.report["peak_bytes"]

    with tempfile.TemporaryDirectory() as scratch:
        trainer = InOrder(
            model,
            TrainingArguments(
                scratch, per_device_train_batch_size=len(blocks[0].ids), max_steps=len(blocks) + 1,
                learning_rate=LR, lr_scheduler_type="constant", max_grad_norm=1.0,
                bf16=run.train.precision == "bf16", use_cpu=device == "cpu", report_to="none",
                save_strategy="no", logging_steps=1, disable_tqdm=True, seed=0,
            ),
            train_dataset=Rows(),
            callbacks=[Watch()],
        )  # fmt: skip
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return found | {
        "seconds": seconds[:-1],
        "losses": losses[:-1],
        "tokens": blocks[0].targets.numel(),
    }


def run_case(case: tuple[str, str, str, str], device: str, steps: int) -> dict[str, Any]:
    """A case in a process of its own."""
    from harness.runs.worker_process import ALLOCATOR

    side = case[1]
    environment = (ALLOCATOR if side == "harness" else {}) | dict(os.environ)
    asked = ["--case", *case, "--device", device, "--steps", str(steps)]
    done = subprocess.run(
        [sys.executable, __file__, *asked], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        sys.exit(f"{' '.join(case)} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="0: the losses alone")
    parser.add_argument("--steps", type=int, default=5, help="per process and round; 1 is warm-up")
    parser.add_argument("--loss-steps", type=int, default=20, help="0: leave the losses out")
    parser.add_argument("--device", choices=CASES, default="cpu")
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    device = asked.device
    if asked.case:
        print(json.dumps(measure(*asked.case, device=device, steps=asked.steps)))
        return
    cases = CASES[device]
    seen: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {case: [] for case in cases}
    for index in range(asked.rounds):
        for case in cases:
            seen[case].append(run_case(case, device, asked.steps * STEPS[case[0], device]))
            took = statistics.median(seen[case][-1]["seconds"][1:])
            print(f"round {index + 1}: {' '.join(case)}: {1000 * took:.1f} ms", flush=True)
        # The Trainer does the same work: its share counts the same FLOPs.
        flops = {
            (shape, method): results[0]["flops_per_token"]
            for (shape, side, method, _), results in seen.items()
            if side == "harness"
        }
        rows = [summary(case, found, flops[case[0], case[2]]) for case, found in seen.items()]
        write(rows, "" if device == "cpu" else f"-{device}")
    if asked.loss_steps:
        compare_losses(asked.loss_steps, device)


def compare_losses(steps: int, device: str) -> None:
    """losses.csv: every step's loss on both sides, and the largest relative difference."""
    rows = []
    for shape in SHAPES:
        peer, mine = (
            run_case((shape, side, "lora", "fp32"), device, steps)["losses"]
            for side in ("trainer-nodropout", "harness")
        )
        apart = [abs(a - b) / b for a, b in zip(mine, peer, strict=True)]
        print(f"{shape}: losses of {steps} steps differ by {max(apart):.1e} at most, relative")
        rows += [
            {"shape": shape, "step": i + 1, "trainer": f"{b:.8f}", "harness": f"{a:.8f}"}
            for i, (a, b) in enumerate(zip(mine, peer, strict=True))
        ]
    write_csv("losses.csv" if device == "cpu" else f"losses-{device}.csv", rows)


def summary(
    case: tuple[str, str, str, str], results: list[dict[str, Any]], flops: float
) -> dict[str, Any]:
    """Medians over rounds."""
    seconds = statistics.median(statistics.median(r["seconds"][1:]) for r in results)
    tokens = results[0]["tokens"]
    gemm = statistics.median(r["gemm_gflops"] for r in results)
    most = "rss" if "rss_bytes" in results[0] else "reserved"
    return {
        "shape": case[0], "side": case[1], "method": case[2], "precision": case[3],
        "step_ms": round(1000 * seconds, 1), "tokens_per_second": round(tokens / seconds, 1),
        f"{most}_mib": round(statistics.median(r[f"{most}_bytes"] for r in results) / 2**20),
        "live_mib": round(results[0]["live_bytes"] / 2**20),
        "gemm_gflops": round(gemm),
        "share_of_gemm": round(tokens * flops / seconds / gemm / 1e9, 3),
    }  # fmt: skip


def write_csv(name: str, rows: list[dict[str, Any]]) -> None:
    """The rows as a file beside this one."""
    with (HERE / name).open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write(rows: list[dict[str, Any]], suffix: str) -> None:
    """results.csv, and the table on the terminal with the ratios to the Trainer's first case."""
    write_csv(f"results{suffix}.csv", rows)
    most = next(name for name in rows[0] if name in ("rss_mib", "reserved_mib"))
    print("| " + " | ".join([*rows[0], "x tokens/s", f"x {most}"]) + " |")
    print("|" + " --- |" * (len(rows[0]) + 2))
    for row in rows:
        peer = next(
            other
            for other in rows
            if other["side"] == "trainer"
            and other["shape"] == row["shape"]
            and other["method"] == ("full" if row["method"] == "full" else "lora")
        )
        speed = row["tokens_per_second"] / peer["tokens_per_second"]
        memory = row[most] / peer[most]
        print("| " + " | ".join(map(str, [*row.values(), f"{speed:.2f}", f"{memory:.2f}"])) + " |")


if __name__ == "__main__":
    main()
