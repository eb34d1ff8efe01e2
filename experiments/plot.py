"""A recorded experiment's figure, from its csv files.

    python experiments/plot.py experiments/udv_rank

Reads the folder's records, writes `figure.svg` and `figure.png` beside them. What is drawn for
which experiment stands in FIGURES.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
import pandas as pd

mpl.use("Agg")
import matplotlib.pyplot as plt

from harness.report.axes import COLORS

TEST, STEP0 = "quality.test.perplexity", "quality.step0.validation.perplexity"
VALIDATION, TRAINABLE = "quality.validation.perplexity", "parameters.trainable"


PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000"]


def load(folder: Path) -> pd.DataFrame:
    """results.csv with short names, and the rank as a number (full rank: the model's width)."""
    table = pd.read_csv(folder / "results.csv")
    table["k"] = pd.to_numeric(table["method.rank"].replace("full", 256), errors="coerce")
    return table.rename(columns={"method.label": "method", "method.targets": "targets"})


def udv_rank(folder: Path, axes: list[plt.Axes]) -> None:
    """Left: perplexity against k, before and after. Right: against trainable parameters."""
    table = load(folder)
    left, right = axes
    for method in ("udv-d", "udv-d-keep", "udv-udv"):
        rows = table[table.method == method].sort_values("k")
        left.plot(rows.k, rows[VALIDATION], "o-", color=COLORS[method], label=method)
        if method == "udv-d":
            left.plot(rows.k, rows[STEP0], "o:", color=COLORS[method], label="truncated, step 0")
    for (method, targets), rows in table.dropna(subset="targets").groupby(["method", "targets"]):
        rows = rows.sort_values(TRAINABLE)
        name = method if targets == "all" else f"{method} on {targets}"
        style = "o-" if targets == "all" else "s"
        right.plot(rows[TRAINABLE], rows[VALIDATION], style, color=COLORS[method], label=name)
    for axis in axes:
        full = table[table.method == "full"][VALIDATION].iloc[0]
        axis.axhline(full, color=COLORS["full"], linestyle="--", label="full fine-tuning")
        axis.set(xscale="log", yscale="log", ylabel="validation perplexity")
    ranks = sorted(table.k[table.method == "udv-d"].astype(int))
    left.set_xticks(ranks, labels=[str(k) for k in ranks])
    left.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    left.set(xlabel="rank k (of 256)")
    right.set(xlabel="trainable parameters")


def truncation_curve(folder: Path, axes: list[plt.Axes]) -> None:
    """Perplexity against the share of the rank kept, one line a kind of matrix."""
    table = load(folder)
    names = {"c_attn": "q, k, v fused", "o": "attention output", "c_fc": "MLP in"}
    names |= {"c_proj": "MLP out", "all": "all together"}
    base = table[table.method == "none"][VALIDATION].iloc[0]
    for (key, name), color in zip(names.items(), PALETTE, strict=True):
        rows = table[table.targets == key].sort_values("k")
        axes[0].plot([*rows.k, 1], [*rows[VALIDATION], base], "o-", color=color, label=name)
    axes[0].axhline(base, color=COLORS["none"], linestyle="--", label="base")
    axes[0].set(yscale="log", xlabel="share of the rank kept", ylabel="validation perplexity")


def by_targets(folder: Path, axes: list[plt.Axes]) -> None:
    """A point for each target set, best first."""
    rows = load(folder).sort_values(TEST)
    names = rows.targets + ", r=" + rows["method.rank"].astype(str)
    axes[0].plot(rows[TEST], names, "o", color=COLORS["lora"])
    axes[0].invert_yaxis()
    axes[0].set(xlabel="test perplexity")


def by_parameters(folder: Path, axes: list[plt.Axes]) -> None:
    """Perplexity against trainable parameters, a point a configuration."""
    table = load(folder)
    trained = table[table[TRAINABLE] > 0].fillna({"targets": ""})
    for (method, targets), rows in trained.groupby(["method", "targets"]):
        rows = rows.sort_values(TRAINABLE)
        name = f"{method} {targets}".strip()
        marker = {"lstm_ends": "s", "lstm_core": "^"}.get(targets, "o")
        axes[0].plot(rows[TRAINABLE], rows[TEST], f"{marker}-", color=COLORS[method], label=name)
    axes[0].set(xscale="log", yscale="log", xlabel="trainable parameters", ylabel="test perplexity")


def of_search(folder: Path, axes: list[plt.Axes]) -> None:
    """Left: nll against the rate, a line an alpha. Right: how near searches come to the best."""
    left, right = axes
    grid = pd.read_csv(folder / "search_joint.csv")
    points = grid[(grid.targets == "all") & (grid["method.r"] == 8)]
    for alpha, color in zip(("0.25r", "2r", "16r"), PALETTE, strict=False):
        rows = points[points["method.alpha"] == alpha].sort_values("train.lr")
        left.plot(rows["train.lr"], rows.nll_at_27, "o-", color=color, label=f"alpha {alpha}")
    left.set(xscale="log", xlabel="learning rate", ylim=(4.85, 5.6))
    left.set(ylabel="validation nll, nats per token")
    rates = sorted(set(points["train.lr"]))
    left.set_xticks(rates, labels=[f"{rate:g}" for rate in rates])
    left.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    left.set_title("LoRA r=8, all matrices, 27 steps", fontsize=9)
    replays = pd.read_csv(folder / "replay-search_joint-untried.csv")
    plans = ["random", "tpe", "random + halving", "tpe + halving"]
    for plan, color in zip(plans, [PALETTE[0], PALETTE[1]] * 2, strict=True):
        rows = replays[replays.plan == plan].sort_values("share")
        right.errorbar(
            rows.share, rows.regret, rows.standard_error, capsize=2, color=color,
            fmt="o-" if "halving" in plan else "s:",
            label=plan.replace("tpe", "TPE").replace(" + ", " with "),
        )  # fmt: skip
    right.set(
        xlabel="share of the full grid's steps",
        ylabel="nats per token above the best",
        yscale="log",
    )
    right.yaxis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:g}"))
    right.set_title("searches over all 72 configurations", fontsize=9)


FIGURES = {
    "search": (of_search, 2),
    "udv_rank": (udv_rank, 2),
    "truncation_curve": (truncation_curve, 1),
    "targets_sweep": (by_targets, 1),
    "lstm_lora": (by_parameters, 1),
}


def main(folder: Path) -> None:
    """Draw and save the figure of a recorded experiment."""
    draw, panels = FIGURES[folder.name]
    plt.rcParams |= {"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "svg.hashsalt": "x"}
    figure, axes = plt.subplots(1, panels, figsize=(4.6 * panels, 3.4), squeeze=False)
    draw(folder, list(axes[0]))
    for axis in axes[0]:
        if (
            axis.get_yscale() == "log" and axis.get_ylim()[1] > 1
        ):  # 10, 20, 50, 100 and not powers of ten
            axis.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:g}"))
            axis.yaxis.set_minor_locator(mpl.ticker.NullLocator())
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / "figure.svg", metadata={"Date": None})
    figure.savefig(folder / "figure.png", dpi=160)


if __name__ == "__main__":
    if len(sys.argv) != 2 or Path(sys.argv[1]).name not in FIGURES:
        sys.exit(f"usage: python experiments/plot.py FOLDER, one of {', '.join(FIGURES)}")
    main(Path(sys.argv[1]))
