"""Recorded configurations name this sweeper, which is now a search: hydra/sweeper=search."""

import sys
from typing import Any

from harness.runs import search


class RateSweeper(search.SearchSweeper):
    """Searches learning rates with grids that grow until every best is inside."""

    def __init__(self, *, points: int = 5, params: Any = None, **settings: Any) -> None:
        print(
            "hydra_plugins.harness_rates.RateSweeper is now "
            f"hydra_plugins.harness_search.SearchSweeper with points: {points}",
            file=sys.stderr,
        )
        grids = [{**(params or {}), **grid} for grid in settings.pop("grids", None) or [{}]]
        super().__init__(points=points, grids=grids, **settings)
