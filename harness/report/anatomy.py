"""What training added to the weights, for the page: from the files of `harness anatomy`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from harness.report.axes import OTHERS, Axes
from harness.report.figure import Figure, Series
from harness.report.sheet import Cell, Column, Sheet

FOLDER, FILE_NAME = "anatomy", "summary.csv"
ALL = "matrices"  # the weights of all matrices in the layers together
# quantity -> heading, format, and what it is
QUANTITIES = {
    "relative_change": ("|dW|/|W|", ".3f", "size of the change beside the weight's own"),
    "share": ("share", ".2f", "of the squared change of all weights"),
    "rank": ("rank", ".0f", "of dW, a mean over matrices"),
    "full_rank": ("of", ".0f", "the rank that dW could have had"),
    "effective_rank": ("effective", ".1f", "effective rank: exp of the entropy of its spectrum"),
    "stable_rank": (
        "stable",
        ".1f",
        "stable rank: sum of squared singular values by the largest",
    ),
    "r90": ("r90", ".1f", "the rank that holds 90 % of its energy"),
    "intruders": ("intruders", ".2f", "new directions among the first, a matrix"),
    "amplification": ("amplified", ".2f", "how much stronger the first directions of dW became"),
}
KINDS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", *OTHERS)


def find(folder: Path, names: Sequence[str]) -> pd.DataFrame | None:
    """The summary of an experiment's anatomy, of the rows `names`; None where there is none."""
    try:
        frame = pd.read_csv(folder / FOLDER / FILE_NAME)
    except (OSError, ValueError):
        return None
    needed = {"name", "of", "quantity", "mean", "low", "high", "count"}
    if not needed <= set(frame):
        return None
    frame = frame[frame["name"].isin(names)]  # others were deleted since, or have other names now
    return frame if len(frame) else None


def sheet(summary: pd.DataFrame) -> Sheet | None:
    """Sizes and ranks of what was added to the matrices of the layers, by configuration."""
    own = summary[summary["of"] == ALL]
    columns = [Column("name", "configuration", text=True)]
    columns += [Column(key, heading, why=why) for key, (heading, _, why) in QUANTITIES.items()]
    lines = []
    for name, rows in own.groupby("name", sort=False):
        known = {row["quantity"]: row for _, row in rows.iterrows()}
        line = [Cell(str(name), str(name))]
        for key, (_, form, _) in QUANTITIES.items():
            line.append(_cell(known[key], form) if key in known else Cell("-"))
        lines.append(line)
    if not lines:
        return None
    notes = [
        "Of the matrices in the layers, q, k and v apart; dW is what training added to a weight W. "
        + "; ".join(f"{heading}: {why}" for heading, _, why in QUANTITIES.values())
        + ". In brackets: the lowest and the highest seed.",
        f"Made by harness anatomy; every weight, layer and pair of runs is in {FOLDER}/.",
    ]
    return Sheet("What training added to the weights", columns, lines, notes)


def _cell(row: pd.Series, form: str) -> Cell:
    mean, low, high = (float(row[key]) for key in ("mean", "low", "high"))
    if math.isnan(mean):
        return Cell("-")
    shown = [format(value, form) for value in (mean, low, high)]
    return Cell(shown[0] if shown[1] == shown[2] else f"{shown[0]} ({shown[1]}-{shown[2]})", mean)


def figure(summary: pd.DataFrame) -> Figure | None:
    """In which kinds of weights the change is, as shares of its square."""
    shares = summary[(summary["quantity"] == "share") & (summary["of"] != ALL)]
    if shares.empty:
        return None
    table = shares.pivot_table(index="name", columns="of", values="mean", sort=False)
    names = [str(name) for name in table.index]
    kinds = list(dict.fromkeys(shares["of"]))
    series = [
        Series(str(kind), KINDS[i % len(KINDS)], names, [float(v) for v in table[kind].fillna(0)])
        for i, kind in enumerate(kinds)
    ]
    axes = Axes(
        "anatomy-share", "Where the change is", "", "share of the squared change of all weights",
        "bars", y_form=".2f",
    )  # fmt: skip
    parts = []
    for name in names[:4]:
        largest = table.loc[name].idxmax()
        parts.append(f"{name}: most in {largest} ({table.loc[name, largest]:.2f})")
    return Figure(axes, series, alt="; ".join(parts) + ".")
