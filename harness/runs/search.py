"""Hydra's sweeper for a search: candidates that Optuna proposes, by successive halving.

    harness search train.lr='tag(log,interval(1e-3,1e-1))' search.trials=20 search.rungs=[20]

A candidate is a run like any other, compared on validation; no candidate reads the test text. It
pauses at every rung, and the best go on (`harness.runs.halving`). The search is its study and its
runs' directories (`harness.runs.search_state`): the same command goes on after any stop, and
several controllers that share the experiment's folder divide the runs.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from harness.config import naming, search_space, unused_keys
from harness.config.errors import ConfigError, nearest, require
from harness.config.run_config import RunConfig
from harness.config.search_space import Space
from harness.runs import composition, halving, launcher, search_limits
from harness.runs.grids import GridSweeper, check, refuse_ranks
from harness.runs.search_limits import OBJECTIVES
from harness.system import lock

if TYPE_CHECKING:  # optuna is an extra
    from harness.runs.search_state import Search

SAMPLERS = ("grid", "random", "quasi_random", "tpe", "gp", "cmaes", "nsga2")
ADAPTIVE = ("tpe", "gp", "cmaes", "nsga2")  # whose proposals depend on what was found
TRIALS = 20  # candidates, where neither `trials` nor a grid says how many
FOLDER = "search"  # in the experiment's folder
MOST = 100_000


@dataclass(frozen=True)
class Settings:
    """What `hydra.sweeper` says of a search; conf/hydra/sweeper/search.yaml explains each."""

    sampler: str
    trials: int | None
    batch: int | None
    rungs: tuple[int, ...]
    eta: int
    objectives: tuple[str, ...]
    constraints: tuple[search_limits.Limit, ...]
    storage: str | None
    seed: int
    file: str | None

    def __post_init__(self) -> None:
        key = "hydra.sweeper"
        if self.sampler not in SAMPLERS:
            raise ConfigError(f"{key}.sampler={self.sampler}: {nearest(self.sampler, SAMPLERS)}")
        if self.sampler == "cmaes" and importlib.util.find_spec("cmaes") is None:
            raise ConfigError(f"{key}.sampler=cmaes needs the package cmaes: pip install cmaes")
        for name in ("trials", "batch"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            fine = value is None or (whole and 0 < value <= MOST)
            require(fine, f"{key}.{name}", value, f"1 to {MOST} candidates, or null")
        require(isinstance(self.eta, int) and self.eta >= 2, f"{key}.eta", self.eta, "2 or more")
        seed = self.seed
        require(isinstance(seed, int) and seed >= 0, f"{key}.seed", seed, "a whole number from 0")
        rungs, shown = self.rungs, list(self.rungs)
        whole = all(isinstance(r, int) and not isinstance(r, bool) and r > 0 for r in rungs)
        fine = whole and all(a < b for a, b in itertools.pairwise(rungs))
        require(fine, f"{key}.rungs", shown, "optimizer steps, each above the one before")
        for objective in self.objectives:
            if objective not in OBJECTIVES:
                raise ConfigError(
                    f"{key}.objectives: {objective}: {nearest(objective, OBJECTIVES)}"
                )
        names = list(self.objectives)
        fine = names[:1] == ["validation.nll"] and len(set(names)) == len(names)
        require(fine, f"{key}.objectives", names, "validation.nll first, and each once")
        if len(names) > 1 and rungs:
            raise ConfigError(
                f"{key}.rungs={shown} with several objectives: halving compares by one number; "
                "leave the rungs or the further objectives out"
            )
        if len(names) > 1 and self.sampler == "cmaes":
            raise ConfigError(
                f"{key}.sampler=cmaes takes one objective; tpe and nsga2 take several"
            )


class SearchSweeper(GridSweeper):
    """Searches the spaces of `grids`, each by itself, or the one of `params` and the command line.

    In a grid, in `params` and on the command line a key with several values, or an interval, is
    searched; the command line replaces a grid's value of the same key.
    """

    def __init__(
        self,
        max_batch_size: int | None = None,
        params: dict[str, Any] | None = None,
        grids: Sequence[dict[str, Any]] = (),
        sampler: str = "random",
        trials: int | None = None,
        batch: int | None = None,
        rungs: Sequence[int] | None = None,
        eta: int = 3,
        objectives: Sequence[str] = ("validation.nll",),
        constraints: Sequence[str] | None = None,
        storage: str | None = None,
        seed: int = 0,
        file: str | None = None,
    ) -> None:
        super().__init__(max_batch_size, None, grids)
        self.space = dict(params or {})
        limits = tuple(search_limits.read(str(text)) for text in constraints or ())
        self.settings = Settings(
            sampler, trials, batch, tuple(rungs or ()), eta, tuple(objectives or ()), limits,
            storage, seed, composition.expanded(file, "hydra.sweeper.file"),
        )  # fmt: skip

    def sweep(self, arguments: list[str]) -> Any:
        """Search; raises ConfigError before the first run if a space or a key is not valid."""
        assert self.config is not None and self.hydra_context is not None and self.launcher
        refuse_ranks(arguments)
        if importlib.util.find_spec("optuna") is None:
            raise ConfigError("a search needs Optuna, which is not installed: pip install optuna")
        loader = self.hydra_context.config_loader
        compose = partial(loader.load_sweep_config, self.config)
        without_test = {"evaluate.test": "false"}
        spaces = [
            search_space.read(without_test, self.space, grid, arguments, loader=loader)
            for grid in self.grids or [{}]
        ]
        first = [_check(space, compose, self.settings) for space in spaces]
        folders = list(dict.fromkeys(run.run_dir.parent for run in first))
        if len(folders) > 1:
            raise ConfigError(
                f"a search is one experiment, and these are {len(folders)}: "
                f"{', '.join(map(str, folders))}"
            )
        from harness.runs import search_results, study

        results = search_results.Results(folders[0] / FOLDER, self.settings, first)
        storage = study.open_storage(self.settings.storage, folders[0] / FOLDER)
        (folders[0] / FOLDER).mkdir(parents=True, exist_ok=True)
        with lock.exclusive(folders[0] / FOLDER / ".lock"):
            searches = [
                self._open(storage, space, run, compose, names)
                for space, run, names in zip(spaces, first, _names(spaces, first), strict=True)
            ]
        return self._recorded(lambda: self._search(searches, results))

    def _open(self, storage: Any, space: Space, run: RunConfig, compose: Any, name: str) -> Search:
        from harness.runs import search_state, study

        settings = self.settings
        rungs = (*settings.rungs, run.train.steps)
        grown = settings.eta ** (len(rungs) - 1)  # candidates of which one comes to the end
        adaptive = {"nsga2": TRIALS}.get(settings.sampler, grown)
        whole = settings.trials or TRIALS
        batch = settings.batch or (adaptive if settings.sampler in ADAPTIVE else whole)
        found = study.Study(
            storage,
            name,
            space,
            methods_by(compose),
            sampler=settings.sampler,
            seed=settings.seed,
            objectives=len(settings.objectives),
            batch=batch,
            rules=study.rules_of(
                **{d.name: d.text() for d in space.dimensions},
                fixed=" ".join(sorted(space.fixed)),
                sampler=settings.sampler,
                seed=settings.seed,
                rungs=list(rungs),
                eta=settings.eta,
                objectives=list(settings.objectives),
                constraints=[str(limit) for limit in settings.constraints],
                identity=naming.identity(run),  # of the first corner: whatever else is configured
            ),
        )
        trials = settings.trials or found.grid_size or TRIALS
        if settings.sampler == "grid":
            trials = min(trials, found.grid_size)
            batch = settings.batch or trials
        return search_state.Search(
            found, compose, run.run_dir.parent, rungs, settings.eta, settings.objectives,
            trials, batch, partial(search_limits.why_not, limits=settings.constraints),
        )  # fmt: skip

    def _search(self, searches: list[Search], results: Any) -> list[launcher.Outcome]:
        """Rounds of runs until nothing is left to do; what came out is written after each."""
        print(budget(searches), flush=True)
        door = searches[0].folder / FOLDER / ".lock"
        done: list[launcher.Outcome] = []
        while True:
            with lock.exclusive(door):
                tasks = [task for search in searches for task in search.tasks()]
                results.write(searches, over=not tasks)
                for study in (s.study for s in searches if not s.study.candidates()):
                    raise ConfigError(
                        f"{study.name}: none of {len(study.rejected())} proposals can be a "
                        f"candidate: {study.rejected()[0]}"
                    )
            if not tasks:
                break
            print(f"{len(tasks)} runs, validation only -> {searches[0].folder}", flush=True)
            outcomes = self._launch([t.overrides for t in tasks], [t.run for t in tasks])
            done += outcomes
            wrong = [o for o in outcomes if not _answers(o)]
            if wrong:
                launcher.OUTCOMES.extend(wrong)  # which tells what happened, and the exit status
                print(
                    f"the search is not over: {len(wrong)} of {len(outcomes)} runs did not come to "
                    "their rung; the same command goes on, with retry=1 also what failed by itself",
                    flush=True,
                )
                return done
        results.show(searches)
        return done


def methods_by(compose: Callable[[list[str]], DictConfig]) -> search_space.MethodOf:
    """What the overrides of `unused_keys.DECIDES` choose; each is composed once."""

    @cache
    def of(deciding: tuple[str, ...]) -> unused_keys.Chosen | None:
        return unused_keys.chosen_by(deciding, compose)

    return lambda overrides: of(tuple(overrides))


def _answers(outcome: launcher.Outcome) -> bool:
    """Whether an outcome says something of the candidate, or else something went wrong."""
    from harness.runs import search_state

    fine = outcome.status in ("finished", "skipped", "paused")
    return fine or outcome.failure_class in search_state.ANSWERS


def _check(
    space: Space, compose: Callable[[list[str]], DictConfig], settings: Settings
) -> RunConfig:
    """Compose and validate every method and every end of the space; returns the first of them."""
    method_of = methods_by(compose)
    _, runs, _ = check(list(space.corners(method_of)), compose)
    if settings.sampler == "grid":
        next(iter(space.points(method_of)))  # or else an interval has no step
    for run in runs:
        if run.evaluate.test:
            raise ConfigError(
                "evaluate.test=true: candidates are compared on validation, and no run of a search "
                "reads the test text; leave it out"
            )
        if run.rerun:
            raise ConfigError(
                "rerun=true in a search would begin every rung anew: delete the experiment's "
                "folder, or choose another experiment_name"
            )
        if run.launch.pause_at is not None:
            raise ConfigError(
                f"launch.pause_at={run.launch.pause_at} in a search, which pauses runs itself: set "
                "hydra.sweeper.rungs"
            )
        _check_rungs(run, settings.rungs)
    if settings.rungs and len({run.train.steps for run in runs}) > 1:
        raise ConfigError(
            f"hydra.sweeper.rungs={list(settings.rungs)}: rungs are steps of one and the same "
            "schedule, and train.steps is searched: leave one of them out"
        )
    return runs[0]


def _check_rungs(run: RunConfig, rungs: Sequence[int]) -> None:
    every = run.evaluate.every
    for rung in rungs:
        if rung >= run.train.steps:
            raise ConfigError(
                f"hydra.sweeper.rungs={list(rungs)}: expected steps below train.steps="
                f"{run.train.steps}, which is the last rung"
            )
        if rung % every:
            raise ConfigError(
                f"hydra.sweeper.rungs={list(rungs)}: validation is read every evaluate.every="
                f"{every} steps, and not after step {rung}: make it a multiple, or set "
                "evaluate.every"
            )


def _names(spaces: Sequence[Space], first: Sequence[RunConfig]) -> list[str]:
    """Names of the studies: the experiment, and of several spaces what each has fixed."""
    shared = set.intersection(*(set(space.fixed) for space in spaces))
    names = []
    for space, run in zip(spaces, first, strict=True):
        own = " ".join(text for text in space.fixed if text not in shared)
        names.append(" ".join(filter(None, [run.experiment_name, own if len(spaces) > 1 else ""])))
    if len(set(names)) < len(names):
        raise ConfigError(
            "hydra.sweeper.grids: two spaces fix the same keys; make one of them, or fix another "
            "key in each"
        )
    return names


def budget(searches: Sequence[Search]) -> str:
    """How many candidates and optimizer steps a search takes at most, in a line."""
    steps = whole = number = 0
    for search in searches:
        full, rest = divmod(search.trials, search.batch)
        for size in [*[search.batch] * full, *([rest] if rest else [])]:
            steps += halving.most_steps(size, search.rungs, search.eta)
        whole += search.trials * search.rungs[-1]
        number += search.trials
    rungs = ", ".join(map(str, searches[0].rungs))
    spaces = f" in {len(searches)} spaces" if len(searches) > 1 else ""
    share = f", {steps / whole:.2f} of all of them in full" if whole else ""
    return f"{number} candidates{spaces}, rungs {rungs}: {steps:,} optimizer steps{share}"
