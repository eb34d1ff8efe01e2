"""The report's further tables: comparisons, equal budgets, learning curves and forgetting."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from harness.report import costs as spent
from harness.report import evidence as ev
from harness.report import samples, views
from harness.report.columns import ends
from harness.report.evidence import Evidence
from harness.report.sheet import Cell, Column, Sheet
from harness.report.table import SHARED, Row
from harness.results import numbers, run_record

PAIRS = 6  # of equal cost, that are named
CONFIGURATION = Column("name", "configuration", text=True)


def further(
    rows: Sequence[Row], evidence: dict[str, Evidence], titles: Sequence[str] = ev.BUDGETS
) -> list[Sheet]:
    """Return every further table that the rows have something for, with the costs of `titles`."""
    test = evidence.get("test")
    tables: list[Sheet | None] = []
    if test is not None and test.comparisons:
        tables.append(neighbours(test))
        if test.ranks:
            tables.append(matched(rows, test, titles))
    tables.append(learning(ev.evaluated_alike(rows, test)))
    tables += [forgetting(rows, on) for text, on in evidence.items() if text != "test"]
    tables.append(samples.sheet(rows))
    return [sheet for sheet in tables if sheet is not None]


def _text(value: str) -> Cell:
    return Cell(value, value)


def neighbours(test: Evidence) -> Sheet:
    """Return the table of every configuration beside the next best one."""
    columns = [
        CONFIGURATION,
        Column("less", "next best", text=True),
        Column("difference", "difference", why="of log-perplexity, nats per token"),
        Column("interval", "95 %", keep=20),
        Column("p", "p", keep=50),
        Column("holm", "p (Holm)", why=f"over all {len(test.comparisons)} pairs"),
        Column("over", "varies over", text=True, keep=30, why="what the test takes for random"),
        Column("detectable", "detectable", keep=40),
    ]
    lines = []
    for c in test.neighbours():
        least = ev.detectable(test, c)
        lines.append(
            [
                _text(c.a), _text(c.b), Cell(numbers.nats(c.difference), c.difference),
                Cell(f"{numbers.nats(c.low)} to {numbers.nats(c.high)}", c.low),
                Cell(numbers.p(c.p), c.p),
                Cell(numbers.p(c.adjusted_p), c.adjusted_p), _text(c.varies_over),
                Cell(numbers.nats(least), least),
            ]
        )  # fmt: skip
    title = "Each configuration and the next best: difference of log-perplexity, nats per token"
    note = (
        "difference: how much higher the log-perplexity of the configuration is than that of the "
        f"next best. p (Holm): p corrected for all {len(test.comparisons)} pairs that are tested. "
        "detectable: the smallest true difference that 4 of 5 such experiments would find, if it "
        "were the clearest of all pairs."
    )
    return Sheet(title, columns, lines, [note])


def matched(
    rows: Sequence[Row], test: Evidence, titles: Sequence[str] = ev.BUDGETS
) -> Sheet | None:
    """Return the table of pairs with equal cost, and of which one is better."""
    shown = [row for row in rows if row.name in test.intervals]
    columns = [
        Column("cost", "equal", text=True), Column("a", "configuration", text=True),
        Column("b", "and", text=True), Column("difference", "nats"),
        Column("better", "better", text=True),
    ]  # fmt: skip
    lines, notes = (
        [],
        [
            "equal: which cost differs by at most 5 %; both were trained on as many tokens. nats: "
            "difference of log-perplexity per token. better: which of the two, by the paired test."
        ],
    )
    tokens = {row.name: run_record.get(row.records[0], "speed.tokens") for row in shown}
    for title in titles:
        sure = ev.sure_costs(shown, title)
        exact = {name: cost for name, cost in ev.costs(shown, title).items() if name in sure}
        pairs = [c for c in views.matched(exact, test.comparisons) if tokens[c.a] == tokens[c.b]]
        for c in pairs[:PAIRS]:
            which = (
                "not told apart" if c.better is None else "first" if c.better == c.a else "second"
            )
            lines.append(
                [
                    _text(spent.of(title).short), _text(c.a), _text(c.b),
                    Cell(numbers.nats(abs(c.difference)), abs(c.difference)), _text(which),
                ]
            )  # fmt: skip
        if len(pairs) > PAIRS:
            more = len(pairs) - PAIRS
            notes.append(
                f"And {more} more pair{'s' * (more > 1)} of equal {spent.of(title).short}."
            )
    return Sheet("Pairs of equal cost", columns, lines, notes) if lines else None


def curves(rows: Iterable[Row]) -> list[views.Curve]:
    """Return the learning curves of the rows that were trained and have one, in their order."""
    return [c for row in rows if row.trained and (c := views.curve(row)) is not None]


def learning(rows: Sequence[Row]) -> Sheet | None:
    """Validation at equal tokens, seconds and FLOPs, and steps to a perplexity."""
    row_curves = curves(rows)
    if not row_curves:
        return None
    levels = views.levels(row_curves)
    tokens, seconds, flops = (views.equal(row_curves, axis) for axis in views.AXES)
    star = "*" if any(row.values[SHARED] for row in rows) else ""
    columns = [
        CONFIGURATION,
        *(
            Column(f"tokens-{t:g}", f"{numbers.count(t)} tokens", keep=30 - i)
            for i, t in enumerate(tokens)
        ),
        *(
            Column(f"seconds-{s:g}", f"{numbers.seconds(s)} s{star}", keep=40 - i)
            for i, s in enumerate(seconds)
        ),
        *(
            Column(f"flops-{f:g}", f"{numbers.seconds(f / 1e12)} TFLOPs", keep=45 - i)
            for i, f in enumerate(flops)
        ),
        *(Column(f"steps-{v:g}", f"steps to {v:g}", keep=10 + i) for i, v in enumerate(levels)),
    ]
    lines = []
    for c in row_curves:
        line = [_text(c.name)]
        for axis, values in zip(views.AXES, (tokens, seconds, flops), strict=True):
            for value in values:
                estimate = c.at(axis, value)
                line.append(
                    Cell("-") if estimate is None else Cell(_perplexity(*estimate), estimate[0])
                )
        line += [_steps(c.brackets(math.log(level))) for level in levels]
        lines.append(line)
    equal = (
        "equal tokens, training time and FLOPs" if flops else "equal tokens and equal training time"
    )
    title = f"Validation perplexity at {equal}, and steps to a perplexity"
    notes = [
        "Perplexity is interpolated between validations; ± gives its 95 % interval over seeds. "
        "steps to a perplexity: from the last validation above it to the first at or below it, "
        "wider where seeds differ; - where a seed does not reach it. The learning rate falls over "
        "all steps of a run, so that a run of fewer steps would be lower at its end than this one "
        "is there."
    ]
    if flops:
        notes.append("TFLOPs: of optimizer steps, by the FLOPs that are counted for a token.")
    if star:
        notes.append(
            f"{star}: measured while other runs used the machine too, so do not compare it."
        )
    return Sheet(title, columns, lines, notes)


def _perplexity(nll: float, half: float | None) -> str:
    value = views.perplexity(nll)
    return numbers.perplexity(value) + (
        "" if half is None else f" ± {numbers.perplexity(value * half)}"
    )


def _steps(brackets: Sequence[views.Bracket | None]) -> Cell:
    reached = [bracket for bracket in brackets if bracket is not None]
    if not reached or len(reached) < len(brackets):
        return Cell("-")
    low, high = views.steps_interval(reached)
    return Cell(f"{low:.0f}-{high:.0f}", low)


def forgetting(rows: Sequence[Row], on: Evidence) -> Sheet:
    """Return the table of perplexity on further texts before and after adaptation."""
    moved, since = ev.forgetting(rows, on)
    before = ev.before(rows, on)
    count = next(iter(on.intervals.values())).num_documents
    columns = [
        CONFIGURATION, Column("before", "before", keep=20), Column("after", "after"),
        Column("interval", "95 %", keep=10), Column("rank", "place", keep=30),
        Column("forgotten", "nats forgotten"), Column("of", "95 % of these", keep=15),
        Column("holm", "p (Holm)", keep=25),
    ]  # fmt: skip
    lines = []
    for name in on.ordered:
        i, c, start = on.intervals[name], moved.get(name), before[name].perplexity[0]
        rank = on.ranks.get(name, "-")
        line = [
            _text(name), Cell(numbers.perplexity(start), start),
            Cell(numbers.perplexity(i.perplexity[0]), i.perplexity[0]),
            Cell(ends(i), i.perplexity[1] if i.missing is None else None),
            Cell(rank, int(rank.split("-")[0]) if rank != "-" else None),
        ]  # fmt: skip
        if c is not None and not c.same:
            line += [
                Cell(numbers.nats(c.difference), c.difference),
                Cell(f"{numbers.nats(c.low)} to {numbers.nats(c.high)}", c.low),
                Cell(numbers.p(c.adjusted_p), c.adjusted_p),
            ]
        else:
            line += [Cell("0", 0.0), Cell("-"), Cell("-")]
        lines.append(line)
    title = f"Forgetting: perplexity on {on.text} ({count} documents) before and after adaptation"
    note = (
        f"nats forgotten: how much the log-perplexity per token of this text rose since {since}; "
        "below 0 it fell. place: those that a row may have on this text."
    )
    return Sheet(title, columns, lines, [note])
