"""What LoRA's gap to full fine-tuning is made of, and which rank the updates have and need.

    python -m harness experiment=anatomy
    harness anatomy outputs/anatomy
    harness compress outputs/anatomy/full-lr0.002-s[0-2]-* --test
    harness interpolate …        (each configuration's three runs)
    python experiments/anatomy/findings.py outputs/anatomy

Prints tables, and writes results.csv, gaps.csv (differences of configurations, paired by seed and
document, Holm over all of them), ranks.csv (W + [dW]_k of full fine-tuning less the whole of it)
and anatomy.csv (the summary of `harness anatomy`) beside this file.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from scipy import stats as scipy_stats

from harness.report import anatomy, compression, evidence, ranking, stats, summary
from harness.report.table import Row, plain, rows, show

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # where `recording` and the other experiments are
from main_seeds_control.decomposition import share  # noqa: E402 - their folder is on the path now
from recording import (  # noqa: E402 - their folder is on the path now
    NUMBERS,
    evaluate,
    evaluation,
    numbers,
    tables,
    told,
    write_csv,
)

SUMMARY = Path(anatomy.FOLDER) / anatomy.FILE_NAME
OLD_TEXT = "docstrings_held_out"
RANKS = (1, 8, 64)
MATRICES, EMBEDDINGS, REST = (
    "full-only-matrices", "full-only-embeddings+matrices",
    "full-only-biases+matrices+norms+positions",
)  # fmt: skip


@dataclass(frozen=True)
class Gap:
    """A difference of two configurations, and what it says."""

    said: str
    found: stats.Comparison


def label(row: Row) -> str:
    """Name the row: `full`, a part of it, `lora r=8`, `lora r=8 +embeddings` or `none`."""
    name = str(row.values["method.label"])
    if row.values["method.name"] != "lora":
        return name
    saved = row.records[0]["config"]["method"]["fields"].get("modules_to_save")
    return f"{name} r={row.values['method.rank']}{' +embeddings' if saved else ''}"


def gaps(by_label: dict[str, stats.Evaluation]) -> list[Gap]:
    """The differences that are asked for, in nats per token of the test set."""

    def less(a: str, b: str, said: str) -> Gap:
        return Gap(said, stats.compare(by_label[a], by_label[b]))

    found = [
        less(MATRICES, "full", "all that stays frozen, at full rank"),
        less(REST, "full", "of these the embeddings"),
        less(EMBEDDINGS, "full", "of these positions, norms and biases"),
        less(MATRICES, EMBEDDINGS, "embeddings, beside the matrices alone"),
        less(MATRICES, REST, "positions, norms and biases, beside the matrices alone"),
    ]
    for r in RANKS:
        own = f"lora r={r}"
        found += [
            less(own, "full", f"LoRA r={r}'s gap"),
            less(own, f"{own} +embeddings", f"what training the embeddings gives LoRA r={r}"),
            less(f"{own} +embeddings", "full", f"what is left of r={r}'s gap with them"),
            less(f"{own} +embeddings", EMBEDDINGS, f"r={r}'s rank, where embeddings train"),
        ]
    return found


def left(by_label: dict[str, stats.Evaluation], r: int) -> tuple[float, float, float]:
    """The share of LoRA's gap that is left where it trains the embeddings too, and its interval."""
    return share(by_label["full"], by_label[f"lora r={r} +embeddings"], by_label[f"lora r={r}"])


def ranks(found: Sequence[Row]) -> list[tuple[str, str, stats.Comparison]]:
    """(beside, rank, difference to the whole update) of full fine-tuning cut to every rank."""
    (row,) = (row for row in found if label(row) == "full")
    found_in, seeds = tables(row, compression.COMPRESSED)

    def of(rank: str, beside: str) -> stats.Evaluation:
        return evaluation(found_in, seeds, rank=rank, beside=beside, text="test")

    whole = of("full", "with")
    return [
        (beside, rank, stats.compare(of(rank, beside), whole))
        for beside in dict.fromkeys(found_in[0]["beside"])
        for rank in dict.fromkeys(found_in[0]["rank"])
        if (beside, rank) != ("with", "full")
    ]


def together(folder: Path, found: Sequence[Row]) -> tuple[float, float, list[tuple[str, ...]]]:
    """Spearman's correlation of intruders and forgetting over configurations, its p, the points."""
    known = pd.read_csv(folder / SUMMARY)
    known = known[(known["of"] == anatomy.ALL) & (known["quantity"] == "intruders")]
    intruders = dict(zip(known["name"], known["mean"], strict=True))
    base = next(evidence.evaluation(row, OLD_TEXT) for row in found if label(row) == "none")
    points = [
        (label(row), float(intruders[row.name]),
         stats.compare(evidence.evaluation(row, OLD_TEXT), base).difference)
        for row in found if row.name in intruders
    ]  # fmt: skip
    x, y = [one[1] for one in points], [one[2] for one in points]

    def statistic(some: Sequence[float]) -> float:
        return float(scipy_stats.spearmanr(some, y).statistic)

    test = scipy_stats.permutation_test(
        (x,), statistic, permutation_type="pairings", n_resamples=9999, rng=0
    )
    return statistic(x), float(test.pvalue), [(n, f"{a:.2f}", f"{b:+.2f}") for n, a, b in points]


def judge(folder: Path) -> None:
    """Print the tables of gaps, ranks and intruders, and write the files beside this script.

    Raises:
        ConfigError: runs are missing, or `harness compress` has not been run.
    """
    findings, found = evidence.find(folder), rows(folder)
    by_label = {label(row): evidence.evaluation(row, "test") for row in found}
    own, cut = gaps(by_label), ranks(found)
    adjusted = ranking.holm([gap.found.p for gap in own] + [c.p for *_, c in cut]).tolist()
    columns = ["nats", *NUMBERS, "adjusted_p"]
    shown = plain(["difference"], ["nats per token", "p (Holm)"])
    lines: list[tuple[object, ...]] = []
    for gap, p in zip(own, adjusted, strict=False):
        c = gap.found
        shown.add_row(gap.said, told(c), f"{p:.2g}")
        lines.append((gap.said, c.a, c.b, *numbers(c), p))
    show(shown)
    write_csv(HERE / "gaps.csv", ["what", "name", "less", *columns], lines)
    for r in RANKS:
        middle, low, high = left(by_label, r)
        print(f"left of LoRA r={r}'s gap where embeddings train: {100 * middle:.0f} % "
              f"({100 * low:.0f} to {100 * high:.0f})")  # fmt: skip
    shown = plain(["rank of dW", "others"], ["less the whole update, nats", "p (Holm)"])
    lines = []
    for (beside, rank, c), p in zip(cut, adjusted[len(own) :], strict=True):
        shown.add_row(rank, beside, told(c, 4), f"{p:.2g}")
        lines.append((rank, beside, *numbers(c), p))
    show(shown)
    write_csv(HERE / "ranks.csv", ["rank", "beside", *columns], lines)
    rho, p, points = together(folder, found)
    shown = plain(["configuration"], ["intruders a matrix", "forgotten, nats"])
    for point in points:
        shown.add_row(*point)
    show(shown)
    print(f"Spearman's correlation of the two over {len(points)} configurations: {rho:.2f}, "
          f"p = {p:.2g}")  # fmt: skip
    (HERE / "results.csv").write_text(summary.results_csv(findings), "utf-8")
    shutil.copy(folder / SUMMARY, HERE / "anatomy.csv")


if __name__ == "__main__":
    sys.exit(evaluate(sys.argv[1:], __doc__, judge))
