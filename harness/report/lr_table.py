"""The grids of a search of learning rates, on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from harness.config import rates
from harness.report import table


def show(tuned: Sequence[rates.Tuned]) -> None:
    """Print validation nll by rate, the best, and its ratio to full fine-tuning's."""
    full = next((t for t in tuned if t.family == "full"), None)
    shown = table.plain(["tuned", "validation nll by rate"], ["best", "fitted", "times full's"])
    for t in tuned:
        cells = []
        for rate, nll in sorted(t.grid.items()):
            lost = "stopped" if rate in t.stopped else "diverged"
            value = lost if nll is None else f"{nll:.3f}"
            cells.append(f"{rate:g}: {value}" + ("*" if rate == t.lr else ""))
        where = rates.edge(t.grid)
        ratio = "-"
        if full is not None:
            ratio = f"{t.lr / full.lr:g} ({rates.fitted(t.grid) / rates.fitted(full.grid):.1f})"
        shown.add_row(
            str(t), "  ".join(cells), f"{t.lr:g}" + (f" ({where})" if where else ""),
            f"{rates.fitted(t.grid):.2g}", ratio,
        )  # fmt: skip
    print()
    table.show(shown)
    print(
        "best: the rate with the lowest validation nll (*). fitted: vertex of a parabola through\n"
        "it and its neighbours. times full's: best by full fine-tuning's best, and in brackets\n"
        "fitted by fitted (published for LoRA: about 10)."
    )
    for t in tuned:
        if where := rates.edge(t.grid):
            print(f"warning: the best rate of {t} is the {where} of its grid")
