"""Which rows can be compared: those that were evaluated alike, on the same documents of one text.

A folder may hold runs on several texts, or with several contexts. The largest group of rows that
were evaluated alike is compared; of groups of one size, the one with the latest run. The rows of
other groups have the value that was measured, and no interval, no place and no comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.config.errors import ConfigError
from harness.report import stats
from harness.report.stats import Evaluation
from harness.report.table import Row

SIGN = "†"  # beside a value of a row that is not compared
NAMED = 3  # rows that are named with their reason


@dataclass(frozen=True)
class Alike:
    """The evaluations that can be compared, and why those of other rows cannot."""

    evaluations: list[Evaluation]
    apart: dict[str, str]  # row's name -> in what it was evaluated otherwise
    faults: dict[str, str]  # row's name -> what is wrong with its own evaluation


def find(rows: Sequence[Row], read: Callable[[Row], Evaluation]) -> Alike:
    """The largest group of rows that were evaluated alike; `read` gives a row's evaluation."""
    groups: list[list[tuple[Row, Evaluation]]] = []
    faults = {}
    for row in rows:
        try:
            own = read(row)
            stats.check([own])
        except ConfigError as error:
            faults[row.name] = str(error).removeprefix(f"{row.name}: ")
            continue
        fitting = (group for group in groups if stats.difference(group[0][1], own) is None)
        if (group := next(fitting, None)) is None:
            groups.append([(row, own)])
        else:
            group.append((row, own))
    if not groups:
        return Alike([], {}, faults)
    largest = max(groups, key=lambda group: (len(group), max(_date(row) for row, _ in group)))
    evaluations = [evaluation for _, evaluation in largest]
    apart = {
        row.name: _in_words(stats.difference(evaluations[0], own))
        for group in groups
        if group is not largest
        for row, own in group
    }
    return Alike(evaluations, apart, faults)


def _date(row: Row) -> str:
    """When the last of a row's runs ended."""
    return max(str(record.get("date") or "") for record in row.records)


def _in_words(differing: tuple[str, Any, Any] | None) -> str:
    assert differing is not None, "a row of another group differs from those that are compared"
    what, compared, own = differing
    if own in stats.PRESENT:
        return f"other documents, such as {what.removeprefix('document ')}"
    return f"{'text' if what == 'data' else what} {own} in place of {compared}"


def note(apart: Mapping[str, str], compared: int, on: str, alone: str = "") -> str:
    """What to say of rows that are not compared with the `compared` rows that are.

    `on` is the text, and `alone` the command that makes the report of the last sweep by itself.
    """
    reasons = []
    for reason in dict.fromkeys(apart.values()):
        names = [name for name, own in apart.items() if own == reason]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        reasons.append(f"{', '.join(names[:NAMED])}{more} ({reason})")
    count = len(apart) + compared
    rows = f"{len(apart)} of {count} rows {'is' if len(apart) == 1 else 'are'}"
    was = "it was" if len(apart) == 1 else "they were"
    last = f"; {alone} shows the last sweep by itself" if alone else ""
    return (
        f"{SIGN}: {rows} not compared on {on}, because {was} "
        f"evaluated in another way: {'; '.join(reasons)}. Give runs that belong together a folder "
        f"of their own (experiment_name=NAME){last}."
    )
