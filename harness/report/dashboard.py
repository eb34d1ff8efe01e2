"""W&B dashboards as code: a workspace and a report of the figures that `report.axes` describes.

    harness dashboard project=peft-harness entity=me      builds them, or builds them anew
    harness dashboard --dry-run project=p entity=e        their specification as JSON

Runs are grouped by method, since W&B lets a group have a colour: the one of the page's figures.
Needs wandb-workspaces (pip install -e '.[dashboard]') and, but for --dry-run, a key and a network.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

from harness.config.errors import ConfigError, nearest
from harness.report.axes import COLORS, TRACKED, Axes, color_of
from harness.system.console import command

NAME = "peft-harness"
KEYS = ("project", "entity", "name")
METHOD = "method.label"  # in a run's config
PARALLEL = (  # the trackers' names of the parallel coordinates, and whether an axis is logarithmic
    ("config.method.label", False), ("config.method.r", True), ("config.method.alpha", True),
    ("config.method.targets", False), ("config.train.lr", True), ("test/perplexity", True),
)  # fmt: skip
INTRODUCTION = (
    "Perplexity, memory and speed of every run, by method in the colours of the harness's page. "
    "Intervals and tests are in the summary run of each sweep."
)


def panels() -> list[Any]:
    """A panel for every figure that a tracker has the numbers of, and the parallel coordinates."""
    import wandb_workspaces.reports.v2 as wr

    columns = [
        wr.ParallelCoordinatesPlotColumn(metric=_metric(name), log=log) for name, log in PARALLEL
    ]
    return [
        *(_panel(axes) for axes in TRACKED),
        wr.ParallelCoordinatesPlot(title="Methods and settings", columns=columns),
    ]


def _by_another(axes: Axes) -> bool:
    """Whether lines of this figure are told apart by something else than the method."""
    return axes.group not in ("", f"config.{METHOD}")


def _metric(name: str) -> Any:
    """A name of the trackers as W&B's reports have it."""
    import wandb_workspaces.reports.v2 as wr

    if name.startswith("config."):
        return wr.Config(name.removeprefix("config."))
    return wr.SummaryMetric(name)


def _panel(axes: Axes) -> Any:
    import wandb_workspaces.reports.v2 as wr

    if axes.kind == "bars":
        return wr.BarPlot(
            title=axes.title, metrics=list(axes.metrics), title_x=axes.y,
            groupby=wr.Config(METHOD), groupby_aggfunc="mean",
        )  # fmt: skip
    x, y = axes.metrics
    if x == "tokens":
        return wr.LinePlot(
            title=axes.title, x=x, y=[y], log_y=axes.log_y, title_x=axes.x, title_y=axes.y,
            groupby=wr.Config(axes.group.removeprefix("config.")), groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
        )  # fmt: skip
    group = axes.group.replace("config.", "config:", 1)
    return wr.ScatterPlot(
        title=axes.title, x=_metric(x), y=_metric(y), log_x=axes.log_x, log_y=axes.log_y,
        legend_template=f"${{{group}}} ${{run:displayName}}" if group else "${run:displayName}",
    )  # fmt: skip


def workspace(project: str, entity: str, name: str, labels: Iterable[str] = COLORS) -> Any:
    """Return the W&B workspace of a project; `labels` are the methods that have a colour."""
    import wandb_workspaces.expr as expr
    import wandb_workspaces.workspaces as ws

    all_panels = panels()
    sections = [
        ws.Section(
            name="Perplexity",
            panels=[p for p in all_panels if _about(p) == "perplexity"],
            is_open=True,
        ),
        ws.Section(
            name="Memory and speed",
            panels=[p for p in all_panels if _about(p) == "cost"],
            is_open=True,
        ),
    ]
    runs = ws.RunsetSettings(
        groupby=[expr.Config(METHOD)], group_colors={label: color_of(label) for label in labels}
    )
    return ws.Workspace(
        entity=entity, project=project, name=name, sections=sections, runset_settings=runs
    )


def _about(panel: Any) -> str:
    costs = {axes.title for axes in TRACKED if axes.kind == "bars"}
    return "cost" if panel.title in costs else "perplexity"


def report(project: str, entity: str, name: str, labels: Iterable[str] = COLORS) -> Any:
    """The report: the same panels over all finished runs, those by targets or rank in their own."""
    import wandb_workspaces.reports.v2 as wr

    titles = {axes.title: axes.group for axes in TRACKED if _by_another(axes)}
    all_panels = panels()
    colors: dict[Any, Any] = {
        wr.RunsetGroup("by method", (wr.RunsetGroupKey(wr.Config(METHOD), label),)): color_of(label)
        for label in labels
    }
    grids = [
        wr.PanelGrid(
            runsets=[_runset("by method", f"config.{METHOD}")],
            panels=[panel for panel in all_panels if panel.title not in titles],
            custom_run_colors=colors,
        )
    ]
    for panel in all_panels:
        if group := titles.get(panel.title):
            by = group.removeprefix("config.method.")
            grids.append(wr.PanelGrid(runsets=[_runset(f"by {by}", group)], panels=[panel]))
    return wr.Report(
        project=project, entity=entity, title=name, blocks=[wr.P(INTRODUCTION), *grids]
    )


def _runset(name: str, group: str) -> Any:
    import wandb_workspaces.reports.v2 as wr

    # The report's own project, which no server need be asked for.
    return wr.Runset(entity="", project="", name=name, groupby=[group])


def specification(project: str, entity: str, name: str) -> dict[str, Any]:
    """Return the workspace and the report as plain values, as --dry-run prints them."""
    views = {
        "workspace": workspace(project, entity, name),
        "report": report(project, entity, name),
    }
    return {key: json.loads(value._to_model().model_dump_json()) for key, value in views.items()}


def parse(arguments: list[str]) -> tuple[dict[str, str], bool]:
    """key=value pairs, and whether it is a dry run.

    Raises:
        ConfigError: an unknown key, or one that is missing.
    """
    values = {"name": NAME}
    for text in arguments:
        if text == "--dry-run":
            continue
        key, equals, value = text.partition("=")
        if key not in KEYS or not equals or not value:
            raise ConfigError(f"{text}: expected key=value; {nearest(key, KEYS)}")
        values[key] = value
    if missing := [key for key in KEYS if key not in values]:
        raise ConfigError(f"{missing[0]}=… is missing")
    return values, "--dry-run" in arguments


def save(values: dict[str, str]) -> list[str]:
    """Build both, or build anew what has the same name; returns their addresses."""
    import wandb

    api, path = wandb.Api(), f"{values['entity']}/{values['project']}"
    used = {(run.config.get("method") or {}).get("label") for run in api.runs(path)}
    labels = sorted({*COLORS, *filter(None, used)})
    new_report = report(**values, labels=labels)
    for known in api.reports(path):
        if known.display_name == values["name"]:
            new_report.id = known.id
    new_report.save()
    space = workspace(**values, labels=labels)
    space._internal_name = f"nw-{values['name']}-v"  # the same name is the same view
    return [str(new_report.url), str(space.save().url)]


@command
def main(arguments: list[str]) -> int:
    """The command line; returns its exit status."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    try:
        values, dry = parse(arguments)
        if dry:
            print(json.dumps(specification(**values), indent=2))
        else:
            print("\n".join(save(values)))
    except ImportError:
        print(
            "error: wandb-workspaces is not installed: pip install -e '.[dashboard]'",
            file=sys.stderr,
        )
        return 2
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except Exception as error:  # no key, no network, no such entity: W&B has a class for each
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0
