"""Which configuration to take: the smallest that is good enough, and the best within a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from harness.report import costs as spent
from harness.report import evidence as ev
from harness.report import views
from harness.report.costs import amount as amount
from harness.report.evidence import Evidence
from harness.report.sheet import Cell, Column, Sheet
from harness.report.table import SHARED, TEST, Row
from harness.results import numbers

TOLERANCES = (5, 10, 25, 50, 100)  # per cent above the lowest perplexity
FEW_BUDGETS = 2  # of a kind, where room is short


@dataclass(frozen=True)
class Choice:
    """A configuration to take, for what is wanted of it."""

    wanted: str
    take: str
    least: tuple[str, ...] = ()  # the costs in which it is the smallest that will do
    ties: tuple[str, ...] = ()  # within the same budget, and not significantly worse


def good_enough(
    rows: Sequence[Row], test: Evidence, titles: Sequence[str] = ev.BUDGETS
) -> list[Choice]:
    """The best row, and by every cost the smallest that is hardly worse.

    A tolerance is named where a smaller row than before will do.
    """
    best = test.ordered[0]
    choices = [Choice("lowest", best)]
    lowest = test.intervals[best].log_perplexity
    shown = [row for row in rows if row.name in test.intervals]
    costs = {title: ev.sure_costs(shown, title) for title in titles}
    allowed = {"not significantly higher": [n for n in test.ordered if ties_best(n, test)]} | {
        f"up to {percent} % higher": [
            name
            for name in test.ordered
            if views.perplexity(test.intervals[name].log_perplexity - lowest) <= 1 + percent / 100
        ]
        for percent in TOLERANCES
    }
    before = dict.fromkeys(costs, best)
    for wanted, names in allowed.items():
        picks: dict[str, list[str]] = {}
        for title, known in costs.items():
            # Of equal costs the better one: names are in the order of perplexity.
            least = min((n for n in names if n in known), key=known.__getitem__, default=None)
            if least is None or known[least] >= known.get(before[title], math.inf):
                continue
            picks.setdefault(least, []).append(title)
            before[title] = least
        choices += [Choice(wanted, name, tuple(titles)) for name, titles in picks.items()]
    return choices


def within_budgets(
    rows: Sequence[Row],
    test: Evidence,
    limit: int | None = None,
    titles: Sequence[str] = ev.BUDGETS,
) -> list[Choice]:
    """The best row for every round budget that buys another one; `limit` of a kind.

    Budgets that buy the best of all are left out.
    """
    shown = [row for row in rows if row.name in test.intervals]
    choices = []
    for title in titles:
        costs, last = ev.sure_costs(shown, title), None
        own = []
        for budget in views.budgets(list(costs.values()), spent.of(title).scale):
            bought = views.within(budget, costs, test)
            if bought is None or bought == last:
                continue
            last = (best, ties) = bought
            if best == test.ordered[0]:
                break
            own.append(Choice(spent.told(title, budget, "≤"), best, ties=tuple(ties)))
        if limit is not None and len(own) > limit:
            own = own[:: -(-len(own) // limit)]
        choices += own
    return choices


def ties_best(name: str, test: Evidence) -> bool:
    """Whether it is the best, or not significantly worse.

    With two seeds hardly any difference can be shown, so that nothing but the best is as good.
    """
    best = test.ordered[0]
    if test.num_seeds[0] == 2:
        return name == best
    pair = [c for c in test.comparisons if {c.a, c.b} == {name, best}]
    return name == best or any(c.better is None for c in pair)


def sheet(
    rows: Sequence[Row],
    test: Evidence,
    limit: int | None = None,
    further: Sequence[str] = (),
) -> Sheet | None:
    """ "Which should I take?" as a table; None where there is nothing to choose from."""
    if len(test.intervals) < 2 or not test.comparisons:
        return None
    named = {row.name: row for row in rows}
    titles = [*ev.BUDGETS, *(title for title in further if title not in ev.BUDGETS)]
    costs = {title: ev.costs(rows, title) for title in titles}
    lowest = test.intervals[test.ordered[0]].log_perplexity
    heads = [
        Column("wanted", "perplexity, or budget", text=True),
        Column("take", "take", text=True),
        Column(TEST, "test"),
        Column("times", "× lowest", keep=20, why="its perplexity by the lowest"),
        Column("least", "with the least", text=True, keep=5),
        Column(ev.PARAMETERS, "trainable", keep=10),
        Column(ev.MEMORY, "peak MiB", keep=40),
        Column(ev.TIME, "seconds", keep=50),
        Column(ev.FLOPS, "TFLOPs", keep=60),
        *(Column(title, _heading(title), keep=5) for title in titles[len(ev.BUDGETS) :]),
        Column("ties", "not significantly worse", text=True, keep=70),
    ]
    lines = []
    for choice in [*good_enough(rows, test, titles), *within_budgets(rows, test, limit, titles)]:
        interval = test.intervals[choice.take]
        times = views.perplexity(interval.log_perplexity - lowest)
        every = set(choice.least) == {title for title in titles if costs[title]}
        least = "all costs" if every else ", ".join(spent.of(t).short for t in choice.least) or "-"
        line = [
            Cell(choice.wanted, choice.wanted), Cell(choice.take, choice.take),
            Cell(numbers.perplexity(interval.perplexity[0]), interval.perplexity[0]),
            Cell(numbers.perplexity(times), times), Cell(least, least),
        ]  # fmt: skip
        line += [_cost_cell(named[choice.take], title, costs[title]) for title in titles]
        ties = spent.shorten(choice.ties) or "-"
        lines.append([*line, Cell(ties, ties)])
    if len(lines) < 2:
        return None
    table = Sheet("Which should I take?", heads, lines)
    empty = [c.key for i, c in enumerate(heads) if all(line[i].shown == "-" for line in lines)]
    return table.only([c.key for c in heads if c.key not in empty])


def _cost_cell(row: Row, title: str, costs: dict[str, float]) -> Cell:
    if row.name not in costs:
        return Cell("-")
    value = costs[row.name]
    shown = amount(title, value).split(" ")[0]
    measured = spent.of(title).measured or title == ev.MEMORY
    return Cell(f"{shown}*" if measured and row.values[SHARED] else shown, value)


def _heading(title: str) -> str:
    cost = spent.of(title)
    return f"{cost.short}, {cost.unit}"
