"""The report's further tables: comparisons, equal budgets, learning curves and forgetting."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from harness.report import anatomy, samples, views
from harness.report import evidence as ev
from harness.report.choices import SHORT
from harness.report.columns import ends
from harness.report.evidence import Evidence
from harness.report.sheet import Cell, Column, Sheet
from harness.report.table import SHARED, Row
from harness.results import run_record

PAIRS = 6  # of equal cost, that are named
CONFIGURATION = Column("name", "configuration", text=True)


def further(rows: Sequence[Row], found: dict[str, Evidence]) -> list[Sheet]:
    """Every further table that the rows have something for."""
    test = found.get("test")
    made: list[Sheet | None] = []
    if test is not None and test.comparisons:
        made.append(neighbours(test))
        if test.ranks:
            made.append(matched(rows, test))
    made.append(learning(rows))
    made += [forgetting(rows, on) for text, on in found.items() if text != "test"]
    made += [samples.sheet(rows), anatomy.sheet(rows)]
    return [sheet for sheet in made if sheet is not None]


def _text(value: str) -> Cell:
    return Cell(value, value)


def neighbours(test: Evidence) -> Sheet:
    """Every configuration beside the next best."""
    columns = [
        CONFIGURATION,
        Column("less", "less the next best", text=True),
        Column("difference", "difference", why="of log-perplexity, nats per token"),
        Column("interval", "95 %", keep=20),
        Column("p", "p", keep=50),
        Column("holm", "p (Holm)", why=f"over all {len(test.comparisons)} pairs"),
        Column("over", "over", text=True, keep=30, why="what the test takes for random"),
        Column("detectable", "detectable", keep=40),
    ]
    lines = []
    for c in test.neighbours():
        least = ev.detectable(test, c)
        lines.append(
            [
                _text(c.a), _text(c.b), Cell(f"{c.difference:.4f}", c.difference),
                Cell(f"{c.low:.4f} to {c.high:.4f}", c.low), Cell(f"{c.p:.2g}", c.p),
                Cell(f"{c.adjusted_p:.2g}", c.adjusted_p), _text(c.varies_over),
                Cell(f"{least:.4f}", least),
            ]
        )  # fmt: skip
    title = "Each configuration and the next best: difference of log-perplexity, nats per token"
    note = (
        f"Holm over all {len(test.comparisons)} pairs. detectable: the smallest difference that "
        "this design finds with 80 % power if it is the clearest of them."
    )
    return Sheet(title, columns, lines, [note])


def matched(rows: Sequence[Row], test: Evidence) -> Sheet | None:
    """Pairs of equal cost, and which of the two is better."""
    shown = [row for row in rows if row.name in test.intervals]
    columns = [
        Column("cost", "equal", text=True), Column("a", "configuration", text=True),
        Column("b", "and", text=True), Column("difference", "nats"),
        Column("better", "better", text=True),
    ]  # fmt: skip
    lines, notes = (
        [],
        [
            "Equal: within 5 %, and trained on as many tokens. nats: difference of log-perplexity "
            "per token."
        ],
    )
    tokens = {row.name: run_record.get(row.records[0], "speed.tokens") for row in shown}
    for title in ev.BUDGETS:
        sure = ev.sure_costs(shown, title)
        exact = {name: cost for name, cost in ev.costs(shown, title).items() if name in sure}
        pairs = [c for c in views.matched(exact, test.comparisons) if tokens[c.a] == tokens[c.b]]
        for c in pairs[:PAIRS]:
            which = (
                "not told apart" if c.better is None else "first" if c.better == c.a else "second"
            )
            lines.append(
                [
                    _text(SHORT[title]), _text(c.a), _text(c.b),
                    Cell(f"{abs(c.difference):.4f}", abs(c.difference)), _text(which),
                ]
            )  # fmt: skip
        if len(pairs) > PAIRS:
            notes.append(f"And {len(pairs) - PAIRS} more pairs of equal {SHORT[title]}.")
    return Sheet("Pairs of equal cost", columns, lines, notes) if lines else None


def curves(rows: Iterable[Row]) -> list[views.Curve]:
    """The learning curves of the rows that have one."""
    return [c for row in rows if row.trained and (c := views.curve(row)) is not None]


def learning(rows: Sequence[Row]) -> Sheet | None:
    """Validation at equal tokens and seconds, and steps to a perplexity."""
    found = curves(rows)
    if not found:
        return None
    levels = views.levels(found)
    tokens, seconds = (views.equal(found, axis) for axis in ("tokens", "seconds"))
    star = "*" if any(row.values[SHARED] for row in rows) else ""
    columns = [
        CONFIGURATION,
        *(Column(f"tokens-{t:g}", f"{t:,.0f} tokens", keep=30 - i) for i, t in enumerate(tokens)),
        *(
            Column(f"seconds-{s:g}", f"{s:,.3g} s{star}", keep=40 - i)
            for i, s in enumerate(seconds)
        ),
        *(Column(f"steps-{v:g}", f"steps to {v:g}", keep=10 + i) for i, v in enumerate(levels)),
    ]
    lines = []
    for c in found:
        line = [_text(c.name)]
        for axis, values in (("tokens", tokens), ("seconds", seconds)):
            for value in values:
                at = c.at(axis, value)
                line.append(Cell("-") if at is None else Cell(_perplexity(*at), at[0]))
        line += [_steps(c.brackets(math.log(level))) for level in levels]
        lines.append(line)
    title = (
        "Validation perplexity at equal tokens and equal training time, and steps to a perplexity"
    )
    notes = [
        "Perplexity is interpolated between validations; ± is half of a 95 % t-interval over "
        "seeds. Steps are from the last validation above the level to the first one at or under "
        "it, and widen by the spread over seeds; - where a seed does not get there. Schedules "
        "are for all steps: a shorter run would end lower than a long one does at its steps."
    ]
    if star:
        notes.append(f"{star}: measured while other runs shared the machine; do not compare.")
    return Sheet(title, columns, lines, notes)


def _perplexity(nll: float, half: float | None) -> str:
    value = views.perplexity(nll)
    return f"{value:.2f}" + ("" if half is None else f" ± {value * half:.2g}")


def _steps(found: Sequence[views.Bracket | None]) -> Cell:
    reached = [bracket for bracket in found if bracket is not None]
    if not reached or len(reached) < len(found):
        return Cell("-")
    low, high = views.steps_interval(reached)
    return Cell(f"{low:.0f}-{high:.0f}", low)


def forgetting(rows: Sequence[Row], on: Evidence) -> Sheet:
    """Perplexity on a further text before and after adaptation."""
    moved, since = ev.forgetting(rows, on)
    before = ev.before(rows, on)
    count = next(iter(on.intervals.values())).num_documents
    columns = [
        CONFIGURATION, Column("before", "before", keep=20), Column("after", "after"),
        Column("interval", "95 %", keep=10), Column("rank", "rank", keep=30),
        Column("forgotten", "nats forgotten"), Column("of", "of these 95 %", keep=15),
        Column("holm", "p (Holm)", keep=25),
    ]  # fmt: skip
    lines = []
    for name in on.ordered:
        i, c, start = on.intervals[name], moved.get(name), before[name].perplexity[0]
        rank = on.ranks.get(name, "-")
        line = [
            _text(name), Cell(f"{start:.2f}", start),
            Cell(f"{i.perplexity[0]:.2f}", i.perplexity[0]),
            Cell(ends(i), i.perplexity[1] if i.missing is None else None),
            Cell(rank, int(rank.split("-")[0]) if rank != "-" else None),
        ]  # fmt: skip
        if c is not None and not c.same:
            line += [
                Cell(f"{c.difference:.4f}", c.difference),
                Cell(f"{c.low:.4f} to {c.high:.4f}", c.low),
                Cell(f"{c.adjusted_p:.2g}", c.adjusted_p),
            ]
        else:
            line += [Cell("0", 0.0), Cell("-"), Cell("-")]
        lines.append(line)
    title = f"Forgetting: perplexity on {on.text} ({count} documents) before and after adaptation"
    note = f"nats forgotten: per token, since {since}. rank: as above, on this text."
    return Sheet(title, columns, lines, [note])
