"""Many configurations compared: Holm's adjustment over pairs, ranks and Pareto fronts.

A pair is compared as `stats.compare` does; what is told here of more than a pair holds at 5 % for
all of them together.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from scipy import special

from harness.config.errors import ConfigError, nearest
from harness.report.stats import ALPHA, Comparison, Evaluation, Floats, Interval, check, compare

ENOUGH_SEEDS = 5  # from which on nothing is said of their number


def compare_all(
    evaluations: Sequence[Evaluation], pairs: Iterable[tuple[str, str]] | None = None
) -> list[Comparison]:
    """`compare` for pairs of names, by default all, Holm-adjusted over just these."""
    check(evaluations)
    named = {e.name: e for e in evaluations}
    pairs = list(itertools.combinations(named, 2) if pairs is None else pairs)
    for name in itertools.chain.from_iterable(pairs):
        if name not in named:
            raise ConfigError(f"no configuration is called {name}; {nearest(name, named)}")
    comparisons = [compare(named[a], named[b]) for a, b in pairs]
    adjusted = holm([c.p for c in comparisons]).tolist()
    return [replace(c, adjusted_p=p) for c, p in zip(comparisons, adjusted, strict=True)]


def holm(p: Sequence[float]) -> Floats:
    """Step-down adjusted p-values in the order given (Holm, Scand. J. Statistics 6, 1979)."""
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values)
    steps = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    return np.minimum(1.0, steps)[np.argsort(order)]


def few_seeds(num_seeds: int, num_comparisons: int = 1) -> str | None:
    """What can be claimed with fewer than 5 seeds, to print beside results; None with more."""
    if num_seeds == 1:
        return "1 seed: what is found holds of these runs; of other seeds nothing is known"
    if num_seeds >= ENOUGH_SEEDS:
        return None
    errors = -special.stdtrit(num_seeds - 1, ALPHA / num_comparisons / 2)
    if num_seeds == 2:
        return (
            "with 2 seeds hardly any difference can be shown: the clearest of "
            f"{num_comparisons} comparison(s) is significant from {errors:,.0f} standard errors "
            f"over seeds on; take {ENOUGH_SEEDS}. A row may be told apart while a worse one is "
            "not, because its two seeds happened to end alike. No difference found is not equality"
        )
    return (
        f"{num_seeds} seeds: intervals cover, tests and families hold their level where seeds "
        "scatter evenly about their mean, but find little: the clearest of "
        f"{num_comparisons} comparison(s) is significant from {errors:.1f} standard errors over "
        "seeds on. No difference found is not equality"
    )


def warn_of_few_seeds(seeds: Iterable[tuple[str, int]]) -> str | None:
    """What to say before a sweep over two seeds, whose configurations and seeds these are.

    None where fewer than two configurations have two seeds each, or any has more: one seed is named
    in the table, and three or more find something.
    """
    counts = Counter(configuration for configuration, _ in set(seeds))
    if max(counts.values(), default=0) != 2 or sum(n == 2 for n in counts.values()) < 2:
        return None
    return (
        "with 2 seeds hardly any difference can be shown; take "
        f"{ENOUGH_SEEDS}: seed={','.join(map(str, range(ENOUGH_SEEDS)))}"
    )


def ranks(intervals: Sequence[Interval], comparisons: Sequence[Comparison]) -> dict[str, str]:
    """The ranks each configuration may have ("2", "2-4"), by ascending log-perplexity.

    The best is 1 + the number significantly better (Holm-adjusted), the worst is the number of
    configurations less those significantly worse. Raises ConfigError if a pair was not compared.
    """
    wins, shown = _wins([i.name for i in intervals], comparisons), {}
    for i in sorted(intervals, key=lambda i: i.log_perplexity):
        best = 1 + sum(loser == i.name for _, loser in wins)
        worst = len(intervals) - sum(winner == i.name for winner, _ in wins)
        shown[i.name] = f"{best}-{worst}" if best < worst else f"{best}"
    return shown


def may_diverge(num_seeds: int) -> float:
    """The largest share of seeds that may diverge (95 %) where none of so many did."""
    return float(1 - ALPHA ** (1 / num_seeds))


def is_less(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether positive measurements are less by more than their spread.

    Welch's t-test of the logarithms at 5 %, two or more measurements each; without any spread,
    whether they are no more.
    """
    a, b = (np.log(np.asarray(values, dtype=np.float64)) for values in (first, second))
    parts = [values.var(ddof=1) / len(values) for values in (a, b)]
    shorter, variance = float(b.mean() - a.mean()), sum(parts)
    if variance == 0:
        return shorter >= 0
    df = variance**2 / sum(p**2 / (len(v) - 1) for p, v in zip(parts, (a, b), strict=True))
    return shorter > -special.stdtrit(df, ALPHA / 2) * math.sqrt(variance)


def pareto(
    costs: Mapping[str, float],
    comparisons: Sequence[Comparison],
    is_no_more: Callable[[str, str], bool] | None = None,
) -> dict[str, tuple[str, ...]]:
    """Who dominates each configuration in (cost, log-perplexity); nobody does on the front.

    y dominates x if y costs no more and is significantly better (Holm-adjusted). A cheaper y that
    is merely not shown to be worse does not: the fewer the seeds, the more it would then dominate.
    The front is never empty: whoever dominates has the lower log-perplexity. Costs (parameters,
    bytes) count as exact, unless `is_no_more(y, x)` says whether y surely costs no more than x.
    Raises ConfigError where a cost is not finite or a pair is missing.
    """
    for name, cost in costs.items():
        if not math.isfinite(cost):
            raise ConfigError(f"{name}: a cost of {cost} has no place on a Pareto front")
    wins = _wins(list(costs), comparisons)
    no_more = is_no_more or (lambda y, x: costs[y] <= costs[x])
    return {x: tuple(y for y in costs if (y, x) in wins and no_more(y, x)) for x in costs}


def _wins(names: Sequence[str], comparisons: Sequence[Comparison]) -> set[tuple[str, str]]:
    """(better, worse) of every pair of names of which one is significantly better."""
    winners = {frozenset((c.a, c.b)): c.better for c in comparisons}
    wins = set()
    for x, y in itertools.combinations(names, 2):
        if (pair := frozenset((x, y))) not in winners:
            raise ConfigError(f"{x} and {y} were not compared; ranks and fronts need every pair")
        if (better := winners[pair]) is not None:
            wins.add((better, y if better == x else x))
    return wins
