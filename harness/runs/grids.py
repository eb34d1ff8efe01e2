"""Hydra's sweeper for a union of grids; every run is validated before the first starts.

Hydra finds it as `hydra_plugins.harness_grids`. It executes its own plugins' modules anew when it
looks for plugins, so that a class which inherits from one of them may inherit from an older copy:
the sweepers here inherit from Hydra's public interface.
"""

from __future__ import annotations

import logging
import os
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.config import naming, renamed, unused_keys
from harness.config.errors import ConfigError
from harness.config.run_config import RunConfig
from harness.results import run_record
from harness.runs import (
    composition,
    hydra_task,
    mistakes,
    own_overrides,
    progress,
    tracking,
)
from harness.runs.outcomes import OUTCOMES, Outcome
from harness.system import atomic, lock
from harness.system.internals import internal
from harness.system.signals import forward_signals

log = logging.getLogger(__name__)
BUSY_SECONDS = 2.0  # between looks at runs that other controllers have claimed


class GridSweeper(Sweeper):
    """Runs every combination of every grid; an override of the command line holds in all of them.

    A grid is a mapping from an override's key to its values, as Hydra writes them: `{method: lora,
    method.r: "1,8"}`. The command line replaces a grid's value of the same key.
    """

    def __init__(
        self,
        max_batch_size: int | None = None,
        params: dict[str, str] | None = None,
        grids: Sequence[dict[str, Any]] = (),
    ) -> None:
        if max_batch_size is not None:
            raise ConfigError(
                f"hydra.sweeper.max_batch_size={max_batch_size}: a sweep is one batch; set null"
            )
        self.params = [f"{key}={value}" for key, value in renamed.in_grid(params or {}).items()]
        self.grids = [renamed.in_grid(grid) for grid in grids]
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None
        self.hydra_context: HydraContext | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep what Hydra hands over, and make the launcher that `config` chooses."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Launch the union; raises ConfigError before the first run if any is not valid."""
        assert self.config is not None and self.hydra_context is not None and self.launcher
        refuse_ranks(arguments)
        loader = self.hydra_context.config_loader
        compose = partial(loader.load_sweep_config, self.config)
        jobs = combinations(self.grids, self.params, arguments, loader)
        jobs, without = unused_keys.left_out(jobs, compose)
        if without:
            print(without)
        jobs, runs, same = check(jobs, compose)
        if same:
            print(f"left out, since another of these runs is the same: {same}")
        return self._recorded(lambda: self._do(jobs, runs))

    def _recorded(self, do: Callable[[], list[Outcome]]) -> list[Outcome]:
        """What `do` returns, with the sweep's own record in its folder."""
        assert self.config is not None
        folder = Path(self.config.hydra.sweep.dir)
        created = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_atomically(folder / "multirun.yaml", OmegaConf.to_yaml(self.config))
        done = do()
        if folder in created and all(outcome.status == "refused" for outcome in done):
            _clear(folder, created)
        return done

    def _do(self, jobs: list[list[str]], runs: list[RunConfig]) -> list[Outcome]:
        """What the sweep is for: its runs, once each."""
        folders = dict.fromkeys(str(run.run_dir.parent) for run in runs)
        many = "1 run" if len(jobs) == 1 else f"{len(jobs)} runs"
        print(f"{many} -> {', '.join(folders)}", flush=True)
        if warning := _warn_of_few_seeds(runs):
            print(f"warning: {warning}", flush=True)
        done = self._launch(jobs, runs)
        OUTCOMES.extend(done)
        return done

    def _launch(self, jobs: list[list[str]], runs: list[RunConfig]) -> list[Outcome]:
        """Every job's outcome; one that another controller is at is asked for again in the end."""
        assert self.launcher is not None
        outcomes: dict[int, Outcome] = {}
        todo = list(range(len(jobs)))
        here = type(self.launcher).__name__ == "BasicLauncher"
        since = f"{own_overrides.SINCE}{time.time()}"
        _write_down(runs, {})

        def workers() -> set[int]:
            return {pid for run in runs if (pid := lock.worker_at(run.run_dir))}

        with (
            tracking.TrackerProcesses(runs, sweep=True),
            progress.View(runs),
            nullcontext() if here else forward_signals(workers),
        ):
            while todo:
                overrides = [[*jobs[i], since, own_overrides.planned(runs[i])] for i in todo]
                try:
                    returned = self.launcher.launch(overrides, initial_job_idx=0)
                except Exception as error:  # no cluster, no connection: a launcher's own trouble
                    log.debug("launcher", exc_info=True)
                    name = type(self.launcher).__name__
                    raise ConfigError(f"{name}: {type(error).__name__}: {error}") from error
                for index, job in zip(todo, returned, strict=True):
                    outcomes[index] = job.return_value  # raises what the job raised
                before, todo = todo, [i for i in todo if outcomes[i].status == "busy"]
                if todo == before:  # only other controllers' runs are left
                    time.sleep(BUSY_SECONDS)
        done = [outcomes[index] for index in range(len(jobs))]
        refused = {
            r.run_dir: o.message for r, o in zip(runs, done, strict=True) if o.status == "refused"
        }
        if refused:  # which leaves nothing in their own directories
            _write_down(runs, refused)
        return done


def refuse_ranks(arguments: list[str]) -> None:
    """Raise ConfigError under accelerate launch."""
    if (world := os.environ.get("WORLD_SIZE", "1")) != "1":
        typed = shlex.join([f"launch.num_processes={world}", *arguments])
        raise ConfigError(
            "a sweep cannot run under accelerate launch, whose every process would do all of "
            f"it: harness sweep {typed}"
        )


def _warn_of_few_seeds(runs: list[RunConfig]) -> str | None:
    from harness.report import ranking  # scipy, which takes a while to import

    moved = [run for run in runs if not naming.is_deterministic(run) and run.evaluate.test]
    return ranking.warn_of_few_seeds((naming.configuration(run), run.seed) for run in moved)


def _clear(folder: Path, created: list[Path]) -> None:
    """Leave nothing of a sweep whose every run was refused, in folders that were made for it."""
    for name in ("multirun.yaml", run_record.SWEEP_NAME):
        (folder / name).unlink(missing_ok=True)
    for parent in created:
        with suppress(OSError):  # a tracker's log is there
            parent.rmdir()


def _write_down(runs: list[RunConfig], refused: dict[Path, str]) -> None:
    """Of every experiment which runs it has to have, and why one was refused, for the report."""
    experiments: dict[Path, dict[str, str]] = {}
    for run_dir in (run.run_dir for run in runs):
        experiments.setdefault(run_dir.parent, {})[run_dir.name] = refused.get(run_dir, "")
    for folder, names in experiments.items():
        run_record.write_sweep(folder, names, hydra_task.typed())


def combinations(
    grids: Sequence[dict[str, Any]], params: list[str], arguments: list[str], loader: Any
) -> list[list[str]]:
    """The overrides of every run: every combination of every grid, the command line's on top.

    All grids under the first seed come before any under the second, so that a machine's drift is in
    every row alike, and a sweep that is cut has whole comparisons.
    """
    parser = OverridesParser.create(config_loader=loader)
    jobs: list[list[str]] = []
    for grid in grids or [{}]:
        texts = [*params, *(f"{k}={v}" for k, v in grid.items()), *arguments]
        for batch in internal("BasicSweeper.split_arguments")(parser.parse_overrides(texts), None):
            jobs += batch
    seen = {tuple(job[: len(params)]): None for job in jobs}
    place = {key: index for index, key in enumerate(seen)}
    return sorted(jobs, key=lambda job: place[tuple(job[: len(params)])])


def check(
    jobs: list[list[str]], compose: Callable[[list[str]], DictConfig]
) -> tuple[list[list[str]], list[RunConfig], int]:
    """Compose and validate every job; returns the distinct ones, their configurations, and how many
    were left out.

    A value that a method does not use makes no other run: `none` has no targets and no rate.

    Raises:
        ConfigError: naming the job's overrides; also for two different runs in one directory.
    """
    kept: dict[Path, tuple[str, list[str], RunConfig]] = {}
    for overrides in jobs:
        shown = " ".join(own_overrides.without_own(overrides))
        try:
            run = composition.from_hydra(compose(list(overrides)), overrides)
            unused_keys.refuse_targets(overrides, run)
        except (ConfigError, HydraException, OmegaConfBaseException) as error:
            raise ConfigError(f"[{shown}] {mistakes.explain(error)}") from error
        own = (naming.identity(run), overrides, run)
        identity, first, _ = kept.setdefault(run.run_dir, own)
        if identity != naming.identity(run):
            raise ConfigError(
                f"two different runs of this sweep are named {run.run_dir}: "
                f"[{' '.join(own_overrides.without_own(first))}] and [{shown}]"
            )
    distinct = [overrides for _, overrides, _ in kept.values()]
    return distinct, [run for _, _, run in kept.values()], len(jobs) - len(distinct)
