"""The two claims for which peaks are planned: memory, and what fits under a cap."""

from __future__ import annotations

import math
import statistics

from statements import (
    MIB,
    Claim,
    Runs,
    better,
    exact,
    perplexity,
    points,
    short,
    step_seconds,
    tested,
)

from harness import compose, plan
from harness.report.axes import CATEGORIES, Axes
from harness.report.figure import Figure, Series
from harness.report.table import Row
from harness.results.run_record import get

MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
CAPS = (24, 32, 48, 64, 96, 128, 192)  # MiB of live tensors
FAMILY = ("targets=all", "method=lora")


def peaks(*overrides: str, micro_batch: int, tokens: int | None = None) -> dict[str, float]:
    """MiB of live tensors of a training step by category, and `peak`, on fake tensors.

    `peak` covers evaluation, too, a block at a time.
    """
    batch = tokens or micro_batch * 256
    (run,) = compose(
        *overrides, f"train.micro_batch={micro_batch}", f"train.batch_tokens={batch}",
        "evaluate.batch_tokens=256",
    )  # fmt: skip
    found = plan(run)
    assert found is not None
    return {k: v / MIB for k, v in found.train["by_category"].items()} | {
        "peak": found.needed_bytes / MIB
    }


def memory(runs: Runs) -> Claim:
    """2. Memory by category, and the batch size at which the saving disappears."""
    full, lora, attn = runs.one("full"), runs.one("lora", 8), runs.one("lora", 8, "attn")
    settings = {
        "full": ("method=full",),
        "lora all r=8": (*FAMILY, "method.r=8"),
        "lora attn r=8": ("targets=attn", "method=lora", "method.r=8"),
    }
    planned = {
        name: {m: peaks(*overrides, micro_batch=m) for m in MICRO_BATCHES}
        for name, overrides in settings.items()
    }
    share = {
        name: [100 * found[m]["peak"] / planned["full"][m]["peak"] for m in MICRO_BATCHES]
        for name, found in planned.items()
    }
    over = [
        m for m, value in zip(MICRO_BATCHES, share["lora all r=8"], strict=True) if value >= 100
    ]

    def part(row: Row, *names: str) -> float:
        return sum(get(row.records[0], f"memory.by_category.{name}") for name in names) / MIB

    def peak(row: Row) -> float:
        return float(row.values["memory.peak_bytes"]) / MIB

    def both(*names: str) -> str:
        return f"{part(lora, *names):.1f} against {part(full, *names):.1f}"

    weights, state = ("frozen_weights", "trainable_weights"), "optimizer_state"
    kept = ", ".join(f"{value:.0f} % at {m}" for m, value in zip(
        MICRO_BATCHES, share["lora all r=8"], strict=True) if m in (1, 8, 64))  # fmt: skip
    full_64, lora_64, attn_64 = (
        runs.one(*what, steps=4, micro_batch=64)
        for what in (("full",), ("lora", 8), ("lora", 8, "attn"))
    )
    gone = f"before {over[0]} blocks a pass" if over else f"not up to {MICRO_BATCHES[-1]}"
    errors = [
        abs(record["predicted"]["peak_bytes"] / record["memory"]["peak_bytes"] - 1)
        for row in runs.rows for record in row.records if row.values["method.lr"]
    ]  # fmt: skip
    statements = [
        exact(
            "LoRA r=8 of every matrix needs less memory, 8 blocks a pass",
            f"{peak(lora):.0f} MiB against {peak(full):.0f} at the peak of a step",
            peak(lora) < peak(full), lora, full,
        ),
        exact(
            "what shrinks at that peak is the optimizer's state",
            f"MiB: optimizer state {both(state)}, weights {both(*weights)}, gradients "
            f"{both('gradients')}", part(lora, state) < 0.5 * part(full, state), lora, full,
        ),
        exact(
            "activations do not shrink", f"MiB: {both('activations')}",
            part(lora, "activations") >= part(full, "activations"), lora, full,
        ),
        exact(
            f"the saving disappears with the batch ({gone})",
            f"at 64 blocks a pass {peak(lora_64):,.0f} MiB against {peak(full_64):,.0f}; planned, "
            f"of full fine-tuning's peak: {kept} blocks",
            peak(lora_64) >= peak(full_64), lora_64, full_64,
        ),
        exact(
            "on attention alone less is kept for the backward pass, and the saving stays",
            f"{peak(attn):.0f} MiB against {peak(full):.0f} at 8 blocks, {peak(attn_64):,.0f} "
            f"against {peak(full_64):,.0f} at 64",
            peak(attn_64) < peak(full_64), attn, full, attn_64, full_64,
        ),
    ]  # fmt: skip
    lines = [points(n, n.split()[0], MICRO_BATCHES, values) for n, values in share.items()]
    at = (1, 8, 64)
    bars = [(f"{name}, {m} blocks", planned[name][m]) for m in at for name in settings]
    stacked = [
        Series(
            category.replace("_", " "), color, [name for name, _ in bars],
            [found[category] / found["peak"] * 100 for _, found in bars],
        )
        for category, color in CATEGORIES.items()
    ]  # fmt: skip
    return Claim(
        "It needs less memory", statements,
        [
            Figure(
                Axes("2-memory", "2. Peak memory and the batch", "blocks of 256 tokens a pass",
                     "peak, % of full fine-tuning's", log_x=True), lines,
            ),
            Figure(
                Axes("2-categories", "2. What the peak consists of", "", "% of the peak", "bars"),
                stacked,
            ),
        ],
        [f"Predicted peaks are those of `python -m harness.plan`: of the {len(errors)} runs that "
         f"train here, the measured peak is off by {max(errors):.2%} at most. The peak is in the "
         "backward pass, before most gradients are there; where several passes accumulate, full "
         "fine-tuning keeps its own from one to the next."],
    )  # fmt: skip


def scarcity(runs: Runs) -> Claim:
    """6. Perplexity under a cap on memory, and on time."""
    overrides = [
        (runs.one("full"), ("method=full",)),
        (runs.one("lora", 64), (*FAMILY, "method.r=64")),
        (runs.one("lora", 8), (*FAMILY, "method.r=8")),
        (runs.one("lora", 8, "attn"), ("targets=attn", "method=lora", "method.r=8")),
        (runs.one("udv-d", "full"), ("targets=all", "method=udv", "method.rank=full")),
    ]
    choices = [row for row, _ in overrides]
    names = [row.name for row in choices]
    called = {row.name: short(row) for row in choices}
    needs = {row.name: peaks(*o, micro_batch=1, tokens=2048)["peak"] for row, o in overrides}
    quality = {row.name: perplexity(row) for row in choices}
    full, low = names[0], names[1:]
    best_low = min(choices[1:], key=perplexity)
    fits = {cap: [name for name in names if needs[name] <= cap] for cap in CAPS}
    best = {cap: min(found, key=quality.__getitem__) for cap, found in fits.items() if found}
    caps = [
        f"{cap} MiB: {called[best[cap]]} ({quality[best[cap]]:.1f})"
        if cap in best
        else f"{cap} MiB: nothing"
        for cap in CAPS
    ]
    measured, processes = [], []
    for row in (runs.one("full", micro_batch=1), runs.one("lora", 8, micro_batch=1)):
        processes.append(float(row.values["memory.process_peak_bytes"] or 0) / MIB)
        twin = runs.one(row.values["method.label"], row.values["method.rank"])
        seeds = [r["config"]["seed"] for r in twin.records]
        same = twin.records[seeds.index(row.records[0]["config"]["seed"])]
        measured.append(
            f"{row.values['method.label']} {float(row.values['memory.peak_bytes']) / MIB:.0f} MiB, "
            f"perplexity {perplexity(row):.2f} (8 blocks a pass: "
            f"{same['quality']['test']['perplexity']:.2f})"
        )  # fmt: skip
    statements = [
        exact(
            "where memory is scarce LoRA fits and full fine-tuning does not",
            f"one block a pass: full fine-tuning {needs[full]:.0f} MiB, LoRA r=64 "
            f"{needs[low[0]]:.0f}, r=8 {needs[low[1]]:.0f}, of attention alone {needs[low[2]]:.0f}",
            max(needs[name] for name in low[:3]) < needs[full], *choices[:4],
        ),
        better("where full fine-tuning fits, it is better than any of them", choices[0], best_low),
    ]  # fmt: skip
    series = {}
    for label, rank in (("full", None), ("lora", 64)):
        members = [runs.one(label, rank, steps=steps) for steps in (20, 80, 240)]
        seconds = {r.name: statistics.fmean(step_seconds(r)) * s
                   for r, s in zip(members, (20, 80, 240), strict=True)}  # fmt: skip
        name = label if rank is None else f"{label} r={rank}"

        def taken(row: Row, seconds: dict[str, float] = seconds) -> float:
            return seconds[row.name]

        series[name] = tested(name, members, taken)
    for index, steps in enumerate((20, 80, 240)):
        own, others = (series[name].x[index] for name in ("lora r=64", "full"))
        low_rank, whole = runs.one("lora", 64, steps=steps), runs.one("full", steps=steps)
        said = f"after {steps} steps ({own:.0f} s, full {others:.0f} s)"
        statements.append(
            better(
                f"where time is scarce, {said}, LoRA r=64 is ahead"
                if steps == 20
                else f"{said} LoRA r=64 is ahead",
                low_rank,
                whole,
            )
        )
    # How many times the steps LoRA would need: log-perplexity falls by log(steps) on a line.
    early, later = (math.log(perplexity(runs.one("lora", 64, steps=steps))) for steps in (20, 80))
    slope = (early - later) / math.log(80 / 20)
    shorter = math.exp((early - math.log(perplexity(runs.one("full", steps=20)))) / slope)
    memory_axes = Axes(
        "6-memory", "6. Perplexity under a cap on memory", "MiB of live tensors, one block a pass",
        "test perplexity", log_y=True,
    )  # fmt: skip
    by_label = [
        points(
            called[row.name],
            row.values["method.label"],
            [needs[row.name]],
            [quality[row.name]],
            line=False,
        )
        for row in choices
    ]
    time_axes = Axes(
        "6-time", "6. Perplexity for a time", "seconds of optimizer steps, 20, 80 or 240",
        "test perplexity", log_y=True,
    )  # fmt: skip
    sizes = []
    for model in ("gpt2", "gpt2_medium", "gpt2_large", "gpt2_xl"):
        all_of_it, by_lora = (
            peaks(f"model={model}", *overrides, micro_batch=1)["peak"] / 1024
            for overrides in (("method=full",), (*FAMILY, "method.r=8"))
        )
        sizes.append(f"{model} {all_of_it:.1f} GiB against {by_lora:.1f}")
    again = [
        peaks(*overrides, "train.checkpointing=true", micro_batch=1, tokens=2048)["peak"]
        for overrides in (("method=full",), (*FAMILY, "method.r=8"))
    ]
    remarks = [
        "Time is that of equal steps, of which the statements give both methods' seconds. A "
        "shorter step is an advantage that this does not count: to be level after full "
        f"fine-tuning's 20, LoRA would need {shorter:.1f} times as many in that time, at what it "
        "gains between 20 and 80.",
        f"Best under a cap: {'; '.join(caps)}. That is one block a pass; with train.checkpointing "
        f"full fine-tuning would fit {again[0]:.0f} MiB, and LoRA r=8 {again[1]:.0f}. The caps are "
        "on live tensors. A process takes far more: the processes of these runs took "
        f"{min(processes):.0f} to {max(processes):.0f} MiB, so that no cap of this list could have "
        "been set on one.",
        f"One block a pass is the same step: {'; '.join(measured)}.",
        f"At GPT-2's own sizes, predicted, one block of 256 tokens: {', '.join(sizes)} (LoRA r=8 "
        "of every matrix). What a process takes beyond its live tensors comes on top.",
    ]
    return Claim(
        "Its advantage shows where resources are scarce and vanishes where they are plentiful",
        statements,
        [Figure(memory_axes, by_label), Figure(time_axes, list(series.values()))],
        remarks, 3,
    )  # fmt: skip
