"""The grids of a search of learning rates: a grid about each configuration's own rate.

Every configuration of the sweeper's grids, whose `train.lr` is the centre, is a space of its own:
`points` rates that are `factor` apart, and then one more beyond an end that the best is at, up to
`most`. It is what `experiment=tune` asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from harness.config import rates, search_space, unused_keys
from harness.config.errors import ConfigError
from harness.config.search_space import Space
from harness.runs.grids import check, combinations

LR = "train.lr"


@dataclass(frozen=True)
class Rates:
    """How many rates a configuration has, and how far they are apart."""

    points: int  # of the first grid
    factor: float  # between neighbours
    most: int  # after it has grown

    def __post_init__(self) -> None:
        if not (3 <= self.points <= self.most and self.factor > 1):
            raise ConfigError(
                f"hydra.sweeper: points={self.points}, factor={self.factor}, most={self.most}: "
                "expected 3 <= points <= most and a factor above 1"
            )

    @property
    def grow(self) -> int:
        """Return how often a grid may grow by a rate."""
        return self.most - self.points


def spaces(
    grids: Sequence[dict[str, Any]],
    arguments: Sequence[str],
    compose: Callable[[list[str]], DictConfig],
    loader: Any,
    settings: Rates,
) -> list[Space]:
    """A space for every configuration of the grids and the command line.

    Raises:
        ConfigError: a configuration that cannot be, or two grids for one configuration.
    """
    jobs = combinations(grids, ["evaluate.test=false"], list(arguments), loader)
    jobs, without = unused_keys.left_out(jobs, compose)
    if without:
        print(without)
    number = len(jobs)
    jobs, runs, _ = check(jobs, compose)
    search_spaces, keys = [], set()
    for job, run in zip(jobs, runs, strict=True):
        tuned = rates.tuned_of(run.method, run.targets.name, {}, "", run.optimizer)
        if tuned.key in keys or len(jobs) < number:
            raise ConfigError(f"two grids are for the same configuration, {tuned}")
        keys.add(tuned.key)
        values = rates.grid_around(run.train.lr, settings.points, settings.factor)
        fixed = tuple(text for text in job if unused_keys.key_of(text) != LR)
        search_spaces.append(Space(fixed, (search_space.by_factors(LR, values, settings.factor),)))
    return search_spaces
