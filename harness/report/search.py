"""What a search tried and found, for the page: from the files that it leaves in its folder.

Candidates are told apart by how far they came (the rungs of successive halving), or, where several
spaces were searched side by side, by their space.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from harness.report.axes import OTHERS, Axes
from harness.report.figure import Figure, Series
from harness.report.sheet import Cell, Column, Sheet
from harness.results import numbers

FOLDER, TRIALS, IMPORTANCE = "search", "trials.csv", "importance.csv"
OBJECTIVES = (
    "parameters.",
    "memory.",
    "speed.",
    "saved.",
)  # beginnings of columns of further objectives
OWN = ("study", "candidate", "bracket", "state", "steps", "spread", "pareto", "run")
FINISHED, STOPPED = "#0072B2", ("#808080", "#E69F00", "#56B4E9", "#CC79A7")
BEST = "#D55E00"
NLL = "validation nats per token"
SHOWN = 10  # candidates in the table
MOST_LINES = 12
WIDE = 8  # times its lowest value, from which an axis is logarithmic


@dataclass(frozen=True)
class Search:
    """The candidates of all searches in an experiment's folder, and what they found."""

    trials: pd.DataFrame  # as trials.csv has them; with `reached` and `last`, of the last rung
    keys: list[str]  # what was searched
    rungs: list[int]
    objectives: list[str]  # beside validation
    importance: pd.DataFrame  # study, key, share, spread; empty where nothing can be said

    @property
    def studies(self) -> list[str]:
        """Return the spaces that were searched, by the names of their studies."""
        return list(dict.fromkeys(self.trials["study"]))

    @property
    def best(self) -> pd.Series | None:
        """Return the finished candidate whose validation nll is the lowest."""
        done = self.trials[(self.trials["state"] == "finished") & self.trials["last"].notna()]
        return None if done.empty else done.loc[done["last"].idxmin()]


def find(folder: Path) -> Search | None:
    """The search into an experiment's folder; None where there was none, or it has not begun."""
    try:
        trials = pd.read_csv(folder / FOLDER / TRIALS)
    except (OSError, ValueError):
        return None
    names = [str(name) for name in trials.columns]
    nll_columns = [name for name in names if name.startswith("nll_at_")]
    nll_columns.sort(key=lambda name: int(name.removeprefix("nll_at_")))
    rungs = [int(name.removeprefix("nll_at_")) for name in nll_columns]
    if trials.empty or not rungs or "run" not in names:
        return None
    trials["last"] = trials[nll_columns].ffill(axis=1).iloc[:, -1]
    trials["reached"] = [
        max((r for r, nll in zip(rungs, row, strict=True) if nll == nll), default=0)
        for row in trials[nll_columns].to_numpy(float)
    ]
    named = [name for name in names if name not in (*OWN, *nll_columns)]
    objectives = [name for name in named if name.startswith(OBJECTIVES)]
    try:
        importance = pd.read_csv(folder / FOLDER / IMPORTANCE)
    except (OSError, ValueError):
        importance = pd.DataFrame(columns=["study", "key", "share", "spread"])
    keys = [name for name in named if name not in objectives]
    return Search(trials, keys, rungs, objectives, importance)


def figures(search: Search) -> list[Figure]:
    """History, a slice for every key, all keys together, importance, and the Pareto front."""
    plots = [_history(search), *_slices(search), _parallel(search), _importance(search)]
    plots += [_front(search, objective) for objective in search.objectives]
    return [figure for figure in plots if figure is not None]


def _groups(search: Search) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Name, colour and candidates of every series: by space, or else by how far they came."""
    trials = search.trials[search.trials["last"].notna()]
    if len(search.studies) > 1:
        for place, study in enumerate(search.studies):
            own = trials[trials["study"] == study]
            if len(own):
                yield study, (FINISHED, *OTHERS, *STOPPED)[place % 11], own
        return
    for place, rung in enumerate(search.rungs):
        own = trials[(trials["reached"] == rung) & (trials["state"] != "finished")]
        if len(own):
            yield f"stopped at step {rung}", STOPPED[place % len(STOPPED)], own
    own = trials[trials["state"] == "finished"]
    if len(own):
        yield "finished", FINISHED, own


def _points(
    search: Search, x: Callable[[pd.DataFrame], Sequence[Any]], y: str = "last"
) -> list[Series]:
    return [
        Series(name, color, list(x(own)), [float(v) for v in own[y]], rows=_names(search, own))
        for name, color, own in _groups(search)
    ]


def _names(search: Search, own: pd.DataFrame) -> list[str]:
    """What a candidate is called: its number, and what was searched."""
    return [
        " ".join(
            [f"candidate {row['candidate']}:"]
            + [f"{key}={value_text(row[key])}" for key in search.keys if row[key] == row[key]]
        )
        for _, row in own.iterrows()
    ]


def value_text(value: Any) -> str:
    """Return a value that was searched as tables and axes show it."""
    return numbers.rate(value) if isinstance(value, float) else str(value)


def _history(search: Search) -> Figure | None:
    series = _points(search, lambda own: [int(v) for v in own["candidate"]])
    if not series or len(series) > MOST_LINES:
        return None
    if len(search.studies) == 1 and (best := search.best) is not None:
        done = search.trials[search.trials["state"] == "finished"].sort_values("candidate")
        so_far = done["last"].cummin()
        if len(done) > 1:
            places = [int(v) for v in done["candidate"]]
            series.append(
                Series("lowest so far", FINISHED, places, so_far.tolist(), line=True, dash=True,
                       rows=_names(search, done))
            )  # fmt: skip
        note = (
            f"Lowest: candidate {best['candidate']}, {numbers.nats(best['last'])} nats per token."
        )
    else:
        note = "Each space by its colour."
    axes = Axes(
        "search-history", "The candidates, as they were proposed", "candidate",
        f"{NLL}, last seen", y_form=".4f",
    )  # fmt: skip
    count = len(search.trials)
    return Figure(axes, series, alt=f"{count} candidates, each at the last step it came to. {note}")


def _slices(search: Search) -> Iterator[Figure]:
    """Validation at the first rung, which every candidate came to, against each key."""
    first = f"nll_at_{search.rungs[0]}"
    for key in search.keys:
        known = search.trials[search.trials[key].notna() & search.trials[first].notna()]
        values = sorted(set(known[key]))
        if len(values) < 2:
            continue
        numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        series = []
        for name, color, own in _groups(search):
            own = own[own[key].notna() & own[first].notna()]
            if len(own):
                x = [float(v) if numeric else str(v) for v in own[key]]
                y = [float(v) for v in own[first]]
                series.append(Series(name, color, x, y, rows=_names(search, own)))
        if len(series) > MOST_LINES:
            continue
        log_x = numeric and values[0] > 0 and values[-1] >= WIDE * values[0]
        axes = Axes(
            f"search-slice-{key.replace('.', '-')}", f"Validation and {key}", key,
            f"{NLL}, step {search.rungs[0]}", log_x=log_x, y_form=".4f",
        )  # fmt: skip
        lowest = known.loc[known[first].idxmin()]
        alt = (
            f"At step {search.rungs[0]}, which every candidate came to. Lowest: "
            f"{numbers.nats(lowest[first])} at {value_text(lowest[key])}."
        )
        yield Figure(axes, series, alt=alt)


def _parallel(search: Search) -> Figure | None:
    """All keys of every candidate: a line through its values, from lowest to highest."""
    keys = [key for key in search.keys if search.trials[key].nunique() > 1]
    if len(keys) < 2 or len(search.studies) > 1:
        return None
    places, labels = {}, {}
    for key in keys:
        known = search.trials[key].dropna()
        values = sorted(set(known))
        low, high = values[0], values[-1]
        if all(isinstance(v, int | float) for v in values):
            log = low > 0 and high >= WIDE * low
            scale: Callable[[float], float] = math.log if log else float
            places[key] = {v: (scale(v) - scale(low)) / (scale(high) - scale(low)) for v in values}
        else:
            places[key] = {v: i / (len(values) - 1) for i, v in enumerate(values)}
        labels[key] = f"{key}, {value_text(low)} to {value_text(high)}"

    def line(name: str, color: str, own: pd.DataFrame) -> Series:
        x: list[Any] = []
        y: list[Any] = []
        rows: list[str] = []
        for text, (_, row) in zip(_names(search, own), own.iterrows(), strict=True):
            x += [places[key].get(row[key], math.nan) for key in keys] + [math.nan]
            y += [labels[key] for key in keys] + [labels[keys[-1]]]
            rows += [text] * (len(keys) + 1)
        return Series(name, color, x, y, rows=rows, line=True)

    series = [line(*group) for group in _groups(search)]
    best = search.best
    if best is not None:
        series.append(line("the best", BEST, best.to_frame().T))
    axes = Axes(
        "search-parallel", "All keys of every candidate", "lowest to highest value", "", "parallel",
    )  # fmt: skip
    note = "A line for every candidate, through its value of each key."
    if best is not None:
        note += " The best: " + " ".join(f"{k}={value_text(best[k])}" for k in keys) + "."
    return Figure(axes, series, alt=note)


def _importance(search: Search) -> Figure | None:
    shares = search.importance
    if shares.empty:
        return None
    keys = list(dict.fromkeys(shares["key"]))
    mean = {key: float(shares.loc[shares["key"] == key, "share"].mean()) for key in keys}
    keys.sort(key=lambda key: -mean[key])
    axes = Axes(
        "search-importance", "How much each key matters", "",
        f"share of the variance at step {search.rungs[0]}", "bars", y_form=".2f",
    )  # fmt: skip
    spaces = " (mean over spaces)" if len(search.studies) > 1 else ""
    alt = (
        f"The share of the differences between candidates at step {search.rungs[0]} that a key "
        f"explains by itself, by fANOVA{spaces}. Most: {keys[0]}, {mean[keys[0]]:.2f}."
    )
    series = [Series("share", FINISHED, keys, [mean[key] for key in keys])]
    return Figure(axes, series, alt=alt)


def _front(search: Search, objective: str) -> Figure | None:
    """Validation against a further objective, with the candidates that none beats in both."""
    done = search.trials[
        (search.trials["state"] == "finished")
        & search.trials[objective].notna()
        & search.trials["last"].notna()
    ]
    if len(done) < 2:
        return None
    unit = numbers.MIB if objective.startswith("memory.") else 1
    ordered = done.sort_values([objective, "last"])
    front = ordered[ordered["last"] < ordered["last"].cummin().shift(fill_value=math.inf)]

    def series_of(name: str, own: pd.DataFrame, color: str, **more: Any) -> Series:
        x = [float(v) / unit for v in own[objective]]
        return Series(name, color, x, own["last"].tolist(), rows=_names(search, own), **more)

    series = [series_of("finished candidates", done, FINISHED)]
    if len(front) > 1:
        series.append(series_of("best for its cost", front, "#808080", line=True, dash=True))
    name = objective + (", MiB" if unit > 1 else "")
    axes = Axes(
        f"search-front-{objective.replace('.', '-')}", f"Validation and {objective}", name, NLL,
        log_x=min(series[0].x) > 0 and max(series[0].x) > WIDE * min(series[0].x),
        x_form=",.3~r" if objective.startswith("speed.") else ",.0f", y_form=".4f",
    )  # fmt: skip
    alt = f"{len(front)} of {len(done)} candidates are beaten by no other in both."
    return Figure(axes, series, alt=alt)


def sheet(search: Search) -> Sheet:
    """The best candidates: those that came furthest first, by their last validation."""
    trials = search.trials.sort_values(["reached", "last"], ascending=[False, True])
    columns = [Column("candidate", "candidate")]
    if several := len(search.studies) > 1:
        columns.append(Column("study", "space", text=True))
    columns += [Column("state", "state", text=True)]
    columns += [Column(key, key) for key in search.keys]
    columns += [Column("steps", "steps")]
    columns += [Column(f"nll_at_{r}", f"nats at {r}", why=f"{NLL}, step {r}") for r in search.rungs]
    columns += [
        Column(name, "peak MiB" if name.startswith("memory.") else name)
        for name in search.objectives
    ]
    lines = []
    for _, row in trials.head(SHOWN).iterrows():
        line = [Cell(str(row["candidate"]), row["candidate"])]
        line += [Cell(row["study"], row["study"])] if several else []
        line.append(Cell(row["state"], row["state"]))
        line += [_cell(row[key], value_text) for key in search.keys]
        line.append(_cell(row["steps"], numbers.count))
        line += [_cell(row[f"nll_at_{rung}"], numbers.nats) for rung in search.rungs]
        for name in search.objectives:
            forms = {"memory": numbers.mib, "speed": numbers.seconds}
            line.append(_cell(row[name], forms.get(name.partition(".")[0], numbers.count)))
        lines.append(line)
    more = len(trials) - len(lines)
    notes = [f"nats at a step: {NLL}. All candidates with their runs: {FOLDER}/{TRIALS}."]
    if more > 0:
        notes.insert(0, f"And {more} more candidate{'s' * (more > 1)}.")
    return Sheet("The best candidates", columns, lines, notes)


def _cell(value: Any, form: Callable[[Any], str]) -> Cell:
    return Cell("-") if pd.isna(value) else Cell(form(value), value)
