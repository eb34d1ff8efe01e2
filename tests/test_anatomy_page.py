"""What `harness anatomy`, `compress` and `interpolate` left in a folder, on its page."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from test_report import put

from harness.report import anatomy, compression, evidence, files, parts

SEEDS = range(3)
KINDS = ("q", "k", "v", "o", "mlp_in", "mlp_out", "embeddings", "positions", "norms", "biases")


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
            lines.append((row.name, anatomy.ALL, quantity, 2.0, 1.0, 3.0, 3))
        kinds = KINDS if row.values["method.name"] == "full" else KINDS[:4]
        lines += [(row.name, kind, "share", *[1 / len(kinds)] * 3, 3) for kind in kinds]
    lines.append(("gone", anatomy.ALL, "rank", 2.0, 1.0, 3.0, 3))  # of runs that were deleted
    (folder / anatomy.FOLDER).mkdir()
    columns = ["name", "of", "quantity", "mean", "low", "high", "count"]
    pd.DataFrame(lines, columns=columns).to_csv(
        folder / anatomy.FOLDER / anatomy.FILE_NAME, index=False
    )
    for seed in SEEDS:
        run_dir = folder / f"full-s{seed}"
        points = [
            by_document(rank=rank, beside=beside, text="validation", nats=nats + (beside != "with"))
            for rank, nats in (("1", 4.0), ("16", 3.0), ("full", 2.5), ("energy 0.9", 2.6))
            for beside in ("with", "without")
        ]
        pd.concat(points).to_parquet(run_dir / compression.COMPRESSED)
        scales = [
            by_document(scale=scale, kinds="all", text=text, nats=nats)
            for scale in (0.0, 0.5, 1.0)
            for text, nats in (("validation", 4 - scale), ("more", 2 + scale))
        ]
        pd.concat(scales).to_parquet(run_dir / compression.INTERPOLATED)
    return folder


def by_document(nats, **columns):
    count = np.arange(12)
    frame = {"id": [f"d{i}" for i in count], "num_tokens": 10, "nll_nats": 10 * nats + count / 50}
    return pd.DataFrame(frame | columns)


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
