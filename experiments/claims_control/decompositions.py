"""The gaps that claims 1, 6 and 7 rest on, taken apart: LoRA's rank, and what it leaves frozen.

    python experiments/claims_control/decompositions.py outputs/claims_control

For every setting (20 and 240 steps, a tenth and a hundredth of the text) what
experiments/main_seeds_control/decomposition.py does for one. Prints the tables, and writes
results.csv and decompositions.csv beside this file. Adjusted p-values are Holm's, over all
differences of nats that are tested here.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from harness.report import evidence, ranking, stats, summary
from harness.report.table import Row, plain, rows, show

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # where `recording` and the other experiments are
from main_seeds_control.decomposition import CONTROL, Split, splits  # noqa: E402 - their folder is on the path now
from recording import NUMBERS, evaluate, numbers, told, write_csv  # noqa: E402 - their folder is on the path now

OLD_TEXT = "docstrings_held_out"  # what is forgotten
Setting = tuple[int, float]  # optimizer steps, share of the training text


@dataclass(frozen=True)
class Tested:
    """A difference of two configurations in one setting."""

    setting: Setting
    name: str  # of the LoRA, or of the two configurations
    part: str  # gap, rank or frozen, or `forgets`
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


def judge(folder: Path) -> None:
    """Print the table of all settings, and write the files beside this script.

    Raises:
        ConfigError: a setting lacks full fine-tuning, its control or some of their seeds.
    """
    findings = evidence.find(folder)
    grouped = by_setting(rows(folder))
    found = {setting: splits(some) for setting, some in grouped.items()}
    tested = [one for setting, some in found.items() for one in gaps(setting, some)]
    tested += [one for setting, some in grouped.items() for one in forgetting(setting, some)]
    adjusted = ranking.holm([one.found.p for one in tested]).tolist()
    shares = {(s, one.name, "gap"): one.share for s, some in found.items() for one in some}
    shown = plain(["steps", "text", "difference", "part"], ["nats", "p (Holm)", "share frozen, %"])
    lines = []
    for one, p in zip(tested, adjusted, strict=True):
        share = shares.get((one.setting, one.name, one.part))
        lines.append(
            [*one.setting, one.name, one.part, *numbers(one.found), p, *(share or ("",) * 3)]
        )
        percent = "{:.0f} ({:.0f} to {:.0f})".format(*(100 * s for s in share)) if share else ""
        steps, text = one.setting
        of = (str(steps), f"{text:g}", one.name, one.part)
        shown.add_row(*of, told(one.found), f"{p:.2g}", percent)
    (HERE / "results.csv").write_text(summary.results_csv(findings), "utf-8")
    columns = ["steps", "train_share", "name", "part", "nats", *NUMBERS, "adjusted_p",
               "share_frozen", "share_frozen_low", "share_frozen_high"]  # fmt: skip
    write_csv(HERE / "decompositions.csv", columns, lines)
    show(shown)


if __name__ == "__main__":
    sys.exit(evaluate(sys.argv[1:], __doc__, judge))
