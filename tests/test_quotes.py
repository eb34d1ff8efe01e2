"""Numbers that the pages quote, computed again from the records that they are quoted from.

A quote is a phrase of a page with a place for every number. The number is computed from a record,
put into its place, and the phrase must then be in the page. So a number that is changed in the page
fails, and so does a phrase that is rewritten without its quote.
"""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest

from harness.config import rates
from harness.config.paths import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "experiments" / "claims"))
import statements
import verdicts

EXPERIMENTS = REPOSITORY / "experiments"
TEST, VALIDATION = "quality.test.perplexity", "quality.validation.perplexity"
STEP0 = "quality.step0.validation.perplexity"
PEAK, PROCESS = "memory.peak_bytes", "memory.process_peak_bytes"
TRAINABLE, PERCENT = "parameters.trainable", "parameters.trainable_percent"


@cache
def records(file: str) -> list[dict[str, str]]:
    """The lines of a CSV under experiments/."""
    with (EXPERIMENTS / file).open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def cell(file: str, column: str, **where: str) -> float:
    """The number in `column` of the one line in which every column of `where` has its value."""
    names = {"label": "method.label", "targets": "method.targets", "rank": "method.rank",
             "alpha": "method.alpha", "lr": "method.lr", "text": "text"}  # fmt: skip
    found = records(file)
    for key, value in where.items():
        name = names.get(key, key) if names.get(key, key) in found[0] else key
        found = [line for line in found if line[name] == value]
    assert len(found) == 1, (file, where, len(found))
    return float(found[0][column])


def nats(file: str, column: str, one: dict[str, str], other: dict[str, str]) -> float:
    """Log of the ratio of two perplexities."""
    return math.log(cell(file, column, **one) / cell(file, column, **other))


def row(label: str, targets: str = "", rank: str = "", **more: str) -> dict[str, str]:
    """What tells a line of results.csv from the others."""
    return {"label": label, "targets": targets, "rank": rank, **more}


def line(number: int, column: str = TEST) -> float:
    """A number of a line of the claims' results.csv, as its page counts lines."""
    return float(records("claims/results.csv")[number - 2][column])


def pair(file: str, a: str, b: str, column: str = "difference_nats_per_token") -> float:
    """A number of a comparison on test."""
    return cell(file, column, a=a, b=b, text="test")


ALONE_KJV, A_TENTH, A_THIRD = "kjv", "kjv 9 + docstrings 1", "kjv 2 + docstrings 1"
DOCSTRINGS = "docstrings_held_out"


def replayed(label: str, text: str) -> float:
    """Perplexity on held-out docstrings after training on a text of the experiment replay."""
    column = f"quality.also.{DOCSTRINGS}.after.perplexity"
    return cell("replay/results.csv", column, label=label, also=f"data.name={text}")


def replay_pair(text: str, a: tuple[str, str], b: tuple[str, str]) -> tuple[float, float, float]:
    """Difference of a less b in nats per token, and its ends; each by its label and its text."""
    names = [f"{'full' if one == 'full' else 'lora all r=8'} text={of}" for one, of in (a, b)]
    columns = ("difference_nats_per_token", "low", "high")
    for sign, (first, second) in ((1, names), (-1, names[::-1])):
        lines = [line for line in records("replay/comparisons.csv") if line["text"] == text
                 and (line["a"], line["b"]) == (first, second)]  # fmt: skip
        if lines:
            middle, low, high = (sign * float(lines[0][column]) for column in columns)
            return (middle, low, high) if sign == 1 else (middle, high, low)
    raise AssertionError(names)


def kept(label: str, before: str, after: str) -> tuple[float, float, float]:
    """How much lower the nats on docstrings are with replay, and the ends of it."""
    return replay_pair(DOCSTRINGS, (label, before), (label, after))


def paid(label: str, text: str) -> tuple[float, float, float]:
    """How much higher the nats on the new text are with replay."""
    return replay_pair("test", (label, text), (label, ALONE_KJV))


def full_less_lora(full: str, lora: str, text: str = DOCSTRINGS) -> tuple[float, float, float]:
    """Full fine-tuning on one text less LoRA on another."""
    return replay_pair(text, ("full", full), ("lora", lora))


def step(side: str, method: str, precision: str, column: str, shape: str = "gpt2") -> float:
    """A number of the bench of the training step."""
    return cell("bench/training_step/results.csv", column, shape=shape, side=side, method=method,
                precision=precision)  # fmt: skip


def faster(method: str, here: str, there: str, shape: str = "gpt2") -> float:
    """Tokens a second of the harness over those of the Trainer."""
    return step("harness", method, here, "tokens_per_second", shape) / step(
        "trainer", method, there, "tokens_per_second", shape
    )


def leaner(method: str, here: str, there: str, shape: str = "gpt2") -> float:
    """Resident memory of the harness over that of the Trainer."""
    return step("harness", method, here, "rss_mib", shape) / step(
        "trainer", method, there, "rss_mib", shape
    )


def head(file: str, way: str, column: str, kind: str = "frozen", **more: str) -> float:
    """A number of the bench of the loss."""
    return cell(f"bench/loss/{file}.csv", column, head=kind, way=way, **more)


def aligned(way: str, column: str, kind: str = "frozen", rows: str = "aligned") -> float:
    """The same on the GPU, in bf16."""
    return head("h100", way, column, kind, precision="bf16", rows=rows)


def tuned(family: str, targets: str | None = None, rank: str | None = None, scale: Any = None):
    """An entry of the rates that were found."""
    found = [t for t in rates.read("gpt2_mini_kjv").tuned
             if (t.family, t.targets, t.rank) == (family, targets, rank)
             and scale in (None, t.scale)]  # fmt: skip
    assert len(found) == 1
    return found[0]


def times_full(*which: Any) -> float:
    """A tuned rate over full fine-tuning's."""
    return tuned(*which).lr / tuned("full").lr


def pretrained(path: str) -> float:
    """A number of the pretraining's result.json."""
    found = json.loads((EXPERIMENTS / "pretrain_gpt2_mini" / "result.json").read_text("utf-8"))
    for key in path.split("."):
        found = found[key]
    return float(found)


def nats_per_token(split: str) -> float:
    """Of the pretrained model."""
    quality = f"quality.{split}"
    return pretrained(f"{quality}.nll_nats") / pretrained(f"{quality}.num_tokens")


def smollm_gain() -> float:
    """Per cent of SmolLM2's gain on validation that is there after 15 of 30 steps."""
    nll = [float(point["validation_nll"]) for point in records("smollm2_kjv/curves.csv")]
    return 100 * (nll[0] - nll[1]) / (nll[0] - nll[2])


def e2e_gain() -> float:
    """Per cent of its gain on E2E that is there after 10 of 20 steps."""
    nll = [float(point["validation_nll"]) for point in records("smollm2_e2e/curves.csv")]
    return 100 * (nll[0] - nll[1]) / (nll[0] - nll[2])


def told_apart() -> tuple[int, int]:
    """Pairs of main_seeds that differ significantly, and all."""
    pairs = [p for p in records("main_seeds/comparisons.csv") if p["text"] == "test"]
    return sum(bool(p["better"]) for p in pairs), len(pairs)


def split(r: int) -> tuple[float, ...]:
    """Gap, rank and frozen parts of LoRA in nats, and these parts' share in %, all with ends."""
    (found,) = (s for s in records("main_seeds_control/decomposition.csv")
                if s["name"] == f"lora all r={r}")  # fmt: skip
    numbers = [float(value) for name, value in found.items() if name != "name"]
    return (*numbers[:9], *(100 * share for share in numbers[9:]))


EVERY, STEPS = 10, 80  # the records of steps: how often validation was read, and to which step


def need(steps: str) -> statements.Need:
    """What a run needs, between two readings, of its recorded steps on the line between them."""
    if not steps:
        return statements.Need(float(STEPS), is_bound=True)
    reached = EVERY * math.ceil(float(steps) / EVERY)
    return statements.Need(float(steps), least=reached - EVERY, most=reached)


def is_plain(name: str) -> bool:
    """Whether a row of the claims is of 80 steps with all of the text, 8 blocks a pass."""
    settings = {"data.train_share=1.0", "train.micro_batch=8", "train.steps=80"}
    return settings <= set(name.split())


def needs(name: str, level: int, file: str = "main_seeds_control", unit: str = "") -> Any:
    """A row as `statements.smaller` takes it: what its runs need to a validation perplexity.

    In seconds of the column `unit`, if that is given; of a step where the level is 0.
    """
    if file == "claims":
        found = [r for r in records(RUNS) if r["experiment"] == "claims"
                 and r["row"].startswith(f"{name} ") and is_plain(r["row"])]  # fmt: skip
    else:
        found = [r for r in records(f"{file}/steps.csv") if r["row"] == name]
    assert len(found) == 3, (name, len(found))
    return SimpleNamespace(
        name=name, records=[{"config": {"seed": int(r["seed"])}} for r in found],
        needs=[(need(r[f"steps_to_{level}"]) if level else statements.Need(1)).times(
            float(r[unit]) if unit else 1) for r in found],
        values={"method.name": name, "method.label": name, "method.rank": None},
    )  # fmt: skip


def ratio(one: str, other: str, level: int, file: str = "main_seeds_control", unit: str = ""):
    """What `experiments/claims` says today of the ratio of what two rows need."""
    rows = needs(one, level, file, unit), needs(other, level, file, unit)
    return statements.smaller("", "steps", *rows, lambda row: row.needs)


def ends(one: str, other: str, *more: Any) -> tuple[float, ...]:
    """The least and the greatest ratio, as it says them."""
    said = re.search(r"\(([\d.]+) to ([\d.]+|inf)\)", ratio(one, other, *more).numbers)
    return tuple(map(float, said.groups()))


def with_embeddings() -> tuple[float, ...]:
    """Test perplexities of LoRA r=1, 8 and 64 with the embeddings trained, and of full."""
    file, rates = "anatomy/results.csv", {"1": "0.008", "8": "0.008", "64": "0.004"}
    found = [cell(file, TEST, label="lora", rank=r, lr=lr) for r, lr in rates.items()]
    return (*found, cell(file, TEST, label="full"))


def gap(what: str) -> tuple[float, float, float]:
    """A difference of the anatomy, with its interval."""
    nats, low, high = (
        cell("anatomy/gaps.csv", name, what=what) for name in ("nats", "low", "high")
    )
    return nats, low, high


def with_embeddings_of(column: str, rank: str) -> float:
    """A number of LoRA that also trains the embeddings."""
    lr = {"1": "0.008", "8": "0.008", "64": "0.004"}[rank]
    return cell("anatomy/results.csv", column, label="lora", rank=rank, lr=lr)


def peak_with_embeddings(rank: str) -> float:
    """MiB of live tensors in a step of LoRA that also trains the embeddings."""
    return with_embeddings_of(PEAK, rank) / 2**20


def peak_of_full() -> float:
    """MiB of live tensors in a step of full fine-tuning."""
    return cell("anatomy/results.csv", PEAK, label="full") / 2**20


def forgotten_by(**which: str) -> float:
    """Nats per token of held-out docstrings since the base."""
    column = "quality.also.docstrings_held_out.after.perplexity"
    file = "anatomy/results.csv"
    return math.log(cell(file, column, **which) / cell(file, column, label="none"))


def saved_peaks() -> tuple[float, ...]:
    """Per cent of full fine-tuning's planned peak that LoRA r=8 saves, with 1, 8, 64 blocks."""
    shown = (REPOSITORY / page("claims")).read_text("utf-8")
    said = r"planned, of full fine-tuning's peak: (\d+) % at 1, (\d+) % at 8, (\d+) %"
    planned = re.search(said, shown)
    assert planned is not None
    return tuple(100 - float(percent) for percent in planned.groups())


def cut(rank: str) -> tuple[float, float, float]:
    """What full fine-tuning's update loses that is cut to a rank, the rest kept."""
    nats, low, high = (cell("anatomy/ranks.csv", name, rank=rank, beside="with")
                       for name in ("nats", "low", "high"))  # fmt: skip
    return nats, low, high


def share_frozen(
    steps: str, share: str, file: str = "decompositions-three-seeds", rank: str = "64"
) -> tuple[float, ...]:
    """Per cent of LoRA's gap that stays frozen, with its interval, in a setting."""
    (found,) = (line for line in records(f"claims_control/{file}.csv")
                if (line["steps"], line["train_share"], line["part"]) == (steps, share, "gap")
                and line["name"].startswith(f"lora all r={rank} "))  # fmt: skip
    return tuple(100 * float(found[f"share_frozen{end}"]) for end in ("", "_low", "_high"))


def between(name: str, level: int, file: str = "main_seeds_control") -> tuple[float, float]:
    """Between which readings a row gets to a level, in whatever seed."""
    least, most = zip(*(n.ends for n in needs(name, level, file).needs), strict=True)
    return min(least), max(most)


def read_between(names: Iterable[str], level: float) -> tuple[int, int]:
    """Between which readings the rows of main_seeds get to a level, from their least and most."""
    found = []
    for name in names:
        points = [p for p in records("main_seeds/curves.csv") if p["name"] == name]
        first, last = (
            next(i for i, p in enumerate(points) if float(p[f"validation_nll_{end}"])
                 <= math.log(level)) for end in ("low", "high"))  # fmt: skip
        found += [int(points[first - 1]["step"]), int(points[last]["step"])]
    return min(found), max(found)


FULL_STEPS, CONTROL_STEPS, R1, R8, R64 = (
    "full", "full-only-matrices", "lora all r=1", "lora all r=8", "lora all r=64",
)  # fmt: skip


def claim_4() -> list[statements.Statement]:
    """Its nine statements, LoRA r=64, 8 and 1 to 45, 70 and 100, as they would come out today."""
    return [ratio(row, "full", level, "claims") for level in (45, 70, 100)
            for row in (R64, R8, R1)]  # fmt: skip


def verdicts_of_claim_4() -> tuple[int, int]:
    """How many of them do not hold, and how many cannot be told."""
    found = statements.Claim("", claim_4(), []).verdicts()
    return found.count("does not hold"), found.count("cannot be told")


def claim_3() -> statements.Claim:
    """Its ten statements, as they would come out today."""
    unit = "median_step_seconds"
    a_step = [ratio(row, "full", 0, "claims", unit) for row in (R8, R1, R64, "lora attn r=8")]
    sooner = [ratio(row, "full", level, "claims", unit) for level in (45, 70, 100)
              for row in (R64, R8)]  # fmt: skip
    return statements.Claim("", [*a_step, *sooner], [])


def full_steps_to_the_lowest_of(r: int) -> tuple[int, int]:
    """Between which readings every seed of full fine-tuning gets to LoRA's last perplexity."""
    level = next(
        float(found[VALIDATION])
        for found in records("claims/results.csv")
        if found["name"].startswith(f"lora all r={r} ") and is_plain(found["name"])
    )
    points = [p for p in records("claims/figures.csv")
              if (p["figure"], p["series"]) == ("4-steps", "full")]  # fmt: skip
    above = [float(p["x"]) for p in points if float(p["low"]) > level]
    reached = [float(p["x"]) for p in points if float(p["high"]) <= level]
    return int(max(above)), int(min(reached))


def forgotten(label: str, rank: str = "") -> float:
    """Nats per token of the held-out docstrings since the base model."""
    path = "quality.also.docstrings_held_out.after.perplexity"
    targets = "all" if rank else ""
    after = cell(CONTROL, path, **row(label, targets, rank))
    return math.log(after / cell(SEEDS, path, **NONE))


@dataclass(frozen=True)
class Quote:
    """A phrase of a page with a place for every number, and how the numbers are computed."""

    page: str
    phrase: str
    numbers: Callable[[], Any]  # a number, or a tuple of them


SEEDS, RANKS, SHARES = "main_seeds/results.csv", "udv_rank/results.csv", "truncation_curve/"
RUNS, THIRD, SECOND = "claims/runs.csv", "main/results-tuned.csv", "main/results-with-udv.csv"
SHARES += "results.csv"
CONTROL, EQUAL = "main_seeds_control/results.csv", "equal_parameters/results.csv"
LSTM, TARGETS = "lstm_lora/results.csv", "targets_sweep/results.csv"
NONE, FULL = row("none"), row("full")
D64, D = row("udv-d", "all", "64"), row("udv-d", "all", "full")
INDEX = "experiments/README.md"


def page(name: str) -> str:
    """The page of an experiment."""
    return f"experiments/{name}/README.md"


QUOTES = (
    # README: its table is tests/test_readme.py's.
    Quote("README.md", "does much for {:,.0f} parameters", lambda: cell(SEEDS, TRAINABLE, **D)),
    # pretraining
    Quote(page("pretrain_gpt2_mini"), "{:.4f} nats per token of the test documents, perplexity "
          "{:.2f}, {:.3f} bits per byte",
          lambda: (nats_per_token("test"), pretrained(TEST),
                   pretrained("quality.test.bits_per_byte"))),
    Quote(page("pretrain_gpt2_mini"), "which chose the checkpoint, {:.4f} nats, {:.2f}, {:.3f}",
          lambda: (nats_per_token("validation"), pretrained(VALIDATION),
                   pretrained("quality.validation.bits_per_byte"))),
    Quote(page("pretrain_gpt2_mini"), "{:.1f} M tokens (three passes over 8.7 M tokens of "
          "docstrings) in {:.0f} minutes",
          lambda: (pretrained("speed.tokens") / 1e6, pretrained("speed.train_seconds") / 60)),
    Quote(INDEX, "{:.0f} M tokens in {:.0f} minutes: perplexity {:.2f} on test docstrings, {:.2f} "
          "on validation",
          lambda: (pretrained("speed.tokens") / 1e6, pretrained("speed.train_seconds") / 60,
                   pretrained(TEST), pretrained(VALIDATION))),
    # main
    Quote(INDEX, "full {:.1f}, LoRA r=64 on all {:.1f}, r=8 {:.1f} to {:.1f}; attention alone "
          "{:.1f}; D alone {:.1f} with {:.1f} % of the parameters",
          lambda: (cell(THIRD, TEST, **FULL), cell(THIRD, TEST, **row("lora", "all", "64")),
                   cell(THIRD, TEST, **row("lora", "all", "8", alpha="32.0")),
                   cell(THIRD, TEST, **row("lora", "all", "8", alpha="16.0")),
                   cell(THIRD, TEST, **row("lora", "attn", "8")), cell(THIRD, TEST, **D),
                   cell(THIRD, PERCENT, **D))),
    Quote(page("main"), "(alpha=1r {:.1f} to {:.1f}, MLP alone {:.1f} to {:.1f}, `c_attn` {:.1f} "
          "to {:.1f})",
          lambda: tuple(cell(file, TEST, **one) for one in (
              row("lora", "all", "8", alpha="8.0"), row("lora", "mlp", "8"),
              row("lora", "c_attn", "8")) for file in (SECOND, THIRD))),
    Quote(page("main"), "D alone at full rank takes test perplexity from {:.0f} to {:.1f} with "
          "{:,.0f} parameters, {:.1f} %, where LoRA r=1 needs {:,.0f} for {:.1f};",
          lambda: (cell(SECOND, TEST, **NONE), cell(SECOND, TEST, **D),
                   cell(SECOND, TRAINABLE, **D), cell(SECOND, PERCENT, **D),
                   cell(SECOND, TRAINABLE, **row("lora", "all", "1")),
                   cell(SECOND, TEST, **row("lora", "all", "1")))),
    Quote(page("main"), "costs so much ({:.0f} untrained) that D wins back no more than {:.0f}, "
          "where LoRA on attention alone reaches {:.1f}",
          lambda: (cell(SECOND, TEST, **row("truncate", "all", "64")), cell(SECOND, TEST, **D64),
                   cell(SECOND, TEST, **row("lora", "attn", "8")))),
    # main_seeds
    Quote(page("main_seeds"), "{} of {} pairs differ significantly", told_apart),
    Quote(page("main_seeds"), "Full fine-tuning is best ({:.1f}), LoRA r=64 on all matrices second "
          "({:.1f}, a fifth of the parameters)",
          lambda: (cell(SEEDS, TEST, **FULL), cell(SEEDS, TEST, **row("lora", "all", "64")))),
    Quote(INDEX, "[{} of {} pairs; not LoRA's alphas at r=8", told_apart),
    # main_seeds_control
    *(Quote(page("main_seeds_control"), f"| r={r}" + " | {:.3f} ({:.3f} to {:.3f})" * 3
            + " | {:.0f} % ({:.0f} to {:.0f}) |", lambda r=r: split(r)) for r in (1, 8, 64)),
    Quote(page("main_seeds_control"), "costs {:.3f} nats per token ({:.3f} to {:.3f})",
          lambda: split(64)[6:9]),
    Quote(page("main_seeds_control"), "{:.0f} % ({:.0f} to {:.0f}) of the gap of LoRA r=64, {:.0f} "
          "% ({:.0f} to {:.0f}) of the gap of r=8, and {:.0f} % ({:.0f} to {:.0f}) of the gap of "
          "r=1. The rest is the rank: {:.0f} %, {:.0f} % and {:.0f} %",
          lambda: (*split(64)[9:], *split(8)[9:], *split(1)[9:],
                   *(100 - split(r)[9] for r in (64, 8, 1)))),
    Quote(page("main_seeds_control"), "the control {:.2f}, full fine-tuning {:.2f}, LoRA {:.2f} to "
          "{:.2f}", lambda: tuple(forgotten(*which) for which in (
              ("full-only-matrices",), ("full",), ("lora", "1"), ("lora", "8")))),
    Quote(page("main_seeds_control"), "r=64 forgets {:.2f} less than the control ({:.2f} to {:.2f}",
          lambda: tuple(cell("main_seeds_control/comparisons.csv", name, text="docstrings_held_out",
                             a="full-only-matrices", b="lora all r=64")
                        for name in ("difference_nats_per_token", "low", "high"))),
    Quote(page("main_seeds_control"), "nats per token 5e-4 {:.3f}, 1e-3 {:.3f}, 2e-3 {:.3f}, "
          "**4e-3 {:.3f}**, 8e-3 {:.3f}",
          lambda: tuple(nll for _, nll in sorted(tuned("full-only-matrices").grid.items()))),
    Quote(page("main_seeds"), "{:.0f} % of the gap of LoRA r=64 to full fine-tuning is that "
          "embeddings, positions, norms and biases stay frozen, {:.0f} % of that of r=8, {:.0f} % "
          "of that of r=1", lambda: tuple(split(r)[9] for r in (64, 8, 1))),
    # anatomy and claims_control
    Quote("README.md", "Where they train too, r=1 has {:.2f}, r=8 {:.2f} and r=64 {:.2f}, beside "
          "{:.2f} of full", lambda: with_embeddings()),
    Quote(INDEX, "with them trained r=1 has {:.2f}, r=8 {:.2f}, r=64 {:.2f}, full {:.2f}",
          lambda: with_embeddings()),
    Quote(page("anatomy"), "Training the embeddings gives r=1 {:.3f} nats ({:.3f} to {:.3f}) and "
          "r=8 {:.3f} ({:.3f} to {:.3f})", lambda: (
              *gap("what training the embeddings gives LoRA r=1"),
              *gap("what training the embeddings gives LoRA r=8"))),
    Quote(page("anatomy"), "Cut to rank 64 it loses {:.3f} nats ({:.3f} to {:.3f}), to 8 {:.3f}, "
          "to 1 {:.3f}", lambda: (*cut("64"), cut("8")[0], cut("1")[0])),
    Quote(page("main_seeds_control"), "gives LoRA: {:.3f} nats at r=1, {:.3f} at r=8 and {:.3f} at "
          "r=64", lambda: tuple(gap(f"what training the embeddings gives LoRA r={r}")[0]
                                for r in (1, 8, 64))),
    Quote(page("claims_control"), "{:.0f} % ({:.0f} to {:.0f}) of the gap of LoRA r=64 stays with "
          "a tenth of the text, {:.0f} % ({:.0f} to {:.0f}) in 240 steps, and {:.0f} % ({:.0f} to "
          "{:.0f}) with a hundredth of it",
          lambda: (*share_frozen("80", "0.1"), *share_frozen("240", "1.0"),
                   *share_frozen("80", "0.01"))),
    Quote(page("claims_control"), "the shares of r=8 ({:.0f} % with a tenth, {:.0f} % with a "
          "hundredth) and of r=1 ({:.0f} % and {:.0f} %)",
          lambda: tuple(share_frozen("80", share, rank=rank)[0]
                        for rank in ("8", "1") for share in ("0.1", "0.01"))),
    Quote(page("claims"), "what stays frozen is {:.0f} % ({:.0f} to {:.0f}) of the gap of r=64 in "
          "240 steps and {:.0f} % ({:.0f} to {:.0f}) with a tenth",
          lambda: (*share_frozen("240", "1.0"), *share_frozen("80", "0.1"))),
    Quote(INDEX, "what stays frozen is {:.0f} % of r=64's gap in 240 steps, {:.0f} % with a tenth "
          "of the text, {:.0f} % with a hundredth", lambda: tuple(
              share_frozen(steps, share)[0]
              for steps, share in (("240", "1.0"), ("80", "0.1"), ("80", "0.01")))),
    Quote(page("claims_control"), "what stays frozen is {:.0f} % ({:.0f} to {:.0f}) of the gap of "
          "LoRA r=64 with a tenth of the text, {:.0f} % ({:.0f} to {:.0f}) in 240 steps",
          lambda: (*share_frozen("80", "0.1", "decompositions"),
                   *share_frozen("240", "1.0", "decompositions"))),
    Quote(INDEX, "have {:.1f}, between full ({:.1f}) and LoRA r=64 ({:.1f}): {:.0f} % of the gap "
          "of r=64 is what stays frozen, at full rank",
          lambda: (cell(CONTROL, TEST, label="full-only-matrices"),
                   cell(CONTROL, TEST, label="full"),
                   cell(CONTROL, TEST, **row("lora", "all", "64")),
                   split(64)[9])),
    Quote("README.md", "a step then takes {:.0f} to {:.0f} MiB, full fine-tuning's {:.0f}",
          lambda: (peak_with_embeddings("1"), peak_with_embeddings("64"), peak_of_full())),
    Quote(page("anatomy"), "{:.0f} MiB at the peak of a step against {:.0f}, since",
          lambda: (peak_with_embeddings("8"), peak_of_full())),
    *(Quote(page("anatomy"), f"| LoRA r={r} +embeddings | " + "{:,.0f} | {:.0f} |",
            lambda r=r: (with_embeddings_of(TRAINABLE, r), peak_with_embeddings(r)))
      for r in ("1", "8", "64")),
    Quote(page("anatomy"), "LoRA r=8 +embeddings, with {:.0f} % of full fine-tuning's trainable "
          "parameters", lambda: 100 * with_embeddings_of(TRAINABLE, "8")
          / cell("anatomy/results.csv", TRAINABLE, label="full")),
    Quote(page("anatomy"), "they make it worse, too, by {:.3f} ({:.3f} to {:.3f})", lambda: tuple(
        -n for n in (gap("positions, norms and biases, beside the matrices alone")[i]
                     for i in (0, 2, 1)))),
    Quote(page("anatomy"), "full {:.2f} (rate 0.002); full with matrices and embeddings {:.2f}, "
          "matrices alone {:.2f} (both 0.004), all but the embeddings {:.2f} (0.002); LoRA {:.2f} "
          "to {:.2f}; LoRA +embeddings {:.2f} (r=1), {:.2f} (r=8, both 0.008) and {:.2f} (r=64, "
          "0.004).", lambda: (
              *(forgotten_by(label=f"full{part}") for part in
                ("", "-only-embeddings+matrices", "-only-matrices",
                 "-only-biases+matrices+norms+positions")),
              *(forgotten_by(label="lora", rank=r, lr=lr)
                for r, lr in (("1", "0.04"), ("8", "0.02"))),
              *(forgotten_by(label="lora", rank=r, lr=lr)
                for r, lr in (("1", "0.008"), ("8", "0.008"), ("64", "0.004"))))),
    Quote(page("claims"), "LoRA r=8 saves {:.0f} % of full fine-tuning's peak with 1 block a pass, "
          "{:.0f} % with 8 and {:.0f} % with 64", saved_peaks),
    Quote(page("claims"), "of the gap of LoRA r=64, {:.3f} nats per token, {:.0f} % ({:.0f} to "
          "{:.0f}) is what stays frozen and {:.0f} % its rank; of r=8 {:.0f} and {:.0f} %, of r=1 "
          "{:.0f} and {:.0f} %",
          lambda: (split(64)[0], *split(64)[9:], 100 - split(64)[9],
                   *(n for r in (8, 1) for n in (split(r)[9], 100 - split(r)[9])))),
    Quote(page("claims"), "full fine-tuning is there between {:.0f} and {:.0f}, the control "
          "between {:.0f} and {:.0f}, LoRA r=64 between {:.0f} and {:.0f}, r=8 between {:.0f} and "
          "{:.0f}.", lambda: tuple(end for name in (FULL_STEPS, CONTROL_STEPS, R64, R8)
                                   for end in between(name, 45))),
    Quote(page("claims"), "than full fine-tuning (ratio {:.2f} to {:.2f}), so what stays frozen "
          "costs steps; r=8 needs more than the control ({:.2f} to {:.2f}), so its rank costs "
          "steps, too. Between r=64 and the control nothing can be told ({:.2f} to {:.2f})",
          lambda: (*ends(CONTROL_STEPS, FULL_STEPS, 45), *ends(R8, CONTROL_STEPS, 45),
                   *ends(R64, CONTROL_STEPS, 45))),
    Quote(page("main_seeds_control"), "needs more steps than full fine-tuning (ratio {:.2f} to "
          "{:.2f}), and r=8 more than the control ({:.2f} to {:.2f}). LoRA r=64 and the control "
          "get there between the same two readings ({:.2f} to {:.2f})",
          lambda: (*ends(CONTROL_STEPS, FULL_STEPS, 45), *ends(R8, CONTROL_STEPS, 45),
                   *ends(R64, CONTROL_STEPS, 45))),
    *(Quote(page("main_seeds_control"), f"| {name} |" + " {:.0f}-{:.0f} |" * 3,
            lambda name=name: tuple(end for level in (45, 70, 100) for end in between(name, level)))
      for name in (FULL_STEPS, CONTROL_STEPS, R8, R64)),
    Quote(page("main_seeds_control"), "| lora all r=1 | more than 80 |" + " {:.0f}-{:.0f} |" * 2,
          lambda: tuple(end for level in (70, 100) for end in between(R1, level))),
    Quote(page("main_seeds"), "full gets there between {:.0f} and {:.0f}, r=64 between {:.0f} and "
          "{:.0f}, r=8 between {:.0f} and {:.0f}, r=1 between {:.0f} and {:.0f}.",
          lambda: tuple(end for names in (("full",), (R64,),
                                          [f"{R8} alpha={a}" for a in (8, 16, 32)], (R1,))
                        for end in read_between(names, 70))),
    Quote(page("claims"), "{} of the statements of claim 4 do not hold and {} cannot be told, "
          "where the table says 8 and 1.", verdicts_of_claim_4),
    Quote(page("claims"), "to 45 LoRA r=64 (ratio {:.2f} to {:.2f}) and r=8 ({:.2f} to {:.2f}), to "
          "70 r=8 ({:.2f} or more) and r=1 ({:.2f} or more). To 70 r=64 ({:.2f} or more) cannot be "
          "told", lambda: (*ends(R64, "full", 45, "claims"), *ends(R8, "full", 45, "claims"),
                           *(ends(row, "full", 70, "claims")[0] for row in (R8, R1, R64)))),
    Quote(page("claims"), "Claim 3 keeps its verdicts, {} and {}.",
          lambda: tuple(claim_3().verdicts().count(verdict)
                        for verdict in ("cannot be told", "does not hold"))),
    Quote(page("claims"), "Seconds to 45 are {:.2f} to {:.2f} times full fine-tuning's with r=64 "
          "and {:.2f} to {:.2f} times with r=8",
          lambda: tuple(end for row in (R64, R8)
                        for end in ends(row, "full", 45, "claims", "median_step_seconds"))),
    Quote(page("claims"), "is between {} and {} steps (r=1), {} and {} (r=8), {} and {} (r=64)",
          lambda: tuple(end for r in (1, 8, 64) for end in full_steps_to_the_lowest_of(r))),
    Quote(INDEX, "(LoRA r=64 takes {:.2f} to {:.2f} times as many to validation perplexity 45)",
          lambda: ends(R64, "full", 45, "claims")),
    Quote(page("claims"), "better than LoRA r=1, 8 and 64 by {:.3f}, {:.3f} and {:.3f} nats",
          lambda: tuple(split(r)[3] for r in (1, 8, 64))),
    # replay
    Quote(page("replay"), "at perplexity {:.1f} on held-out docstrings where it ends at {:.1f} "
          "without, {:.3f} nats per token lower ({:.3f} to {:.3f}), for {:.3f} nats ({:.3f} to "
          "{:.3f}) on the King James text; with a third at {:.1f}, for {:.3f} ({:.3f} to {:.3f})",
          lambda: (replayed("full", A_TENTH), replayed("full", ALONE_KJV),
                   *kept("full", ALONE_KJV, A_TENTH), *paid("full", A_TENTH),
                   replayed("full", A_THIRD), *paid("full", A_THIRD))),
    Quote(page("replay"), "LoRA r=8: {:.1f} for {:.1f}, {:.3f} lower ({:.3f} to {:.3f}), for "
          "{:.3f} ({:.3f} to {:.3f}); with a third {:.1f}, for {:.3f} ({:.3f} to {:.3f})",
          lambda: (replayed("lora", A_TENTH), replayed("lora", ALONE_KJV),
                   *kept("lora", ALONE_KJV, A_TENTH), *paid("lora", A_TENTH),
                   replayed("lora", A_THIRD), *paid("lora", A_THIRD))),
    Quote(page("replay"), "forgets more ({:.3f} nats, {:.3f} to {:.3f})",
          lambda: full_less_lora(ALONE_KJV, ALONE_KJV)),
    Quote(page("replay"), "by {:.3f} (a tenth; {:.3f} to {:.3f}) and {:.3f} nats (a third; {:.3f} "
          "to {:.3f}), and is behind on the new text by {:.3f} and {:.3f}",
          lambda: (*full_less_lora(A_TENTH, A_TENTH),
                   *full_less_lora(A_THIRD, A_THIRD),
                   -full_less_lora(A_TENTH, A_TENTH, "test")[0],
                   -full_less_lora(A_THIRD, A_THIRD, "test")[0])),
    Quote(page("replay"), "with a tenth ({:.3f}, {:.3f} to {:.3f}), and is {:.3f} nats ahead",
          lambda: (*full_less_lora(A_THIRD, A_TENTH),
                   -full_less_lora(A_THIRD, A_TENTH, "test")[0])),
    Quote(INDEX, "{:.1f} instead of {:.1f} on held-out docstrings for {:.3f} nats on kjv (full), "
          "{:.1f} instead of {:.1f} for {:.3f} (LoRA r=8); a third: {:.1f} for {:.3f}, and {:.1f} "
          "for {:.3f}",
          lambda: (replayed("full", A_TENTH), replayed("full", ALONE_KJV), paid("full", A_TENTH)[0],
                   replayed("lora", A_TENTH), replayed("lora", ALONE_KJV), paid("lora", A_TENTH)[0],
                   replayed("full", A_THIRD), paid("full", A_THIRD)[0],
                   replayed("lora", A_THIRD), paid("lora", A_THIRD)[0])),
    # equal_parameters
    Quote(page("equal_parameters"), "has {:.1f} and LoRA r=1 on the MLP's last matrix in layers 1 "
          "to 3 ({:,.0f}) has {:.1f}, where D has {:.1f}. D is ahead of the better of the two by "
          "{:.3f} nats per token ({:.3f} to {:.3f}), of the other by {:.3f} ({:.3f} to {:.3f})",
          lambda: (cell(EQUAL, TEST, targets="o"), cell(EQUAL, TRAINABLE, targets="c_proj"),
                   cell(EQUAL, TEST, targets="c_proj"), cell(EQUAL, TEST, targets="all"),
                   *(pair("equal_parameters/comparisons.csv", other, "udv-d all k=full", name)
                     for other in ("lora c_proj r=1", "lora o r=2")
                     for name in ("difference_nats_per_token", "low", "high")))),
    Quote(INDEX, "{:.1f} against {:.1f} (r=1 on the MLP's last matrix of three layers) and {:.1f}",
          lambda: tuple(cell(EQUAL, TEST, targets=name) for name in ("all", "c_proj", "o"))),
    Quote(page("claims"), "{:.1f} against {:.1f} on the MLP's last matrix in layers 1 to 3 and "
          "{:.1f} on `o`",
          lambda: tuple(cell(EQUAL, TEST, targets=name) for name in ("all", "c_proj", "o"))),
    Quote(page("main"), "have {:.2f}, between full fine-tuning ({:.2f}) and LoRA r=64 ({:.2f})",
          lambda: (float(records("main/results-control.csv")[0][TEST]), cell(THIRD, TEST, **FULL),
                   cell(THIRD, TEST, **row("lora", "all", "64")))),
    # tune
    Quote(page("tune"), "LoRA's is {:.0f} times full fine-tuning's at r=8",
          lambda: times_full("lora", "all", "8", 2.0)),
    Quote(page("tune"), "{:.0f} times at r=1, and only {:.1f} times at r=64",
          lambda: (times_full("lora", "all", "1"), times_full("lora", "all", "64"))),
    Quote(page("tune"), "D alone wants {:.0f} times full fine-tuning's",
          lambda: times_full("udv-d", "all", "full")),
    Quote(page("tune"), "On the MLP twice the rate ends hardly below the start ({:.3f} against "
          "{:.3f}), at r=64 at {:.3f}, and on `c_attn` it still works ({:.3f})",
          lambda: (tuned("lora", "mlp", "8").grid[0.04], math.log(cell(SEEDS, STEP0, **NONE)),
                   tuned("lora", "all", "64").grid[0.01], tuned("lora", "c_attn", "8").grid[0.04])),
    Quote(INDEX, "LoRA's {:.0f} times full fine-tuning's at r=8, {:.0f} at r=1, {:.1f} at r=64; D "
          "alone {:.0f} times",
          lambda: (times_full("lora", "all", "8", 2.0), times_full("lora", "all", "1"),
                   times_full("lora", "all", "64"), times_full("udv-d", "all", "full"))),
    # truncation
    Quote(page("truncation_curve"), "validation perplexity goes from {:.2f} to {:.2f}, which is "
          "{:.2f} nats per token; with a quarter it is {:.0f} and with an eighth {:,.0f}",
          lambda: (cell(SHARES, VALIDATION, **NONE),
                   cell(SHARES, VALIDATION, **row("truncate", "all", "0.5")),
                   nats(SHARES, VALIDATION, row("truncate", "all", "0.5"), NONE),
                   cell(SHARES, VALIDATION, **row("truncate", "all", "0.25")),
                   cell(SHARES, VALIDATION, **row("truncate", "all", "0.125")))),
    Quote(page("truncation_curve"), "cheapest to truncate ({:.2f} at a quarter, {:.2f} at an "
          "eighth), the MLP's first matrix the most expensive ({:.2f} and {:.0f})",
          lambda: tuple(cell(SHARES, VALIDATION, **row("truncate", kind, share))
                        for kind in ("o", "c_fc") for share in ("0.25", "0.125"))),
    Quote(INDEX, "half the rank costs {:.2f} nats per token",
          lambda: nats(SHARES, VALIDATION, row("truncate", "all", "0.5"), NONE)),
    # udv_rank
    Quote(page("udv_rank"), "costs {:.2f} nats per token (validation perplexity {:.0f} to {:.0f}), "
          "and training its 1,024 diagonal elements wins back {:.2f} (to {:.0f}): hardly more. "
          "Beside the residual as many elements reach {:.0f}",
          lambda: (math.log(cell(RANKS, STEP0, **D64) / cell(RANKS, STEP0, **FULL)),
                   cell(RANKS, STEP0, **FULL), cell(RANKS, STEP0, **D64),
                   math.log(cell(RANKS, STEP0, **D64) / cell(RANKS, VALIDATION, **D64)),
                   cell(RANKS, VALIDATION, **D64),
                   cell(RANKS, VALIDATION, **row("udv-d-keep", "all", "64")))),
    Quote(page("udv_rank"), "it reaches {:.1f} on test with {:,.0f} elements, where LoRA r=1 on "
          "`c_attn` with as many reaches {:.1f}",
          lambda: (cell(RANKS, TEST, **D), cell(RANKS, TRAINABLE, **D),
                   cell(RANKS, TEST, **row("lora", "c_attn", "1")))),
    Quote(page("udv_rank"), "it has {:.1f} there ([main](../main/README.md), second record) and "
          "{:.1f} on `o`",
          lambda: (cell(SECOND, TEST, **row("lora", "c_attn", "8")),
                   cell(TARGETS, TEST, **row("lora", "o", "16")))),
    Quote(page("udv_rank"), "stays behind it: {:.1f} against {:.1f} at 0.52 M, {:.1f} against "
          "{:.1f} at 1.05 M; full fine-tuning {:.1f}",
          lambda: (cell(RANKS, TEST, **row("udv-udv", "all", "32")),
                   cell(RANKS, TEST, **row("lora", "all", "32")),
                   cell(RANKS, TEST, **row("udv-udv", "all", "64")),
                   cell(RANKS, TEST, **row("lora", "all", "64")), cell(RANKS, TEST, **FULL))),
    Quote(INDEX, "D at full rank has {:.1f} with {:,.0f} parameters, LoRA of c_attn with as many "
          "{:.1f}",
          lambda: (cell(RANKS, TEST, **D), cell(RANKS, TRAINABLE, **D),
                   cell(RANKS, TEST, **row("lora", "c_attn", "1")))),
    # targets
    Quote(page("targets_sweep"), "test perplexity {:.0f} for q or k, {:.1f} for q and v, {:.1f} "
          "for all four. Unlike there, the output matrix by itself ({:.1f})",
          lambda: tuple(cell(TARGETS, TEST, **row("lora", name, rank)) for name, rank in (
              ("q", "16"), ("qv", "8"), ("qkvo", "4"), ("o", "16")))),
    Quote(INDEX, "q and k are the wrong place ({:.0f} against {:.1f} for all four); o alone has "
          "{:.1f}",
          lambda: tuple(cell(TARGETS, TEST, **row("lora", name, rank)) for name, rank in (
              ("k", "16"), ("qkvo", "4"), ("o", "16")))),
    # lstm
    Quote(page("lstm_lora"), "test perplexity of {:.1f} with {:.1f} % of the parameters, lower "
          "than training everything ({:.1f})",
          lambda: (cell(LSTM, TEST, **row("lora", "lstm_ends", "64")),
                   cell(LSTM, PERCENT, **row("lora", "lstm_ends", "64")),
                   cell(LSTM, TEST, **FULL))),
    Quote(page("lstm_lora"), "({:,.0f}) and the 1,024 singular values ({:,.0f}) learn little: "
          "{:.2f} and {:.2f} of the {:.2f} nats per token",
          lambda: (cell(LSTM, TEST, **row("lora", "lstm_core", "64")),
                   cell(LSTM, TEST, **row("udv-d", "lstm", "full")),
                   nats(LSTM, TEST, NONE, row("lora", "lstm_core", "64")),
                   nats(LSTM, TEST, NONE, row("udv-d", "lstm", "full")),
                   nats(LSTM, TEST, NONE, FULL))),
    Quote(INDEX, "beats full training in 80 steps ({:.0f} against {:.0f})",
          lambda: (cell(LSTM, TEST, **row("lora", "lstm_ends", "64")), cell(LSTM, TEST, **FULL))),
    # SmolLM2 and E2E
    Quote(page("smollm2_kjv"), "from {:.1f} to {:.1f}: {:.3f} nats per token, {:.3f} to {:.3f} "
          "over documents, p = {:.3f}",
          lambda: (cell("smollm2_kjv/results.csv", TEST, label="none"),
                   cell("smollm2_kjv/results.csv", TEST, label="lora"),
                   *(float(records("smollm2_kjv/comparisons.csv")[0][name]) for name in (
                       "difference_nats_per_token", "low", "high", "p")))),
    Quote(page("smollm2_kjv"), "On validation {:.0f} % of the gain is there after the first 15 "
          "steps", smollm_gain),
    Quote(INDEX, "test perplexity from {:.1f} to {:.1f} with {:.2f} % of the parameters",
          lambda: (cell("smollm2_kjv/results.csv", TEST, label="none"),
                   cell("smollm2_kjv/results.csv", TEST, label="lora"),
                   cell("smollm2_kjv/results.csv", PERCENT, label="lora"))),
    Quote(page("smollm2_e2e"), "Of the gain in nats {:.0f} % came with the first ten", e2e_gain),
    Quote(page("smollm2_e2e"), "from {:.1f} to {:.2f}: {:.2f} nats per token",
          lambda: (cell("smollm2_e2e/results.csv", TEST, label="none"),
                   cell("smollm2_e2e/results.csv", TEST, label="lora"),
                   pair("smollm2_e2e/comparisons.csv", "none", "lora attn r=8"))),
    Quote(INDEX, "perplexity of the references from {:.1f} to {:.2f}; the base model says nothing, "
          "the adapted one writes sentences (BLEU {:.1f} on 21 prompts)",
          lambda: (cell("smollm2_e2e/results.csv", TEST, label="none"),
                   cell("smollm2_e2e/results.csv", TEST, label="lora"),
                   cell("smollm2_e2e/results.csv", "quality.generation.bleu", label="lora"))),
    Quote(page("e2e_methods"), "({:.2f}), LoRA r=8 of every matrix is second with {:.0f} % of the "
          "parameters ({:.2f}; {:.3f} nats per token, {:.3f} to {:.3f})",
          lambda: (cell("e2e_methods/results.csv", TEST, label="full"),
                   cell("e2e_methods/results.csv", PERCENT, label="lora"),
                   cell("e2e_methods/results.csv", TEST, label="lora"),
                   *(-pair("e2e_methods/comparisons.csv", "full", "lora all r=8", name)
                     for name in ("difference_nats_per_token", "high", "low")))),
    Quote(INDEX, "full {:.2f}, LoRA r=8 {:.2f}, D alone {:.2f} per token; by BLEU LoRA ({:.1f}) is "
          "ahead of full ({:.1f})",
          lambda: (*(cell("e2e_methods/results.csv", TEST, label=label)
                     for label in ("full", "lora", "udv-d")),
                   *(cell("e2e_methods/results.csv", "quality.generation.bleu", label=label)
                     for label in ("lora", "full")))),
    # the benches
    Quote(page("bench/training_step"), "LoRA's step in fp32 is {:.2f} times as fast",
          lambda: faster("lora", "fp32", "fp32")),
    Quote(page("bench/training_step"), "with {:.2f} of its resident memory. In bf16 it is {:.2f} "
          "times as fast as the Trainer's in bf16 with {:.2f} of its memory ({:.2f} with frozen "
          "weights in bf16)",
          lambda: (leaner("lora", "fp32", "fp32"), faster("lora", "bf16", "bf16"),
                   leaner("lora", "bf16", "bf16"), leaner("lora", "bf16-frozen", "bf16"))),
    Quote(page("bench/training_step"), "Full fine-tuning in fp32 is {:.2f} times as fast with "
          "{:.2f}", lambda: (faster("full", "fp32", "fp32"), leaner("full", "fp32", "fp32"))),
    Quote(page("bench/training_step"), "step runs at {:.0f} % of the rate",
          lambda: 100 * step("harness", "lora", "fp32", "share_of_gemm")),
    Quote(INDEX, "LoRA {:.2f} times as fast in fp32 with {:.2f} of the memory, {:.2f} times in "
          "bf16 with {:.2f}; {:.0f} % of the machine's GEMM rate",
          lambda: (faster("lora", "fp32", "fp32"), leaner("lora", "fp32", "fp32"),
                   faster("lora", "bf16", "bf16"), leaner("lora", "bf16", "bf16"),
                   100 * step("harness", "lora", "fp32", "share_of_gemm"))),
    Quote(page("bench/loss"), "256 tokens take {:.2f} of the memory of whole logits with a frozen "
          "head, {:.2f} with a trained one, and {:.2f} and {:.2f} of the time of torch's own",
          lambda: tuple(head("results-cpu", "ours, 256 tokens", column, kind)
                        / head("results-cpu", other, column, kind)
                        for other, column in (("whole logits", "peak_mib"),
                                              ("torch linear_cross_entropy", "ms"))
                        for kind in ("frozen", "trained"))),
    Quote(page("bench/loss"), "twice as many save {:.0f} % of the time with a frozen head, for "
          "{:.1f} times the memory",
          lambda: (100 - 100 * head("results-cpu", "ours, 512 tokens", "ms")
                   / head("results-cpu", "ours, 256 tokens", "ms"),
                   head("results-cpu", "ours, 512 tokens", "peak_mib")
                   / head("results-cpu", "ours, 256 tokens", "peak_mib"))),
    Quote(page("bench/loss"), "made ours {:.1f} times as fast",
          lambda: aligned("ours, 1024 tokens", "ms", rows="as they are")
          / aligned("ours, 1024 tokens", "ms")),
    Quote(page("bench/loss"), "{:.1f} times the memory (frozen head); larger chunks than ours save "
          "up to {:.0f} % (frozen) and {:.0f} % (trained), for {:.1f} to {:.0f} times the memory",
          lambda: (aligned("whole logits, compiled", "peak_mib")
                   / aligned("ours, 1024 tokens", "peak_mib"),
                   *(100 - 100 * aligned("ours, 16384 tokens", "ms", kind)
                     / aligned("ours, 1024 tokens", "ms", kind) for kind in ("frozen", "trained")),
                   aligned("ours, 2048 tokens", "peak_mib", "trained")
                   / aligned("ours, 1024 tokens", "peak_mib", "trained"),
                   aligned("ours, 16384 tokens", "peak_mib")
                   / aligned("ours, 1024 tokens", "peak_mib"))),
    Quote(INDEX, "whole logits, compiled, take {:.1f} of that",
          lambda: aligned("whole logits, compiled", "ms") / aligned("ours, 1024 tokens", "ms")),
    Quote(page("bench/prediction"), "the predicted peak of a training step is {:.3f} to {:.3f} of "
          "the measured one, and of evaluation {:.3f} to {:.3f}",
          lambda: tuple(extreme(float(r[f"{phase}_ratio"])
                                for r in records("bench/prediction/h100.csv"))
                        for phase in ("train", "evaluate") for extreme in (min, max))),
    Quote(page("bench/sweep_overhead"), "a run costs {:.2f} s beyond its optimizer steps and "
          "evaluation, {:.1f} times less than a plain process",
          lambda: (cell("bench/sweep_overhead/results.csv", "sweep_later_s", round="1"),
                   cell("bench/sweep_overhead/results.csv", "ratio", round="1"))),
    # claims: its page is written by experiments/claims/verdicts.py; here is what it says besides
    Quote(page("claims"), "the processes of these runs took {:.0f} to {:.0f} MiB",
          lambda: (line(15, PROCESS) / 2**20, line(9, PROCESS) / 2**20)),
    Quote(page("claims"), "at the peak of a step | 16, 8 |", tuple),
    Quote(page("claims"), "{:.0f} MiB against {:.0f} at the peak of a step",
          lambda: (line(16, PEAK) / 2**20, line(8, PEAK) / 2**20)),
    Quote(page("claims"), "{:.1f} against {:.1f}: +0.325 nats per token",
          lambda: (line(19), line(8))),
    Quote(page("claims"), "{:.1f} against {:.1f}: -0.193 nats per token",
          lambda: (line(27), line(25))),
    Quote(INDEX, "where live tensors must stay below {:.0f} MiB only LoRA fits",
          lambda: line(9, PEAK) / 2**20),
)  # fmt: skip


@cache
def text_of(name: str) -> str:
    """A page on one line."""
    return re.sub(r"\s+", " ", (REPOSITORY / name).read_text("utf-8"))


@pytest.mark.parametrize("quote", QUOTES, ids=lambda q: f"{q.page}: {q.phrase[:40]}")
def test_a_quoted_number_is_the_recorded_one(quote):
    numbers = quote.numbers()
    said = quote.phrase.format(*(numbers if isinstance(numbers, tuple) else (numbers,)))
    assert said in text_of(quote.page), f"{quote.page} does not say: {said}"


def test_claim_4_today_and_what_its_record_says():
    """The first statement makes its verdict; at 100 nothing is told, whichever row it is of."""
    claim = statements.Claim("", claim_4(), [])
    found = claim.verdicts()
    assert claim.verdict() == "does not hold" and len(found) == 9
    told = [(level, row) for (level, row), verdict in zip(
        [(level, row) for level in (45, 70, 100) for row in (R64, R8, R1)], found, strict=True)
        if verdict == "does not hold"]  # fmt: skip
    assert told == [(45, R64), (45, R8), (70, R8), (70, R1)]
    recorded = re.findall(r"^\| LoRA r=\d+ needs fewer steps .*?\| ([a-z ]+) \|",
                          (REPOSITORY / page("claims")).read_text("utf-8"), re.M)  # fmt: skip
    assert (recorded.count("does not hold"), recorded.count("cannot be told")) == (8, 1)


def test_what_was_found_later_is_on_the_page_of_the_record():
    """As `experiments/claims/verdicts.py` has it, which prints it with that record only."""
    shown = (REPOSITORY / page("claims")).read_text("utf-8")
    assert f"commit {verdicts.RECORD}," in shown
    assert verdicts.TODAY_SAID in shown and "(as stated; not the rank's doing) | 10" in shown
    for said in verdicts.TODAY:
        assert "\n".join(verdicts.item(said)) in shown
    for heading, paragraphs in {**verdicts.LATER, "": [verdicts.NO_CONTROL]}.items():
        assert f"\n## {heading}" in shown
        for paragraph in paragraphs:
            assert "\n".join(verdicts.wrapped(paragraph)) in shown


def test_a_number_that_is_another_would_be_seen():
    quote = next(q for q in QUOTES if q.numbers is smollm_gain)
    for value in (50.0, smollm_gain() - 1):
        assert quote.phrase.format(value) not in text_of(quote.page)


# Tables of the pages, and the file that each is of; the columns that are checked, by their heading.
TABLES = {
    "main": {10: "results.csv", 15: "results-tuned.csv", 1: "results-control.csv"},
    "equal_parameters": {3: "results.csv"}, "replay": {6: "results.csv"},
    "main_seeds": {15: "results.csv"}, "main_seeds_control": {5: "results.csv"},
    "udv_rank": {15: "results.csv"},
    "targets_sweep": {7: "results.csv"}, "lstm_lora": {8: "results.csv"},
    "truncation_curve": {26: "results.csv"}, "e2e_methods": {4: "results.csv"},
    "smollm2_kjv": {2: "results.csv"}, "smollm2_e2e": {2: "results.csv"},
}  # fmt: skip
COLUMNS: dict[str, Callable[[dict[str, str]], str]] = {
    "test": lambda r: f"{float(r[TEST]):.2f}",
    "validation": lambda r: f"{float(r[VALIDATION]):.2f}",
    "val": lambda r: f"{float(r[VALIDATION]):.2f}",
    "trainable": lambda r: f"{float(r[TRAINABLE]):,.0f}",
    "%": lambda r: f"{float(r[PERCENT]):.2f}",
    "peak MiB": lambda r: f"{float(r[PEAK]) / 2**20:,.0f}",
    "step 0": lambda r: f"{float(r[STEP0]):.2f}",
    "validation, step 0": lambda r: f"{float(r[STEP0]):.2f}",
    "validation at step 0": lambda r: f"{float(r[STEP0]):.2f}",
    **{label: lambda r, name=name: f"{float(r[f'quality.generation.{name}']):.2f}"
       for label, name in {"BLEU": "bleu", "NIST": "nist", "METEOR": "meteor",
                           "ROUGE-L": "rouge_l", "CIDEr": "cider"}.items()},
}  # fmt: skip


def tables(text: str) -> list[list[dict[str, str]]]:
    """The tables of methods of a page, as lines by heading."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        split = [[c.strip() for c in row.strip("|").split("|")] for row in block.splitlines()]
        if split[0][0] == "method" and len(split) > 2:
            found.append([dict(zip(split[0], row, strict=True)) for row in split[2:]])
    return found


@pytest.mark.parametrize(
    ("name", "length", "file"), [(n, k, f) for n, files in TABLES.items() for k, f in files.items()]
)
def test_a_table_of_a_page_is_of_its_record(name, length, file):
    """Every number of every line, as a set of lines: their order is the page's own."""
    shown = tables((EXPERIMENTS / name / "README.md").read_text("utf-8"))
    matching = [table for table in shown if len(table) == length]
    assert matching
    recorded = records(f"{name}/{file}")
    for table in matching[:1]:
        headings = [heading for heading in table[0] if heading in COLUMNS]
        assert "test" in headings
        lines = sorted(tuple(line[h] for h in headings) for line in table)
        assert lines == sorted(tuple(COLUMNS[h](r) for h in headings) for r in recorded)
