"""What the figures of an experiment show: `draw` makes SVG and PNG of it, `page` Plotly's JSON.

A figure is points, bars or a heat map on `axes`, with labels, references and a sentence for those
who cannot see it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from harness.report import choices, stats, swept, views
from harness.report import costs as spent
from harness.report import evidence as ev
from harness.report.axes import (
    ALPHA,
    CATEGORIES,
    COST_AXES,
    MEMORY,
    PARAMETERS,
    RANK,
    SECONDS,
    SPEED,
    SPENT,
    TEST,
    TOKENS,
    Axes,
    color_of,
)
from harness.report.evidence import Evidence
from harness.report.figure import REFERENCES, Figure, Series
from harness.report.table import SHARED, Row, headings, setting_text
from harness.results import numbers, run_record

GREY = "#808080"
CROWDED = 3  # points of one cost that a line may go through
WORDS = 4  # lines that a caption tells of


def figures(
    rows: Sequence[Row], found: dict[str, Evidence], further: Sequence[str] = ()
) -> list[Figure]:
    """Return all figures in which the rows have something to show, with the costs `further`."""
    test = found.get("test")
    made: list[Figure | None] = []
    if test is not None:
        of_settings = list(
            swept.figures(
                rows, test.intervals,
                lambda name, color, own, x, line: _points(name, color, own, x, test, line=line),
            )
        )  # fmt: skip
        titles = dict.fromkeys([*COST_AXES, *further])
        of_costs = [  # where all rows cost the same, what was varied is all there is to see
            figure
            for title in titles
            if (figure := _cost(rows, test, title))
            and (title in further or not of_settings or _costs_differ(figure))
        ]
        made += [
            *of_costs, _rank(rows, test), _alpha(rows, test), *_heat(rows, test), *of_settings,
        ]  # fmt: skip
    made += [_memory(rows), _speed(rows), *_curves(rows)]
    if test is not None:
        made += [_forgetting(rows, test, on) for text, on in found.items() if text != "test"]
    return [figure for figure in made if figure is not None]


def _costs_differ(figure: Figure) -> bool:
    return len({x for series in figure.series for x in series.x}) > 1


def _trained(rows: Sequence[Row], test: Evidence) -> list[Row]:
    return [r for r in rows if r.trained and r.name in test.intervals]


def _points(
    name: str, color: str, rows: list[Row], x: list[Any], test: Evidence, **more: Any
) -> Series:
    ends = [test.intervals[row.name] for row in rows]
    y, low, high = (
        [_drawn(nll) for nll in values]
        for values in zip(*((i.log_perplexity, i.low, i.high) for i in ends), strict=True)
    )
    return Series(name, color, x, y, low, high, [row.name for row in rows], **more)


def _drawn(nll: float) -> float:
    """A perplexity, or NaN where it has no place in a figure."""
    return math.exp(nll) if nll < 100 else math.nan


def _lines(
    rows: list[Row],
    key: Callable[[Row], Any],
    x: Callable[[Row], Any],
    test: Evidence,
    joined: bool = True,
) -> list[Series]:
    """The rows of every key by ascending x, joined by a line or not."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    found = []
    for name, members in groups.items():
        ordered = sorted(members, key=x)
        color = color_of(ordered[0].values["method.label"])
        line = joined and len({x(row) for row in ordered}) > 1
        found.append(_points(name, color, ordered, [x(r) for r in ordered], test, line=line))
    return found


def _family(row: Row) -> str:
    return " ".join(filter(None, [row.values["method.label"], row.values["method.targets"]]))


def _settings_of(rows: Sequence[Row]) -> Callable[[Row], str]:
    """What of a row's settings tells it from these rows, as a line's name has it."""
    names = headings(rows)

    def text(row: Row) -> str:
        told = (
            f" {name}={setting_text(value)}"
            for key, name in names.items()
            if (value := row.settings.get(key)) is not None or not key.startswith("method.fields.")
        )
        return "".join(told)

    return text


def _references(rows: Sequence[Row], test: Evidence) -> list[tuple[str, str, float]]:
    """Lines for what has no place on the axis: the base, truncation and full fine-tuning."""
    return [
        (
            f"{REFERENCES[row.values['method.name']]}"
            + (f", k={row.values['method.rank']}" if row.values["method.rank"] else ""),
            color_of(row.values["method.name"]),
            test.intervals[row.name].perplexity[0],
        )
        for row in rows
        if row.values["method.name"] in REFERENCES
        and row.name in test.intervals
        and not row.records[0]["config"]["method"].get("train_only")  # a part of full fine-tuning
    ]


def _cost(rows: Sequence[Row], test: Evidence, title: str) -> Figure | None:
    """Perplexity against a cost, with the Pareto front among what trains."""
    costs = ev.costs(_trained(rows, test), title)
    trained = [row for row in rows if row.name in costs]
    if not trained:
        return None
    unit = spent.of(title).scale
    axes = COST_AXES.get(title) or cost_axes(title)

    def cost(row: Row) -> float:
        return costs[row.name] / unit

    told = _settings_of(trained)  # a line joins what was trained alike
    series = _lines(trained, lambda r: _family(r) + told(r), cost, test, axes is PARAMETERS)
    series = [replace(s, line=s.line and not _is_crowded(s)) for s in series]
    alt = f"{len(trained)} configurations. " if len(trained) > 1 else ""
    # A front claims that costs can be compared: not those of a shared machine, nor the seconds of
    # single runs.
    if len(trained) > 1 and {row.name for row in trained} <= set(ev.sure_costs(trained, title)):
        own, said = _front(trained, cost, ev.fronts(rows, test, [title]).get(title, {}), test)
        series += own
        alt += said
    best = min(trained, key=lambda row: test.intervals[row.name].log_perplexity)
    alt += (
        f"{'Lowest: ' * (len(trained) > 1)}{best.name}, "
        f"{numbers.perplexity(test.intervals[best.name].perplexity[0])} at "
        f"{choices.amount(title, costs[best.name]).split(' ')[0]} {axes.x}."
    )
    return Figure(axes, series, _references(rows, test), alt)


def cost_axes(title: str) -> Axes:
    """Perplexity against a cost that was asked for."""
    cost = spent.of(title)
    key = f"perplexity-{title.replace(' ', '-').replace('_', '-')}"
    label = f"{cost.short}, {cost.unit}"
    return Axes(key, f"Perplexity and {cost.short}", label, TEST, log_y=True, x_form=",.3~r")


def _is_crowded(series: Series) -> bool:
    """Tell whether a line would go up and down between points of one cost, as of many alphas."""
    return max(Counter(series.x).values()) > CROWDED


def _front(
    trained: Sequence[Row],
    cost: Callable[[Row], float],
    dominated: Mapping[str, tuple[str, ...]],
    test: Evidence,
) -> tuple[list[Series], str]:
    """The Pareto front: a line through the estimates that none dominates, and discs.

    A disc says that nothing which costs no more is significantly better.
    """

    def value(row: Row) -> float:
        return _drawn(test.intervals[row.name].log_perplexity)

    def of(name: str, rows: Sequence[Row], **more: Any) -> Series:
        x, y = [cost(row) for row in rows], [value(row) for row in rows]
        return Series(name, GREY, x, y, rows=[row.name for row in rows], **more)

    found = []
    ordered = sorted(trained, key=lambda row: (cost(row), value(row)))
    if able := [row for row in ordered if dominated.get(row.name) == ()]:
        found.append(of("may be the best for its cost", able, halo=True))
    front: list[Row] = []
    for row in ordered:
        if not front or value(row) < value(front[-1]):
            front.append(row)
    if len(front) > 1:
        found.append(of("lowest measured for its cost", front, line=True, dash=True))
    named = ", ".join(row.name for row in front[:WORDS])
    more = f" and {len(front) - WORDS} more" if len(front) > WORDS else ""
    return found, (
        f"Dashed: the lowest perplexity for its cost ({named}{more}). Grey discs: nothing that "
        "costs no more is significantly better. "
    )


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _rank(rows: Sequence[Row], test: Evidence) -> Figure | None:
    """Against r or k: lines of rows that differ in nothing else that has a column."""
    ranked = [r for r in _trained(rows, test) if _number(r.values["method.rank"]) is not None]

    def scale(row: Row) -> str:
        alpha = row.values["method.alpha"]
        return "" if alpha is None else f" alpha={alpha / float(row.values['method.rank']):g}r"

    def rank(row: Row) -> float:
        return float(row.values["method.rank"])

    told = _settings_of(ranked)
    lines = _lines(ranked, lambda r: _family(r) + scale(r) + told(r), rank, test)
    series = [s for s in lines if s.line]
    if not series:
        return None
    return Figure(RANK, series, _references(rows, test), _falls(series, "rank"))


def _alpha(rows: Sequence[Row], test: Evidence) -> Figure | None:
    scaled = [r for r in _trained(rows, test) if r.values["method.alpha"] is not None]

    def scale(row: Row) -> float:
        return float(row.values["method.alpha"]) / float(row.values["method.rank"])

    def key(row: Row) -> str:
        return f"{_family(row)} r={row.values['method.rank']}" + told(row)

    told = _settings_of(scaled)
    series = [s for s in _lines(scaled, key, scale, test) if s.line]
    if not series:
        return None
    return Figure(ALPHA, series, alt=_falls(series, "alpha / r"))


def _falls(series: Sequence[Series], what: str) -> str:
    said = [
        f"{s.name}: {numbers.perplexity(s.y[0])} at {what} {s.x[0]:g}, "
        f"{numbers.perplexity(s.y[-1])} at {s.x[-1]:g}"
        for s in sorted(series, key=lambda s: s.y[-1])[:WORDS]
    ]
    more = f"; and {len(series) - WORDS} lines above" if len(series) > WORDS else ""
    return f"{'; '.join(said)}{more}."


def _heat(rows: Sequence[Row], test: Evidence) -> list[Figure]:
    """LoRA's perplexity by rank and alpha / r, and by rank and targets, where both vary."""
    lora = [r for r in _trained(rows, test) if r.values["method.label"] == "lora"]
    found = []
    by = {
        "alpha": (
            "alpha / r",
            lambda r: f"{r.values['method.alpha'] / float(r.values['method.rank']):g}",
        ),
        "targets": ("targets", lambda r: str(r.values["method.targets"])),
    }
    for key, (title, column) in by.items():
        cells: dict[tuple[str, float], list[Row]] = {}
        for row in lora:
            if row.values["method.alpha"] is None:
                continue
            cells.setdefault((column(row), float(row.values["method.rank"])), []).append(row)
        columns = sorted({c for c, _ in cells}, key=lambda c: (_number(c) or 0.0, c))
        ranks = sorted({r for _, r in cells})
        if len(columns) < 2 or len(ranks) < 2 or len(cells) < 4:
            continue

        def value(c: str, rank: float, cells: dict[Any, list[Row]] = cells) -> float:
            there = cells.get((c, rank), [])
            return min((test.intervals[r.name].perplexity[0] for r in there), default=math.nan)

        series = [
            Series(f"{rank:g}", color_of("lora"), columns, [value(c, rank) for c in columns])
            for rank in ranks
        ]
        least = min(
            (v, s.name, c) for s in series for c, v in zip(columns, s.y, strict=True) if v == v
        )
        lowest = numbers.perplexity(least[0])
        found.append(
            Figure(
                Axes(f"heat-{key}", f"LoRA's perplexity by rank and {title}", title, "r", "heat"),
                series,
                alt=f"Lowest: {lowest} at rank {least[1]}, {title} {least[2]}.",
            )
        )
    return found


def _memory(rows: Sequence[Row]) -> Figure | None:
    shown = [row for row in rows if run_record.get(row.records[0], "memory.by_category")]
    if not shown:
        return None
    names = [row.name for row in shown]
    series = [
        Series(
            category.replace("_", " "), color, names,
            [_mean(row, f"memory.by_category.{category}") / 2**20 for row in shown],
        )
        for category, color in CATEGORIES.items()
    ]  # fmt: skip
    predicted = [_mean(row, "predicted.peak_bytes") for row in shown]
    if any(predicted):
        mib = [value / 2**20 if value else math.nan for value in predicted]
        series.append(Series("predicted peak", "#000000", names, mib, hollow=True))
    totals = {row.name: float(row.values["memory.peak_bytes"]) for row in shown}
    least, most = min(totals, key=totals.__getitem__), max(totals, key=totals.__getitem__)
    said = [f"{numbers.mib(totals[name])} MiB ({name})" for name in (least, most)]
    alt = f"From {said[0]} to {said[1]}."
    return Figure(MEMORY, series, alt=alt)


def _mean(row: Row, path: str) -> float:
    found = [value for record in row.records if (value := run_record.get(record, path)) is not None]
    return sum(found) / len(found) if found else 0.0


def _speed(rows: Sequence[Row]) -> Figure | None:
    path = "speed.tokens_per_second"
    shown = [row for row in rows if row.values[path]]
    if not shown:
        return None
    names, values = [row.name for row in shown], [float(row.values[path]) for row in shown]
    fastest = values.index(max(values))
    alt = f"Fastest: {names[fastest]}, {numbers.count(values[fastest])} tokens/s."
    if any(row.values[SHARED] for row in shown):
        alt = "Measured while other runs used the machine too: do not compare them."
    labels = [row.values["method.label"] for row in shown]
    series = [
        Series(
            label, color_of(label), names,
            [v if own == label else math.nan for v, own in zip(values, labels, strict=True)],
        )
        for label in dict.fromkeys(labels)
    ]  # fmt: skip
    return Figure(SPEED, series, alt=alt)


def _curves(rows: Sequence[Row]) -> list[Figure]:
    """Validation over tokens and over seconds; seeds as a band."""
    pairs = [(row, c) for row in rows if row.trained and (c := views.curve(row))]
    if not pairs:
        return []
    found = []
    by = {"tokens": TOKENS, "seconds": SECONDS}
    if views.equal([c for _, c in pairs], "flops"):
        by["flops"] = SPENT
    for axis, axes in by.items():
        series = []
        for row, c in pairs:
            x = (c.along(axis).mean(0) / (1e12 if axis == "flops" else 1)).tolist()
            ends = [[_drawn(v) for v in f(0)] for f in (c.nll.mean, c.nll.min, c.nll.max)]
            color = color_of(row.values["method.label"])
            several = len(c.nll) > 1
            low, high = (ends[1], ends[2]) if several else (None, None)
            names = [row.name] * len(x)
            series.append(Series(row.name, color, x, ends[0], low, high, names, True, True))
        last = sorted((s.y[-1], s.name) for s in series if s.y[-1] == s.y[-1])
        said = [f"{numbers.perplexity(value)} ({name})" for value, name in last[:1] + last[-1:]]
        alt = f"At the end from {' to '.join(said)}." if said else "All have diverged."
        found.append(Figure(axes, series, alt=alt))
    return found


def _forgetting(rows: Sequence[Row], test: Evidence, on: Evidence) -> Figure | None:
    """What is learned against what is forgotten, nats per token since the base model."""
    base = [row.name for row in rows if row.values["method.name"] == "none"]
    if len(base) != 1 or base[0] not in on.intervals or base[0] not in test.intervals:
        return None
    moved, _ = ev.forgetting(rows, on)
    learned = {
        name: c
        for pair in test.comparisons
        if base[0] in (pair.a, pair.b)
        for name in (pair.a, pair.b)
        if name != base[0]
        for c in [ev.reversed_(pair, base[0])]
    }
    trained = [row for row in _trained(rows, test) if row.name in moved and row.name in learned]
    if not trained:
        return None
    groups: dict[str, list[Row]] = {}
    for row in trained:
        groups.setdefault(_family(row), []).append(row)
    series = []
    for name, members in groups.items():
        ordered = sorted(members, key=lambda row: learned[row.name].difference)
        changes: list[stats.Comparison] = [moved[row.name] for row in ordered]
        series.append(
            Series(
                name, color_of(ordered[0].values["method.label"]),
                [learned[row.name].difference for row in ordered],
                [c.difference for c in changes], [c.low for c in changes],
                [c.high for c in changes], [row.name for row in ordered],
            )
        )  # fmt: skip
    most = max(trained, key=lambda row: moved[row.name].difference)
    nats = numbers.nats(moved[most.name].difference)
    alt = f"Most is forgotten by {most.name}: {nats} nats per token."
    axes = Axes(
        f"forgetting-{on.text}", f"Learned and forgotten ({on.text})",
        "learned: nats per token of the test set", "forgotten: nats per token",
        x_form=".4f", y_form=".4f",
    )  # fmt: skip
    return Figure(axes, series, alt=alt)
