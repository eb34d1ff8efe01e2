"""Shows what `harness anatomy`, `compress` and `interpolate` found of an experiment's updates.

They leave files in the experiment's folder and in those of its runs; this reads them, and measures
nothing. An update is dW, what training has added to the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd

from harness.report import stats
from harness.report.axes import Axes, color_of
from harness.report.figure import Figure, Series
from harness.report.sheet import Cell, Column, Sheet
from harness.report.table import Row

SUMMARY = Path("anatomy") / "summary.csv"  # in the experiment's folder
COMPRESSED, INTERPOLATED = "compress.parquet", "interpolate.parquet"  # in a run's
MATRICES = "matrices"  # of the summary: all matrices in the layers
# quantity of the summary -> (heading, format, what it is)
QUANTITIES = {
    "relative_change": ("|dW|/|W|", ".3f", "Frobenius norms, over all matrices in the layers"),
    "rank": ("rank", ".0f", "singular values of dW above what rounding explains"),
    "full_rank": ("of", ".0f", "the rank that it could have had"),
    "effective_rank": ("effective", ".1f", "exp of the entropy of the singular values"),
    "stable_rank": ("stable", ".1f", "squared Frobenius norm over the largest squared value"),
    "r90": ("r90", ".1f", "rank at which 90 % of the squared norm is reached"),
    "intruders": ("intruders", ".2f", "first directions of W + dW that W has nothing alike of"),
    "amplification": ("amplified", ".2f", "size of dW over what W has in its directions"),
}
KINDS = (  # colours of the kinds of weights, in the order in which they come
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#8C6BB1", "#A6761D",
    "#4D9221", "#808080", "#B2182B", "#35978F",
)  # fmt: skip
COMPRESSION = Axes(
    "compress", "How much of an update is needed", "rank k of what is kept of dW",
    "{text} perplexity per token", log_x=True, log_y=True,
)  # fmt: skip


def sheet(rows: Sequence[Row]) -> Sheet | None:
    """The ranks of dW and what goes with them; None where `harness anatomy` has not been run."""
    known = _summary(rows)
    if known is None:
        return None
    names = list(dict.fromkeys(known[known["of"] == MATRICES]["name"]))
    columns = [Column("name", "configuration", text=True)]
    columns += [Column(key, heading, why=why) for key, (heading, _, why) in QUANTITIES.items()]
    lines = [
        [Cell(name, name), *(_cell(known, name, key, form) for key, (_, form, _) in
                             QUANTITIES.items())]
        for name in names
    ]  # fmt: skip
    note = (
        "Means over the matrices in the layers, lowest to highest seed in brackets: harness "
        "anatomy, whose summary.csv has every kind of weight."
    )
    return Sheet("What training added to the weights (dW)", columns, lines, [note])


def figures(rows: Sequence[Row]) -> list[Figure]:
    """The figures of what is there: shares by kind of weight, compression, interpolation."""
    found = [_shares(rows), _compressed(rows), *_interpolated(rows)]
    return [figure for figure in found if figure is not None]


def perplexities(
    documents: Sequence[pd.DataFrame], seeds: Sequence[int], by: Sequence[str]
) -> pd.DataFrame:
    """Perplexity, low and high (95 %) for every value of the columns `by`, in their order.

    `documents` holds a table for every seed with `by`, id, nll_nats and num_tokens. Ends are NaN
    where no interval can be given: one document, or one that has nearly all tokens.
    """
    kept = [*by, "id"]
    wanted = ["nll_nats", "num_tokens"]
    tables = [table.groupby(kept, sort=False)[wanted].sum().reset_index() for table in documents]
    rows = []
    for values, first in tables[0].groupby(list(by), sort=False):
        of_seed = [first]
        for table in tables[1:]:
            same = (table[list(by)] == list(values)).all(axis=1)
            of_seed.append(table[same])
        nll = np.stack([part["nll_nats"].to_numpy(np.float64) for part in of_seed])
        tokens = first["num_tokens"].to_numpy(np.int64)
        ids = tuple(first["id"].astype(str))
        evaluation = stats.Evaluation("it", nll, tokens, tuple(seeds), ids, {})
        value = float(np.exp((nll.sum(1) / tokens.sum()).mean()))
        low = high = float("nan")
        if (tokens > 0).sum() > 1 and np.isfinite(nll).all():
            _, low, high = stats.intervals([evaluation])[0].perplexity
        found = dict(zip(by, values, strict=True))
        rows.append(found | {"perplexity": value, "low": low, "high": high})
    return pd.DataFrame(rows)


# --------------------------------------------------------------------------- what was left


def _summary(rows: Sequence[Row]) -> pd.DataFrame | None:
    """summary.csv of the experiment, of the configurations that are still there."""
    if not rows:
        return None
    with suppress(OSError, ValueError, KeyError):  # not there, or not the file that is meant
        known = pd.read_csv(rows[0].run_dirs[0].parent / SUMMARY)
        known = known[known["name"].isin([row.name for row in rows])]
        if (known["of"] == MATRICES).any():
            return known
    return None


def _cell(known: pd.DataFrame, name: str, quantity: str, form: str) -> Cell:
    here = (known["name"] == name) & (known["of"] == MATRICES) & (known["quantity"] == quantity)
    if not here.any():
        return Cell("-")
    mean, low, high = (float(known[here][column].iloc[0]) for column in ("mean", "low", "high"))
    if np.isnan(mean):
        return Cell("-")
    shown, least, most = (format(value, form) for value in (mean, low, high))
    return Cell(shown if least == most else f"{shown} ({least}-{most})", mean)


def _documents(row: Row, name: str) -> tuple[list[pd.DataFrame], list[int]]:
    """The tables `name` of the row's runs that have one, and their seeds."""
    tables, seeds = [], []
    for run_dir, record in zip(row.run_dirs, row.records, strict=True):
        with suppress(OSError, ValueError):
            tables.append(pd.read_parquet(run_dir / name))
            seeds.append(int(record["run"]["seed"]))
    return tables, seeds


def _text_of(table: pd.DataFrame) -> str:
    """The split that a curve is of: test where it was asked for."""
    return "test" if (table["text"] == "test").any() else "validation"


# --------------------------------------------------------------------------- figures


def _shares(rows: Sequence[Row]) -> Figure | None:
    """The share of the squared change that each kind of weight has."""
    known = _summary(rows)
    if known is None:
        return None
    shares = known[(known["quantity"] == "share") & (known["of"] != MATRICES)]
    names = list(dict.fromkeys(shares["name"]))
    by = {(row["name"], row["of"]): float(row["mean"]) for _, row in shares.iterrows()}
    kinds = list(dict.fromkeys(shares["of"]))
    if not kinds:
        return None
    series = [
        Series(kind, KINDS[i % len(KINDS)], names, [by.get((name, kind), 0.0) for name in names])
        for i, kind in enumerate(kinds)
    ]
    most = shares.loc[shares["mean"].idxmax()]
    axes = Axes("anatomy-shares", "Where the change is", "", "share of the squared change", "bars")
    alt = f"Most: {100 * most['mean']:.0f} % of the change of {most['name']} is in {most['of']}."
    return Figure(axes, series, alt=alt)


def _compressed(rows: Sequence[Row]) -> Figure | None:
    """Perplexity of W + [dW]_k against k, beside LoRA trained at rank k."""
    series: list[Series] = []
    text = ""
    for row in rows:
        tables, seeds = _documents(row, COMPRESSED)
        if not tables:
            continue
        text = _text_of(tables[0])
        points = perplexities(tables, seeds, ["rank", "beside", "text"])
        numbers = points["rank"].astype(str).str.isdigit() & (points["text"] == text)
        for beside, of in points[numbers].groupby("beside", sort=False):
            of = of.assign(k=of["rank"].astype(int)).sort_values("k")
            what = "" if beside == "with" else ", matrices alone"
            series.append(
                Series(
                    f"dW of {row.name}{what}, cut to rank k", color_of(row.values["method.label"]),
                    of["k"].tolist(), of["perplexity"].tolist(), of["low"].tolist(),
                    of["high"].tolist(), [row.name] * len(of), line=True, dash=beside != "with",
                )
            )  # fmt: skip
    if not series:
        return None
    trained: dict[str, list[tuple[int, float, str]]] = {}
    for row in rows:
        value = row.values.get(f"quality.{text}.perplexity")
        if row.values["method.name"] == "lora" and row.trained and value is not None:
            own = f"{row.values['method.label']} {row.values['method.targets']}, trained at rank k"
            trained.setdefault(own, []).append((int(row.values["method.rank"]), value, row.name))
    for name, found in trained.items():
        ranks, values, names = zip(*sorted(found), strict=True)
        series.append(Series(name, color_of("lora"), list(ranks), list(values), rows=list(names)))
    axes = Axes(
        COMPRESSION.key, COMPRESSION.title, COMPRESSION.x, COMPRESSION.y.format(text=text),
        log_x=True, log_y=True,
    )  # fmt: skip
    first = series[0]
    alt = (
        f"{first.name}: {first.y[0]:.1f} at k {first.x[0]}, {first.y[-1]:.1f} at {first.x[-1]}. "
        "Nothing is trained but the runs themselves."
    )
    return Figure(axes, series, alt=alt)


def _interpolated(rows: Sequence[Row]) -> list[Figure]:
    """For every further text, its perplexity and that of the new text along W + lambda dW."""
    by_text: dict[str, list[Series]] = {}
    new = ""
    for row in rows:
        tables, seeds = _documents(row, INTERPOLATED)
        tables = [table[table["kinds"] == "all"] for table in tables]
        if not tables or any(table.empty for table in tables):
            continue
        new = _text_of(tables[0])
        points = perplexities(tables, seeds, ["text", "scale"])
        learned = points[points["text"] == new].set_index("scale")["perplexity"]
        for text, of in points[~points["text"].isin(["validation", "test"])].groupby("text"):
            of = of.set_index("scale").loc[learned.index]
            scales = [f"{scale:g}" for scale in learned.index]
            by_text.setdefault(str(text), []).append(
                Series(
                    row.name, color_of(row.values["method.label"]), learned.tolist(),
                    of["perplexity"].tolist(), of["low"].tolist(), of["high"].tolist(),
                    [f"{row.name}, lambda {scale}" for scale in scales], line=True,
                )
            )  # fmt: skip
    return [
        Figure(
            Axes(
                f"interpolate-{text}", f"Between the base and the runs ({text})",
                f"{new} perplexity per token", f"perplexity of {text}", log_x=True, log_y=True,
            ),
            series,
            alt="Along each line lambda of W + lambda dW goes up from 0, the base, where all meet.",
        )
        for text, series in by_text.items()
    ]  # fmt: skip
