"""The seven claims as statements about the runs of experiment=claims, and the LSTM's in brief."""

from __future__ import annotations

import math
import statistics
from functools import partial

from statements import (
    MIB,
    Claim,
    Need,
    Runs,
    better,
    curve,
    exact,
    learning,
    peaks,
    perplexity,
    points,
    seconds_to,
    smaller,
    step_seconds,
    steps_to,
    tested,
)

from harness import stats
from harness.report import evidence
from harness.report.axes import CATEGORIES, Axes, color_of
from harness.report.figures import Figure, Series
from harness.report.table import Row

LEVELS = (100, 70, 45)  # validation perplexities to be reached
MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
CAPS = (24, 32, 48, 64, 96, 128, 192)  # MiB of live tensors
FAMILY = ("targets=all", "method=lora")


def parameters(runs: Runs) -> Claim:
    """1. Fewer parameters, and how many fewer at equal perplexity."""
    full, low = runs.one("full"), {r: runs.one("lora", r) for r in (1, 8, 64)}
    long = runs.one("lora", 64, steps=240)
    count = {row.name: float(row.values["parameters.trainable"]) for row in [full, *low.values()]}
    fewer = {r: count[full.name] / count[row.name] for r, row in low.items()}
    of_full = f"of {count[full.name]:,.0f}"
    said = [f"r={r} {count[row.name]:,.0f} ({fewer[r]:,.0f} times fewer)" for r, row in low.items()]
    statements = [
        exact(
            "LoRA of every matrix trains far fewer parameters", f"{', '.join(said)}, {of_full}",
            min(fewer.values()) > 1, full, *low.values(),
        ),
        better("at equal steps (80), LoRA r=64 gets below full fine-tuning", low[64], full),
        better(
            f"in three times its steps, LoRA r=64 does ({fewer[64]:.1f} times fewer parameters)",
            long, full,
        ),
        better(
            "in a quarter of its steps, full fine-tuning gets below LoRA r=64",
            runs.one("full", steps=20), low[64],
        ),
    ]  # fmt: skip

    def trainable(row: Row) -> float:
        return float(row.values["parameters.trainable"])

    series = []
    for steps, ranks in {20: (64,), 80: (1, 8, 64), 240: (64,)}.items():
        members = [runs.one("lora", r, steps=steps) for r in ranks]
        series.append(tested(f"lora, {steps} steps", members, trainable))
        members = [runs.one("full", steps=steps)]
        series.append(tested(f"full, {steps} steps", members, trainable, line=False))
    sooner = []
    for r, row in low.items():
        end = float(curve(row).nll.min(1).mean())
        steps_taken = [step for step in curve(full).steps_to(end) if step is not None]
        sooner.append(f"{statistics.fmean(steps_taken):.0f} (r={r}, {math.exp(end):.1f})")
    axes = Axes(
        "1-parameters", "1. Perplexity and trainable parameters", "trainable parameters",
        "test perplexity", log_x=True, log_y=True,
    )  # fmt: skip
    return Claim(
        "Low-rank adaptation trains far fewer parameters than full fine-tuning", statements,
        [Figure(axes, series)],
        [f"Equal perplexity the other way round: to where LoRA ends after 80 steps, full "
         f"fine-tuning takes {', '.join(sooner)} steps."],
    )  # fmt: skip


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
        return sum(row.records[0]["memory"]["by_category"][name] for name in names) / MIB

    def peak(row: Row) -> float:
        return float(row.values["memory.peak_bytes"]) / MIB

    weights, state = ("frozen_weights", "trainable_weights"), ("gradients", "optimizer_state")
    said = [
        f"{what} {part(lora, *names):.0f} against {part(full, *names):.0f}"
        for what, names in {"weights": weights, "gradients and optimizer": state,
                            "activations": ("activations",)}.items()
    ]  # fmt: skip
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
            "what shrinks is gradients and optimizer state; activations do not",
            f"MiB at that peak: {', '.join(said)}",
            part(lora, *state) < 0.5 * part(full, *state)
            and part(lora, "activations") >= part(full, "activations"), lora, full,
        ),
        exact(
            f"the saving disappears with the batch ({gone})",
            f"at 64 blocks a pass {peak(lora_64):,.0f} MiB against {peak(full_64):,.0f}",
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
         f"train here, the measured peak is off by {max(errors):.1%} at most."],
    )  # fmt: skip


def speed(runs: Runs) -> Claim:
    """3. Seconds a step, and seconds to a perplexity."""
    full = runs.one("full")
    others = {
        "r=8": runs.one("lora", 8), "r=1": runs.one("lora", 1), "r=64": runs.one("lora", 64),
        "r=8 of attention": runs.one("lora", 8, "attn"),
    }  # fmt: skip

    def a_step(row: Row) -> list[Need]:
        return [Need(seconds) for seconds in step_seconds(row)]

    statements = [
        smaller(f"a step of LoRA {name} is shorter", "seconds", row, full, a_step)
        for name, row in others.items()
    ]
    statements += [
        smaller(
            f"LoRA {name} gets to validation perplexity {level} sooner", "seconds", others[name],
            full, partial(seconds_to, level=level),
        )
        for level in LEVELS for name in ("r=64", "r=8")
    ]  # fmt: skip
    members = {"full": full} | {f"lora {name}": row for name, row in others.items()}
    figure = learning(
        "3-seconds", "3. Learning by time", "seconds of optimizer steps", members, "seconds"
    )
    return Claim(
        "It trains faster", statements, [figure],
        ["Seconds are of the median step of a run, so that what else the machine did now and then "
         "does not count; sooner is steps times that. The runs of a seed follow one another, and a "
         "machine that drifts meanwhile moves a step's ratio beyond its interval."],
    )  # fmt: skip


def iterations(runs: Runs) -> Claim:
    """4. Steps to a validation perplexity, each method at its own best rate."""
    full = runs.one("full")
    others = {f"r={r}": runs.one("lora", r) for r in (64, 8, 1)}
    statements = [
        smaller(
            f"LoRA {name} needs fewer steps to validation perplexity {level}", "steps", row, full,
            partial(steps_to, level=level),
        )
        for level in LEVELS for name, row in others.items()
    ]  # fmt: skip
    members = {"full": full} | {f"lora {name}": row for name, row in others.items()}
    figure = learning("4-steps", "4. Learning by steps", "steps of 2,048 tokens", members, "steps")
    return Claim("It needs fewer training iterations", statements, [figure])


def factors(runs: Runs) -> Claim:
    """5. W = U D V^T and training D alone."""
    none, truncated = runs.one("none"), runs.one("truncate", 64)
    whole, d, kept = (
        runs.one("udv-d", "full"), runs.one("udv-d", 64), runs.one("udv-d-keep", 64)
    )  # fmt: skip
    udv, udv_kept = runs.one("udv-udv", 64), runs.one("udv-udv-keep", 64)
    small, large = runs.one("lora", 1, "c_attn"), runs.one("lora", 64)
    statements = [
        better("training D alone adapts the model (full rank, 4,096 parameters)", whole, none),
        better("truncation to k=64 alone costs", none, truncated),
        better("D of k=64 wins back more than the truncation cost", d, none),
        better("D of k=64 with the residual kept adapts the model", kept, none),
        better("keeping the residual is better than dropping it (D, k=64)", kept, d),
        better("training U, D and V is better than D alone (k=64)", udv, d),
        better("keeping the residual is better, too, with U, D and V", udv_kept, udv),
        better(
            "D at full rank is better than LoRA at equal parameters (c_attn, r=1)", whole, small
        ),
        better("U, D and V of k=64 are better than LoRA at equal parameters (r=64)", udv, large),
        better("so they are with the residual kept", udv_kept, large),
    ]

    def trainable(row: Row) -> float:
        return float(row.values["parameters.trainable"])

    groups = {
        "D": [d, whole], "D, residual kept": [kept], "U, D and V": [udv],
        "U, D and V, residual kept": [udv_kept], "LoRA": [small, runs.one("lora", 1), large],
    }  # fmt: skip
    series = [tested(name, members, trainable) for name, members in groups.items()]
    references = [
        ("base model", color_of("none"), perplexity(none)),
        ("truncated, k=64", color_of("truncate"), perplexity(truncated)),
    ]
    axes = Axes(
        "5-factors", "5. U D V^T and LoRA", "trainable parameters", "test perplexity", log_x=True,
        log_y=True,
    )  # fmt: skip
    return Claim(
        "Writing W = U D V^T and updating only D by gradient descent adapts the model", statements,
        [Figure(axes, series, references)],
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
    needs = {row.name: peaks(*o, micro_batch=1, tokens=2048)["peak"] for row, o in overrides}
    quality = {row.name: perplexity(row) for row in choices}
    full, low = names[0], names[1:]
    best_low = min(choices[1:], key=perplexity)
    fits = {cap: [name for name in names if needs[name] <= cap] for cap in CAPS}
    best = {cap: min(found, key=quality.__getitem__) for cap, found in fits.items() if found}
    only_low = [cap for cap, found in fits.items() if found and full not in found]
    caps = [
        f"{cap} MiB: {best[cap]} ({quality[best[cap]]:.1f})"
        if cap in best
        else f"{cap} MiB: nothing"
        for cap in CAPS
    ]
    measured = []
    for row in (runs.one("full", micro_batch=1), runs.one("lora", 8, micro_batch=1)):
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
            "where memory is scarce only low-rank adaptation fits",
            f"full fine-tuning takes {needs[full]:.0f} MiB at least, LoRA r=64 "
            f"{needs[low[0]]:.0f}, r=8 {needs[low[1]]:.0f}, of attention alone {needs[low[2]]:.0f}",
            bool(only_low), *choices,
        ),
        better("where full fine-tuning fits, it is better than any of them", choices[0], best_low),
    ]  # fmt: skip
    series = {}
    for label, rank in (("full", None), ("lora", 64)):
        members = [runs.one(label, rank, steps=steps) for steps in (20, 80, 240)]
        seconds = {r.name: statistics.fmean(step_seconds(r)) * s
                   for r, s in zip(members, (20, 80, 240), strict=True)}  # fmt: skip
        name = label if rank is None else f"{label} r={rank}"
        series[name] = tested(name, members, lambda row, seconds=seconds: seconds[row.name])
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
    memory_axes = Axes(
        "6-memory", "6. Perplexity under a cap on memory", "MiB of live tensors, one block a pass",
        "test perplexity", log_x=True, log_y=True,
    )  # fmt: skip
    by_label = [
        points(
            row.name, row.values["method.label"], [needs[row.name]], [quality[row.name]], line=False
        )
        for row in choices
    ]
    time_axes = Axes(
        "6-time", "6. Perplexity for a time", "seconds of optimizer steps, 20, 80 or 240",
        "test perplexity", log_x=True, log_y=True,
    )  # fmt: skip
    sizes = []
    for model in ("gpt2", "gpt2_medium", "gpt2_large", "gpt2_xl"):
        whole, lora = (
            peaks(f"model={model}", *overrides, micro_batch=1)["peak"] / 1024
            for overrides in (("method=full",), (*FAMILY, "method.r=8"))
        )
        sizes.append(f"{model} {whole:.1f} GiB against {lora:.1f}")
    remarks = [
        f"Best under a cap: {'; '.join(caps)}.",
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


def expressiveness(runs: Runs) -> Claim:
    """7. The gap to full fine-tuning by rank and amount of text, and forgetting."""
    statements, series = [], []
    shares = {1.0: "all of the text", 0.1: "a tenth of it", 0.01: "a hundredth of it"}
    for share, said in shares.items():
        full = runs.one("full", share=share)
        x, y, ends = [], [], []
        for r in (1, 8, 64):
            row = runs.one("lora", r, share=share)
            statements.append(
                better(f"with {said}, full fine-tuning is better than LoRA r={r}", full, row)
            )
            c = stats.compare(*(evidence.evaluation(of, "test") for of in (row, full)))
            x.append(float(r))
            y.append(c.difference)
            ends.append((c.low, c.high))
        series.append(Series(said, list(CATEGORIES.values())[len(series) + 1], x, y,
                             [e[0] for e in ends], [e[1] for e in ends], line=True))  # fmt: skip
    text = "docstrings_held_out"
    for share, said in ((1.0, "all"), (0.01, "a hundredth")):
        full = runs.one("full", share=share)
        for r in (1, 8, 64):
            row = runs.one("lora", r, share=share)
            statements.append(
                better(f"LoRA r={r} forgets less ({said} of the text)", row, full, on=text)
            )
    axes = Axes(
        "7-rank", "7. The gap to full fine-tuning", "rank r of LoRA on every matrix",
        "nats per token above full fine-tuning", log_x=True,
    )  # fmt: skip
    base = stats.compare(
        *(evidence.evaluation(runs.one(label), text) for label in ("full", "none"))
    )
    return Claim(
        "The low-rank constraint limits what the model can express", statements,
        [Figure(axes, series, [("full fine-tuning", color_of("full"), 0.0)])],
        [f"Forgetting is log-perplexity on held-out docstrings of the pretraining; full "
         f"fine-tuning on all of the text forgets {base.difference:.2f} nats per token "
         f"({base.low:.2f} to {base.high:.2f}).",
         "The hundredth is one draw of 11 chapters, the same for every seed: how much other "
         "chapters would move it is in no interval. The gap is that after 80 steps, which is not "
         "all that a rank can express: claim 1 has r=64 after 240."], 3,
    )  # fmt: skip


CLAIMS = (parameters, memory, speed, iterations, factors, scarcity, expressiveness)
