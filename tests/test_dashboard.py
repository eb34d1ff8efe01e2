"""The W&B dashboard's specification: what it would build, without a network."""

import json

import pytest
from test_report import put

from harness import dashboard
from harness.report.figures import CATEGORIES, TRACKED
from harness.tracking import summary

pytest.importorskip("wandb_workspaces")


@pytest.fixture(scope="module")
def specification():
    return dashboard.specification("p", "e", "n")


def texts(value):
    """Every text in nested containers."""
    if isinstance(value, dict):
        return [t for v in value.values() for t in texts(v)]
    if isinstance(value, list):
        return [t for v in value for t in texts(v)]
    return [value] if isinstance(value, str) else []


def test_every_figure_that_trackers_can_draw_is_in_both(specification):
    titles = {axes.title for axes in TRACKED} | {"Methods and settings"}
    assert len(titles) == len(TRACKED) + 1
    for part in ("workspace", "report"):
        assert titles <= set(texts(specification[part])) | set(
            texts([json.loads(t) for t in texts(specification[part]) if t.startswith("{")])
        )


def test_its_metrics_are_those_that_trackers_log(tmp_path):
    record = json.loads((put(tmp_path, "a") / "result.json").read_text())
    record["memory"]["by_category"] = dict.fromkeys(CATEGORIES, 1)
    logged = {"tokens", "eval/validation/perplexity", *summary(record)}
    config = {f"config.method.{key}" for key in ("r", *record["method"])} | {"config.train.lr"}
    used = {m for axes in TRACKED for m in axes.metrics} | {name for name, _ in dashboard.PARALLEL}
    assert used <= logged | config
    assert {axes.group for axes in TRACKED if axes.group} <= config


def test_the_command_line(capsys):
    assert dashboard.main(["--dry-run", "project=p", "entity=e"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"workspace", "report"}
    assert dashboard.main(["--dry-run", "projct=p"]) == 2
    assert "did you mean 'project'" in capsys.readouterr().err
    assert dashboard.main(["project=p"]) == 2
    assert "entity=… is missing" in capsys.readouterr().err
