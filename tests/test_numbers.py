"""How quantities are written: one rule for each kind, whatever shows it."""

from __future__ import annotations

import re

import pytest
from synthetic_runs import put

from harness.config.paths import PACKAGE
from harness.report import choices, columns, evidence, figures, page_rows, summary
from harness.results import numbers


@pytest.mark.parametrize(
    ("write", "value", "shown"),
    [
        (numbers.perplexity, 30.0, "30.00"),
        (numbers.perplexity, 12345.678, "12,345.68"),
        (numbers.short, 7.1, "7.10"),
        (numbers.short, 99.96, "100"),
        (numbers.short, 1234.5, "1,234"),
        (numbers.rate, 0.0015, "0.0015"),
        (numbers.rate, 2e-5, "2e-05"),
        (numbers.count, 4273664, "4,273,664"),
        (numbers.mib, 157.4 * 2**20, "157"),
        (numbers.percent, 0.383, "0.38"),
        (numbers.share, 0.8534, "85.3 %"),
        (numbers.seconds, 0.5, "0.5"),
        (numbers.seconds, 12.345, "12.3"),
        (numbers.seconds, 1234.5, "1,234"),  # and not 1.23e+03
        (numbers.nats, 0.12345, "0.1235"),
        (numbers.p, 0.05, "0.05"),
        (numbers.p, 3e-7, "<0.0001"),
    ],
)
def test_each_kind_has_its_rule(write, value, shown):
    assert write(value) == shown


def test_terminal_page_and_figures_write_the_same_number_alike(tmp_path, capsys):
    """A row whose numbers are large, where formats would differ."""
    for seed in range(3):
        put(tmp_path, f"full-s{seed}", method="full", r=2000, seed=seed, nll=7.0)
        put(tmp_path, f"lora-s{seed}", r=1500, seed=seed, nll=7.2)
    found = evidence.find(tmp_path)
    test = found.found["test"]
    table = columns.sheet(found.rows, test)
    (line,) = [cells for row, cells in zip(found.rows, table.lines, strict=True)
               if row.name.startswith("lora")]  # fmt: skip
    shown = {column.key: cell.shown for column, cell in zip(table.columns, line, strict=True)}
    assert re.fullmatch(r"1,\d\d\d\.\d\d", shown["quality.test.perplexity"])
    low, high = shown["quality.test.interval"].split("-")
    summary.tell(found, full=True, wide=True)
    terminal = capsys.readouterr().out
    best = test.intervals[test.ordered[0]].perplexity
    between = f"({numbers.short(best[1])} to {numbers.short(best[2])})"
    assert f"{numbers.perplexity(best[0])} {between}" in " ".join(terminal.split())
    (own,) = [
        row
        for row in page_rows.values_of(found.rows, table, test)
        if row["name"].startswith("lora")
    ]
    assert own["told"][0] == f"test {shown['quality.test.perplexity']} (95 % {low} to {high})"
    assert f"lr {shown['method.lr']} (tuned)" in own["told"]
    assert f"peak {shown['memory.peak_bytes']} MiB" in own["told"]
    assert f"{shown['parameters.trainable']} parameters train" in own["told"]
    sheet = choices.sheet(found.rows, test)
    assert sheet.lines[-1][2].shown == shown["quality.test.perplexity"]
    assert f"{shown['parameters.trainable']} parameters" in own["spent"]
    captions = " ".join(figure.alt for figure in figures.figures(found.rows, found.found))
    assert numbers.perplexity(best[0]) in captions
    for text in (terminal, captions, *own["told"], *own["spent"]):
        assert "e+0" not in text


def test_nothing_that_is_shown_has_a_format_of_its_own():
    """Formats of perplexity, counts, sizes and shares stand in one place."""
    own = re.compile(r"\{[^{}]*(perplexity|peak_bytes|trainable\w*|accuracy)[^{}:]*:[^{}]*[fg%]\}")
    found = [
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for folder in ("report", "runs", "artifacts", "commands")
        for path in (PACKAGE / folder).rglob("*.py")
        for line in path.read_text("utf-8").splitlines()
        if own.search(line) and path.name != "groups.py"  # six digits tell whether repeats differ
    ]
    assert found == []
