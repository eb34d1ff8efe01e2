"""How much of LoRA's gap to full fine-tuning is its rank, and how much is what it leaves frozen.

    python experiments/main_seeds_control/decomposition.py outputs/main_seeds_control

The control trains, at full rank, the matrices that LoRA adapts, and freezes the rest. With the log-
perplexities l of LoRA, c of the control and f of full fine-tuning

    l - f = (l - c) + (c - f)        gap = rank + frozen parts

Prints the table, and writes results.csv, decomposition.csv and steps.csv beside this file. The
differences and their intervals are those of `harness.report.stats.compare`, paired by seed and
document. The interval of a share s = (c - f) / (l - f) is Fieller's: every s at which c - f - s (l
- f) cannot be told from 0.

Steps to a validation perplexity are known between two readings only: steps.csv has, for every run,
the last reading above the level and the first one at or under it. (The recorded file has steps on
the line between the two, read every 10.) Ratios are those of experiments/claims, which go from the
least that the readings allow to the greatest, each wider by the spread over seeds.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from scipy import optimize

from harness.config.errors import ConfigError
from harness.report import evidence, stats, summary
from harness.report.table import Row, plain, rows, show

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "claims")]
from recording import evaluate, write_csv  # noqa: E402 - their folder is on the path now
from statements import smaller, steps_to, told  # noqa: E402 - their folder is on the path now

CONTROL = "full-only-matrices"
LEVELS = (45, 70, 100)  # validation perplexities, as in experiments/claims


@dataclasses.dataclass(frozen=True)
class Split:
    """The gap of one LoRA to full fine-tuning, nats per token, and the share of frozen parts."""

    name: str
    gap: stats.Comparison  # LoRA less full fine-tuning
    rank: stats.Comparison  # LoRA less the control
    frozen: stats.Comparison  # the control less full fine-tuning
    share: tuple[float, float, float]  # of frozen parts, and its 95 % interval


def share(
    whole: stats.Evaluation, control: stats.Evaluation, low: stats.Evaluation
) -> tuple[float, float, float]:
    """(c - f) / (l - f) with its 95 % interval (Fieller, JRSS B 16, 1954).

    Infinite ends where the gap itself cannot be told from 0.
    """

    def against(part: float) -> stats.Comparison:
        mixed = dataclasses.replace(
            whole, name="mixed", nll=(1 - part) * whole.nll + part * low.nll
        )
        return stats.compare(control, mixed)

    point = stats.compare(control, whole).difference / stats.compare(low, whole).difference

    def end(value: Callable[[float], float], direction: int) -> float:
        reach = 1e-3
        while value(point) * value(point + direction * reach) > 0:
            reach *= 2
            if reach > 1e3:
                return direction * float("inf")
        return float(optimize.brentq(value, *sorted((point, point + direction * reach))))

    gap_sign = np.sign(stats.compare(low, whole).difference)
    ends = (
        end(lambda s: against(s).low if gap_sign > 0 else against(s).high, -1),
        end(lambda s: against(s).high if gap_sign > 0 else against(s).low, +1),
    )
    return point, *ends


def splits(found: list[Row]) -> list[Split]:
    """One for every rank of LoRA.

    Raises:
        ConfigError: no full fine-tuning, no control, or runs of other seeds.
    """
    by_label = {label: [r for r in found if r.values["method.label"] == label]
                for label in ("full", CONTROL, "lora")}  # fmt: skip
    for label, there in by_label.items():
        if not there or (label != "lora" and len(there) != 1):
            raise ConfigError(f"expected one row of {label}, and there are {len(there)}")
    whole, control = (
        evidence.evaluation(by_label[label][0], "test") for label in ("full", CONTROL)
    )
    made = []
    for row in by_label["lora"]:
        low = evidence.evaluation(row, "test")
        if not low.seeds == whole.seeds == control.seeds:
            raise ConfigError(f"{row.name} has other seeds than full fine-tuning or the control")
        pairs = ((low, whole), (low, control), (control, whole))
        first, second, third = (stats.compare(*pair) for pair in pairs)
        made.append(Split(row.name, first, second, third, share(whole, control, low)))
    return made


def write_steps(found: list[Row]) -> None:
    """steps.csv: of every run, between which readings it gets to a level; empty where it does not.

    What is there by the first reading is between 0 steps and that one.
    """
    ends = [f"steps_to_{level}_{end}" for level in LEVELS for end in ("above", "reached")]
    lines = []
    for row in found:
        needs = [steps_to(row, level) for level in LEVELS]
        for i, record in enumerate(row.records):
            known = [(None, None) if of[i].is_bound else of[i].ends for of in needs]
            lines.append(
                [row.name, record["config"]["seed"], *(end for two in known for end in two)]
            )
    write_csv(HERE / "steps.csv", ["row", "seed", *ends], lines)


def show_steps(found: list[Row]) -> None:
    """Steps to every level by row, and the ratios to full fine-tuning and to the control."""
    shown = plain(["steps to"], [str(level) for level in LEVELS])
    for row in found:
        needs = [steps_to(row, level) for level in LEVELS]
        cells = ["more" if any(n.is_bound for n in of) else told(of) for of in needs]
        shown.add_row(row.name, *cells)
    show(shown)
    (whole,), (control,) = (
        [row for row in found if row.values["method.label"] == label] for label in ("full", CONTROL)
    )
    low = [row for row in found if row.values["method.label"] == "lora"]
    for a, b in [(control, whole), *((row, of) for of in (whole, control) for row in low)]:
        for level in LEVELS:
            ratio = smaller("", "steps", a, b, partial(steps_to, level=level))
            print(f"{a.name} against {b.name}, to {level}: {ratio.numbers}; p = {ratio.p:.3g}")


def judge(folder: Path) -> None:
    """Print the tables of gaps and of steps, and write the files beside this script.

    Raises:
        ConfigError: see `splits`.
    """
    findings, here = evidence.find(folder), rows(folder)
    shown = plain(["LoRA"], ["gap, nats", "rank", "frozen parts", "share of frozen parts, %"])
    lines = []
    for split in splits(here):
        ends = [(c.difference, c.low, c.high) for c in (split.gap, split.rank, split.frozen)]
        lines.append([split.name, *(v for three in ends for v in three), *split.share])
        cells = [f"{v:.3f} ({low:.3f} to {high:.3f})" for v, low, high in ends]
        percent = "{:.0f} ({:.0f} to {:.0f})".format(*(100 * s for s in split.share))
        shown.add_row(split.name, *cells, percent)
    write_steps(here)
    (HERE / "results.csv").write_text(summary.results_csv(findings), "utf-8")
    parts = [f"{part}{end}" for part in ("gap", "rank", "frozen") for end in ("", "_low", "_high")]
    columns = ["name", *parts, "share_frozen", "share_frozen_low", "share_frozen_high"]
    write_csv(HERE / "decomposition.csv", columns, lines)
    show(shown)
    show_steps(here)


if __name__ == "__main__":
    sys.exit(evaluate(sys.argv[1:], __doc__, judge))
