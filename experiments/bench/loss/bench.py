"""Head and cross-entropy together, forward and backward: ours by chunk size, and other ways.

    python experiments/bench/loss/bench.py                  # GPT-2's head on this CPU, 7 minutes
    python experiments/bench/loss/bench.py --device cuda    # and liger-kernel if it is installed

The head is frozen (LoRA) or trains (full fine-tuning). Ways alternate within a round; the table has
the median over rounds of each way's median, and the most memory that a pass takes beyond its
inputs. Every way's loss and gradient are compared with whole logits in fp32 first.

Writes results-DEVICE.csv beside this file.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.runs.worker_process import ALLOCATOR

if __name__ == "__main__" and not ALLOCATOR.items() <= os.environ.items():  # as a worker has it
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)

import torch
import torch.nn.functional as F

from harness.models import loss
from harness.results import environment
from harness.training import memory

HERE = Path(__file__).resolve().parent
WIDTH, VOCABULARY = 768, 50257
TOKENS = {"cpu": 2048, "cuda": 16384}
CHUNKS = {"cpu": (128, 256, 512, 2048), "cuda": (256, 1024, 2048, 4096, 8192, 16384)}
PRECISIONS = {"cpu": ("fp32",), "cuda": ("bf16", "fp32")}
REPEATS = {"cpu": 2, "cuda": 20}
Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def whole(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """All logits at once, the loss in fp32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def in_chunks_of(size: int) -> Way:
    """`harness.models.loss.linear_nll` with `size` tokens a chunk."""

    def way(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        before, loss.chunk_tokens = loss.chunk_tokens, lambda *_: size
        try:
            return loss.linear_nll(hidden, weight, targets).objective
        finally:
            loss.chunk_tokens = before

    return way


def ways(device: str) -> dict[str, Way]:
    """All that can be had here, by name."""
    found: dict[str, Way] = {"whole logits": whole}
    if device == "cuda":
        found["whole logits, compiled"] = torch.compile(whole)
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        found["torch linear_cross_entropy"] = lambda h, w, t: F.linear_cross_entropy(
            h, w, t, reduction="sum", options=options
        )
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        pass
    else:
        fused = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        found["liger"] = lambda h, w, t: fused(w, h, t)
    return found | {f"ours, {size} tokens": in_chunks_of(size) for size in CHUNKS[device]}


def one_pass(way: Way, inputs: list[torch.Tensor], bf16: bool) -> torch.Tensor:
    """Forward and backward; the loss."""
    hidden, weight, targets = inputs
    hidden.grad = weight.grad = None
    with torch.autocast(hidden.device.type, torch.bfloat16, enabled=bf16):
        objective = way(hidden, weight, targets)
    objective.backward()
    return objective.detach()


def peak_of(way: Way, inputs: list[torch.Tensor], bf16: bool) -> int:
    """Bytes that a pass takes beyond what is there before it."""
    hidden, weight, _ = inputs
    hidden.grad = weight.grad = None
    if hidden.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        one_pass(way, inputs, bf16)
        return torch.cuda.max_memory_allocated() - before
    there = torch.nn.ParameterList([hidden, weight])
    with memory.LiveTensors(there) as live:
        one_pass(way, inputs, bf16)
    return live.peak - sum(p.nbytes for p in there)


def seconds_of(way: Way, inputs: list[torch.Tensor], bf16: bool, repeats: int) -> float:
    """Median seconds of a pass, after one that is not timed."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        one_pass(way, inputs, bf16)
        if inputs[0].device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=TOKENS, default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", nargs="*", choices=("bf16", "fp32"), help="both on a GPU")
    asked = parser.parse_args()
    device = asked.device
    torch.set_num_threads(environment.usable_cores())
    rows: list[dict[str, Any]] = []
    for head in ("frozen", "trained"):
        for precision in asked.precision or PRECISIONS[device]:
            torch.manual_seed(0)
            hidden = torch.nn.Parameter(torch.randn(TOKENS[device], WIDTH, device=device))
            weight = torch.nn.Parameter(
                0.05 * torch.randn(VOCABULARY, WIDTH, device=device), head == "trained"
            )
            targets = torch.randint(0, VOCABULARY, hidden.shape[:1], device=device)
            inputs = [hidden, weight, targets]
            bf16 = precision == "bf16"
            exact = one_pass(whole, inputs, False).item()
            gradient = hidden.grad
            assert gradient is not None
            found = ways(device)
            times: dict[str, list[float]] = {name: [] for name in found}
            facts = {}
            for name, way in found.items():
                apart = abs(one_pass(way, inputs, bf16).item() / exact - 1)
                assert hidden.grad is not None
                off = ((hidden.grad - gradient).norm() / gradient.norm()).item()
                facts[name] = (apart, off, peak_of(way, inputs, bf16))
            for _ in range(asked.rounds):
                for name, way in found.items():
                    times[name].append(seconds_of(way, inputs, bf16, REPEATS[device]))
            for name, (apart, off, peak) in facts.items():
                rows.append(
                    {
                        "head": head, "precision": precision, "way": name,
                        "ms": round(1000 * statistics.median(times[name]), 3),
                        "peak_mib": round(peak / 2**20, 1),
                        "loss_apart": f"{apart:.1e}", "gradient_apart": f"{off:.1e}",
                    }
                )  # fmt: skip
                print("| " + " | ".join(map(str, rows[-1].values())) + " |", flush=True)
    with (HERE / f"results-{device}.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
