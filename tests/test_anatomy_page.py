"""What `harness anatomy`, `compress` and `interpolate` left in a folder, on its page."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from test_report import put

from harness.report import anatomy, evidence, figures, files, sheets

SEEDS = range(3)


def left(folder):
    """Runs with a change, and the files of the three commands."""
    for seed in SEEDS:
        put(folder, f"none-s{seed}", method="none", seed=seed, nll=4.0)
        put(folder, f"full-s{seed}", method="full", r=300, seed=seed, nll=2.5, also=(2.0, 3.0))
        for r in (1, 8):
            put(folder, f"lora-r{r}-s{seed}", r=r, seed=seed, nll=3 - r / 50, also=(2.0, 2.5))
    rows = evidence.find(folder).rows
    lines = []
    for row in rows:
        if not row.trained:
            continue
        for quantity in anatomy.QUANTITIES:
            lines.append((row.name, anatomy.MATRICES, quantity, 2.0, 1.0, 3.0, 3))
        for kind, share in (("mlp", 0.75), ("norms", 0.25)):
            lines.append((row.name, kind, "share", share, share, share, 3))
    lines.append(("gone", anatomy.MATRICES, "rank", 2.0, 1.0, 3.0, 3))  # of runs that were deleted
    (folder / "anatomy").mkdir()
    columns = ["name", "of", "quantity", "mean", "low", "high", "count"]
    pd.DataFrame(lines, columns=columns).to_csv(folder / anatomy.SUMMARY, index=False)
    for seed in SEEDS:
        run_dir = folder / f"full-s{seed}"
        points = [
            by_document(rank=rank, beside=beside, text="validation", nats=nats + (beside != "with"))
            for rank, nats in (("1", 4.0), ("16", 3.0), ("full", 2.5), ("energy 0.9", 2.6))
            for beside in ("with", "without")
        ]
        pd.concat(points).to_parquet(run_dir / anatomy.COMPRESSED)
        scales = [
            by_document(scale=scale, kinds="all", text=text, nats=nats)
            for scale in (0.0, 0.5, 1.0)
            for text, nats in (("validation", 4 - scale), ("more", 2 + scale))
        ]
        pd.concat(scales).to_parquet(run_dir / anatomy.INTERPOLATED)
    return folder


def by_document(nats, **columns):
    count = np.arange(12)
    frame = {"id": [f"d{i}" for i in count], "num_tokens": 10, "nll_nats": 10 * nats + count / 50}
    return pd.DataFrame(frame | columns)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return left(tmp_path_factory.mktemp("anatomy") / "anatomy")


def test_the_table_has_the_configurations_that_are_still_there(folder):
    rows = evidence.find(folder).rows
    shown = anatomy.sheet(rows)
    assert [line[0].shown for line in shown.lines] == [row.name for row in rows if row.trained]
    assert shown.lines[0][1].shown == "2.000 (1.000-3.000)" and shown.lines[0][1].value == 2
    assert shown in sheets.further(rows, {})


def test_a_curve_of_ranks_stands_beside_lora_of_these_ranks(folder):
    rows = evidence.find(folder).rows
    drawn = {figure.axes.key: figure for figure in anatomy.figures(rows)}
    whole, alone, lora = drawn["compress"].series
    assert whole.x == alone.x == [1, 16]  # `full` and shares of energy have no place on the axis
    mean = float(np.arange(12).mean() / 500)
    assert whole.y == pytest.approx(np.exp([4 + mean, 3 + mean]))
    assert alone.y == pytest.approx(np.exp([5 + mean, 4 + mean])) and alone.dash
    assert whole.low[0] < whole.y[0] < whole.high[0]
    assert (lora.x, lora.y) == ([1, 8], [21.0, 21.0])  # `put` gives every run this validation
    assert drawn["compress"].axes.y == "validation perplexity per token"


def test_shares_and_interpolation_are_drawn(folder):
    found = evidence.find(folder)
    drawn = {figure.axes.key: figure for figure in figures.figures(found.rows, found.found)}
    shares = drawn["anatomy-shares"]
    assert [(s.name, s.y) for s in shares.series] == [("mlp", [0.75] * 3), ("norms", [0.25] * 3)]
    (line,) = drawn["interpolate-more"].series
    assert line.x == sorted(line.x, reverse=True) and line.y == sorted(line.y)
    assert line.rows == [f"{line.name}, lambda {scale}" for scale in ("0", "0.5", "1")]


def test_without_these_files_there_is_no_such_section(tmp_path):
    put(tmp_path / "e", "lora", nll=3.0)
    rows = evidence.find(tmp_path / "e").rows
    assert anatomy.sheet(rows) is None and anatomy.figures(rows) == []
    (tmp_path / "e" / "anatomy").mkdir()
    (tmp_path / "e" / anatomy.SUMMARY).write_text("not,a\ntable")
    (tmp_path / "e" / "lora" / anatomy.COMPRESSED).write_text("not a table")
    assert anatomy.sheet(rows) is None and anatomy.figures(rows) == []


def test_the_page_has_them(folder):
    findings = evidence.find(folder)
    files.write(findings)
    page = (folder / "report" / "index.html").read_text("utf-8")
    assert "What training added to the weights" in page and 'data-figure="compress"' in page
    for key in ("anatomy-shares", "compress", "interpolate-more"):
        assert (folder / "report" / "figures" / f"{key}.png").stat().st_size > 1000
