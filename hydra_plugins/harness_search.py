"""Hydra loads sweepers from packages of this name only; this one is `harness.runs.search`."""

from harness.runs import search


class SearchSweeper(search.SearchSweeper):
    """Searches configurations by successive halving of what Optuna proposes."""
