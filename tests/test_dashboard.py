"""The W&B dashboard's specification: what it would build, without a network."""

import json

import pytest
from synthetic_runs import put

from harness.report import dashboard
from harness.report.axes import CATEGORIES, COLORS, TRACKED
from harness.runs.trackers import summary

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


def test_methods_have_the_colours_of_the_figures(specification):
    """Read back by W&B's own classes: groups of runs by method, and a colour for each."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces.reports.v2 import internal as report_model
    from wandb_workspaces.workspaces import internal as workspace_model

    view = workspace_model.View.model_validate(specification["workspace"])
    space = ws.Workspace._from_model(view)
    assert [group.name for group in space.runset_settings.groupby] == ["method.label"]
    assert space.runset_settings.group_colors == COLORS
    model = report_model.ReportViewspec.model_validate(specification["report"])
    grids = [b for b in wr.Report._from_model(model).blocks if isinstance(b, wr.PanelGrid)]
    shown = {
        key.rsplit(":", 1)[1] if isinstance(key, str) else key.keys[0].value: color
        for key, color in grids[0].custom_run_colors.items()
    }  # a label with a dash is read back as the key that W&B's page looks up
    assert shown == COLORS
    by = [grid.runsets[0].groupby for grid in grids]
    keys = ("label", "targets", "r")  # as the server has them, nested in the config's value
    assert by == [[f"config.method.value.{key}"] for key in keys]


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
