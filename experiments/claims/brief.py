"""The claims in brief on the small LSTM: statements about the runs of experiment=claims_lstm."""

from __future__ import annotations

from functools import partial
from typing import Any

from statements import MIB, Claim, Runs, a_step, better, exact, smaller, steps_to, trainable

from harness.report.table import Row

LEVEL = 100  # validation perplexity to be reached


def lstm(runs: Runs) -> Claim:
    """The same in brief: an LSTM of random weights."""

    def one(label: str, rank: Any = None, targets: str = "lstm") -> Row:
        return runs.one(label, rank, targets)

    full, lora, ends = one("full"), one("lora", 64), one("lora", 64, "lstm_ends")
    d, udv = one("udv-d", "full"), one("udv-udv", 64)
    count = [trainable(row) for row in (lora, full)]
    peak = [float(row.values["memory.peak_bytes"]) / MIB for row in (lora, full)]

    return Claim(
        "The small LSTM, from random weights",
        [
            exact("1. LoRA r=64 trains fewer parameters",
                  f"{count[0]:,.0f} against {count[1]:,.0f}", count[0] < count[1], lora, full),
            better("1. and gets lower in 80 steps", lora, full),
            better("1. LoRA r=64 of embedding and head alone gets lower", ends, full),
            exact("2. LoRA r=64 needs less memory", f"{peak[0]:.0f} MiB against {peak[1]:.0f}",
                  peak[0] < peak[1], lora, full),
            smaller("3. its step is shorter", "seconds", lora, full, a_step),
            smaller(f"4. LoRA of the ends needs fewer steps to validation perplexity {LEVEL}",
                    "steps", ends, full, partial(steps_to, level=LEVEL)),
            better("5. training D alone is better than LoRA r=64", d, lora),
            better("5. U, D and V of k=64 are better than LoRA r=64", udv, lora),
            better("7. full fine-tuning is better than LoRA of the ends", full, ends),
        ],
        [],
    )  # fmt: skip
