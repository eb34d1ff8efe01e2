"""What a search would try and take, before it starts: its budget, and the ends of its spaces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.config import renamed
from harness.config.errors import ConfigError
from harness.config.run_config import RunConfig
from harness.runs import mistakes
from harness.runs.overrides import hydra_loader, is_sweep
from harness.runs.search import SearchSweeper, check_space, grid_size
from harness.runs.search_settings import Brackets, Settings, brackets_of, budget, most_steps


@dataclass(frozen=True)
class Planned:
    """A search before it starts."""

    settings: Settings
    brackets: list[Brackets]  # of every space
    runs: list[RunConfig]  # in which every value, or end of an interval, is met

    @property
    def steps(self) -> int:
        """Return the optimizer steps of all, if nothing diverges and no interval grows."""
        return most_steps(self.settings, self.brackets)

    def __str__(self) -> str:
        return budget(self.settings, self.brackets)


def plan(overrides: Sequence[str]) -> Planned | None:
    """The search that these overrides ask for; None where they ask for none.

    Raises:
        ConfigError: a space, a key or a setting that cannot be.
    """
    try:
        return _plan(renamed.in_overrides(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__  # what a sweeper said of its own settings
        if isinstance(cause, ConfigError):
            raise cause from error
        raise ConfigError(mistakes.explain(error)) from error


def _plan(overrides: list[str]) -> Planned | None:
    with hydra_loader() as loader:

        def load(own: list[str]) -> DictConfig:
            return loader.load_configuration("config", own, RunMode.RUN, from_shell=False)

        master = load([text for text in overrides if not is_sweep(text)])
        target = str(OmegaConf.select(master, "hydra.sweeper._target_"))
        if not target.endswith((".SearchSweeper", ".RateSweeper")):
            return None
        sweeper = instantiate(master.hydra.sweeper)
        assert isinstance(sweeper, SearchSweeper)
        typed = [text for text in overrides if not text.lstrip("+~").startswith("hydra")]
        settings, brackets, runs = sweeper.settings, [], []
        for space in sweeper.spaces(typed, load, loader):
            ends = check_space(space, load, settings)
            brackets.append(brackets_of(settings, ends[0], grid_size(space, load, settings)))
            runs += ends
        return Planned(settings, brackets, runs)
