"""The same runs at equal budgets: learning curves, steps to a perplexity, the best within a budget.

Curves are of validation, read every `evaluate.interval` steps, and interpolated in nll between;
steps to a perplexity are between two readings,
and no better known than that. A run cut short is not a
short run: the schedule of the rate belongs to the run's full length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from harness.report import costs, stats
from harness.report.evidence import Evidence
from harness.report.table import Row
from harness.results import run_record

AXES = ("tokens", "seconds", "flops")  # of equal budgets


@dataclass(frozen=True)
class Curve:
    """Validation of one configuration as it learns: P points, R seeds."""

    name: str
    steps: NDArray[np.int64]  # (P,)
    tokens: NDArray[np.int64]  # (P,) trained on so far
    seconds: NDArray[np.float64]  # (R, P) of optimizer steps so far, evaluation excluded
    nll: NDArray[np.float64]  # (R, P) nats per validation token
    flops: NDArray[np.float64] | None = None  # (P,) of optimizer steps so far; None: not counted

    def at(self, axis: str, value: float) -> tuple[float, float | None] | None:
        """Log-perplexity at `value` of one of AXES as `mean`; None if not there."""
        readings = []
        for r, nll in enumerate(self.nll):
            x = self.along(axis)[r]
            if not x[0] <= value <= x[-1] * (1 + 1e-9):
                return None
            readings.append(float(np.interp(value, x, nll)))
        return mean(readings)

    def along(self, axis: str) -> NDArray[Any]:
        """What every point of every seed has spent of one of AXES, (R, P)."""
        if axis == "seconds":
            return self.seconds
        spent = self.tokens if axis == "tokens" else self.flops
        assert spent is not None, "FLOPs that were not counted"
        return np.broadcast_to(spent, self.nll.shape)

    def brackets(self, nll: float) -> list[Bracket | None]:
        """Of every seed, between which validations `nll` was reached; None where it was not."""
        brackets: list[Bracket | None] = []
        end = float(self.steps[-1])
        for values in self.nll:
            under = np.flatnonzero(values <= nll)
            if not len(under):
                brackets.append(None)
            elif (p := under[0]) == 0:
                brackets.append(Bracket(0.0, float(self.steps[0]), float(self.steps[0]), end))
            else:
                before, after = float(self.steps[p - 1]), float(self.steps[p])
                share = float((values[p - 1] - nll) / (values[p - 1] - values[p]))
                brackets.append(Bracket(before, before + share * (after - before), after, end))
        return brackets


@dataclass(frozen=True)
class Bracket:
    """Steps to a level, known as well as validation was read."""

    above: float  # the last validation above the level (0: there was none before)
    interpolated: float  # on the line between the two readings
    reached: float  # the first validation at or under it
    end: float = math.inf  # the last validation of the run


def steps_interval(brackets: Sequence[Bracket]) -> tuple[float, float]:
    """Between which steps a level is reached on average over seeds (95 %).

    From the mean of the lower ends, less half of the t-interval over seeds of the interpolated
    steps, to the mean of the upper ends plus as much: interpolation tells how much seeds differ,
    but not where between two readings they all are. One seed has its bracket.
    """
    half = mean([b.interpolated for b in brackets])[1] or 0.0
    low = float(np.mean([b.above for b in brackets])) - half
    high = float(np.mean([b.reached for b in brackets])) + half
    return max(0.0, low), min(high, max(b.end for b in brackets))  # no run reaches it later


def mean(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean over seeds, and half of its 95 % t-interval; None for one seed."""
    n = len(values)
    if n == 1:
        return float(values[0]), None
    half = special.stdtrit(n - 1, 1 - stats.ALPHA / 2) * np.std(values, ddof=1) / math.sqrt(n)
    return float(np.mean(values)), float(half)


def perplexity(nll: float) -> float:
    """exp, infinite where it overflows."""
    return math.exp(nll) if nll < 709 else math.inf


def curve(row: Row) -> Curve | None:
    """The learning curve of a row that trains, over the seeds whose metrics.jsonl has one.

    None without two validations that these have in common.
    """
    steps, seconds, nll = [], [], []
    tokens: dict[int, int] = {}
    for run_dir in row.run_dirs:
        so_far, validated = {0: 0.0}, {}
        for metric in run_record.read_metrics(run_dir):
            step = metric["step"]
            if "train/nll" in metric:
                so_far[step] = so_far.get(step - 1, math.nan) + metric["train/step_seconds"]
            elif (value := metric.get("eval/validation/nll")) is not None:  # null: diverged
                validated[step], tokens[step] = value, metric["tokens"]
        if len(validated) > 1:
            steps.append(set(validated))
            seconds.append(so_far)
            nll.append(validated)
    common = sorted(set.intersection(*steps)) if steps else []
    if len(common) < 2:
        return None
    spent = [costs.train_flops(row.records[0], step) for step in common]
    return Curve(
        row.name,
        np.array(common),
        np.array([tokens[step] for step in common]),
        np.array([[so_far.get(step, math.nan) for step in common] for so_far in seconds]),
        np.array([[validated[step] for step in common] for validated in nll]),
        None if None in spent else np.array(spent, dtype=np.float64),
    )


def levels(curves: Sequence[Curve], count: int = 3) -> list[float]:
    """Round perplexities between where the curves start and the best end, lowest last."""
    start = perplexity(min(float(c.nll[:, 0].max()) for c in curves))
    best = perplexity(min(float(c.nll[:, -1].mean()) for c in curves))
    if not best < start < math.inf:
        return []
    candidates = {
        digit * 10.0**power
        for power in range(math.floor(math.log10(best)), math.ceil(math.log10(start)) + 1)
        for digit in (1, 1.5, 2, 3, 4, 5, 7)
        if best < digit * 10.0**power < start
    }
    ordered = sorted(candidates, reverse=True)
    if len(ordered) <= count:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (count - 1))] for i in range(count)]


def equal(curves: Sequence[Curve], axis: str) -> list[float]:
    """A quarter, half and all of the most that every curve reaches of one of AXES.

    Of FLOPs there are none where a curve has them not counted, or where all spend as many a token,
    so that equal tokens are equal FLOPs.
    """
    if axis == "flops" and not _differ_in_flops(curves):
        return []
    ends = [c.along(axis)[:, -1].min() for c in curves]
    return [float(min(ends)) * share for share in (0.25, 0.5, 1)]


def _differ_in_flops(curves: Sequence[Curve]) -> bool:
    """Whether FLOPs are counted for all curves, and are not the same multiple of their tokens."""
    counted = [c.flops[-1] / c.tokens[-1] for c in curves if c.flops is not None and c.tokens[-1]]
    return len(counted) == len(curves) and max(counted) > min(counted) * (1 + 1e-9)


def budgets(costs: Sequence[float], unit: float = 1) -> list[float]:
    """Round budgets, 1, 1.5, 2, 3, 5 or 7 times a power of ten units, that divide `costs`."""
    rounded = set()
    for cost in {cost / unit for cost in costs if cost > 0}:
        power = 10.0 ** math.floor(math.log10(cost))
        digit = next(d for d in (1, 1.5, 2, 3, 5, 7, 10) if cost <= d * power * (1 + 1e-9))
        rounded.add(digit * power * unit)
    return sorted(rounded)


def within(
    budget: float, costs: Mapping[str, float], evidence: Evidence
) -> tuple[str, list[str]] | None:
    """The best configuration of those that cost no more, and those not significantly worse."""
    affordable = [name for name in evidence.ordered if costs.get(name, math.inf) <= budget]
    if not affordable:
        return None
    best = affordable[0]
    beaten = {
        loser
        for c in evidence.comparisons
        if best in (c.a, c.b) and c.better == best
        for loser in (c.a, c.b)
        if loser != best
    }
    return best, [name for name in affordable[1:] if name not in beaten]


def matched(
    costs: Mapping[str, float], comparisons: Sequence[stats.Comparison], tolerance: float = 0.05
) -> list[stats.Comparison]:
    """Pairs whose costs agree within `tolerance`."""
    return [
        c
        for c in comparisons
        if c.a in costs
        and c.b in costs
        and 0 < max(costs[c.a], costs[c.b]) <= (1 + tolerance) * min(costs[c.a], costs[c.b])
    ]
