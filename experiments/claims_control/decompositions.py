"""The gaps that claims 1, 6 and 7 rest on, taken apart: LoRA's rank, and what it leaves frozen.

    python experiments/claims_control/decompositions.py outputs/claims_control

For every setting (20 and 240 steps, a tenth and a hundredth of the text) what
experiments/main_seeds_control/decomposition.py does for one. Prints the tables, and writes
results.csv and decompositions.csv beside this file. Adjusted p-values are Holm's, over all
differences of nats that are tested here.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from harness.config.errors import ConfigError
from harness.report import evidence, ranking, stats, summary
from harness.report.table import Row, plain, rows, show

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "main_seeds_control"))
from decomposition import CONTROL, Split, splits  # noqa: E402 - its folder is on the path now

PARTS = ("gap", "rank", "frozen")
OLD_TEXT = "docstrings_held_out"  # what is forgotten
Setting = tuple[int, float]  # optimizer steps, share of the training text


@dataclass(frozen=True)
class Tested:
    """A difference of two configurations in one setting."""

    setting: Setting
    name: str  # of the LoRA, or of the two configurations
    part: str  # one of PARTS, or `forgets`
    found: stats.Comparison


def by_setting(found: list[Row]) -> dict[Setting, list[Row]]:
    """The rows of each setting, in the order of the sweep."""
    grouped: dict[Setting, list[Row]] = defaultdict(list)
    for row in found:
        config = row.records[0]["config"]
        grouped[config["train"]["steps"], config["data"]["train_share"]].append(row)
    return dict(grouped)


def gaps(setting: Setting, found: list[Split]) -> list[Tested]:
    """The gap of every LoRA and its two parts; what stays frozen is the same one for all."""
    made = [Tested(setting, one.name, part, getattr(one, part))
            for one in found for part in ("gap", "rank")]  # fmt: skip
    return [*made, Tested(setting, found[0].frozen.a, "frozen", found[0].frozen)]


def forgetting(setting: Setting, found: list[Row]) -> list[Tested]:
    """Nats of the old text of every pair with the control, where it was evaluated."""
    if any(OLD_TEXT not in row.records[0]["config"]["evaluate"]["also"] for row in found):
        return []
    own = {row.name: evidence.evaluation(row, OLD_TEXT) for row in found}
    (control,) = (row.name for row in found if row.values["method.label"] == CONTROL)
    return [
        Tested(setting, f"{name} less {control}", "forgets", stats.compare(one, own[control]))
        for name, one in own.items()
        if name != control
    ]


def write(
    found: list[Tested], adjusted: list[float], shares: dict[tuple[Setting, str], Split]
) -> None:
    """decompositions.csv: a line for every difference, in full precision."""
    columns = ["steps", "train_share", "name", "part", "nats", "low", "high", "p", "adjusted_p",
               "share_frozen", "share_frozen_low", "share_frozen_high"]  # fmt: skip
    with (HERE / "decompositions.csv").open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(columns)
        for one, p in zip(found, adjusted, strict=True):
            c, split = one.found, shares.get((one.setting, one.name))
            share = split.share if split and one.part == "gap" else ("", "", "")
            numbers = (c.difference, c.low, c.high, c.p, p)
            writer.writerow([*one.setting, one.name, one.part, *numbers, *share])


def main(arguments: list[str]) -> int:
    """The command line; returns its exit status."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(__doc__)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    folder = Path(arguments[0])
    try:
        findings = evidence.find(folder)
        grouped = by_setting(rows(folder))
        found = {setting: splits(some) for setting, some in grouped.items()}
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    (HERE / "results.csv").write_text(summary.results_csv(findings), "utf-8")
    tested = [one for setting, some in found.items() for one in gaps(setting, some)]
    tested += [one for setting, some in grouped.items() for one in forgetting(setting, some)]
    adjusted = ranking.holm([one.found.p for one in tested]).tolist()
    write(tested, adjusted, {(s, one.name): one for s, some in found.items() for one in some})
    shown = plain(["steps", "text", "difference", "part"], ["nats", "p (Holm)", "share frozen, %"])
    for one, p in zip(tested, adjusted, strict=True):
        c = one.found
        shares = [s.share for s in found[one.setting] if s.name == one.name and one.part == "gap"]
        percent = "".join(f"{100 * a:.0f} ({100 * b:.0f} to {100 * d:.0f})" for a, b, d in shares)
        nats = f"{c.difference:+.3f} ({c.low:+.3f} to {c.high:+.3f})"
        steps, share = one.setting
        shown.add_row(str(steps), f"{share:g}", one.name, one.part, nats, f"{p:.2g}", percent)
    show(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
