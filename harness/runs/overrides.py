"""Every run of a list of command-line arguments: composed by Hydra, validated, each once."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from hydra import version
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.config import renamed, unused_keys
from harness.config.errors import ConfigError
from harness.config.paths import CONF_DIR
from harness.config.run_config import RunConfig
from harness.runs import mistakes
from harness.runs.grids import check, combinations
from harness.system.internals import internal

_composing = threading.Lock()  # Hydra's version is the process's


def compose(*overrides: str) -> list[RunConfig]:
    """Every run that `python -m harness` would make of these arguments, each once and validated.

    One, or those of a sweep: `compose("method=lora", "method.r=1,8")`, or of an experiment.

    Raises:
        ConfigError: naming the overrides of the run that is wrong; also for two different runs in
            one directory.
        TypeError: an override that is no text.
    """
    for text in overrides:
        if not isinstance(text, str):
            raise TypeError(
                f"overrides are texts, as in compose('method=lora', 'method.r=8'), and not {text!r}"
            )
    try:
        return _compose(renamed.in_overrides(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(mistakes.explain(error)) from error


def _compose(overrides: list[str]) -> list[RunConfig]:
    with hydra_loader() as loader:

        def load(own: list[str]) -> DictConfig:
            return loader.load_configuration("config", own, RunMode.RUN, from_shell=False)

        # An experiment's grids are Hydra's own settings, which the composition keeps to itself.
        master = load([text for text in overrides if not is_sweep(text)])
        grids: Any = OmegaConf.select(master, "hydra.sweeper.grids") or []
        seeds: Any = OmegaConf.select(master, "hydra.sweeper.params") or {}
        params = [f"{key}={value}" for key, value in renamed.in_grid(seeds).items()]
        jobs = combinations([renamed.in_grid(grid) for grid in grids], params, overrides, loader)
        jobs, without = unused_keys.left_out(jobs, load)
        if without:
            print(without, file=sys.stderr)
        return check(jobs, load)[1]


@contextmanager
def hydra_loader() -> Iterator[Any]:
    """A loader of conf/ of our own: the caller's program may use Hydra itself, or threads."""
    with _composing:
        process = version.VersionBase.instance()
        before = process.version_base
        version.setbase("1.3")
        try:
            setup_globals()  # Hydra's resolvers
            path = internal("create_config_search_path")(f"file://{CONF_DIR}")
            yield internal("ConfigLoaderImpl")(path)
        finally:
            process.version_base = before


def without_flag(arguments: Iterable[str]) -> list[str]:
    """Overrides for `compose`, which needs no -m to take several values."""
    return [text for text in arguments if text not in ("-m", "--multirun")]


def is_sweep(text: str) -> bool:
    """Whether an override has several values, as the override grammar sees it."""
    return bool(OverridesParser.create().parse_override(text).is_sweep_override())
