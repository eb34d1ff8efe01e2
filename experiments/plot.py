"""A recorded experiment's figure, from its results.csv.

    python experiments/plot.py experiments/udv_rank

Reads `results.csv` in the folder, writes `figure.svg` and `figure.png` beside it. What is drawn for
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


def load(folder: Path) -> pd.DataFrame:
    """results.csv with short names, and the rank as a number (full rank: the model's width)."""
    table = pd.read_csv(folder / "results.csv")
    table["k"] = pd.to_numeric(table["method.rank"].replace("full", 256), errors="coerce")
    return table.rename(columns={"method.label": "method", "method.targets": "targets"})


def udv_rank(table: pd.DataFrame, axes: list[plt.Axes]) -> None:
    """Left: perplexity against k, before and after. Right: against trainable parameters."""
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


def truncation_curve(table: pd.DataFrame, axes: list[plt.Axes]) -> None:
    """Perplexity against the share of the rank kept, one line a kind of matrix."""
    names = {"c_attn": "q, k, v fused", "o": "attention output", "c_fc": "MLP in"}
    names |= {"c_proj": "MLP out", "all": "all together"}
    base = table[table.method == "none"][VALIDATION].iloc[0]
    palette = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000"]
    for (key, name), color in zip(names.items(), palette, strict=True):
        rows = table[table.targets == key].sort_values("k")
        axes[0].plot([*rows.k, 1], [*rows[VALIDATION], base], "o-", color=color, label=name)
    axes[0].axhline(base, color=COLORS["none"], linestyle="--", label="base")
    axes[0].set(yscale="log", xlabel="share of the rank kept", ylabel="validation perplexity")


def by_targets(table: pd.DataFrame, axes: list[plt.Axes]) -> None:
    """A point for each target set, best first."""
    rows = table.sort_values(TEST)
    names = rows.targets + ", r=" + rows["method.rank"].astype(str)
    axes[0].plot(rows[TEST], names, "o", color=COLORS["lora"])
    axes[0].invert_yaxis()
    axes[0].set(xlabel="test perplexity")


def by_parameters(table: pd.DataFrame, axes: list[plt.Axes]) -> None:
    """Perplexity against trainable parameters, a point a configuration."""
    trained = table[table[TRAINABLE] > 0].fillna({"targets": ""})
    for (method, targets), rows in trained.groupby(["method", "targets"]):
        rows = rows.sort_values(TRAINABLE)
        name = f"{method} {targets}".strip()
        marker = {"lstm_ends": "s", "lstm_core": "^"}.get(targets, "o")
        axes[0].plot(rows[TRAINABLE], rows[TEST], f"{marker}-", color=COLORS[method], label=name)
    axes[0].set(xscale="log", yscale="log", xlabel="trainable parameters", ylabel="test perplexity")


FIGURES = {
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
    draw(load(folder), list(axes[0]))
    for axis in axes[0]:
        if axis.get_yscale() == "log":  # 10, 20, 50, 100 and not powers of ten
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
