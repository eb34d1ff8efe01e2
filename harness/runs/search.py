"""Hydra's sweeper for a search: candidates that Optuna proposes, by successive halving.

    harness search train.lr='tag(log,interval(1e-3,1e-1))' search.trials=20 search.rungs=[20]

A candidate is a run like any other, compared on validation; no candidate reads the test text. It
pauses at every rung, and the best go on (`harness.runs.halving`). The search is its study and its
runs' directories (`harness.runs.search_state`): the same command goes on after any stop, and
several controllers that share the experiment's folder divide the runs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from harness.config import naming, renamed, search_space, unused_keys
from harness.config.errors import ConfigError
from harness.config.run_config import RunConfig
from harness.config.search_space import Space
from harness.runs import composition, rate_grids, search_limits
from harness.runs.grids import GridSweeper, check, refuse_ranks
from harness.runs.outcomes import OUTCOMES, Outcome
from harness.runs.search_settings import AUTO, KEY, Settings, brackets_of, budget, rungs_of
from harness.system import lock

if TYPE_CHECKING:  # optuna is an extra
    from harness.runs.search_state import Search

FOLDER = "search"  # in the experiment's folder


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
        rungs: Sequence[int] | str | None = None,
        eta: int = 3,
        hyperband: bool = False,
        seeds: Sequence[int] | None = None,
        grow: int = 0,
        points: int | None = None,
        factor: float = 2.0,
        most: int = 12,
        objectives: Sequence[str] = ("validation.nll",),
        constraints: Sequence[str] | None = None,
        storage: str | None = None,
        seed: int = 0,
        file: str | None = None,
    ) -> None:
        super().__init__(max_batch_size, None, grids)
        self.space = renamed.in_grid(params or {})
        self.rates = None if points is None else rate_grids.Rates(points, factor, most)
        limits = tuple(search_limits.read(str(text)) for text in constraints or ())
        self.settings = Settings(
            sampler="grid" if self.rates else sampler,
            trials=trials,
            batch=batch,
            rungs=rungs if isinstance(rungs, str) else tuple(rungs or ()),
            eta=eta,
            hyperband=hyperband,
            seeds=tuple(seeds or ()),
            grow=self.rates.grow if self.rates else grow,
            objectives=tuple(objectives or ()),
            constraints=limits,
            storage=storage,
            seed=seed,
            file=composition.expanded(AUTO if self.rates and not file else file, f"{KEY}.file"),
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Search; raises ConfigError before the first run if a space or a key is not valid."""
        assert self.config is not None and self.hydra_context is not None and self.launcher
        refuse_ranks(arguments)
        if importlib.util.find_spec("optuna") is None:
            raise ConfigError("a search needs Optuna, which is not installed: pip install optuna")
        loader = self.hydra_context.config_loader
        compose = partial(loader.load_sweep_config, self.config)
        spaces = self.spaces(arguments, compose, loader)
        first = [check_space(space, compose, self.settings)[0] for space in spaces]
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

    def spaces(
        self, arguments: Sequence[str], compose: Callable[[list[str]], DictConfig], loader: Any
    ) -> list[Space]:
        """The spaces that are searched, each by itself."""
        without_test = {"evaluate.test": "false"}
        if self.rates is None:
            return [
                search_space.read(without_test, self.space, grid, arguments, loader=loader)
                for grid in self.grids or [{}]
            ]
        if self.space:
            raise ConfigError(
                f"{KEY}.params with {KEY}.points, which searches train.lr alone: set grids"
            )
        return rate_grids.spaces(self.grids, arguments, compose, loader, self.rates)

    def _open(self, storage: Any, space: Space, run: RunConfig, compose: Any, name: str) -> Search:
        from harness.runs import search_state, study

        settings = self.settings
        brackets = brackets_of(settings, run, grid_size(space, compose, settings))
        later = {"hyperband": settings.hyperband, "seeds": list(settings.seeds)}
        search_study = study.Study(
            storage,
            name,
            space,
            methods_by(compose),
            sampler=settings.sampler,
            seed=settings.seed,
            objectives=len(settings.objectives),
            batch=brackets.batch,
            rules=study.rules_of(
                **{d.name: d.text() for d in space.dimensions},
                fixed=" ".join(sorted(space.fixed)),
                sampler=settings.sampler,
                seed=settings.seed,
                rungs=list(brackets.rungs),
                eta=settings.eta,
                objectives=list(settings.objectives),
                constraints=[str(limit) for limit in settings.constraints],
                identity=naming.identity(run),  # of the first corner: whatever else is configured
                **{key: value for key, value in later.items() if value},
            ),
        )
        return search_state.Search(
            search_study, compose, run.run_dir.parent, brackets, settings.objectives,
            partial(search_limits.why_not, limits=settings.constraints),
            settings.seeds, settings.grow,
        )  # fmt: skip

    def _search(self, searches: list[Search], results: Any) -> list[Outcome]:
        """Rounds of runs until nothing is left to do; what came out is written after each."""
        print(budget(self.settings, [search.brackets for search in searches]), flush=True)
        door = searches[0].folder / FOLDER / ".lock"
        done: list[Outcome] = []
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
                OUTCOMES.extend(wrong)  # which tells what happened, and the exit status
                print(
                    f"the search is not over: {len(wrong)} of {len(outcomes)} runs did not come to "
                    "their rung; the same command goes on, with retry=1 also what failed by itself",
                    flush=True,
                )
                return done
        for search in searches:
            if search.exhausted and (left := search.left()):
                print(
                    f"{search.study.name}: no candidate is left that was not tried, {left} fewer "
                    f"than {KEY}.trials={search.brackets.trials}",
                    flush=True,
                )
        results.show(searches)
        return done


@lru_cache(maxsize=8)
def methods_by(compose: Callable[[list[str]], DictConfig]) -> search_space.MethodOf:
    """What the overrides of `unused_keys.DECIDES` choose; each is composed once."""

    @cache
    def chosen(deciding: tuple[str, ...]) -> unused_keys.Chosen | None:
        return unused_keys.chosen_by(deciding, compose)

    return lambda overrides: chosen(tuple(overrides))


def _answers(outcome: Outcome) -> bool:
    """Whether an outcome says something of the candidate, or else something went wrong."""
    from harness.runs import search_state

    fine = outcome.status in ("finished", "skipped", "paused")
    return fine or outcome.failure_class in search_state.ANSWERS


def grid_size(space: Space, compose: Callable[[list[str]], DictConfig], settings: Settings) -> int:
    """Points of a grid; 0 of another sampler."""
    return sum(1 for _ in space.points(methods_by(compose))) if settings.sampler == "grid" else 0


def check_space(
    space: Space, compose: Callable[[list[str]], DictConfig], settings: Settings
) -> list[RunConfig]:
    """Compose and validate every method and every end of the space; returns these runs.

    Raises:
        ConfigError: a value, a key or a rung that cannot be.
    """
    method_of = methods_by(compose)
    _, runs, _ = check(list(space.corners(method_of)), compose)
    if settings.sampler == "grid":
        next(iter(space.points(method_of)))  # or else an interval has no step
    for dimension in space.dimensions:
        if dimension.factor and settings.sampler != "grid":
            raise ConfigError(
                f"{dimension.name}: values by factors of {dimension.factor:g} are a grid's: set "
                f"{KEY}.sampler=grid, or log=true in place of the factor"
            )
    for run in runs:
        if run.evaluate.test:
            raise ConfigError(
                "evaluate.test=true: candidates are compared on validation, no run of a search "
                "reads the test text, and workers get no test set; leave it out"
            )
        if run.rerun:
            raise ConfigError(
                "rerun=true in a search would begin every rung anew: delete the experiment's "
                "folder, or choose another experiment_name"
            )
        if run.launch.pause_at is not None:
            raise ConfigError(
                f"launch.pause_at={run.launch.pause_at} in a search, which pauses runs itself: set "
                f"{KEY}.rungs"
            )
        if run.seed in settings.seeds:
            raise ConfigError(
                f"{KEY}.seeds={list(settings.seeds)}: seed={run.seed} is the search's own; give "
                "further ones"
            )
        rungs_of(settings, run)
    if settings.rungs and len({run.train.steps for run in runs}) > 1:
        shown = settings.rungs if isinstance(settings.rungs, str) else list(settings.rungs)
        raise ConfigError(
            f"{KEY}.rungs={shown}: rungs are steps of one and the same schedule, and train.steps "
            "is searched: leave one of them out"
        )
    return runs


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
