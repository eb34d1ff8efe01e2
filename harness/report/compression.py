"""Figures of what `harness compress` and `harness interpolate` left in the folders of runs.

An update is dW, what training has added to the weights. Nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import pandas as pd

from harness.report import stats
from harness.report.axes import Axes, color_of
from harness.report.figure import Figure, Series
from harness.report.table import Row, setting_text
from harness.results import numbers

COMPRESSED, INTERPOLATED = "compress.parquet", "interpolate.parquet"  # in a run's folder


def figures(rows: Sequence[Row]) -> list[Figure]:
    """Return the figures of what is there: compression to every rank, and interpolation."""
    drawn = [_compressed(rows), *_interpolated(rows)]
    return [figure for figure in drawn if figure is not None]


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
        group = dict(zip(by, values, strict=True))
        rows.append(group | {"perplexity": value, "low": low, "high": high})
    return pd.DataFrame(rows)


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
        whole = points["rank"].astype(str).str.isdigit() & (points["text"] == text)
        for beside, group in points[whole].groupby("beside", sort=False):
            group = group.assign(k=group["rank"].astype(int)).sort_values("k")
            what = "" if beside == "with" else ", matrices alone"
            series.append(
                Series(
                    f"dW of {row.name}{what}, cut to rank k", color_of(row.values["method.label"]),
                    group["k"].tolist(), group["perplexity"].tolist(), group["low"].tolist(),
                    group["high"].tolist(), [row.name] * len(group), line=True,
                    dash=beside != "with",
                )
            )  # fmt: skip
    if not series:
        return None
    trained: dict[str, list[tuple[int, float, str]]] = {}
    for row in rows:
        value = row.values.get(f"quality.{text}.perplexity")
        one_rank = row.values["method.name"] == "lora" and row.values["method.rank"].isdigit()
        if one_rank and row.trained and value is not None:
            fields = "".join(
                f" {key.rpartition('.')[2]}={setting_text(value)}"
                for key, value in row.settings.items()
                if key.startswith("method.fields.") and value is not None
            )
            own = f"{row.values['method.label']} {row.values['method.targets']}{fields}, trained"
            trained.setdefault(own, []).append((int(row.values["method.rank"]), value, row.name))
    for name, results in trained.items():
        ranks, values, names = zip(*sorted(results), strict=True)
        series.append(Series(name, color_of("lora"), list(ranks), list(values), rows=list(names)))
    axes = Axes(
        "anatomy-compress", "How much of an update is needed", "rank k of what is kept of dW",
        f"{text} perplexity per token", log_x=True, log_y=True,
    )  # fmt: skip
    first = series[0]
    alt = (
        f"{first.name}: {numbers.perplexity(first.y[0])} at k {first.x[0]}, "
        f"{numbers.perplexity(first.y[-1])} at {first.x[-1]}. "
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
        for text, group in points[~points["text"].isin(["validation", "test"])].groupby("text"):
            group = group.set_index("scale").loc[learned.index]
            scales = [f"{scale:g}" for scale in learned.index]
            by_text.setdefault(str(text), []).append(
                Series(
                    row.name, color_of(row.values["method.label"]), learned.tolist(),
                    group["perplexity"].tolist(), group["low"].tolist(), group["high"].tolist(),
                    [f"{row.name}, lambda {scale}" for scale in scales], line=True,
                )
            )  # fmt: skip
    return [
        Figure(
            Axes(
                f"anatomy-interpolate-{text}", f"Between the base and the runs ({text})",
                f"{new} perplexity per token", f"perplexity of {text}", log_x=True, log_y=True,
            ),
            series,
            alt="Along each line lambda of W + lambda dW goes up from 0, the base, where all meet.",
        )
        for text, series in by_text.items()
    ]  # fmt: skip
