"""What `harness anatomy`, `compress` and `interpolate` left in a folder, on its page."""

from __future__ import annotations

import numpy as np
import pytest
from anatomised_runs import KINDS, left
from synthetic_runs import put

from harness.report import anatomy, compression, evidence, files, parts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return left(tmp_path_factory.mktemp("anatomy") / "anatomy")


def drawn(folder):
    findings = evidence.find(folder)
    return {figure.axes.key: figure for figure in parts.figures(folder, findings.rows)}


def test_the_table_has_the_configurations_that_are_still_there(folder):
    rows = evidence.find(folder).rows
    (part,) = parts.find(folder, rows)
    lines = part.sheet.lines
    assert [line[0].shown for line in lines] == [row.name for row in rows if row.trained]
    assert lines[0][1].shown == "2.000 (1.000-3.000)" and lines[0][1].value == 2


def test_a_curve_of_ranks_stands_beside_lora_of_these_ranks(folder):
    figure = drawn(folder)["anatomy-compress"]
    whole, alone, lora = figure.series
    assert whole.x == alone.x == [1, 16]  # `full` and shares of energy have no place on the axis
    mean = float(np.arange(12).mean() / 500)
    assert whole.y == pytest.approx(np.exp([4 + mean, 3 + mean]))
    assert alone.y == pytest.approx(np.exp([5 + mean, 4 + mean])) and alone.dash
    assert whole.low[0] < whole.y[0] < whole.high[0]
    assert (lora.x, lora.y) == ([1, 8], [21.0, 21.0])  # `put` gives every run this validation
    assert figure.axes.y == "validation perplexity per token"


def test_shares_and_interpolation_are_drawn(folder):
    shares = drawn(folder)["anatomy-share"]
    assert {s.name for s in shares.series} == set(KINDS)
    totals = np.sum([s.y for s in shares.series], axis=0)
    np.testing.assert_allclose(totals, 1, rtol=1e-9)  # kinds that a method leaves count as 0
    assert len({s.color for s in shares.series}) == len(KINDS)
    (line,) = drawn(folder)["anatomy-interpolate-more"].series
    assert line.x == sorted(line.x, reverse=True) and line.y == sorted(line.y)
    assert line.rows == [f"{line.name}, lambda {scale}" for scale in ("0", "0.5", "1")]


def test_without_these_files_there_is_no_such_section(tmp_path):
    put(tmp_path / "e", "lora", nll=3.0)
    rows = evidence.find(tmp_path / "e").rows
    assert parts.find(tmp_path / "e", rows) == []
    (tmp_path / "e" / anatomy.FOLDER).mkdir()
    (tmp_path / "e" / anatomy.FOLDER / anatomy.FILE_NAME).write_text("not,a\ntable")
    (tmp_path / "e" / "lora" / compression.COMPRESSED).write_text("not a table")
    assert parts.find(tmp_path / "e", rows) == []


def test_the_page_has_them_also_without_a_summary(folder, tmp_path):
    files.write(evidence.find(folder))
    page = (folder / "report" / "index.html").read_text("utf-8")
    assert "What training added to the weights" in page
    assert 'data-figure="anatomy-compress"' in page
    for key in ("anatomy-share", "anatomy-compress", "anatomy-interpolate-more"):
        assert (folder / "report" / "figures" / f"{key}.png").stat().st_size > 1000
    again = left(tmp_path / "again")
    (again / anatomy.FOLDER / anatomy.FILE_NAME).unlink()
    files.write_page(evidence.find(again))
    page = (again / "report" / "index.html").read_text("utf-8")
    assert "What training added" not in page and 'data-figure="anatomy-compress"' in page
