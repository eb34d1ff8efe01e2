"""What the figures of an experiment show: `draw` makes SVG and PNG of it, `page` Plotly's JSON.

A figure is points, bars or a heat map on `axes`, with labels, references and a sentence for those
who cannot see it.
"""

from __future__ import annotations

from collections.abc import Sequence

from harness.report import swept
from harness.report.axes import COST_AXES
from harness.report.cost_figure import cost_figure
from harness.report.evidence import Evidence, evaluated_alike
from harness.report.figure import Figure
from harness.report.forgetting_figure import forgetting_figure
from harness.report.rank_figures import alpha_figure, heat_maps, rank_figure
from harness.report.row_series import points
from harness.report.run_figures import learning_curves, memory_figure, speed_figure
from harness.report.table import Row


def figures(
    rows: Sequence[Row], evidence: dict[str, Evidence], further: Sequence[str] = ()
) -> list[Figure]:
    """Return all figures in which the rows have something to show, with the costs `further`."""
    test = evidence.get("test")
    plots: list[Figure | None] = []
    if test is not None:
        of_settings = list(
            swept.figures(
                rows, test.intervals,
                lambda name, color, own, x, line: points(name, color, own, x, test, line=line),
            )
        )  # fmt: skip
        titles = dict.fromkeys([*COST_AXES, *further])
        of_costs = [  # where all rows cost the same, what was varied is all there is to see
            figure
            for title in titles
            if (figure := cost_figure(rows, test, title))
            and (title in further or not of_settings or _costs_differ(figure))
        ]
        plots += [
            *of_costs,
            rank_figure(rows, test),
            alpha_figure(rows, test),
            *heat_maps(rows, test),
            *of_settings,
        ]
    plots += [
        memory_figure(rows),
        speed_figure(rows),
        *learning_curves(evaluated_alike(rows, test)),
    ]
    if test is not None:
        plots += [
            forgetting_figure(rows, test, on) for text, on in evidence.items() if text != "test"
        ]
    return [figure for figure in plots if figure is not None]


def _costs_differ(figure: Figure) -> bool:
    return len({x for series in figure.series for x in series.x}) > 1
