"""The harness from Python, for notebooks: `from harness import compose, plan, run, collect`."""

from __future__ import annotations

import logging
import math
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness import launch, mistakes, results, tracking, unused
from harness.config import CONF_DIR, ConfigError, RunConfig
from hydra_plugins.harness_grids import check, combinations

if TYPE_CHECKING:
    from harness.predict import Prediction

_composing = threading.Lock()  # Hydra's version is the process's
COMMAND = "harness.run() of Python; config.yaml has all of it"


class RunFailedError(RuntimeError):
    """A run that did not finish: class and message of the failure, and the path of its log."""


def compose(*overrides: str) -> list[RunConfig]:
    """Every run that `python -m harness` would make of these arguments, each once and validated.

    One, or those of a sweep: `compose("method=lora", "method.r=1,8")`, or of an experiment.

    Raises:
        ConfigError: naming the overrides of the run that is wrong; also for two different runs in
            one directory.
    """
    try:
        return _compose(list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(mistakes.explain(error)) from error


def _compose(overrides: list[str]) -> list[RunConfig]:
    with _hydra() as loader:

        def load(own: list[str]) -> DictConfig:
            return loader.load_configuration("config", own, RunMode.RUN, from_shell=False)

        # An experiment's grids are Hydra's own settings, which the composition keeps to itself.
        master = load([text for text in overrides if not _is_sweep(text)])
        grids: Any = OmegaConf.select(master, "hydra.sweeper.grids") or []
        seeds: Any = OmegaConf.select(master, "hydra.sweeper.params") or {}
        params = [f"{key}={value}" for key, value in seeds.items()]
        jobs = combinations(grids, params, overrides, loader)
        jobs, without = unused.left_out(jobs, load)
        if without:
            print(without, file=sys.stderr)
        return check(jobs, load)[1]


@contextmanager
def _hydra() -> Iterator[ConfigLoaderImpl]:
    """A loader of conf/ of our own: the caller's program may use Hydra itself, or threads."""
    with _composing:
        process = version.VersionBase.instance()
        before = process.version_base
        version.setbase("1.3")
        try:
            setup_globals()  # Hydra's resolvers
            yield ConfigLoaderImpl(create_config_search_path(f"file://{CONF_DIR}"))
        finally:
            process.version_base = before


def plan(run: RunConfig) -> Prediction | None:
    """Parameters, memory by category and FLOPs of `run`, before it runs; needs no weights.

    Held-out text that is on this machine is read for the size of its batches.

    None where only a run can tell (`harness.predict.predict`). torch's threads and Accelerate's
    state are left as they were.

    Raises:
        ConfigError: a target that is not there, a rank that is too large, too long a context.
    """
    from harness import predict  # which needs torch

    with _quiet(), _as_they_were():
        plain, model_config, accelerator = predict.setting(run)
        evaluated = predict.largest_batch(run, model_config)
        return predict.predict(plain, model_config, accelerator, evaluated)


@contextmanager
def _as_they_were() -> Iterator[None]:
    """A notebook's own threads and Accelerate's state, which a prediction replaces for a while."""
    import torch
    from accelerate.state import AcceleratorState, PartialState

    threads = torch.get_num_threads()
    states = [(kind, dict(kind._shared_state)) for kind in (PartialState, AcceleratorState)]
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for kind, before in states:
            kind._shared_state.clear()
            kind._shared_state.update(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """What libraries have to say of a model that is never used."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def run(run: RunConfig) -> dict[str, Any]:
    """Do a run in a process of its own, as the command line does; returns its result.json.

    What is finished is not done again, and what was cut goes on.

    Raises:
        ConfigError: its directory cannot be written, or holds another configuration's run.
        RunFailedError: it did not finish.
    """
    with tracking.Beside([run], sweep=False):
        outcome = launch.launch(run, COMMAND)
    record = results.read(outcome.run_dir)
    if outcome.exit_code or record is None:
        raise RunFailedError(outcome.summary())
    return record


def collect(folder: str | Path) -> pd.DataFrame:
    """A row a configuration with a finished run in `folder`: the columns of its results.csv.

    Text stays text, whatever it looks like, and numbers numbers; what is not there is NaN. Only
    method.rank, which is text in a result ("8", "full"), is a number where every row has one.

    Raises:
        ConfigError: there is no such folder, or no finished run in it.
    """
    from harness.report import evidence, summary

    found = evidence.find(Path(folder).expanduser())
    if not found.rows:
        raise ConfigError(f"{folder}: no finished run; outputs/<experiment_name> has an experiment")
    names, lines = summary.results_lines(found)
    frame = pd.DataFrame(
        [[math.nan if value is None else value for value in line] for line in lines], columns=names
    )
    with suppress(ValueError):
        frame["method.rank"] = pd.to_numeric(frame["method.rank"])
    return frame


def without_flag(arguments: Iterable[str]) -> list[str]:
    """Overrides for `compose`, which needs no -m to take several values."""
    return [text for text in arguments if text not in ("-m", "--multirun")]


def _is_sweep(text: str) -> bool:
    """Whether an override has several values, as the override grammar sees it."""
    return bool(OverridesParser.create().parse_override(text).is_sweep_override())
