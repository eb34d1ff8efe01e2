"""Hydra loads sweepers from packages of this name only; this one is `harness.runs.lr_search`."""

from harness.runs import lr_search


class RateSweeper(lr_search.RateSweeper):
    """Searches learning rates with grids that grow until every best is inside."""
