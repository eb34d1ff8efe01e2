"""Hydra loads sweepers from packages of this name only; this one is `harness.runs.grids`."""

from harness.runs import grids


class GridSweeper(grids.GridSweeper):
    """Runs every combination of every grid."""
