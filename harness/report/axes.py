"""What the figures are about, described once for the page, the files and W&B's dashboards.

Colours are those of Okabe and Ito (safe for the colour-blind) and a few more; a method has the same
one wherever it is shown.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

COLORS = {
    "full": "#D55E00", "lora": "#0072B2", "udv-d": "#009E73", "udv-udv": "#CC79A7",
    "udv-d-keep": "#56B4E9", "truncate": "#E69F00", "none": "#808080", "pissa": "#8C6BB1",
    "mica": "#A6761D", "lora_paper": "#C51B7D", "udv-u": "#4D9221", "udv-v": "#35978F",
}  # fmt: skip
OTHERS = ("#8C6BB1", "#A6761D", "#4D9221", "#B2182B", "#35978F", "#C51B7D")  # further methods
CATEGORIES = {  # of memory, from what stays to what comes and goes
    "frozen_weights": "#808080", "trainable_weights": "#0072B2", "optimizer_state": "#56B4E9",
    "gradients": "#E69F00", "activations": "#D55E00",
}  # fmt: skip
TEST = "test perplexity per token"


def color_of(label: str) -> str:
    """The colour of a method by its label; further methods may share one."""
    return COLORS.get(label) or OTHERS[zlib.crc32(label.encode()) % len(OTHERS)]


@dataclass(frozen=True)
class Axes:
    """What a figure is about, whatever draws it: here, on the page, or in a tracker's dashboard."""

    key: str  # file name
    title: str
    x: str
    y: str
    # points | bars (stacked, a series a part) | heat (a series a row) | parallel (lines that go
    # down through named scales, x from 0 to 1)
    kind: str = "points"
    log_x: bool = False
    log_y: bool = False
    # How the page writes values on them: d3's formats for what harness.results.numbers does.
    x_form: str = ""
    y_form: str = ",.2f"
    # The trackers' names of what it shows (summary, history or config.…), where they have it.
    metrics: tuple[str, ...] = ()  # x and y; of bars their parts
    group: str = ""  # what tells lines apart


PARAMETERS = Axes(
    "parameters", "Perplexity and trainable parameters", "trainable parameters", TEST, log_x=True,
    log_y=True, x_form=",.0f", metrics=("parameters/trainable", "test/perplexity"),
)  # fmt: skip
PEAK = Axes(
    "perplexity-memory", "Perplexity and peak memory", "peak of live tensors, MiB", TEST,
    log_y=True, x_form=",.0f", metrics=("memory/peak_gib", "test/perplexity"),
)  # fmt: skip
TIME = Axes(
    "perplexity-time", "Perplexity and training time", "seconds of optimizer steps", TEST,
    log_y=True, x_form=",.3~r", metrics=("speed/train_seconds", "test/perplexity"),
)  # fmt: skip
RANK = Axes(
    "rank", "Perplexity and rank", "rank: r of LoRA, k of U D V^T", TEST, log_x=True, log_y=True,
    metrics=("config.method.rank", "test/perplexity"), group="config.method.targets",
)  # fmt: skip
ALPHA = Axes(
    "alpha", "Perplexity and LoRA's scale", "alpha / r", TEST, log_x=True, log_y=True,
    metrics=("config.method.alpha", "test/perplexity"), group="config.method.r",
)  # fmt: skip
MEMORY = Axes(
    "memory", "Peak memory", "", "MiB of live tensors", "bars", y_form=",.0f",
    metrics=tuple(f"memory/{category}_gib" for category in CATEGORIES),
)  # fmt: skip
SPEED = Axes(
    "speed", "Speed of training", "", "tokens/s of optimizer steps", "bars", y_form=",.0f",
    metrics=("speed/tokens_per_second",),
)  # fmt: skip
TOKENS = Axes(
    "curves-tokens", "Learning over tokens", "tokens trained on", "validation perplexity",
    log_y=True, x_form=",.0f", metrics=("tokens", "eval/validation/perplexity"),
    group="config.method.label",
)  # fmt: skip
SECONDS = Axes(
    "curves-seconds", "Learning over seconds", "seconds of optimizer steps",
    "validation perplexity", log_y=True, x_form=",.3~r",
)  # fmt: skip
SPENT = Axes(
    "curves-flops", "Learning over FLOPs", "TFLOPs of optimizer steps", "validation perplexity",
    log_y=True, x_form=",.3~r",
)  # fmt: skip
COST_AXES = {"trainable parameters": PARAMETERS, "peak memory": PEAK, "training time": TIME}
TRACKED = (PARAMETERS, PEAK, TIME, RANK, ALPHA, MEMORY, SPEED, TOKENS)  # what trackers can draw
