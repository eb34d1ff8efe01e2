"""What `hydra.sweeper` says of a search, checked; its rungs and brackets, and what it may cost.

A bracket is a number of candidates that are proposed together and halved. Of Hyperband (Li et al.,
arXiv 1603.06560) the first bracket has the most candidates and all rungs; each later one has fewer,
and begins at a later rung, so that what is slow at first is found, too.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from harness.config.errors import ConfigError, nearest, require
from harness.config.run_config import RunConfig
from harness.runs import halving, search_limits
from harness.runs.search_limits import OBJECTIVES

SAMPLERS = ("grid", "random", "quasi_random", "tpe", "gp", "cmaes", "nsga2")
ADAPTIVE = ("tpe", "gp", "cmaes", "nsga2")  # whose proposals depend on what was found
TRIALS = 20  # candidates, where neither `trials` nor a grid says how many
MOST = 100_000
AUTO = "auto"
# What search=NAME chooses, as keys of the sweeper; the name of a sampler chooses that.
SHORT_FORMS = {
    "halving": ("rungs=auto",),
    "hyperband": ("rungs=auto", "hyperband=true"),
    **{name: (f"sampler={name}",) for name in SAMPLERS},
}
KEY = "hydra.sweeper"


def short_forms(overrides: Sequence[str], *, always: bool) -> tuple[list[str], bool]:
    """Overrides of a search with its keys as Hydra has them, and whether it is one.

    `search=halving` and its like choose the sweeper and what it does; `search.KEY` is
    `hydra.sweeper.KEY`, in a search alone.

    Raises:
        ConfigError: a short form that there is not.
    """
    chosen = [text.partition("=")[2] for text in overrides if text.startswith("search=")]
    if not (always or chosen):
        return list(overrides), False
    typed = ["hydra/sweeper=search"]
    for name in chosen:
        if name not in SHORT_FORMS:
            raise ConfigError(f"search={name}: {nearest(name, SHORT_FORMS)}")
        typed += [f"{KEY}.{text}" for text in SHORT_FORMS[name]]
    own = [text for text in overrides if text.startswith("search.")]
    typed += [f"{KEY}.{text.removeprefix('search.')}" for text in own]
    # Flags stay in front: the command line's parser takes none between overrides.
    place = min((i for i, text in enumerate(overrides) if text.startswith("search=")), default=0)
    rest = [[t for t in part if not t.startswith(("search=", "search."))]
            for part in (overrides[:place], overrides[place:])]  # fmt: skip
    return [*rest[0], *typed, *rest[1]], True


@dataclass(frozen=True)
class Settings:
    """What `hydra.sweeper` says of a search; conf/hydra/sweeper/search.yaml explains each."""

    sampler: str = "random"
    trials: int | None = None
    batch: int | None = None
    rungs: tuple[int, ...] | str = ()
    eta: int = 3
    hyperband: bool = False
    seeds: tuple[int, ...] = ()
    grow: int = 0
    objectives: tuple[str, ...] = ("validation.nll",)
    constraints: tuple[search_limits.Limit, ...] = ()
    storage: str | None = None
    seed: int = 0
    file: str | None = None

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ConfigError(f"{KEY}.sampler={self.sampler}: {nearest(self.sampler, SAMPLERS)}")
        if self.sampler == "cmaes" and importlib.util.find_spec("cmaes") is None:
            raise ConfigError(f"{KEY}.sampler=cmaes needs the package cmaes: pip install cmaes")
        for name in ("trials", "batch"):
            value = getattr(self, name)
            fine = value is None or (_is_whole(value) and 0 < value <= MOST)
            require(fine, f"{KEY}.{name}", value, f"1 to {MOST} candidates, or null")
        require(_is_whole(self.eta) and self.eta >= 2, f"{KEY}.eta", self.eta, "2 or more")
        seed, grow = self.seed, self.grow
        require(_is_whole(seed) and seed >= 0, f"{KEY}.seed", seed, "a whole number from 0")
        fine = _is_whole(grow) and 0 <= grow <= MOST
        require(fine, f"{KEY}.grow", grow, "a whole number from 0: how often an interval may grow")
        self._check_rungs()
        self._check_seeds()
        self._check_objectives()

    def _check_rungs(self) -> None:
        rungs = self.rungs
        hyperband = self.hyperband
        require(isinstance(hyperband, bool), f"{KEY}.hyperband", hyperband, "true or false")
        if isinstance(rungs, str):
            require(rungs == AUTO, f"{KEY}.rungs", rungs, "optimizer steps as [20,60], or auto")
        else:
            whole = all(_is_whole(rung) and rung > 0 for rung in rungs)
            fine = whole and all(a < b for a, b in itertools.pairwise(rungs))
            require(fine, f"{KEY}.rungs", list(rungs), "optimizer steps, each above the one before")
        if hyperband and not rungs:
            raise ConfigError(
                f"{KEY}.hyperband=true without rungs: it is brackets that begin at different ones; "
                f"set {KEY}.rungs=auto"
            )
        if hyperband and self.sampler == "grid":
            raise ConfigError(
                f"{KEY}.hyperband=true with {KEY}.sampler=grid, whose order would say which points "
                "begin at which rung; choose another sampler"
            )
        if hyperband and self.batch is not None:
            raise ConfigError(
                f"{KEY}.batch={self.batch} with {KEY}.hyperband=true, which says itself how many "
                "candidates a bracket has; leave one of them out"
            )

    def _check_seeds(self) -> None:
        seeds = list(self.seeds)
        fine = all(_is_whole(seed) and seed >= 0 for seed in seeds) and len(set(seeds)) == len(
            seeds
        )
        require(fine, f"{KEY}.seeds", seeds, "further seeds, whole numbers from 0, each once")

    def _check_objectives(self) -> None:
        for objective in self.objectives:
            if objective not in OBJECTIVES:
                raise ConfigError(
                    f"{KEY}.objectives: {objective}: {nearest(objective, OBJECTIVES)}"
                )
        names = list(self.objectives)
        fine = names[:1] == ["validation.nll"] and len(set(names)) == len(names)
        require(fine, f"{KEY}.objectives", names, "validation.nll first, and each once")
        if len(names) > 1 and self.rungs:
            shown = self.rungs if isinstance(self.rungs, str) else list(self.rungs)
            raise ConfigError(
                f"{KEY}.rungs={shown} with several objectives: halving compares by one number; "
                "leave the rungs or the further objectives out"
            )
        if len(names) > 1 and self.sampler == "cmaes":
            raise ConfigError(
                f"{KEY}.sampler=cmaes takes one objective; tpe and nsga2 take several"
            )
        if len(names) > 1 and self.grow:
            raise ConfigError(
                f"{KEY}.grow={self.grow} with several objectives, of which there is no one best at "
                "an end; leave one of them out"
            )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Brackets:
    """How many candidates each bracket of a search has, and at which rungs they are compared."""

    rungs: tuple[int, ...]  # optimizer steps, the last one is the end
    eta: int
    hyperband: bool
    trials: int  # candidates in all, beside those of intervals that grow
    batch: int  # candidates of a bracket, where it is not Hyperband's

    def of(self, place: int) -> tuple[int, tuple[int, ...]]:
        """Candidates and rungs of bracket `place`, from 0."""
        if not self.hyperband:
            return self.batch, self.rungs
        later = len(self.rungs) - 1 - place % len(self.rungs)  # rungs after the bracket's first
        return hyperband_size(len(self.rungs), later, self.eta), self.rungs[-1 - later :]

    def in_turn(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Candidates and rungs of every bracket, the last one with what is left of `trials`."""
        left = self.trials
        for place in itertools.count():
            if left <= 0:
                return
            size, rungs = self.of(place)
            yield min(size, left), rungs
            left -= size

    def most_steps(self) -> int:
        """Optimizer steps of all brackets, if no candidate diverges and no interval grows."""
        return sum(halving.most_steps(size, rungs, self.eta) for size, rungs in self.in_turn())

    def most_at_the_end(self) -> int:
        """Candidates that come to the last rung, if none diverges."""
        return sum(halving.most_at_the_end(size, rungs, self.eta) for size, rungs in self.in_turn())


def hyperband_size(rungs: int, later: int, eta: int) -> int:
    """Candidates of Hyperband's bracket that has `later` rungs after its first, of `rungs` rungs.

    n = ceil((s_max + 1) / (s + 1) * eta^s) of the paper's algorithm 1, with s = `later`.
    """
    return -(-rungs * eta**later // (later + 1))


def rungs_of(settings: Settings, run: RunConfig) -> tuple[int, ...]:
    """The rungs of a search of runs like `run`, with its last step.

    Of `auto` each is 1/eta of the next, as a multiple of evaluate.interval, as far as there is one.

    Raises:
        ConfigError: a rung where validation is not read, or after the end; or there is no rung.
    """
    steps, every = run.train.steps, run.evaluate.interval
    if settings.rungs == AUTO:
        auto_rungs, exact = [steps], float(steps)
        while (exact := exact / settings.eta) >= every:
            auto_rungs.insert(0, int(exact + 1e-9) // every * every)
        if len(auto_rungs) == 1:
            raise ConfigError(
                f"{KEY}.rungs=auto: validation is read every evaluate.interval={every} steps, and "
                f"train.steps={steps} / eta={settings.eta} is before that: set evaluate.interval="
                f"{max(1, steps // settings.eta**2)}"
            )
        return tuple(auto_rungs)
    rungs = tuple(int(rung) for rung in settings.rungs)
    for rung in rungs:
        if rung >= steps:
            raise ConfigError(
                f"{KEY}.rungs={list(rungs)}: expected steps below train.steps={steps}, which is "
                "the last rung"
            )
        if rung % every:
            raise ConfigError(
                f"{KEY}.rungs={list(rungs)}: validation is read every evaluate.interval={every} "
                f"steps, and not after step {rung}: make it a multiple, or set evaluate.interval"
            )
    return (*rungs, steps)


def brackets_of(settings: Settings, run: RunConfig, grid_size: int) -> Brackets:
    """How a search of runs like `run` is divided; `grid_size` is 0 where it is no grid."""
    rungs, eta = rungs_of(settings, run), settings.eta
    if settings.hyperband:
        sizes = [hyperband_size(len(rungs), later, eta) for later in range(len(rungs))]
        trials = settings.trials or grid_size or sum(sizes)
        batch = max(sizes)
    else:
        trials = settings.trials or grid_size or TRIALS
        grown = eta ** (len(rungs) - 1)  # candidates of which one comes to the end
        adaptive = {"nsga2": TRIALS}.get(settings.sampler, grown)
        whole = settings.trials or TRIALS
        batch = settings.batch or (adaptive if settings.sampler in ADAPTIVE else whole)
    if settings.sampler == "grid":
        trials = min(trials, grid_size)
        batch = settings.batch or trials
    return Brackets(rungs, eta, settings.hyperband, trials, batch)


def budget(settings: Settings, several: Sequence[Brackets]) -> str:
    """How many candidates and optimizer steps a search takes, in a line."""
    steps = most_steps(settings, several)
    whole = sum(brackets.trials * brackets.rungs[-1] for brackets in several)
    number = sum(brackets.trials for brackets in several)
    rungs = " or ".join(dict.fromkeys(", ".join(map(str, brackets.rungs)) for brackets in several))
    spaces = f" in {len(several)} spaces" if len(several) > 1 else ""
    share = f", {steps / whole:.2f} of all of them in full" if whole else ""
    seeds = f", {len(settings.seeds) + 1} seeds at the end" if settings.seeds else ""
    text = f"{number} candidates{spaces}, rungs {rungs}{seeds}: {steps:,} optimizer steps{share}"
    return text + ("; more where an interval grows" if settings.grow else "")


def most_steps(settings: Settings, several: Sequence[Brackets]) -> int:
    """Optimizer steps of a search, if nothing diverges and no interval grows."""
    more = len(settings.seeds)
    return sum(b.most_steps() + more * b.rungs[-1] * b.most_at_the_end() for b in several)
