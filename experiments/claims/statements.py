"""What a claim is made of: the runs, a statement about them with its test, a figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special
from scipy import stats as scipy_stats

from harness.config.errors import ConfigError, nearest
from harness.report import evidence, ranking, stats, views
from harness.report.axes import Axes, color_of
from harness.report.figure import Figure, Series
from harness.report.table import Row
from harness.results import run_record

MIB = 2**20
CONTROL = "full-only-matrices"  # the matrices of LoRA at full rank, all else frozen


@dataclass(frozen=True)
class Runs:
    """The finished configurations of a folder, found by what they are."""

    folder: Path
    rows: list[Row]

    def one(
        self, label: str, rank: Any = None, targets: str = "all", *, steps: int = 80,
        share: float = 1.0, micro_batch: int = 8,
    ) -> Row:  # fmt: skip
        """The row of a method; raises ConfigError where it has not been run."""
        asked = {
            "method.label": label, "method.rank": None if rank is None else str(rank),
            "method.targets": None if label in ("full", "none", CONTROL) else targets,
        }  # fmt: skip
        for row in self.rows:
            config = row.records[0]["config"]
            same = all(row.values[path] == value for path, value in asked.items())
            trained = config["train"]["steps"], config["train"]["micro_batch"]
            is_same_training = trained == (steps, micro_batch) or not row.values["method.lr"]
            if same and is_same_training and config["data"].get("train_share", 1.0) == share:
                return row
        wanted = f"{label} {targets} {rank or ''} steps={steps} train_share={share}"
        names = [row.name for row in self.rows]
        raise ConfigError(f"{self.folder} has no finished {wanted}; {nearest(wanted, names)}")

    def control(self) -> Row | None:
        """The row of the control, if it has been run: the sweep of claims does not have it."""
        there = any(row.values["method.label"] == CONTROL for row in self.rows)
        return self.one(CONTROL) if there else None


def short(row: Row) -> str:
    """The method alone: what tells it from the same of other settings is left out."""
    v = row.values
    rank = f"{'r' if v['method.name'] == 'lora' else 'k'}={v['method.rank']}"
    return " ".join([v["method.label"], *([v["method.targets"], rank] if v["method.rank"] else [])])


def step_seconds(row: Row) -> list[float]:
    """Median seconds of an optimizer step after the first three, a number a seed."""
    return [
        statistics.median(
            metric["train/step_seconds"]
            for metric in run_record.read_metrics(run_dir)
            if metric["step"] > 3 and "train/step_seconds" in metric
        )
        for run_dir in row.run_dirs
    ]


def curve(row: Row) -> views.Curve:
    """Validation as the row learns, whose seconds are steps times the median step."""
    found = views.curve(row)
    assert found is not None, row.name
    seconds = np.outer(step_seconds(row), found.steps)
    return views.Curve(found.name, found.steps, found.tokens, seconds, found.nll)


def trainable(row: Row) -> float:
    """Trainable parameters."""
    return float(row.values["parameters.trainable"])


def is_borrowed(row: Row) -> bool:
    """Whether the learning rate is not what a search for this very setting found."""
    found = (record["method"]["lr_from"] for record in row.records)
    return bool(row.values["method.lr"]) and any(f not in ("tuned", "not used") for f in found)


def perplexity(row: Row) -> float:
    """Test perplexity per token: exp of the mean log-perplexity over seeds."""
    return float(row.values["quality.test.perplexity"])


# ------------------------------------------------------------------------------- the statements


@dataclass(frozen=True)
class Statement:
    """A part of a claim, and what the runs say of it."""

    text: str
    numbers: str
    favours: bool  # whether the estimate is on the statement's side
    p: float | None  # two-sided; None: exact numbers
    rows: tuple[str, ...]  # of results.csv


@dataclass(frozen=True)
class Claim:
    """One of the seven."""

    title: str
    statements: list[Statement]
    figures: list[Figure]
    remarks: list[str] = field(default_factory=list)
    main: int = 1  # the first so many statements are the claim: it holds where all of them do

    def verdicts(self) -> list[str]:
        """holds | does not hold | cannot be told, of every statement."""
        adjusted = iter(ranking.holm([s.p for s in self.statements if s.p is not None]).tolist())
        found = []
        for s in self.statements:
            told = s.p is None or next(adjusted) < stats.ALPHA
            found.append(
                "cannot be told" if not told else "holds" if s.favours else "does not hold"
            )
        return found

    def verdict(self) -> str:
        """The claim's own: what any of its main statements says against it, or else all for it."""
        found = self.verdicts()[: self.main]
        for verdict in ("does not hold", "cannot be told"):
            if verdict in found:
                return verdict
        return "holds"


def better(text: str, a: Row, b: Row, on: str = "test") -> Statement:
    """Whether `a` has the lower log-perplexity."""
    c = stats.compare(evidence.evaluation(a, on), evidence.evaluation(b, on))
    values = f"{perplexity(a):.1f} against {perplexity(b):.1f}: " if on == "test" else ""
    numbers = f"{values}{c.difference:+.3f} nats per token ({c.low:+.3f} to {c.high:+.3f})"
    return Statement(text, numbers, c.difference < 0, c.p, (a.name, b.name))


@dataclass(frozen=True)
class Need:
    """What a run needed to get somewhere, in steps or seconds.

    `least` and `most` are what it may have been, where it is read now and then only.
    """

    amount: float
    is_bound: bool = False  # more than that: its run had ended, and it was not there
    least: float | None = None
    most: float | None = None

    @property
    def ends(self) -> tuple[float, float]:
        """The least and the most; both are the amount where it is known."""
        return (
            self.amount if self.least is None else self.least,
            self.amount if self.most is None else self.most,
        )

    def times(self, factor: float) -> Need:
        """The same in another unit."""
        least, most = (end * factor for end in self.ends)
        return Need(self.amount * factor, self.is_bound, least, most)


def steps_to(row: Row, level: float) -> list[Need]:
    """Steps to a validation perplexity, of every seed: between two readings."""
    c = curve(row)
    last = Need(float(c.steps[-1]), is_bound=True)
    return [
        last if b is None else Need(b.interpolated, least=b.above, most=b.reached)
        for b in c.brackets(math.log(level))
    ]


def a_step(row: Row) -> list[Need]:
    """Seconds of a median step, of every seed."""
    return [Need(seconds) for seconds in step_seconds(row)]


def seconds_to(row: Row, level: float) -> list[Need]:
    """The same in seconds of median steps."""
    pairs = zip(steps_to(row, level), step_seconds(row), strict=True)
    return [need.times(seconds) for need, seconds in pairs]


def smaller(
    text: str, what: str, a: Row, b: Row, needs: Callable[[Row], Sequence[Need]]
) -> Statement:
    """Whether what `a` needs is the smaller one in ratio, seed by seed: a t-test of the log-ratio.

    What is known between two ends only gives every seed's log-ratio a lower and an upper end. The
    interval goes from the mean of the lower ones, less half of the t-interval of the log-ratios of
    interpolated amounts, to the mean of the upper ones plus as much; the test agrees with it.

    Where `a` was not there when its run ended, it needs more than that: only in how many seeds it
    needs more is known, and tested by their signs. Where `b` was not, it cannot be told.
    """
    rows = (a.name, b.name)
    one, other = (
        dict(zip([r["config"]["seed"] for r in row.records], needs(row), strict=True))
        for row in (a, b)
    )
    pairs = [(one[seed], other[seed]) for seed in sorted(one.keys() & other.keys())]
    if len(pairs) < 2:
        return Statement(text, f"{what}: fewer than two seeds in common", False, 1.0, rows)
    if any(need.is_bound for _, need in pairs):
        return Statement(text, f"{what}: {short(b)} does not get there", False, 1.0, rows)
    means = [told(side) for side in zip(*pairs, strict=True)]
    if any(need.is_bound for need, _ in pairs):
        longer = sum(x.ends[0] >= y.ends[1] for x, y in pairs)
        shorter = sum(x.ends[1] < y.ends[0] and not x.is_bound for x, y in pairs)
        sure = longer + shorter == len(pairs)
        p = float(scipy_stats.binomtest(longer, len(pairs)).pvalue) if sure else 1.0
        numbers = f"{what}: more than {means[0]} against {means[1]}, "
        numbers += f"more in {longer} of {len(pairs)} seeds" if sure else "which tells nothing"
        return Statement(text, numbers, False, p, rows)
    logs, lower, upper = log_ratios(pairs)
    mean, half = views.mean(logs)
    assert half is not None
    error = float(np.std(logs, ddof=1)) / math.sqrt(len(logs))
    least, most = float(np.mean(lower)), float(np.mean(upper))
    beyond = max(least, -most, 0.0)  # how far no ratio that the ends allow comes to 1
    p = 2 * float(special.stdtr(len(logs) - 1, -beyond / error)) if error else float(beyond == 0)
    with np.errstate(over="ignore"):
        ends = " to ".join(f"{np.exp(end):.2f}" for end in (least - half, most + half))
    numbers = f"{what}: {means[0]} against {means[1]}, ratio {math.exp(mean):.2f} ({ends})"
    return Statement(text, numbers, mean < 0, p, rows)


def log_ratios(pairs: Sequence[tuple[Need, Need]]) -> tuple[list[float], list[float], list[float]]:
    """Log-ratios of what two need, as interpolated, at the least and at the most, by seed."""

    def log(over: float, under: float) -> float:
        if under == 0:
            return math.inf
        return math.log(over / under) if over else -math.inf

    return (
        [log(x.amount, y.amount) if x.amount or y.amount else 0.0 for x, y in pairs],
        [log(x.ends[0], y.ends[1]) if x.ends[0] or y.ends[1] else 0.0 for x, y in pairs],
        [log(x.ends[1], y.ends[0]) if x.ends[1] or y.ends[0] else 0.0 for x, y in pairs],
    )


def told(needs: Sequence[Need]) -> str:
    """The mean over seeds, or between which two it is."""
    least, most = (statistics.fmean(ends) for ends in zip(*(n.ends for n in needs), strict=True))
    return f"{least:.3g}" if least == most else f"{least:.3g}-{most:.3g}"


def exact(text: str, numbers: str, holds: bool, *of: Row) -> Statement:
    """A statement about numbers without a variance."""
    return Statement(text, numbers, holds, None, tuple(row.name for row in of))


# ------------------------------------------------------------------------------------- figures


def points(
    name: str, label: str, x: Sequence[float], y: Sequence[float],
    ends: Sequence[tuple[float, float]] | None = None, *, line: bool = True, band: bool = False,
) -> Series:  # fmt: skip
    """A line or points in the method's colour."""
    low, high = [list(side) for side in zip(*ends, strict=True)] if ends else (None, None)
    return Series(name, color_of(label), list(x), list(y), low, high, line=line, band=band)


def tested(
    name: str, members: Sequence[Row], x: Callable[[Row], float], *, line: bool = True
) -> Series:
    """Test perplexity with its interval, by `x`."""
    found = stats.intervals([evidence.evaluation(row, "test") for row in members])
    label = members[0].values["method.label"]
    values = [i.perplexity for i in found]
    ends = [(v[1], v[2]) for v in values]
    return points(name, label, [x(row) for row in members], [v[0] for v in values], ends, line=line)


def learning(key: str, title: str, x: str, members: dict[str, Row], axis: str) -> Figure:
    """Validation perplexity by steps or seconds, seeds as a band."""
    series = []
    for name, row in members.items():
        c = curve(row)
        along = c.steps.tolist() if axis == "steps" else c.seconds.mean(0).tolist()
        ends = list(zip(np.exp(c.nll.min(0)).tolist(), np.exp(c.nll.max(0)).tolist(), strict=True))
        label = row.values["method.label"]
        series.append(points(name, label, along, np.exp(c.nll.mean(0)).tolist(), ends, band=True))
    return Figure(Axes(key, title, x, "validation perplexity", log_y=True), series)
